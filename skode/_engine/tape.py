"""The steps of a solve, kept so that gradients can replay them.

B rows, A of them in a step, D state, E requested times inside it.
"""

import math
from collections.abc import Sequence
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
        if events is not None:
            events = events.only(keep)
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


def flat(tape: Tape) -> list[Tensor | None]:
    """Return the tensors of a tape, for autograd to keep and to free."""
    tensors: list[Tensor | None] = []
    for taken in tape:
        events = taken.events
        tensors += (taken.rows, taken.t, taken.h, taken.y, taken.k)
        tensors += (
            (None, None, None)
            if events is None
            else (events.position, events.row, events.index)
        )
    return tensors


def unflat(tensors: Sequence[Tensor], steps: int) -> Tape:
    """Return the tape of so many steps that `flat` took apart."""
    tape = []
    for i in range(steps):
        rows, t, h, y, k, position, row, index = tensors[8 * i : 8 * (i + 1)]
        events = None if position is None else Events(position, row, index)
        tape.append(Taken(rows, t, h, y, events, k))
    return tuple(tape)


class Recorder:
    """Observer that keeps (t, h, y) of accepted steps, and no activations.

    Stages are kept too while they are small: on few rows, what it takes to compute
    them again is not arithmetic.

    Parameters
    ----------
    dense : DenseOutput or None
        What writes the requested times inside the steps.
    bounded : bool
        As of the kernel that will replay the steps.
    """

    def __init__(self, dense: DenseOutput | None, bounded: bool) -> None:
        self._dense, self._bounded = dense, bounded
        self._room = _MOST_KEPT
        self._taken: list[Taken] = []

    def observe(self, step: Step) -> None:
        events = None if self._dense is None else self._dense.write(step)
        moved = step.moved
        # Stages of a step with events are computed again, with one more.
        k = None if events is not None else self._keep(step.k)
        if moved is None:
            self._taken.append(Taken(step.rows, step.t, step.h, step.y, events, k))
            return
        idle = moved.shape[0] - int(torch.count_nonzero(moved))  # host sync
        if idle == moved.shape[0]:
            return
        taken = Taken(step.rows, step.t, step.h * moved, step.y, events, k)
        if not self._may_wait(step, idle):
            taken = taken.only(torch.nonzero(moved)[:, 0])
        self._taken.append(taken)

    def _keep(self, k: Tensor) -> Tensor | None:
        size = k.numel()
        if size > min(self._room, _MOST_AT_ONCE):
            return None
        self._room -= size
        return k.clone()

    def _may_wait(self, step: Step, idle: int) -> bool:
        """Return whether rows that did not move may be replayed with a step of 0."""
        few = idle * step.y.shape[1] < _WORTH_GATHERING
        # Where a slope is not finite, no row stays where it is: 0 * NaN.
        return (
            few and self._bounded and math.isfinite(float(step.k.sum()))  # host sync
        )

    def tape(self, status: Tensor, y1: Tensor) -> Tape:
        """Return what was recorded of the rows (B,) that ended in y1 (B, D)."""
        if not bool((status != 0).any()):  # host sync, once per solve
            return tuple(self._taken)
        return _sound(self._taken, torch.isfinite(y1).all(dim=1))


def _sound(steps: list[Taken], sound: Tensor) -> Tape:
    """Leave out the steps that led to, or began in, a state that is not finite.

    `sound` (B,) tells whose last state is finite. A loss that does not look at a row
    that failed gives it a cotangent of 0, and 0 * NaN would be everybody's gradient.
    """
    kept = []
    for taken in reversed(steps):
        # Sums in another order than the forward solve's may overflow: stages that are
        # kept are replayed all at once.
        taken = replace(taken, k=None)
        rows = slice(None) if taken.rows is None else taken.rows
        moved = taken.h != 0
        keep = moved & sound[rows]
        if taken.events is not None:
            # Of rows with events f(t1, y1) is evaluated too: of no others.
            busy = torch.zeros_like(keep)
            busy[taken.events.position] = True
            kept.append(taken.only(torch.nonzero(keep & busy)[:, 0]))
            taken, keep = replace(taken, events=None), keep & ~busy
        kept.append(taken.only(torch.nonzero(keep)[:, 0]))
        finite = torch.isfinite(taken.y).all(dim=1)
        sound = sound.clone()
        sound[rows] = torch.where(moved, finite, sound[rows])
    return tuple(taken for taken in reversed(kept) if taken.t.shape[0])
