"""Rows, sorted into series."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from skode._series.history import History, Table

DAY = 86_400 * 10**9


def table(times, values, codes=None, covariates=None):
    values = np.asarray(values, dtype=np.float64).reshape(len(times), -1)
    codes = np.zeros(len(times), dtype=int) if codes is None else np.asarray(codes)
    if covariates is None:
        covariates = np.empty((len(times), 0))
    keys = [f"key {code}" for code in range(codes.max() + 1)]
    return Table(keys, codes, np.asarray(times), np.asarray(covariates, float), values)


def history(times, values):
    return table(times, values).histories()["key 0"]


def assert_same(one, other):
    assert one.origin == other.origin
    for name in ("exact", "times", "values", "covariates"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_rows_are_sorted_by_series_and_time():
    histories = table(
        [3.0, 1.0, 2.0, 0.5],
        [30, 10, 20, 5],
        codes=[0, 1, 0, 1],
        covariates=[[3], [1], [2], [0]],
    ).histories()
    assert list(histories) == ["key 0", "key 1"]
    first, second = histories.values()
    assert first.origin == 2.0 and second.origin == 0.5
    assert first.times.tolist() == [0.0, 1.0] and second.times.tolist() == [0.0, 0.5]
    assert first.values.tolist() == [[20.0], [30.0]]
    assert second.covariates.tolist() == [[0.0], [1.0]]


def test_rows_of_one_time_are_the_mean_of_what_was_observed():
    nan = np.nan
    merged = history([1.0, 0.0, 1.0, 1.0], [[1, nan], [7, 8], [4, nan], [nan, nan]])
    assert merged.times.tolist() == [0.0, 1.0]
    np.testing.assert_array_equal(merged.values, [[7, 8], [2.5, nan]])


def test_equal_values_merge_to_themselves_at_every_scale():
    values = np.array([[0.1, 1e9 + 0.1, 1e-9 / 3, 1.7e308, -1.7e308]]).repeat(7, axis=0)
    np.testing.assert_array_equal(history(np.zeros(7), values).values, values[:1])


def test_all_times_may_be_equal():
    merged = history([5.0, 5.0], [1, 3])
    assert merged.times.tolist() == [0.0] and merged.values.tolist() == [[2.0]]


def test_one_row_is_a_history():
    one = history([5.0], [np.nan])
    assert len(one) == 1 and one.times.tolist() == [0.0]


@settings(deadline=None)
@given(st.data())
def test_the_order_of_rows_changes_no_bit(data):
    n = data.draw(st.integers(1, 12))
    times = data.draw(
        arrays.arrays(float, n, elements=st.sampled_from([0.0, 0.1, 2.0]))
    )
    codes = data.draw(arrays.arrays(int, n, elements=st.integers(0, 2)))
    _, codes = np.unique(codes, return_inverse=True)
    number = st.floats(-1e6, 1e6) | st.just(np.nan)
    values = data.draw(arrays.arrays(float, (n, 2), elements=number))
    order = np.array(data.draw(st.permutations(range(n))))
    ahead = table(times, values, codes).histories()
    shuffled = table(times[order], values[order], codes[order]).histories()
    assert ahead.keys() == shuffled.keys()
    for key in ahead:
        assert_same(ahead[key], shuffled[key])


def test_nanoseconds_survive_between_decades():
    start = pd.Timestamp("1980-01-01").as_unit("ns").value
    last = pd.Timestamp("2024-01-01").as_unit("ns").value
    long = history(np.array([start, last, last + 1]), [0, 1, 2])
    assert len(long) == 3
    assert long.after(start).counted_from(last).times.tolist() == [0.0, 1e-9]


def test_numbers_of_all_scales_survive():
    assert history([0.0, 1e-9, 1e12], [0, 1, 2]).times.tolist() == [0.0, 1e-9, 1e12]
    with np.errstate(all="raise"):
        assert history([-4e307, 4e307], [0, 1]).times.tolist() == [0.0, 8e307]


def test_minus_zero_is_zero():
    assert len(history([0.0, -0.0], [1, 3])) == 1


def test_rows_before_and_after_a_time():
    days = history(np.arange(4) * DAY, [0, 1, 2, 3])
    assert days.before(2 * DAY).values.ravel().tolist() == [0, 1]
    assert days.before(2 * DAY, inclusive=True).values.ravel().tolist() == [0, 1, 2]
    assert days.after(2 * DAY).values.ravel().tolist() == [3]
    assert days.after(2 * DAY, inclusive=True).values.ravel().tolist() == [2, 3]
    late = days.after(2 * DAY)
    assert late.origin == 0 and late.times.tolist() == [3 * 86400.0]
    assert len(days.before(0)) == 0 and days.before(0).times.shape == (0,)
    assert late.counted_from(3 * DAY).times.tolist() == [0.0]
    assert days.relative(np.array([-DAY])).tolist() == [-86400.0]


def test_joining_is_the_history_of_all_rows():
    nan = np.nan
    whole = history([0, DAY, DAY, 3 * DAY, 5 * DAY], [nan, 1, 3, 4, 5])
    early, late = (
        history([0, DAY, 3 * DAY], [nan, 1, 4]),
        history([DAY, 5 * DAY], [3, 5]),
    )
    assert_same(early.join(late), whole)
    assert_same(late.join(early), whole)


def test_joining_an_empty_history_changes_nothing():
    days = history(np.arange(2) * DAY, [0, 1])
    empty = days.before(0)
    assert_same(days.join(empty), days)
    assert_same(empty.join(days), days)
    assert len(empty.join(empty)) == 0


def test_joining_keeps_origins_exact():
    start = pd.Timestamp("1980-01-01").as_unit("ns").value
    joined = history(np.array([start + DAY * 10000 + 1]), [1]).join(
        history(np.array([start]), [0])
    )
    assert joined.origin == start and isinstance(joined.origin, int)
    assert joined.exact.tolist() == [start, start + DAY * 10000 + 1]


@pytest.mark.parametrize("with_values", [True, False])
def test_queries_keep_every_row_and_say_where_it_went(with_values):
    rng = np.random.default_rng(0)
    times = rng.integers(0, 5, 50).astype(float)
    codes = np.concatenate([np.arange(3), rng.integers(0, 3, 47)])
    rows = table(times, np.arange(50), codes, covariates=np.arange(50)[:, None])
    if not with_values:
        rows = Table(rows.keys, rows.codes, rows.times, rows.covariates, None)
    queries = list(rows.queries().values())
    assert sum(map(len, queries)) == 50
    for row, (code, position) in enumerate(
        zip(rows.codes, rows.positions, strict=True)
    ):
        query = queries[code]
        assert query.exact[position] == times[row]
        assert query.covariates[position, 0] == row
        assert query.values.shape == (len(query), int(with_values))
        assert (np.diff(query.times) >= 0).all()


def test_a_history_counts_its_rows_in_time_order_of_a_large_table():
    rng = np.random.default_rng(1)
    lengths = [1, 10_000]
    codes = np.repeat([0, 1], lengths)
    times = rng.permutation(sum(lengths)).astype(float)
    histories = table(times, times, codes).histories()
    assert [len(h) for h in histories.values()] == lengths
    assert all(isinstance(h, History) for h in histories.values())
    assert (np.diff(histories["key 1"].times) > 0).all()
