"""Which steps a reversible solve took: enough to walk them back.

Even steps are known from their number. Chosen ones are shares of the row's span, of 8
significant bits (`bfloat16`): two bytes for a row and a step, whatever the width of the
state and the dtype of the times. From 1, the share that is left at the start, such
shares are subtracted without rounding, down to steps of 2^-45 of the span in float64
and 2^-17 in float32; so adding them up again leads back to the same times. B rows, A of
them in a step.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from skode._engine.dense import Events

COARSE = torch.bfloat16

_CHUNK = 64
"""Steps that memory is taken for at a time."""


@dataclass(frozen=True, slots=True)
class Stride:
    """One step of A rows. A row with h = 0 stays where it is."""

    rows: Tensor | None
    """(A,) which rows of the batch; None: all, in order. The same object as in the
    stride before where the rows are the same."""
    moved: Tensor | None
    """(A,) which of them move; None: all."""
    t: Tensor
    """(A,)."""
    t1: Tensor
    """(A,) the end of the step."""
    h: Tensor
    """(A,) signed."""
    share: Tensor
    """(A,) of the row's span, positive."""
    left: Tensor
    """(A,) share of the row's span that lies behind t."""
    events: Events | None = None

    def only(self, keep: Tensor) -> "Stride":
        """Return the step of some of its rows (indices, ascending), which all move."""
        return Stride(
            rows=keep if self.rows is None else self.rows[keep],
            moved=None,
            t=self.t.index_select(0, keep),
            t1=self.t1.index_select(0, keep),
            h=self.h.index_select(0, keep),
            share=self.share.index_select(0, keep),
            left=self.left.index_select(0, keep),
            events=None if self.events is None else self.events.only(keep),
        )


class Trail(Protocol):
    """The steps of a solve."""

    events: dict[int, Events]
    """What was requested inside them, by the number of the step."""

    def backwards(self) -> Iterator[Stride]:
        """Yield the steps, the last one first."""


@dataclass(frozen=True, slots=True)
class Spans:
    """What A rows have to go; none of them nothing."""

    rows: Tensor | None
    """(A,) which rows of the batch; None: all, in order."""
    t0: Tensor
    t1: Tensor
    length: Tensor
    """Signed."""

    @classmethod
    def of(cls, t0: Tensor, t1: Tensor) -> "Spans":
        """Return those of t0, t1 (B,) that differ."""
        length = t1 - t0
        if bool((length != 0).all()):  # host sync, once per solve
            return cls(None, t0, t1, length)
        return cls(None, t0, t1, length).only(torch.nonzero(length)[:, 0])

    def only(self, keep: Tensor) -> "Spans":
        """Return those of some of the rows (indices, ascending)."""
        columns = (self.t0, self.t1, self.length)
        return Spans(
            keep if self.rows is None else self.rows[keep],
            *(column.index_select(0, keep) for column in columns),
        )

    def part(self, x: Tensor) -> Tensor:
        """Return the rows' part of x (B, ...)."""
        return x if self.rows is None else x.index_select(0, self.rows)

    def put(self, x: Tensor, part: Tensor) -> Tensor:
        """Return x (B, ...) with the rows' part replaced."""
        return part if self.rows is None else x.index_copy(0, self.rows, part)

    def stride(self, left: Tensor, after: Tensor, share: Tensor) -> Stride:
        """Return the step from where `left` of the span is left, to `after`, (A,)."""
        t = torch.addcmul(self.t1, self.length, left, value=-1.0)
        t1 = torch.addcmul(self.t1, self.length, after, value=-1.0)
        return Stride(self.rows, None, t, t1, self.length * share, share, left)


@dataclass
class EvenTrail:
    """Spans divided evenly. Nothing is kept of a step."""

    spans: Spans
    steps: Tensor
    """(A,) in the dtype of the times."""
    reached: Tensor
    """(A,) how many steps are to be walked back."""
    events: dict[int, Events] = field(default_factory=dict)

    def stride(self, n: int, moved: Tensor | None) -> Stride:
        """Return step n, counted from 0, of rows of which some do not move (A,)."""
        left = ((self.steps - n) / self.steps).clamp_(min=0.0)
        after = ((self.steps - (n + 1)) / self.steps).clamp_(min=0.0)
        share = self.steps.reciprocal()
        if moved is not None:
            share = share * moved
        return replace(self.spans.stride(left, after, share), moved=moved)

    def backwards(self) -> Iterator[Stride]:
        """Yield the steps, the last one first."""
        if len(self.reached) == 0:
            return
        most, least = int(self.reached.max()), int(self.reached.min())  # once per solve
        for n in reversed(range(most)):
            stride = self.stride(n, None if n < least else n < self.reached)
            yield replace(stride, events=self.events.get(n))


class ChosenTrail:
    """Steps that a controller chose.

    Parameters
    ----------
    batch : int
        B.
    like : Tensor
        Of the dtype and device of the times.
    """

    def __init__(self, batch: int, like: Tensor) -> None:
        self.events: dict[int, Events] = {}
        self.last = like.new_zeros(batch)
        """Share of the last step of a row that arrived."""
        self.left = like.new_zeros(batch)
        """Share of its span that a row did not go."""
        self._chunks: list[tuple[Spans, Tensor]] = []
        self._count = 0

    def note(self, spans: Spans, share: Tensor, last: Tensor | None) -> int:
        """Note a step's shares (A,), 0 for rows that stay; return its number.

        `last` tells which rows arrive, whose shares are not coarse; None: no row.
        """
        place = self._count % _CHUNK
        if place and self._chunks[-1][0] is not spans:  # another chunk, with room left
            self._count += _CHUNK - place
            place = 0
        if place == 0:
            room = torch.zeros(_CHUNK, len(share), dtype=COARSE, device=share.device)
            self._chunks.append((spans, room))
        coarse = self._chunks[-1][1][place]
        if last is None:
            coarse.copy_(share)
        else:
            coarse.copy_(share.masked_fill(last, torch.inf))
            self.last = spans.put(
                self.last, torch.where(last, share, spans.part(self.last))
            )
        self._count += 1
        return self._count - 1

    def backwards(self) -> Iterator[Stride]:
        """Yield the steps, the last one first."""
        left = self.left
        end = self._count
        for i in reversed(range(len(self._chunks))):
            spans, coarse = self._chunks[i]
            part, last = spans.part(left), spans.part(self.last)
            first = i * _CHUNK
            for n in reversed(range(first, min(end, first + _CHUNK))):
                share = coarse[n - first].to(last.dtype)
                share = torch.where(torch.isinf(share), last, share)
                moved = share > 0
                if not bool(moved.any()):  # room that was left
                    continue
                before = part + share
                stride = spans.stride(before, part, share)
                yield replace(stride, moved=moved, events=self.events.get(n))
                part = before
            left = spans.put(left, part)
