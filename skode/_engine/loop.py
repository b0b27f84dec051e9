"""Step until t1; knows nothing of gradients. B rows, A of them still on the way.

Every row has its own time, step size, acceptance and status.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skode._engine.control import Controller, error_ratio
from skode._engine.kernel import Kernel
from skode._engine.observer import Observer, Step
from skode._engine.solution import Statistics, Status, Tolerance
from skode._engine.step import Workspace, end_of_step, fill_stages, stage_times
from skode._engine.tableau import Coefficients


@dataclass(slots=True)
class _Walk:
    """Where A rows stand."""

    rows: Tensor | None
    t: Tensor
    t1: Tensor
    y: Tensor
    h: Tensor
    memory: Tensor
    ordinal: Tensor
    attempts: Tensor
    status: Tensor

    def take(self, keep: Tensor) -> "_Walk":
        """Return the walk of some of the rows."""
        return _Walk(
            keep if self.rows is None else self.rows[keep],
            *(
                getattr(self, name).index_select(0, keep)
                for name in self.__slots__
                if name != "rows"
            ),
        )


class _Arrivals:
    """Collects rows as they leave the walk."""

    def __init__(self, walk: _Walk) -> None:
        self._y = torch.empty_like(walk.y)
        self._columns = [
            torch.empty_like(column)
            for column in (walk.t, walk.status, walk.ordinal, walk.attempts)
        ]

    def put(self, walk: _Walk) -> None:
        """Write what the rows of `walk` have reached."""
        columns = (walk.t, walk.status, walk.ordinal, walk.attempts)
        if walk.rows is None:
            # Copies: rows that leave later are written over them in place.
            self._y = walk.y.clone()
            self._columns = [column.clone() for column in columns]
            return
        self._y[walk.rows] = walk.y
        for whole, part in zip(self._columns, columns, strict=True):
            whole[walk.rows] = part

    def finish(self, nfe_per_step: int, nfe_start: int) -> tuple[Tensor, Statistics]:
        t, status, accepted, attempts = self._columns
        finite = torch.isfinite(self._y).all(dim=-1)
        lost = (status == Status.SUCCESS) & ~finite
        status = status.masked_fill(lost, Status.NON_FINITE)
        nfe = attempts * nfe_per_step + nfe_start
        stats = Statistics(status, t, accepted, attempts - accepted, nfe)
        return self._y, stats


def integrate(
    kernel: Kernel,
    coef: Coefficients,
    controller: Controller,
    y: Tensor,
    t0: Tensor,
    t1: Tensor,
    tolerance: Tolerance,
    observers: Sequence[Observer] = (),
) -> tuple[Tensor, Statistics]:
    """Solve with adaptive steps from `t0` to `t1`, both (B,).

    Returns
    -------
    y1 : Tensor of shape (B, D)
        The last state reached.
    stats : Statistics
    """
    work = Workspace(coef, y)
    kernel.evaluate(0, t0.to(y.dtype), y, work.slopes[0])
    h, nfe = controller.first(kernel, t0, y, work.slopes[0], t1 - t0)
    zeros = torch.zeros_like(t0, dtype=torch.int64)
    walk = _Walk(
        rows=None,
        t=t0,
        t1=t1,
        y=y,
        h=h,
        memory=torch.full_like(y[:, 0], 1e-4),
        ordinal=zeros,
        attempts=zeros,
        status=zeros.to(torch.int8),
    )
    arrivals = _Arrivals(walk)
    resolution = 16 * torch.finfo(t0.dtype).eps
    alive = int((t0 != t1).sum())  # host sync, once per solve
    for _ in range(tolerance.max_steps):
        if alive == 0:
            break
        if 4 * alive <= 3 * len(walk.t) and y.device.type == "cpu":
            arrivals.put(walk)
            keep = torch.nonzero(walk.t != walk.t1)[:, 0]
            slope = work.slopes[0].index_select(0, keep)
            walk = walk.take(keep)
            work.resize(len(keep))
            work.slopes[0].copy_(slope)
        alive = _attempt(
            kernel,
            coef,
            controller,
            walk,
            alive,
            work,
            tolerance,
            observers,
            resolution,
        )
    if alive:
        stuck = (walk.t != walk.t1) & (walk.status == Status.SUCCESS)
        walk.status = walk.status.masked_fill(stuck, Status.MAX_STEPS)
    arrivals.put(walk)
    return arrivals.finish(coef.stages, 1 + nfe)


def _attempt(
    kernel: Kernel,
    coef: Coefficients,
    controller: Controller,
    walk: _Walk,
    alive: int,
    work: Workspace,
    tolerance: Tolerance,
    observers: Sequence[Observer],
    resolution: float,
) -> int:
    """Try one step of every row, move those that are accepted, count the rest.

    Rows that have arrived, or failed, have t == t1: their step is zero.
    """
    t, y = walk.t, walk.y
    to_go = walk.t1 - t
    distance = to_go.abs()
    # Land on t1; two equal steps rather than a long one and a sliver.
    last = walk.h * 1.01 >= distance
    size = torch.where(last, distance, torch.minimum(walk.h, 0.5 * distance))
    h = torch.copysign(size, to_go)
    t_next = torch.where(last, walk.t1, t + h)

    times = stage_times(coef, t, h, y.dtype)
    h_state = h.to(y.dtype)[:, None]
    fill_stages(kernel.evaluate, coef, times, h_state, y, work)
    y_next = end_of_step(coef, h_state, y, work)
    kernel.evaluate(0, times[-1], y_next, work.slopes[-1])
    torch.mv(work.table, coef.b_err, out=work.flat_state)
    error = work.state.mul_(h_state)
    ratio = error_ratio(error, y, y_next, tolerance.rtol, tolerance.atol)
    accept, walk.h, walk.memory = controller.decide(ratio, size, walk.memory)

    live = to_go != 0
    walk.attempts = walk.attempts + live
    moves = accept & live
    counts = torch.stack((moves, moves & last)).sum(dim=1)
    accepted, arrived = counts.tolist()  # the one host sync of a step
    left = alive - int(arrived)
    moved = None if accepted == len(t) else moves
    for observer in observers:
        observer.observe(Step(walk.rows, moved, walk.ordinal, t, t_next, h, y, work.k))
    if moved is None:
        walk.t, walk.y, walk.ordinal = t_next, y_next, walk.ordinal + 1
        work.slopes[0].copy_(work.slopes[-1])
        return left
    wide = moved[:, None]
    walk.t = torch.where(moved, t_next, t)
    walk.y = torch.where(wide, y_next, y)
    walk.ordinal = walk.ordinal + moved
    torch.where(wide, work.slopes[-1], work.slopes[0], out=work.slopes[0])
    if accepted < alive:
        left -= _give_up(walk, live & ~accept, ratio, resolution)
    return left


def _give_up(walk: _Walk, refused: Tensor, ratio: Tensor, resolution: float) -> int:
    """End rows whose next step would not move time; return how many."""
    floor = resolution * torch.maximum(walk.t.abs(), walk.t1.abs())
    ended = refused & (walk.h <= floor)
    failed = torch.where(
        torch.isfinite(ratio), int(Status.STEP_UNDERFLOW), int(Status.NON_FINITE)
    )
    walk.status = torch.where(ended, failed.to(walk.status.dtype), walk.status)
    walk.t1 = torch.where(ended, walk.t, walk.t1)
    return int(ended.sum())  # host sync, only after a refusal


def march(
    kernel: Kernel,
    coef: Coefficients,
    y: Tensor,
    t0: Tensor,
    t1: Tensor,
    tolerance: Tolerance,
    observers: Sequence[Observer] = (),
) -> tuple[Tensor, Statistics]:
    """Solve with equal steps, at most `step_size` long, from `t0` to `t1`, both (B,).

    Each row divides its own span evenly, so that no row ends in a sliver and the
    solution is a smooth function of the times.
    """
    work = Workspace(coef, y)
    span = t1 - t0
    step_size = tolerance.step_size
    assert step_size is not None, "checked at the door"
    # A quotient that exceeds an integer by rounding alone asks for no further step.
    steps = torch.ceil(span.abs() / step_size * (1 - 4 * torch.finfo(t0.dtype).eps))
    steps = steps.to(torch.int64).clamp(min=1).masked_fill(span == 0, 0)
    total, equal = int(steps.max()), bool((steps == steps[0]).all())  # once per solve
    taken = steps.clamp(max=tolerance.max_steps)
    whole = span / steps.clamp(min=1)
    zero = torch.zeros_like(whole)
    reached = torch.zeros_like(steps)
    finite = torch.ones_like(span, dtype=torch.bool)
    kernel.evaluate(0, t0.to(y.dtype), y, work.slopes[0])
    for n in range(min(total, tolerance.max_steps)):
        moved = None if equal else n < taken
        h = whole if moved is None else torch.where(moved, whole, zero)
        t = t0 + whole * torch.clamp(steps, max=n)
        t_next = torch.where(steps == n + 1, t1, t + h)
        times = stage_times(coef, t, h, y.dtype)
        h_state = h.to(y.dtype)[:, None]
        fill_stages(kernel.evaluate, coef, times, h_state, y, work)
        y_next = end_of_step(coef, h_state, y, work)
        if observers or n + 1 < total:
            kernel.evaluate(0, times[-1], y_next, work.slopes[-1])
        ordinal = torch.clamp(steps, max=n)
        for observer in observers:
            observer.observe(Step(None, moved, ordinal, t, t_next, h, y, work.k))
        y = y_next if moved is None else torch.where(moved[:, None], y_next, y)
        work.slopes[0].copy_(work.slopes[-1])
        finite = finite & torch.isfinite(y).all(dim=-1)
        reached = reached + (finite if moved is None else finite & moved)
    status = torch.zeros_like(steps, dtype=torch.int8)
    status = status.masked_fill(steps > tolerance.max_steps, Status.MAX_STEPS)
    status = status.masked_fill(~finite, Status.NON_FINITE)
    t = torch.where(reached == steps, t1, t0 + whole * reached)
    nfe = taken * coef.stages + 1
    if not observers:  # nobody asked for the slope at t1
        nfe = nfe - ((taken == steps) & (steps > 0)).to(nfe.dtype)
    return y, Statistics(status, t, taken, torch.zeros_like(taken), nfe)
