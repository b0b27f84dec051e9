"""Where in X the times stand, and which series each row is of."""

import datetime
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.utils import check_array

from skode._series.clock import kind_of
from skode._series.columns import labelled

_HOW_TO_GIVE_TIMES = (
    "Give times in the index, X.set_index(...), or name their column, time=...{hint}; "
    "name the index if its counts are times. "
    "A transformer before this one in a pipeline drops the index, and with it the "
    'times: set_output(transform="pandas") keeps both.'
)


@dataclass(frozen=True, eq=False)
class Rows:
    """X as a frame, whatever it came as."""

    frame: pd.DataFrame
    """Its columns are positions where X was an array, none where it was an index."""
    kind: str
    """"frame", "index" or "array"."""

    @property
    def index(self) -> pd.Index | None:
        """The user's index; None: X was an array."""
        return None if self.kind == "array" else self.frame.index


@dataclass(frozen=True, eq=False)
class Found:
    """Times and series of rows, and the columns that are neither."""

    times: pd.Index
    ids: pd.Index | None
    """None: one series."""
    time_name: Hashable
    """Of the column or level; None: it has no name."""
    series_name: Hashable
    where: str
    """The place of the times, for messages."""
    others: pd.DataFrame
    """The other columns."""


def as_rows(X: object, owner: str) -> Rows:
    """Return X as a frame.

    Parameters
    ----------
    X : DataFrame, Series, Index, or array-like of shape (n_rows, n_columns)
        As the user gave it.
    owner : str
        The estimator's name, for scikit-learn's messages.

    Raises
    ------
    TypeError, ValueError
        If it is none of these, has no rows, or columns of the same name.
    """
    X = _index_of_stamps(X)
    if isinstance(X, pd.Index):
        rows = Rows(pd.DataFrame(index=X), "index")
    elif isinstance(X, pd.Series):
        rows = Rows(X.to_frame(name=X.name), "frame")
    elif isinstance(X, pd.DataFrame):
        rows = Rows(X, "frame")
    elif hasattr(X, "to_pandas"):
        raise TypeError(
            f"X is a {type(X).__module__.split('.')[0]} {type(X).__name__}, which has "
            "no index: pass X.to_pandas()."
        )
    else:
        array = check_array(
            _without_stamps(X),
            dtype=np.float64,
            ensure_all_finite=False,
            input_name="X",
            estimator=owner,
        )
        return Rows(pd.DataFrame(array), "array")
    if not len(rows.frame):
        raise ValueError(
            f"Found array with 0 sample(s) (shape={rows.frame.shape}) while a minimum "
            f"of 1 is required by {owner}: X has no rows."
        )
    twice = rows.frame.columns[rows.frame.columns.duplicated()]
    if len(twice):
        raise ValueError(
            f"X has several columns named {labelled(twice.unique())}: rename them."
        )
    return rows


def without_labels(rows: Rows, owner: str) -> Rows:
    """Return a frame that names nothing, neither rows nor columns, as an array.

    Raises
    ------
    ValueError
        If integers in its index may be times, or what a split has left of counts.
    """
    columns, index = rows.frame.columns, rows.frame.index
    if (
        rows.kind != "frame"
        or not len(columns)
        or not isinstance(columns, pd.RangeIndex)
        or index.nlevels > 1
        or index.name is not None
        or index.dtype.kind not in "iu"
    ):
        return rows
    if isinstance(index, pd.RangeIndex):
        return as_rows(rows.frame.to_numpy(), owner)
    raise ValueError(
        "X names neither its columns nor its index, whose integers may be times or "
        "mere counts of rows. Name the index, X.rename_axis('time'), or pass "
        "X.to_numpy(), whose first column is times."
    )


def index_of(X: object) -> pd.Index | None:
    """Return the index of X; None: it is an array."""
    X = _index_of_stamps(X)
    if isinstance(X, pd.DataFrame | pd.Series):
        return X.index
    return X if isinstance(X, pd.Index) else None


def _index_of_stamps(X: object) -> object:
    """Return an index of a vector of stamps or differences; all else as it is."""
    if isinstance(X, np.ndarray) and X.dtype.kind in "mM" and X.size == len(X):
        return pd.Index(X.ravel())
    if isinstance(X, pd.api.extensions.ExtensionArray) and X.dtype.kind in "mM":
        return pd.Index(X)
    if isinstance(X, list | tuple) and len(X):
        kind = pd.api.types.infer_dtype(X, skipna=True)
        if kind.startswith(("datetime", "timedelta", "date", "period")):
            return pd.Index(X)
    return X


def _without_stamps(X: object) -> object:
    """Return an array-like, or raise since it holds what floats do not."""
    if isinstance(X, datetime.date | datetime.timedelta | pd.Period | np.datetime64):
        raise TypeError(f"X is one time, {X!r}: pass an index of it, pd.Index([X]).")
    if isinstance(X, np.ndarray) and X.dtype.kind in "biufc":
        return X
    if isinstance(X, str | list | tuple | np.ndarray):
        entries = np.asarray(X, dtype=object).ravel()
        kind = pd.api.types.infer_dtype(entries, skipna=True)
        if kind.startswith(("string", "date", "timedelta", "period")):
            raise TypeError(
                f"An array X must hold numbers, got {entries[0]!r}. Give times that "
                "are none in an index or a DataFrame; pd.to_datetime reads strings."
            )
    return X


def locate(
    rows: Rows,
    time: Hashable,
    series: Hashable,
    time_name: Hashable = None,
    series_name: Hashable = None,
) -> Found:
    """Find the times and the series of rows.

    Parameters
    ----------
    rows : Rows
        Of X.
    time, series : hashable
        Names of columns or levels that the user gave; None: to be found.
    time_name, series_name : hashable
        Names of levels that fit found; None: they had none.

    Raises
    ------
    ValueError
        If they are not there, or not to be told from each other.
    """
    if rows.kind == "array":
        return _locate_in_array(rows.frame, time, series)
    if time is None:
        time = _if_there(rows, time_name)
    if series is None:
        series = _if_there(rows, series_name)
    if time is not None and time == series:
        raise ValueError(f"{time!r} cannot be both the time and the series.")
    names = rows.frame.index.names
    free = list(range(rows.frame.index.nlevels))
    series_level = _level_named(rows, series, "series")
    if series_level is not None:
        free.remove(series_level)
    if time is not None:
        time_level = _level_named(rows, time, "time")
    else:
        time_level = _time_level(rows, free)
    if time_level in free:
        free.remove(time_level)
    if series is None and rows.frame.index.nlevels > 1 and free:
        if len(free) > 1:
            raise ValueError(
                f"Which level of X's index tells the series, {labelled(names)}? Name "
                "it, series=..., or drop the others, X.droplevel(...)."
            )
        series_level = free[0]
    return _found(rows, time, time_level, series, series_level)


def _found(
    rows: Rows,
    time: Hashable,
    time_level: int | None,
    series: Hashable,
    series_level: int | None,
) -> Found:
    frame, index = rows.frame, rows.frame.index
    columns = []
    if time_level is None:
        times, where = pd.Index(frame[time]), f"column {time!r}"
        columns.append(time)
    else:
        times = index.get_level_values(time_level)
        time = index.names[time_level]
        where = "the index of X" if time is None else f"index level {time!r}"
    if series_level is not None:
        ids = index.get_level_values(series_level)
        series = index.names[series_level]
    elif series is not None:
        ids = pd.Index(frame[series])
        columns.append(series)
    else:
        ids = None
    return Found(times, ids, time, series, where, frame.drop(columns=columns))


def _if_there(rows: Rows, name: Hashable) -> Hashable:
    """Return a name that fit found, if it is of one level or one column now."""
    among_levels = name in rows.frame.index.names
    return name if among_levels != (name in rows.frame.columns) else None


def _level_named(rows: Rows, name: Hashable, argument: str) -> int | None:
    """Return the number of a level of that name; None: it is a column's, or none."""
    if name is None or name in rows.frame.columns:
        return None
    names = list(rows.frame.index.names)
    if name not in names:
        raise ValueError(
            f"{argument}={name!r} is neither a column of X ("
            f"{labelled(rows.frame.columns) or 'it has none'}) nor a level of its "
            f"index ({labelled(names)})."
        )
    return names.index(name)


def _time_level(rows: Rows, free: list[int]) -> int:
    """Return the level that holds times, where the user did not say."""
    index = rows.frame.index
    if not free:
        raise ValueError(
            "X has series but no times. " + _HOW_TO_GIVE_TIMES.format(hint=_hint(rows))
        )
    if len(free) > 2:
        raise ValueError(
            f"X's index has {index.nlevels} levels, {labelled(index.names)}: say "
            "which are time=... and series=..."
        )
    if len(free) == 1:
        if (
            rows.kind == "frame"
            and isinstance(index, pd.RangeIndex)
            and index.name is None
        ):
            raise ValueError(
                "X has no times: its index only counts rows. "
                + _HOW_TO_GIVE_TIMES.format(hint=_hint(rows))
            )
        return free[0]
    # Categories are of no kind: they name series, whatever they are made of.
    kinds = {level: kind_of(index.get_level_values(level)) for level in free}
    for wanted in ({"stamp", "delta"}, {"stamp", "delta", "number"}):
        fitting = [level for level in free if kinds[level] in wanted]
        if len(fitting) == 1:
            return fitting[0]
    return free[-1]


def _hint(rows: Rows) -> str:
    dated = [
        name
        for name, dtype in rows.frame.dtypes.items()
        if name is not None
        and (dtype.kind in "mM" or isinstance(dtype, pd.PeriodDtype))
    ]
    return f" (time={dated[0]!r}?)" if dated else ""


def _locate_in_array(frame: pd.DataFrame, time: Hashable, series: Hashable) -> Found:
    time = _position(frame, 0 if time is None else time, "time")
    where = f"column {time} of X"
    if series is None:
        ids, columns = None, [time]
    else:
        series = _position(frame, series, "series")
        if series == time:
            raise ValueError(
                f"Column {time} of X cannot hold both the times and the series."
            )
        ids, columns = pd.Index(frame[series]), [time, series]
    others = frame.drop(columns=columns)
    return Found(pd.Index(frame[time]), ids, time, series, where, others)


def _position(frame: pd.DataFrame, place: Hashable, argument: str) -> int:
    if not isinstance(place, int | np.integer) or isinstance(place, bool):
        raise ValueError(
            f"{argument}={place!r} names a column, but X is an array: pass a "
            "DataFrame, or the column's position. A transformer before this one in a "
            'pipeline drops names: set_output(transform="pandas") keeps them.'
        )
    if place in frame.columns:
        return int(place)
    if -len(frame.columns) <= place < 0:
        return int(frame.columns[place])
    raise ValueError(
        f"{argument}={place} is no column of X, which has {len(frame.columns)}."
    )
