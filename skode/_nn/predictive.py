"""Predictive distributions: mixtures of normals, one for each path drawn.

B series, K samples, Q queries, C channels, L levels.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_BISECTIONS = 50
_REACH = 9.0
"""Standard deviations beyond which no quantile is looked for."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """Normals of equal weight."""

    means: Tensor
    """(B, K, Q, C)."""
    stds: Tensor
    """(B, K, Q, C)."""

    def widened(self, factor: Tensor | float) -> "Mixture":
        """Return the mixture, stretched around its mean."""
        mean = self.means.mean(dim=1, keepdim=True)
        return Mixture(mean + factor * (self.means - mean), factor * self.stds)

    def mean(self) -> Tensor:
        """Return (B, Q, C)."""
        return self.means.mean(dim=1)

    def std(self) -> Tensor:
        """Return (B, Q, C)."""
        within = self.stds.square().mean(dim=1)
        return (within + self.means.var(dim=1, correction=0)).sqrt()

    def log_density(self, values: Tensor) -> Tensor:
        """Return log-densities of values (B, Q, C)."""
        return self._mixed(self._of_each(values))

    def log_density_of_rows(self, values: Tensor, mask: Tensor) -> Tensor:
        """Return log-densities of all values of a row that are in `mask`, (B, Q, 1).

        Given the path they are independent, so that a row has one path.
        """
        log = self._of_each(values) * mask[:, None]
        return self._mixed(log.sum(dim=3, keepdim=True))

    def _of_each(self, values: Tensor) -> Tensor:
        """Return log-densities of values by normal, (B, K, Q, C)."""
        standard = (values[:, None] - self.means) / self.stds
        return -0.5 * standard**2 - self.stds.log() - 0.5 * math.log(2 * math.pi)

    def _mixed(self, log: Tensor) -> Tensor:
        return torch.logsumexp(log, dim=1) - math.log(self.means.shape[1])

    def quantile(self, level: float) -> Tensor:
        """Return quantiles (B, Q, C), by bisection."""
        low = (self.means - _REACH * self.stds).amin(dim=1)
        high = (self.means + _REACH * self.stds).amax(dim=1)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            below = (middle[:, None] - self.means) / self.stds
            under = torch.special.ndtr(below).mean(dim=1) < level
            low = torch.where(under, middle, low)
            high = torch.where(under, high, middle)
        return (low + high) / 2
