"""Autograd through every accepted step: the plain twin of `checkpoint`.

The mesh is found by a solve without autograd; then the same steps are taken again
with it. Memory grows with every operation of every step. B rows, D state.
"""

import torch
from torch import Tensor

from skode._engine.dense import Requests, interpolate
from skode._engine.kernel import Field
from skode._engine.plan import Plan
from skode._engine.solution import Statistics
from skode._engine.step import differentiable_step
from skode._engine.tableau import Coefficients
from skode._engine.tape import Tape


def backprop(plan: Plan, y0: Tensor, times: Tensor) -> tuple[Tensor, Statistics]:
    """Solve, then replay under autograd; return ys (B, T, D)."""
    with torch.no_grad():
        _, stats, requests, tape = plan.record(y0.detach(), times.detach())
    coef = plan.coefficients(y0, times)
    y1, inside = _replay(plan.field, coef, tape, requests, y0, times)
    ys = requests.fill(y0, y1, inside)
    failed = stats.status != 0
    ys = torch.where(failed[:, None, None] & requests.at_end[:, :, None], torch.nan, ys)
    return _idle_times(plan.field, ys, times, requests), stats


def _replay(
    field: Field,
    coef: Coefficients,
    tape: Tape,
    requests: Requests,
    y0: Tensor,
    times: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Return the last state of every row (B, D), and states inside (B, T, D)."""
    inside = None
    if requests.any_inside:
        inside = torch.full((*times.shape, y0.shape[1]), torch.nan).to(y0)
    y = y0
    for taken in tape:
        rows = taken.rows
        part, ends = (y, times) if rows is None else (y[rows], times[rows])
        t0, span = ends[:, 0], ends[:, -1] - ends[:, 0]
        fixed = torch.where(span == 0, 1.0, span).detach()
        t = t0 + (taken.t - t0.detach()) / fixed * span
        h = taken.h / fixed * span
        end, k = differentiable_step(field, coef, t, h, part)
        if taken.events is not None and inside is not None:
            at = taken.events.row, taken.events.index
            where = taken.events.position
            value = _inside(field, coef, where, times[at], t, h, part, end, k)
            inside = inside.index_put(at, value)
        y = end if rows is None else y.index_copy(0, rows, end)
    return y, inside


def _inside(
    field: Field,
    coef: Coefficients,
    where: Tensor,
    at: Tensor,
    t: Tensor,
    h: Tensor,
    start: Tensor,
    end: Tensor,
    k: list[Tensor],
) -> Tensor:
    """Return the states at times `at` (E,) inside the steps of rows `where`, (E, D)."""
    dtype = start.dtype
    stages = torch.stack([*k, field((t + h).to(dtype), end)])
    theta = ((at - t[where]) / h[where]).to(dtype)
    return interpolate(coef, theta, h[where].to(dtype), start[where], stages[:, where])


def _idle_times(field: Field, ys: Tensor, times: Tensor, requests: Requests) -> Tensor:
    """Give times that repeat the first or the last one their own gradient."""
    if not times.requires_grad:
        return ys
    for column, idle in zip((0, -1), requests.idle(), strict=True):
        if bool(idle.any()):
            at, y = requests.times[:, column].to(ys.dtype), ys[:, column].detach()
            slope = field(at, y).detach()[:, None]
            move = (times - times[:, column, None]).to(ys.dtype)[:, :, None]
            ys = ys + torch.where(idle[:, :, None], slope * move, 0.0)
    return ys
