"""Error norm, first step and step-size control, row by row. A rows, D state."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from skode._engine.kernel import Evaluator
from skode._engine.solution import Tolerance


class Controller(Protocol):
    """Chooses every row's steps. All tensors of shape (A,), steps positive."""

    def first(
        self, kernel: Evaluator, t: Tensor, y: Tensor, slope: Tensor, span: Tensor
    ) -> tuple[Tensor, int]:
        """Return the first step towards t + span, and the evaluations spent."""

    def decide(
        self, ratio: Tensor, step: Tensor, memory: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return whether to accept, the next step, and the next memory."""


@dataclass(frozen=True, slots=True)
class ErrorNorm:
    """RMS over the state, in units of the tolerance: accept a step at <= 1.

    Of a state in parts, the largest of the parts' RMS.
    """

    rtol: float
    atol: Tensor
    """Zero-dimensional; both times sqrt(D) where the state is one part."""
    parts: tuple[int, ...]

    @classmethod
    def of(cls, tolerance: Tolerance, y: Tensor) -> "ErrorNorm":
        """Return the norm of errors of states like y (A, D)."""
        root = 1.0 if tolerance.parts else math.sqrt(y.shape[1])
        # Where atol is nothing in this dtype, 0 / 0 must still be 0.
        atol = max(tolerance.atol * root, torch.finfo(y.dtype).tiny)
        return cls(tolerance.rtol * root, y.new_full((), atol), tolerance.parts)

    def scale(self, size: Tensor) -> Tensor:
        """Return atol + rtol * size, (A, D), for sizes of states; in place."""
        return torch.add(self.atol, size, alpha=self.rtol, out=size)

    def length(self, scaled: Tensor) -> Tensor:
        """Return the norm (A,) of what was divided by `scale`, (A, D)."""
        if not self.parts:
            return _length(scaled)
        lengths = [
            _length(part) / math.sqrt(size)
            for part, size in zip(
                scaled.split(self.parts, dim=1), self.parts, strict=True
            )
        ]
        return torch.stack(lengths).amax(dim=0)

    def ratio(self, error: Tensor, y0: Tensor, y1: Tensor) -> Tensor:
        """Return the norm (A,) of the local error of a step from y0 to y1 (A, D).

        Overwrites `error`. Not finite where the error is not.
        """
        scale = self.scale(torch.maximum(y0.abs(), y1.abs()))
        return self.length(error.div_(scale))


def _length(x: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x, dim=-1)
    return length


@dataclass(frozen=True, slots=True)
class PIController:
    """Proportional-integral control (Hairer & Wanner 1996, IV.2).

    The next step is ``safety * ratio ** -(1/q - 0.75 beta) * previous ** beta`` times
    the last one, within the limits, q being the order of the error estimate plus one.
    """

    norm: ErrorNorm
    order: int
    """Of the method; the embedded one has `order - 1`."""
    error_constant: float
    """Of the error estimate: see `Tableau.error_constant`."""
    noise: float
    """A ratio that rounding alone can reach; steps do not follow what is below."""
    first_step: float | None
    beta: float = 0.04
    safety: float = 0.9
    shrink: float = 0.2
    grow: float = 10.0

    @classmethod
    def of(
        cls, tolerance: Tolerance, y: Tensor, order: int, error_constant: float
    ) -> "PIController":
        """Return the controller of a solve from states like y (A, D)."""
        finest = max(tolerance.rtol, tolerance.atol)
        noise = min(1e-2, 16 * torch.finfo(y.dtype).eps / finest)
        return cls(
            norm=ErrorNorm.of(tolerance, y),
            order=order,
            error_constant=error_constant,
            noise=noise,
            first_step=tolerance.first_step,
        )

    def first(
        self, kernel: Evaluator, t: Tensor, y: Tensor, slope: Tensor, span: Tensor
    ) -> tuple[Tensor, int]:
        """Hairer's first step (Hairer, Norsett & Wanner 1993, II.4), in other units.

        His probe, a hundredth of the way to a state as large again, tells the rate r
        at which the slope changes; we take it to be at least one per span. The step
        errs as every step is meant to, by safety^q of the tolerance, where y' = r y: by
        e h |y'| (r h)^(q - 1), e being the method's error constant, which he leaves
        out, as he leaves out the unit of time.
        """
        if self.first_step is not None:
            return torch.full_like(t, self.first_step), 0
        near = span.abs().to(y.dtype).clamp_min_(torch.finfo(y.dtype).tiny)
        scale = self.norm.scale(y.abs())
        length = self.norm.length
        size, speed = length(y / scale), length(slope / scale).clamp_min_(1e-30)
        probe = torch.minimum(size.add_(1.0).div_(speed).mul_(0.01), near)
        signed = torch.copysign(probe, span.to(y.dtype))
        # The probe's time is rounded in the dtype of the times, as every stage's is.
        kernel.begin((t + signed.to(t.dtype)).to(y.dtype)[None])
        there = torch.empty_like(y)
        kernel.evaluate(0, torch.addcmul(y, signed[:, None], slope), there)
        change = length(there.sub_(slope).div_(scale)).div_(probe)
        wavelength = torch.minimum(speed / change, near)
        # h^q = safety^q / (e |y'| r^(q - 1)), r being 1 / wavelength.
        first = (speed * wavelength).pow_(-1.0 / self.order).mul_(wavelength)
        first.mul_(self.safety / self.error_constant ** (1.0 / self.order))
        # A probe that leaves the domain of the field (NaN) asks for a small step.
        first = torch.fmax(first, near.mul_(1e-6))
        return first.to(t.dtype), 1

    def decide(
        self, ratio: Tensor, step: Tensor, memory: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Accept where ratio <= 1; a step that was refused shrinks."""
        accept = ratio <= 1.0
        ratio = ratio.nan_to_num(nan=torch.inf, posinf=torch.inf).clamp_min_(self.noise)
        # Memories are at most 1, so that the factor is below 1 wherever ratio > 1.
        factor = memory.pow(self.beta).mul_(self.safety)
        factor.mul_(ratio.pow(0.75 * self.beta - 1.0 / self.order))
        factor.clamp_(self.shrink, self.grow)
        return accept, step * factor.to(step.dtype), ratio.clamp_(1e-4, 1.0)
