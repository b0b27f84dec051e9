"""Error norm, first step and step-size control, row by row. B rows, D state."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from skode._engine.kernel import Kernel
from skode._engine.solution import Tolerance


class Controller(Protocol):
    """Chooses every row's steps. All tensors of shape (A,), steps positive."""

    def first(
        self, kernel: Kernel, t: Tensor, y: Tensor, slope: Tensor, span: Tensor
    ) -> tuple[Tensor, int]:
        """Return the first step towards t + span, and the evaluations spent."""

    def decide(
        self, ratio: Tensor, step: Tensor, memory: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return whether to accept, the next step, and the next memory."""


def error_ratio(
    error: Tensor, y0: Tensor, y1: Tensor, rtol: float, atol: float
) -> Tensor:
    """RMS of the local error (A, D) in units of the tolerance; accept at <= 1.

    Overwrites `error`. Not finite where y1 is not.
    """
    scale = torch.maximum(y0.abs(), y1.abs()).mul_(rtol).add_(atol)
    norm = torch.linalg.vector_norm(error.div_(scale), dim=-1)
    return norm.mul_(1.0 / math.sqrt(error.shape[1]))


def _rms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1) / math.sqrt(x.shape[1])


@dataclass(frozen=True, slots=True)
class PIController:
    """Proportional-integral control (Hairer & Wanner 1996, IV.2).

    The next step is ``safety * ratio ** -(1/q - 0.75 beta) * previous ** beta`` times
    the last one, within the limits, q being the order of the error estimate plus one.
    """

    tolerance: Tolerance
    order: int
    """Of the method; the embedded one has `order - 1`."""
    beta: float = 0.04
    safety: float = 0.9
    shrink: float = 0.2
    grow: float = 10.0

    def first(
        self, kernel: Kernel, t: Tensor, y: Tensor, slope: Tensor, span: Tensor
    ) -> tuple[Tensor, int]:
        """Hairer's first step (Hairer, Norsett & Wanner 1993, II.4)."""
        scale = y.abs().mul_(self.tolerance.rtol).add_(self.tolerance.atol)
        d0, d1 = _rms(y / scale), _rms(slope / scale)
        h = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
        h = torch.minimum(h, span.abs().to(h.dtype))
        signed = torch.copysign(h, span.to(h.dtype))
        probe = torch.empty_like(y)
        # The probe's time is rounded in the dtype of the times, as every stage's is.
        times = (t + signed.to(t.dtype)).to(y.dtype)
        kernel.evaluate(0, times, torch.addcmul(y, signed[:, None], slope), probe)
        d2 = _rms(probe.sub_(slope).div_(scale)) / h
        steepest = torch.maximum(d1, d2)
        h1 = torch.where(
            steepest <= 1e-15,
            torch.clamp(h * 1e-3, min=1e-6),
            (0.01 / steepest) ** (1.0 / self.order),
        )
        first = torch.minimum(100 * h, h1)
        # A probe that leaves the domain of the field (NaN) asks for a small step.
        first = torch.where(torch.isfinite(first), first, 1e-6 * span.abs())
        return first.to(t.dtype), 1

    def decide(
        self, ratio: Tensor, step: Tensor, memory: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Accept where ratio <= 1; never grow a step that was refused."""
        accept = ratio <= 1.0
        ratio = ratio.nan_to_num(nan=torch.inf).clamp_min_(1e-10)
        factor = memory.pow(self.beta).mul_(self.safety)
        factor.mul_(ratio.pow(0.75 * self.beta - 1.0 / self.order))
        factor.clamp_(self.shrink, self.grow)
        factor = torch.where(accept, factor, factor.clamp(max=self.safety))
        memory = torch.where(accept, ratio.clamp(min=1e-4), memory)
        return accept, step * factor, memory
