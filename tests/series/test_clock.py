"""Times as users give them, read without rounding."""

import datetime
from decimal import Decimal
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import pytest

from skode._series.clock import Clock, read_times, seconds_between

SECOND = 1_000_000_000
BERLIN = ZoneInfo("Europe/Berlin")


def read(times):
    return read_times(pd.Index(times), "the index of X")


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_stamps_of_every_unit_are_the_same_nanoseconds(unit):
    clock, exact = read(pd.DatetimeIndex(["2024-01-01 00:00:01"]).as_unit(unit))
    assert clock == Clock("stamp", None) and clock.seconds
    assert exact.dtype == np.int64
    assert exact[0] == pd.Timestamp("2024-01-01 00:00:01").as_unit("ns").value


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_differences_of_every_unit_are_the_same_nanoseconds(unit):
    clock, exact = read(pd.to_timedelta(["1s", "-2s"]).as_unit(unit))
    assert clock == Clock("delta", None) and clock.seconds
    assert exact.tolist() == [SECOND, -2 * SECOND]


def test_a_nanosecond_counts_in_stamps():
    first = pd.Timestamp("2200-01-01").as_unit("ns")
    _, exact = read(pd.DatetimeIndex([first, first + pd.Timedelta(1, "ns")]))
    assert seconds_between(exact, exact[0].item()).tolist() == [0.0, 1e-9]
    assert seconds_between(exact, exact[1].item()).tolist() == [-1e-9, 0.0]


def test_a_nanosecond_counts_across_a_full_second():
    _, exact = read(pd.to_timedelta([SECOND - 1, SECOND], unit="ns"))
    assert seconds_between(exact, exact[0].item()).tolist() == [0.0, 1e-9]


def test_stamps_may_lie_five_centuries_apart():
    first, last = pd.Timestamp("1690-01-01"), pd.Timestamp("2250-01-01")
    _, exact = read(pd.DatetimeIndex([first, last]))
    seconds = (last.to_pydatetime() - first.to_pydatetime()).total_seconds()
    assert seconds_between(exact, exact[0].item()).tolist() == [0.0, seconds]
    assert seconds_between(exact, exact[1].item()).tolist() == [-seconds, 0.0]


def test_summer_time_neither_skips_nor_repeats_an_hour():
    spring = ["2024-03-31 01:30", "2024-03-31 03:30"]
    autumn = pd.DatetimeIndex(["2024-10-27 00:30Z", "2024-10-27 01:30Z"])
    for times in (
        pd.DatetimeIndex(spring, tz="Europe/Berlin"),
        autumn.tz_convert("Europe/Berlin"),
    ):
        clock, exact = read(times)
        assert clock == Clock("stamp", "Europe/Berlin")
        assert np.diff(exact).tolist() == [3600 * SECOND]


def test_objects_of_the_datetime_module_are_stamps():
    naive = [datetime.datetime(2024, 1, 1), pd.Timestamp("2024-01-02")]
    clock, exact = read(pd.Index(naive, dtype=object))
    assert clock.zone is None and np.diff(exact).tolist() == [86400 * SECOND]
    days = pd.Index([datetime.date(2024, 1, 1), datetime.date(2024, 1, 2)])
    assert read(days)[1].tolist() == exact.tolist()
    zoned = [
        datetime.datetime(2024, 10, 27, 2, 30, tzinfo=BERLIN, fold=f) for f in (0, 1)
    ]
    clock, exact = read(pd.Index(zoned, dtype=object))
    assert clock.zone == "Europe/Berlin" and np.diff(exact).tolist() == [3600 * SECOND]


def test_objects_of_two_offsets_are_stamps_in_utc():
    hour = datetime.timedelta(hours=1)
    times = [
        datetime.datetime(2024, 1, 1, 12, tzinfo=datetime.timezone(hour)),
        datetime.datetime(2024, 1, 1, 12, tzinfo=datetime.timezone(2 * hour)),
    ]
    clock, exact = read(pd.Index(times, dtype=object))
    assert clock.zone == "UTC" and np.diff(exact).tolist() == [-3600 * SECOND]


def test_objects_of_timedelta_are_differences():
    times = pd.Index([datetime.timedelta(seconds=1)], dtype=object)
    assert read(times)[1].tolist() == [SECOND]


def test_naive_among_zoned_objects_is_refused():
    times = [
        datetime.datetime(2024, 1, 1),
        datetime.datetime(2024, 1, 1, tzinfo=BERLIN),
    ]
    with pytest.raises(ValueError, match="tz_localize"):
        read(pd.Index(times, dtype=object))


def test_a_period_starts_when_it_starts():
    clock, exact = read(pd.period_range("2024-01", periods=2, freq="M"))
    assert clock == Clock("stamp", None)
    assert (
        exact.tolist()
        == read(pd.DatetimeIndex(["2024-01-01", "2024-02-01"]))[1].tolist()
    )


@pytest.mark.parametrize(
    "times",
    [
        [1, 2],
        [1.0, 2.0],
        np.array([1, 2], dtype=np.uint8),
        np.array([1, 2], dtype=np.float32),
        pd.array([1, 2], dtype="Int64"),
        pd.array([1.0, 2.0], dtype="Float32"),
        pd.Categorical([1, 2]),
        np.array([1, 2.0], dtype=object),
        [Decimal(1), Decimal(2)],
        pd.RangeIndex(1, 3),
    ],
    ids=lambda times: str(pd.Index(times).dtype),
)
def test_numbers_of_every_dtype_are_floats(times):
    clock, exact = read(times)
    assert clock == Clock("number", None) and not clock.seconds
    assert exact.dtype == np.float64 and exact.tolist() == [1.0, 2.0]


def test_categories_of_stamps_are_stamps():
    times = pd.CategoricalIndex(pd.DatetimeIndex(["2024-01-02", "2024-01-01"]))
    clock, exact = read(times)
    assert clock.kind == "stamp" and np.diff(exact).tolist() == [-86400 * SECOND]


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (pd.DatetimeIndex(["2024", None]), r"NaT: the index of X has no time in row 1"),
        (pd.TimedeltaIndex(["1s", None, None]), "NaT.* row 1"),
        (pd.PeriodIndex(["2024", None], freq="Y"), "NaT.* row 1"),
        (pd.Index([pd.Timestamp("2024"), pd.NaT], dtype=object), "NaT.* row 1"),
        ([0.0, np.nan], "NaN.* row 1"),
        (pd.array([None, 1], dtype="Int64"), "NaN.* row 0"),
        ([0.0, np.inf], r"infinity .*dtype\('float64'\) in the index of X, row 1"),
        ([0.0, -1.7e308], "infinity or a value too large"),
        (["2024-01-01"], r"strings such as '2024-01-01'.*pd\.to_datetime"),
        (pd.Index(["2024"], dtype=object), r"pd\.to_datetime"),
        (pd.CategoricalIndex(["2024"]), r"pd\.to_datetime"),
        ([True, False], "must be stamps, time differences or numbers, got bool"),
        (pd.Index([1, "a"], dtype=object), "must be stamps"),
        (np.array([1 + 1j]), "must be stamps"),
        ([2**60, 2**60 + 1], r"beyond 2\*\*53.*pd\.to_datetime\(times, unit='ns'\)"),
        (pd.DatetimeIndex(["3000-01-01"]), "1677 to 2262.*numbers"),
        (pd.PeriodIndex(["3000"], freq="Y"), "1677 to 2262.*numbers"),
        (pd.to_timedelta([400 * 365 * 86400], unit="s").as_unit("s"), "64 bits"),
    ],
    ids=str,
)
def test_what_is_no_time_is_refused(times, message):
    with pytest.raises(ValueError, match=message):
        read(times)


def test_one_clock_does_not_read_another():
    naive, zoned = Clock("stamp", None), Clock("stamp", "Europe/Berlin")
    with pytest.raises(ValueError, match=r"fit saw stamps in zone .*tz_localize\('Eur"):
        zoned.require_same(naive)
    with pytest.raises(ValueError, match=r"fit saw naive stamps.*tz_convert"):
        naive.require_same(zoned)
    with pytest.raises(ValueError, match="Times are numbers, but fit saw naive stamps"):
        naive.require_same(Clock("number", None))
    zoned.require_same(Clock("stamp", "UTC"))  # the same instants, whatever the zone
