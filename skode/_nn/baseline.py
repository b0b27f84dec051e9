"""Trend and seasons of a context: a regression that every context does for itself.

The latent ODE models what is left. B series, T rows, C channels, R terms.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_HARMONICS = 4
_RIDGE = 0.1
"""Penalty of slopes and harmonics, in units of one observation's information."""
_LEVEL_RIDGE = 1e-3


@dataclass(frozen=True, slots=True)
class Baseline:
    """Which terms there are.

    Parameters
    ----------
    trend : {"none", "level", "linear"}
        What is fitted to a context beside seasons.
    periods : tuple of float
        Lengths of the seasons, in the unit of the times.
    """

    trend: str = "none"
    periods: tuple[float, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing to fit."""
        return self.trend == "none" and not self.periods

    def terms(self, times: Tensor) -> Tensor:
        """Return the regressors (B, T, R) in float64."""
        t = times.double()
        columns = []
        if self.trend != "none":
            columns.append(torch.ones_like(t))
        if self.trend == "linear":
            columns.append(t)
        for period in self.periods:
            for k in range(1, _HARMONICS + 1):
                angle = (2 * math.pi * k / period) * t
                columns += [torch.sin(angle), torch.cos(angle)]
        return torch.stack(columns, dim=2)

    def fit(self, times: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Return the coefficients (B, R, C) of least squares with a small ridge."""
        terms, seen = self.terms(times), mask.double()
        gram = torch.einsum("btr,btc,bts->bcrs", terms, seen, terms)
        moment = torch.einsum("btr,btc->bcr", terms, seen * values.double())
        ridge = torch.full((terms.shape[2],), _RIDGE, dtype=torch.float64)
        if self.trend != "none":
            ridge[0] = _LEVEL_RIDGE
        system = gram + torch.diag(ridge.to(gram.device))
        return torch.linalg.solve(system, moment[..., None])[..., 0].transpose(1, 2)

    def at(self, times: Tensor, coefficients: Tensor) -> Tensor:
        """Return values (B, T, C) in the dtype of the times."""
        return (self.terms(times) @ coefficients).to(times.dtype)
