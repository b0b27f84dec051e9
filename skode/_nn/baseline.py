"""Trend and seasons of a context: a regression that every context does for itself.

The latent ODE models what is left. B series, T rows, C channels, R terms.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from skode._nn.residual import ou_filter

_HARMONICS = 4
_RIDGE = 1e-3
"""Penalty of slopes and harmonics, in units of one observation's information."""
_LEVEL_RIDGE = 1e-5
SHARES = (0.9, 0.6, 0.3, 0.1, 0.02)
"""Shares of the errors' variance that may persist."""
_SMALLEST_SCALE = 1e-4
PERSISTENCE = 0.25
"""Correlation time of errors, in spans of the context."""


@dataclass(frozen=True, slots=True)
class Baseline:
    """Which terms there are.

    Parameters
    ----------
    trend : {"none", "level", "linear"}
        What is fitted to a context beside seasons.
    periods : tuple of float
        Lengths of the seasons, in the unit of the times.
    share : float
        Share of the errors' variance that persists, for a quarter of the context.
    """

    trend: str = "none"
    periods: tuple[float, ...] = ()
    share: float = SHARES[0]

    @property
    def empty(self) -> bool:
        """Whether there is nothing to fit."""
        return self.trend == "none" and not self.periods

    @property
    def n_terms(self) -> int:
        """How many coefficients each channel has."""
        trend = {"none": 0, "level": 1, "linear": 2}[self.trend]
        return trend + 2 * _HARMONICS * len(self.periods)

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

    def fit(self, times: Tensor, values: Tensor, mask: Tensor) -> "Regression":
        """Return what the rows say of the coefficients.

        By generalised least squares: a `share` of the errors is taken to persist. That
        a record ends above its trend then says little of where the trend
        goes, and a trend is as uncertain as it should be.
        """
        terms = self.terms(times).transpose(1, 2)[:, :, :, None]  # (B, R, T, 1)
        every = (terms.expand(-1, -1, -1, values.shape[2]), values.double()[:, None])
        columns = torch.cat(every, dim=1) * mask[:, None]
        ones = torch.ones_like(values[0, 0], dtype=torch.float64)
        # Kalman's filter turns such errors into independent ones.
        known = ou_filter(
            torch.exp(-_gaps(times.double()) / (PERSISTENCE * _span(times, mask))),
            mask,
            columns,
            variance=self.share * ones,
            white=(1 - self.share) * ones,
        )
        spread = (known.variance + (1 - self.share)).sqrt()[:, None]
        columns = (columns - known.mean) / spread * mask[:, None]
        x, y = columns[:, :-1], columns[:, -1]
        ridge = torch.full((terms.shape[1],), _RIDGE, dtype=torch.float64)
        if self.trend != "none":
            ridge[0] = _LEVEL_RIDGE
        precision = torch.einsum("brtc,bstc->bcrs", x, x)
        precision = precision + torch.diag(ridge.to(precision.device))
        moment = torch.einsum("brtc,btc->bcr", x, y)
        mean = torch.linalg.solve(precision, moment[..., None])[..., 0]
        error = (y - torch.einsum("brtc,bcr->btc", x, mean)) ** 2
        free = (mask.sum(dim=1) - terms.shape[1]).clamp_min(1)
        scale = (error.sum(dim=1) / free).sqrt().clamp_min(_SMALLEST_SCALE)
        likelihood = -(scale.log()[:, None] + spread[:, 0].log()) * mask
        return Regression(
            mean, torch.linalg.cholesky(precision), scale, likelihood.sum(dim=1)
        )

    def at(self, times: Tensor, coefficients: Tensor) -> Tensor:
        """Return (B, ..., T, C) in the dtype of the times, of (B, ..., C, R)."""
        terms = self.terms(times)
        terms = terms.view(
            len(terms), *(1,) * (coefficients.ndim - 3), *terms.shape[1:]
        )
        return (terms @ coefficients.transpose(-1, -2)).to(times.dtype)


@dataclass(frozen=True, slots=True)
class Regression:
    """Normals over the coefficients of each context and channel."""

    mean: Tensor
    """(B, C, R)."""
    factor: Tensor
    """(B, C, R, R) lower: that of the precision, for errors of variance 1."""
    scale: Tensor
    """(B, C) standard deviation of the errors."""
    log_likelihood: Tensor
    """(B, C) of the errors, at their scale, up to a constant."""

    def draw(self, noise: Tensor) -> Tensor:
        """Return coefficients (B, K, C, R) of standard normal noise (B, K, C, R)."""
        noise = noise.double()[..., None]
        away = torch.linalg.solve_triangular(
            self.factor.transpose(-1, -2)[:, None], noise, upper=True
        )
        spread: Tensor = self.scale[:, None, :, None] * away[..., 0]
        return self.mean[:, None] + spread


def _gaps(times: Tensor) -> Tensor:
    return torch.diff(times, dim=1, prepend=times[:, :1])[:, :, None]


def _span(times: Tensor, mask: Tensor) -> Tensor:
    """Return the time over which a context has observations, (B, 1, 1)."""
    times = times.double()
    seen = mask.any(dim=2)
    low = times.masked_fill(~seen, math.inf).amin(dim=1)
    high = times.masked_fill(~seen, -math.inf).amax(dim=1)
    span = torch.where(seen.any(dim=1), high - low, 1.0)
    return span.clamp_min(1e-9)[:, None, None]
