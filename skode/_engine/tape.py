"""The accepted steps of a solve, arranged so that gradients can replay them.

Rows are sorted by their number of steps, most first; then the rows that take a
j-th step are a prefix of all rows, for every j, and a replay is a loop over j with
views instead of gathers. B rows, D state, N accepted steps in all.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from skode._engine.dense import Events
from skode._engine.observer import Step


@dataclass(frozen=True, slots=True)
class Group:
    """The j-th steps of the A rows that take one."""

    t: Tensor
    """(A,)."""
    h: Tensor
    """(A,) signed."""
    y: Tensor
    """(A, D) before the step."""
    position: Tensor | None
    """(E,) which of the A rows each requested time inside belongs to."""
    index: Tensor | None
    """(E,) which of its row's requested times."""


@dataclass(frozen=True, slots=True)
class Tape:
    """All steps of a solve, in order."""

    order: Tensor
    """(B,) rows by number of steps, most first."""
    groups: tuple[Group, ...]


class Recorder:
    """Observer that keeps (t, h, y) of accepted steps: the states, no activations."""

    def __init__(self) -> None:
        self._rows: list[Tensor | None] = []
        self._ordinal: list[Tensor] = []
        self._t: list[Tensor] = []
        self._h: list[Tensor] = []
        self._y: list[Tensor] = []

    def observe(self, step: Step) -> None:
        rows, moved = step.rows, step.moved
        kept = (step.ordinal, step.t, step.h, step.y)
        if moved is not None:
            index = torch.nonzero(moved)[:, 0]
            if len(index) == 0:
                return
            rows = index if rows is None else rows[index]
            kept = tuple(column.index_select(0, index) for column in kept)  # type: ignore[assignment]
        self._rows.append(rows)
        for column, part in zip(
            (self._ordinal, self._t, self._h, self._y), kept, strict=True
        ):
            column.append(part)

    def tape(self, n_accepted: Tensor, events: list[Events]) -> Tape:
        """Arrange what was recorded."""
        batch = len(n_accepted)
        device = n_accepted.device
        if not self._rows:
            return Tape(torch.arange(batch, device=device), ())
        if all(rows is None for rows in self._rows):
            order = torch.arange(batch, device=device)
            columns = list(zip(self._t, self._h, self._y, strict=True))
            position = order
        else:
            order = torch.argsort(n_accepted, descending=True, stable=True)
            position = torch.empty_like(order)
            position[order] = torch.arange(batch, device=device)
            columns = self._sorted(n_accepted, position)
        placed = _place(events, position, len(columns))
        return Tape(
            order,
            tuple(
                Group(*column, *where)
                for column, where in zip(columns, placed, strict=True)
            ),
        )

    def _sorted(
        self, n_accepted: Tensor, position: Tensor
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Gather the steps by ordinal, and by position within it."""
        everyone = torch.arange(len(n_accepted), device=n_accepted.device)
        rows = torch.cat([everyone if r is None else r for r in self._rows])
        ordinal = torch.cat(self._ordinal)
        key = torch.argsort(ordinal * len(n_accepted) + position[rows])
        sizes = torch.bincount(ordinal).tolist()
        # Each column is freed before the next is gathered: one copy at a time.
        split = []
        for column in (self._t, self._h, self._y):
            whole = torch.cat(column)
            column.clear()
            split.append(whole.index_select(0, key).split(sizes))
        return list(zip(*split, strict=True))


def _place(
    events: list[Events], position: Tensor, groups: int
) -> list[tuple[Tensor | None, Tensor | None]]:
    """Hand every event to the group of its step."""
    if not events:
        return [(None, None)] * groups
    rows = torch.cat([event.rows for event in events])
    ordinal = torch.cat([event.ordinal for event in events])
    index = torch.cat([event.index for event in events])
    key = torch.argsort(ordinal, stable=True)
    sizes = torch.bincount(ordinal, minlength=groups).tolist()
    return [
        (where, which) if len(where) else (None, None)
        for where, which in zip(
            position[rows[key]].split(sizes), index[key].split(sizes), strict=True
        )
    ]
