"""The gradient of the computed solution, and all that it has to reach.

Our engine passes it by checkpoints where it knows every tensor that the field's
gradient reaches, and by autograd through every operation where it does not. N numbers
of state, T times.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from skode._engine.solve import solve
from skode._odeint.call import Call, Step
from skode._odeint.failure import require_success
from skode._odeint.layout import Layout


@dataclass(frozen=True, slots=True)
class Discrete:
    """A solve by our engine, whose gradient is that of the computed solution."""

    field: Callable[[Tensor, Tensor], Tensor]
    t: Tensor
    params: tuple[Tensor, ...]
    gradient: str
    call: Call
    step: Step
    parts: tuple[int, ...]

    def solve(self, row: Tensor) -> Tensor:
        """Return the states (1, T, N) from the one at the first time, (1, N)."""
        if not torch.is_grad_enabled() or any(
            x.requires_grad for x in (row, self.t, *self.params)
        ):
            return self._solve(self.field, row, self.gradient)
        # What needs a gradient, if anything does, is out of sight. An evaluation that
        # reaches it ends the solve; a state that needs one makes autograd look.
        try:
            return self._solve(self._watched, row, self.gradient)
        except _Reached:
            return self._solve(self.field, row.detach().requires_grad_(), "backprop")

    def _watched(self, t: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            slope = self.field(t, y)
        if slope.requires_grad:
            raise _Reached
        return slope

    def _solve(
        self, field: Callable[[Tensor, Tensor], Tensor], row: Tensor, gradient: str
    ) -> Tensor:
        solution = solve(
            field,
            row,
            self.t,
            params=self.params,
            method=self.call.method,
            rtol=float(self.call.rtol),
            atol=float(self.call.atol),
            gradient=gradient,
            parts=self.parts,
            step_size=self.step.step_size,
            max_steps=self.step.max_steps,
            first_step=self.step.first_step,
        )
        return require_success(solution)


class _Reached(Exception):
    """An evaluation led to a tensor that needs a gradient."""


_CHECKED = 5
"""One in so many evaluations is looked at, since that takes as long as a small net's
own. It has no divisor in common with the stages of most methods, which take turns."""


class Closed:
    """A field whose gradient reaches nothing but t, y and some parameters.

    Raises
    ------
    RuntimeError
        If an evaluation reaches another tensor: its gradient would be lost.
    """

    def __init__(self, field: Callable[..., Tensor], params: Sequence[Tensor]) -> None:
        self._field = field
        self._known = {id(param) for param in params}
        self._differentiated = 0

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        slope = self._field(t, y)
        if not torch.is_grad_enabled():
            return slope
        self._differentiated += 1
        # Where y has a history, autograd sees all of the solve, and nothing is lost.
        looked_at = self._differentiated % _CHECKED == 1 and y.is_leaf
        if looked_at and not self.closes(slope, t, y):
            raise RuntimeError(
                f"func, at t={t.tolist()[0]:.6g}, reaches a tensor that needs a "
                "gradient and is none of its parameters, though at the first time it "
                "reached none: register it (a list of modules as a ModuleList), or "
                "pass func as a plain function, lambda t, y: func(t, y)."
            )
        return slope

    def closes(self, slope: Tensor, t: Tensor, y: Tensor) -> bool:
        """Return whether an evaluation reaches nothing else."""
        return _leaves(slope) <= self._known | {id(t), id(y)}


def captured(layout: Layout, t: Tensor) -> tuple[Tensor, ...] | None:
    """Return the tensors beside t and y that the field's gradient reaches.

    None if that is not certain: only of a module can we know, and only if all that one
    evaluation leads back to are its own parameters.
    """
    func = layout.func
    if not torch.is_grad_enabled():
        return ()
    if not isinstance(func, nn.Module):
        return None
    params = tuple(param for param in func.parameters() if param.requires_grad)
    y = layout.row.detach().requires_grad_()
    time = t[:1].detach().to(y.dtype).requires_grad_()
    closed = Closed(layout.field, params)
    return params if closed.closes(layout.field(time, y), time, y) else None


def _leaves(value: Tensor) -> set[int]:
    """Return the identities of the leaves of a graph."""
    found: set[int] = set()
    seen: set[Any] = set()
    nodes = [value.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.add(id(variable))
        nodes.extend(parent for parent, _ in node.next_functions)
    return found
