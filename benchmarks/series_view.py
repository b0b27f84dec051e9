"""Tasks of `series_data.py` as arrays, and forecasts as the benchmark scores them.

Shapes: n observations of a series, N rows asked for, D channels, Q levels, S samples.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import logsumexp
from scipy.stats import norm
from series_data import Task

LEVELS = np.linspace(0.05, 0.95, 19)
CONTEXT = 260
"""Observations that a window of a single long series is conditioned on."""
FAR = 10.0
"""Normal scores from the outermost quantile to where a tail is cut into no more."""
NOISE_DRAWS = 10
"""Draws per component of a mixture when its quantiles are taken."""


@dataclass(frozen=True)
class Series:
    """Times (n,), in order, and values (n, D); NaN where not observed."""

    t: np.ndarray
    x: np.ndarray

    def __len__(self):
        return len(self.t)

    def __getitem__(self, rows):
        return Series(self.t[rows], self.x[rows])


def last_seen(series, channel, count=1):
    """Return times and values of the last observations of a channel."""
    seen = np.flatnonzero(~np.isnan(series.x[:, channel]))[-count:]
    return series.t[seen], series.x[seen, channel]


# --- Forecasts -----------------------------------------------------------------------


@dataclass(frozen=True)
class Forecast:
    """What a method says of every row and channel asked for, in a view's units."""

    mean: np.ndarray
    """(N, D)"""
    quantiles: np.ndarray
    """(N, D, Q) at `LEVELS`."""
    log_density: Callable[[np.ndarray], np.ndarray]
    """(N, D) values -> (N, D) nats."""


@dataclass(frozen=True)
class Fitted:
    """What somebody fitted, and what there is to say about the fit."""

    predict: Callable[[], Forecast]
    note: str = ""


def gaussian(mean, std):
    """Return the forecast of independent normals: (N, D) and (N, D)."""
    quantiles = mean[..., None] + std[..., None] * norm.ppf(LEVELS)
    return Forecast(mean, quantiles, lambda y: norm.logpdf(y, mean, std))


def mixture(means, stds, seed=0):
    """Return the forecast of equally weighted normals: (S, N, D) and (S, N, D)."""
    rng = np.random.default_rng(seed)
    draws = rng.standard_normal((NOISE_DRAWS, *means.shape), dtype=np.float32)
    draws = (means + stds * draws).reshape(-1, *means.shape[1:])
    quantiles = np.moveaxis(np.quantile(draws, LEVELS, axis=0), 0, -1)

    def log_density(y):
        terms = norm.logpdf(y, means, stds)
        return logsumexp(terms, axis=0) - np.log(len(means))

    return Forecast(means.mean(axis=0), quantiles, log_density)


def by_quantiles(mean, levels, values, narrow=0.02):
    """Return the forecast whose quantiles at `levels` are `values` (N, D, K).

    Between levels the quantile is linear in the standard normal's, and beyond them it
    goes on as steeply as from the first to the last: tails are normal, and the density
    is known. `narrow` is the least rise per unit of normal score, so that quantiles
    that coincide have a density.
    """
    z = norm.ppf(levels)
    values = np.sort(values, axis=-1)
    steps = np.maximum(np.diff(values, axis=-1), narrow * np.diff(z))
    ends = steps.sum(axis=-1, keepdims=True) / (z[-1] - z[0]) * FAR
    steps = np.concatenate([ends, steps, ends], axis=-1)
    z = np.concatenate([[z[0] - FAR], z, [z[-1] + FAR]])
    start = values[..., :1] - ends
    values = np.concatenate([start, start + np.cumsum(steps, axis=-1)], axis=-1)
    slopes = steps / np.diff(z)  # (N, D, K + 1)

    def piece(at, knots):
        inner = knots[..., 1:-1]
        return (at[..., None] > inner).sum(axis=-1, keepdims=True)

    def take(array, k):
        return np.take_along_axis(array, k, axis=-1)[..., 0]

    def log_density(y):
        k = piece(y, values)
        slope = take(slopes, k)
        score = z[k[..., 0]] + (y - take(values, k)) / slope
        return norm.logpdf(score) - np.log(slope)

    asked = norm.ppf(LEVELS)
    k = np.clip(np.searchsorted(z, asked) - 1, 0, len(z) - 2)  # (Q,)
    quantiles = values[..., k] + slopes[..., k] * (asked - z[k])
    return Forecast(mean, quantiles, log_density)


def check():
    """Raise unless forecasts of the same normals agree, and a density has mass one."""
    rng = np.random.default_rng(0)
    mean, std = rng.normal(size=(2, 50, 2))
    std = np.exp(std)
    y = mean + 3 * std * rng.normal(size=mean.shape)
    plain = gaussian(mean, std)
    few = np.array([0.05, 0.25, 0.5, 0.75, 0.95])
    cuts = mean[..., None] + std[..., None] * norm.ppf(few)
    twins = {
        "quantiles": (by_quantiles(mean, few, cuts), 1e-9),
        "mixture": (mixture(np.stack([mean] * 400), np.stack([std] * 400)), 0.2),
    }
    for name, (twin, loose) in twins.items():
        off = np.abs(twin.log_density(y) - plain.log_density(y)).max()
        assert off < 1e-9, (name, off)
        off = np.abs((twin.quantiles - plain.quantiles) / std[..., None]).max()
        assert off < loose, (name, off)
    grid = np.linspace(-40, 40, 800_001)
    cuts = np.broadcast_to([-1.0, -0.9, 0.0, 2.0, 2.0], (len(grid), 1, 5))
    skewed = by_quantiles(np.zeros((len(grid), 1)), few, cuts)
    mass = np.exp(skewed.log_density(grid[:, None])).sum() * (grid[1] - grid[0])
    assert abs(mass - 1) < 1e-2, mass
    print(f"forecasts agree; mass of a density read from quantiles: {mass:.5f}")


# --- Tasks as arrays -----------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """A task with standardised values and times as numbers.

    Times are in units of the longest training series, or in years where they are dates.
    """

    task: Task
    train: list[Series]
    history: list[Series]
    asked: list[np.ndarray]
    """Times asked for, per series of `history`: of `future`, then of `inside`."""
    rows: list[np.ndarray]
    """Where these stand among the N rows."""
    centre: np.ndarray
    spread: np.ndarray
    dated: bool
    """Times are years: the season is theirs modulo 1."""

    @property
    def alone(self) -> bool:
        """There is one series, and it is continued."""
        return self.task.history is None

    @property
    def channels(self) -> int:
        return len(self.centre)

    @property
    def count(self) -> int:
        return sum(len(rows) for rows in self.rows)

    def gather(self, pieces):
        """Return one array of all rows from one (n, D) array per series."""
        out = np.full((self.count, *pieces[0].shape[1:]), np.nan)
        for rows, piece in zip(self.rows, pieces, strict=True):
            out[rows] = piece
        return out

    @property
    def horizon(self) -> float:
        """The longest time asked for after the end of a history."""
        pairs = zip(self.asked, self.history, strict=True)
        return max(asked.max() - known.t[-1] for asked, known in pairs)

    def reaches(self) -> bool:
        """Tell whether training series are as long as what is asked for."""
        longest = max(s.t[-1] - s.t[0] for s in self.train)
        starts = zip(self.asked, self.history, strict=True)
        return self.alone or longest > 0.9 * max(a.max() - h.t[0] for a, h in starts)

    def windows(self, rng, count) -> list[Series]:
        """Return what a network trains on: all series, or windows of the only one."""
        if not self.alone:
            return self.train
        (series,) = self.train
        last = np.searchsorted(series.t, series.t[-1] - self.horizon)
        starts = np.sort(rng.integers(0, max(last - CONTEXT, 1), size=count))
        ends = np.searchsorted(series.t, series.t[starts + CONTEXT] + self.horizon)
        return [series[a:b] for a, b in zip(starts, ends, strict=True)]

    def recent(self) -> list[Series]:
        """Return the histories; of the only series, as much as a window knows."""
        return [s[-CONTEXT:] for s in self.history] if self.alone else self.history

    def cut(self, rng, series) -> int:
        """Return how many observations are the past: half of the time, or about that.

        Windows are cut where their known part ends.
        """
        if self.alone:
            return CONTEXT
        share = 0.5 if rng.random() < 0.5 else rng.uniform(0.25, 0.75)
        at = series.t[0] + share * (series.t[-1] - series.t[0])
        return int(np.clip(np.searchsorted(series.t, at, "right"), 1, len(series) - 1))

    def examples(self, rng, count) -> Iterator[tuple[Series, Series]]:
        """Yield `count` pasts and futures of training series."""
        usable = [s for s in self.windows(rng, 500) if len(s) > 1]
        for k in rng.permutation(count) % len(usable):
            past = self.cut(rng, usable[k])
            yield usable[k][:past], usable[k][past:]


def split(frame):
    """Return {id: (numbers or stamps (n,), values (n, D))} of a frame, in order."""
    if isinstance(frame.index, pd.MultiIndex):
        times = frame.index.get_level_values("time").to_numpy()
        ids = frame.index.get_level_values("series").to_numpy()
    else:
        times, ids = frame.index, np.zeros(len(frame), dtype=int)
    return times, ids, frame.to_numpy(dtype=float)


def as_view(task: Task) -> View:
    """Return the task as arrays."""
    centre = task.train.mean().to_numpy()
    spread = task.train.std(ddof=0).to_numpy()
    dated = isinstance(task.train.index, pd.DatetimeIndex)
    times, ids, _ = split(task.train)
    unit = 1.0
    if not dated:
        by = pd.Series(times).groupby(ids)
        unit = float((by.max() - by.min()).max())

    def numbers(times):
        if not dated:
            return times / unit
        day = pd.Timedelta(days=365.2425)
        return ((times - pd.Timestamp("2000-01-01")) / day).to_numpy() + 2000

    def parts(frame):
        """Yield id, times, values and positions of each series."""
        times, ids, values = split(frame)
        times = numbers(times)
        order = np.lexsort((times, ids))
        cuts = np.flatnonzero(np.diff(ids[order])) + 1
        for rows in np.split(order, cuts):
            yield ids[rows[0]], times[rows], values[rows], rows

    def known(frame):
        for name, t, x, _ in parts(frame):
            seen = ~np.isnan(x).all(axis=1)
            yield name, Series(t[seen], (x[seen] - centre) / spread)

    train = [s for _, s in known(task.train)]
    history = dict(known(task.train if task.history is None else task.history))
    asked = {name: [] for name in history}
    places = {name: [] for name in history}
    offset = 0
    for frame in (task.future, task.inside):
        if frame is None:
            continue
        for name, t, _, rows in parts(frame):
            asked[name].append(t)
            places[name].append(rows + offset)
        offset += len(frame)
    wanted = [name for name in history if asked[name]]
    return View(
        task,
        train,
        [history[name] for name in wanted],
        [np.concatenate(asked[name]) for name in wanted],
        [np.concatenate(places[name]) for name in wanted],
        centre,
        spread,
        dated,
    )
