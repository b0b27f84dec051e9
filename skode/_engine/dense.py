"""Dense output: states at requested times inside accepted steps.

B rows, A of them stepping, T times, D state, S stages, P powers of theta; an event is
one requested time of one row that fell into a step, E of them.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from skode._engine.observer import Step
from skode._engine.tableau import Coefficients


@dataclass(frozen=True, slots=True)
class Events:
    """Requested times strictly inside one step of A rows; all of shape (E,)."""

    position: Tensor
    """Which of the A rows."""
    row: Tensor
    """Which row of the batch that is."""
    index: Tensor
    """Which of its requested times."""

    def only(self, keep: Tensor) -> "Events":
        """Return those of some of the A rows (indices, ascending)."""
        stay = torch.isin(self.position, keep)
        position = torch.searchsorted(keep, self.position[stay])
        return Events(position, self.row[stay], self.index[stay])


@dataclass(frozen=True)
class Requests:
    """Requested times (B, T), each row monotone, and where they lie.

    The commonest request, the two ends, needs no mask: a row whose ends are equal does
    not move.
    """

    times: Tensor

    @cached_property
    def at_end(self) -> Tensor:
        """(B, T) equal to the row's last time."""
        return self.times == self.times[:, -1:]

    @cached_property
    def at_start(self) -> Tensor:
        """(B, T) equal to the row's first time, where that differs from its last."""
        return (self.times == self.times[:, :1]) & ~self.at_end

    @cached_property
    def any_inside(self) -> bool:
        """Whether a time lies between the ends of its row."""
        if self.times.shape[1] <= 2:
            return False
        return not bool((self.at_start | self.at_end).all())  # host sync

    def idle(self) -> tuple[Tensor, Tensor]:
        """Return which times, (B, T), repeat the first one, and which the last one.

        No step reaches or leaves them on their own account: their gradient is the
        slope of the solution there, taken from the time that they repeat.
        """
        still = (self.times[:, :1] == self.times[:, -1:]).expand_as(self.times)
        first, last = self.at_start | still, self.at_end & ~still
        first[:, 0] = False
        last[:, -1] = False
        return first, last

    def sum_at_end(self, grad: Tensor) -> Tensor:
        """Return the sum (B, D) of grad (B, T, D) over the times equal to the last."""
        if self.times.shape[1] == 2:
            return grad[:, 1].clone()
        return _masked_sum(grad, self.at_end)

    def sum_at_start(self, grad: Tensor) -> Tensor:
        """Return the sum (B, D) of grad (B, T, D) over the times equal to the first."""
        if self.times.shape[1] == 2:
            return grad[:, 0]
        return _masked_sum(grad, self.at_start)

    def fill(self, y0: Tensor, y1: Tensor, inside: Tensor | None) -> Tensor:
        """Return (B, T, D) states from those at the ends and those inside."""
        if self.times.shape[1] == 2:
            return torch.stack((y0, y1), dim=1)
        ends = torch.where(self.at_end[:, :, None], y1[:, None], y0[:, None])
        if inside is None:
            return ends
        return torch.where((self.at_start | self.at_end)[:, :, None], ends, inside)


def _masked_sum(grad: Tensor, mask: Tensor) -> Tensor:
    """Sum grad (B, T, D) over the times of a mask (B, T)."""
    return torch.bmm(mask.to(grad.dtype).unsqueeze(1), grad).squeeze(1)


def powers(theta: Tensor, count: int) -> Tensor:
    """Return theta, theta^2, ... of shape (E, P)."""
    return torch.stack([theta**p for p in range(1, count + 1)], dim=-1)


def slopes_of_powers(theta: Tensor, count: int) -> Tensor:
    """Return 1, 2 theta, 3 theta^2, ... of shape (E, P)."""
    return torch.stack([p * theta ** (p - 1) for p in range(1, count + 1)], dim=-1)


def interpolate(
    coef: Coefficients, theta: Tensor, h: Tensor, y: Tensor, k: Tensor
) -> Tensor:
    """Return y(t + theta h), (E, D), from y (E, D) and k (S + 1, E, D)."""
    weights = powers(theta, len(coef.dense)) @ coef.dense
    return y + h[:, None] * torch.einsum("es,sed->ed", weights, k)


class DenseOutput:
    """Observer that writes the requested times as the steps pass over them."""

    def __init__(self, requests: Requests, y0: Tensor, coef: Coefficients) -> None:
        times = requests.times
        batch, count = times.shape
        self._coef = coef
        self._times = times
        self._sign = torch.sign(times[:, -1:] - times[:, :1])
        self._ascending = (times * self._sign).contiguous()
        self._next = requests.at_start.sum(dim=1)
        self._stop = count - requests.at_end.sum(dim=1)
        self.ys = torch.full(
            (batch, count, y0.shape[1]), torch.nan, dtype=y0.dtype, device=y0.device
        )

    def observe(self, step: Step) -> None:
        self.write(step)

    def write(self, step: Step) -> Events | None:
        """Write what was requested inside a step, and tell what that was."""
        rows = slice(None) if step.rows is None else step.rows
        end = (step.t1 * self._sign[rows, 0])[:, None]
        passed = torch.searchsorted(self._ascending[rows], end, right=True)[:, 0]
        passed = torch.minimum(passed, self._stop[rows])
        due = passed - self._next[rows]
        if step.moved is not None:
            due = due * step.moved
        due = due.clamp(min=0)
        total = int(due.sum())  # host sync, only where times are requested inside
        if total == 0:
            return None
        local = torch.repeat_interleave(due, output_size=total)
        offset = torch.arange(total, device=due.device) - (due.cumsum(0) - due)[local]
        row = local if step.rows is None else step.rows[local]
        index = self._next[row] + offset
        h = step.h[local]
        theta = ((self._times[row, index] - step.t[local]) / h).to(self.ys.dtype)
        self.ys[row, index] = interpolate(
            self._coef, theta, h.to(self.ys.dtype), step.y[local], step.k[:, local]
        )
        self._next[rows] += due
        return Events(local, row, index)
