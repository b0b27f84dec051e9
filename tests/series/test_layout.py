"""Every layout of X and y that users have, and what is said of the others."""

import pickle

import numpy as np
import pandas as pd
import polars
import pytest
import scipy.sparse
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.compose import make_column_transformer
from sklearn.model_selection import (
    GroupKFold,
    KFold,
    TimeSeriesSplit,
    cross_val_predict,
    cross_val_score,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from sklearn.utils.validation import check_is_fitted

from skode._series.layout import learn

NAN = np.nan
STAMPS = pd.DatetimeIndex(["2024-01-01", "2024-01-03", "2024-01-02"])
LATER = pd.DatetimeIndex(["2024-02-01", "2024-01-15"])
WIDE = pd.DataFrame({"a": [1.0, NAN, 3.0], "b": [4, 5, 6]}, index=STAMPS)
DAY = 86_400 * 10**9

LONG = pd.DataFrame(
    {
        "who": ["x", "y", "x", "y"],
        "when": [0.0, 1.0, 2.0, 0.5],
        "dose": [1, 2, 3, 4],
    }
)
SEEN = pd.DataFrame({"hr": [60, 70, NAN, 80], "bp": [NAN, 1, 2, 3]})
PANEL = LONG.set_index(["who", "when"])


def panel(frame):
    """Return a frame of LONG's rows with its series and times in the index."""
    return frame.set_axis(PANEL.index, axis=0)


def learn_long():
    return learn(LONG, SEEN, time="when", series="who")


# Where times and series stand


def assert_panel(table, rows=4):
    assert table.keys == ["x", "y"]
    assert table.codes.tolist() == [0, 1, 0, 1][:rows]
    assert table.times.tolist() == [0.0, 1.0, 2.0, 0.5][:rows]


@pytest.mark.parametrize(
    ("X", "time", "series"),
    [
        (LONG, "when", "who"),
        (PANEL, None, None),
        (PANEL.swaplevel(), None, None),
        (PANEL, "when", None),
        (PANEL, None, "who"),
        (PANEL.swaplevel(), "when", "who"),
        (PANEL.rename_axis([None, None]), None, None),
        (LONG.set_index("when"), None, "who"),
        (LONG.set_index("when"), "when", "who"),
        (LONG.set_index("who"), "when", "who"),
        (LONG.set_index("who", append=True), "when", "who"),
        (LONG.assign(ward=0).set_index(["ward", "who", "when"]), "when", "who"),
    ],
)
def test_times_and_series_are_found(X, time, series):
    y = SEEN.set_axis(X.index, axis=0)
    layout, table = learn(X, y, time, series)
    assert_panel(table)
    assert layout.has_series and not layout.seconds
    assert table.covariates.tolist() == [[1], [2], [3], [4]]
    np.testing.assert_array_equal(table.values, SEEN)
    assert_panel(layout.read(X))


def test_levels_are_told_by_what_they_hold():
    stamped = pd.MultiIndex.from_arrays([STAMPS, [1, 1, 2]])
    _, table = learn(WIDE.set_axis(stamped))
    assert table.keys == [1, 2] and table.codes.tolist() == [0, 0, 1]
    _, table = learn(WIDE.set_axis(stamped.swaplevel()))
    assert table.keys == [1, 2] and table.codes.tolist() == [0, 0, 1]
    numbers = pd.MultiIndex.from_arrays([[1, 1, 2], [10, 20, 30]])
    _, table = learn(WIDE.set_axis(numbers))
    assert table.keys == [1, 2] and table.times.tolist() == [10, 20, 30]


def test_a_name_that_fit_found_is_found_again():
    layout, _ = learn(
        SEEN.set_axis(
            pd.MultiIndex.from_arrays([[1, 2, 1, 2], [5, 6, 7, 8]], names=["id", "t"])
        )
    )
    swapped = pd.MultiIndex.from_arrays([[5, 6], [1, 3]], names=["t", "id"])
    table = layout.read(swapped)
    assert table.keys == [1, 3] and table.times.tolist() == [5, 6]
    table = layout.read(swapped.to_frame(index=False))
    assert table.keys == [1, 3] and table.times.tolist() == [5, 6]
    table = layout.read(swapped.to_frame(index=False).set_index("t"))
    assert table.keys == [1, 3] and table.times.tolist() == [5, 6]


def test_a_level_and_a_column_of_one_name_are_told_as_in_fit():
    X = pd.DataFrame({"date": [7.0, 8.0, 9.0]}, index=STAMPS.rename("date"))
    layout, table = learn(X, [1, 2, 3])
    again = layout.read(X)
    assert again.times.tolist() == table.times.tolist()
    assert again.covariates.tolist() == [[7], [8], [9]]


def test_an_array_has_its_times_first():
    X = np.array([[0.0, 7.0, 1.0], [1.0, 8.0, 2.0]])
    layout, table = learn(X, [1.0, 2.0])
    assert table.keys == [None] and table.times.tolist() == [0, 1]
    assert table.covariates.tolist() == [[7, 1], [8, 2]]
    assert (layout.n_features, layout.n_covariates, layout.n_channels) == (3, 2, 1)
    layout, table = learn(X.tolist(), [1.0, 2.0], time=-1, series=1)
    assert table.keys == [7, 8] and table.times.tolist() == [1, 2]
    assert table.covariates.tolist() == [[0], [1]]


@pytest.mark.parametrize(
    "X",
    [
        STAMPS,
        WIDE,
        STAMPS.to_numpy(),
        STAMPS.to_numpy()[:, None],
        STAMPS.array,
        list(STAMPS),
        STAMPS.to_pydatetime().tolist(),
        STAMPS.to_period("D"),
        pd.DataFrame(index=STAMPS),
        pd.Index(STAMPS, dtype=object),
    ],
    ids=lambda X: type(X).__name__,
)
def test_an_index_alone_is_times(X):
    layout, _ = learn(WIDE)
    table = layout.read(X)
    assert (np.diff(table.times) / DAY).tolist() == [2, -1]
    assert table.values is None and table.covariates.shape == (3, 0)
    index = X.index if isinstance(X, pd.DataFrame) else pd.Index(np.ravel(X))
    assert layout.give(X, np.zeros((3, 2))).index.equals(index)


def test_a_counting_index_is_times_where_it_is_given_alone():
    layout, _ = learn(WIDE.set_axis([0.5, 1.0, 2.0]))
    assert layout.read(pd.RangeIndex(3, 5)).times.tolist() == [3.0, 4.0]
    with pytest.raises(ValueError, match="its index only counts rows"):
        layout.read(WIDE.reset_index(drop=True))


def test_a_named_counting_index_is_times():
    _, table = learn(WIDE.set_axis(pd.RangeIndex(3, name="minute")))
    assert table.times.tolist() == [0, 1, 2]


def test_a_counting_index_is_refused_with_a_remedy():
    for X in (WIDE.reset_index(drop=True), WIDE["a"].reset_index(drop=True)):
        with pytest.raises(ValueError, match=r"set_index.*time=.*set_output"):
            learn(X)
    with pytest.raises(ValueError, match=r"time='when'\?"):
        learn(WIDE.rename_axis("when").reset_index())
    with pytest.raises(ValueError, match="only counts rows"):
        learn(LONG, SEEN, series="who")


def test_a_frame_without_any_labels_is_an_array():
    X = pd.DataFrame([[5.0, 1.0], [6.0, 2.0], [7.0, 3.0], [8.0, 4.0]])
    layout, table = learn(X)
    assert table.times.tolist() == [5, 6, 7, 8] and layout.feature_names is None
    some = X.iloc[[0, 1, 3]]
    assert layout.read(some).times.tolist() == [5, 6, 8]
    with pytest.raises(ValueError, match="rename_axis"):
        learn(some)  # counts of rows, or times?
    _, table = learn(some.rename_axis("time"))
    assert table.times.tolist() == [0, 1, 3] and table.values.shape == (3, 2)


@pytest.mark.parametrize(
    ("X", "time", "series", "message"),
    [
        (LONG, "date", "who", r"time='date' is neither a column of X \('who', 'when'"),
        (LONG, "when", "id", "series='id' is neither"),
        (LONG, "when", "when", "cannot be both"),
        (PANEL, "dose", None, "Which level of X's index tells the series"),
        (PANEL.droplevel("when"), None, "who", "X has series but no times"),
        (
            LONG.assign(ward=0).set_index(["ward", "who", "when"]),
            None,
            None,
            "3 levels, 'ward', 'who', 'when': say which",
        ),
        (np.ones((2, 2)), "when", None, "X is an array.*set_output"),
        (np.ones((2, 2)), True, None, "time=True names a column"),
        (np.ones((2, 2)), 2, None, "time=2 is no column of X, which has 2"),
        (np.ones((2, 2)), None, -3, "series=-3 is no column"),
        (np.ones((2, 2)), 1, -1, "Column 1 of X cannot hold both"),
    ],
)
def test_places_that_are_not_there_are_refused(X, time, series, message):
    with pytest.raises(ValueError, match=message):
        learn(X, np.ones(len(X)), time, series)


# Series


@pytest.mark.parametrize(
    ("ids", "keys"),
    [
        (["b", "a", "b"], ["b", "a"]),
        (pd.Categorical(["b", "a", "b"], categories=["a", "b", "c"]), ["b", "a"]),
        ([2, 1, 2], [2, 1]),
        (pd.array([2, 1, 2], dtype="Int64"), [2, 1]),
        (pd.array(["b", "a", "b"], dtype="string"), ["b", "a"]),
        (pd.Series(["b", 1, "b"], dtype=object), ["b", 1]),
        ([True, False, True], [True, False]),
        ([(1, "a"), (2, "a"), (1, "a")], [(1, "a"), (2, "a")]),
    ],
)
def test_series_have_ids_of_every_kind(ids, keys):
    X = pd.DataFrame({"t": [0.0, 1, 2], "id": pd.Series(ids)})
    layout, table = learn(X, [1, 2, 3], time="t", series="id")
    assert table.keys == keys and table.codes.tolist() == [0, 1, 0]
    assert list(layout.read(X[1:]).histories()) == keys[::-1]


@pytest.mark.parametrize("ids", [["a", None], [1.0, NAN], pd.Categorical(["a", None])])
def test_a_row_of_no_series_is_refused(ids):
    X = pd.DataFrame({"t": [0.0, 1], "id": ids})
    with pytest.raises(ValueError, match="NaN: row 1 does not say which series"):
        learn(X, [1, 2], time="t", series="id")


def test_series_that_fit_did_not_see_are_read():
    layout, _ = learn_long()
    table = layout.read(LONG.assign(who=["x", "new", "new", "x"]))
    assert table.keys == ["x", "new"]


def test_series_must_be_told_as_in_fit():
    layout, _ = learn_long()
    with pytest.raises(ValueError, match=r"which series.*level 'who'"):
        layout.read(pd.Index([1.0, 2.0]))
    alone, _ = learn(WIDE)
    with pytest.raises(ValueError, match="fit saw one series"):
        alone.read(pd.MultiIndex.from_product([["x"], STAMPS]))


# Covariates


@pytest.mark.parametrize(
    "column",
    [
        [1, 0],
        [1.0, 0.0],
        [True, False],
        pd.array([1, 0], dtype="Int8"),
        pd.array([True, False], dtype="boolean"),
        pd.array([1, 0], dtype="Float32"),
        pd.arrays.SparseArray([1.0, 0.0]),
        pd.Series([1, 0], dtype=object),
        pd.Series([True, False], dtype=object),
    ],
    ids=lambda column: str(getattr(column, "dtype", type(column[0]))),
)
def test_numbers_of_every_dtype_are_covariates_and_channels(column):
    X = pd.DataFrame({"t": [5, 6], "c": column})
    _, table = learn(X, [1, 2], time="t")
    assert table.covariates.dtype == np.float64
    assert table.covariates.tolist() == [[1], [0]]
    _, table = learn(X, time="t")
    assert table.values.tolist() == [[1], [0]]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (["a", "b"], "'c' of X must hold numbers.*OneHotEncoder"),
        (pd.Categorical([1, 2]), "must hold numbers, got category: encode it"),
        (STAMPS[:2], "time='c' if these are the times"),
        (pd.Series([1, "b"], dtype=object), "must hold numbers"),
        ([1, np.inf], "infinity.*column 'c', row 1"),
        ([NAN, 1], "NaN: covariate 'c' is missing in row 0.*ffill"),
        (pd.array([1, None], dtype="Int64"), "NaN: covariate 'c' is missing in row 1"),
        ([1j, 2], "Complex data not supported: column 'c' of X"),
    ],
    ids=lambda case: None if isinstance(case, str) else str(pd.Series(case).dtype),
)
def test_covariates_that_are_no_numbers_are_refused(column, message):
    X = pd.DataFrame({"t": [5, 6], "c": column})
    with pytest.raises(ValueError, match=message):
        learn(X, [1, 2], time="t")


def test_columns_may_come_in_another_order():
    layout, table = learn_long()
    again = layout.read(LONG.assign(age=1)[["dose", "when", "who"]])
    assert_panel(again)
    np.testing.assert_array_equal(again.covariates, table.covariates)
    X = LONG.assign(age=[5, 6, 7, 8])
    layout, table = learn(X, SEEN, time="when", series="who")
    again = layout.read(X[["age", "who", "dose", "when"]])
    np.testing.assert_array_equal(again.covariates, table.covariates)


def test_columns_must_be_those_of_fit():
    layout, _ = learn_long()
    words = "The feature names should match those that were passed during fit"
    missing = "(?s)seen at fit time, yet now missing:\n- dose"
    for X in (LONG.drop(columns="dose"), PANEL.index):
        with pytest.raises(ValueError, match=missing) as error:
            layout.read(X)
        assert words in str(error.value)
    with pytest.raises(ValueError, match="unseen at fit time:\n- hr\n- bp"):
        layout.read(LONG.join(SEEN))
    with pytest.raises(ValueError, match=r"(?s)unseen.*- Dose.*missing:\n- dose"):
        layout.read(LONG.rename(columns={"dose": "Dose"}))
    with pytest.raises(ValueError, match="time='when' is neither"):
        layout.read(LONG.drop(columns="when"))


def test_arrays_must_have_the_columns_of_fit():
    layout, _ = learn(np.ones((2, 3)), np.ones(2), owner="Oracle")
    with pytest.raises(
        ValueError,
        match="X has 2 features, but Oracle is expecting 3 features as input",
    ):
        layout.read(np.ones((2, 2)))


def test_names_that_come_or_go_are_warned_of_as_scikit_learn_does():
    named = pd.DataFrame({"t": [0.0, 1.0], "c": [2.0, 3.0]})
    layout, _ = learn(named.to_numpy(), [1, 2])
    with pytest.warns(UserWarning, match="X has feature names, but Forecaster was"):
        assert layout.read(named).covariates.tolist() == [[2], [3]]
    layout, _ = learn(named, [1, 2], time="t")
    with pytest.warns(UserWarning, match="X does not have valid feature names"):
        assert layout.read(named.to_numpy()).covariates.tolist() == [[2], [3]]


def test_an_array_cannot_stand_for_an_index():
    layout, _ = learn(WIDE)
    for X in (np.ones((2, 2)), [[1.0], [2.0]]):
        with pytest.raises(ValueError, match=r"X is an array.*set_output"):
            layout.read(X)


def test_a_scaler_before_a_forecaster_keeps_times_if_asked():
    X = pd.DataFrame({"c": [1.0, 2.0, 4.0]}, index=STAMPS)
    scaled = make_pipeline(StandardScaler(), Mean()).set_output(transform="pandas")
    assert scaled.fit(X, WIDE["b"]).predict(X).index.equals(STAMPS)
    late = LONG[["when", "dose"]]
    keeps_time = make_column_transformer(
        (StandardScaler(), ["dose"]),
        remainder="passthrough",
        verbose_feature_names_out=False,
    ).set_output(transform="pandas")
    piped = make_pipeline(keeps_time, Mean(time="when"))
    assert len(piped.fit(late, SEEN["bp"]).predict(late)) == 4
    bare = make_pipeline(StandardScaler(), Mean(time="when"))
    with pytest.raises(ValueError, match="set_output"):
        bare.fit(late, SEEN["bp"])


@pytest.mark.parametrize(
    "X", [WIDE[:0], STAMPS[:0], WIDE["a"][:0], np.ones((0, 2)), []]
)
def test_no_rows_are_refused(X):
    with pytest.raises(
        ValueError, match=r"Found array with 0 sample|Expected 2D array"
    ):
        learn(X, np.ones(0))
    layout, _ = learn(WIDE)
    if not isinstance(X, list | np.ndarray):
        with pytest.raises(ValueError, match="X has no rows"):
            layout.read(X)


@pytest.mark.parametrize(
    ("X", "error", "message"),
    [
        (scipy.sparse.csr_array(np.eye(2)), TypeError, "Sparse data was passed"),
        (np.ones((2, 2)) * 1j, ValueError, "Complex data not supported"),
        (np.ones(2), ValueError, "Reshape your data"),
        (np.ones((2, 2, 2)), ValueError, "Found array with dim 3"),
        (
            np.array([["2024", 1], ["2025", 1]], dtype=object)[:0],
            ValueError,
            "0 sample",
        ),
        (np.array([[{}, 1.0]], dtype=object), TypeError, "argument must be .* number"),
        (np.array([["2024"], ["2025"]]), TypeError, "got .*2024.*pd.to_datetime"),
        (np.array([["2024"], ["2025"]], dtype=object), TypeError, "pd.to_datetime"),
        (np.array([STAMPS, STAMPS]), TypeError, "must hold numbers"),
        (polars.DataFrame({"t": [1.0, 2.0]}), TypeError, r"polars.*X\.to_pandas\(\)"),
        (
            np.array([[0.0], [NAN]]),
            ValueError,
            "NaN: column 0 of X has no time in row 1",
        ),
        (np.array([[0.0, 1], [1, np.inf]]), ValueError, "infinity.*column 1, row 1"),
        (np.array([[0.0, 1], [1, NAN]]), ValueError, "NaN: covariate 1"),
    ],
)
def test_what_is_no_table_is_refused(X, error, message):
    with pytest.raises(error, match=message):
        learn(X, np.ones(X.shape[0]))


@pytest.mark.parametrize("X", ["2024", ["2024-01-01"], [[STAMPS[0], 1]], STAMPS[0]])
def test_times_that_are_no_index_are_refused(X):
    layout, _ = learn(WIDE)
    with pytest.raises(TypeError, match=r"index|not 'Timestamp'"):
        layout.read(X)


def test_a_series_of_stamps_is_no_channel():
    with pytest.raises(ValueError, match=r"pd\.Index\(X\)"):
        learn(STAMPS.to_series())
    with pytest.raises(ValueError, match="only counts rows"):
        learn(pd.Series(STAMPS))
    layout, _ = learn(WIDE.rename_axis("when").reset_index(), time="when")
    assert len(layout.read(pd.Series(STAMPS, name="when"))) == 3


@pytest.mark.parametrize(
    "times",
    [
        STAMPS,
        STAMPS.tz_localize("Europe/Berlin"),
        STAMPS - STAMPS[0],
        STAMPS.to_period("D"),
        pd.Index(STAMPS.date),
        pd.Index(STAMPS.to_pydatetime(), dtype=object),
        pd.CategoricalIndex(STAMPS),
        pd.Index([0, 172_800, 86_400]),
    ],
    ids=lambda times: str(times.dtype),
)
def test_a_column_of_times_reads_as_an_index_of_them(times):
    frame = WIDE.set_axis(times.rename("when"))
    _, by_index = learn(frame)
    _, by_column = learn(frame.reset_index(), time="when")
    np.testing.assert_array_equal(by_index.times, by_column.times)
    history = by_column.histories()[None]
    assert history.times.tolist() == [0.0, 86_400.0, 172_800.0]
    np.testing.assert_array_equal(history.values, WIDE.iloc[[0, 2, 1]])


def test_categories_name_series_whatever_they_are_made_of():
    ids = pd.Categorical([1, 2, 1])
    for levels in ([[0.0, 1.0, 2.0], ids], [ids, [0.0, 1.0, 2.0]]):
        _, table = learn(WIDE.set_axis(pd.MultiIndex.from_arrays(levels)))
        assert table.keys == [1, 2] and table.times.tolist() == [0, 1, 2]


def test_columns_of_one_name_are_refused():
    twice = WIDE.set_axis(["a", "a"], axis=1)
    with pytest.raises(ValueError, match="X has several columns named 'a'"):
        learn(twice)
    with pytest.raises(ValueError, match="y has several columns named 'a'"):
        learn(STAMPS, twice)


# Channels


def test_columns_are_the_channels_where_there_is_no_y():
    layout, table = learn(WIDE)
    assert layout.channel_names == ["a", "b"] and layout.n_covariates == 0
    assert layout.own_channels and layout.n_channels == 2 and layout.seconds
    assert layout.feature_names.tolist() == ["a", "b"] and layout.time_unit == "seconds"
    np.testing.assert_array_equal(table.values, WIDE)
    layout, table = learn(LONG, time="when", series="who")
    assert layout.channel_names == ["dose"] and layout.n_features == 3
    assert layout.time_unit == "the units of X's times"


def test_channels_in_x_are_read_where_wanted_and_ignored_else():
    layout, _ = learn(WIDE)
    later = WIDE[["b", "a"]][:2]
    assert layout.read(later).values is None
    np.testing.assert_array_equal(
        layout.read_observations(later).values, WIDE[:2].to_numpy()
    )
    assert layout.read(WIDE[["a"]]).values is None
    with pytest.raises(ValueError, match="lacks the channels 'b'"):
        layout.read_observations(WIDE[["a"]])
    np.testing.assert_array_equal(layout.read(STAMPS, WIDE).values, WIDE)
    given, _ = learn(STAMPS, WIDE)
    with pytest.raises(ValueError, match="fitted with y: pass y"):
        given.read_observations(STAMPS)


def test_channels_of_an_array_may_be_left_out_later():
    X = np.array([[1.0, 0.0, 7.0, 2.0], [1.0, 1.0, 8.0, NAN]])
    layout, table = learn(X, time=1, series=0)
    np.testing.assert_array_equal(table.values, X[:, 2:])
    for later in (X, X[:, :2]):
        again = layout.read(later)
        assert again.times.tolist() == [0, 1] and again.keys == [1]
    np.testing.assert_array_equal(layout.read_observations(X).values, X[:, 2:])
    np.testing.assert_array_equal(layout.read(X[:, :2], X[:, 2:]).values, X[:, 2:])
    with pytest.raises(ValueError, match="lacks the channels 2, 3"):
        layout.read_observations(X[:, :2])
    assert isinstance(layout.give(X, X[:, 2:]), np.ndarray)


def test_a_series_alone_is_one_channel():
    for name in ("a", None):
        series = WIDE["a"].rename(name)
        layout, table = learn(series)
        np.testing.assert_array_equal(table.values[:, 0], series)
        again = layout.read_observations(series[:2])
        np.testing.assert_array_equal(again.values[:, 0], series[:2])
        given = layout.give(LATER, np.array([[1.0], [2.0]]))
        pd.testing.assert_series_equal(
            given, pd.Series([1.0, 2.0], index=LATER, name=name)
        )


@pytest.mark.parametrize(
    "y",
    [
        [1, None, 3],
        [1, pd.NA, 3],
        (1.0, NAN, 3.0),
        np.array([1, NAN, 3], dtype=np.float32),
        np.array([1, None, 3], dtype=object),
        pd.Series([1, NAN, 3], index=STAMPS),
        pd.Series([1, None, 3], index=STAMPS, dtype="Int64"),
        pd.Series([1, pd.NA, 3], index=STAMPS, dtype=object),
        pd.array([1, None, 3], dtype="Int64"),
        [[1], [NAN], [3]],
        [[1], [None], [3]],
        pd.DataFrame({"v": [1, NAN, 3]}, index=STAMPS),
    ],
)
def test_what_is_missing_in_y_was_not_observed(y):
    _, table = learn(STAMPS, y)
    np.testing.assert_array_equal(table.values, [[1], [NAN], [3]])


def test_y_of_integers_and_truths_is_numbers():
    y = pd.DataFrame({"n": [1, 2, 3], "b": [True, False, True]}, index=STAMPS)
    _, table = learn(STAMPS, y)
    assert table.values.tolist() == [[1, 1], [2, 0], [3, 1]]
    assert learn(STAMPS, np.array([True, False, True]))[1].values.dtype == np.float64


def test_a_channel_may_never_be_observed_but_not_all():
    y = WIDE.assign(a=NAN, c=pd.Series([None] * 3, dtype=object, index=STAMPS))
    np.testing.assert_array_equal(learn(STAMPS, y)[1].values[:, [0, 2]], NAN)
    for y in (np.full(3, NAN), WIDE * NAN, [None] * 3):
        with pytest.raises(
            ValueError, match="y contains NaN only: nothing was observed"
        ):
            learn(STAMPS, y)
    with pytest.raises(ValueError, match="X contains NaN only"):
        learn(WIDE * NAN)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        ([1, 2], "inconsistent numbers of samples: \\[3, 2\\]"),
        ([1, np.inf, 2], r"Input y contains infinity .*dtype\('float64'\).*row 1"),
        (WIDE.assign(a=-np.inf), "Input y contains infinity .*column 'a', row 0"),
        (WIDE.assign(a=["u", "v", "w"]), "'a' of y must hold numbers"),
        (WIDE[[]], "y has no columns"),
        (WIDE.reset_index(drop=True), r"index is not X's.*reindex.*to_numpy"),
        (WIDE["a"].sort_index(), "index is not X's"),
        (STAMPS.to_numpy(), "y must hold numbers, got datetime64"),
        (["a", "b", "c"], "could not convert string to float"),
        ([1j, 2, 3], "Complex data not supported"),
        (np.ones((3, 2, 2)), "Found array with dim 3"),
    ],
    ids=lambda case: None if isinstance(case, str) else type(case).__name__,
)
def test_y_that_does_not_fit_is_refused(y, message):
    with pytest.raises(ValueError, match=message):
        learn(STAMPS, y)
    layout, _ = learn(STAMPS, WIDE)
    with pytest.raises(ValueError, match=rf"{message}|y has 1 channels|Missing"):
        layout.read(STAMPS, y)


def test_later_channels_are_matched_by_name():
    layout, _ = learn(STAMPS, WIDE)
    again = layout.read(STAMPS, WIDE[["b", "a"]])
    np.testing.assert_array_equal(again.values, WIDE)
    np.testing.assert_array_equal(layout.read(STAMPS, WIDE.to_numpy()).values, WIDE)
    with pytest.raises(ValueError, match=r"those of fit. Missing: 'b'. New: 'c'"):
        layout.read(STAMPS, WIDE.rename(columns={"b": "c"}))
    with pytest.raises(ValueError, match="y has 1 channels, but fit saw 2"):
        layout.read(STAMPS, [1, 2, 3])


def test_there_must_be_something_to_forecast():
    for X in (STAMPS, WIDE[[]], np.ones((3, 1))):
        with pytest.raises(ValueError, match="nothing to forecast"):
            learn(X)


# History


def test_a_history_comes_in_one_frame_or_in_two_parts():
    layout, table = learn_long()
    for history in (LONG.join(SEEN), panel(SEEN).join(PANEL), (LONG, SEEN)):
        again = layout.read_history(history)
        assert_panel(again)
        np.testing.assert_array_equal(again.values, table.values)
        np.testing.assert_array_equal(again.covariates, table.covariates)
    own, _ = learn(WIDE)
    np.testing.assert_array_equal(own.read_history(WIDE).values, WIDE)
    np.testing.assert_array_equal(own.read_history((STAMPS, WIDE)).values, WIDE)
    series, _ = learn(STAMPS, WIDE["a"])
    np.testing.assert_array_equal(series.read_history(WIDE[["a"]]).values, WIDE[["a"]])


def test_a_history_of_arrays_has_its_channels_last():
    X, y = np.array([[0.0, 5.0], [1.0, 6.0]]), np.array([[7.0, NAN], [8.0, 9.0]])
    layout, _ = learn(X, y)
    table = layout.read_history(np.hstack([X, y]))
    np.testing.assert_array_equal(table.values, y)
    np.testing.assert_array_equal(table.covariates, X[:, 1:])
    with pytest.raises(ValueError, match="history has 3 columns, but X has 2 and y 2"):
        layout.read_history(np.ones((2, 3)))


def test_a_history_without_channels_is_refused():
    layout, _ = learn_long()
    with pytest.raises(ValueError, match="lacks the channels 'bp', 'hr'"):
        layout.read_history(LONG)
    with pytest.raises(ValueError, match="one frame or"):
        layout.read_history((LONG, SEEN, SEEN))
    unnamed, _ = learn(LONG, SEEN.to_numpy(), time="when", series="who")
    with pytest.raises(ValueError, match=r"pass history=\(X, y\)"):
        unnamed.read_history(LONG.join(SEEN))
    other_dose = LONG[["dose"]] + 1
    shared, _ = learn(LONG, other_dose, time="when", series="who")
    with pytest.raises(ValueError, match=r"pass history=\(X, y\)"):
        shared.read_history(LONG)


# Times in later calls


def test_later_times_must_be_of_the_same_kind():
    naive, _ = learn(WIDE)
    with pytest.raises(ValueError, match=r"fit saw naive stamps.*tz_convert"):
        naive.read(STAMPS.tz_localize("UTC"))
    with pytest.raises(ValueError, match="Times are numbers, but fit saw naive stamps"):
        naive.read(pd.Index([1.0]))
    zoned, _ = learn(WIDE.tz_localize("Europe/Berlin"))
    with pytest.raises(ValueError, match=r"tz_localize\('Europe/Berlin'\)"):
        zoned.read(STAMPS)
    utc = STAMPS.tz_localize("Europe/Berlin").tz_convert("UTC")
    assert (
        zoned.read(utc).times.tolist()
        == zoned.read(WIDE.tz_localize("Europe/Berlin")).times.tolist()
    )
    deltas, _ = learn(WIDE.set_axis(pd.to_timedelta([1, 2, 3], unit="h")))
    with pytest.raises(
        ValueError, match="Times are naive stamps, but fit saw time diff"
    ):
        deltas.read(STAMPS)
    assert deltas.seconds


# Predictions in y's kind


def test_predictions_have_the_kind_of_y():
    two, one = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[1.0], [3.0]])
    given = learn(STAMPS, WIDE)[0].give(LATER, two)
    pd.testing.assert_frame_equal(given, pd.DataFrame(two, LATER, ["a", "b"]))
    given = learn(STAMPS, WIDE["a"])[0].give(LATER, one)
    pd.testing.assert_series_equal(given, pd.Series([1.0, 3.0], LATER, name="a"))
    given = learn(STAMPS, WIDE["a"].tolist())[0].give(LATER, one)
    assert type(given) is np.ndarray and given.tolist() == [1, 3]
    given = learn(STAMPS, WIDE[["b"]].to_numpy())[0].give(LATER, one)
    assert type(given) is np.ndarray and given.tolist() == [[1], [3]]
    array = np.array([[0.0], [1.0], [2.0]])
    given = learn(array, WIDE["a"].reset_index(drop=True))[0].give(array[:2], one)
    pd.testing.assert_series_equal(given, pd.Series([1.0, 3.0], name="a"))


def test_quantiles_are_columns_below_those_of_y():
    levels, values = [0.1, 0.5, 0.9], np.arange(12.0).reshape(2, 2, 3)
    given = learn(STAMPS, WIDE)[0].give_quantiles(LATER, values, levels)
    assert given.columns.names == [None, "quantile"] and given.index.equals(LATER)
    assert given[("b", 0.5)].tolist() == [4.0, 10.0]
    assert given["a"].columns.tolist() == levels
    given = learn(STAMPS, WIDE["a"])[0].give_quantiles(LATER, values[:, :1], levels)
    assert given.columns.tolist() == levels and given[0.9].tolist() == [2.0, 8.0]
    given = learn(STAMPS, [1, 2, 3])[0].give_quantiles(LATER, values[:, :1], levels)
    assert given.tolist() == values[:, 0].tolist()
    given = learn(STAMPS, WIDE.to_numpy())[0].give_quantiles(LATER, values, levels)
    assert given.shape == (2, 2, 3)


def test_paths_are_columns_below_those_of_y_and_first_in_arrays():
    values = np.arange(12.0).reshape(3, 2, 2)  # paths, rows, channels
    given = learn(STAMPS, WIDE)[0].give_paths(LATER, values)
    assert given[("b", 2)].tolist() == values[2, :, 1].tolist()
    assert given.columns.names[-1] == "path"
    given = learn(STAMPS, WIDE["a"])[0].give_paths(LATER, values[:, :, :1])
    assert given[1].tolist() == values[1, :, 0].tolist()
    given = learn(STAMPS, [1, 2, 3])[0].give_paths(LATER, values[:, :, :1])
    assert given.shape == (3, 2)
    assert learn(STAMPS, WIDE.to_numpy())[0].give_paths(LATER, values).shape == (
        3,
        2,
        2,
    )


def test_columns_of_several_levels_keep_them():
    y = WIDE.set_axis(
        pd.MultiIndex.from_tuples([("u", 1), ("v", 2)], names=["k", "l"]), axis=1
    )
    layout, _ = learn(STAMPS, y)
    given = layout.give_quantiles(LATER, np.arange(8.0).reshape(2, 2, 2), [0.1, 0.9])
    assert given.columns.names == ["k", "l", "quantile"]
    assert given[("v", 2, 0.1)].tolist() == [2.0, 6.0]


def test_one_number_per_row_is_a_series_with_pandas():
    values = np.array([1.0, 2.0])
    given = learn(STAMPS, WIDE)[0].give_one(LATER, values, "intensity")
    pd.testing.assert_series_equal(given, pd.Series(values, LATER, name="intensity"))
    given = learn(STAMPS, [1, 2, 3])[0].give_one(LATER, values, "intensity")
    assert type(given) is np.ndarray


# As a whole


def test_a_layout_can_be_pickled():
    layout, _ = learn_long()
    again = pickle.loads(pickle.dumps(layout))
    assert_panel(again.read(LONG))
    pd.testing.assert_frame_equal(again.give(LONG, SEEN.to_numpy()), SEEN)


def test_nothing_that_is_passed_is_changed():
    X, y = LONG.copy(), np.array([1, None, 3, 4], dtype=object)
    layout, table = learn(X, y, time="when", series="who")
    table.times[:] = table.values[:] = table.covariates[:] = 0
    layout.read(X)
    pd.testing.assert_frame_equal(X, LONG)
    assert y.tolist() == [1, None, 3, 4]


def test_scales_of_channels_are_kept():
    y = pd.DataFrame(
        {"large": [1e9, 1e9 + 1, 1e9], "small": [1e-9, 2e-9, 1e-9]}, STAMPS
    )
    np.testing.assert_array_equal(learn(STAMPS, y)[1].values, y)


class Mean(RegressorMixin, BaseEstimator):
    """Forecasts the mean of what fit saw, on the layout alone."""

    def __init__(self, time=None, series=None):
        self.time = time
        self.series = series

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        tags.regressor_tags.poor_score = True
        return tags

    def fit(self, X, y=None):
        name = type(self).__name__
        self.layout_, table = learn(X, y, self.time, self.series, name)
        self.n_features_in_ = self.layout_.n_features
        if self.layout_.feature_names is not None:
            self.feature_names_in_ = self.layout_.feature_names
        self.mean_ = np.nanmean(table.values, axis=0)
        return self

    def predict(self, X):
        check_is_fitted(self)
        table = self.layout_.read(X)
        return self.layout_.give(X, np.tile(self.mean_, (len(table), 1)))


@parametrize_with_checks([Mean()])
def test_an_estimator_on_the_layout_keeps_the_contract(estimator, check):
    check(estimator)


@pytest.mark.parametrize("X", [STAMPS.repeat(4), WIDE.iloc[[0, 1, 2] * 4]])
@pytest.mark.parametrize(
    "cv", [TimeSeriesSplit(3), KFold(3, shuffle=True, random_state=0)]
)
def test_splits_of_scikit_learn_work(X, cv):
    y = pd.Series(np.arange(12.0), index=X if isinstance(X, pd.Index) else X.index)
    X = X if isinstance(X, pd.Index) else X[["b"]]
    for scoring in (None, "neg_mean_absolute_error"):
        scores = cross_val_score(
            Mean(), X, y, cv=cv, scoring=scoring, error_score="raise"
        )
        assert np.isfinite(scores).all()


def test_groups_of_scikit_learn_work():
    predictions = cross_val_predict(
        Mean(time="when", series="who"),
        LONG,
        SEEN["bp"].fillna(0),
        cv=GroupKFold(2),
        groups=LONG["who"],
    )
    assert predictions.tolist() == [2.0, 1.0, 2.0, 1.0]


def test_covariates_that_are_the_answer_are_refused():
    index = pd.date_range("2024", periods=5, name="t")
    frame = pd.DataFrame({"a": np.arange(5.0), "b": [1, 0, 2, 1, 5]}, index=index)
    with pytest.raises(ValueError, match=r"Columns 'a', 'b' of X are in y too"):
        learn(frame, frame)
    with pytest.raises(ValueError, match=r"Columns 'b' of X are in y too"):
        learn(frame, frame["b"])
    layout, _ = learn(frame[[]], frame)  # the index alone
    assert layout.n_covariates == 0 and layout.n_channels == 2
    layout, _ = learn(frame.assign(b=7.0), frame["b"])  # another b
    assert layout.n_covariates == 2


def test_an_array_beside_targets_with_times_has_lost_its_index():
    index = pd.date_range("2024", periods=5)
    y = pd.DataFrame({"a": np.arange(5.0)}, index=index)
    with pytest.raises(ValueError, match="X has lost its own"):
        learn(np.arange(10.0).reshape(5, 2), y)
    learn(np.arange(10.0).reshape(5, 2), y.reset_index(drop=True))
