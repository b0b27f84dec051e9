"""Solves that did not reach their end, in the words of torchdiffeq's callers."""

import torch
from torch import Tensor

from skode._engine.solution import Solution, Status
from skode._odeint.layout import State
from skode.exceptions import SolverError

_STIFF = (
    "loosen rtol and atol, compute in float64, or take an implicit method: "
    "method='scipy_solver', options={'solver': 'Radau'} (odeint_adjoint has its "
    "gradient, where the problem can be solved backwards in time as well)."
)
_REMEDY = {
    Status.MAX_STEPS: (
        "Raise options={'max_num_steps': ...}. If more steps do not help, the problem "
        "may be stiff: " + _STIFF
    ),
    Status.STEP_UNDERFLOW: (
        "The problem is stiff, discontinuous or blows up there: " + _STIFF
    ),
    Status.NON_FINITE: (
        "The state grows without bound, or func returns NaN or infinity there: look "
        "at func, or shorten step_size if the method has one."
    ),
}

BACKWARDS = (
    "This happened while odeint_adjoint solved backwards in time, where what contracts "
    "forwards expands: odeint, whose gradient needs no such solve, takes the same "
    "arguments (but for SciPy's methods). Or loosen adjoint_rtol and adjoint_atol, or "
    "raise max_num_steps in adjoint_options."
)


def require_success(solution: Solution) -> Tensor:
    """Return the states (1, T, N), or say in the caller's words why there are none."""
    try:
        return solution.require_success().ys
    except SolverError as error:
        most = solution.tolerance.max_steps
        raise gave_up(Status[error.status], error.t[0], most) from None


def require_all(ys: State, t: Tensor) -> State:
    """Return torchdiffeq's states, or raise where it gave up and does not say so.

    SciPy's methods return fewer states then; fixed steps go on with NaN.
    """
    if isinstance(ys, Tensor) and len(ys) < len(t):
        raise gave_up(Status.STEP_UNDERFLOW, t.tolist()[max(len(ys) - 1, 0)])
    for part in (ys,) if isinstance(ys, Tensor) else ys:
        last = part.detach()[-1:]
        if not bool(torch.isfinite(last).all()):
            raise gave_up(Status.NON_FINITE)
    return ys


def gave_up(status: Status, t: float | None = None, most: int = 0) -> SolverError:
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
