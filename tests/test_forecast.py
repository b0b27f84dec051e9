"""What `LatentODEForecaster` answers, for frames and arrays, and how it is fitted."""

import pickle
import warnings

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import norm
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    TimeSeriesSplit,
    cross_val_predict,
    cross_val_score,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skode import forecast as room
from skode._training_series import pieces_of
from skode.exceptions import DivergenceError, SolverError, SolverWarning
from tests.panels import forecaster, record, waves

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

PANEL = waves()
X, Y = PANEL[["who", "t"]], PANEL[["a", "b"]]
RECORD = record()
LATER = RECORD.index[-1] + pd.to_timedelta(["7min", "3h", "2D"])
AHEAD = pd.DataFrame({"who": ["s1", "s0", "s1", "s3"], "t": [6.5, 7.0, 6.1, 9.0]})


def fitted(estimator, *data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return estimator.fit(*data)


@pytest.fixture(scope="module")
def panel():
    """Return a forecaster of several series; no test may change it."""
    return fitted(forecaster(time="t", series="who", max_iter=10), X, Y)


@pytest.fixture(scope="module", params=[True, False], ids=["path", "trend"])
def one(request):
    """Return a forecaster of one series with stamps; no test may change it."""
    return fitted(forecaster(path=request.param), RECORD)


@pytest.fixture(scope="module")
def poisson():
    """Return a forecaster of event times too."""
    model = forecaster(time="t", series="who", event_times="poisson")
    return fitted(model, X, Y)


def weights_of(model):
    """Return all weights of a fitted net in one array."""
    return torch.cat([p.detach().ravel() for p in model.module_.parameters()]).numpy()


def new_patients(n_rows=4):
    """Return rows of series that fit has not seen."""
    frame = waves(2, n_rows, seed=5)
    return frame.assign(who=frame["who"].map({"s0": "n0", "s1": "n1"}))


# ------------------------------------------------------------------ what comes back


def test_one_series_is_continued_from_its_own_history(one):
    found = one.predict(LATER)
    assert isinstance(found, pd.DataFrame)
    assert list(found.columns) == ["a", "b"] and found.index.equals(LATER)
    assert np.isfinite(found.to_numpy()).all()
    mean, std = one.predict(LATER, return_std=True)
    pd.testing.assert_frame_equal(mean, found)
    assert (std > 0).all(axis=None) and std.index.equals(LATER)
    assert list(std.columns) == ["a", "b"]


def test_quantiles_stand_below_the_columns_of_y(one):
    levels = [0.05, 0.5, 0.95]
    found = one.predict_quantiles(LATER, levels)
    assert found.index.equals(LATER) and found.shape == (3, 6)
    assert list(found["a"].columns) == levels
    for channel in ("a", "b"):
        assert (np.diff(found[channel], axis=1) > 0).all()
    interval = one.predict_interval(LATER, coverage=0.9)
    np.testing.assert_allclose(interval["b"], found["b"][[0.05, 0.95]])
    inner = one.predict_interval(LATER, 0.5)
    assert (inner["a"].to_numpy() > interval["a"].to_numpy())[:, 0].all()
    assert (inner["a"].to_numpy() < interval["a"].to_numpy())[:, 1].all()


def test_quantiles_are_those_of_the_distribution(one):
    # With one path, it is a normal.
    model = pickle.loads(pickle.dumps(one)).set_params(n_paths=1)
    mean, std = model.predict(LATER, return_std=True)
    for level in (0.01, 0.5, 0.9):
        found = model.predict_quantiles(LATER, [level])
        wanted = mean + std * norm.ppf(level)
        np.testing.assert_allclose(found, wanted, rtol=1e-4)


@pytest.mark.parametrize("levels", [[0.0], [0.5, 1.0], [], [[0.1, 0.2]], [np.nan]])
def test_levels_lie_between_0_and_1(one, levels):
    with pytest.raises(ValueError, match="quantiles must"):
        one.predict_quantiles(LATER, levels)
    with pytest.raises(ValueError, match="coverage must lie between 0 and 1"):
        one.predict_interval(LATER, 1.0)


def test_paths_are_columns_below_those_of_y(one):
    paths = one.sample_paths(LATER, n_paths=7, random_state=0)
    assert paths.shape == (3, 14) and paths.index.equals(LATER)
    assert list(paths["b"].columns) == list(range(7))
    again = one.sample_paths(LATER, n_paths=7, random_state=0)
    pd.testing.assert_frame_equal(paths, again)
    other = one.sample_paths(LATER, n_paths=7, random_state=1)
    assert not np.isclose(paths, other).any()


@pytest.mark.parametrize("history", [False, True])
def test_many_paths_have_the_moments_of_the_forecast(panel, history):
    model = pickle.loads(pickle.dumps(panel)).set_params(n_paths=4096, rtol=1e-2)
    given = {"history": PANEL[PANEL["t"] < 2]} if history else {}
    mean, std = model.predict(AHEAD, return_std=True, **given)
    paths = model.sample_paths(AHEAD, n_paths=4000, random_state=0, **given)
    for name in ("a", "b"):
        off = (paths[name].mean(axis=1) - mean[name]) / std[name]
        assert (off.abs() < 0.08).all()
        assert ((paths[name].std(axis=1) / std[name] - 1).abs() < 0.08).all()


def test_paths_are_drawn_jointly_over_the_rows_of_a_series(panel):
    rows = pd.DataFrame({"who": ["s0", "s0", "s0", "s1"], "t": [9.0, 9.01, 50.0, 9.0]})
    model = pickle.loads(pickle.dumps(panel))
    with torch.no_grad():
        model.module_.residual.share.fill_(3.0)
    paths = model.sample_paths(rows, n_paths=2000, random_state=0)["a"]
    together = np.corrcoef(paths)
    assert together[0, 1] > 0.8
    assert together[0, 3] == pytest.approx(0, abs=0.1)
    assert together[0, 2] < together[0, 1] - 0.2


@pytest.mark.parametrize("n_channels", [None, 1, 2])
def test_arrays_give_arrays(n_channels):
    values = Y.to_numpy()[:, 0] if n_channels is None else Y.to_numpy()[:, :n_channels]
    codes = X["who"].str[1:].astype(float)
    table = np.column_stack([X["t"], codes])
    model = fitted(forecaster(series=1), table, values)
    shape = () if n_channels is None else (n_channels,)
    asked = np.column_stack([AHEAD["t"], [1, 0, 1, 3]])
    mean, std = model.predict(asked, return_std=True)
    assert mean.shape == std.shape == (4, *shape)
    assert model.predict_quantiles(asked, [0.1, 0.9]).shape == (4, *shape, 2)
    assert model.predict_interval(asked).shape == (4, *shape, 2)
    assert model.sample_paths(asked, 5).shape == (5, 4, *shape)
    assert model.score_samples(table, values).shape == (72,)
    assert isinstance(model.score(table, values), float)
    history = np.column_stack([table, values])[:30]
    assert model.predict(asked, history=history).shape == (4, *shape)


def test_frames_and_arrays_are_the_same_series():
    codes = X["who"].str[1:].astype(float)
    table = np.column_stack([X["t"], codes])
    arrays = fitted(forecaster(series=1), table, Y.to_numpy())
    frames = fitted(forecaster(time="t", series="who"), X, Y)
    levels = fitted(forecaster(), Y.set_axis(pd.MultiIndex.from_frame(X)))
    asked = np.column_stack([AHEAD["t"], [1, 0, 1, 3]])
    index = pd.MultiIndex.from_frame(AHEAD)
    wanted = arrays.predict(asked)
    assert np.array_equal(frames.predict(AHEAD), wanted)
    found = levels.predict(index)
    assert found.index.equals(index) and np.array_equal(found, wanted)


def test_a_series_of_values_gives_series():
    model = fitted(forecaster(), RECORD["a"])
    found = model.predict(LATER)
    assert isinstance(found, pd.Series) and found.name == "a"
    assert model.sample_paths(LATER, 3).shape == (3, 3)
    assert model.score_samples(RECORD["a"]).name == "log_density"


@pytest.mark.parametrize("n_paths", [0, -1, 1.5])
def test_paths_are_counted_from_one(one, n_paths):
    with pytest.raises((ValueError, TypeError), match="n_paths"):
        one.sample_paths(LATER, n_paths)


def test_names_and_counts_are_scikit_learns(panel):
    assert panel.n_features_in_ == 2
    assert list(panel.feature_names_in_) == ["who", "t"]
    again = clone(panel).set_params(series=None, time=None)
    fitted(again, np.column_stack([X["t"], Y["a"]]))
    assert again.n_features_in_ == 2 and not hasattr(again, "feature_names_in_")


def test_nothing_is_answered_before_fit():
    calls = (
        lambda m: m.predict(AHEAD),
        lambda m: m.predict_quantiles(AHEAD),
        lambda m: m.predict_interval(AHEAD),
        lambda m: m.sample_paths(AHEAD),
        lambda m: m.intensity(AHEAD),
        lambda m: m.score_samples(X, Y),
        lambda m: m.score(X, Y),
        lambda m: m.observe(X, Y),
    )
    for call in calls:
        with pytest.raises(NotFittedError):
            call(forecaster(time="t", series="who"))


# ------------------------------------------------------------------------ histories


def every_answer(model, asked, history):
    """Return what each method of prediction says, as arrays."""
    found = [
        *model.predict(asked, return_std=True, history=history),
        model.predict_quantiles(asked, [0.3, 0.6], history=history),
        model.predict_interval(asked, history=history),
        model.sample_paths(asked, 3, history=history, random_state=0),
    ]
    if model.event_times:
        found.append(model.intensity(asked, history=history))
    return [np.asarray(part) for part in found]


def test_every_prediction_takes_a_history(poisson):
    new = new_patients()
    asked = pd.DataFrame({"who": ["n1", "n0", "n1"], "t": [9.0, 7.0, 6.5]})
    as_frame = every_answer(poisson, asked, new)
    parts = (new[["who", "t"]], new[["a", "b"]])
    as_tuple = every_answer(poisson, asked, parts)
    for one, other in zip(as_frame, as_tuple, strict=True):
        assert np.array_equal(one, other) and np.isfinite(one).all()
    other = every_answer(poisson, asked, new.assign(a=new["a"] + 2))
    for one, shifted in zip(as_frame, other, strict=True):
        assert not np.isclose(one, shifted, rtol=1e-6).all()


def test_a_history_stands_for_what_fit_saw(panel):
    short = PANEL[PANEL["t"] < 2]
    plain = panel.predict(AHEAD)
    found = panel.predict(AHEAD, history=short)
    assert not np.isclose(found, plain).any()
    same = panel.predict(AHEAD, history=PANEL)
    np.testing.assert_allclose(same, plain, rtol=1e-6)
    # Series that it does not name keep theirs.
    of_one = panel.predict(AHEAD, history=short[short["who"] == "s0"])
    np.testing.assert_allclose(of_one.iloc[1], found.iloc[1], rtol=1e-5)
    np.testing.assert_allclose(of_one.iloc[[0, 2, 3]], plain.iloc[[0, 2, 3]], rtol=1e-5)


@pytest.mark.filterwarnings("error")
def test_series_without_a_history_come_from_the_prior_with_a_warning(panel):
    asked = pd.DataFrame({"who": ["new", "s0"], "t": [1.0, 7.0]})
    with pytest.warns(SolverWarning, match="not seen in fit") as caught:
        found = panel.predict(asked)
    assert caught[0].filename == __file__
    np.testing.assert_allclose(found.iloc[1], panel.predict(asked.iloc[1:]).iloc[0])
    for call in (panel.predict_interval, panel.sample_paths, panel.predict_quantiles):
        with pytest.warns(SolverWarning, match="not seen in fit: 'new'") as caught:
            call(asked)
        assert caught[0].filename == __file__
    strict = pickle.loads(pickle.dumps(panel)).set_params(unseen="raise")
    with pytest.raises(ValueError, match="Pass history="):
        strict.predict(asked)
    strict.predict(AHEAD)


def test_the_prior_is_as_wide_as_what_was_seen(panel):
    model = fitted(forecaster(time="t", series="who", max_iter=40), X, Y)
    with pytest.warns(SolverWarning):
        mean, std = model.predict(
            pd.DataFrame({"who": ["new"], "t": [1.0]}), return_std=True
        )
    assert abs(mean["a"].item()) < 2.5 and 0.7 < std["a"].item() < 5
    assert 38 < mean["b"].item() < 42


def test_observing_is_predicting_with_the_longer_history(panel):
    first, more = PANEL["t"] < 3, new_patients()
    base = fitted(clone(panel), X[first], Y[first])
    model = pickle.loads(pickle.dumps(base))
    assert model.observe(X[~first], Y[~first]) is model
    model.observe(more[["who", "t"]], more[["a", "b"]])
    asked = pd.concat([AHEAD, AHEAD.assign(who="n1")])
    found = model.predict(asked)
    wanted = base.predict(asked, history=pd.concat([PANEL, more]))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert np.array_equal(weights_of(model), weights_of(base))
    # What one model observes, another that shared its histories does not.
    assert not np.isclose(base.predict(AHEAD), found.iloc[:4]).any()


def test_observing_in_parts_is_observing_at_once():
    base = fitted(forecaster(), RECORD.iloc[:50])
    once = pickle.loads(pickle.dumps(base)).observe(RECORD.iloc[50:])
    parts = pickle.loads(pickle.dumps(base))
    for chunk in (RECORD.iloc[65:], RECORD.iloc[50:65]):
        parts.observe(chunk)
    pd.testing.assert_frame_equal(once.predict(LATER), parts.predict(LATER))
    twice = once.predict(LATER)
    pd.testing.assert_frame_equal(once.observe(RECORD).predict(LATER), twice)


# --------------------------------------------------------------------------- scores


def test_the_density_of_a_row_is_that_of_the_forecast(panel):
    # With one path: two normals, one for each channel.
    model = pickle.loads(pickle.dumps(panel))
    new = new_patients()
    rows, seen = new[["who", "t"]], new[["a", "b"]]
    density = model.score_samples(rows, seen)
    assert density.name == "log_density" and density.index.equals(rows.index)
    model.set_params(n_paths=64)
    for position in (1, 3, 6):
        who, t = rows.iloc[position]
        before = new[(new["who"] == who) & (new["t"] < t)]
        asked = rows.iloc[[position]]
        paths = _mixture(model, asked, before)
        value = seen.iloc[position].to_numpy()
        log = norm.logpdf(value, *paths)
        whole = np.nansum(log, axis=1)
        wanted = np.log(np.mean(np.exp(whole)))
        assert density.iloc[position] == pytest.approx(wanted, rel=1e-3)


def _mixture(model, asked, before):
    """Return means and stds (K, C) of the components, in the units of y."""
    found = []

    def summary(mixture):
        found.append((mixture.means[0, :, 0], mixture.stds[0, :, 0]))
        return mixture.mean(), mixture.std()

    model._forecast(*model._questions(asked, before), summary)
    means, stds = (part.double().numpy() for part in found[0])
    return model.units_.values(means), stds * model.units_.std


def test_densities_multiply_to_that_of_the_series():
    # Of one channel whose residuals persist: the chain rule against paths' own density.
    model = fitted(
        forecaster(time="t", series="who", dtype="float64", context=99.0, trend=None),
        X,
        Y[["a"]],
    )
    with torch.no_grad():
        model.module_.recognition.head[-1].weight.zero_()
        model.module_.recognition.head[-1].bias[3:] = -50.0
    new = new_patients()[["who", "t", "a"]].query("who == 'n0'")
    density = model.score_samples(new[["who", "t"]], new[["a"]]).iloc[1:].sum()
    # Conditional on the first row alone, the rest is a normal: from many joint paths.
    first, rest = new.iloc[:1], new.iloc[1:]
    paths = model.sample_paths(
        rest[["who", "t"]], 100_000, history=first, random_state=0
    )["a"].to_numpy()
    value, mean, cov = rest["a"].to_numpy(), paths.mean(axis=1), np.cov(paths)
    off = value - mean
    wanted = -0.5 * (
        off @ np.linalg.solve(cov, off) + np.linalg.slogdet(2 * np.pi * cov)[1]
    )
    assert density == pytest.approx(wanted, abs=0.15)


def test_the_first_row_of_a_new_series_is_scored_by_the_prior(panel):
    new = new_patients()
    density = panel.score_samples(new[["who", "t"]], new[["a", "b"]])
    assert np.isfinite(density).all()


def test_rows_without_observation_have_density_one(panel):
    rows, nothing = X.iloc[:3], Y.iloc[:3] * np.nan
    assert panel.score_samples(rows, nothing).tolist() == [0, 0, 0]


def test_densities_are_in_the_units_of_y():
    model = fitted(forecaster(time="t", series="who"), X, Y)
    scaled = fitted(forecaster(time="t", series="who"), X, 1000 * Y)
    plain, moved = model.score_samples(X, Y), scaled.score_samples(X, 1000 * Y)
    seen = (~Y.isna()).sum(axis=1)
    np.testing.assert_allclose(moved, plain - seen * np.log(1000), atol=0.01)
    # But scores are in standardised ones.
    assert scaled.score(X, 1000 * Y) == pytest.approx(model.score(X, Y), abs=1e-3)


def test_held_out_series_are_conditioned_on_their_first_share(panel):
    new = waves(3, 10, seed=5).assign(who=lambda f: "n" + f["who"])
    rows, seen = new[["who", "t"]], new[["a", "b"]]
    early = new.groupby("who").cumcount() < 4
    model = pickle.loads(pickle.dumps(panel)).set_params(score_context=0.4)
    wanted = panel.score(rows[~early], seen[~early], history=new[early])
    assert model.score(rows, seen) == pytest.approx(wanted, rel=1e-5)
    assert model.score(rows, seen) != panel.score(rows, seen)


def test_known_series_are_scored_from_what_fit_saw():
    early = PANEL["t"] < 4
    model = fitted(forecaster(time="t", series="who"), X[early], Y[early])
    found = model.score(X[~early], Y[~early])
    given = model.score(X[~early], Y[~early], history=PANEL[early])
    assert found == pytest.approx(given)


def test_a_score_is_the_mean_of_log_densities_of_values(panel):
    new = new_patients(9)
    rows, seen = new[["who", "t"]], new[["a", "b"]]
    early = new.groupby("who").cumcount() < 5
    total, count = 0.0, 0
    for position in np.flatnonzero(~early):
        means, stds = _mixture(panel, rows.iloc[[position]], new[early])
        for value, mean, std, unit in zip(
            seen.iloc[position], means.T, stds.T, panel.units_.std, strict=True
        ):
            if not np.isnan(value):
                total += np.log(norm.pdf(value, mean, std).mean() * unit)
                count += 1
    assert panel.score(rows, seen) == pytest.approx(total / count, rel=1e-3)


def test_there_must_be_something_to_score(panel):
    with pytest.raises(ValueError, match="nothing to score"):
        panel.score(new_patients(1)[["who", "t"]], new_patients(1)[["a", "b"]])


# ------------------------------------------------------------- covariates, event times


def dosed(n_series=6, seed=0):
    frame = waves(n_series, 12, seed)
    rng = np.random.default_rng(seed)
    return frame.assign(dose=rng.standard_normal(len(frame)), age=frame["t"] * 0 + 7)


def test_covariates_are_known_at_every_time():
    frame = dosed()
    frame["a"] = 5 * frame["dose"] + 0.1 * frame["a"]
    names = ["who", "t", "dose", "age"]
    model = forecaster(time="t", series="who", max_iter=40, learning_rate_init=0.03)
    model = fitted(model, frame[names], frame[["a", "b"]])
    asked = AHEAD.assign(dose=[1.0, 1, 1, 1], age=7.0)
    high = model.predict(asked)
    low = model.predict(asked.assign(dose=-1.0))
    assert (high["a"] > low["a"] + 3).all()
    with pytest.raises(ValueError, match=r"now missing:\n- dose"):
        model.predict(asked.drop(columns="dose"))
    # A row of a history may lack values, and not covariates.
    with pytest.raises(ValueError, match="covariate 'dose' is missing"):
        model.predict(asked, history=frame.assign(dose=np.nan))
    assert model.predict(asked[["dose", "age", "t", "who"]]).equals(high)


def test_intensities_are_per_day_or_unit_of_numbers(poisson):
    rates = poisson.intensity(AHEAD)
    assert rates.name == "intensity" and (rates > 0).all()
    days = PANEL.assign(t=pd.Timestamp("2024") + pd.to_timedelta(PANEL["t"], unit="D"))
    model = clone(poisson).set_params(trend=None, seasonality=None)
    numbers = fitted(clone(model), X, Y).intensity(AHEAD)
    stamped = fitted(model, days[["who", "t"]], Y).intensity(
        AHEAD.assign(t=pd.Timestamp("2024") + pd.to_timedelta(AHEAD["t"], unit="D"))
    )
    np.testing.assert_allclose(stamped, numbers, rtol=1e-3)


def test_there_is_no_intensity_without_event_times(panel):
    with pytest.raises(ValueError, match="event_times='poisson'"):
        panel.intensity(AHEAD)


# ------------------------------------------------------------- scikit-learn's tools


def test_grid_search_with_groups():
    grid = {"rtol": [1e-1, 1e-3], "solver": ["dopri5", "tsit5"]}
    model = forecaster(time="t", series="who")
    search = GridSearchCV(model, grid, cv=GroupKFold(3), error_score="raise")
    search.fit(X, Y, groups=X["who"])
    scores = search.cv_results_["mean_test_score"]
    assert np.isfinite(scores).all() and len(set(scores)) == 4
    alone = fitted(clone(model).set_params(**search.best_params_), X, Y)
    assert np.array_equal(search.predict(AHEAD), alone.predict(AHEAD))


@pytest.mark.parametrize("scoring", [None, "neg_mean_absolute_error"])
def test_splits_in_time(scoring):
    whole = RECORD.dropna()
    times = whole.index.to_frame(name="time")
    for y in (whole, whole["a"]):
        scores = cross_val_score(
            forecaster(),
            times.drop(columns="time").assign(c=1.0),
            y,
            cv=TimeSeriesSplit(2),
            scoring=scoring,
            error_score="raise",
        )
        assert np.isfinite(scores).all()


def test_scikit_learns_scorers_of_groups():
    with pytest.warns(SolverWarning, match="forecast is from the prior"):
        scores = cross_val_score(
            forecaster(time="t", series="who"),
            X,
            Y["a"],
            groups=X["who"],
            cv=GroupKFold(2),
            scoring="neg_mean_absolute_error",
            error_score="raise",
        )
    assert np.isfinite(scores).all()


def test_cross_validated_predictions():
    whole = RECORD.dropna()
    index = pd.DataFrame(index=whole.index)
    found = cross_val_predict(forecaster(), index.assign(c=0.0), whole, cv=3)
    assert found.shape == whole.shape and np.isfinite(found).all()


def test_in_a_pipeline_behind_a_scaler_that_keeps_the_index():
    covariates = pd.DataFrame({"c": np.arange(len(RECORD)) * 7.0}, index=RECORD.index)
    scaler = StandardScaler().set_output(transform="pandas")
    model = make_pipeline(scaler, forecaster())
    model = fitted(model, covariates, RECORD)
    found = model.predict(pd.DataFrame({"c": [1.0, 2, 3]}, index=LATER))
    assert found.index.equals(LATER) and list(found.columns) == ["a", "b"]
    plain = make_pipeline(StandardScaler(), forecaster(time="when"))
    with pytest.raises(ValueError, match=r"set_output\(transform=\"pandas\"\)"):
        plain.fit(covariates, RECORD)


# ------------------------------------------------------------------------- round trips


@pytest.mark.gpu
@pytest.mark.parametrize("encoder", ["gru", "ode_rnn"])
@pytest.mark.parametrize("windows", [{}, {"context": 2.0, "seasonality": [3.0]}])
def test_a_forecaster_of_a_gpu_is_that_of_the_cpu(encoder, windows):
    model = forecaster(
        time="t",
        series="who",
        encoder=encoder,
        event_times="poisson",
        dtype="float64",
        **windows,
    )
    gpu, cpu = (
        fitted(clone(model).set_params(device=device), X, Y)
        for device in ("cuda", "cpu")
    )
    assert next(gpu.module_.parameters()).device.type == "cuda"
    np.testing.assert_allclose(gpu.loss_curve_, cpu.loss_curve_, rtol=1e-6)
    loaded = pickle.loads(pickle.dumps(gpu)).set_params(device="cpu")
    assert next(loaded.module_.parameters()).device.type == "cpu"
    for other in (gpu, loaded):
        for ours, theirs in zip(
            every_answer(other, AHEAD, None),
            every_answer(cpu, AHEAD, None),
            strict=True,
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
        assert other.score(X, Y) == pytest.approx(cpu.score(X, Y), rel=1e-6)
    np.testing.assert_allclose(gpu.score_samples(X, Y), cpu.score_samples(X, Y))


@pytest.mark.gpu
def test_a_forecaster_without_a_path_and_one_that_is_watched_run_on_a_gpu():
    for path in (True, False):
        model = fitted(forecaster(device="cuda", path=path), RECORD)
        assert np.isfinite(model.predict(LATER)).all(axis=None)
        assert np.isfinite(model.score(RECORD))
    frame = waves(60, 6)
    model = forecaster(time="t", series="who", device="cuda", warm_start=True)
    for _ in range(2):
        fitted(model, frame[["who", "t"]], frame[["a", "b"]])
        assert np.isfinite(model.predict(AHEAD)).all(axis=None)


def test_a_clone_is_unfitted_and_fits_the_same(panel):
    copy = clone(panel)
    assert not hasattr(copy, "module_") and copy.get_params() == panel.get_params()
    assert np.array_equal(weights_of(fitted(copy, X, Y)), weights_of(panel))


def test_pickled_it_answers_the_same(poisson, tmp_path):
    joblib.dump(poisson, tmp_path / "model.joblib")
    loaded = joblib.load(tmp_path / "model.joblib")
    for copy in (loaded, pickle.loads(pickle.dumps(poisson))):
        for ours, theirs in zip(
            every_answer(copy, AHEAD, None),
            every_answer(poisson, AHEAD, None),
            strict=True,
        ):
            assert np.array_equal(ours, theirs)
        assert copy.score(X, Y) == poisson.score(X, Y)
        assert copy.loss_curve_ == poisson.loss_curve_


@pytest.mark.parametrize("event_times", [None, "poisson"])
def test_the_seed_decides_everything(event_times):
    make = forecaster(time="t", series="who", event_times=event_times)
    models = [
        fitted(clone(make).set_params(random_state=seed), X, Y) for seed in (0, 0, 1)
    ]
    assert np.array_equal(weights_of(models[0]), weights_of(models[1]))
    assert np.array_equal(models[0].predict(AHEAD), models[1].predict(AHEAD))
    assert not np.isclose(models[0].predict(AHEAD), models[2].predict(AHEAD)).all()
    fresh = [
        fitted(clone(make).set_params(random_state=None, max_iter=1), X, Y)
        for _ in range(2)
    ]
    assert not np.array_equal(*map(weights_of, fresh))


def test_a_fit_and_a_forecast_leave_the_global_generators_alone():
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    model = fitted(forecaster(time="t", series="who", max_iter=1), X, Y)
    model.predict(AHEAD)
    model.sample_paths(AHEAD)
    assert torch.equal(torch.rand(3), wanted)


def test_threads_change_nothing():
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            model = fitted(forecaster(time="t", series="who", max_iter=1), X, Y)
            found.append(model.predict(AHEAD))
    finally:
        torch.set_num_threads(before)
    np.testing.assert_allclose(*found, rtol=1e-4)


@pytest.mark.parametrize(
    "params",
    [{"rtol": 1e-6}, {"solver": "rk4", "step_size": 0.05}, {"n_paths": 64}],
    ids=lambda params: "-".join(params),
)
def test_how_to_solve_may_be_changed_after_a_fit(panel, params):
    model = pickle.loads(pickle.dumps(panel)).set_params(**params)
    found, plain = model.predict(AHEAD), panel.predict(AHEAD)
    assert not np.array_equal(found, plain)
    np.testing.assert_allclose(found, plain, rtol=0.2, atol=0.2)


def test_parameters_of_the_next_fit_do_not_disturb_this_one(panel):
    model = pickle.loads(pickle.dumps(panel))
    model.set_params(latent_dim=5, encoder="ode_rnn", noise="constant", trend=None)
    assert np.array_equal(model.predict(AHEAD), panel.predict(AHEAD))


def test_a_refit_begins_anew(panel):
    model = fitted(forecaster(), RECORD)
    model.observe(RECORD)
    model.set_params(**panel.get_params())
    assert np.array_equal(weights_of(fitted(model, X, Y)), weights_of(panel))
    assert np.array_equal(model.predict(AHEAD), panel.predict(AHEAD))
    assert list(model.feature_names_in_) == ["who", "t"]


# ---------------------------------------------------------------- warm starts, ends


def test_warm_start_goes_on():
    model = forecaster(time="t", series="who", warm_start=True, max_iter=10)
    module, first = fitted(model, X, Y).module_, model.loss_curve_
    fitted(model, X, Y)
    assert model.module_ is module
    assert np.mean(model.loss_curve_) < np.mean(first)
    model.set_params(warm_start=False)
    fitted(model, X, Y)
    assert model.module_ is not module
    np.testing.assert_allclose(model.loss_curve_, first)


@pytest.mark.parametrize(
    "params",
    [
        {"hidden_layer_sizes": (9,)},
        {"latent_dim": 4},
        {"encoder": "ode_rnn"},
        {"noise": "constant"},
        {"event_times": "poisson"},
        {"standardize": False},
        {"trend": "linear"},
        {"context": 1.0},
    ],
    ids=lambda params: "-".join(params),
)
def test_a_model_is_continued_in_its_shape(params):
    model = forecaster(time="t", series="who", warm_start=True, max_iter=1)
    before = fitted(model, X, Y).predict(AHEAD)
    original = {name: model.get_params()[name] for name in params}
    model.set_params(**params)
    with pytest.raises(ValueError, match=f"^{next(iter(params))} cannot change"):
        model.fit(X.iloc[:30], Y.iloc[:30])
    model.set_params(**original)
    assert np.array_equal(model.predict(AHEAD), before)
    with pytest.raises(ValueError, match="channels cannot change"):
        model.fit(X, Y[["a"]])
    stamped = X.assign(t=pd.to_datetime(X["t"], unit="D"))
    with pytest.raises(ValueError, match="times cannot change"):
        model.fit(stamped, Y)
    assert np.array_equal(model.predict(AHEAD), before)


def test_a_fit_that_is_refused_changes_nothing(panel):
    model = pickle.loads(pickle.dumps(panel))
    for wrong in (
        {"context": "7D"},
        {"horizon": -1.0},
        {"seasonality": [0.0]},
        {"decoder_layer_sizes": (0,)},
        {"solver": "dopri55"},
        {"latent_dim": 0},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}|method|solver"):
            clone(panel).set_params(**wrong).fit(X, Y)
        with pytest.raises(ValueError):
            model.set_params(**wrong).fit(X.iloc[:40], Y.iloc[:40])
        model.set_params(**panel.get_params())
        assert np.array_equal(model.predict(AHEAD), panel.predict(AHEAD))


def stopped_by(error, calls):
    """Return an objective that raises an error from so many batches on."""

    class Stopped(room.LatentObjective):
        def __call__(self, rows):
            if self.calls >= calls:
                raise error
            return super().__call__(rows)

    return Stopped


def test_an_interrupted_fit_keeps_its_best_weights(monkeypatch):
    model = forecaster(time="t", series="who", max_iter=50, batch_size=300)
    monkeypatch.setattr(room, "LatentObjective", stopped_by(KeyboardInterrupt, 10))
    with pytest.warns(SolverWarning, match="Interrupted after 10 epochs"):
        model.fit(X, Y)
    assert model.n_iter_ == 10 and len(model.loss_curve_) == 10
    assert np.isfinite(model.predict(AHEAD)).all(axis=None)
    assert not model.module_.training
    monkeypatch.setattr(room, "LatentObjective", stopped_by(KeyboardInterrupt, 0))
    with pytest.raises(KeyboardInterrupt):
        model.fit(X, Y)


def test_a_fit_that_diverges_says_so_and_keeps_its_best_weights(monkeypatch):
    broken = FloatingPointError("The loss is not finite.")
    monkeypatch.setattr(room, "LatentObjective", stopped_by(broken, 10))
    model = forecaster(time="t", series="who", max_iter=50, batch_size=300)
    with pytest.raises(DivergenceError, match="lower learning_rate_init"):
        model.fit(X, Y)
    assert model.n_iter_ == 10
    assert np.isfinite(model.predict(AHEAD)).all(axis=None)


def test_a_loss_that_is_not_finite_once_is_recovered_from(monkeypatch):
    class Once(room.LatentObjective):
        def __call__(self, rows):
            loss = super().__call__(rows)
            return loss * np.nan if self.calls == 5 else loss

    monkeypatch.setattr(room, "LatentObjective", Once)
    model = forecaster(time="t", series="who", max_iter=10, batch_size=300)
    with pytest.warns(SolverWarning, match="went back to its best weights once"):
        model.fit(X, Y)
    assert model.n_iter_ == 9 and np.isfinite(model.loss_curve_).all()
    assert np.isfinite(model.predict(AHEAD)).all(axis=None)


def test_a_learning_rate_that_is_too_high_is_recovered_from_or_told():
    model = forecaster(time="t", series="who", learning_rate_init=1e3, max_iter=6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SolverWarning)
        try:
            fitted(model, X, Y)
        except DivergenceError:
            return
    try:
        assert np.isfinite(model.predict(AHEAD)).all(axis=None)
    except SolverError as error:
        assert "rows" in str(error)


@pytest.mark.filterwarnings("error::sklearn.exceptions.ConvergenceWarning")
def test_it_warns_where_it_has_not_converged_and_only_there():
    model = forecaster(time="t", series="who", max_iter=20, tol=1e-9)
    with pytest.warns(ConvergenceWarning, match="ended at max_iter=20") as caught:
        model.fit(X, Y)
    assert caught[0].filename == __file__
    model.set_params(tol=0.0).fit(X, Y)


def test_many_series_are_watched_on_some_of_them():
    frame = waves(60, 6)
    model = forecaster(time="t", series="who", max_iter=4)
    fitted(model, frame[["who", "t"]], frame[["a", "b"]])
    assert len(model.validation_scores_) == model.n_iter_ == 4
    assert model.best_validation_score_ == max(model.validation_scores_)
    model.set_params(early_stopping=False)
    fitted(model, frame[["who", "t"]], frame[["a", "b"]])
    assert model.validation_scores_ is None


def test_a_long_record_is_watched_on_its_end():
    model = forecaster(path=True)
    assert len(fitted(model, RECORD).validation_scores_) == 3
    assert fitted(model, RECORD.iloc[:40]).validation_scores_ is None
    model.set_params(early_stopping=False)
    assert fitted(model, RECORD).validation_scores_ is None


# ----------------------------------------------------------------------------- windows


def test_windows_are_as_asked_for():
    model = forecaster(context="10D", horizon=pd.Timedelta(days=2), trend="level")
    model = fitted(model.set_params(seasonality=["1D", "7D"]), RECORD)
    day = 86400.0
    windows = model.windows_
    assert windows.context == 10 * day and windows.horizon == 2 * day
    assert windows.trend == "level" and windows.periods == (day, 7 * day)
    numbers = RECORD.set_axis(np.arange(80.0))
    model = forecaster(context=10, horizon=2.5, seasonality=np.array([3.0, 4.0]))
    windows = fitted(model, numbers).windows_
    assert (windows.context, windows.horizon) == (10, 2.5)
    assert windows.periods == (3, 4)


def test_only_the_context_counts():
    model = fitted(forecaster(context="10D"), RECORD)
    recent = RECORD[RECORD.index >= RECORD.index[-1] - pd.Timedelta("10D")]
    whole = model.predict(LATER)
    pd.testing.assert_frame_equal(model.predict(LATER, history=recent), whole)
    shorter = RECORD[RECORD.index >= RECORD.index[-1] - pd.Timedelta("5D")]
    found = model.predict(LATER, history=shorter)
    assert not np.isclose(found["a"], whole["a"]).any()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"context": 7}, "context=7 is a number, but X has stamps"),
        ({"horizon": "often"}, "horizon='often' is no span of time"),
        ({"context": "-1D"}, "context must be a span above 0"),
        ({"seasonality": ["1D", "0D"]}, "seasonality must be a span above 0"),
    ],
)
def test_spans_that_are_none_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        forecaster(**params).fit(RECORD)


def test_spans_of_numbers_are_numbers():
    with pytest.raises(ValueError, match="context='7D' must be a number"):
        forecaster(time="t", series="who", context="7D").fit(X, Y)


def test_few_windows_are_no_reason_for_a_path():
    line = pd.Series(np.arange(40.0), index=pd.Index(np.arange(40.0), name="t"))
    line += np.random.default_rng(0).standard_normal(40)
    short = {"context": 10.0, "horizon": 10.0, "trend": "linear"}
    model = fitted(forecaster(**short), line)
    assert not model.has_path_ and model.loss_curve_ == []
    later = pd.Index([45.0, 60.0], name="t")
    mean, std = model.predict(later, return_std=True)
    np.testing.assert_allclose(mean, later, atol=8)
    assert std.iloc[1] > std.iloc[0] > 0
    dose = pd.DataFrame({"dose": 1.0}, index=line.index)
    assert fitted(forecaster(**short, path=True), line).has_path_
    assert fitted(forecaster(**short, event_times="poisson"), line).has_path_
    assert fitted(forecaster(**short), dose, line).has_path_
    with pytest.raises(ValueError, match="event_times='poisson' needs a path"):
        forecaster(**short, path=False, event_times="poisson").fit(line)


def test_a_path_may_follow_a_fit_without_one():
    model = forecaster(path=False, trend="linear", warm_start=True)
    plain = fitted(model, RECORD).predict(LATER)
    with pytest.raises(ValueError, match="path cannot change"):
        model.set_params(path=True).fit(RECORD)
    model.set_params(warm_start=False)
    assert not np.isclose(fitted(model, RECORD).predict(LATER), plain).all()


@pytest.mark.parametrize("path", [True, False])
def test_a_season_is_found_and_continued(path):
    days = np.arange(0, 24, 0.25)
    index = pd.Timestamp("2024-01-01") + pd.to_timedelta(days, unit="D")
    week = pd.DataFrame({"a": 10 + 3 * np.sin(2 * np.pi * days / 7)}, index=index)
    model = fitted(forecaster(max_iter=2, path=path), week)
    assert model.has_path_ == path
    assert 7 * 86400.0 in model.windows_.periods
    later = days[-1] + np.arange(1, 8)
    found = model.predict(index[0] + pd.to_timedelta(later, unit="D"))["a"]
    wanted = 10 + 3 * np.sin(2 * np.pi * later / 7)
    np.testing.assert_allclose(found, wanted, atol=1.0)


def test_without_a_path_short_histories_are_as_uncertain_as_the_values_are():
    times = np.arange(40.0)
    values = 5 + 2 * np.random.default_rng(0).normal(size=40)
    model = forecaster(path=False, trend="linear", context=30.0, series=0, time=1)
    fitted(model, np.c_[0 * times, times], values)
    _, std = model.predict([[1, 20.0]], return_std=True, history=[[1, 0.0, 5.0]])
    assert 0.5 * values.std() < std[0] < 2 * values.std()
    with pytest.warns(SolverWarning, match="prior"):
        mean, std = model.predict([[1, 20.0]], return_std=True)
    assert mean[0] == pytest.approx(values.mean(), abs=0.2)
    assert std[0] == pytest.approx(values.std(), rel=0.1)


def test_a_warm_start_keeps_what_was_decided_about_the_path():
    times = np.arange(300.0)
    values = 0.1 * times + np.sin(times / 5)
    cut = {"trend": "linear", "context": 20.0, "horizon": 5.0}
    model = forecaster(**cut, max_iter=2, warm_start=True)
    fitted(model, times[:60, None], values[:60])
    assert not model.has_path_
    fitted(model, times[:, None], values)  # of these alone, a path would be learned
    assert not model.has_path_
    assert model.module_.muted
    assert fitted(clone(model), times[:, None], values).has_path_


def test_short_windows_of_a_long_record_keep_their_gaps():
    minutes = np.arange(30_000.0)
    X = 1e9 + 60 * np.concatenate([minutes[:20], 1e9 + minutes])[:, None]
    model = forecaster(context=3600.0, horizon=600.0, trend=None, path=True)
    fitted(model.set_params(max_iter=1), X, np.sin(X[:, 0] / 600))
    panel = pieces_of(
        model,
        list(model.histories_.values()),
        model.units_,
        model.windows_,
        torch.device("cpu"),
        torch.float32,
        torch.Generator().manual_seed(0),
    )
    piece = panel.cutter.cut(torch.zeros(4, dtype=torch.long), 1.0)
    assert piece.batch.times.dtype == torch.float32
    gaps = 60 * torch.diff(piece.batch.times)[piece.batch.present[:, 1:]]
    torch.testing.assert_close(gaps, torch.ones_like(gaps), rtol=1e-3, atol=0)


def test_the_intensity_of_a_long_record_counts_all_of_its_rows():
    times = np.sort(np.random.default_rng(0).uniform(0, 1000, size=3000))
    model = forecaster(
        context=300.0, horizon=60.0, trend=None, event_times="poisson", max_iter=8
    )
    model.set_params(learning_rate_init=0.05)
    fitted(model, times[:, None], np.zeros(3000))
    np.testing.assert_allclose(model.intensity([[990.0], [1040.0]]), 3.0, rtol=0.3)


def test_ends_where_nothing_was_observed_are_not_watched():
    times = np.arange(80.0)
    values = np.where(times < 50, np.sin(times / 4), np.nan)
    model = forecaster(early_stopping=True, trend=None, path=True, max_iter=3)
    assert fitted(model, times[:, None], values).validation_scores_ is None


def test_times_beyond_the_range_of_floats_are_refused():
    times = np.arange(40.0)[:, None]
    for path in (True, False):
        model = forecaster(trend="linear", path=path, context=20.0, max_iter=1)
        fitted(model, times, np.sin(times[:, 0]))
        with pytest.raises(ValueError, match="there is no answer there"):
            model.predict([[1e300]])
        assert path or np.isfinite(model.predict([[1e30]])).all()


def test_times_before_a_record_are_answered_from_its_first_span():
    times = np.arange(100.0)
    model = forecaster(trend="level", path=False, context=20.0)
    fitted(model, times[:, None], np.where(times <= 20.0, 1.0, 5.0))
    alone = fitted(clone(model), times[:21, None], np.ones(21))
    assert alone.predict([[-1.0]]) == pytest.approx(1.0, abs=1e-3)
    for time in (-50.0, -1.0, 0.5):
        assert model.predict([[time]]) == pytest.approx(1.0, abs=1e-3)
    _, questions = model._questions(np.array([[-50.0], [-1.0]]), None)
    assert [len(question.context) for question in questions] == [21]


def test_many_channels_have_draws_of_their_own():
    times = np.arange(30.0)[:, None]
    values = np.random.default_rng(0).normal(size=(30, 900))
    model = forecaster(path=False, trend="linear", context=20.0, n_paths=4)
    fitted(model.set_params(seasonality=[3.0, 7.0, 11.0]), times, values)
    noise = model._noise(4)
    assert noise.shape == (4, model.module_.noise_width)
    assert noise.shape[1] > 22_000 and len(noise[0].unique()) > 21_000
    mean, std = model.predict([[31.0]], return_std=True)
    assert mean.shape == (1, 900) and (std > 0).all()


def test_without_a_path_no_net_is_asked():
    times = np.arange(40.0)[:, None]
    model = forecaster(path=False, trend="linear", context=20.0)
    fitted(model, times, np.sin(times[:, 0]))
    answers = [model.predict([[45.0]]), model.sample_paths([[45.0]], 3, random_state=0)]
    with torch.no_grad():
        for part in (model.module_.recognition, model.module_.decoder):
            for param in part.parameters():
                param.fill_(np.nan)
    again = [model.predict([[45.0]]), model.sample_paths([[45.0]], 3, random_state=0)]
    for before, after in zip(answers, again, strict=True):
        np.testing.assert_array_equal(after, before)


def test_a_solve_that_fails_names_the_series_and_when():
    rng = np.random.default_rng(0)
    X = pd.DataFrame({"who": list("aabb") * 6, "t": rng.uniform(0, 9, size=24)})
    y = pd.Series(rng.normal(size=24), name="v")
    model = forecaster(time="t", series="who", max_iter=1, path=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(X, y)
    model.set_params(max_steps=1, rtol=1e-12)
    with pytest.raises(
        SolverError, match=r"Paths of series '[ab]', '[ab]' reached max_steps"
    ):
        model.predict(X)


def test_levels_of_an_interval_are_not_off_by_rounding():
    frame = fitted(forecaster(), RECORD).predict_interval(RECORD.index[:1], 0.9)
    assert frame.columns.get_level_values("quantile").unique().tolist() == [0.05, 0.95]
