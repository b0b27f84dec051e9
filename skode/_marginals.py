"""Columns to normal scores, and columns together to white ones, with their densities.

A flow that starts at these scores need not learn tails, walls, modes and atoms of
single columns, nor linear dependence between them. NumPy in float64.

`n` rows, `D` columns, `P` distinct values of a column, `A` atoms, `K` components.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Literal

import numpy as np
from scipy.special import ndtr, ndtri

from skode._mixture import Mixture, fit_mixture, moments

__all__ = ["Preprocessing", "fit_preprocessing"]

Kind = Literal["auto", "normal"] | None

# Widths are never below this share of a standard deviation. Squared it is 1e-6, which
# `GaussianMixture` adds to the variances.
_NARROWEST = 1e-3
# Standard deviation of an atom's component, in gaps between distinct values.
_ATOM_WIDTH = 0.05
# All values are atoms where they are few and many rows share each of them.
_FEW_VALUES, _ROWS_PER_VALUE = 32, 10
# Elsewhere an atom holds this share of the rows, and far more than its neighbours do.
_ATOM_SHARE, _ATOM_ROWS, _NEIGHBOURS = 0.02, 8, 8
# A smooth part is fitted to this many rows and distinct values, or more.
_SMOOTH_ROWS, _SMOOTH_VALUES = 10, 5
_COMPONENTS = (1, 2, 3, 4, 6, 8)
# Of the log-likelihood in rows, for each parameter: between AIC and BIC, see
# `_fit_smooth`.
_PENALTY = 1.5
# Standard deviation of the component for what was not seen, in the column's.
_BACKGROUND = 4.0
# A mixture is fitted to at most so many points, so many of either tail as they are.
_POINTS, _TAIL_POINTS = 256, 24
_POINTS_PER_CELL = 8
_TINY_EIGENVALUE = 1e-12
# Rows are flat in a direction in which they show less than this share of its variance.
_FLAT = 0.1
_MOST_NAMED = 5
# Parameters beyond mean and standard deviation: location and scale of the arcsinh;
# weight, mean and standard deviation of a component.
_CURVE_PARAMS, _COMPONENT_PARAMS = 2, 3
# Rows further out, in standard deviations, count as this far out.
_FARTHEST = 1e100
_FARTHEST_CURVED = 230.0
# Jitter, where its mean over draws is needed: midpoints of 16 equal shares of a normal,
# scaled to its variance.
_NOISE = ndtri((np.arange(16) + 0.5) / 16)
_NOISE /= _NOISE.std()


@dataclass(frozen=True, slots=True)
class Axis:
    """u = (x - location) / scale, or the inverse hyperbolic sine of that."""

    location: float
    scale: float
    curved: bool = False

    def forward(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return u and log du/dx, both (n,)."""
        with np.errstate(over="ignore"):
            v = (x - self.location) / self.scale
        v = np.clip(v, -_FARTHEST, _FARTHEST)
        if not self.curved:
            return v, np.full(len(v), -np.log(self.scale))
        return np.arcsinh(v), -np.log(np.hypot(1.0, v)) - np.log(self.scale)

    def inverse(self, u: np.ndarray) -> np.ndarray:
        """Return x, (n,)."""
        if self.curved:
            u = np.sinh(np.clip(u, -_FARTHEST_CURVED, _FARTHEST_CURVED))
        return self.location + self.scale * u


@dataclass(frozen=True, slots=True, eq=False)
class Column:
    """Smooth, increasing map of a column to normal scores: z = Phi^-1(F(u(x)))."""

    axis: Axis
    mixture: Mixture  # F; with one component z is affine in u
    atoms: np.ndarray  # (A,) values that hold many rows, increasing
    atom_width: float  # standard deviation of an atom's component, in units of x
    cell: float  # > 0: each value stands for all in a cell of this width around it

    @property
    def constant(self) -> bool:
        """Whether one value was all that was seen."""
        return self.affine and len(self.atoms) == 1

    @property
    def affine(self) -> bool:
        """Whether z is affine in x."""
        return not self.axis.curved and len(self.mixture.mean) == 1

    def forward(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return z and log dz/dx, both (n,)."""
        u, log_slope = self.axis.forward(x)
        z, log_slope_of_z = self.mixture.scores(u)
        return z, log_slope + log_slope_of_z

    def inverse(self, z: np.ndarray) -> np.ndarray:
        """Return x, (n,)."""
        return self.axis.inverse(self.mixture.quantiles(z))

    def jitter(self, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return x, (n,), redrawn from its cell or, on an atom, from its component."""
        if self.cell:
            return x + self.cell * (rng.random(len(x)) - 0.5)
        if not len(self.atoms):
            return x
        noise = self.atom_width * rng.standard_normal(len(x))
        nearest, on_atom = self._nearest_atom(x)
        return np.where(on_atom, self.atoms[nearest] + noise, x)

    def jittered_moments(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and variance of z over jitter, both (n,)."""
        if self.cell:
            values, place = np.unique(x, return_inverse=True)
            noise = self.cell * (ndtr(_NOISE) - 0.5)
        elif len(self.atoms):
            values, noise = self.atoms, self.atom_width * _NOISE
            place, on_atom = self._nearest_atom(x)
        else:
            return self.forward(x)[0], np.zeros(len(x))
        z = self.forward((values[:, None] + noise).ravel())[0]
        z = z.reshape(len(values), len(noise))
        mean, variance = z.mean(axis=1)[place], z.var(axis=1)[place]
        if self.cell:
            return mean, variance
        return np.where(on_atom, mean, self.forward(x)[0]), np.where(
            on_atom, variance, 0
        )

    def _nearest_atom(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the place of the nearest atom, and whether x is on it, both (n,)."""
        middles = 0.5 * (self.atoms[1:] + self.atoms[:-1])
        nearest = np.searchsorted(middles, x)
        # Not ==: x may have been rounded to float32 on its way.
        return nearest, np.abs(x - self.atoms[nearest]) <= 0.1 * self.atom_width


# ------------------------------------------------------------------ fitting a column


def _fit_column(
    x: np.ndarray, weight: np.ndarray, kind: Kind, cell: float, rounding: float
) -> Column:
    """Return the map of a column.

    `rounding` is the relative precision of x: what differs by less is one value.
    """
    values, share = _distinct(x, weight)
    n_rows = float(weight.sum())
    if cell:
        values, share = _spread(values, share, cell)
    if values[-1] - values[0] <= rounding * np.abs(values).max():
        # Without a spread, the value itself is the only scale there is.
        atom, width = values[[0]], _NARROWEST * (abs(values[0]) or 1.0)
        return Column(Axis(values[0], width), _normal(), atom, width, 0.0)
    mean, std = _safe_moments(values, share)
    plain = Column(Axis(mean, std), _normal(), np.empty(0), 0.0, cell)
    if kind is None:
        return plain
    scaled = (values - mean) / std  # so that units do not matter
    fitted = _fit_scaled(scaled, share, n_rows, kind, may_have_atoms=not cell)
    if fitted is None:
        return plain
    axis, mixture, on_atom, atom_width = fitted
    axis = Axis(mean + std * axis.location, std * axis.scale, axis.curved)
    return Column(axis, mixture, values[on_atom], std * atom_width, cell)


def _normal() -> Mixture:
    return Mixture(np.zeros(1), np.zeros(1), np.ones(1))


def _distinct(x: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return distinct values, increasing, and their shares of the weight, both (P,)."""
    values, place = np.unique(x, return_inverse=True)
    return values, np.bincount(place, weights=weight) / weight.sum()


def _spread(
    values: np.ndarray, share: np.ndarray, cell: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return points spread over the cells around values, and their shares."""
    places = cell * ((np.arange(_POINTS_PER_CELL) + 0.5) / _POINTS_PER_CELL - 0.5)
    points = (values[:, None] + places).ravel()
    return points, np.repeat(share / _POINTS_PER_CELL, _POINTS_PER_CELL)


def _safe_moments(values: np.ndarray, share: np.ndarray) -> tuple[float, float]:
    """Return mean and standard deviation; no square overflows on the way."""
    start, extent = float(values[0]), float(values[-1] - values[0])
    mean, std = moments((values - start) / extent, share)
    return start + extent * mean, extent * std


def _fit_scaled(
    x: np.ndarray, share: np.ndarray, n_rows: float, kind: Kind, may_have_atoms: bool
) -> tuple[Axis, Mixture, np.ndarray, float] | None:
    """Return axis, mixture, which values are atoms and their width; None: x is normal.

    `x` are distinct values of mean 0 and standard deviation 1, increasing.
    """
    on_atom = np.zeros(len(x), dtype=bool)
    if may_have_atoms:
        on_atom = _find_atoms(x, share, n_rows)
    smooth_share = float(share[~on_atom].sum())
    smooth_rows = n_rows * smooth_share
    axis, parts = Axis(0.0, 1.0), []
    if smooth_rows >= _SMOOTH_ROWS and (~on_atom).sum() >= _SMOOTH_VALUES:
        points, part = _binned(x[~on_atom], share[~on_atom] / smooth_share)
        fitted = _fit_smooth(points, part, smooth_rows)
        if kind == "auto" and not on_atom.any() and not fitted.pays:
            return None
        axis, parts = fitted.axis, [(fitted.mixture, smooth_share)]
    if not on_atom.any():
        if not parts:
            return None
        mixture = parts[0][0]
        if len(mixture.mean) > 1:
            mixture = _mixed(axis, parts, n_rows)
        return axis, mixture, on_atom, 0.0
    width = max(_ATOM_WIDTH * _smallest_gap(x), _NARROWEST)
    centre, log_slope = axis.forward(x[on_atom])
    log_weight = np.log(share[on_atom] / (1 - smooth_share))
    atoms = Mixture(log_weight, centre, width * np.exp(log_slope))
    parts.append((atoms, 1 - smooth_share))
    return axis, _mixed(axis, parts, n_rows), on_atom, width


def _mixed(axis: Axis, parts: list[tuple[Mixture, float]], n_rows: float) -> Mixture:
    """Return the mixture of mixtures, with one row for what was not seen.

    A wide component of the weight of one row keeps F rising between the others, where
    its inverse would else be lost, and rules far out.
    """
    ends = axis.forward(np.array([-_BACKGROUND, _BACKGROUND]))[0]
    unseen = Mixture(np.zeros(1), ends.mean(keepdims=True), np.diff(ends) / 2)
    parts = [(part, n_rows * share) for part, share in parts if share > 0]
    parts.append((unseen, 1.0))
    total = np.log(n_rows + 1)
    return Mixture(
        np.concatenate(
            [part.log_weight + np.log(rows) - total for part, rows in parts]
        ),
        np.concatenate([part.mean for part, _ in parts]),
        np.concatenate([part.std for part, _ in parts]),
    )


def _smallest_gap(x: np.ndarray) -> float:
    """Return the smallest gap between distinct values, roundings of one value aside."""
    gaps = np.diff(x)
    return float(gaps[gaps > _NARROWEST**2].min(initial=x[-1] - x[0]))


def _find_atoms(x: np.ndarray, share: np.ndarray, n_rows: float) -> np.ndarray:
    """Return which values are atoms, (P,) of bool."""
    if len(x) <= _FEW_VALUES and n_rows >= _ROWS_PER_VALUE * len(x):
        return np.ones(len(x), dtype=bool)
    large = np.flatnonzero(share >= max(_ATOM_SHARE, _ATOM_ROWS / n_rows))
    # A rounded column repeats its values, too, but neighbours about as often.
    around = large[:, None] + np.arange(2 * _NEIGHBOURS + 1)
    usual = np.median(np.pad(share, _NEIGHBOURS)[around], axis=1)
    found = np.zeros(len(x), dtype=bool)
    found[large] = share[large] > 4 * (usual + np.sqrt(usual / n_rows))
    return found


def _binned(x: np.ndarray, share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return at most _POINTS points and shares: means of bins; tails as they are."""
    if len(x) <= _POINTS:
        return x, share
    n_bins = _POINTS - 2 * _TAIL_POINTS
    inner = slice(_TAIL_POINTS, -_TAIL_POINTS)
    before = np.cumsum(share[inner]) - 0.5 * share[inner]
    place = (before / share[inner].sum() * n_bins).astype(int)
    starts = np.flatnonzero(np.diff(place, prepend=-1))
    mass = np.add.reduceat(share[inner], starts)
    middle = np.add.reduceat(share[inner] * x[inner], starts) / mass
    return (
        np.concatenate([x[:_TAIL_POINTS], middle, x[-_TAIL_POINTS:]]),
        np.concatenate([share[:_TAIL_POINTS], mass, share[-_TAIL_POINTS:]]),
    )


@dataclass(frozen=True, slots=True)
class _Smooth:
    """A fitted axis and mixture, and whether they pay against a plain normal."""

    axis: Axis
    mixture: Mixture
    pays: bool


def _fit_smooth(x: np.ndarray, share: np.ndarray, n_rows: float) -> _Smooth:
    """Return axis and mixture of the lowest penalised loss; (n,) distinct values.

    Whether they pay is left to the Bayesian criterion. Among mixtures it takes too few
    components: on nine tables, 1.5 for each parameter won nats on new rows.
    """
    candidates = []
    for axis in (Axis(0.0, 1.0), _best_curve(x, share)):
        u, log_slope = axis.forward(x)
        lowest, worse = np.inf, 0
        for n_components in _COMPONENTS:
            if _COMPONENT_PARAMS * n_components > len(x) or worse == 2:
                break
            mixture, log_likelihood = fit_mixture(u, share, n_rows, n_components)
            n_params = _COMPONENT_PARAMS * (n_components - 1)
            n_params += _CURVE_PARAMS * axis.curved
            loss = -log_likelihood - share @ log_slope
            penalised = loss + _PENALTY * n_params / n_rows
            worse = 0 if penalised < lowest else worse + 1
            lowest = min(penalised, lowest)
            candidates.append((penalised, loss, n_params, axis, mixture))
    _, loss, n_params, axis, mixture = min(candidates, key=itemgetter(0))
    normal = candidates[0][1]  # one component on the plain axis
    pays = loss + 0.5 * np.log(n_rows) * n_params / n_rows < normal
    return _Smooth(axis, mixture, bool(pays))


def _best_curve(x: np.ndarray, share: np.ndarray) -> Axis:
    """Return the axis with an arcsinh along which x is most like a normal.

    With one component this is Johnson's S_U; at its ends it takes logarithms.
    """
    at = [0.05, 0.25, 0.5, 0.75, 0.95]
    quantiles = np.interp(at, np.cumsum(share) - 0.5 * share, x)
    spread = max(quantiles[3] - quantiles[1], _NARROWEST * (x[-1] - x[0]))
    beyond = [x[0] - 0.1 * spread, x[0], x[-1], x[-1] + 0.1 * spread]
    location = np.concatenate([quantiles, beyond])
    scale = spread * np.array([0.03, 0.1, 0.3, 1.0, 3.0])
    v = (x - location[:, None, None]) / scale[:, None]  # (locations, scales, n)
    u = np.arcsinh(v)
    std = np.sqrt((u - (u @ share)[..., None]) ** 2 @ share)
    loss = np.log(std) + np.log(np.hypot(1.0, v)) @ share + np.log(scale)
    i, j = np.unravel_index(np.argmin(loss), loss.shape)
    return Axis(float(location[i]), float(scale[j]), curved=True)


# ------------------------------------------------------------------------ all columns


@dataclass(frozen=True, slots=True, eq=False)
class Preprocessing:
    """Smooth map of rows to white normal scores and back; see `fit_preprocessing`."""

    columns: tuple[Column, ...] | None  # None: rows as they are
    mean: np.ndarray  # (D,) of the scores before whitening
    whitening: np.ndarray  # (D, D), symmetric
    colouring: np.ndarray  # (D, D), its inverse
    log_det: float  # of the whitening
    flat: np.ndarray  # (D, M) noise for the directions in which training rows are flat

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
            noise = rng.standard_normal((len(X), self.flat.shape[1])) @ self.flat.T
            X = self.inverse(self.forward(X)[0] + noise)
        return X


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
        integer, and -log2 of it bits.

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
    rounding = 10 * float(np.finfo(X.dtype).eps)
    counts = weight > 0
    X, weight = X[counts].astype(np.float64), weight[counts].astype(np.float64)
    n_columns = X.shape[1]
    if kind is None and not standardize and not dequantize:
        return _unwhitened(None, n_columns)
    _check_range(X)
    integer = (np.rint(X) == X).all(axis=0) & dequantize
    columns = tuple(
        _fit_column(x, weight, kind, float(whole), rounding)
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
    # Past this function, `fit_preprocessing` and an estimator's `fit`.
    warnings.warn(message, UserWarning, stacklevel=4)


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
    spread = np.maximum(_shrunk(sample, n_rows), _NARROWEST**2)
    if len(X) <= n_columns:
        _warn(
            f"X has {len(X)} rows and {n_columns} columns, too few rows for a "
            "density: most directions are guessed from the others. Reduce the columns, "
            "for instance by PCA."
        )
    elif (sample < _NARROWEST**2).any():
        bound = np.abs(vectors[:, sample < _NARROWEST**2]).max(axis=1) > 0.1
        _warn(
            f"{_listed('column', np.flatnonzero(bound))} of X: each follows from the "
            "others, so that the rows have no density. A floor on the variances stands "
            "in for it. Leave out columns that repeat what others say."
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
        vectors[:, flat] * np.sqrt(missing),
    )


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
