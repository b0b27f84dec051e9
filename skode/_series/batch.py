"""Series of different lengths as tensors.

B series, T rows at most, C channels, P covariates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from skode._series.history import History


@dataclass(frozen=True, eq=False)
class Batch:
    """Series padded on the right, where their last time is repeated."""

    times: Tensor
    """(B, T) seconds, or numbers, since each series' origin; never decreasing."""
    values: Tensor
    """(B, T, C), 0 where not observed."""
    mask: Tensor
    """(B, T, C) bool: observed."""
    present: Tensor
    """(B, T) bool: there is such a row."""
    covariates: Tensor
    """(B, T, P); of padding, the last row's."""

    def take(self, series: Tensor | slice) -> "Batch":
        """Return some of the series."""
        return Batch(
            self.times[series],
            self.values[series],
            self.mask[series],
            self.present[series],
            self.covariates[series],
        )

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Batch":
        """Return the batch on a device, its numbers in a dtype; None: as they are."""
        return Batch(
            self.times.to(device=device, dtype=dtype),
            self.values.to(device=device, dtype=dtype),
            self.mask.to(device=device),
            self.present.to(device=device),
            self.covariates.to(device=device, dtype=dtype),
        )


def pad(
    histories: Sequence[History],
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Batch:
    """Return tensors of so many series; T is the longest's length, and 1 at least.

    Each series' times count from its own origin (`History.counted_from` sets another).
    """
    lengths = np.array([len(history) for history in histories])
    starts = np.cumsum(lengths) - lengths
    step = np.arange(max(1, lengths.max(initial=0)))
    present = step < lengths[:, None]
    # A series without rows reads a row of zeros that stands behind all others.
    row = np.where(
        lengths[:, None] > 0,
        starts[:, None] + np.minimum(step, lengths[:, None] - 1),
        lengths.sum(),
    )
    times, values, covariates = (
        _with_zero_row(parts)[row]
        for parts in (
            [history.times for history in histories],
            [history.values for history in histories],
            [history.covariates for history in histories],
        )
    )
    mask = present[:, :, None] & ~np.isnan(values)
    return Batch(
        torch.tensor(times, dtype=dtype, device=device),
        torch.tensor(np.where(mask, values, 0.0), dtype=dtype, device=device),
        torch.tensor(mask, device=device),
        torch.tensor(present, device=device),
        torch.tensor(covariates, dtype=dtype, device=device),
    )


def _with_zero_row(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([*parts, np.zeros((1, *parts[0].shape[1:]))])
