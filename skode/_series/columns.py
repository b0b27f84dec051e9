"""Columns of a frame as numbers, and what is said where they are none."""

import numpy as np
import pandas as pd


def first_row(bad: np.ndarray) -> int:
    """Return the number of the first row that is marked, (n,) or (n, K)."""
    return int(np.argmax(bad.reshape(len(bad), -1).any(axis=1)))


def picked(frame: pd.DataFrame, names: pd.Index) -> pd.DataFrame:
    """Return the columns of these names, in their order; a name may be None."""
    return frame.iloc[:, frame.columns.get_indexer(names)]


def numbers(frame: pd.DataFrame, what: str) -> np.ndarray:
    """Return columns as (n, K) float64, NaN where a value is missing.

    Parameters
    ----------
    frame : DataFrame of shape (n, K)
        Of numbers, booleans or pandas' nullable kinds of these.
    what : str
        "X" or "y", for messages.

    Raises
    ------
    ValueError
        If a column holds no numbers, or infinities.
    """
    table = np.empty(frame.shape)
    for place, name in enumerate(frame.columns):
        table[:, place] = _column(frame.iloc[:, place], name, what)
    return table


def _column(column: pd.Series, name: object, what: str) -> np.ndarray:
    if column.dtype.kind == "c":
        raise ValueError(f"Complex data not supported: column {name!r} of {what}.")
    if not _holds_numbers(column):
        raise ValueError(_no_numbers(column, name, what))
    values = column.to_numpy(dtype=np.float64, na_value=np.nan)
    infinite = np.isinf(values)
    if infinite.any():
        raise ValueError(
            f"Input {what} contains infinity or a value too large for "
            f"dtype('float64') in column {name!r}, row {first_row(infinite)}."
        )
    return values


def _holds_numbers(column: pd.Series) -> bool:
    # Categories are objects here, and no numbers even if they are made of them.
    if column.dtype.kind == "O":
        kinds = {"integer", "floating", "mixed-integer-float", "boolean", "decimal"}
        # A column of nothing but None was not observed at all.
        return pd.api.types.infer_dtype(column, skipna=True) in kinds | {"empty"}
    return column.dtype.kind in "iufb"


def _no_numbers(column: pd.Series, name: object, what: str) -> str:
    text = f"Column {name!r} of {what} must hold numbers, got {column.dtype}"
    if column.dtype.kind in "mM":
        place = "pd.Index(X)" if name is None else f"time={name!r}"
        remedy = f"{place} if these are the times of rows, or numbers of them"
    elif what == "y":
        remedy = "forecasts are of numbers"
    else:
        remedy = (
            f"encode it, with OneHotEncoder or pd.get_dummies, or series={name!r} if "
            "it says which series a row is of"
        )
    return f"{text}: {remedy}."


def labelled(names: object) -> str:
    """Return names as a message lists them."""
    listed = [repr(name) for name in names]  # type: ignore[attr-defined]
    return ", ".join(listed[:8]) + (", ..." if len(listed) > 8 else "")
