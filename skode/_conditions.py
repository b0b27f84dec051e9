"""What a conditional density is given: labels or covariates, as numbers.

n rows, C numbers each.
"""

import warnings
from dataclasses import dataclass

import numpy as np

from skode._border import weighted_moments

_FEW_INTEGERS = 20


@dataclass(frozen=True, slots=True, eq=False)
class Conditions:
    """Labels as unit vectors, or covariates of mean 0 and standard deviation 1."""

    labels: np.ndarray | None
    """(C,) sorted; None: covariates."""
    shift: np.ndarray
    """(C,) of covariates."""
    scale: np.ndarray
    """(C,)."""

    @classmethod
    def of(cls, y: object, weight: np.ndarray) -> "Conditions":
        """Learn what y is, from training rows.

        Raises
        ------
        ValueError
            If y is None, has another length than the weights, or is not finite.
        """
        if y is None:
            raise ValueError(
                "conditional=True estimates the density of X given y: pass y, a "
                "vector of labels, or covariates."
            )
        values = np.asarray(y)
        _check_length(values, len(weight))
        if values.ndim == 1 and values.dtype.kind in "OUSbiu":
            labels = _distinct(values)
            if values.dtype.kind in "iu" and len(labels) > _FEW_INTEGERS:
                warnings.warn(
                    f"The {len(labels)} different integers in y are taken as labels, "
                    "of which none is near another: pass y.astype(float) for a "
                    "covariate, or y.astype(str) for labels without this warning.",
                    UserWarning,
                    stacklevel=5,  # the caller of fit, through scikit-learn's wrapper
                )
            return cls(labels, np.zeros(len(labels)), np.ones(len(labels)))
        return cls(None, *weighted_moments(_table(values), weight))

    def encode(self, y: object, n_rows: int) -> np.ndarray:
        """Return (n_rows, C) numbers.

        Raises
        ------
        ValueError
            If y has another shape than in training, or labels that were not there.
        """
        values = np.asarray(y)
        _check_length(values, n_rows)
        if self.labels is None:
            table = _table(values)
            if table.shape[1] != len(self.shift):
                raise ValueError(
                    f"y has {table.shape[1]} covariates, but the density was fitted "
                    f"given {len(self.shift)}."
                )
            return (table - self.shift) / self.scale
        if values.ndim != 1:
            raise ValueError(f"Labels y must be a vector, got shape {values.shape}.")
        unknown = np.setdiff1d(_distinct(values), self.labels)
        if len(unknown):
            raise ValueError(
                f"y has labels {_plain(unknown)} that were not there in fit: "
                f"{_plain(self.labels)}."
            )
        return (values[:, None] == self.labels).astype(np.float64)

    def repeated(self, y: object, n_rows: int) -> np.ndarray:
        """Return y for so many rows: itself, or, of a single one, copies.

        Raises
        ------
        ValueError
            If there are several, and of another number.
        """
        values = np.asarray(y)
        several = self.labels is None and len(self.shift) > 1
        if values.ndim == 0 or (values.ndim == 1 and several):
            values = values[None]
        if len(values) not in (1, n_rows):
            raise ValueError(
                f"y has {len(values)} conditions for n_samples={n_rows}: pass one, or "
                f"n_samples={len(values)}."
            )
        return np.repeat(values, n_rows, axis=0) if len(values) == 1 else values


def _check_length(values: np.ndarray, n_rows: int) -> None:
    if values.ndim == 0 or len(values) != n_rows:
        raise ValueError(
            f"y must have one entry for each of {n_rows} rows, got {values.shape}."
        )


def _distinct(values: np.ndarray) -> np.ndarray:
    """Return the labels that occur, sorted."""
    try:
        labels = np.unique(values)
    except TypeError:  # words and None do not compare
        labels = np.array([None])
    if not (labels == labels).all() or labels[0] is None:
        raise ValueError(
            "Labels in y must be of one kind, and none missing: drop or fill these "
            "rows."
        )
    return labels


def _plain(labels: np.ndarray) -> list:
    """Return labels as Python has them: 'a', not np.str_('a'), also among objects."""
    return [
        label.item() if isinstance(label, np.generic) else label for label in labels
    ]


def _table(values: np.ndarray) -> np.ndarray:
    """Return covariates as (n, C) floats."""
    try:
        table = values.reshape(len(values), -1).astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "Covariates must be numbers; labels go into a vector of their own."
        ) from error
    if not np.isfinite(table).all():
        raise ValueError("y contains NaN or infinity: drop or fill these rows.")
    return table
