"""What y is: its kind and its channels, and predictions of the same kind.

n rows, C channels, Q quantiles, S paths.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from sklearn.utils import check_array, check_consistent_length

from skode._series.columns import labelled, numbers, picked


@dataclass(frozen=True, eq=False)
class Target:
    """The kind of y that fit saw."""

    kind: Literal["series", "frame", "vector", "matrix"]
    columns: pd.Index
    """C names of channels; of arrays, positions."""

    @property
    def named(self) -> bool:
        """Whether each channel has a name."""
        named = self.kind in ("series", "frame")
        return named and not any(name is None for name in self.columns)

    def read(self, y: object, n_rows: int, index: pd.Index | None) -> np.ndarray:
        """Return later observations, (n, C) with NaN, channels in the order of fit.

        Raises
        ------
        ValueError
            If channels are missing, new, or not as many as in fit.
        """
        kind, frame = _as_frame(y, n_rows, index)
        if kind == "frame" and self.kind == "frame":
            _require_same_names(frame.columns, self.columns)
            frame = picked(frame, self.columns)
        elif frame.shape[1] != len(self.columns):
            raise ValueError(
                f"y has {frame.shape[1]} channels, but fit saw {len(self.columns)}."
            )
        return numbers(frame, "y")

    def give(
        self, values: np.ndarray, index: pd.Index | None
    ) -> pd.Series | pd.DataFrame | np.ndarray:
        """Return (n, C) in y's kind."""
        if self.kind == "vector":
            return values[:, 0]
        if self.kind == "series":
            return pd.Series(values[:, 0], index=index, name=self.columns[0])
        if self.kind == "frame":
            return pd.DataFrame(values, index=index, columns=self.columns)
        return values

    def give_many(
        self,
        values: np.ndarray,
        index: pd.Index | None,
        level: str,
        labels: Sequence[Hashable],
    ) -> pd.DataFrame | np.ndarray:
        """Return (n, C, K) in y's kind, with K columns for each of y's.

        A Series becomes a frame of K columns, a frame gets a level of columns below
        its own, arrays an axis at their end.
        """
        if self.kind == "vector":
            return values[:, 0]
        if self.kind == "matrix":
            return values
        last = pd.Index(labels, name=level)
        if self.kind == "series":
            return pd.DataFrame(values[:, 0], index=index, columns=last)
        above = [self.columns.get_level_values(k) for k in range(self.columns.nlevels)]
        arrays = [np.repeat(names, len(last)) for names in above]
        columns = pd.MultiIndex.from_arrays(
            [*arrays, np.tile(last, len(self.columns))],
            names=[*self.columns.names, level],
        )
        return pd.DataFrame(
            values.reshape(len(values), -1), index=index, columns=columns
        )

    def give_one(
        self, values: np.ndarray, index: pd.Index | None, name: str
    ) -> pd.Series | np.ndarray:
        """Return one number for each row, (n,): a Series where y was of pandas."""
        if self.kind in ("vector", "matrix"):
            return values
        return pd.Series(values, index=index, name=name)


def learn_target(
    y: object, n_rows: int, index: pd.Index | None
) -> tuple[Target, np.ndarray]:
    """Return the kind of y and its values, (n, C) float64 with NaN.

    Parameters
    ----------
    y : Series, DataFrame, or array-like of shape (n_rows,) or (n_rows, n_channels)
        NaN, None and NA: not observed.
    n_rows : int
        Rows of X.
    index : Index or None
        Of X; None: X is an array.

    Raises
    ------
    ValueError
        If y holds no numbers, has other rows than X, or no channels.
    """
    kind, frame = _as_frame(y, n_rows, index)
    if not frame.shape[1]:
        raise ValueError("y has no columns, but each is a channel to forecast.")
    twice = frame.columns[frame.columns.duplicated()]
    if len(twice):
        raise ValueError(
            f"y has several columns named {labelled(twice.unique())}: rename them."
        )
    return Target(kind, frame.columns), numbers(frame, "y")


def _as_frame(
    y: object, n_rows: int, index: pd.Index | None
) -> tuple[Literal["series", "frame", "vector", "matrix"], pd.DataFrame]:
    kind: Literal["series", "frame", "vector", "matrix"]
    if isinstance(y, pd.Series):
        kind, frame = "series", pd.DataFrame({0: y})
        frame.columns = pd.Index([y.name])
    elif isinstance(y, pd.DataFrame):
        kind, frame = "frame", y
    else:
        array = _array(y)
        kind = "vector" if array.ndim == 1 else "matrix"
        frame = pd.DataFrame(array.reshape(len(array), -1))
    if len(frame) != n_rows:
        check_consistent_length(np.empty(n_rows), frame)
    labels = kind in ("series", "frame")
    if labels and index is not None and not frame.index.equals(index):
        raise ValueError(
            "y's index is not X's, so that rows would not be of each other. Take "
            "y.reindex(X.index) if labels say which row is which, or y.to_numpy() if "
            "their order does."
        )
    return kind, frame


def _array(y: object) -> np.ndarray:
    """Return y as floats, (n,) or (n, C)."""
    if isinstance(y, list | tuple):
        y = np.asarray(y)
    if isinstance(y, np.ndarray) and y.dtype.kind == "O":
        y = y.copy()
        y[pd.isna(y)] = np.nan  # None and NA, which floats do not know
    dtype = getattr(y, "dtype", None)
    if getattr(dtype, "kind", None) in ("m", "M"):
        raise ValueError(f"y must hold numbers, got {dtype}.")
    return check_array(
        y,
        dtype=np.float64,
        ensure_all_finite=False,
        ensure_2d=False,
        input_name="y",
    )


def _require_same_names(names: pd.Index, expected: pd.Index) -> None:
    missing, new = expected.difference(names), names.difference(expected)
    if len(missing) or len(new):
        raise ValueError(
            "The columns of y must be those of fit."
            + (f" Missing: {labelled(missing)}." if len(missing) else "")
            + (f" New: {labelled(new)}." if len(new) else "")
        )
