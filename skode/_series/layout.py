"""What fit learns of the user's rows, and reads all later rows by.

n rows, C channels, P covariates.
"""

import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from skode._series.clock import Clock, read_times
from skode._series.columns import first_row, labelled, numbers, picked
from skode._series.history import Table
from skode._series.places import Found, Rows, as_rows, index_of, locate, without_labels
from skode._series.target import Target, learn_target


@dataclass(frozen=True, eq=False)
class Layout:
    """How X and y of a fit say when, of which series, and what."""

    owner: str
    """Name of the estimator, for messages."""
    clock: Clock
    time: Hashable
    """As the user named or placed it; None: found in the index, or first."""
    series: Hashable
    time_name: Hashable
    """Of the column or level that was found; None: it has no name."""
    series_name: Hashable
    has_series: bool
    """Whether rows say which series they are of."""
    columns: pd.Index
    """All columns of X in fit; of arrays, positions."""
    from_array: bool
    """Whether X was an array."""
    covariates: pd.Index
    """The P columns of X that are known at every time."""
    target: Target
    own_channels: bool
    """Whether channels are columns of X: fit saw no y."""

    @property
    def n_channels(self) -> int:
        """How many values a row may observe."""
        return len(self.target.columns)

    @property
    def n_covariates(self) -> int:
        """How many columns of X are known at every time."""
        return len(self.covariates)

    @property
    def n_features(self) -> int:
        """Columns of X, as scikit-learn counts them."""
        return len(self.columns)

    @property
    def feature_names(self) -> np.ndarray | None:
        """Names of X's columns for scikit-learn; None: they are not all strings."""
        names = list(self.columns)
        if self.from_array or not names or any(type(name) is not str for name in names):
            return None
        return np.asarray(names, dtype=object)

    @property
    def channel_names(self) -> list[Hashable]:
        """Names of y's columns; of arrays, positions."""
        return list(self.target.columns)

    @property
    def seconds(self) -> bool:
        """Whether times as floats are seconds: they are stamps or differences."""
        return self.clock.seconds

    @property
    def time_unit(self) -> str:
        """What times as floats are in."""
        return "seconds" if self.seconds else "the units of X's times"

    def read(self, X: object, y: object = None) -> Table:
        """Return rows that came after fit: queries, or observations if y is given.

        Channels that X holds, since fit saw no y, are ignored if y is None.

        Raises
        ------
        TypeError, ValueError
            If X or y is not laid out as in fit, or holds what fit would refuse.
        """
        if y is not None:
            return self.read_observations(X, y)
        rows = self._rows(X)
        return self._table(self._locate(rows), None)

    def read_observations(self, X: object, y: object = None) -> Table:
        """Return observations; where fit saw no y, X holds them, and y may be None.

        Raises
        ------
        TypeError, ValueError
            As `read`, and if there is nothing to read observations from.
        """
        rows = self._rows(X)
        found = self._locate(rows)
        if y is not None:
            values = self.target.read(y, len(rows.frame), rows.index)
        elif self.own_channels:
            self._require(self.target.columns, found.others.columns)
            values = numbers(picked(found.others, self.target.columns), "X")
        else:
            raise ValueError(
                f"This {self.owner} was fitted with y: pass y, what was observed."
            )
        return self._table(found, values)

    def read_history(self, history: object) -> Table:
        """Return observations that come in one piece.

        Parameters
        ----------
        history : DataFrame, Series, array-like, or tuple (X, y)
            A frame has the channels beside what X has; an array has them last.

        Raises
        ------
        TypeError, ValueError
            If channels are missing, or without names to find them by.
        """
        if isinstance(history, tuple):
            if len(history) != 2:
                raise ValueError(
                    f"history must be one frame or (X, y), got {len(history)} parts."
                )
            X, y = history
            return self.read_observations(X, y)
        if self.own_channels:
            return self.read_observations(history)
        rows = as_rows(history, self.owner)
        if rows.kind == "array" and self.from_array:
            array = rows.frame.to_numpy()
            expected = self.n_features + self.n_channels
            if array.shape[1] != expected:
                raise ValueError(
                    f"history has {array.shape[1]} columns, but X has "
                    f"{self.n_features} and y {self.n_channels}: pass {expected}, or "
                    "(X, y)."
                )
            y = array[:, self.n_features :]
            return self.read_observations(array[:, : self.n_features], y)
        names = self.target.columns
        if not self.target.named or names.isin(self.columns).any():
            raise ValueError(
                "The channels of history cannot be told by name, since y had no names "
                "in fit or shares them with X: pass history=(X, y)."
            )
        missing = names.difference(rows.frame.columns)
        if len(missing):
            raise ValueError(
                f"history lacks the channels {labelled(missing)}: pass a frame that "
                "has them beside X's columns, or (X, y)."
            )
        y = picked(rows.frame, names)
        if self.target.kind == "series":
            y = y.iloc[:, 0]
        return self.read_observations(rows.frame.drop(columns=names), y)

    def give(
        self, X: object, values: np.ndarray
    ) -> pd.Series | pd.DataFrame | np.ndarray:
        """Return (n, C) in y's kind, with X's index and y's columns."""
        return self.target.give(values, index_of(X))

    def give_quantiles(
        self, X: object, values: np.ndarray, quantiles: Sequence[float]
    ) -> pd.DataFrame | np.ndarray:
        """Return (n, C, Q) in y's kind: Q columns, or entries, for each of y's."""
        return self.target.give_many(values, index_of(X), "quantile", list(quantiles))

    def give_paths(self, X: object, values: np.ndarray) -> pd.DataFrame | np.ndarray:
        """Return (S, n, C) in y's kind.

        Of a frame or Series, S columns for each of y's; arrays are (S, n) or (S, n, C).
        """
        if self.target.kind == "vector":
            return values[:, :, 0]
        if self.target.kind == "matrix":
            return values
        last = np.moveaxis(values, 0, -1)
        return self.target.give_many(last, index_of(X), "path", range(len(values)))

    def give_one(
        self, X: object, values: np.ndarray, name: str
    ) -> pd.Series | np.ndarray:
        """Return one number for each row, (n,); a Series of that name with pandas."""
        return self.target.give_one(values, index_of(X), name)

    def _rows(self, X: object) -> Rows:
        """Return X as a frame with the columns that fit saw, as far as it has them."""
        rows = as_rows(X, self.owner)
        if rows.kind == "frame" and self.from_array:
            if any(isinstance(name, str) for name in rows.frame.columns):
                warnings.warn(
                    f"X has feature names, but {self.owner} was fitted without "
                    "feature names",
                    UserWarning,
                    stacklevel=4,
                )
            rows = as_rows(rows.frame.to_numpy(), self.owner)
        if rows.kind != "array":
            return rows
        return self._array_rows(rows.frame)

    def _array_rows(self, frame: pd.DataFrame) -> Rows:
        columns = self.columns
        in_columns = self.time in columns and (
            not self.has_series or self.series in columns
        )
        if not in_columns:
            raise ValueError(
                "X is an array, but fit found times or series in the index of a "
                "frame: pass a frame or an index. A transformer before this one in a "
                'pipeline drops the index: set_output(transform="pandas") keeps it.'
            )
        width = frame.shape[1]
        if self.own_channels and width == self.n_features - self.n_channels:
            kept = columns[~columns.isin(self.target.columns)]
        elif width == self.n_features:
            kept = columns
        else:
            raise ValueError(
                f"X has {width} features, but {self.owner} is expecting "
                f"{self.n_features} features as input."
            )
        if self.from_array:
            return Rows(frame.set_axis(kept, axis=1), "array")
        warnings.warn(
            f"X does not have valid feature names, but {self.owner} was fitted with "
            "feature names",
            UserWarning,
            stacklevel=5,
        )
        return Rows(frame.set_axis(kept, axis=1), "frame")

    def _locate(self, rows: Rows) -> Found:
        if rows.kind == "index" and (self.from_array or rows.frame.index.nlevels == 1):
            # An index alone holds times, whatever their column was called.
            found = locate(rows, None, None)
        else:
            found = locate(
                rows, self.time, self.series, self.time_name, self.series_name
            )
        if self.has_series and found.ids is None:
            name = f" {self.series_name!r}" if self.series_name is not None else ""
            raise ValueError(
                "X does not say which series its rows are of, but fit saw a column or "
                f"level{name} that did: give it too."
            )
        if found.ids is not None and not self.has_series:
            raise ValueError(
                "X says which series its rows are of, but fit saw one series without "
                "a name: drop that level."
            )
        self._require_columns(found)
        return found

    def _require_columns(self, found: Found) -> None:
        """Raise in scikit-learn's words if X lacks covariates, or has new columns."""
        names = found.others.columns
        known = self.covariates
        if self.own_channels:
            known = known.append(self.target.columns)
        new = [name for name in names if name not in known]
        missing = [name for name in self.covariates if name not in names]
        if new or missing:
            raise ValueError(
                "The feature names should match those that were passed during fit.\n"
                + _listed("Feature names unseen at fit time:", new)
                + _listed("Feature names seen at fit time, yet now missing:", missing)
            )

    def _require(self, channels: pd.Index, names: pd.Index) -> None:
        missing = [name for name in channels if name not in names]
        if missing:
            raise ValueError(
                f"X lacks the channels {labelled(missing)}, which fit found in it: "
                "give them, NaN where nothing was observed, or pass y."
            )

    def _table(self, found: Found, values: np.ndarray | None) -> Table:
        clock, times = read_times(found.times, found.where)
        self.clock.require_same(clock)
        return _table(found, times, self.covariates, values)


def learn(
    X: object,
    y: object = None,
    time: Hashable = None,
    series: Hashable = None,
    owner: str = "Forecaster",
) -> tuple[Layout, Table]:
    """Learn how rows are laid out, and read them.

    Parameters
    ----------
    X : DataFrame, Index, or array-like of shape (n_rows, n_columns)
        When, of which series, and covariates; channels too if y is None.
    y : Series, DataFrame, array-like or None
        What was observed; NaN: not observed.
    time, series : hashable
        Names of columns or levels, positions in an array; None: found.
    owner : str
        Name of the estimator, for messages.

    Returns
    -------
    layout : Layout
        Reads all later rows.
    table : Table
        These rows.

    Raises
    ------
    TypeError, ValueError
        If X or y does not say what it must; the message says how it can.
    """
    rows = as_rows(X, owner)
    if time is None:
        rows = without_labels(rows, owner)
    found = locate(rows, time, series)
    clock, times = read_times(found.times, found.where)
    if y is None:
        covariates = found.others.columns[:0]
        target, values = _own_target(X, found.others)
    else:
        covariates = found.others.columns
        _require_index_of(rows, y)
        target, values = learn_target(y, len(rows.frame), rows.index)
        _require_no_answers(found.others, target, values)
    if np.isnan(values).all():
        raise ValueError(
            f"Input {'X' if y is None else 'y'} contains NaN only: nothing was "
            "observed in any row."
        )
    layout = Layout(
        owner=owner,
        clock=clock,
        time=found.time_name if rows.kind == "array" else time,
        series=found.series_name if rows.kind == "array" else series,
        time_name=found.time_name,
        series_name=found.series_name,
        has_series=found.ids is not None,
        columns=rows.frame.columns,
        from_array=rows.kind == "array",
        covariates=covariates,
        target=target,
        own_channels=y is None,
    )
    return layout, _table(found, times, covariates, values)


def _require_index_of(rows: Rows, y: object) -> None:
    """Raise if X is an array beside a y that still has times for an index."""
    index = getattr(y, "index", None)
    timed = (pd.DatetimeIndex, pd.TimedeltaIndex, pd.PeriodIndex)
    if rows.kind == "array" and isinstance(index, timed):
        raise ValueError(
            "X is an array, but the index of y holds times: X has lost its own. A "
            "transformer before this one in a pipeline drops the index: "
            'set_output(transform="pandas") keeps it.'
        )


def _require_no_answers(others: pd.DataFrame, target: Target, y: np.ndarray) -> None:
    """Raise if covariates are what is to be forecast, by name and by value."""
    if not target.named:
        return
    places = target.columns.get_indexer(others.columns)
    told = [
        name
        for number, (name, place) in enumerate(zip(others.columns, places, strict=True))
        if place >= 0 and _equal(others.iloc[:, number], y[:, place])
    ]
    if told:
        raise ValueError(
            f"Columns {labelled(told)} of X are in y too: as covariates, known at all "
            "times, they would tell what is to be forecast. Leave them out of X (X[[]] "
            "keeps the index alone), or pass no y: channels are then read from X."
        )


def _equal(column: pd.Series, values: np.ndarray) -> bool:
    if column.dtype.kind not in "iufb":
        return False
    seen = column.to_numpy(dtype=np.float64, na_value=np.nan)
    return bool(np.array_equal(seen, values, equal_nan=True))


def _own_target(X: object, others: pd.DataFrame) -> tuple[Target, np.ndarray]:
    """Return the channels that X holds beside times and series."""
    if not others.shape[1]:
        raise ValueError(
            "X holds nothing to forecast beside its times: requires y to be passed, "
            "but the target y is None."
        )
    if isinstance(X, pd.Series):
        return Target("series", others.columns), numbers(others, "X")
    named = isinstance(X, pd.DataFrame)
    return Target("frame" if named else "matrix", others.columns), numbers(others, "X")


def _table(
    found: Found, times: np.ndarray, names: pd.Index, values: np.ndarray | None
) -> Table:
    keys, codes = _series_of(found, len(times))
    covariates = numbers(picked(found.others, names), "X")
    missing = np.isnan(covariates)
    if missing.any():
        name = names[int(np.argmax(missing.any(axis=0)))]
        raise ValueError(
            f"Input X contains NaN: covariate {name!r} is missing in row "
            f"{first_row(missing)}, but covariates must be known at every time. Fill "
            "it, with SimpleImputer or groupby(...).ffill(), or make it a channel of "
            "y, where NaN means not observed."
        )
    return Table(keys, codes, times, covariates, values)


def _series_of(found: Found, n_rows: int) -> tuple[list[Hashable], np.ndarray]:
    if found.ids is None:
        return [None], np.zeros(n_rows, dtype=np.intp)
    codes, keys = pd.factorize(found.ids)
    missing = codes < 0
    if missing.any():
        raise ValueError(
            f"Input X contains NaN: row {first_row(missing)} does not say which "
            "series it is of. Drop such rows, or name their series."
        )
    return keys.tolist(), codes.astype(np.intp)


def _listed(title: str, names: list[Hashable]) -> str:
    if not names:
        return ""
    return "\n".join([title, *(f"- {name}" for name in names[:5])]) + (
        "\n- ...\n" if len(names) > 5 else "\n"
    )
