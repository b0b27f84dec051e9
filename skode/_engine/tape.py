"""The steps of a solve, kept so that gradients can replay them.

B rows, A of them in a step, D state, E requested times inside it.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from skode._engine.dense import DenseOutput, Events
from skode._engine.observer import Step

_WORTH_GATHERING = 2048
"""Numbers of state; fewer cost less to replay with a step of 0 than to sort out."""

_MOST_AT_ONCE, _MOST_KEPT = 2**16, 2**21
"""Numbers of stages that are kept, of one step and of all."""


@dataclass(frozen=True, slots=True)
class Taken:
    """One step of A rows. A row with h = 0 stays where it is."""

    rows: Tensor | None
    """(A,) which rows of the batch; None: all, in order."""
    t: Tensor
    """(A,)."""
    h: Tensor
    """(A,) signed."""
    y: Tensor
    """(A, D) before the step."""
    events: Events | None
    k: Tensor | None
    """(S + 1, A, D) stage derivatives, or None to compute them again."""

    def only(self, keep: Tensor) -> "Taken":
        """Return the step of some of its rows (indices, ascending)."""
        events = self.events
        if events is not None:  # they are of rows that are kept
            events = replace(events, position=torch.searchsorted(keep, events.position))
        return Taken(
            keep if self.rows is None else self.rows[keep],
            self.t.index_select(0, keep),
            self.h.index_select(0, keep),
            self.y.index_select(0, keep),
            events,
            None if self.k is None else self.k.index_select(1, keep),
        )


Tape = tuple[Taken, ...]
"""All steps of a solve, in order."""


class Recorder:
    """Observer that keeps (t, h, y) of accepted steps, and no activations.

    Stages are kept too while they are small: on few rows, what it takes to compute
    them again is not arithmetic.
    """

    def __init__(self, dense: DenseOutput | None) -> None:
        self._dense = dense
        self._room = _MOST_KEPT
        self._taken: list[Taken] = []

    def observe(self, step: Step) -> None:
        events = None if self._dense is None else self._dense.write(step)
        moved = step.moved
        if moved is None:
            k = self._keep(step.k)
            self._taken.append(Taken(step.rows, step.t, step.h, step.y, events, k))
            return
        idle = moved.shape[0] - int(torch.count_nonzero(moved))
        if idle == moved.shape[0]:
            return
        h, k = step.h * moved, self._keep(step.k)
        taken = Taken(step.rows, step.t, h, step.y, events, k)
        if _worth_gathering(step, idle):
            taken = taken.only(torch.nonzero(moved)[:, 0])
        self._taken.append(taken)

    def _keep(self, k: Tensor) -> Tensor | None:
        size = k.numel()
        if size > min(self._room, _MOST_AT_ONCE):
            return None
        self._room -= size
        return k.clone()

    def tape(self) -> Tape:
        """Return what was recorded."""
        return tuple(self._taken)


def _worth_gathering(step: Step, idle: int) -> bool:
    """Return whether the rows that did not move are better left out."""
    if idle * step.y.shape[1] >= _WORTH_GATHERING:
        return True
    # Where a slope is not finite, not even a step of 0 stays where it is: 0 * NaN.
    return not math.isfinite(float(step.k.sum()))
