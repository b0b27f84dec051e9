"""How times are given: stamps, time differences or numbers; read without rounding.

n rows. Stamps and differences are int64 nanoseconds, numbers float64.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from pandas.api.types import infer_dtype

from skode._series.columns import first_row

Kind = Literal["stamp", "delta", "number"]

_WORDS = {"stamp": "stamps", "delta": "time differences", "number": "numbers"}
_OBJECTS: dict[str, Kind] = {
    "datetime": "stamp",
    "datetime64": "stamp",
    "date": "stamp",
    "timedelta": "delta",
    "timedelta64": "delta",
    "integer": "number",
    "floating": "number",
    "mixed-integer-float": "number",
    "decimal": "number",
}


@dataclass(frozen=True, slots=True)
class Clock:
    """What kind of times a forecaster was fitted with."""

    kind: Kind
    zone: str | None
    """Of stamps, as they print; None: stamps are naive, or no stamps at all."""

    @property
    def seconds(self) -> bool:
        """Whether times as floats are in seconds."""
        return self.kind != "number"

    def __str__(self) -> str:
        if self.kind != "stamp":
            return _WORDS[self.kind]
        return f"stamps in zone {self.zone}" if self.zone else "naive stamps"

    def require_same(self, other: "Clock") -> None:
        """Raise unless `other`, the clock of rows that came later, reads as this one.

        Raises
        ------
        ValueError
            If the kinds differ, or one is naive and the other has a zone.
        """
        if self.kind != other.kind:
            raise ValueError(
                f"Times are {other}, but fit saw {self}: give times as in fit."
            )
        if self.kind == "stamp" and (self.zone is None) != (other.zone is None):
            remedy = (
                f"give the zone of the naive ones, tz_localize({self.zone!r})"
                if self.zone
                else "take the zone away, tz_convert(zone).tz_localize(None), or fit "
                "with zoned stamps"
            )
            raise ValueError(
                f"Times are {other}, but fit saw {self}. Naive and zoned stamps do not "
                f"compare: {remedy}."
            )


def kind_of(times: pd.Index) -> Kind | None:
    """Return the kind of times that an index may hold, or None."""
    dtype = times.dtype
    if isinstance(dtype, pd.PeriodDtype):
        return "stamp"
    if dtype.kind == "O":
        return _OBJECTS.get(infer_dtype(times, skipna=True))
    by_letter: dict[str, Kind] = {
        "M": "stamp",
        "m": "delta",
        "i": "number",
        "u": "number",
        "f": "number",
    }
    return by_letter.get(dtype.kind)


def read_times(times: pd.Index, where: str) -> tuple[Clock, np.ndarray]:
    """Return what kind of times these are, and the times, (n,).

    Parameters
    ----------
    times : Index of length n
        As the user gave them.
    where : str
        The place they came from, for messages.

    Raises
    ------
    ValueError
        If they are no times, one is missing or infinite, or does not fit.
    """
    if isinstance(times.dtype, pd.CategoricalDtype):
        times = times.astype(times.dtype.categories.dtype)
    kind = kind_of(times)
    _require_none_missing(times, where)
    if kind is None:
        raise ValueError(_no_times(times, where))
    if kind == "number":
        return Clock("number", None), _numbers(times, where)
    try:
        if isinstance(times, pd.PeriodIndex):
            times = times.to_timestamp(how="start")
        elif not isinstance(times, pd.DatetimeIndex | pd.TimedeltaIndex):
            times = _parsed(times, kind, where)
        exact = times.as_unit("ns").asi8  # of zoned stamps: in UTC
    except (pd.errors.OutOfBoundsDatetime, pd.errors.OutOfBoundsTimedelta) as error:
        raise ValueError(
            f"Times in {where} do not fit nanoseconds in 64 bits ({error}), which "
            "reach from 1677 to 2262. Give such times as numbers, years for example."
        ) from error
    zone = getattr(times, "tz", None)
    return Clock(kind, None if zone is None else str(zone)), exact.copy()


def _require_none_missing(times: pd.Index, where: str) -> None:
    missing = np.asarray(times.isna())
    if missing.any():
        what = "NaT" if kind_of(times) in ("stamp", "delta") else "NaN"
        raise ValueError(
            f"Input X contains {what}: {where} has no time in row "
            f"{first_row(missing)}. Each row needs one: drop these rows."
        )


def _no_times(times: pd.Index, where: str) -> str:
    text = f"Times in {where} must be stamps, time differences or numbers, got "
    if infer_dtype(times) == "string":
        return (
            f"{text}strings such as {times[0]!r}: parse them first, with "
            "pd.to_datetime or pd.to_timedelta."
        )
    return f"{text}{times.dtype} such as {times[0]!r}."


def _numbers(times: pd.Index, where: str) -> np.ndarray:
    floats = times.to_numpy(dtype=np.float64, copy=True)
    # A quarter of the largest float, so that differences of times are finite too.
    infinite = ~(np.abs(floats) <= np.finfo(np.float64).max / 4)
    if infinite.any():
        raise ValueError(
            "Input X contains infinity or a value too large for dtype('float64') "
            f"in {where}, row {first_row(infinite)}."
        )
    if times.dtype.kind in "iu" and np.abs(floats).max(initial=0) >= 2.0**53:
        raise ValueError(
            f"Times in {where} are integers beyond 2**53, which floats do not tell "
            "apart: make stamps of them, pd.to_datetime(times, unit='ns'), or "
            "subtract the first."
        )
    return floats


def _parsed(times: pd.Index, kind: Kind, where: str) -> pd.Index:
    """Return objects of the datetime module, or arrow's stamps, as pandas' own."""
    if kind == "delta":
        return pd.to_timedelta(times)
    zones = {getattr(time, "tzinfo", None) for time in times}
    if None in zones and len(zones) > 1:
        raise ValueError(
            f"Times in {where} are naive in some rows and zoned in others: "
            "localize the naive ones, tz_localize(zone)."
        )
    # Stamps on both sides of a change of summer time may differ in their offsets.
    parsed = pd.to_datetime(list(times), utc=zones != {None})
    same = zones != {None} and len({str(zone) for zone in zones}) == 1
    return parsed.tz_convert(zones.pop()) if same else parsed


def seconds_between(exact: np.ndarray, origin: int | float) -> np.ndarray:
    """Return exact times relative to an origin, (n,) float64, in seconds or numbers.

    Nanoseconds are subtracted as integers: a nanosecond counts in the year 2200 too.
    """
    if exact.dtype != np.int64:
        return exact - np.float64(origin)
    start = np.int64(origin)
    billion = np.int64(1_000_000_000)
    with np.errstate(over="ignore"):
        near = (exact - start) / 1e9  # of more than 292 years, this wraps around
    far = (exact // billion - start // billion).astype(np.float64)
    far += (exact % billion - start % billion) / 1e9
    return np.where(np.abs(far) < 9e9, near, far)
