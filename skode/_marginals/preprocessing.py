"""Columns to normal scores, and columns together to white ones, with their densities.

A flow that starts at these scores need not learn tails, walls, modes and atoms of
single columns, nor linear dependence between them. NumPy in float64.

`n` rows, `D` columns.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from skode._marginals.column import NARROWEST, Axis, Column, Kind, fit_column

__all__ = ["Preprocessing", "fit_preprocessing"]

_TINY_EIGENVALUE = 1e-12
# Rows are flat in a direction in which they show less than this share of its variance.
_FLAT = 0.1
_MOST_NAMED = 5
# Share of the rows that must be on a plane for the columns to be dependent.
_MOST_ROWS = 0.9


@dataclass(frozen=True, slots=True, eq=False)
class Preprocessing:
    """Smooth map of rows to white normal scores and back; see `fit_preprocessing`."""

    columns: tuple[Column, ...] | None  # None: rows as they are
    mean: np.ndarray  # (D,) of the scores before whitening
    whitening: np.ndarray  # (D, D), symmetric
    colouring: np.ndarray  # (D, D), its inverse
    log_det: float  # of the whitening
    flat: np.ndarray  # (D, D), or (D, 0): noise for directions in which rows are flat

    def forward(self, X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Map rows to scores.

        Parameters
        ----------
        X : ndarray of shape (n, D)
            Rows in the units of the training data.

        Returns
        -------
        Z : ndarray of shape (n, D), float64
            Their scores.
        log_det : ndarray of shape (n,), float64
            Logarithm of the determinant of dZ/dX: log p(x) = log p(z) + log_det.
        """
        scores, log_det = _scores(self.columns, X)
        return (scores - self.mean) @ self.whitening, log_det + self.log_det

    def inverse(self, Z: np.ndarray) -> np.ndarray:
        """Map scores (n, D) to the rows (n, D) that have them."""
        scores = np.asarray(Z, dtype=np.float64) @ self.colouring + self.mean
        if self.columns is None:
            return scores
        pairs = zip(self.columns, scores.T, strict=True)
        return np.column_stack([column.inverse(z) for column, z in pairs])

    def jitter(self, X: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return rows (n, D) in which nothing is repeated exactly.

        Values on atoms are redrawn from the atom's component, values of dequantised
        columns within their cell, and directions in which the training rows are flat
        get the spread that the map supposes. Train on these: a flow that meets isolated
        points, or rows on a plane, can raise its likelihood without end.
        """
        X = np.array(X, dtype=np.float64)
        for j, column in enumerate(self.columns or ()):
            X[:, j] = column.jitter(X[:, j], rng)
        if self.flat.shape[1]:
            noise = rng.standard_normal(X.shape) @ self.flat
            X = self.inverse(self.forward(X)[0] + noise)
        return X

    def settle(self, X: np.ndarray) -> np.ndarray:
        """Undo jitter: return rows (n, D), say of a sample, with values as in a table.

        Values of dequantised columns are rounded, and those within three standard
        deviations of an atom's component put on the atom.
        """
        pairs = zip(
            self.columns or (), np.asarray(X).T, strict=self.columns is not None
        )
        settled = [column.settle(x) for column, x in pairs]
        return np.column_stack(settled) if settled else X


def fit_preprocessing(
    X: np.ndarray,
    weight: np.ndarray,
    kind: Kind = "auto",
    *,
    standardize: bool = True,
    dequantize: bool = False,
) -> Preprocessing:
    """Fit smooth maps of the columns to normal scores, and the whitening on top.

    Parameters
    ----------
    X : ndarray of shape (n, D)
        Rows, finite.
    weight : ndarray of shape (n,)
        Weights of the rows, which count them: a row of weight two is two rows.
    kind : {"auto", "normal"} or None, default="auto"
        "auto" maps a column to normal scores if the Bayesian information criterion
        prefers that to a plain normal; "normal" maps every column; None none.
        A column that is not mapped is standardised.
    standardize : bool, default=True
        Whether to whiten the scores. If not, columns that are not mapped stay as they
        are.
    dequantize : bool, default=False
        Whether values of columns that hold integers only stand for all values within
        1/2 of them. A density at such a value then is, nearly, the probability of the
        integer, and -log2 of it bits. Few values are atoms of the mixture, each with
        two components that have as much density at the value as rows are on it.

    Returns
    -------
    preprocessing : Preprocessing
        The map, its inverse and its log-determinants.

    Raises
    ------
    ValueError
        If the range of a column overflows.

    Warns
    -----
    UserWarning
        If columns are constant or depend on each other linearly, or there are fewer
        rows than columns: then the rows have no density, and a floor on the variances
        stands in for the spread that they do not show.

    Notes
    -----
    A column is mapped by z = Phi^-1(F(u)), with F a mixture of gaussians and u its
    values, or u = arcsinh((x - location) / scale) where the criterion prefers that. The
    map is smooth and increasing on the whole line, with tails like a normal's or a
    log-normal's, so that no value is impossible.

    Values that hold many rows, *atoms*, have no density: the more narrow a component
    on them, the higher is the likelihood, without end. Their components have a standard
    deviation of 1/20 of the smallest gap between distinct values of the column, and of
    1e-3 of the column's at least. This is a convention. Differences of nats between
    columns or tables with atoms mean as little as the convention does; differences
    between rows, or models that share the map, mean what they always do.

    Whitening is symmetric (ZCA), so that scores stay next to their columns. Sample
    eigenvalues are corrected by quadratic-inverse shrinkage [1]_, which leaves them
    alone if rows are many; below two rows for each column by oracle approximating
    shrinkage [2]_.

    References
    ----------
    .. [1] Ledoit and Wolf, "Quadratic shrinkage for large covariance matrices",
       Bernoulli 28(3), 2022. :doi:`10.3150/20-BEJ1315`
    .. [2] Chen, Wiesel, Eldar and Hero, "Shrinkage algorithms for MMSE covariance
       estimation", IEEE Transactions on Signal Processing 58(10), 2010.
       :doi:`10.1109/TSP.2010.2053029`
    """
    X = np.asarray(X)
    rounding = 10 * float(np.finfo(np.result_type(X.dtype, np.float32)).eps)
    counts = weight > 0
    X, weight = X[counts].astype(np.float64), weight[counts].astype(np.float64)
    n_columns = X.shape[1]
    if kind is None and not standardize and not dequantize:
        return _unwhitened(None, n_columns)
    _check_range(X)
    integer = (np.rint(X) == X).all(axis=0) & dequantize
    columns = tuple(
        fit_column(x, weight, kind, float(whole), rounding)
        for x, whole in zip(X.T, integer, strict=True)
    )
    constant = [j for j, column in enumerate(columns) if column.constant]
    if constant:
        _warn(
            f"{_listed('column', constant)} of X: constant, and so without a density. "
            "A narrow normal stands in for it. Leave such columns out of X."
        )
    if standardize:
        return _whitened(columns, X, weight)
    return _unwhitened(
        tuple(
            replace(column, axis=Axis(0.0, 1.0)) if column.affine else column
            for column in columns
        ),
        n_columns,
    )


def _check_range(X: np.ndarray) -> None:
    with np.errstate(over="ignore"):
        wide = np.flatnonzero(~np.isfinite(np.ptp(X, axis=0)))
    if len(wide):
        raise ValueError(
            f"{_listed('column', wide)} of X: the range from smallest to largest value "
            "overflows. Rescale X."
        )


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=4)  # near an estimator's `fit`


def _listed(noun: str, places: Sequence[int] | np.ndarray) -> str:
    """Return "column 3" or "columns 0, 1, 2, ..."."""
    some = ", ".join(str(int(place)) for place in places[:_MOST_NAMED])
    more = ", ..." if len(places) > _MOST_NAMED else ""
    return f"{noun}{'s' if len(places) > 1 else ''} {some}{more}".capitalize()


def _scores(
    columns: tuple[Column, ...] | None, X: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return X with its columns mapped (n, D), and the log-determinants (n,)."""
    X = np.asarray(X, dtype=np.float64)
    if columns is None:
        return X, np.zeros(len(X))
    pairs = [column.forward(x) for column, x in zip(columns, X.T, strict=True)]
    return np.column_stack([z for z, _ in pairs]), np.sum([s for _, s in pairs], axis=0)


def _unwhitened(columns: tuple[Column, ...] | None, n_columns: int) -> Preprocessing:
    eye, zero = np.eye(n_columns), np.zeros(n_columns)
    return Preprocessing(columns, zero, eye, eye, 0.0, np.empty((n_columns, 0)))


def _whitened(
    columns: tuple[Column, ...], X: np.ndarray, weight: np.ndarray
) -> Preprocessing:
    """Return the map with whitening, which makes jittered rows white."""
    n_rows, n_columns = float(weight.sum()), len(columns)
    pairs = [column.jittered_moments(x) for column, x in zip(columns, X.T, strict=True)]
    scores = np.column_stack([mean for mean, _ in pairs])
    mean = weight @ scores / n_rows
    centred = scores - mean
    covariance = (weight[:, None] * centred).T @ centred / n_rows
    covariance += np.diag([weight @ variance / n_rows for _, variance in pairs])
    sample, vectors = np.linalg.eigh(covariance)
    spread = np.maximum(_shrunk(sample, n_rows), NARROWEST**2)
    if len(X) <= n_columns:
        _warn(
            f"X has {len(X)} rows and {n_columns} columns, too few rows for a "
            "density: most directions are guessed from the others. Reduce the columns, "
            "for instance by PCA."
        )
    else:
        bound = _named_by(vectors[:, sample < NARROWEST**2]) | _dependent(
            columns, X, weight
        )
        if bound.any():
            _warn(
                f"{_listed('column', np.flatnonzero(bound))} of X: each follows from "
                "the others, so that the rows have no density. A floor on the "
                "variances, or the scores of each column, stands in for it, and "
                "samples do not repeat the relation exactly. Leave out columns that "
                "repeat what others say."
            )
    flat = sample < _FLAT * spread
    missing = 1 - np.maximum(sample[flat], 0.0) / spread[flat]
    root = np.sqrt(spread)
    return Preprocessing(
        columns,
        mean,
        (vectors / root) @ vectors.T,
        (vectors * root) @ vectors.T,
        float(-np.log(root).sum()),
        # Symmetric, too: the vectors of equal eigenvalues are any of their plane.
        (vectors[:, flat] * np.sqrt(missing)) @ vectors[:, flat].T
        if flat.any()
        else np.empty((n_columns, 0)),
    )


def _named_by(vectors: np.ndarray) -> np.ndarray:
    """Return which columns, (D,) of bool, count in any of some directions (D, m)."""
    return np.abs(vectors).max(axis=1, initial=0.0) > 0.1


def _dependent(
    columns: tuple[Column, ...], X: np.ndarray, weight: np.ndarray
) -> np.ndarray:
    """Return which columns of X follow linearly from others, (D,) of bool.

    Maps to normal scores bend planes, and jitter leaves them: a total, or the codes of
    labels, show only before. Columns of integers that stand for cells have
    probabilities whatever they depend on.
    """
    found = np.zeros(len(columns), dtype=bool)
    free = np.array([not column.constant and not column.cell for column in columns])
    if free.sum() < 2 or all(column.affine for column in columns):
        return found
    U = X[:, free] / np.ptp(X[:, free], axis=0)  # whose squares do not overflow
    U -= weight @ U / weight.sum()
    U /= np.sqrt(weight @ U**2 / weight.sum())
    sample, vectors = np.linalg.eigh((weight[:, None] * U).T @ U / weight.sum())
    vectors = vectors[:, sample < NARROWEST**2]
    # A few rows far out are on a plane with the heap of all others, which then must be
    # flat itself.
    left = U @ vectors
    left = np.quantile(np.abs(left - np.median(left, axis=0)), _MOST_ROWS, axis=0)
    terms = np.abs(U - np.median(U, axis=0)) @ np.abs(vectors)
    terms = np.quantile(terms, _MOST_ROWS, axis=0)
    found[free] = _named_by(vectors[:, left <= NARROWEST * terms])
    return found


def _shrunk(sample: np.ndarray, n_rows: float) -> np.ndarray:
    """Return eigenvalues of a covariance, corrected for so many rows; both increase.

    Both rules know the rows by their number alone, so that weights and repeated rows
    are the same; cross-validation would tell them apart.
    """
    n_columns, n_free = len(sample), max(n_rows - 1, 1.0)
    ratio = n_columns / n_free
    if ratio > 0.5:
        # Oracle approximating shrinkage. The other one breaks down where rows are
        # about as many as columns; this one keeps too little of narrow directions
        # where they are more.
        square, mean = np.mean(sample**2) / n_columns, np.mean(sample)
        excess = (n_rows + 1) * (square - mean**2 / n_columns)
        share = min(1.0, (square + mean**2) / excess) if excess > 0 else 1.0
        return (1 - share) * sample + share * mean
    # Quadratic-inverse shrinkage, by a kernel estimate of a Hilbert transform.
    precision = 1 / np.maximum(sample, _TINY_EIGENVALUE)
    width = ratio**0.7 / n_columns**0.35 * precision[:, None]
    gap = precision[:, None] - precision
    kernel = precision[:, None] / (gap**2 + width**2)
    theta, conjugate = np.mean(kernel * gap, axis=0), np.mean(kernel * width, axis=0)
    corrected = precision * (
        (1 - ratio) ** 2
        + 2 * ratio * (1 - ratio) * theta
        + ratio**2 * (theta**2 + conjugate**2)
    )
    return sample.sum() / (1 / corrected).sum() / corrected
