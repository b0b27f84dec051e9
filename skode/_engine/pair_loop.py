"""Step pairs of states until t1, and tell the trail. B rows, A of them on the way.

The reversible scheme's counterpart of `loop`, by the same rules: every row has its own
time, step size, acceptance and status. Times are shares of the row's span: what is left
of it begins as 1 and ends as exactly 0.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from skode._engine.control import Controller, ErrorNorm
from skode._engine.dense import DenseOutput, Events
from skode._engine.kernel import Evaluator
from skode._engine.observer import Step
from skode._engine.pair import PairStep
from skode._engine.solution import Statistics, Status, Tolerance, finite_rows
from skode._engine.step import even_steps, worth_compacting
from skode._engine.tableau import Coefficients
from skode._engine.trail import COARSE, ChosenTrail, EvenTrail, Spans, Stride, Trail

_FARTHEST = 100.0
"""Of the two states of a pair from each other, in units of the tolerance. Where the
scheme is stable they differ by the errors made on the way, some 10 at most; where it is
not, exponentially, and steps would be refused on their account without end."""


@dataclass(frozen=True, slots=True)
class Walked:
    """Where a solve ended."""

    y: Tensor
    """(B, D) the last state reached."""
    z: Tensor
    """(B, D) its companion."""
    stats: Statistics
    trail: Trail


def march_pair(
    kernel: Evaluator,
    coef: Coefficients,
    y0: Tensor,
    t0: Tensor,
    t1: Tensor,
    tolerance: Tolerance,
    dense: DenseOutput | None,
) -> Walked:
    """Solve with equal steps, at most `step_size` long, from `t0` to `t1`, both (B,).

    A row whose state stops being finite stays where it last was.
    """
    assert tolerance.step_size is not None, "checked at the door"
    spans = Spans.of(t0, t1)
    whole = even_steps(spans.length, tolerance.step_size)
    # More steps than are allowed are as good as one more.
    steps = whole.clamp(max=tolerance.max_steps + 1.0).to(torch.int64)
    taken = steps.clamp(max=tolerance.max_steps)
    trail = EvenTrail(spans, whole, torch.zeros_like(steps))
    y = z = spans.part(y0)
    pair = PairStep(kernel, coef, y)
    finite = finite_rows(y)
    most = int(taken.max()) if len(taken) else 0  # host sync, once per solve
    for n in range(most):
        moved = finite & (n < taken)
        stride = trail.stride(n, moved)
        y1, z1 = pair.step(stride.t, stride.t1, stride.h, stride.share, y, z)
        moved &= finite_rows(y1) & finite_rows(z1)
        if dense is not None:
            events = _write(dense, pair, replace(stride, moved=moved), y, z)
            if events is not None:
                trail.events[n] = events
        wide = moved[:, None]
        y, z = torch.where(wide, y1, y), torch.where(wide, z1, z)
        trail.reached += moved
        finite &= moved | (n >= taken)
    status = torch.zeros_like(steps, dtype=torch.int8)
    status.masked_fill_(_parted(spans.part(y0), y, z), Status.PARTED)
    status.masked_fill_(steps > tolerance.max_steps, Status.MAX_STEPS)
    status.masked_fill_(~finite, Status.NON_FINITE)
    t = torch.addcmul(spans.t0, spans.length, trail.reached / whole)
    t = torch.where(trail.reached == steps, spans.t1, t)
    nfe = 2 * coef.stages * taken
    part = Statistics(status, t, taken, torch.zeros_like(taken), nfe)
    return _finish(y0, t1, spans, y, z, part, trail)


@dataclass(slots=True)
class _Walk:
    """Where A rows stand. Rows that have arrived, or failed, have nothing left."""

    spans: Spans
    left: Tensor
    """Share of the span; exactly 0 at its end."""
    y: Tensor
    z: Tensor
    share: Tensor
    """Proposed step."""
    memory: Tensor
    """Of the controller."""
    attempts: Tensor
    """Written when a row ends."""
    rejected: Tensor
    status: Tensor
    given_up: Tensor
    """What was left when the row failed."""

    @classmethod
    def start(cls, spans: Spans, y: Tensor, share: Tensor) -> "_Walk":
        none = torch.zeros_like(share, dtype=torch.int64)
        return cls(
            spans=spans,
            left=torch.ones_like(share),
            y=y,
            z=y,
            share=share,
            memory=torch.full_like(y[:, 0], 1e-4),
            attempts=none,
            rejected=none,
            status=none.to(torch.int8),
            given_up=torch.zeros_like(share),
        )

    def take(self, keep: Tensor) -> "_Walk":
        """Return the walk of some of the rows."""
        columns = {
            name: getattr(self, name).index_select(0, keep)
            for name in self.__slots__
            if name != "spans"
        }
        return _Walk(spans=self.spans.only(keep), **columns)

    def end(self, live: Tensor, attempt: int) -> None:
        """Count the attempts of the rows that were under way until now."""
        self.attempts = torch.where(live, attempt, self.attempts)

    def fail(self, rows: Tensor, status: Tensor) -> None:
        """End some rows (A,) where they are."""
        self.status = torch.where(rows, status.to(self.status.dtype), self.status)
        self.given_up = torch.where(rows, self.left, self.given_up)
        self.left = self.left.masked_fill(rows, 0.0)


@dataclass(frozen=True, slots=True)
class _Means:
    """What every attempt of a solve uses."""

    pair: PairStep
    controller: Controller
    norm: ErrorNorm
    dense: DenseOutput | None
    trail: ChosenTrail


def integrate_pair(
    kernel: Evaluator,
    coef: Coefficients,
    controller: Controller,
    y0: Tensor,
    t0: Tensor,
    t1: Tensor,
    tolerance: Tolerance,
    dense: DenseOutput | None,
) -> Walked:
    """Solve with adaptive steps from `t0` to `t1`, both (B,)."""
    spans = Spans.of(t0, t1)
    trail = ChosenTrail(len(t0), t0)
    y, first = spans.part(y0), torch.empty_like(spans.length)
    pair, spent = PairStep(kernel, coef, y), 0
    if len(y):
        slope = torch.empty_like(y)
        kernel.begin(spans.t0.to(y.dtype)[None])
        kernel.evaluate(0, y, slope)
        first, spent = controller.first(kernel, spans.t0, y, slope, spans.length)
        spent += 1
    norm = ErrorNorm.of(tolerance, y)
    means = _Means(pair, controller, norm, dense, trail)
    walk = _Walk.start(spans, y, first / spans.length.abs())
    arrivals = _Arrivals(y0, t1, trail)
    alive = len(y)
    for attempt in range(1, tolerance.max_steps + 1):
        if alive == 0:
            break
        if worth_compacting(walk.y, alive):
            arrivals.put(walk)
            walk = walk.take(torch.nonzero(walk.left)[:, 0])
            pair.resize(len(walk.left))
        alive = _attempt(means, walk, alive, attempt)
    if alive:
        stuck = walk.left > 0
        walk.end(stuck, tolerance.max_steps)
        walk.fail(stuck, walk.status.new_tensor(int(Status.MAX_STEPS)))
    arrivals.put(walk)
    return arrivals.finish(2 * coef.stages, spent)


def _attempt(means: _Means, walk: _Walk, alive: int, attempt: int) -> int:
    """Try one step of every row, move those that are accepted; return who is left.

    Rows that have ended take steps of length 0.
    """
    pair, y, z, left = means.pair, walk.y, walk.z, walk.left
    # Two equal steps at the end rather than a long one and a sliver.
    last = walk.share * 1.01 >= left
    # Coarse, so that the trail can tell it; rounding moves it by 0.4 % at most.
    coarse = torch.minimum(walk.share, 0.5 * left).to(COARSE).to(left.dtype)
    share = torch.where(last, left, coarse)
    after = left - share
    stride = walk.spans.stride(left, after, share)
    y1, z1 = pair.step(stride.t, stride.t1, stride.h, share, y, z)
    ratio = means.norm.ratio(pair.error(stride.h), y, y1)
    ratio += (z1 * 0).sum(dim=1)  # not a number where z1 is none
    accept, walk.share, walk.memory = means.controller.decide(ratio, share, walk.memory)
    parted = accept & (means.norm.ratio(y1 - z1, y, y1) > _FARTHEST)
    accept &= ~parted
    counts = torch.stack((accept, after > 0, parted)).sum(dim=1)
    accepted, going, lost = counts.tolist()  # the one host sync of a step
    live = left > 0
    moved = accept & live
    _tell(means, walk, replace(stride, moved=moved), last if going < alive else None)
    if accepted == len(left):
        walk.left, walk.y, walk.z = after, y1, z1
        if going < alive:
            walk.end(live, attempt)
        return int(going)
    wide = moved[:, None]
    walk.left = torch.where(moved, after, left)
    walk.y, walk.z = torch.where(wide, y1, y), torch.where(wide, z1, z)
    refused = live & ~accept
    walk.rejected = walk.rejected + refused
    if lost:
        walk.fail(parted & live, walk.status.new_tensor(int(Status.PARTED)))
    _give_up(walk, refused, pair.k, y1, z1)
    going = int(torch.count_nonzero(walk.left))  # host sync, only after a refusal
    if going < alive:
        walk.end(live, attempt)
    return going


def _tell(means: _Means, walk: _Walk, stride: Stride, last: Tensor | None) -> None:
    """Note the step, and write what was requested inside it.

    `last` tells whose step ends the span if it is taken; None: nobody's.
    """
    assert stride.moved is not None, "decided"
    if last is not None:
        last = last & stride.moved
    number = means.trail.note(walk.spans, stride.share * stride.moved, last)
    if means.dense is not None:
        events = _write(means.dense, means.pair, stride, walk.y, walk.z)
        if events is not None:
            means.trail.events[number] = events


def _write(
    dense: DenseOutput, pair: PairStep, stride: Stride, y: Tensor, z: Tensor
) -> Events | None:
    k = pair.slopes(stride.h, stride.share, y, z)
    return dense.write(
        Step(stride.rows, stride.moved, stride.t, stride.t1, stride.h, y, k)
    )


def _give_up(walk: _Walk, refused: Tensor, k: Tensor, y1: Tensor, z1: Tensor) -> None:
    """End rows whose next step would not move time."""
    spans = walk.spans
    size = torch.maximum(spans.t0.abs(), spans.t1.abs()) / spans.length.abs()
    ulp = size.clamp_(min=1.0).mul_(torch.finfo(size.dtype).eps)
    ended = refused & (walk.share <= 16 * ulp) & (walk.left > 0)
    if not bool(ended.any()):  # host sync, only after a refusal
        return
    finite = finite_rows(y1) & finite_rows(z1) & finite_rows(k.sum(dim=0))
    status = torch.where(finite, int(Status.STEP_UNDERFLOW), int(Status.NON_FINITE))
    walk.fail(ended, status)


class _Arrivals:
    """Collects rows as they leave the walk."""

    def __init__(self, y0: Tensor, t1: Tensor, trail: ChosenTrail) -> None:
        self._y0, self._t1, self._trail = y0, t1, trail
        self._walk: _Walk | None = None

    def put(self, walk: _Walk) -> None:
        """Write what the rows of `walk` have reached."""
        whole = self._walk
        if whole is None:
            self._walk = replace(walk)
            return
        # Places among the rows that set out, which may be fewer than the batch.
        assert walk.spans.rows is not None, "some have left"
        rows = walk.spans.rows
        if whole.spans.rows is not None:
            rows = torch.searchsorted(whole.spans.rows, rows)
        for name in walk.__slots__:
            if name != "spans":
                column = getattr(whole, name).index_copy(0, rows, getattr(walk, name))
                setattr(whole, name, column)

    def finish(self, nfe_per_attempt: int, nfe_start: int) -> Walked:
        walk = self._walk
        assert walk is not None, "finish follows put"
        spans = walk.spans
        self._trail.left = spans.put(self._trail.left, walk.given_up)
        t = torch.addcmul(spans.t1, spans.length, walk.given_up, value=-1.0)
        t = torch.where(walk.given_up == 1.0, spans.t0, t)
        lost = ~finite_rows(walk.y) & (walk.status == Status.SUCCESS)
        status = walk.status.masked_fill(lost, Status.NON_FINITE)
        nfe = walk.attempts * nfe_per_attempt + nfe_start
        accepted = walk.attempts - walk.rejected
        part = Statistics(status, t, accepted, walk.rejected, nfe)
        return _finish(self._y0, self._t1, spans, walk.y, walk.z, part, self._trail)


def _finish(
    y0: Tensor,
    t1: Tensor,
    spans: Spans,
    y: Tensor,
    z: Tensor,
    part: Statistics,
    trail: Trail,
) -> Walked:
    """Add the rows that had nowhere to go."""
    if spans.rows is None:
        return Walked(y, z, part, trail)
    none = torch.zeros_like(t1, dtype=torch.int64)
    status = torch.where(finite_rows(y0), int(Status.SUCCESS), int(Status.NON_FINITE))
    idle = (status.to(torch.int8), t1, none, none, none)
    columns = zip(idle, part.columns(), strict=True)
    stats = Statistics(*(spans.put(whole, some) for whole, some in columns))
    return Walked(spans.put(y0, y), spans.put(y0, z), stats, trail)


def _parted(y0: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Return in which rows (A,) the two states have nothing to do with each other.

    Even steps promise no error that they could be measured by.
    """
    size = torch.stack([x.abs().amax(dim=1) for x in (y0, y, z)]).amax(dim=0)
    return (y - z).abs().amax(dim=1) > size
