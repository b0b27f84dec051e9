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
    norm = _norm(error.div_(scale))
    return norm.mul_(1.0 / math.sqrt(error.shape[1]))


def _norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1)
    return norm


@dataclass(frozen=True, slots=True)
class PIController:
    """Proportional-integral control (Hairer & Wanner 1996, IV.2).

    The next step is ``safety * ratio ** -(1/q - 0.75 beta) * previous ** beta`` times
    the last one, within the limits, q being the order of the error estimate plus one.
    """

    tolerance: Tolerance
    order: int
    """Of the method; the embedded one has `order - 1`."""
    error_constant: float
    """Of the error estimate: see `Tableau.error_constant`."""
    beta: float = 0.04
    safety: float = 0.9
    shrink: float = 0.2
    grow: float = 10.0

    def first(
        self, kernel: Kernel, t: Tensor, y: Tensor, slope: Tensor, span: Tensor
    ) -> tuple[Tensor, int]:
        """Hairer's first step (Hairer, Norsett & Wanner 1993, II.4), in other units.

        His probe tells the rate r at which the slope changes; we take it to be at
        least one per span. The step errs by a tenth of the tolerance where y' = r y:
        e h |y'| (r h)^(q - 1), e being the method's error constant, which he leaves
        out, as he leaves out the unit of time. Where nothing moves yet, it is his.
        """
        scale = y.abs().mul_(self.tolerance.rtol).add_(self.tolerance.atol)
        scale.mul_(math.sqrt(y.shape[1]))  # norms are root mean squares
        distance = span.abs().to(y.dtype)
        d0, d1 = _norm(y / scale), _norm(slope / scale)
        h = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
        h = torch.minimum(h, distance)
        signed = torch.copysign(h, span.to(h.dtype))
        probe = torch.empty_like(y)
        # The probe's time is rounded in the dtype of the times, as every stage's is.
        times = (t + signed.to(t.dtype)).to(y.dtype)
        kernel.evaluate(0, times, torch.addcmul(y, signed[:, None], slope), probe)
        d2 = _norm(probe.sub_(slope).div_(scale)) / h
        steepest = torch.maximum(d1, d2)
        root = 1.0 / self.order
        hairer = (0.01 / steepest).pow_(root)
        hairer = torch.where(steepest <= 1e-15, (h * 1e-3).clamp_(min=1e-6), hairer)
        wavelength = torch.minimum(d1 / d2, distance)
        ours = (0.1 / self.error_constant * wavelength / d1).pow_(root)
        ours.mul_(wavelength.pow(1.0 - 2.0 * root))
        first = torch.where(torch.isfinite(ours) & (ours > 0), ours, hairer)
        first = torch.minimum(100 * h, first)
        # A probe that leaves the domain of the field (NaN) asks for a small step.
        first = torch.where(torch.isfinite(first), first, 1e-6 * distance)
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
