"""Who takes part in `series.py` without a network; the registry of all.

A method is a function of a `View`, a budget of CPU seconds and a seed that returns
something with `predict()`, a `Forecast` of every row asked for. What cannot
interpolate says NaN of the times inside a history. The budget binds those that train.
Libraries are imported when their turn comes.
"""

import time
import warnings
from functools import partial
from itertools import product

import numpy as np
import pandas as pd
from series_boosting import fit_boosting
from series_gru import fit_direct, fit_rollout
from series_published import fit_published
from series_view import LEVELS, Fitted, by_quantiles, gaussian, last_seen
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import (
    RBF,
    ConstantKernel,
    ExpSineSquared,
    Matern,
    RationalQuadratic,
    WhiteKernel,
)

# --- Rules ---------------------------------------------------------------------------


def carry(series, times, channel, points):
    """Forecast one channel by the line through its last points; inside, interpolate.

    Half an observation at the mean of all training values stands in for none.
    """
    t, x = last_seen(series, channel, len(series))
    if not len(t):
        return np.zeros(len(times))
    inside = np.interp(times, t, x)
    if points == 1:
        before = np.clip(np.searchsorted(t, times, "right") - 1, 0, None)
        return x[before]
    t, x = t[-points:], x[-points:]
    slope = 0.0
    if len(t) > 1 and t[-1] > t[0]:
        slope = np.cov(t, x, bias=True)[0, 1] / t.var()
    ahead = x.mean() + slope * (times - t.mean())
    return np.where(times > series.t[-1], ahead, inside)


def spread_by_lead(leads, errors, bins=15):
    """Return a function lead -> standard deviation, from errors on training series.

    Beyond the longest lead the variance grows as that of a random walk does.
    """
    order = np.argsort(leads)
    groups = np.array_split(order, min(bins, max(len(order) // 20, 1)))
    at = np.array([leads[g].mean() for g in groups])
    variance = np.array([np.mean(errors[g] ** 2) for g in groups])

    def spread(lead):
        inner = np.interp(lead, at, variance)
        return np.sqrt(inner * np.maximum(lead / at[-1], 1.0) + 1e-6)

    return spread


def fit_rule(view, budget, seed, choices):
    """Carry the last value, or a line through as many points as training prefers."""
    pairs = list(view.examples(np.random.default_rng(seed), 1000))
    errors = {}  # points -> channel -> (leads, errors)
    for points in choices:
        for channel in range(view.channels):
            found = [
                (b.t - a.t[-1], b.x[:, channel] - carry(a, b.t, channel, points))
                for a, b in pairs
            ]
            leads, off = (np.concatenate(part) for part in zip(*found, strict=True))
            kept = ~np.isnan(off)
            errors.setdefault(points, []).append((leads[kept], off[kept]))
    best = min(choices, key=lambda p: np.mean([np.mean(e**2) for _, e in errors[p]]))
    spreads = [spread_by_lead(*pair) for pair in errors[best]]

    def predict():
        means, stds = [], []
        for known, times in zip(view.history, view.asked, strict=True):
            every = range(view.channels)
            lead = np.maximum(times - known.t[-1], 0.0)
            means.append(np.stack([carry(known, times, c, best) for c in every], 1))
            stds.append(np.stack([spreads[c](lead) for c in every], axis=1))
        return gaussian(view.gather(means), view.gather(stds))

    return Fitted(predict, f"{best} points")


# --- Gaussian processes --------------------------------------------------------------


FEW = 8
"""Observations below which amplitude and noise cannot be told from one series."""


def kernels(t):
    """Return the kernels that a series chooses from by its marginal likelihood."""
    span = max(t[-1] - t[0], 1e-6)
    gap = span / len(t)
    few = len(t) < FEW
    size = ConstantKernel(1.0, "fixed" if few else (1e-2, 1e3))
    noise = WhiteKernel(0.1, (0.05, 1.0) if few else (1e-5, 1.0))
    width = {"length_scale_bounds": (gap / 2, 10 * span)}
    smooth = size * Matern(span / 5, nu=2.5, **width) + noise
    if few:
        return (smooth,)
    waves = ExpSineSquared(1.0, span / 2, (0.1, 10.0), (2 * gap, 2 * span))
    return smooth, size * RBF(span, **width) * waves + noise


def kernels_of_co2(spread):
    """Return scikit-learn's example for this record, its amplitudes in ppm / spread.

    A trend, a season that changes slowly, irregularities of some years, and noise that
    lasts for weeks.
    """
    unit = spread**-2
    season = ExpSineSquared(1.0, 1.0, periodicity_bounds="fixed")
    trend = ConstantKernel(50.0**2 * unit) * RBF(50.0)
    yearly = ConstantKernel(2.0**2 * unit) * RBF(100.0) * season
    rough = ConstantKernel(0.5**2 * unit) * RationalQuadratic(1.0, 1.0)
    weeks = ConstantKernel(0.1**2 * unit) * RBF(0.1) + WhiteKernel(0.1**2 * unit)
    return (trend + yearly + rough + weeks,)


def fit_gp(view, budget, seed):
    """One process per series and channel, its hyperparameters its own."""
    from scipy.optimize import minimize

    ends = time.process_time() + budget

    def descend(objective, start, bounds):
        steps = 40 if time.process_time() < ends else 5
        found = minimize(
            objective,
            start,
            jac=True,
            bounds=bounds,
            method="L-BFGS-B",
            options={"maxiter": steps},
        )
        return found.x, found.fun

    def one(series, times, channel):
        t, x = last_seen(series, channel, len(series))
        if len(t) < 2:
            level = x.mean() if len(x) else 0.0
            return np.full(len(times), level), np.ones(len(times))
        shift = x.mean()
        models = []
        for kernel in kernels_of_co2(view.spread[0]) if view.dated else kernels(t):
            model = GaussianProcessRegressor(kernel, optimizer=descend, alpha=1e-8)
            models.append(model.fit(t[:, None], x - shift))
        best = max(models, key=lambda m: m.log_marginal_likelihood_value_)
        mean, std = best.predict(times[:, None], return_std=True)
        # scikit-learn's deviation has the noise in it: a white kernel at equal points.
        return mean + shift, std

    def predict():
        means, stds = [], []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            for known, times in zip(view.history, view.asked, strict=True):
                both = [one(known, times, c) for c in range(view.channels)]
                means.append(np.stack([m for m, _ in both], axis=1))
                stds.append(np.stack([s for _, s in both], axis=1))
        return gaussian(view.gather(means), np.maximum(view.gather(stds), 1e-4))

    return Fitted(predict, "fits while it predicts")


# --- The structural model ------------------------------------------------------------


def fit_structural(view, budget, seed):
    """Level and slope that drift, harmonics of the year that do, and noise.

    Two or four harmonics, and whether the noise is an AR(1), by Akaike's criterion.
    """
    from statsmodels.tsa.statespace.structural import UnobservedComponents

    train, future = view.task.train.iloc[:, 0], view.task.future
    step = train.index[1] - train.index[0]
    if not (np.diff(train.index) == step).all():
        raise ValueError("the structural model needs times of even spacing")
    centre, spread = view.centre[0], view.spread[0]
    found = []
    for harmonics, order in product((2, 4), (None, 1)):
        model = UnobservedComponents(
            train.to_numpy() - centre,
            level="local linear trend",
            freq_seasonal=[{"period": 365.2425 / step.days, "harmonics": harmonics}],
            autoregressive=order,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of convergence; the note tells of it
            found.append((model.fit(disp=False, maxiter=200), harmonics, order))
    result, harmonics, order = min(found, key=lambda f: f[0].aic)
    at = np.rint((future.index - train.index[-1]) / step).astype(int) - 1

    def predict():
        ahead = result.get_forecast(int(at.max()) + 1)
        mean = np.asarray(ahead.predicted_mean)[at, None] / spread
        return gaussian(mean, np.asarray(ahead.se_mean)[at, None] / spread)

    ended = "converged" if result.mle_retvals["converged"] else "not converged"
    return Fitted(predict, f"{harmonics} harmonics, AR {order or 0}, {ended}")


# --- Ours ----------------------------------------------------------------------------

FINE = np.unique(np.r_[0.005, 0.01, 0.025, LEVELS, 0.975, 0.99, 0.995].round(4))
"""Levels by which the density of our forecast is read, as boosting's is by its five."""


def fit_skode(view, budget, seed, **params):
    """`LatentODEForecaster` as it comes; it stops by itself, whatever the budget."""
    import skode

    task = view.task
    estimator = skode.LatentODEForecaster(random_state=seed, **params).fit(task.train)
    parts = [f for f in (task.future, task.inside) if f is not None]
    asked = pd.concat(parts).index
    past = {} if task.history is None else {"history": task.history}

    def scaled(values):
        return (values - view.centre) / view.spread

    def predict():
        mean = np.asarray(estimator.predict(asked, **past))
        found = estimator.predict_quantiles(asked, FINE, **past)
        if isinstance(found, pd.DataFrame):  # columns by (channel, level)
            found = found.to_numpy().reshape(len(asked), view.channels, len(FINE))
        found = np.asarray(found).reshape(len(asked), view.channels, len(FINE))
        found = np.moveaxis(scaled(np.moveaxis(found, 2, 1)), 1, 2)
        return by_quantiles(scaled(mean.reshape(len(asked), -1)), FINE, found)

    return Fitted(predict, f"{estimator.n_iter_} iterations")


METHODS = {
    "last": partial(fit_rule, choices=(1,)),
    "linear": partial(fit_rule, choices=(2, 3, 5, 10, 20, 260)),
    "gp": fit_gp,
    "structural": fit_structural,
    "boosting": fit_boosting,
    "gru": fit_direct,
    "gru-rollout": fit_rollout,
    "latent-rnn": partial(fit_published, encoder="rnn"),
    "latent-ode-rnn": partial(fit_published, encoder="ode_rnn"),
    "skode": fit_skode,
}
PUBLISHED = ("latent-rnn", "latent-ode-rnn")
EVEN = {"structural": ("co2",)}
"""Methods that need even spacing, and the tasks that have it."""
