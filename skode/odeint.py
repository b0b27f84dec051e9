"""torchdiffeq's signatures over our engine: change the import and keep the code.

The state, of any shape or a tuple of tensors, is one row, so that it has one step size,
as in torchdiffeq. What our engine does not do goes to torchdiffeq itself: its other
methods, fixed steps, complex states, tolerances and norms of one's own, events,
callbacks, and options beyond `first_step` and `max_num_steps`. B rows (one, but in the
adjoint's quadrature), T times, N numbers of state.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torchdiffeq
from torch import Tensor, nn

from skode._engine.solve import AdjointSolve, solve
from skode._odeint.call import Call
from skode._odeint.discrete import Discrete
from skode._odeint.failure import BACKWARDS, require_all, require_success
from skode._odeint.layout import Field, Layout, State
from skode._odeint.theirs import advice, by_torchdiffeq, guarded

__all__ = ["odeint", "odeint_adjoint"]


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
        "dopri5" if None; `skode`'s own adaptive methods and all of torchdiffeq's.
    options : mapping or None, default=None
        As torchdiffeq's. Our engine reads `first_step` and `max_num_steps` of adaptive
        methods (the latter counts attempts, for each interval of `t` on average; a
        million in all if not given); with any other the solve runs in torchdiffeq.
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
    Gradients are those of the computed solution. Where `func` is a module whose every
    tensor that needs a gradient is one of its parameters, they pass step by step, from
    the evaluations of the accepted steps while the state is small, and from the states
    of the steps where it is not. Else they pass by autograd through every operation.

    Examples
    --------
    >>> import torch
    >>> from skode import odeint
    >>> y0 = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> y = odeint(lambda t, y: -y, y0, torch.tensor([0.0, 1.0]))
    >>> y[-1].detach()
    tensor([0.3679, 0.7358])
    """
    call = Call(method, options, rtol, atol)
    step = call.own_step(func, y0, t, event_fn)
    if step is None:
        return by_torchdiffeq(call, func, y0, t, event_fn)
    layout = Layout(func, y0)
    try:
        ys = Discrete(layout, t.double(), call, step).solve()
    except RuntimeError as error:
        # A field that is itself a gradient with respect to y counts on autograd, which
        # our engine does without. Its first evaluation tells.
        if "does not require grad" not in str(error):
            raise
        return by_torchdiffeq(call, func, y0, t, event_fn)
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
    call = Call(method, options, rtol, atol)
    back = call.backwards(adjoint_method, adjoint_options, adjoint_rtol, adjoint_atol)
    step = call.own_step(func, y0, t, event_fn)
    step_back = back.own_step(func, y0, t, event_fn)
    if step is None or step_back is None or replica:
        call.require_theirs()
        back.require_theirs()

        def run(y0: State, t: Tensor) -> Any:
            with advice(call.method, back.method):
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

        if event_fn is not None or replica or not torch.is_grad_enabled():
            ys = run(y0, t)
            return ys if event_fn is not None else require_all(ys, t)
        return require_all(guarded(run, y0, t, trained), t)
    layout = Layout(func, y0)
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
            step_back.max_steps,
            step_back.first_step,
            remedy=BACKWARDS,
        ),
        parts=layout.parts,
        max_steps=step.max_steps,
        first_step=step.first_step,
    )
    return layout.unpack(require_success(solution))
