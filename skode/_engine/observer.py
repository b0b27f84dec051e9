"""What the loop tells of each step, to whoever listens. A rows, D state, S stages.

Dense output, the tape of a gradient and the quadrature of the adjoint are observers.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Step:
    """One attempt by A rows, after acceptance was decided."""

    rows: Tensor | None
    """(A,) which rows of the batch; None: all, in order."""
    moved: Tensor | None
    """(A,) which of them were accepted; None: all."""
    t: Tensor
    """(A,)."""
    t1: Tensor
    """(A,) the end of the step."""
    h: Tensor
    """(A,) signed, in the dtype of the times."""
    y: Tensor
    """(A, D) before the step."""
    k: Tensor
    """(S + 1, A, D) stage derivatives, valid until the next step."""


@runtime_checkable
class Observer(Protocol):
    """Is told of every step."""

    def observe(self, step: Step) -> None:
        """Take what is needed; `k` is overwritten by the next step."""
