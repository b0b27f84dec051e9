"""The series that a forecaster learns from, and those that it is watched on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real

import numpy as np
import pandas as pd
import torch

from skode._nn.backtest import choose, spans, subsets
from skode._nn.baseline import SHARES, Baseline
from skode._nn.latent_training import Cutter, Piece, ahead, halves
from skode._parameters import hold_out, holds_out
from skode._series.batch import Batch
from skode._series.history import History
from skode._units import Units, measure

__all__ = ["Panel", "Windows", "learns_a_path", "pieces_of", "windows_of"]

_FEW_SERIES = 20
"""Fewer than these are cut into windows."""
_LEAST_WATCHED = 50
"""Series from which on some are held out."""
_LEAST_ROWS = 60
"""Rows of a long record from which on its end is held out."""
_HORIZON = 0.25
"""Share of a long record that forecasts reach, where the user does not say."""
_MOST_ROWS = 192
"""Rows of a training piece."""
_LEAST_DISJOINT = 8
"""Pieces that do not overlap, from which on a path is learned beside a baseline."""
_READ = 128
"""Rows that a context spans typically, where only the path forecasts."""
_DAY = 86400.0
_CALENDAR = (_DAY, 7 * _DAY, 365.2425 * _DAY)
_TURNS = 2
"""How often a season must come round in a record to be looked for."""


@dataclass(frozen=True, eq=False)
class Windows:
    """What one forecast of a long record looks at; times in the user's units."""

    context: float | None
    """Span of what a forecast is conditioned on; None: all there is."""
    horizon: float | None
    """How far training pieces reach beyond; None: to the end of the series, which is
    so wherever contexts have no span."""
    trend: str
    periods: tuple[float, ...]
    share: float = SHARES[0]
    """Of the errors of trend and seasons, the share that persists."""

    def disjoint(self, histories: Sequence[History]) -> float:
        """Return into how many pieces the records fall that do not overlap."""
        spans = [float(h.times[-1] - h.times[0]) for h in histories]
        return sum(max(1.0, span / self.piece) for span in spans)

    @property
    def piece(self) -> float:
        """Span of a training piece."""
        if self.context is None or self.horizon is None:
            return float("inf")
        return self.context + self.horizon

    def baseline(self, unit: float) -> Baseline:
        """Return trend and seasons in units of time."""
        periods = tuple(period / unit for period in self.periods)
        return Baseline(self.trend, periods, self.share)


def seconds(value: object, clock_is_seconds: bool, name: str) -> float | None:
    """Return a span of time as a float in the units of X's times.

    Raises
    ------
    ValueError
        If it is no span of time above 0, or a number where X has stamps.
    """
    if value is None:
        return None
    if isinstance(value, Real) and not isinstance(value, bool):
        span = float(value)
        if clock_is_seconds:
            raise ValueError(
                f"{name}={value!r} is a number, but X has stamps or time differences: "
                "give a span such as '7D' or pd.Timedelta(days=7)."
            )
    else:
        if not clock_is_seconds:
            raise ValueError(
                f"{name}={value!r} must be a number, in the units of X's times."
            )
        try:
            span = pd.Timedelta(value).total_seconds()
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name}={value!r} is no span of time: {error}") from error
    if not 0 < span < float("inf"):
        raise ValueError(f"{name} must be a span above 0, got {value!r}.")
    return span


def learns_a_path(est, histories: Sequence[History], windows: Windows) -> bool:
    """Return whether a latent path is learned beside trend and seasons.

    From a few pieces, a net learns by heart how each went on, and forecasts worse, with
    narrower intervals, than trend and seasons alone do.
    """
    if est.path != "auto":
        return est.path
    needed = est.event_times is not None or any(h.covariates.size for h in histories)
    alone = windows.trend == "linear" or windows.periods
    few = windows.disjoint(histories) < _LEAST_DISJOINT
    return needed or not (alone and few)


def windows_of(est, histories: Sequence[History], in_seconds: bool) -> Windows:
    """Return how records are cut, from the parameters and from what forecasts them.

    Raises
    ------
    ValueError
        If a span is none, or there shall be no path where one is needed.
    """
    if est.path is False and est.event_times is not None:
        raise ValueError(
            f"event_times={est.event_times!r} needs a path, which the intensity is "
            "read off: set path='auto', or event_times=None."
        )
    context = seconds(est.context, in_seconds, "context")
    horizon = seconds(est.horizon, in_seconds, "horizon")
    named = est.seasonality is None or isinstance(est.seasonality, str)
    given = () if named else est.seasonality
    given = tuple(seconds(period, in_seconds, "seasonality") for period in given)
    few = len(histories) < _FEW_SERIES
    simplest = "none" if est.path is not False else "level"
    trends = {
        None: (simplest,),
        "auto": (simplest, "level", "linear") if few else (simplest,),
    }.get(est.trend, (est.trend,))
    record = float(np.median([h.times[-1] - h.times[0] for h in histories]))
    if not record > 0:
        # No time passes in most series, and pieces reach as far as contexts.
        return Windows(context, horizon or context, trends[0], given)
    seasons = [given]
    if named and est.seasonality:
        seasons = subsets(_calendar(histories, record) if few and in_seconds else ())
    if not few and context is None and len(trends) * len(seasons) == 1:
        return Windows(None, horizon, trends[0], seasons[0])
    contexts = [context] if context else spans(record)
    reach = horizon or min(_HORIZON * record, max(contexts))
    units = measure(histories, True, record)
    batch = units.batch(histories, torch.device("cpu"), torch.float64)
    found = choose(
        batch,
        reach / record,
        [span / record for span in contexts],
        trends,
        [tuple(period / record for period in some) for some in seasons],
    )
    baseline, span = found.baseline, found.context * record
    if baseline.trend != "linear" and not baseline.periods and context is None:
        # The path says it all: it needs many pieces rather than long ones.
        span = min(span, _READ * _typical_gap(histories))
        reach = horizon or min(reach, span / 2)
    periods = tuple(period * record for period in baseline.periods)
    return Windows(span, reach, baseline.trend, periods, baseline.share)


def _typical_gap(histories: Sequence[History]) -> float:
    """Return the median time between rows, of those that follow another."""
    gaps = np.concatenate([np.diff(h.times) for h in histories])
    return float(np.median(gaps))


def _calendar(histories: Sequence[History], record: float) -> list[float]:
    """Return the day, week and year where the record could show them."""
    typical = _typical_gap(histories)
    return [p for p in _CALENDAR if 3 * typical < p < record / _TURNS]


@dataclass(frozen=True, eq=False)
class Panel:
    """What cuts training series, and pieces of what was held out."""

    cutter: Cutter
    watched: list[Piece]


def pieces_of(
    est,
    histories: Sequence[History],
    units: Units,
    windows: Windows,
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> Panel:
    """Return what to train on.

    Of many series some are held out; of few long ones, their ends.
    """

    def panel(some: Sequence[History]) -> Batch:
        # Pieces may be a small part of a record: where they begin, float32 is coarse.
        exact = units.batch(some, device, torch.float64)
        return replace(exact.to(dtype=dtype), times=exact.times)

    window = windows.piece / units.time
    watched: list[Piece] = []
    seed = int(torch.randint(2**31 - 1, (), generator=generator))
    if len(histories) >= _FEW_SERIES:
        kept = list(range(len(histories)))
        if holds_out(est.early_stopping, len(histories), _LEAST_WATCHED):
            kept, held = hold_out(est, len(histories), seed, what="series")
            watched = halves(panel([histories[i] for i in held]), window)
        training = panel([histories[i] for i in kept])
    else:
        training = panel(histories)
        if holds_out(est.early_stopping, max(map(len, histories)), _LEAST_ROWS):
            end = _HORIZON * float(training.times.max())
            if windows.horizon is not None:
                end = min(end, windows.horizon / units.time)
            context = float("inf")
            if windows.context is not None:
                context = windows.context / units.time
            training, watched = ahead(training, end, est.validation_fraction, context)
    # A score of nothing would call the first epoch the best.
    watched = [piece for piece in watched if bool(piece.asked.any())]
    return Panel(Cutter(training, window, _MOST_ROWS, generator), watched)
