"""The engine's only door. B rows, T times, D state."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from skode._engine.adjoint import Adjoint
from skode._engine.backprop import backprop
from skode._engine.borrowed import BORROWED, Borrowed, Loan
from skode._engine.checkpoint import Checkpoint
from skode._engine.compiled import Compiled
from skode._engine.fused import fused
from skode._engine.kernel import Field
from skode._engine.plan import Plan
from skode._engine.reversible import Reversible, reversible
from skode._engine.solution import Solution, Statistics, Tolerance
from skode._engine.tableau import TABLEAUX, Tableau

METHODS = (*TABLEAUX, *BORROWED)
FIXED_STEP = (
    *(name for name, tableau in TABLEAUX.items() if not tableau.adaptive),
    *(name for name, borrowed in BORROWED.items() if borrowed.fixed_step),
)
ADAPTIVE = tuple(name for name in METHODS if name not in FIXED_STEP)
OWN = TABLEAUX
GRADIENTS = ("auto", "checkpoint", "adjoint", "reversible", "backprop")


@dataclass(frozen=True, slots=True)
class AdjointSolve:
    """How to solve backwards in time, where not as forwards."""

    method: str
    """One of `OWN`, with adaptive steps."""
    rtol: float
    atol: float
    max_steps: int
    first_step: float | None
    remedy: str
    """What to tell of a solve that fails."""


def solve(
    field: Field,
    y0: Tensor,
    t: Tensor,
    *,
    params: Sequence[Tensor] = (),
    method: str = "dopri5",
    rtol: float = 1e-3,
    atol: float = 1e-6,
    step_size: float | None = None,
    max_steps: int = 10_000,
    gradient: str = "auto",
    first_step: float | None = None,
    parts: Sequence[int] = (),
    adjoint: AdjointSolve | None = None,
    compile: bool | str = False,
) -> Solution:
    """Solve dy/dt = f(t, y) for a batch of rows, each with steps of its own.

    Parameters
    ----------
    field : callable
        ``f(t, y)`` with ``t`` of shape (B,) and ``y`` of shape (B, D), returning
        (B, D). Rows must not depend on each other. ``t`` comes in the dtype of ``y``.
    y0 : Tensor of shape (B, D)
        States at the first time; float32 or float64.
    t : Tensor of shape (T,) or (B, T)
        Requested times, shared or per row, monotone in either direction; the first
        is where the row starts. Shorter rows are padded by repeating their last time.
    params : sequence of Tensor, default=()
        Tensors that `field` depends on and that want a gradient.
    method : str, default="dopri5"
        One of `METHODS`.
    rtol, atol : float, default=1e-3, 1e-6
        A step is accepted where the root mean square over the state of error /
        (atol + rtol * max(|y before|, |y after|)) is at most 1.
    step_size : float or None, default=None
        Longest step of a fixed-step method, in units of t; each row's span is
        divided evenly. Adaptive methods choose their own steps and ignore it.
    max_steps : int, default=10_000
        Attempts a row may take; then its status is `MAX_STEPS`.
    gradient : {"auto", "checkpoint", "adjoint", "reversible", "backprop"}, \
            default="auto"
        How gradients pass the solve. "checkpoint": exact gradient of the computed
        solution; memory for one state per step, and for the stages of small steps
        (two million numbers at most). "adjoint": continuous adjoint, exact up to the
        tolerance; memory constant in the number of steps. "reversible": exact
        gradient of a solution by other steps, which can be walked back; they cost
        twice as much, are less stable, and are taken where no gradient is wanted,
        too; memory for two bytes per row and step of an adaptive method, and for
        nothing per step of one of fixed steps; methods of our own only. "backprop":
        autograd through every operation; what "checkpoint" does, too, if it is to
        be differentiated again.
        "auto": "checkpoint" for methods of our own, "backprop" for torchdiffeq's,
        "adjoint" for SciPy's. The adjoint of those that are not our own is solved by
        "dopri5". Where autograd passes through torchdiffeq, the first of several
        equal times has all of their gradient.
    first_step : float or None, default=None
        First step that an adaptive method tries; None: chosen for each row.
    parts : sequence of int, default=()
        Sizes of parts of the state, which sum to D: the error norm is then the largest
        of the parts' root mean squares.
    adjoint : AdjointSolve or None, default=None
        How ``gradient="adjoint"`` solves backwards; None: as forwards.
    compile : bool or "auto", default=False
        Whether to run whole solves outside PyTorch's loop, with a method of our own and
        the gradient "checkpoint" if one is wanted. On a CPU: a perceptron, in code that
        the machine's C++ compiler makes when first asked and that is kept on disk. On
        a GPU, with adaptive steps: a perceptron, in Triton kernels; other fields, as
        CUDA graphs. True: where that cannot be, say why. "auto": where it cannot be,
        solve as with False.

    Returns
    -------
    Solution
        States (B, T, D) and statistics; failed rows have a status and NaN states
        from where they failed. `Solution.require_success` raises.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as described.
    """
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient must be one of {GRADIENTS}, got {gradient!r}.")
    if compile not in (True, False, "auto"):
        raise ValueError(f"compile must be True, False or 'auto', got {compile!r}.")
    tolerance = Tolerance(rtol, atol, step_size, max_steps, first_step, tuple(parts))
    parsed = parse_method(method, step_size)
    times = _parse_times(y0, t)
    params = tuple(params)
    if parts and sum(parts) != y0.shape[1]:
        raise ValueError(f"parts must sum to {y0.shape[1]}, got {tuple(parts)}.")
    if len(y0) == 0:
        return _nothing(y0, times, tolerance)
    wanted = torch.is_grad_enabled() and any(
        x.requires_grad for x in (y0, times, *params)
    )
    if isinstance(parsed, Borrowed):
        route = _borrowed_route(field, method, parsed, tolerance, params, gradient)
        found: Fast | str = f"{method!r} is not a solver of our own"
    else:
        plan = Plan(field, parsed, tolerance, params)
        found = _fast(plan, y0, times, gradient, wanted) if compile else ""
        route = _own_route(plan, gradient, found, adjoint)
    if isinstance(found, str) and compile and compile != "auto":
        raise ValueError(
            f"compile=True is not possible here: {found}. compile='auto' solves "
            "without compiled code where there is none."
        )
    if wanted:
        ys, stats = route.traced(y0, times)
    else:
        with torch.no_grad():
            ys, stats = route.forward(y0.detach(), times.detach())
    return Solution(ys, stats, tolerance, fixed_step=method in FIXED_STEP)


Solver = Callable[[Tensor, Tensor], tuple[Tensor, Statistics]]
"""From y0 (B, D) and times (B, T) to states (B, T, D) and statistics."""


@dataclass(frozen=True, slots=True)
class _Route:
    """How values are computed, and how with autograd."""

    forward: Solver
    traced: Solver


class Fast(Protocol):
    """What solves outside PyTorch's loop."""

    def forward(self, y0: Tensor, times: Tensor) -> tuple[Tensor, Statistics]:
        """Solve without autograd."""

    def traced(self, y0: Tensor, times: Tensor) -> tuple[Tensor, Statistics]:
        """Solve with the gradient of "checkpoint"."""


def _own_route(
    plan: Plan, gradient: str, found: Fast | str, adjoint: AdjointSolve | None
) -> _Route:
    """Return the route of a method of our own; `found` is what is faster, or not."""
    forward = plan.forward if isinstance(found, str) else found.forward
    if gradient == "reversible":  # a scheme of its own, differentiated or not
        return _Route(partial(reversible, plan), _applied(Reversible, plan))
    if gradient == "backprop":
        return _Route(forward, partial(backprop, plan))
    if gradient == "adjoint":
        return _Route(forward, _by_adjoint(forward, plan, adjoint))
    if isinstance(found, str):
        return _Route(forward, _applied(Checkpoint, plan))
    return _Route(forward, found.traced)


def _borrowed_route(
    field: Field,
    method: str,
    borrowed: Borrowed,
    tolerance: Tolerance,
    params: tuple[Tensor, ...],
    gradient: str,
) -> _Route:
    """Return the route of a method of torchdiffeq's."""
    run = Loan(field, borrowed, tolerance).run
    if not _borrowed_adjoint(method, borrowed, gradient):
        return _Route(run, run)
    # Explicit steps with an error estimate suit the adjoint of any method.
    plan = Plan(field, TABLEAUX["dopri5"], tolerance, params)
    return _Route(run, _by_adjoint(run, plan, None))


def _applied(
    function: type[torch.autograd.Function], plan: Plan, *leading: object
) -> Solver:
    """Return the solver that an autograd function of so many arguments is."""

    def run(y0: Tensor, times: Tensor) -> tuple[Tensor, Statistics]:
        ys, *columns = function.apply(*leading, plan, y0, times, *plan.params)
        return ys, Statistics(*columns)

    return run


def _by_adjoint(forward: Solver, plan: Plan, adjoint: AdjointSolve | None) -> Solver:
    remedy = None
    if adjoint is not None:
        plan, remedy = _backwards(plan, adjoint), adjoint.remedy
    return _applied(Adjoint, plan, forward, remedy)


def _fast(
    plan: Plan, y0: Tensor, times: Tensor, gradient: str, wanted: bool
) -> Fast | str:
    """Return what solves outside PyTorch's loop, or what is in the way."""
    if gradient == "reversible":
        return "gradient='reversible' takes steps of its own"
    if gradient == "backprop" and wanted:
        return "gradient='backprop' is autograd's, through operations of PyTorch"
    if y0.device.type == "cpu":
        return Compiled.of(plan, y0)
    return fused(plan, y0, times)


def _backwards(plan: Plan, adjoint: AdjointSolve) -> Plan:
    tolerance = replace(
        plan.tolerance,
        rtol=adjoint.rtol,
        atol=adjoint.atol,
        max_steps=adjoint.max_steps,
        first_step=adjoint.first_step,
    )
    return replace(plan, tableau=OWN[adjoint.method], tolerance=tolerance)


def parse_method(method: str, step_size: float | None) -> Tableau | Borrowed:
    """Return the method of that name, ours or torchdiffeq's.

    Raises
    ------
    ValueError
        If there is none, or if it takes fixed steps and `step_size` is None.
    """
    parsed = TABLEAUX.get(method) or BORROWED.get(method)
    if parsed is None:
        raise ValueError(
            f"There is no solver {method!r}. Adaptive: {', '.join(ADAPTIVE)}. "
            f"Fixed step (pass step_size): {', '.join(FIXED_STEP)}."
        )
    if method in FIXED_STEP and step_size is None:
        raise ValueError(
            f"solver={method!r} takes fixed steps: pass step_size, for example "
            f"step_size=0.1 for ten steps from t=0 to t=1, or choose an adaptive "
            f"solver ({', '.join(ADAPTIVE)})."
        )
    return parsed


def _borrowed_adjoint(method: str, borrowed: Borrowed, gradient: str) -> bool:
    """Return whether gradients pass by the adjoint, or by autograd."""
    if gradient == "reversible":
        raise ValueError(
            f"gradient='reversible' needs a solver of our own ({', '.join(TABLEAUX)}), "
            f"got solver={method!r}: use gradient='auto'."
        )
    if gradient == "auto":
        return not borrowed.differentiable
    if not borrowed.differentiable and gradient != "adjoint":
        raise ValueError(
            f"{method!r} runs in SciPy, through which no gradient passes: use "
            f"gradient='adjoint' or 'auto', got {gradient!r}."
        )
    return gradient == "adjoint"


def _parse_times(y0: Tensor, t: Tensor) -> Tensor:
    """Check the arguments' shapes and return times as (B, T)."""
    for name, value in (("y0", y0), ("t", t)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a tensor of floats, got {kind}.")
    if y0.ndim != 2 or y0.shape[1] == 0:
        raise ValueError(
            f"y0 must have shape (rows, state), state at least 1, got "
            f"{tuple(y0.shape)}."
        )
    if t.ndim not in (1, 2) or t.shape[-1] == 0:
        raise ValueError(
            f"t must name at least one time, in shape (times,) or (rows, times), got "
            f"{tuple(t.shape)}."
        )
    if t.ndim == 2 and len(t) != len(y0):
        raise ValueError(
            f"t of shape (rows, times) must have a row for each of the {len(y0)} rows "
            f"of y0, got {tuple(t.shape)}."
        )
    if t.device != y0.device:
        raise ValueError(f"t is on {t.device} and y0 on {y0.device}; move one.")
    if t.ndim == 1:
        finite = all(map(math.isfinite, t.tolist()))
    else:
        finite = bool(torch.isfinite(t).all())
    if not finite:
        raise ValueError(
            "t must be finite; pad short rows by repeating their last time."
        )
    if t.shape[-1] > 2 and not _monotone(t.detach()):
        raise ValueError(
            "t must not turn back: each row increases, or decreases, throughout. Sort "
            "it, and pad short rows by repeating their last time."
        )
    return t if t.ndim == 2 else t.expand(len(y0), -1)


def _monotone(t: Tensor) -> bool:
    steps = t.diff(dim=-1)
    monotone = (steps >= 0).all(dim=-1) | (steps <= 0).all(dim=-1)
    return bool(monotone.all())


def _nothing(y0: Tensor, times: Tensor, tolerance: Tolerance) -> Solution:
    """Return the solution of no rows."""
    zero = torch.zeros(0, dtype=torch.int64, device=y0.device)
    stats = Statistics(zero.to(torch.int8), times[:, 0], zero, zero, zero)
    return Solution(y0[:, None].expand(-1, times.shape[1], -1), stats, tolerance)
