"""Which baseline, and how long a context, forecasts long records best.

B series, T rows, C channels.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations

import torch
from torch import Tensor

from skode._nn.baseline import SHARES, Baseline
from skode._nn.latent import chosen
from skode._series.batch import Batch

__all__ = ["Window", "choose"]

_CONTEXTS = (0.5, 0.25, 0.125)
"""Shares of the record that a context may span."""
_ORIGINS = 6
_BETTER = 0.97
"""A baseline with more terms must bring the squared error below that share."""
_MOST_ROWS = 3000


@dataclass(frozen=True, slots=True)
class Window:
    """What was chosen."""

    baseline: Baseline
    context: float
    """Time that a context spans."""


def choose(
    series: Batch,
    horizon: float,
    contexts: Sequence[float],
    trends: Sequence[str],
    seasons: Iterable[tuple[float, ...]],
) -> Window:
    """Return the window of least squared error over forecasts within the record.

    Parameters
    ----------
    series : Batch
        Long records, standardised.
    horizon : float
        How far forecasts reach.
    contexts : sequence of float
        Spans to choose from, the one to prefer first.
    trends, seasons : sequence
        Of what baselines may be made, simpler ones first.
    """
    batch = sparse(series)
    best, least = None, float("inf")
    for context in contexts:
        for periods in seasons:
            for trend in trends:
                window = Window(Baseline(trend, periods), context)
                error = _error(batch, window, horizon)
                if best is None or error < _BETTER * least:
                    best, least = window, error
    assert best is not None, "there is something to choose from"
    return best if best.baseline.empty else _with_errors(batch, best)


def _with_errors(batch: Batch, window: Window) -> Window:
    """Return the window with the share of its errors that likely persists."""
    begin, end = batch.times[:, :1], batch.times[:, -1:]
    likelihood = dict.fromkeys(SHARES, 0.0)
    for origin in range(_ORIGINS):
        now = end - origin / _ORIGINS * (end - begin - window.context).clamp_min(0)
        near = _between(batch, now - window.context, now)
        seen = (near.times <= now) & (near.times > now - window.context)
        if not bool(seen.any()):
            continue
        for share in SHARES:
            baseline = replace(window.baseline, share=share)
            found = baseline.fit(
                near.times - now, near.values, near.mask & seen[:, :, None]
            )
            likelihood[share] += float(found.log_likelihood.sum())
    share = max(likelihood, key=likelihood.__getitem__)
    return replace(window, baseline=replace(window.baseline, share=share))


def spans(record: float) -> list[float]:
    """Return the spans that contexts may have in so long a record."""
    return [share * record for share in _CONTEXTS]


def subsets(periods: Sequence[float]) -> list[tuple[float, ...]]:
    """Return all choices of some of the periods, smaller ones first."""
    sizes = range(len(periods) + 1)
    return list(chain.from_iterable(combinations(periods, n) for n in sizes))


def sparse(series: Batch) -> Batch:
    """Return the batch with some thousand rows at most, evenly chosen."""
    rows = series.times.shape[1]
    if rows <= _MOST_ROWS:
        return series
    index = torch.linspace(0, rows - 1, _MOST_ROWS, device=series.times.device)
    return chosen(series, index.long().expand(len(series.times), -1))


def _error(batch: Batch, window: Window, horizon: float) -> float:
    """Return the mean squared error over some origins, the same for all windows."""
    begin, end = batch.times[:, :1], batch.times[:, -1:]
    total, count = 0.0, 0.0
    for origin in range(1, _ORIGINS + 1):
        # The first origin has half of the record behind it where the horizon allows.
        earliest = torch.minimum((begin + end) / 2, (end - horizon + begin) / 2)
        now = earliest + (end - horizon - earliest) * origin / _ORIGINS
        near = _between(batch, now - window.context, now + horizon)
        known = near.times <= now
        seen = near.mask & (known & (near.times > now - window.context))[:, :, None]
        asked = ~known & (near.times <= now + horizon) & near.present
        wanted = near.mask & asked[:, :, None]
        # What no context has seen, no baseline is blamed for.
        wanted = wanted & seen.any(dim=1, keepdim=True)
        base = torch.zeros_like(near.values)
        if not window.baseline.empty and bool(wanted.any()):
            times = near.times - now
            found = window.baseline.fit(times, near.values, seen)
            base = window.baseline.at(times, found.mean)
        total += float(((near.values - base).square() * wanted).sum())
        count += float(wanted.sum())
    return total / max(count, 1.0)


def _between(batch: Batch, begin: Tensor, end: Tensor) -> Batch:
    """Return the rows that any series has between two times (B, 1), and some more."""
    rows = ((batch.times >= begin) & (batch.times <= end)).any(dim=0).nonzero()[:, 0]
    return chosen(batch, rows.expand(len(batch.times), -1))
