"""Step until t1; knows nothing of gradients. B rows, A of them still on the way.

Every row has its own time, step size, acceptance and status.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from skode._engine.control import Controller, ErrorNorm
from skode._engine.kernel import Evaluator
from skode._engine.observer import Observer, Step
from skode._engine.solution import Statistics, Status, Tolerance, finite_rows
from skode._engine.step import (
    Workspace,
    end_of_step,
    even_steps,
    fill_stages,
    stage_times,
    worth_compacting,
)
from skode._engine.tableau import Coefficients


@dataclass(slots=True)
class _Walk:
    """Where A rows stand. Rows that have arrived, or failed, have nothing left."""

    rows: Tensor | None
    """(A,) which rows of the batch; None: all, in order."""
    t: Tensor
    t1: Tensor
    sign: Tensor
    """Of t1 - t0."""
    left: Tensor
    """Distance to t1; exactly 0 there."""
    y: Tensor
    h: Tensor
    """Proposed step, positive."""
    memory: Tensor
    """Of the controller."""
    attempts: Tensor
    """Written when a row ends."""
    rejected: Tensor
    status: Tensor

    @classmethod
    def start(cls, y: Tensor, t0: Tensor, t1: Tensor, h: Tensor) -> "_Walk":
        span = t1 - t0
        none = torch.zeros_like(t0, dtype=torch.int64)
        return cls(
            rows=None,
            t=t0,
            t1=t1,
            sign=torch.sign(span),
            left=span.abs(),
            y=y,
            h=h,
            memory=torch.full_like(y[:, 0], 1e-4),
            attempts=none,
            rejected=none,
            status=none.to(torch.int8),
        )

    def take(self, keep: Tensor) -> "_Walk":
        """Return the walk of some of the rows."""
        columns = {
            name: getattr(self, name).index_select(0, keep)
            for name in self.__slots__
            if name != "rows"
        }
        rows = keep if self.rows is None else self.rows[keep]
        return _Walk(rows=rows, **columns)

    def end(self, live: Tensor, attempt: int) -> None:
        """Count the attempts of the rows that were under way until now."""
        self.attempts = torch.where(live, attempt, self.attempts)


class _Arrivals:
    """Collects rows as they leave the walk."""

    def __init__(self) -> None:
        self._y: Tensor | None = None
        self._columns: tuple[Tensor, ...] = ()

    def put(self, walk: _Walk) -> None:
        """Write what the rows of `walk` have reached."""
        columns = (walk.t, walk.status, walk.attempts, walk.rejected)
        if walk.rows is None or self._y is None:
            # Copies: rows that leave later are written over them in place.
            self._y = walk.y.clone()
            self._columns = tuple(column.clone() for column in columns)
            return
        self._y[walk.rows] = walk.y
        for whole, part in zip(self._columns, columns, strict=True):
            whole[walk.rows] = part

    def finish(self, nfe_per_step: int, nfe_start: int) -> tuple[Tensor, Statistics]:
        t, status, attempts, rejected = self._columns
        assert self._y is not None, "finish follows put"
        lost = ~finite_rows(self._y) & (status == Status.SUCCESS)
        status = status.masked_fill(lost, Status.NON_FINITE)
        nfe = attempts * nfe_per_step + nfe_start
        return self._y, Statistics(status, t, attempts - rejected, rejected, nfe)


def integrate(
    kernel: Evaluator,
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
    kernel.begin(t0.to(y.dtype)[None])
    kernel.evaluate(0, y, work.slopes[0])
    h, nfe = controller.first(kernel, t0, y, work.slopes[0], t1 - t0)
    norm = ErrorNorm.of(tolerance, y)
    means = _Means(kernel, coef, controller, norm, work, tuple(observers))
    walk = _Walk.start(y, t0, t1, h)
    arrivals = _Arrivals()
    alive = int(torch.count_nonzero(walk.left))  # host sync, once per solve
    for attempt in range(1, tolerance.max_steps + 1):
        if alive == 0:
            break
        # Rows that need not move at all are none of a gradient's business.
        if worth_compacting(walk.y, alive) or (attempt == 1 and alive < len(t0)):
            arrivals.put(walk)
            keep = torch.nonzero(walk.left)[:, 0]
            slope = work.slopes[0].index_select(0, keep)
            walk = walk.take(keep)
            work.resize(len(keep))
            work.slopes[0].copy_(slope)
        alive = _attempt(means, walk, alive, attempt)
    if alive:
        stuck = walk.left > 0
        walk.end(stuck, tolerance.max_steps)
        walk.status = walk.status.masked_fill(stuck, Status.MAX_STEPS)
    arrivals.put(walk)
    return arrivals.finish(coef.stages, 1 + nfe)


@dataclass(frozen=True, slots=True)
class _Means:
    """What every attempt of a solve uses."""

    kernel: Evaluator
    coef: Coefficients
    controller: Controller
    norm: ErrorNorm
    work: Workspace
    observers: tuple[Observer, ...]


def _attempt(means: _Means, walk: _Walk, alive: int, attempt: int) -> int:
    """Try one step of every row, move those that are accepted; return who is left.

    Rows that have ended take steps of length 0.
    """
    kernel, coef, work = means.kernel, means.coef, means.work
    t, y, left = walk.t, walk.y, walk.left
    # Two equal steps at the end rather than a long one and a sliver.
    last = walk.h * 1.01 >= left
    size = torch.where(last, left, torch.minimum(walk.h, 0.5 * left))
    h = size * walk.sign
    h_state = h.to(y.dtype)[:, None]
    kernel.begin(stage_times(coef, t, h, y.dtype))
    fill_stages(kernel, coef, h_state, y, work)
    y_next = end_of_step(coef, h_state, y, work)
    kernel.evaluate(coef.stages, y_next, work.slopes[-1])
    torch.mv(work.table, coef.b_err, out=work.flat_state)
    ratio = means.norm.ratio(work.state.mul_(h_state), y, y_next)
    accept, walk.h, walk.memory = means.controller.decide(ratio, size, walk.memory)

    left_next = left - size
    t_next = torch.addcmul(walk.t1, walk.sign, left_next, value=-1.0)
    counts = torch.stack((accept, left_next > 0)).sum(dim=1)
    accepted, going = counts.tolist()  # the one host sync of a step
    all_moved = accepted == t.shape[0]
    moved = None
    if not all_moved or alive < t.shape[0]:
        live = left > 0
        moved = live if all_moved else accept & live
    for observer in means.observers:
        observer.observe(Step(walk.rows, moved, t, t_next, h, y, work.k))
    if all_moved:
        walk.t, walk.left, walk.y = t_next, left_next, y_next
        work.slopes[0].copy_(work.slopes[-1])
        if going < alive:
            walk.end(left > 0, attempt)
        return int(going)
    assert moved is not None, "some were refused"
    wide = moved[:, None]
    walk.t = torch.where(moved, t_next, t)
    walk.left = torch.where(moved, left_next, left)
    walk.y = torch.where(wide, y_next, y)
    refused = live & ~accept
    walk.rejected = walk.rejected + refused
    _give_up(walk, refused, work.k, y_next)
    torch.where(wide, work.slopes[-1], work.slopes[0], out=work.slopes[0])
    going = int(torch.count_nonzero(walk.left))  # host sync, only after a refusal
    if going < alive:
        walk.end(live, attempt)
    return going


def _give_up(walk: _Walk, refused: Tensor, k: Tensor, y_next: Tensor) -> None:
    """End rows whose next step would not move time."""
    ulp = torch.maximum(walk.t.abs(), walk.t1.abs()).mul_(torch.finfo(walk.t.dtype).eps)
    ended = refused & (walk.h <= 16 * ulp)
    if not bool(ended.any()):  # host sync, only after a refusal
        return
    finite = finite_rows(y_next) & finite_rows(k.sum(dim=0))
    status = torch.where(finite, int(Status.STEP_UNDERFLOW), int(Status.NON_FINITE))
    walk.status = torch.where(ended, status.to(walk.status.dtype), walk.status)
    # The time stays what it is; only the distance is given up.
    walk.t1 = torch.where(ended, walk.t, walk.t1)
    walk.left = walk.left.masked_fill(ended, 0.0)


def march(
    kernel: Evaluator,
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
    step_size = tolerance.step_size
    assert step_size is not None, "checked at the door"
    span = t1 - t0
    whole_steps = even_steps(span, step_size).masked_fill_(span == 0, 0)
    idle = whole_steps == 0
    if bool(idle.any()):  # host sync, once per solve
        return _march_some(kernel, coef, y, t0, t1, tolerance, observers, ~idle)
    # More steps than are allowed are as good as one more.
    steps = whole_steps.clamp(max=tolerance.max_steps + 1.0).to(torch.int64)
    total, equal = int(steps.max()), bool((steps == steps[0]).all())  # once per solve
    taken = steps.clamp(max=tolerance.max_steps)
    whole = span / whole_steps
    work = Workspace(coef, y)
    reached = torch.zeros_like(steps)
    finite = torch.ones_like(span, dtype=torch.bool)
    kernel.begin(t0.to(y.dtype)[None])
    kernel.evaluate(0, y, work.slopes[0])
    t = t0
    for n in range(min(total, tolerance.max_steps)):
        moved = None if equal else n < taken
        h = whole if moved is None else whole * moved
        t_next = t0 + whole * torch.clamp(steps, max=n + 1)
        t_next = torch.where(steps <= n + 1, t1, t_next)
        h_state = h.to(y.dtype)[:, None]
        kernel.begin(stage_times(coef, t, h, y.dtype))
        fill_stages(kernel, coef, h_state, y, work)
        y_next = end_of_step(coef, h_state, y, work)
        if observers or n + 1 < total:
            kernel.evaluate(coef.stages, y_next, work.slopes[-1])
        for observer in observers:
            observer.observe(Step(None, moved, t, t_next, h, y, work.k))
        t = t_next
        y = y_next if moved is None else torch.where(moved[:, None], y_next, y)
        work.slopes[0].copy_(work.slopes[-1])
        finite = finite & finite_rows(y)
        reached = reached + (finite if moved is None else finite & moved)
    status = torch.zeros_like(steps, dtype=torch.int8)
    status = status.masked_fill(steps > tolerance.max_steps, Status.MAX_STEPS)
    status = status.masked_fill(~finite, Status.NON_FINITE)
    t = torch.where(reached == steps, t1, t0 + whole * reached)
    nfe = taken * coef.stages + 1
    if not observers:  # nobody asked for the slope at t1
        nfe = nfe - (taken == steps).to(nfe.dtype)
    return y, Statistics(status, t, taken, torch.zeros_like(taken), nfe)


def _march_some(
    kernel: Evaluator,
    coef: Coefficients,
    y: Tensor,
    t0: Tensor,
    t1: Tensor,
    tolerance: Tolerance,
    observers: Sequence[Observer],
    going: Tensor,
) -> tuple[Tensor, Statistics]:
    """March the rows that have a way to go; the others stay where they are."""
    none = torch.zeros_like(t0, dtype=torch.int64)
    status = torch.where(finite_rows(y), int(Status.SUCCESS), int(Status.NON_FINITE))
    stats = Statistics(
        status.to(torch.int8), t1.clone(), none, none.clone(), none.clone()
    )
    keep = torch.nonzero(going)[:, 0]
    if len(keep) == 0:
        return y, stats
    told = [_Renamed(observer, keep) for observer in observers]
    start, t0, t1 = (x.index_select(0, keep) for x in (y, t0, t1))
    y1, part = march(kernel, coef, start, t0, t1, tolerance, told)
    for whole, column in zip(stats.columns(), part.columns(), strict=True):
        whole[keep] = column.to(whole.dtype)
    return y.index_copy(0, keep, y1), stats


@dataclass(frozen=True, slots=True)
class _Renamed:
    """An observer that is told of some rows under their numbers in the batch."""

    observer: Observer
    rows: Tensor

    def observe(self, step: Step) -> None:
        """Pass the step on."""
        assert step.rows is None, "marching rows are never left behind"
        self.observer.observe(replace(step, rows=self.rows))
