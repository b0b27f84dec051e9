"""Rows that stay in place until all have ended: memory of fixed shape.

What steps without a host synchronisation needs, be it a kernel that takes many steps
per launch or a recorded graph that is replayed. B rows, T requested times, D state, C
slots of a tape.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skode._engine.dense import Events, Requests
from skode._engine.solution import Statistics, Status, finite_rows
from skode._engine.tape import Taken, Tape


@dataclass(frozen=True, slots=True)
class Lanes:
    """Where B rows stand; written in place."""

    times: Tensor
    """(B, T) requested."""
    clock: Tensor
    """(5, B) t, t1, left, proposed step and the controller's memory."""
    counts: Tensor
    """(5, B) of int32: attempts, rejected, status, and of the requested times inside
    which comes next and at which to stop."""
    y: Tensor
    """(B, D)."""
    slope: Tensor
    """(B, D) f(t, y)."""
    inside: Tensor | None
    """(B, T, D) states at times inside steps; None where no time is."""

    @classmethod
    def at(cls, y0: Tensor, requests: Requests) -> "Lanes":
        """Return memory with rows at their first state; their clock is not set."""
        times = requests.times.contiguous()
        batch, count = times.shape
        counts = torch.zeros(5, batch, dtype=torch.int32, device=y0.device)
        inside = None
        if requests.any_inside:
            counts[3] = requests.at_start.sum(dim=1)
            counts[4] = count - requests.at_end.sum(dim=1)
            inside = y0.new_full((batch, count, y0.shape[1]), torch.nan)
        y = y0.clone(memory_format=torch.contiguous_format)
        clock = times.new_empty(5, batch)
        return cls(times, clock, counts, y, torch.empty_like(y), inside)

    def finish(self, stages: int) -> tuple[Tensor, Statistics]:
        """Return the last states (B, D) and what became of every row."""
        attempts, rejected, status = self.counts[:3].to(torch.int64)
        status = torch.where(self.clock[2] > 0, int(Status.MAX_STEPS), status)
        lost = ~finite_rows(self.y) & (status == Status.SUCCESS)
        status = status.masked_fill(lost, Status.NON_FINITE).to(torch.int8)
        accepted, nfe = attempts - rejected, attempts * stages + 2
        t = self.clock[0].clone()
        return self.y, Statistics(status, t, accepted, rejected, nfe)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Up to C - 1 accepted steps of every row; the next chunk goes on from there."""

    clock: Tensor
    """(2, C, B) t and signed h."""
    y: Tensor
    """(C, B, D) before the step."""
    due: Tensor
    """(2, C, B) of int32: which requested times lie inside, first and past the last."""
    used: Tensor
    """(B,) of int32: how many slots the row filled."""

    @classmethod
    def like(cls, lanes: Lanes, slots: int) -> "Chunk":
        """Return an empty chunk for so many steps of the rows in `lanes`.

        There is one slot more, for rows that do not move to be written to.
        """
        batch, dim = lanes.y.shape
        due = slots + 1 if lanes.inside is not None else 0
        return cls(
            lanes.clock.new_empty(2, slots + 1, batch),
            lanes.y.new_empty(slots + 1, batch, dim),
            lanes.counts.new_empty(2, due, batch),
            lanes.counts.new_zeros(batch),
        )

    def copy(self, slots: int) -> "Chunk":
        """Return a copy of the first slots."""
        return Chunk(
            self.clock[:, :slots].clone(),
            self.y[:slots].clone(),
            self.due[:, :slots].clone(),
            self.used.clone(),
        )

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all of them, as the constructor takes them."""
        return self.clock, self.y, self.due, self.used


def tape_of(chunks: Sequence[Chunk]) -> Tape:
    """Return the steps of all chunks, as the loop would have recorded them."""
    tape = []
    for chunk in chunks:
        for slot in range(int(chunk.used.max())):  # host sync
            rows = torch.nonzero(slot < chunk.used)[:, 0]
            (t, h), y = chunk.clock[:, slot, rows], chunk.y[slot, rows]
            events = None
            if chunk.due.shape[1] > 0:
                events = _events(rows, *chunk.due[:, slot, rows].to(torch.int64))
            tape.append(Taken(rows, t, h, y, events, None))
    return tuple(tape)


def _events(rows: Tensor, first: Tensor, stop: Tensor) -> Events | None:
    """Return the requested times from `first` to before `stop` of some rows, (A,)."""
    due = stop - first
    total = int(due.sum())  # host sync
    if total == 0:
        return None
    position = torch.repeat_interleave(due, output_size=total)
    offset = torch.arange(total, device=due.device) - (due.cumsum(0) - due)[position]
    return Events(position, rows[position], first[position] + offset)


def drive(
    launch: Callable[[int], Tensor], attempts: int, max_steps: int, ahead: int = 1
) -> int:
    """Launch until no row is left, or `max_steps` attempts were made.

    Parameters
    ----------
    launch : callable
        Makes so many attempts more; returns a tensor that holds, once they are done,
        something other than 0 if a row has yet a way to go.
    attempts : int
        Of one launch.
    ahead : int, default=1
        How many launches are under way on a GPU behind the one whose answer is read.
        They find nothing to do if there was nothing left.

    Returns
    -------
    launches : int
        How many had something to do.
    """
    answers: list[Callable[[], bool]] = []
    made = 0
    while made < max_steps:
        now = min(attempts, max_steps - made)
        alive = launch(now)
        made += now
        answers.append(_read_later(alive))
        if alive.device.type != "cuda":
            ahead = 0
        if len(answers) > ahead and not answers[-1 - ahead]():
            return len(answers) - ahead
    return len(answers)


def _read_later(alive: Tensor) -> Callable[[], bool]:
    """Send the answer to the host; return how to wait for it."""
    if alive.device.type != "cuda":
        return lambda: bool(alive.any())
    onto = torch.empty((), dtype=torch.bool, pin_memory=True)
    onto.copy_(alive.any(), non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(alive.device))

    def answer() -> bool:
        arrived.synchronize()  # host sync, with the next launch under way
        return bool(onto)

    return answer
