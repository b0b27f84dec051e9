"""What must not matter to a forecast: order, names, clocks, units and company."""

import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning

from tests.panels import forecaster, record, waves

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

PANEL = waves()
AHEAD = pd.DataFrame(
    {
        "who": ["s1", "s0", "s1", "s3", "s5", "s0"],
        "t": [6.5, 7.0, 6.1, 9.0, 2.5, -1.0],
    }
)
RECORD = record()
LATER = RECORD.index[-1] + pd.to_timedelta(["7min", "3h", "2D", "-5D", "-39D", "-60D"])
EPOCH = pd.Timestamp("2024-02-25 12:00")


def fitted(model, frame=PANEL, channels=("a", "b")):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(frame[["who", "t"]], frame[list(channels)])


def model_of(**params):
    return forecaster(time="t", series="who", **params)


@pytest.fixture(scope="module", params=["gru", "ode_rnn"])
def panel(request):
    """Return a forecaster of several series; no test may change it."""
    return fitted(model_of(encoder=request.param, event_times="poisson"))


def answers(model, asked, history=None):
    """Return all that is forecast of the rows, (n, K)."""
    found = [
        *model.predict(asked, return_std=True, history=history),
        model.predict_quantiles(asked, [0.1, 0.8], history=history),
    ]
    if model.event_times:
        found.append(model.intensity(asked, history=history))
    return np.column_stack(found)


# Fits


@pytest.mark.parametrize("seed", [0, 1])
def test_rows_may_come_in_any_order(panel, seed):
    shuffled = PANEL.sample(frac=1, random_state=seed)
    again = fitted(clone(panel), shuffled)
    assert np.array_equal(answers(again, AHEAD), answers(panel, AHEAD))
    seen = PANEL[["who", "t"]], PANEL[["a", "b"]]
    density = panel.score_samples(*seen)
    moved = again.score_samples(shuffled[["who", "t"]], shuffled[["a", "b"]])
    np.testing.assert_allclose(moved.loc[density.index], density, rtol=1e-4)
    assert again.score(*seen) == pytest.approx(panel.score(*seen))


@pytest.mark.parametrize(
    "names",
    [
        {f"s{k}": f"t{5 - k}" for k in range(6)},
        {f"s{k}": 10 - k for k in range(6)},
        {f"s{k}": (k % 2, "b" * k) for k in range(6)},
        {
            "s0": 1,
            "s1": "x",
            "s2": 2.5,
            "s3": pd.Timestamp("2024"),
            "s4": 4,
            "s5": b"5",
        },
    ],
    ids=["turned", "numbers", "tuples", "mixed"],
)
def test_names_of_series_change_nothing(panel, names):
    renamed = PANEL.assign(who=PANEL["who"].map(names))
    again = fitted(clone(panel), renamed)
    asked = AHEAD.assign(who=AHEAD["who"].map(names))
    np.testing.assert_allclose(
        answers(again, asked), answers(panel, AHEAD), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("shift", [1000.0, -3.5, 1e6])
def test_times_count_from_anywhere(panel, shift):
    again = fitted(clone(panel), PANEL.assign(t=PANEL["t"] + shift))
    moved = answers(again, AHEAD.assign(t=AHEAD["t"] + shift))
    np.testing.assert_allclose(moved, answers(panel, AHEAD), rtol=2e-3, atol=2e-3)


def test_stamps_may_lie_in_any_year():
    plain = forecaster().fit(RECORD)
    year = pd.Timedelta(days=365.0 * 200)
    moved = forecaster().fit(RECORD.set_axis(RECORD.index - year))
    assert np.array_equal(plain.predict(LATER), moved.predict(LATER - year))


@pytest.mark.parametrize("unit", [24.0, 86400.0, 1e-3, 1e12])
def test_the_unit_of_numbers_changes_nothing(panel, unit):
    again = fitted(clone(panel), PANEL.assign(t=PANEL["t"] * unit))
    found = answers(again, AHEAD.assign(t=AHEAD["t"] * unit))
    wanted = answers(panel, AHEAD)
    found[:, -1] *= unit  # intensities are per unit
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("unit", ["us", "ms", "s"])
def test_the_unit_of_stamps_changes_nothing(unit):
    whole = RECORD.set_axis(RECORD.index.floor("s"))
    plain, other = whole, whole.set_axis(whole.index.as_unit(unit))
    assert other.index.dtype != plain.index.dtype
    models = [forecaster().fit(frame) for frame in (plain, other)]
    asked = LATER.floor("s")
    wanted = models[0].predict(asked)
    assert np.array_equal(models[1].predict(asked), wanted)
    assert np.array_equal(models[1].predict(asked.as_unit(unit)), wanted)


def test_zones_change_nothing():
    naive = forecaster().fit(RECORD)
    # The record goes across the end of March, when clocks change.
    zoned = RECORD.tz_localize("UTC").tz_convert("Europe/Paris")
    assert zoned.index[0].utcoffset() != zoned.index[-1].utcoffset()
    model = forecaster().fit(zoned)
    wanted = naive.predict(LATER)
    for zone in ("UTC", "Europe/Paris", "America/New_York"):
        asked = LATER.tz_localize("UTC").tz_convert(zone)
        found = model.predict(asked)
        assert found.index.equals(asked) and np.array_equal(found, wanted)
    with pytest.raises(ValueError, match="naive stamps, but fit saw stamps in zone"):
        model.predict(LATER)
    with pytest.raises(ValueError, match="fit saw naive stamps"):
        naive.predict(LATER.tz_localize("UTC"))


def test_stamps_differences_and_periods_are_the_same_times():
    plain = forecaster().fit(RECORD)
    since = RECORD.set_axis(RECORD.index - EPOCH)
    wanted = plain.predict(LATER)
    assert np.array_equal(forecaster().fit(since).predict(LATER - EPOCH), wanted)
    hours = RECORD.groupby(RECORD.index.floor("h")).mean()
    periods = hours.set_axis(hours.index.to_period("h"))
    asked = LATER.floor("h")
    wanted = forecaster().fit(hours).predict(asked)
    found = forecaster().fit(periods).predict(asked.to_period("h"))
    assert np.array_equal(found, wanted)


def test_units_of_channels_change_nothing():
    plain = forecaster().fit(RECORD)
    scaled = forecaster().fit(RECORD * [1e9, 1e-9] + [0, 1e-6])
    wanted = plain.predict(LATER) * [1e9, 1e-9] + [0, 1e-6]
    found = scaled.predict(LATER)
    spread = wanted.std()
    assert ((found - wanted).abs() < 1e-3 * spread).all(axis=None)


def test_columns_come_back_as_in_fit(panel):
    turned = PANEL[["b", "t", "a", "who"]]
    wanted = answers(panel, AHEAD)
    found = panel.predict(AHEAD[["t", "who"]], history=turned)
    np.testing.assert_allclose(found, wanted[:, :2], rtol=1e-6)
    assert list(found.columns) == ["a", "b"]
    early = PANEL["t"] < 3
    models = []
    for columns in (["a", "b"], ["b", "a"]):
        model = pickle.loads(pickle.dumps(panel))
        model.histories_ = {}
        models.append(
            model.observe(PANEL.loc[early, ["who", "t"]], PANEL.loc[early, columns])
        )
    asked = AHEAD[AHEAD["t"] > 3]
    assert np.array_equal(answers(models[0], asked), answers(models[1], asked))
    density = [
        panel.score_samples(PANEL[["who", "t"]], PANEL[columns])
        for columns in (["a", "b"], ["b", "a"])
    ]
    assert density[0].equals(density[1])


def test_channels_swap_if_their_weights_do(panel):
    swapped = pickle.loads(pickle.dumps(panel))
    turned = fitted(clone(panel).set_params(max_iter=1), PANEL, ("b", "a"))
    swapped.layout_, swapped.units_ = turned.layout_, turned.units_
    swapped.histories_ = turned.histories_
    module = swapped.module_
    state = module.state_dict()
    inputs = state[
        "recognition.reader."
        + ("gru.weight_ih_l0" if panel.encoder == "gru" else "cell.weight_ih")
    ]
    inputs[:, [0, 1, 2, 3]] = inputs[:, [1, 0, 3, 2]]
    for name, value in state.items():
        if name.startswith("decoder"):
            value.copy_(value[[1, 0, 3, 2]])
        if name in ("log_noise", "residual.share", "residual.log_time"):
            value.copy_(value[[1, 0]])
    np.testing.assert_allclose(
        swapped.predict(AHEAD)[["a", "b"]], panel.predict(AHEAD), rtol=1e-5
    )


# Answers


def test_a_series_alone_is_forecast_as_among_others(panel):
    among = answers(panel, AHEAD)
    for row in range(len(AHEAD)):
        alone = answers(panel, AHEAD.iloc[[row]])
        np.testing.assert_allclose(alone[0], among[row], rtol=5e-5, atol=5e-5)
    alone = pickle.loads(pickle.dumps(panel))
    alone.histories_ = {"s1": panel.histories_["s1"]}
    asked = AHEAD["who"] == "s1"
    np.testing.assert_allclose(
        answers(alone, AHEAD[asked]), among[asked], rtol=5e-5, atol=5e-5
    )


def test_long_series_do_not_disturb_short_ones(panel):
    rng = np.random.default_rng(0)
    long = pd.DataFrame({"who": "long", "t": np.sort(rng.uniform(0, 6, 10_000))})
    long["a"] = long["b"] = rng.standard_normal(10_000)
    short = pd.DataFrame({"who": ["short"], "t": [5.0], "a": [1.0], "b": [np.nan]})
    asked = pd.DataFrame({"who": ["long", "short"], "t": [7.0, 7.0]})
    both = answers(panel, asked, pd.concat([long, short]))
    alone = answers(panel, asked.iloc[1:], short)
    np.testing.assert_allclose(both[1], alone[0], rtol=1e-5, atol=1e-5)
    assert np.isfinite(both).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_queries_may_come_in_any_order_and_twice(panel, seed):
    order = np.random.default_rng(seed).integers(0, len(AHEAD), 15)
    found = answers(panel, AHEAD.iloc[order])
    np.testing.assert_allclose(
        found, answers(panel, AHEAD)[order], rtol=1e-5, atol=1e-5
    )


def test_many_rows_are_answered_in_parts(panel, monkeypatch):
    whole = answers(panel, AHEAD)
    monkeypatch.setattr("skode.forecast._AT_ONCE", 500)
    np.testing.assert_allclose(answers(panel, AHEAD), whole, rtol=1e-5, atol=1e-5)


def test_the_past_is_interpolated():
    days = np.linspace(0, 10, 80)
    wave = pd.DataFrame({"a": np.sin(days)}, index=pd.Index(days, name="day"))
    model = forecaster(max_iter=25, context=5.0, learning_rate_init=0.03).fit(wave)
    middle = pd.Index((days[1:] + days[:-1]) / 2, name="day")
    found, std = model.predict(middle, return_std=True)
    assert np.abs(found["a"] - np.sin(middle)).mean() < 0.15
    _, ahead = model.predict(middle + 10, return_std=True)
    assert std["a"].mean() < ahead["a"].mean()


def test_before_the_first_observation_there_are_answers(panel):
    asked = AHEAD.assign(t=[-0.1, -1, -5, -20, -1e3, -2])
    found = answers(panel, asked)
    assert np.isfinite(found).all()
    # They do not depend on what else is asked; a thousand spans away, rounding shows.
    for row in (0, 1, 2, 3, 5):
        alone = answers(panel, asked.iloc[[row]])
        np.testing.assert_allclose(alone[0], found[row], rtol=1e-4, atol=1e-4)


def test_a_query_at_the_time_of_an_observation_is_near_it():
    model = fitted(model_of(max_iter=60, learning_rate_init=0.03))
    with torch.no_grad():
        model.module_.log_noise.fill_(-3.0)
    found = model.predict(PANEL[["who", "t"]])
    assert (found["a"] - PANEL["a"]).abs().mean() < 1.0
