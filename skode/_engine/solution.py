"""What a solve returns. B rows, T times, D state."""

import math
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from skode.exceptions import SolverError


class Status(IntEnum):
    """How the solve of a row ended."""

    SUCCESS = 0
    MAX_STEPS = 1
    STEP_UNDERFLOW = 2
    NON_FINITE = 3
    PARTED = 4


_REASON = {
    Status.MAX_STEPS: "reached max_steps={max_steps}",
    Status.STEP_UNDERFLOW: "needed steps below the resolution of time",
    Status.NON_FINITE: "met values that are not finite",
    Status.PARTED: "were solved unstably: the reversible scheme's two states parted",
}

_REMEDY = {
    Status.MAX_STEPS: (
        "Raise max_steps, loosen rtol and atol (now {rtol:g} and {atol:g}), or, if "
        "the field is stiff, take an implicit solver such as 'Radau'."
    ),
    Status.STEP_UNDERFLOW: (
        "The field is stiff, discontinuous or blows up there: loosen rtol and atol "
        "(now {rtol:g} and {atol:g}), or compute in float64 if you do not yet."
    ),
    Status.NON_FINITE: (
        "The state grows without bound, or the field returns NaN or infinity there: "
        "look at these rows and at the field."
    ),
    Status.PARTED: (
        "Take gradient='checkpoint': where a field contracts strongly, or over a long "
        "span, gradient='reversible' is not stable. If that is not the case, take "
        "shorter steps: tighten rtol and atol, or step_size."
    ),
}
_FIXED_STEPS = "Raise max_steps, or take longer steps: step_size is {step_size:g}."


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How accurately, and how long, to step."""

    rtol: float
    atol: float
    step_size: float | None
    max_steps: int
    first_step: float | None = None
    """Of adaptive methods; None: chosen from the field."""
    parts: tuple[int, ...] = ()
    """Sizes of parts of the state whose errors are judged apart; the largest counts."""

    def __post_init__(self) -> None:
        """Refuse tolerances that no solve could meet."""
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a number >= 0, got {value!r}.")
        if self.rtol + self.atol == 0:
            raise ValueError("rtol and atol must not both be 0.")
        if self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {self.max_steps!r}.")
        for name in ("step_size", "first_step"):
            size = getattr(self, name)
            if size is not None and not (math.isfinite(size) and size > 0):
                raise ValueError(f"{name} must be a number > 0, got {size!r}.")


@dataclass(frozen=True, slots=True)
class Statistics:
    """What the solve of each row took; all of shape (B,)."""

    status: Tensor
    """Values of `Status`, int8."""
    t: Tensor
    """Time reached."""
    n_accepted: Tensor
    n_rejected: Tensor
    nfe: Tensor
    """Evaluations of the field."""

    def columns(self) -> tuple[Tensor, ...]:
        """Return all of them, as the constructor takes them."""
        return self.status, self.t, self.n_accepted, self.n_rejected, self.nfe

    def shown(self, y1: Tensor) -> Tensor:
        """Return the last states (B, D), NaN in rows that failed."""
        return y1.masked_fill((self.status != Status.SUCCESS)[:, None], float("nan"))


def finite_rows(y: Tensor) -> Tensor:
    """Return which rows of y (A, D) are finite; cheaper than `isfinite`."""
    return (y * 0).sum(dim=1) == 0


@dataclass(frozen=True, slots=True)
class Solution:
    """States at the requested times, and how each row got there."""

    ys: Tensor
    """(B, T, D); NaN at times that a row did not reach."""
    stats: Statistics
    tolerance: Tolerance
    fixed_step: bool = False

    @property
    def y1(self) -> Tensor:
        """States at the last time, (B, D)."""
        return self.ys[:, -1]

    def require_success(self) -> "Solution":
        """Return self, or raise `SolverError` if a row did not reach its end."""
        failed = self.stats.status != Status.SUCCESS
        if not bool(failed.any()):  # host sync, once per solve
            return self
        worst = Status(int(self.stats.status.max()))
        rows = torch.nonzero(self.stats.status == worst)[:, 0]
        settings = {
            "rtol": self.tolerance.rtol,
            "atol": self.tolerance.atol,
            "max_steps": self.tolerance.max_steps,
            "step_size": self.tolerance.step_size,
        }
        remedy = _REMEDY[worst]
        if self.fixed_step and worst == Status.MAX_STEPS:
            remedy = _FIXED_STEPS
        raise SolverError(
            _REASON[worst].format(**settings),
            rows=rows.tolist(),
            n_rows=len(failed),
            t=self.stats.t[rows].tolist(),
            remedy=remedy.format(**settings),
            status=worst.name,
        )
