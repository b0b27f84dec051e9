"""torchdiffeq's signatures over our engine: change the import and keep the code.

The state, of any shape or a tuple of tensors, is one row, so that it has one step size,
as in torchdiffeq. What our engine does not do goes to torchdiffeq itself: its other
methods, complex states, tolerances and norms of one's own, events, callbacks, and
options beyond `step_size`, `first_step` and `max_num_steps`. B rows (one, but in the
adjoint's quadrature), T times, N numbers of state.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torchdiffeq
from torch import Tensor, nn

from skode._engine.solution import Solution, Status
from skode._engine.solve import OWN, AdjointSolve, solve
from skode.exceptions import SolverError

__all__ = ["odeint", "odeint_adjoint"]

State = Tensor | tuple[Tensor, ...]
Field = Callable[[Tensor, State], State]

_MAX_STEPS = 1_000_000
"""Of a solve that names no `max_num_steps`: torchdiffeq would step on for ever."""

_ONLY_OURS = ("tsit5",)
_CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")

_STIFF = (
    "The problem is stiff, discontinuous or blows up there: loosen rtol and atol, "
    "compute in float64, or take an implicit method: method='scipy_solver', "
    "options={'solver': 'Radau'} (odeint_adjoint has its gradient, where the problem "
    "can be solved backwards in time as well)."
)
_REMEDY = {
    Status.MAX_STEPS: "Raise it with options={'max_num_steps': ...}. Or: " + _STIFF,
    Status.STEP_UNDERFLOW: _STIFF,
    Status.NON_FINITE: (
        "The state grows without bound, or func returns NaN or infinity there: look "
        "at func, or shorten step_size if the method has one."
    ),
}
_BACKWARDS = (
    "This happened while odeint_adjoint solved backwards in time, where what contracts "
    "forwards expands: odeint, whose gradient needs no such solve, takes the same "
    "arguments. Or loosen adjoint_rtol and adjoint_atol, or raise max_num_steps in "
    "adjoint_options."
)


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
        state; over each tensor of a tuple, and the largest counts. A tuple of
        tolerances, one for each tensor, goes to torchdiffeq.
    method : str or None, default=None
        "dopri5" if None; `skode`'s own methods and all of torchdiffeq's.
    options : mapping or None, default=None
        As torchdiffeq's. Our engine reads `first_step` and `max_num_steps` of adaptive
        methods (the latter counts attempts, for each interval of `t` on average; a
        million in all if not given) and `step_size` of fixed steps; with any other
        the solve runs in torchdiffeq.
    event_fn : callable or None, default=None
        As torchdiffeq's, where such a solve runs.

    Returns
    -------
    y : Tensor of shape (T, ...), or tuple of such tensors
        States at the times `t`. With `event_fn`, the event's time comes first.

    Raises
    ------
    ValueError
        If there is no such method, or it does not go with the other arguments.
    SolverError
        If the solve takes more than `max_num_steps` steps, needs steps below the
        resolution of time, or meets values that are not finite.

    Notes
    -----
    Gradients are those of the computed solution. They pass by checkpoints of the steps
    where `func` is a module whose every tensor that needs a gradient is one of its
    parameters, and by autograd through every operation where it is not.

    Examples
    --------
    >>> import torch
    >>> from skode import odeint
    >>> y0 = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> y = odeint(lambda t, y: -y, y0, torch.tensor([0.0, 1.0]))
    >>> y[-1].detach()
    tensor([0.3679, 0.7358])
    """
    call = _Call(method, options, rtol, atol)
    step = call.own_step(func, y0, t, event_fn)
    if step is None:
        return call.by_torchdiffeq(func, y0, t, event_fn)
    layout = _Layout(func, y0)
    params = _captured(layout, t)
    plan = _Own(
        layout.field if params is None else _Closed(layout.field, params),
        t.double(),
        () if params is None else params,
        "backprop" if params is None else "checkpoint",
        call,
        step,
        layout.parts,
    )
    try:
        ys = plan.solve(layout.row)
    except RuntimeError as error:
        # A field that is itself a gradient with respect to y counts on autograd, which
        # our engine does without. Its first evaluation tells.
        if "does not require grad" not in str(error) or call.method in _ONLY_OURS:
            raise
        return call.by_torchdiffeq(func, y0, t, event_fn)
    return layout.unpack(ys)


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
        As `options`, for the solve backwards; None: as forwards. The norm
        ``"seminorm"`` is what our engine always takes: the parameters' gradient is no
        part of the error. With any other norm the solve runs in torchdiffeq.
    adjoint_params : sequence of Tensor or None, default=None
        What gets a gradient beside `y0` and `t`; None: the module's parameters.

    Returns
    -------
    y : Tensor of shape (T, ...), or tuple of such tensors
        States at the times `t`.

    Raises
    ------
    ValueError
        As in `odeint`; if neither `func` is a module nor `adjoint_params` are given; if
        `options` are given and `adjoint_method` is another one, but no
        `adjoint_options`.
    SolverError
        As in `odeint`, forwards or backwards.

    Notes
    -----
    The adjoint is solved in units of the largest gradient that comes in, so that the
    tolerances do not depend on what the loss is divided by.
    """
    if adjoint_params is None:
        if not isinstance(func, nn.Module):
            raise ValueError(
                "func must be a torch.nn.Module, whose parameters then get gradients, "
                "or adjoint_params must name them; pass adjoint_params=() if there are "
                "none."
            )
        replica = getattr(func, "_is_replica", False)  # whose tensors DataParallel owns
        trained: tuple[Tensor, ...] = () if replica else tuple(func.parameters())
    else:
        replica, trained = False, tuple(adjoint_params)
    call = _Call(method, options, rtol, atol)
    back = call.backwards(adjoint_method, adjoint_options, adjoint_rtol, adjoint_atol)
    step = call.own_step(func, y0, t, event_fn)
    step_back = back.own_step(func, y0, t, event_fn)
    if step is None or step_back is None or replica:

        def run(y0: State, t: Tensor) -> Any:
            with _advice(call.method, back.method):
                return torchdiffeq.odeint_adjoint(
                    func,
                    y0,
                    t,
                    event_fn=event_fn,
                    adjoint_rtol=adjoint_rtol,
                    adjoint_atol=adjoint_atol,
                    adjoint_method=adjoint_method,
                    adjoint_options=adjoint_options,
                    adjoint_params=None if adjoint_params is None else trained,
                    **call.arguments,
                )

        if event_fn is not None or replica:
            return run(y0, t)
        return _require_all(_guarded(run, y0, t, trained), t)
    layout = _Layout(func, y0)
    solution = solve(
        layout.field,
        layout.row,
        t.double(),
        params=tuple(param for param in trained if param.requires_grad),
        method=call.method,
        rtol=float(rtol),
        atol=float(atol),
        gradient="adjoint",
        adjoint=AdjointSolve(
            back.method,
            float(back.rtol),
            float(back.atol),
            step_back.step_size,
            step_back.max_steps,
            step_back.first_step,
            remedy=_BACKWARDS,
        ),
        parts=layout.parts,
        step_size=step.step_size,
        max_steps=step.max_steps,
        first_step=step.first_step,
    )
    return layout.unpack(_require_success(solution))


@dataclass(frozen=True, slots=True)
class _Own:
    """A solve by our engine, whose gradient is that of the computed solution."""

    field: Callable[[Tensor, Tensor], Tensor]
    t: Tensor
    params: tuple[Tensor, ...]
    gradient: str
    call: "_Call"
    step: "_Step"
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
        return _require_success(solution)


class _Reached(Exception):
    """An evaluation led to a tensor that needs a gradient."""


@dataclass(frozen=True, slots=True)
class _Step:
    """The options, in the engine's words."""

    step_size: float | None
    first_step: float | None
    max_steps: int


class _Call:
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

    def by_torchdiffeq(self, func: Field, y0: State, t: Tensor, event_fn: Any) -> Any:
        """Return what torchdiffeq's `odeint` does."""
        with _advice(self.method):
            ys = torchdiffeq.odeint(func, y0, t, event_fn=event_fn, **self.arguments)
        return ys if event_fn is not None else _require_all(ys, t)

    def backwards(
        self,
        method: str | None,
        options: Mapping[str, Any] | None,
        rtol: Any,
        atol: Any,
    ) -> "_Call":
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
        return _Call(method, options, rtol, atol, norms=("seminorm",))

    def own_step(self, func: Field, y0: State, t: Any, event_fn: Any) -> _Step | None:
        """Return how our engine steps, or None if torchdiffeq must solve.

        Raises
        ------
        ValueError
            If neither can.
        """
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
        if self.method in _ONLY_OURS:
            raise ValueError(
                f"method={self.method!r} is skode's own, and goes with real states, "
                "strictly monotone times, tolerances that are numbers, and the options "
                "first_step and max_num_steps. torchdiffeq, which does the rest, has "
                "no such method: take method='dopri5'."
            )
        return None

    def _is_ours(self) -> bool:
        tableau = OWN.get(self.method)
        if tableau is None or not (_is_number(self.rtol) and _is_number(self.atol)):
            return False
        names = set(self._options)
        if "norm" in names and self._options["norm"] in self._norms:
            names.remove("norm")
        if tableau.adaptive:
            return names <= {"first_step", "max_num_steps"}
        # Without a step size, torchdiffeq's fixed steps end at the requested times.
        return names == {"step_size"}

    def _step(self, intervals: int) -> _Step:
        size, first, most = (
            self._options.get(name)
            for name in ("step_size", "first_step", "max_num_steps")
        )
        return _Step(
            None if size is None else float(size),
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


class _Layout:
    """A state of any shape as one row of numbers."""

    def __init__(self, func: Field, y0: State) -> None:
        self.func = func
        self._alone = isinstance(y0, Tensor)
        states = (y0,) if isinstance(y0, Tensor) else y0
        self._shapes = [y.shape for y in states]
        self._sizes = [y.numel() for y in states]
        self.parts = () if self._alone else tuple(size for size in self._sizes if size)
        self.row = torch.cat([y.reshape(-1) for y in states])[None]
        """(1, N)."""

    def field(self, t: Tensor, y: Tensor) -> Tensor:
        """Return dy/dt (B, N) at times (B,) and states (B, N)."""
        if not y.requires_grad:
            y = y.clone()  # the engine's memory, and func may keep what it is given
        if len(y) == 1:  # nothing to stack, in all but the adjoint's quadrature
            return self._slope(t[0], y)
        rows = zip(t, y.split(1), strict=True)
        return torch.cat([self._slope(time, row) for time, row in rows])

    def _slope(self, t: Tensor, row: Tensor) -> Tensor:
        """Return dy/dt (1, N) at one time () and a state (1, N)."""
        if self._alone:
            y = row.view(self._shapes[0])
            return _like(self.func(t, y), y).reshape(row.shape)
        state = self._shaped(row[0], ())
        slopes = self.func(t, state)
        if not isinstance(slopes, (tuple, list)) or len(slopes) != len(state):
            raise ValueError(
                f"func must return a tuple of {len(state)} derivatives, as y0 is a "
                f"tuple of {len(state)} tensors."
            )
        pairs = zip(slopes, state, strict=True)
        return torch.cat([_like(slope, y).reshape(-1) for slope, y in pairs])[None]

    def unpack(self, ys: Tensor) -> State:
        """Return states of the caller's shapes from (1, T, N)."""
        flat, lead = ys[0], (ys.shape[1],)
        if self._alone:
            return flat.reshape((*lead, *self._shapes[0]))
        return self._shaped(flat, lead)

    def _shaped(self, flat: Tensor, lead: tuple[int, ...]) -> tuple[Tensor, ...]:
        parts = flat.split(self._sizes, dim=-1)
        return tuple(
            part.reshape((*lead, *shape))
            for part, shape in zip(parts, self._shapes, strict=True)
        )


def _like(slope: Any, y: Tensor) -> Tensor:
    """Return a derivative of y in its dtype and shape; numbers broadcast.

    Raises
    ------
    TypeError, ValueError
        If it is none.
    """
    if not isinstance(slope, Tensor):
        raise TypeError(
            f"func must return a tensor, or a tuple of them if y0 is one, not "
            f"{type(slope).__name__}."
        )
    if slope.dtype != y.dtype:
        slope = slope.to(y.dtype)
    if slope.shape == y.shape:
        return slope
    if [n for n in slope.shape if n != 1] == [n for n in y.shape if n != 1]:
        return slope.reshape(y.shape)
    try:
        return slope.expand_as(y)
    except RuntimeError:
        raise ValueError(
            f"func must return a derivative of y's shape, {tuple(y.shape)}, got "
            f"{tuple(slope.shape)}."
        ) from None


_CHECKED = 5
"""One in so many evaluations is looked at, since that takes as long as a small net's
own. It has no divisor in common with the stages of most methods, which take turns."""


class _Closed:
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
    y = layout.row.detach().requires_grad_()
    time = t[:1].detach().to(y.dtype).requires_grad_()
    closed = _Closed(layout.field, params)
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


def _require_success(solution: Solution) -> Tensor:
    """Return the states (1, T, N), or say in the caller's words why there are none."""
    try:
        return solution.require_success().ys
    except SolverError as error:
        most = solution.tolerance.max_steps
        raise _gave_up(Status[error.status], error.t[0], most) from None


def _require_all(ys: State, t: Tensor) -> State:
    """Return torchdiffeq's states, or raise if SciPy gave up before the last time."""
    if isinstance(ys, Tensor) and len(ys) < len(t):
        raise _gave_up(Status.STEP_UNDERFLOW, t.tolist()[max(len(ys) - 1, 0)])
    return ys


def _gave_up(status: Status, t: float | None = None, most: int = 0) -> SolverError:
    """Return the error of a solve that ended so, after time t."""
    reason = {
        Status.MAX_STEPS: f"took {most or 'max_num_steps'} steps without an end",
        Status.STEP_UNDERFLOW: "needed steps below the resolution of time",
        Status.NON_FINITE: "met values that are not finite",
    }[status]
    where = "" if t is None else f" at t={t:.6g}"
    return SolverError(
        f"The solve {reason}{where}.",
        t=() if t is None else (t,),
        remedy=_REMEDY[status],
        status=status.name,
    )


def _guarded(
    run: Callable[[State, Tensor], State],
    y0: State,
    t: Tensor,
    params: Sequence[Tensor],
) -> State:
    """Return ``run(y0, t)``, whose gradient reaches `params`, with errors of ours."""
    apply: Any = _Guarded.apply
    if isinstance(y0, Tensor):
        (ys,) = apply(lambda states, t: (run(states[0], t),), 1, y0, t, *params)
        return ys
    return apply(run, len(y0), *y0, t, *params)


class _Guarded(torch.autograd.Function):
    """torchdiffeq's adjoint, kept apart so that its failures backwards can be told."""

    @staticmethod
    def forward(ctx: Any, run: Any, count: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        states, t, params = inputs[:count], inputs[count], inputs[count + 1 :]
        with torch.enable_grad():
            apart = [x.detach().requires_grad_(x.requires_grad) for x in (*states, t)]
            ctx.ys = run(tuple(apart[:-1]), apart[-1])
        ctx.inputs = (*apart, *params)
        return tuple(y.detach() for y in ctx.ys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [x for x in ctx.inputs if x.requires_grad]
        try:
            with _advice():
                found = iter(
                    torch.autograd.grad(
                        ctx.ys, wanted, grads, retain_graph=True, allow_unused=True
                    )
                )
        except SolverError as error:
            raise SolverError(
                error.reason, remedy=_BACKWARDS, status=error.status
            ) from error
        some = (next(found) if x.requires_grad else None for x in ctx.inputs)
        return None, None, *some


@contextmanager
def _advice(*methods: str) -> Iterator[None]:
    """Turn torchdiffeq's assertions about a solve into our error."""
    try:
        yield
    except AssertionError as error:
        for sign, status in (
            ("underflow", Status.STEP_UNDERFLOW),
            ("max_num_steps", Status.MAX_STEPS),
            ("non-finite", Status.NON_FINITE),
        ):
            if sign in str(error):
                raise _gave_up(status) from error
        raise
    except ValueError as error:
        if "Invalid method" in str(error):
            raise ValueError(
                f"There is no method {' or '.join(map(repr, methods))}. skode's own: "
                f"{', '.join(OWN)}. Of torchdiffeq it says: {error}"
            ) from None
        if "must not contain infs or NaNs" in str(error):  # SciPy's Jacobian
            raise _gave_up(Status.NON_FINITE) from error
        raise
