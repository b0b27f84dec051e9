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
_SHARE = 0.9
"""Share of the errors' variance that persists."""
_PERSISTENCE = 0.5
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
        """Return the coefficients (B, R, C) of generalised least squares, with a ridge.

        Errors are taken to persist for about half of the context: where a record ends
        above its trend, that says little of where the trend goes. Regressors and values
        become uncorrelated by the filter of such errors.
        """
        terms = self.terms(times).transpose(1, 2)[:, :, :, None]  # (B, R, T, 1)
        columns = torch.cat(
            (
                terms.expand(-1, -1, -1, values.shape[2]),
                values.double()[:, None],
            ),
            dim=1,
        )
        span = _span(times.double(), mask)
        known = ou_filter(
            torch.exp(-_gaps(times.double()) / (_PERSISTENCE * span)),
            mask,
            columns * mask[:, None],
            variance=torch.full_like(values[0, 0], _SHARE, dtype=torch.float64),
            white=torch.full_like(values[0, 0], 1 - _SHARE, dtype=torch.float64),
        )
        spread = (known.variance + (1 - _SHARE)).sqrt()[:, None]
        white = (columns - known.mean) / spread * mask[:, None]
        terms, seen = white[:, :-1], white[:, -1:]
        gram = torch.einsum("brtc,bstc->bcrs", terms, terms)
        moment = torch.einsum("brtc,bstc->bcr", terms, seen)
        ridge = torch.full((terms.shape[1],), _RIDGE, dtype=torch.float64)
        if self.trend != "none":
            ridge[0] = _LEVEL_RIDGE
        system = gram + torch.diag(ridge.to(gram.device))
        return torch.linalg.solve(system, moment[..., None])[..., 0].transpose(1, 2)

    def at(self, times: Tensor, coefficients: Tensor) -> Tensor:
        """Return values (B, T, C) in the dtype of the times."""
        return (self.terms(times) @ coefficients).to(times.dtype)


def _gaps(times: Tensor) -> Tensor:
    return torch.diff(times, dim=1, prepend=times[:, :1])[:, :, None]


def _span(times: Tensor, mask: Tensor) -> Tensor:
    """Return the time over which a context has observations, (B, 1, 1)."""
    seen = mask.any(dim=2)
    low = times.masked_fill(~seen, math.inf).amin(dim=1)
    high = times.masked_fill(~seen, -math.inf).amax(dim=1)
    span = torch.where(seen.any(dim=1), high - low, 1.0)
    return span.clamp_min(1e-9)[:, None, None]
