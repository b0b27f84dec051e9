"""Attempts of all rows without a host synchronisation: ended rows take steps of 0.

The same formulas as `loop`, over memory of fixed shape that is written in place, so
that an attempt can be recorded and replayed. It is the plain twin of `tiles.forward`,
too. B rows, T requested times, D state, S stages, C slots of a tape.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from skode._engine.control import ErrorNorm, PIController
from skode._engine.dense import powers
from skode._engine.kernel import Evaluator
from skode._engine.lanes import Chunk, Lanes
from skode._engine.solution import Status, Tolerance
from skode._engine.step import Workspace, end_of_step, fill_stages, stage_times
from skode._engine.tableau import Coefficients


@dataclass(frozen=True, slots=True)
class Means:
    """What every attempt of a solve uses."""

    kernel: Evaluator
    coef: Coefficients
    controller: PIController
    norm: ErrorNorm
    work: Workspace

    @classmethod
    def of(
        cls, kernel: Evaluator, coef: Coefficients, tolerance: Tolerance, y: Tensor
    ) -> "Means":
        """Return the means of a solve from states like y (B, D)."""
        controller = PIController.of(tolerance, y, coef.order, coef.error_constant)
        norm = ErrorNorm.of(tolerance, y)
        return cls(kernel, coef, controller, norm, Workspace(coef, y))


def start(means: Means, lanes: Lanes) -> None:
    """Write the slope at the start, and the clock."""
    kernel, y, slope = means.kernel, lanes.y, lanes.slope
    t0, t1 = lanes.times[:, 0], lanes.times[:, -1]
    kernel.begin(t0.to(y.dtype)[None])
    kernel.evaluate(0, y, slope)
    h, _ = means.controller.first(kernel, t0, y, slope, t1 - t0)
    memory = torch.full_like(t0, 1e-4)
    torch.stack((t0, t1, (t1 - t0).abs(), h, memory), out=lanes.clock)


def advance(means: Means, lanes: Lanes, chunk: Chunk | None, attempts: int) -> Tensor:
    """Make some attempts; return whether a row has yet a way to go, as a tensor."""
    if chunk is not None:
        chunk.used.zero_()
    for _ in range(attempts):
        attempt(means, lanes, chunk)
    return (lanes.clock[2] > 0).any()


def attempt(means: Means, lanes: Lanes, chunk: Chunk | None) -> None:
    """Try one step of every row, and move those that are accepted."""
    kernel, coef, work, y = means.kernel, means.coef, means.work, lanes.y
    t, t1, left, proposed, memory = lanes.clock
    live = left > 0
    sign = torch.sign(lanes.times[:, -1] - lanes.times[:, 0])
    # Two equal steps at the end rather than a long one and a sliver.
    size = torch.where(
        proposed * 1.01 >= left, left, torch.minimum(proposed, 0.5 * left)
    )
    h = size * sign
    h_state = h.to(y.dtype)[:, None]
    kernel.begin(stage_times(coef, t, h, y.dtype))
    work.slopes[0].copy_(lanes.slope)
    fill_stages(kernel, coef, h_state, y, work)
    y_next = end_of_step(coef, h_state, y, work)
    kernel.evaluate(coef.stages, y_next, work.slopes[-1])
    torch.mv(work.table, coef.b_err, out=work.flat_state)
    ratio = means.norm.ratio(work.state.mul_(h_state), y, y_next)
    accept, proposed, memory = means.controller.decide(ratio, size, memory.to(y.dtype))

    left_next = left - size
    t_next = torch.addcmul(t1, sign, left_next, value=-1.0)
    moved, refused = live & accept, live & ~accept
    due = lanes.counts[3].clone()
    if lanes.inside is not None:
        _write_inside(means, lanes, moved, t, h, t_next)
    if chunk is not None:
        keep = moved & torch.isfinite(y).all(dim=1) & torch.isfinite(y_next).all(dim=1)
        _record(chunk, lanes, keep, t, h, due)

    status, ended = _give_up(lanes, refused, proposed, y_next, work.k)
    lanes.counts[:3] = torch.stack(
        (lanes.counts[0] + live, lanes.counts[1] + refused, status)
    )
    left = torch.where(moved, left_next, left).masked_fill(ended, 0.0)
    # The time of a row that gives up stays; only the distance is given up.
    t1, t = torch.where(ended, t, t1), torch.where(moved, t_next, t)
    torch.stack((t, t1, left, proposed, memory.to(t.dtype)), out=lanes.clock)
    y.copy_(torch.where(moved[:, None], y_next, y))
    lanes.slope.copy_(torch.where(moved[:, None], work.slopes[-1], lanes.slope))


def _give_up(
    lanes: Lanes, refused: Tensor, proposed: Tensor, y_next: Tensor, k: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the status of every row, and whose next step would not move time."""
    t, t1 = lanes.clock[:2]
    ulp = torch.maximum(t.abs(), t1.abs()) * torch.finfo(t.dtype).eps
    ended = refused & (proposed <= 16 * ulp)
    finite = torch.isfinite(y_next + k.sum(dim=0)).all(dim=1)
    reason = torch.where(finite, int(Status.STEP_UNDERFLOW), int(Status.NON_FINITE))
    return torch.where(ended, reason.to(torch.int32), lanes.counts[2]), ended


def _record(
    chunk: Chunk, lanes: Lanes, keep: Tensor, t: Tensor, h: Tensor, due: Tensor
) -> None:
    """Write the step of some rows to each row's next slot."""
    slots, batch = chunk.y.shape[:2]
    row = torch.arange(batch, device=t.device)
    place = torch.where(keep, chunk.used, slots - 1) * batch + row
    chunk.y.flatten(0, 1).index_copy_(0, place, lanes.y)
    chunk.clock.flatten(1).index_copy_(1, place, torch.stack((t, h)))
    if lanes.inside is not None:
        both = torch.stack((due, lanes.counts[3]))
        chunk.due.flatten(1).index_copy_(1, place, both)
    chunk.used.add_(keep)


def _write_inside(
    means: Means, lanes: Lanes, moved: Tensor, t: Tensor, h: Tensor, t_next: Tensor
) -> None:
    """Write the requested times that the steps passed over, all (B, T) at once."""
    assert lanes.inside is not None, "some times lie inside"
    times, dense, y = lanes.times, means.coef.dense, lanes.y
    sign = torch.sign(times[:, -1:] - times[:, :1])
    index = torch.arange(times.shape[1], device=t.device)
    first, stop = lanes.counts[3:, :, None]
    reached = times * sign <= t_next[:, None] * sign
    here = moved[:, None] & (index >= first) & (index < stop) & reached
    theta = ((times - t[:, None]) / h[:, None]).to(y.dtype)
    weights = powers(theta, len(dense)) @ dense  # (B, T, S + 1)
    change = torch.einsum("bts,sbd->btd", weights, means.work.k)
    shown = y[:, None] + h.to(y.dtype)[:, None, None] * change
    lanes.inside.copy_(torch.where(here[:, :, None], shown, lanes.inside))
    lanes.counts[3] += here.sum(dim=1)
