"""torchdiffeq's signatures over our engine: change the import and keep the code.

The state, of any shape or a tuple of tensors, is one row, so that it has one step size,
as in torchdiffeq. What our engine does not do goes to torchdiffeq itself: its other
methods, complex states, tolerances and norms of one's own, events, callbacks, and
options beyond `step_size`, `first_step` and `max_num_steps`. B rows (one, but in the
adjoint's quadrature), T times, N numbers of state.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torchdiffeq
from torch import Tensor, nn

from skode._engine.solve import OWN, AdjointSolve, solve
from skode.exceptions import SolverError

__all__ = ["odeint", "odeint_adjoint"]

State = Tensor | tuple[Tensor, ...]
Field = Callable[[Tensor, State], State]

_MAX_STEPS = 1_000_000
_OPTIONS = {"step_size", "first_step", "max_num_steps"}
_CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")


def odeint(
    func: Field,
    y0: State,
    t: Tensor,
    *,
    rtol: float = 1e-7,
    atol: float = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    event_fn: Callable[[Tensor, State], Tensor] | None = None,
) -> Any:
    """Solve an initial value problem as ``torchdiffeq.odeint`` does.

    Parameters
    ----------
    func : callable
        ``func(t, y)``, the derivative of y, with t a scalar tensor and y as `y0`.
    y0 : Tensor or tuple of Tensor
        State at ``t[0]``, of any shape.
    t : Tensor of shape (T,)
        Times, strictly increasing or decreasing.
    rtol, atol : float, default=1e-7, 1e-9
        Tolerances. The error of a step is judged by its root mean square over the
        state; over each tensor of a tuple, and the largest counts.
    method : str or None, default=None
        "dopri5" if None; `skode`'s own methods and all of torchdiffeq's.
    options : mapping or None, default=None
        As torchdiffeq's. `step_size`, `first_step` and `max_num_steps` are read by
        our engine; with any other the solve runs in torchdiffeq.
    event_fn : callable or None, default=None
        As torchdiffeq's, where such a solve runs.

    Returns
    -------
    y : Tensor of shape (T, ...), or tuple of such tensors
        States at the times `t`. With `event_fn`, the event's time comes first.

    Raises
    ------
    SolverError
        If the solve takes more than `max_num_steps` steps, needs steps below the
        resolution of time, or meets values that are not finite.

    Notes
    -----
    Gradients are those of the computed solution. They pass by checkpoints of the steps
    where `func` is a module whose every tensor that needs a gradient is one of its
    parameters, and by autograd through every operation where it is not.
    """
    arguments: Any = {"rtol": rtol, "atol": atol, "method": method, "options": options}
    step = _own_options(func, y0, t, event_fn=event_fn, **arguments)
    if step is None:
        with _advice():
            return torchdiffeq.odeint(func, y0, t, event_fn=event_fn, **arguments)
    layout = _Layout(func, y0)
    params = _captured(layout, t)
    ys = solve(
        layout.field,
        layout.row,
        t.double(),
        params=() if params is None else params,
        method=method or "dopri5",
        rtol=float(rtol),
        atol=float(atol),
        gradient="backprop" if params is None else "checkpoint",
        parts=layout.parts,
        **step,
    )
    return layout.unpack(ys.require_success().ys)


def odeint_adjoint(
    func: Field,
    y0: State,
    t: Tensor,
    *,
    rtol: float = 1e-7,
    atol: float = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    event_fn: Callable[[Tensor, State], Tensor] | None = None,
    adjoint_rtol: float | None = None,
    adjoint_atol: float | None = None,
    adjoint_method: str | None = None,
    adjoint_options: Mapping[str, Any] | None = None,
    adjoint_params: Sequence[Tensor] | None = None,
) -> Any:
    """Solve as ``torchdiffeq.odeint_adjoint`` does: gradients by the adjoint method.

    Parameters
    ----------
    func, y0, t, rtol, atol, method, options, event_fn
        As for `odeint`; `func` must be a module, or `adjoint_params` be given.
    adjoint_rtol, adjoint_atol, adjoint_method : default=None
        For the solve backwards in time; None: as forwards.
    adjoint_options : mapping or None, default=None
        As torchdiffeq's, where such a solve runs, but for ``{"norm": "seminorm"}``,
        which is what our engine always does: the parameters' gradient is no part of
        the error.
    adjoint_params : sequence of Tensor or None, default=None
        What gets a gradient beside `y0` and `t`; None: the module's parameters.

    Returns
    -------
    y : Tensor of shape (T, ...), or tuple of such tensors
        States at the times `t`.

    Raises
    ------
    ValueError
        If neither `func` is a module nor `adjoint_params` are given.
    SolverError
        As in `odeint`, forwards or backwards.
    """
    if adjoint_params is None and not isinstance(func, nn.Module):
        raise ValueError(
            "func must be a torch.nn.Module, whose parameters then get gradients, or "
            "adjoint_params must name them; pass adjoint_params=() if there are none."
        )
    arguments: Any = {"rtol": rtol, "atol": atol, "method": method, "options": options}
    step = _own_options(func, y0, t, event_fn=event_fn, **arguments)
    back = adjoint_method or method or "dopri5"
    ours = back in OWN and adjoint_options in (None, {}, {"norm": "seminorm"})
    if step is None or not ours:
        with _advice():
            return torchdiffeq.odeint_adjoint(
                func,
                y0,
                t,
                event_fn=event_fn,
                adjoint_rtol=adjoint_rtol,
                adjoint_atol=adjoint_atol,
                adjoint_method=adjoint_method,
                adjoint_options=adjoint_options,
                adjoint_params=adjoint_params,
                **arguments,
            )
    layout = _Layout(func, y0)
    if adjoint_params is None:
        assert isinstance(func, nn.Module), "checked above"
        adjoint_params = tuple(func.parameters())
    ys = solve(
        layout.field,
        layout.row,
        t.double(),
        params=tuple(param for param in adjoint_params if param.requires_grad),
        method=method or "dopri5",
        rtol=float(rtol),
        atol=float(atol),
        gradient="adjoint",
        adjoint=AdjointSolve(
            back,
            float(rtol if adjoint_rtol is None else adjoint_rtol),
            float(atol if adjoint_atol is None else adjoint_atol),
        ),
        parts=layout.parts,
        **step,
    )
    return layout.unpack(ys.require_success().ys)


def _own_options(
    func: Field,
    y0: State,
    t: Tensor,
    *,
    rtol: Any,
    atol: Any,
    method: str | None,
    options: Mapping[str, Any] | None,
    event_fn: Any,
) -> dict[str, Any] | None:
    """Return the engine's words for the options, or None if torchdiffeq must solve."""
    tableau = OWN.get(method or "dopri5")
    options = options or {}
    states = (y0,) if isinstance(y0, Tensor) else y0
    ours = (
        tableau is not None
        and event_fn is None
        and set(options) <= _OPTIONS
        # Without a step size, torchdiffeq's fixed steps end at the requested times.
        and (tableau.adaptive or "step_size" in options)
        and all(_is_number(tol) for tol in (rtol, atol))
        and isinstance(states, tuple)
        and len({(y.dtype, y.device) for y in states}) == 1
        and states[0].dtype in (torch.float32, torch.float64)
        and sum(y.numel() for y in states) > 0
        and isinstance(t, Tensor)
        and t.ndim == 1
        and t.device == states[0].device
        and bool((t.diff() > 0).all() | (t.diff() < 0).all())
        and not any(hasattr(func, name) for name in _CALLBACKS)
    )
    if not ours:
        return None
    step, first = options.get("step_size"), options.get("first_step")
    return {
        "step_size": None if step is None else float(step),
        "first_step": None if first is None else float(first),
        "max_steps": min(options.get("max_num_steps", _MAX_STEPS), _MAX_STEPS),
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (
        isinstance(value, Tensor) and value.ndim == 0
    )


class _Layout:
    """A state of any shape as one row of numbers."""

    def __init__(self, func: Field, y0: State) -> None:
        self.func = func
        self._alone = isinstance(y0, Tensor)
        states = (y0,) if isinstance(y0, Tensor) else y0
        self._shapes = [y.shape for y in states]
        self._sizes = [y.numel() for y in states]
        self.parts = () if self._alone else tuple(size for size in self._sizes if size)
        # Times are float64 whatever the state is, as torchdiffeq's are: a step may be
        # far shorter than float32 could tell.
        self.row = torch.cat([y.reshape(-1) for y in states])[None]
        """(1, N)."""

    def field(self, t: Tensor, y: Tensor) -> Tensor:
        """Return dy/dt (B, N) at times (B,) and states (B, N)."""
        return torch.stack([self._one(*row) for row in zip(t, y, strict=True)])

    def _one(self, t: Tensor, y: Tensor) -> Tensor:
        slope = self.func(t, self._shaped(y, ()))
        slopes = (slope,) if isinstance(slope, Tensor) else slope
        return torch.cat([part.reshape(-1) for part in slopes])

    def unpack(self, ys: Tensor) -> State:
        """Return states of the caller's shapes from (1, T, N)."""
        return self._shaped(ys[0], (ys.shape[1],))

    def _shaped(self, flat: Tensor, lead: tuple[int, ...]) -> State:
        parts = flat.split(self._sizes, dim=-1)
        states = tuple(
            part.reshape((*lead, *shape))
            for part, shape in zip(parts, self._shapes, strict=True)
        )
        return states[0] if self._alone else states


def _captured(layout: _Layout, t: Tensor) -> tuple[Tensor, ...] | None:
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
    with torch.enable_grad():
        y = layout.row.detach().requires_grad_()
        time = t[:1].detach().to(y.dtype).requires_grad_()
        slope = layout.field(time, y)
    known = {id(x) for x in (y, time, *params)}
    return params if _leaves(slope) <= known else None


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


@contextmanager
def _advice() -> Iterator[None]:
    """Turn torchdiffeq's assertions about a solve into our error."""
    try:
        yield
    except AssertionError as error:
        text = str(error)
        for sign, reason in (
            ("underflow", "The solve needed steps below the resolution of time."),
            ("max_num_steps", "The solve reached max_num_steps."),
            ("non-finite", "The solve met values that are not finite."),
        ):
            if sign in text:
                raise SolverError(
                    reason,
                    remedy="The problem is stiff or blows up there: loosen rtol and "
                    "atol, use float64, or take an implicit method such as "
                    "method='scipy_solver', options={'solver': 'Radau'}.",
                ) from error
        raise
