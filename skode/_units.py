"""The units that a latent ODE computes in. A service of `forecast`."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from skode._border import weighted_moments
from skode._series.batch import Batch, pad
from skode._series.history import History

__all__ = ["Units", "measure"]


@dataclass(frozen=True, eq=False)
class Units:
    """Origin and scale of values and covariates, and the unit of time.

    C channels, P covariates.
    """

    time: float
    """In seconds, or in the user's numbers: the span of a context."""
    mean: np.ndarray
    """(C,)"""
    std: np.ndarray
    """(C,)"""
    covariate_mean: np.ndarray
    """(P,)"""
    covariate_std: np.ndarray
    """(P,)"""

    def batch(
        self,
        histories: Sequence[History],
        device: torch.device,
        dtype: torch.dtype,
    ) -> Batch:
        """Return series as the model reads them.

        Raises
        ------
        ValueError
            If a time is too far from the series' first for the dtype.
        """
        raw = pad(histories)
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        values = torch.where(raw.mask, (raw.values - mean) / std, 0.0)
        covariates = raw.covariates - torch.tensor(self.covariate_mean)
        covariates = covariates / torch.tensor(self.covariate_std)
        times = raw.times / self.time
        if not bool((times.abs() <= torch.finfo(dtype).max).all()):
            raise ValueError(
                f"Times of X lie more than {torch.finfo(dtype).max:.0e} spans of the "
                f"context ({self.time:g}) from their series: there is no answer there."
            )
        scaled = Batch(times, values, raw.mask, raw.present, covariates)
        return scaled.to(device, dtype)

    def values(self, standard: np.ndarray) -> np.ndarray:
        """Return values (..., C) in the user's units."""
        return standard * self.std + self.mean


def measure(
    histories: Sequence[History],
    standardize: bool,
    time: float | None,
    otherwise: float = 1.0,
) -> Units:
    """Return the units of these series.

    Parameters
    ----------
    histories : sequence of History
        Training series.
    standardize : bool
        Whether values and covariates get mean 0 and standard deviation 1.
    time : float or None
        Unit of time; None: the median span of the series.
    otherwise : float, default=1.0
        Unit where no series spans any time.

    Raises
    ------
    ValueError
        If a variance overflows.
    """
    if time is None:
        lengths = [float(h.times[-1] - h.times[0]) for h in histories if len(h) > 1]
        lengths = [length for length in lengths if length > 0]
        time = float(np.median(lengths)) if lengths else otherwise
    values = np.concatenate([history.values for history in histories])
    covariates = np.concatenate([history.covariates for history in histories])
    if standardize:
        mean, std = _observed_moments(values)
        moments = weighted_moments(covariates, np.ones(len(covariates)))
        if not all(np.isfinite(part).all() for part in (mean, std, *moments)):
            raise ValueError(
                "Values of X or y are so large that their variance overflows: rescale "
                "them, or take logarithms."
            )
    else:
        mean, std = np.zeros(values.shape[1]), np.ones(values.shape[1])
        moments = np.zeros(covariates.shape[1]), np.ones(covariates.shape[1])
    return Units(time, mean, std, *moments)


def _observed_moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of what is not NaN; 0 and 1 of nothing."""
    mean, std = np.zeros(values.shape[1]), np.ones(values.shape[1])
    for channel, column in enumerate(values.T):
        seen = column[~np.isnan(column)][:, None]
        if len(seen):
            moments = weighted_moments(seen, np.ones(len(seen)))
            mean[channel], std[channel] = moments[0][0], moments[1][0]
    return mean, std
