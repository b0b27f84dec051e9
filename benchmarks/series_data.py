"""The tasks of `series.py`: panels of irregular series, their pasts and their futures.

Rows are observation times; columns are channels; NaN means not observed. Values stand
in the units they were made or measured in (logarithms for the patients). Every split is
a draw of its own: of the simulation, or of who is trained on and who is forecast.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "../shared/data/series"

SPIRALS = ("spirals-30", "spirals-50", "spirals-100")
INSIDE = ("spirals-30-inside", "spirals-100-inside")
FILES = {"brusselator": "brusselator.csv", "pbc": "pbcseq.csv"}
TASKS = (*SPIRALS, *INSIDE, "periodic", *FILES, "co2")


@dataclass(frozen=True)
class Task:
    """What a method is fitted on, conditioned on, and asked for."""

    name: str
    train: pd.DataFrame
    """Rows by (series, time); by time alone where there is one series."""
    history: pd.DataFrame | None
    """The first part of each test series, none of them in `train`; None where the
    series of `train` is continued."""
    future: pd.DataFrame
    """The values to forecast; NaN is not scored. RMSE and MAE are taken on these."""
    scale: pd.Series
    """Per channel, by what errors are divided: the standard deviation of the training
    values; 1 for spirals and CO2, whose units other people's figures have too."""
    noisy: pd.DataFrame | None = None
    """`future` as it would be observed, where `future` itself is free of noise; the
    scores of a distribution (likelihood, CRPS, coverage) are taken on this."""
    inside: pd.DataFrame | None = None
    """Values of the test series within the span of `history`, not in it."""

    @property
    def observed(self) -> pd.DataFrame:
        """What the scores of a distribution are taken on."""
        return self.future if self.noisy is None else self.noisy


# --- Layout --------------------------------------------------------------------------


def panel(ids, times, values, channels):
    """Return rows by (series, time) from (rows,), (rows,) and (rows, channels)."""
    index = pd.MultiIndex.from_arrays([ids, times], names=["series", "time"])
    return pd.DataFrame(values, index=index, columns=list(channels))


def stack(ids, times, values, kept, channels):
    """Return the kept points of series on a grid of their own.

    ids (B,), times (B, T), values (B, T, D), kept (B, T).
    """
    rows = np.broadcast_to(np.asarray(ids)[:, None], times.shape)
    return panel(rows[kept], times[kept], values[kept], channels)


def choose(rng, series, points, observed):
    """Return a mask (series, points): `observed` of the points, without replacement."""
    return rng.random((series, points)).argsort(axis=1) < observed


def training_std(train):
    return train.std(ddof=0)


def ones(train):
    return pd.Series(1.0, index=train.columns)


# --- Tasks ---------------------------------------------------------------------------


def spiral_curves(points=500, stop=6 * np.pi, a=0.0, b=0.3):
    """Return the clockwise and the other curve, (2, points, 2), and their times."""
    t = np.linspace(0.0, stop, points)
    curves = []
    for angle, radius, centre in (
        (stop + 1 - t, a + b * 50 / (stop + 1 - t), -5.0),
        (t, a + b * t, 5.0),
    ):
        curves.append(
            [radius * np.cos(angle) + centre, radius * np.sin(angle)]
        )  # (2, points)
    return np.moveaxis(np.array(curves), 1, 2), t


def spirals(name, observed, rng, trained_beyond, count=1000, span=100, noise=0.3):
    """Spirals of Chen et al. (2018), section 5.1, by the code published with the paper.

    `examples/latent_ode.py` of torchdiffeq draws 1,000 series from two fixed curves of
    500 points, with equal chance clockwise or not: each is 100 consecutive points from
    a start uniform on 100..399, with normal noise of 0.3; its times start at 0. The
    paper observes n = 30, 50 or 100 of the 100 points, drawn without replacement, and
    reports in its Table 2 the RMSE "on test set", over the 100 points that follow. The
    code neither thins, nor splits, nor forecasts; what we chose: the test series are a
    fifth, drawn among those whose next 100 points the curve has (a start of 300 at
    most); the others are trained on, on their own 100 points only. What lies ahead of
    a test series is thus ground that training series have seen, at earlier times of
    their own. RMSE is against the curve without noise, at all of the 100 points;
    likelihood, CRPS and coverage are of values with noise.

    `trained_beyond` changes two things: all starts are 300 at most, and training series
    show n points of the second hundred too, so that the times asked for lie inside the
    span of training.
    """
    curves, grid = spiral_curves()
    last = grid.size - 2 * span  # the last start whose next 100 points exist
    high = last if trained_beyond else grid.size - span - 1
    start = rng.integers(span, high, size=count, endpoint=True)
    turn = rng.integers(2, size=count)
    # The curve ends before the next 100 points of a late start: these are NaN.
    long = np.pad(curves, ((0, 0), (0, span), (0, 0)), constant_values=np.nan)
    clean = long[turn[:, None], start[:, None] + np.arange(2 * span)]  # (B, 200, 2)
    noisy = clean + noise * rng.normal(size=clean.shape)
    seen = np.concatenate([choose(rng, count, span, observed) for _ in "ab"], axis=1)
    early = np.arange(2 * span) < span

    test = np.zeros(count, dtype=bool)
    test[rng.permutation(np.flatnonzero(start <= last))[: count // 5]] = True
    ids = np.arange(count)
    times = np.broadcast_to(np.arange(2 * span) * (grid[1] - grid[0]), seen.shape)
    taught = seen if trained_beyond else seen & early

    def rows(who, values, kept):
        return stack(ids[who], times[who], values[who], kept[who], ["x", "y"])

    train = rows(~test, noisy, taught)
    ahead = np.broadcast_to(~early, seen.shape)
    return Task(
        name,
        train,
        rows(test, noisy, seen & early),
        rows(test, clean, ahead),
        ones(train),
        noisy=rows(test, noisy, ahead),
        inside=rows(test, clean, ~seen & early) if observed < span else None,
    )


def least_rmse(task, span=100, noise=0.3):
    """Return the RMSE on spirals of one who knows the curves, the starts and the noise.

    The posterior mean over both curves and every start that a test series may have.
    """
    curves, grid = spiral_curves()
    starts = np.arange(span, grid.size - 2 * span + 1)
    pairs = task.history.groupby("series"), task.future.groupby("series")
    square = []
    for (_, past), (_, future) in zip(*pairs, strict=True):
        times = past.index.get_level_values("time").to_numpy()
        at = np.rint(times / grid[1]).astype(int)
        known = curves[:, starts[:, None] + at]  # (2, starts, n, 2)
        fit = -((past.to_numpy() - known) ** 2).sum(axis=(2, 3)) / (2 * noise**2)
        weight = np.exp(fit - fit.max())
        ahead = curves[:, starts[:, None] + np.arange(span, 2 * span)]
        mean = np.tensordot(weight / weight.sum(), ahead, axes=2)
        square.append((mean - future.to_numpy()) ** 2)
    return float(np.sqrt(np.mean(square)))


def periodic(rng, count=1000, points=100, end=5.0, observed=0.5, noise=0.01):
    """Periodic toy of Rubanova et al. (2019), by the code published with the paper.

    A sine of amplitude 1 about a level of 1 + 0.1 N(0, 1); the frequency goes in a
    straight line from one to another value, both uniform on [0.4, 0.8]; phase 0 at time
    0; to every point but the first a noise is added that is uniform on [0, 0.01]. All
    series share 100 times: 0, and 99 uniform on [0, 5]; the phase is summed along
    these, as published. The paper's text draws starts from a standard normal instead;
    we follow the code. Its extrapolation mode conditions on half of the points among
    the first 50 times, other ones in each series, and asks for the last 50. Training
    series show the same: half of the early points and all of the late ones. `inside` is
    the other half of the early points of the test series.
    """
    times = np.sort(np.r_[0.0, rng.uniform(0, end, size=points - 1)])
    first, final = rng.uniform(0.4, 0.8, size=(2, count, 1))
    frequency = first + (final - first) * times / times[-1]  # (B, T)
    phase = np.cumsum(2 * np.pi * frequency * np.diff(times, prepend=0.0), axis=1)
    level = 1 + 0.1 * rng.normal(size=(count, 1))
    values = level + np.sin(phase)
    values[:, 1:] += noise * rng.random((count, points - 1))
    half = points // 2
    early = np.broadcast_to(np.arange(points) < half, (count, points))
    seen = early.copy()
    seen[:, :half] = choose(rng, count, half, round(observed * half))

    test = rng.permutation(count) < count // 5
    ids, times = np.arange(count), np.broadcast_to(times, (count, points))

    def rows(who, kept):
        return stack(ids[who], times[who], values[who, :, None], kept[who], ["value"])

    train = rows(~test, seen | ~early)
    return Task(
        "periodic",
        train,
        rows(test, seen),
        rows(test, ~early),
        training_std(train),
        inside=rows(test, early & ~seen),
    )


def halves(name, table, rng, is_early):
    """Split series into training and test, and the latter into past and future."""
    ids = table.index.unique("series").to_numpy()
    test = rng.permutation(ids)[: round(len(ids) / 5)]
    tested = table.index.get_level_values("series").isin(test)
    train, held = table[~tested], table[tested]
    early = is_early(held)
    return Task(name, train, held[early], held[~early], training_std(train))


def brusselator(rng, folder):
    """Stochastic Brusselators of De Brouwer et al. (2019): t <= 25 is known, of 50."""
    raw = pd.read_csv(folder / FILES["brusselator"])
    seen = raw[["Mask_1", "Mask_2"]].to_numpy() == 1
    values = raw[["Value_1", "Value_2"]].where(seen).to_numpy()
    table = panel(raw["ID"].astype(int), raw["Time"], values, ["a", "b"])
    table = table[seen.any(axis=1)].sort_index()
    return halves(
        "brusselator", table, rng, lambda t: t.index.get_level_values("time") <= 25
    )


def pbc(rng, folder):
    """Follow-up of the Mayo Clinic's patients: the first half of their visits is known.

    Logarithms of five laboratory values; years since the first visit. Patients with one
    visit are trained on and never forecast.
    """
    raw = pd.read_csv(folder / FILES["pbc"])
    channels = ["bili", "chol", "alk.phos", "ast", "protime"]
    table = panel(
        raw["id"], raw["day"] / 365.25, np.log(raw[channels]).to_numpy(), channels
    )
    table = table.sort_index()
    counts = table.index.get_level_values("series").value_counts()
    once = table.index.get_level_values("series").isin(counts.index[counts < 2])

    def first_half(held):
        by = held.groupby("series")
        number = by.cumcount()
        size = held.index.get_level_values("series").map(counts)
        return (number < np.ceil(size / 2)).to_numpy()

    task = halves("pbc", table[~once], rng, first_half)
    train = pd.concat([task.train, table[once]]).sort_index()
    return Task("pbc", train, task.history, task.future, training_std(train))


def co2(split, share=0.78):
    """Weekly CO2 at Mauna Loa (Keeling and Whorf 2004), with its 59 empty weeks.

    The weeks up to May 1992, 78 % of them, are known, and nearly ten years asked for.
    There is one such record; in other splits it ends a year earlier each.
    """
    from statsmodels.datasets import co2 as record

    table = record.load_pandas().data
    table.index = pd.DatetimeIndex(table.index, name="time", freq=None)
    table = table.iloc[: len(table) - 52 * split]
    cut = int(share * len(table))
    train = table.iloc[:cut]
    return Task("co2", train, None, table.iloc[cut:].dropna(), ones(train))


def make_task(name: str, split: int = 0, folder: Path = DATA) -> Task:
    """Return one of `TASKS`."""
    rng = np.random.default_rng([TASKS.index(name), split])
    if name.startswith("spirals"):
        observed = int(name.split("-")[1])
        return spirals(name, observed, rng, trained_beyond=name in INSIDE)
    if name == "periodic":
        return periodic(rng)
    if name == "co2":
        return co2(split)
    return {"brusselator": brusselator, "pbc": pbc}[name](rng, folder)


def main(folder=DATA):
    """Print what the tasks are like, what the last value says, and who knew it all."""
    for name in TASKS:
        task = make_task(name, 0, folder)
        parts = {"train": task.train, "history": task.history, "future": task.future}
        sizes = {k: None if v is None else v.shape for k, v in parts.items()}
        if task.history is None:
            error = task.future - task.train.ffill().iloc[-1]
        else:
            last = task.history.groupby("series").last()
            ids = task.future.index.get_level_values("series")
            error = task.future - last.reindex(ids).to_numpy()
        error = (error / task.scale).to_numpy()
        rmse = np.sqrt(np.nanmean(error**2))
        print(f"{name}: {sizes}, last value {rmse:.3f}")
        if name.startswith("spirals"):
            print(f"  the least RMSE that its noise allows: {least_rmse(task):.4f}")


if __name__ == "__main__":
    main()
