"""Inputs that nobody would think of: each gets an answer, or an error that helps."""

import warnings

import numpy as np
import pandas as pd
import pytest
from sklearn.exceptions import ConvergenceWarning

from skode.exceptions import SolverError
from tests.panels import forecaster, record, waves

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

PANEL = waves(4, 8)
RECORD = record(30)
LATER = RECORD.index[-1] + pd.to_timedelta(["7min", "3h", "2D"])
EITHER = pytest.mark.parametrize("path", [True, False], ids=["path", "trend"])


def fitted(model, *data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(*data)


def model_of(**params):
    return forecaster(time="t", series="who", max_iter=2, **params)


def rows_of(frame):
    return frame[["who", "t"]], frame[["a", "b"]]


def assert_answers(model, X, *seen, history=None):
    """Look for numbers in every answer of a forecaster."""
    mean, std = model.predict(X, return_std=True, history=history)
    levels = model.predict_quantiles(X, [0.05, 0.95], history=history)
    paths = model.sample_paths(X, 3, history=history, random_state=0)
    for part in (mean, std, levels, paths):
        assert np.isfinite(np.asarray(part)).all()
    assert (np.asarray(std) > 0).all()
    levels = np.asarray(levels).reshape(len(std), -1, 2)
    assert (levels[..., 0] < levels[..., 1]).all()
    if seen:
        assert np.isfinite(model.score(*seen))
        assert np.isfinite(model.score_samples(*seen)).all()
    return mean


# Few rows, and few values


@EITHER
@pytest.mark.parametrize("n_rows", [1, 2, 3])
def test_a_record_of_a_few_rows(n_rows, path):
    few = RECORD.dropna().iloc[:n_rows]
    model = fitted(forecaster(max_iter=2, path=path), few)
    mean = assert_answers(model, few.index[-1] + pd.to_timedelta(["0s", "1h", "9D"]))
    if n_rows == 1:
        np.testing.assert_allclose(mean, np.tile(few, (3, 1)), atol=4)


@EITHER
def test_series_of_one_observation_each(path):
    single = PANEL.dropna().groupby("who").head(1)
    model = fitted(model_of(path=path), *rows_of(single))
    assert_answers(model, PANEL[["who", "t"]], *rows_of(PANEL))


@EITHER
def test_a_series_of_one_observation_among_others(path):
    frame = pd.concat([PANEL, pd.DataFrame({"who": ["x"], "t": [1.0], "a": [2.0]})])
    model = fitted(model_of(path=path), *rows_of(frame))
    asked = pd.DataFrame({"who": ["x", "s1", "x"], "t": [1.0, 7.0, 9.0]})
    assert_answers(model, asked, *rows_of(frame))


@EITHER
def test_a_channel_that_a_series_never_observed(path):
    frame = PANEL.assign(b=PANEL["b"].where(PANEL["who"] != "s1"))
    model = fitted(model_of(path=path), *rows_of(frame))
    assert_answers(model, frame[["who", "t"]], *rows_of(frame))


@EITHER
def test_a_channel_that_was_never_observed(path):
    frame = PANEL.assign(b=np.nan)
    model = fitted(model_of(path=path), *rows_of(frame))
    assert_answers(model, frame[["who", "t"]], *rows_of(frame))


@EITHER
def test_a_history_without_a_value(path):
    model = fitted(model_of(path=path), *rows_of(PANEL))
    nothing = pd.DataFrame({"who": ["n"], "t": [1.0], "a": [np.nan], "b": [np.nan]})
    asked = pd.DataFrame({"who": ["n", "n"], "t": [1.0, 2.0]})
    assert_answers(model, asked, history=nothing)


def test_an_empty_context_is_refused():
    model = fitted(model_of(), *rows_of(PANEL))
    with pytest.raises(ValueError, match="minimum of 1"):
        model.predict(PANEL[["who", "t"]], history=PANEL.iloc[:0])
    with pytest.raises(ValueError, match="minimum of 1"):
        model.predict(PANEL[["who", "t"]].iloc[:0])
    with pytest.raises(ValueError, match="minimum of 1"):
        model_of().fit(*rows_of(PANEL.iloc[:0]))


def test_nothing_observed_at_all_is_refused():
    with pytest.raises(ValueError, match="NaN only: nothing was observed"):
        fitted(model_of(), PANEL[["who", "t"]], PANEL[["a", "b"]] * np.nan)


@EITHER
@pytest.mark.parametrize("value", [0.0, 7.0, 1e9])
def test_a_constant_channel(value, path):
    frame = PANEL.assign(b=value)
    model = fitted(model_of(path=path), *rows_of(frame))
    mean = assert_answers(model, frame[["who", "t"]], *rows_of(frame))
    assert (mean["b"] - value).abs().max() < 3 + 1e-6 * value


# Times


@EITHER
@pytest.mark.parametrize("windows", [{}, {"context": 2.0}, {"horizon": 1.0}])
def test_all_times_are_equal(path, windows):
    frame = PANEL.assign(t=3.0)
    model = fitted(model_of(path=path, **windows), *rows_of(frame))
    asked = pd.DataFrame({"who": ["s0", "s1", "s1"], "t": [3.0, 3.0, 4.0]})
    assert_answers(model, asked)
    assert np.isfinite(model.score_samples(*rows_of(frame))).all()
    # What is left of a series is one row, and nothing comes after it.
    with pytest.raises(ValueError, match="nothing to score"):
        model.score(*rows_of(frame))


def test_duplicated_stamps_count_once_as_their_mean():
    doubled = pd.concat(
        [PANEL.assign(a=PANEL["a"] + 1), PANEL.assign(a=PANEL["a"] - 1)]
    )
    model = fitted(model_of(), *rows_of(doubled))
    plain = fitted(model_of(), *rows_of(PANEL))
    asked = PANEL[["who", "t"]]
    np.testing.assert_allclose(model.predict(asked), plain.predict(asked), rtol=1e-4)
    assert_answers(model, doubled[["who", "t"]], *rows_of(doubled))


@EITHER
def test_one_and_ten_thousand_observations_in_one_batch(path):
    rng = np.random.default_rng(0)
    long = pd.DataFrame({"who": "long", "t": np.sort(rng.uniform(0, 6, 10_000))})
    long["a"], long["b"] = np.sin(long["t"]), rng.standard_normal(10_000)
    frame = pd.concat([long, PANEL.iloc[:1], PANEL.iloc[8:]])
    small = {"max_iter": 1, "batch_size": 256}
    model = model_of(path=path).set_params(**small)
    model = fitted(model, *rows_of(frame))
    asked = pd.DataFrame({"who": ["long", "s0", "s1"], "t": [7.0, 7.0, 7.0]})
    assert_answers(model, asked)
    assert np.isfinite(model.score(*rows_of(frame)))


@EITHER
@pytest.mark.parametrize("far", [1e2, -1e2, 1e4, -1e4, 1e30, -1e30])
def test_times_far_beyond_are_answered_or_refused(far, path):
    model = fitted(model_of(path=path), *rows_of(PANEL))
    asked = pd.DataFrame({"who": ["s0", "s1"], "t": [far, 6.5]})
    try:
        mean, std = model.predict(asked, return_std=True)
    except SolverError as error:
        assert "of" in str(error) and abs(far) > 1e3
        return
    assert np.isfinite(mean).all(axis=None) and np.isfinite(std).all(axis=None)
    near = model.predict(asked.iloc[1:])
    np.testing.assert_allclose(mean.iloc[1:], near, rtol=1e-4)


@pytest.mark.parametrize("unit", ["ns", "us"])
def test_nanoseconds_between_rows(unit):
    start = pd.Timestamp("2024-01-01")
    index = start + pd.to_timedelta(np.arange(30) * 5, unit=unit)
    frame = pd.DataFrame({"a": np.sin(np.arange(30.0))}, index=index)
    model = fitted(forecaster(max_iter=2), frame)
    later = index[-1] + pd.to_timedelta([1, 20], unit=unit)
    slow = pd.Index(np.arange(30.0) * 5)
    wanted = fitted(forecaster(max_iter=2), frame.set_axis(slow))
    found = assert_answers(model, later)
    expected = wanted.predict(pd.Index([146.0, 165.0]))
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_centuries_between_rows():
    years = [1700, 1750, 1800, 1900, 2000, 2100, 2200]
    index = pd.DatetimeIndex([f"{year}-06-01" for year in years])
    frame = pd.DataFrame({"a": np.arange(7.0)}, index=index)
    assert_answers(fitted(forecaster(max_iter=2), frame), pd.DatetimeIndex(["2250"]))
    numbers = frame.set_axis(pd.Index(np.array(years) * 1e9))
    model = fitted(forecaster(max_iter=2), numbers)
    assert_answers(model, pd.Index([2.25e12]))
    with pytest.raises(ValueError, match="1677 to 2262"):
        model.fit(frame.set_axis(index.as_unit("s") + pd.Timedelta(days=365 * 300)))


def test_integers_too_large_for_floats_are_refused():
    large = 2**60 + np.arange(30)
    with pytest.raises(ValueError, match=r"beyond 2\*\*53"):
        fitted(forecaster(), pd.DataFrame({"a": np.arange(30.0)}, index=large))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.set_axis([pd.NaT, *f.index[1:]]), "contains NaT"),
        (lambda f: f.reset_index(drop=True), "its index only counts rows"),
        (lambda f: f.set_axis(f.index.astype(str)), "parse them first"),
        (lambda f: f.assign(a=np.inf), "infinity"),
        (lambda f: f.assign(a="high"), "must hold numbers"),
    ],
    ids=["NaT", "counted", "strings", "infinity", "words"],
)
def test_what_is_wrong_is_told(change, message):
    with pytest.raises(ValueError, match=message):
        forecaster().fit(change(RECORD))
    model = fitted(forecaster(max_iter=1), RECORD)
    with pytest.raises(ValueError, match=message):
        model.observe(change(RECORD))
    with pytest.raises(ValueError, match=message):
        model.predict(LATER, history=change(RECORD))


def test_a_frame_without_columns_says_when_alone():
    bare = RECORD[[]]
    model = fitted(forecaster(max_iter=2), bare, RECORD)
    wanted = model.predict(bare)
    pd.testing.assert_frame_equal(model.predict(RECORD.index), wanted)
    pd.testing.assert_frame_equal(
        fitted(forecaster(max_iter=2), RECORD).predict(bare), wanted
    )
    with pytest.raises(ValueError, match="nothing to forecast"):
        forecaster().fit(bare)


# Values of all scales and kinds


@EITHER
def test_a_channel_of_a_billion_and_one_of_a_billionth(path):
    frame = PANEL.assign(a=PANEL["a"] * 1e9, b=PANEL["b"] * 1e-9)
    model = fitted(model_of(path=path), *rows_of(frame))
    plain = fitted(model_of(path=path), *rows_of(PANEL))
    asked = frame[["who", "t"]]
    found = assert_answers(model, asked, *rows_of(frame)) / [1e9, 1e-9]
    np.testing.assert_allclose(found, plain.predict(asked), rtol=1e-3, atol=1e-3)


def test_values_whose_variance_overflows_are_refused():
    with pytest.raises(ValueError, match="variance overflows: rescale"):
        model_of().fit(*rows_of(PANEL.assign(a=PANEL["a"] * 1e200)))


@pytest.mark.parametrize("kind", [bool, "int8", "Int64", "float32", "boolean", object])
def test_channels_of_every_kind_of_number(kind):
    frame = PANEL.assign(a=(PANEL["a"] > 0).astype(kind))
    model = fitted(model_of(), *rows_of(frame))
    mean = assert_answers(model, frame[["who", "t"]], *rows_of(frame))
    plain = frame.assign(a=frame["a"].astype(float))
    wanted = fitted(model_of(), *rows_of(plain)).predict(frame[["who", "t"]])
    assert np.array_equal(mean, wanted) and set(mean.dtypes) == {np.dtype(float)}


@pytest.mark.parametrize(
    "make",
    [
        lambda y: y["a"],
        lambda y: y[["a"]],
        lambda y: y["a"].to_numpy(),
        lambda y: y["a"].tolist(),
        lambda y: y.to_numpy().tolist(),
    ],
    ids=["series", "frame", "array", "list", "lists"],
)
def test_y_of_every_kind(make):
    X, y = rows_of(PANEL)
    model = fitted(model_of(), X, make(y))
    found = model.predict(X)
    assert isinstance(found, type(make(y))) or isinstance(make(y), list)
    assert_answers(model, X, X, make(y))


@pytest.mark.parametrize(
    "kind", [object, "category", "string", "integers", "categories"]
)
def test_names_of_series_of_every_kind(kind):
    codes = PANEL["who"].str[1:].astype(int)
    others = {"integers": codes, "categories": codes.astype("category")}
    who = others[kind] if kind in others else PANEL["who"].astype(kind)
    frame = PANEL.assign(who=who)
    model = fitted(model_of(), *rows_of(frame))
    plain = fitted(model_of(), *rows_of(PANEL)).predict(PANEL[["who", "t"]])
    found = assert_answers(model, frame[["who", "t"]], *rows_of(frame))
    np.testing.assert_allclose(found, plain, rtol=1e-5)


def test_levels_in_the_other_order():
    frame = PANEL.assign(t=pd.Timestamp("2024") + pd.to_timedelta(PANEL["t"], unit="D"))
    frame = frame.set_index(["who", "t"])
    model = fitted(forecaster(max_iter=2), frame)
    turned = frame.swaplevel()
    again = fitted(forecaster(max_iter=2), turned)
    wanted = model.predict(frame)
    assert np.array_equal(again.predict(turned), wanted)
    assert np.array_equal(model.predict(turned), wanted)
    assert again.predict(turned).index.equals(turned.index)
