"""What a call says of how to solve, and whether our engine can."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from skode._engine.solve import OWN
from skode._odeint.layout import Field, State

_MAX_STEPS = 1_000_000
"""Of a solve that names no `max_num_steps`: torchdiffeq would step on for ever."""

_ONLY_OURS = ("tsit5",)
_CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")


@dataclass(frozen=True, slots=True)
class Step:
    """The options, in the engine's words."""

    first_step: float | None
    max_steps: int


class Call:
    """What a call says of how to solve, forwards or backwards in time."""

    def __init__(
        self,
        method: str | None,
        options: Mapping[str, Any] | None,
        rtol: Any,
        atol: Any,
        norms: tuple[str, ...] = (),
    ) -> None:
        self.method = "dopri5" if method is None else method
        self.rtol, self.atol = rtol, atol
        self._options = {} if options is None else dict(options)
        self._norms = norms

    @property
    def arguments(self) -> dict[str, Any]:
        """As torchdiffeq takes them."""
        options = self._options or None
        names = {"rtol": self.rtol, "atol": self.atol, "method": self.method}
        return {**names, "options": options}

    def backwards(
        self,
        method: str | None,
        options: Mapping[str, Any] | None,
        rtol: Any,
        atol: Any,
    ) -> "Call":
        """Return the call of the adjoint, where None means as forwards."""
        method = self.method if method is None else method
        if options is None:
            if self._options and method != self.method:
                raise ValueError(
                    f"options are those of method={self.method!r}: name those of "
                    f"adjoint_method={method!r} in adjoint_options, {{}} for none."
                )
            options = {k: v for k, v in self._options.items() if k != "norm"}
        rtol = self.rtol if rtol is None else rtol
        atol = self.atol if atol is None else atol
        return Call(method, options, rtol, atol, norms=("seminorm",))

    def own_step(self, func: Field, y0: State, t: Any, event_fn: Any) -> Step | None:
        """Return how our engine steps, or None if torchdiffeq must solve."""
        if (
            event_fn is None
            and self._is_ours()
            and _is_plain(y0, t)
            and not any(
                hasattr(func, name) or hasattr(func, f"{name}_adjoint")
                for name in _CALLBACKS
            )
        ):
            return self._step(intervals=max(1, len(t) - 1))
        return None

    def require_theirs(self) -> None:
        """Refuse what torchdiffeq lacks, or stumbles over, where it must solve.

        Raises
        ------
        ValueError
            If the method is ours alone, or the step size no step.
        """
        size = self._options.get("step_size", 1.0)
        if _is_number(size) and not size > 0:
            raise ValueError(f"step_size must be a number > 0, got {size!r}.")
        if self.method in _ONLY_OURS:
            raise ValueError(
                f"method={self.method!r} is skode's own, and goes with real states, "
                "strictly monotone times, tolerances that are numbers, and the options "
                "first_step and max_num_steps. torchdiffeq, which does the rest, has "
                "no such method: take method='dopri5'."
            )

    def _is_ours(self) -> bool:
        tableau = OWN.get(self.method)
        # Even steps of one state are torchdiffeq's: ours prepare for rows that differ.
        if tableau is None or not tableau.adaptive:
            return False
        if not (_is_number(self.rtol) and _is_number(self.atol)):
            return False
        names = set(self._options)
        if "norm" in names and self._options["norm"] in self._norms:
            names.remove("norm")
        return names <= {"first_step", "max_num_steps"}

    def _step(self, intervals: int) -> Step:
        first, most = map(self._options.get, ("first_step", "max_num_steps"))
        return Step(
            None if first is None else float(first),
            _MAX_STEPS if most is None else int(most) * intervals,
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (
        isinstance(value, Tensor) and value.ndim == 0 and not value.requires_grad
    )


def _is_plain(y0: State, t: Any) -> bool:
    """Return whether our engine takes such states and times."""
    states = (y0,) if isinstance(y0, Tensor) else y0
    return (
        isinstance(states, tuple)
        and len({(y.dtype, y.device) for y in states}) == 1
        and states[0].dtype in (torch.float32, torch.float64)
        and sum(y.numel() for y in states) > 0
        and isinstance(t, Tensor)
        and t.is_floating_point()
        and t.ndim == 1
        and len(t) > 0
        and t.device == states[0].device
        and _is_strict(t.tolist())
    )


def _is_strict(times: list[float]) -> bool:
    pairs = list(pairwise(times))
    return all(a < b for a, b in pairs) or all(a > b for a, b in pairs)
