"""One column to normal scores, and back.

NumPy in float64. `n` rows, `P` distinct values, `A` atoms, `K` components.
"""

from dataclasses import dataclass
from operator import itemgetter
from typing import Literal

import numpy as np
from scipy.special import ndtr, ndtri

from skode._marginals.mixture import Mixture, fit_mixture, moments

__all__ = ["NARROWEST", "Axis", "Column", "Kind", "fit_column"]

Kind = Literal["auto", "normal"] | None

# Widths are never below this share of a standard deviation. Squared it is 1e-6, which
# `GaussianMixture` adds to the variances.
NARROWEST = 1e-3
# Standard deviation of an atom's component, in gaps between distinct values.
_ATOM_WIDTH = 0.05
# A value is on an atom within so many widths of it, to which it may have been rounded
# on its way, in float32 say; or, when it is drawn from the atom's component.
_ROUNDED, _SETTLED = 0.1, 3.0
# All values are atoms where they are few and many rows share each of them.
_FEW_VALUES, _ROWS_PER_VALUE = 32, 10
# Elsewhere an atom holds this share of the rows, and far more than its neighbours do.
_ATOM_SHARE, _ATOM_ROWS, _NEIGHBOURS = 0.02, 8, 8
# Few integers are atoms with fewer rows, too, where a cell is this much of the standard
# deviation: there, nothing smooth has a density near the probabilities. Below the least
# cell, integers are as good as reals.
_COARSE_CELL, _LEAST_CELL = 0.5, 1e-6
# A smooth part is fitted to this many rows and distinct values, or more.
_SMOOTH_ROWS, _SMOOTH_VALUES = 10, 5
_COMPONENTS = (1, 2, 3, 4, 6, 8)
# Of the log-likelihood in rows, for each parameter: between AIC and BIC, see
# `_fit_smooth`.
_PENALTY = 1.5
# Standard deviation of the component for what was not seen, in the column's, and the
# least one in cells: of a column of zeros, the next row may hold a four.
_BACKGROUND, _BACKGROUND_CELLS = 4.0, 8.0
# A mixture is fitted to at most so many points, so many of either tail as they are.
_POINTS, _TAIL_POINTS = 256, 24
_POINTS_PER_CELL = 8
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
# An atom that stands for a cell has two components on either side of the value, of this
# standard deviation in cells, and so far apart that the density at the value is the
# atom's share. One component with that density leaks 9 % of it to the integers next to
# it; of these two, 0.7 % of the draws leave the cell.
_HALF_WIDTH = 0.125
_HALF_OFFSET = _HALF_WIDTH * np.sqrt(-2 * np.log(_HALF_WIDTH * np.sqrt(2 * np.pi)))
_CELL_SETTLED = _HALF_OFFSET + _SETTLED * _HALF_WIDTH
_CELL_NOISE = ndtri((np.arange(8) + 0.5) / 8)
_CELL_NOISE *= _HALF_WIDTH / _CELL_NOISE.std()
_CELL_NOISE = np.concatenate([_CELL_NOISE - _HALF_OFFSET, _CELL_NOISE + _HALF_OFFSET])


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
    atom_width: float  # std of an atom's component, or of two in a cell, in units of x
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
        spread = self.cell * (rng.random(len(x)) - 0.5) if self.cell else np.zeros(1)
        if not len(self.atoms):
            return x + spread if self.cell else x
        noise = self.atom_width * rng.standard_normal(len(x))
        noise += _HALF_OFFSET * self.cell * np.sign(spread)
        nearest, on_atom = self._nearest_atom(x)
        return np.where(on_atom, self.atoms[nearest] + noise, x + spread)

    def settle(self, x: np.ndarray) -> np.ndarray:
        """Return x, (n,), in the middle of its cell or on the atom it is next to."""
        whole = self.cell * np.rint(x / self.cell) if self.cell else x
        if not len(self.atoms):
            return whole
        within = _CELL_SETTLED / _HALF_WIDTH if self.cell else _SETTLED
        nearest, on_atom = self._nearest_atom(x, within)
        return np.where(on_atom, self.atoms[nearest], whole)

    def jittered_moments(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and variance of z over jitter, both (n,)."""
        if self.cell:
            values, place = np.unique(x, return_inverse=True)
            noise = self.cell * (ndtr(_NOISE) - 0.5)
            if len(self.atoms):
                on_atom = self._nearest_atom(values)[1][:, None]
                noise = np.where(on_atom, self.cell * _CELL_NOISE, noise)
        elif len(self.atoms):
            values, noise = self.atoms, self.atom_width * _NOISE
            place, on_atom = self._nearest_atom(x)
        else:
            return self.forward(x)[0], np.zeros(len(x))
        z = self.forward((values[:, None] + noise).ravel())[0]
        z = z.reshape(len(values), len(_NOISE))
        mean, variance = z.mean(axis=1)[place], z.var(axis=1)[place]
        if not self.cell:
            mean = np.where(on_atom, mean, self.forward(x)[0])
            variance = np.where(on_atom, variance, 0.0)
        return mean, variance

    def _nearest_atom(
        self, x: np.ndarray, within: float = _ROUNDED
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the place of the nearest atom, and whether x is on it, both (n,)."""
        middles = 0.5 * (self.atoms[1:] + self.atoms[:-1])
        nearest = np.searchsorted(middles, x)
        return nearest, np.abs(x - self.atoms[nearest]) <= within * self.atom_width


# ------------------------------------------------------------------ fitting a column


def fit_column(
    x: np.ndarray, weight: np.ndarray, kind: Kind, cell: float, rounding: float
) -> Column:
    """Return the map of a column.

    `rounding` is the relative precision of x: what differs by less is one value.
    """
    values, share = _distinct(x, weight)
    n_rows = float(weight.sum())
    points, part = _spread(values, share, cell)
    if points[-1] - points[0] <= rounding * np.abs(values).max():
        # Without a spread, the value itself is the only scale there is.
        atom, width = values[[0]], NARROWEST * (abs(values[0]) or 1.0)
        return Column(Axis(values[0], width), _normal(), atom, width, 0.0)
    mean, std = _safe_moments(points, part)
    plain = Column(Axis(mean, std), _normal(), np.empty(0), 0.0, cell)
    if kind is None:
        return plain
    scaled = (values - mean) / std  # so that units do not matter
    fitted = _fit_scaled(scaled, share, n_rows, kind, cell / std)
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
    if not cell:
        return values, share
    places = cell * ((np.arange(_POINTS_PER_CELL) + 0.5) / _POINTS_PER_CELL - 0.5)
    points = (values[:, None] + places).ravel()
    return points, np.repeat(share / _POINTS_PER_CELL, _POINTS_PER_CELL)


def _safe_moments(values: np.ndarray, share: np.ndarray) -> tuple[float, float]:
    """Return mean and standard deviation; no square overflows on the way."""
    start, extent = float(values[0]), float(values[-1] - values[0])
    mean, std = moments((values - start) / extent, share)
    return start + extent * mean, extent * std


def _fit_scaled(
    x: np.ndarray, share: np.ndarray, n_rows: float, kind: Kind, cell: float
) -> tuple[Axis, Mixture, np.ndarray, float] | None:
    """Return axis, mixture, which values are atoms and their width; None: x is normal.

    `x` are distinct values of mean 0 and standard deviation 1, increasing.
    """
    on_atom = _find_atoms(x, share, n_rows, cell)
    smooth_share = float(share[~on_atom].sum())
    smooth_rows = n_rows * smooth_share
    axis, parts = Axis(0.0, 1.0), []
    points, part = _spread(x[~on_atom], share[~on_atom], cell)
    if smooth_rows >= _SMOOTH_ROWS and len(points) >= _SMOOTH_VALUES:
        points, part = _binned(points, part / smooth_share)
        fitted = _fit_smooth(points, part, smooth_rows, _worth(kind, smooth_rows))
        if kind == "auto" and not on_atom.any() and not fitted.pays:
            return None
        axis, parts = fitted.axis, [(fitted.mixture, smooth_share)]
    if not on_atom.any():
        if not parts:
            return None
        mixture = parts[0][0]
        if len(mixture.mean) > 1:
            mixture = _mixed(axis, parts, n_rows, cell)
        return axis, mixture, on_atom, 0.0
    width = max(_ATOM_WIDTH * _smallest_gap(x), NARROWEST)
    places, weight = x[on_atom], share[on_atom] / (1 - smooth_share)
    if cell:
        width, offset = cell * _HALF_WIDTH, cell * _HALF_OFFSET
        places = np.concatenate([places - offset, places + offset])
        weight = np.concatenate([weight, weight]) / 2
    centre, log_slope = axis.forward(places)
    atoms = Mixture(np.log(weight), centre, width * np.exp(log_slope))
    parts.append((atoms, 1 - smooth_share))
    return axis, _mixed(axis, parts, n_rows, cell), on_atom, width


def _mixed(
    axis: Axis, parts: list[tuple[Mixture, float]], n_rows: float, cell: float
) -> Mixture:
    """Return the mixture of mixtures with their shares, and of what they leave out.

    The rows of no part, and one row for what was not seen, are those of a wide
    component. It keeps F rising between the others, where its inverse would else be
    lost, and rules far out.
    """
    reach = max(_BACKGROUND, _BACKGROUND_CELLS * cell)
    ends = axis.forward(np.array([-reach, reach]))[0]
    unseen = Mixture(np.zeros(1), ends.mean(keepdims=True), np.diff(ends) / 2)
    left = max(1 - sum(share for _, share in parts), 0.0)
    parts = [*parts, (unseen, left + 1 / n_rows)]
    total = sum(share for _, share in parts)
    log_weight = [part.log_weight + np.log(share / total) for part, share in parts]
    return Mixture(
        np.concatenate(log_weight),
        np.concatenate([part.mean for part, _ in parts]),
        np.concatenate([part.std for part, _ in parts]),
    )


def _smallest_gap(x: np.ndarray) -> float:
    """Return the smallest gap between distinct values, roundings of one value aside."""
    gaps = np.diff(x)
    return float(gaps[gaps > NARROWEST**2].min(initial=x[-1] - x[0]))


def _find_atoms(
    x: np.ndarray, share: np.ndarray, n_rows: float, cell: float
) -> np.ndarray:
    """Return which values are atoms, (P,) of bool."""
    if 0 < cell < _LEAST_CELL:
        return np.zeros(len(x), dtype=bool)
    often = n_rows >= _ROWS_PER_VALUE * len(x) or cell >= _COARSE_CELL
    if len(x) <= _FEW_VALUES and often:
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


def _worth(kind: Kind, n_rows: float) -> float:
    """Return how many nats a row several components must win against one.

    A flow finds several modes by itself, if there are rows enough to show them, and
    finds them better where they were not bent: 8 gaussians in a ring are no longer
    round once their columns are normal.
    """
    return 0.0 if kind == "normal" else max(0.1, n_rows / 10_000)


def _fit_smooth(
    x: np.ndarray, share: np.ndarray, n_rows: float, worth: float
) -> _Smooth:
    """Return axis and mixture of the lowest penalised loss; (n,) distinct values.

    Whether they pay is left to the Bayesian criterion. Among mixtures it takes too few
    components: on nine tables, 1.5 for each parameter won nats on new rows.
    """
    candidates: list[tuple[float, float, float, Axis, Mixture]] = []
    for axis in (Axis(0.0, 1.0), _best_curve(x, share)):
        u, log_slope = axis.forward(x)
        lowest, worse = np.inf, 0
        for n_components in _COMPONENTS:
            if _COMPONENT_PARAMS * n_components > len(x) or worse == 2:
                break
            mixture, log_likelihood = fit_mixture(u, share, n_rows, n_components)
            n_params = float(_COMPONENT_PARAMS * (n_components - 1))
            n_params += _CURVE_PARAMS * axis.curved
            loss = -log_likelihood - share @ log_slope
            penalised = loss + _PENALTY * n_params / n_rows
            worse = 0 if penalised < lowest else worse + 1
            lowest = min(penalised, lowest)
            candidates.append((penalised, loss, n_params, axis, mixture))
    single = min(loss for _, loss, *_, mixture in candidates if len(mixture.mean) == 1)
    _, loss, n_params, axis, mixture = min(
        (
            candidate
            for candidate in candidates
            if len(candidate[-1].mean) == 1 or candidate[1] <= single - worth
        ),
        key=itemgetter(0),
    )
    normal = candidates[0][1]  # one component on the plain axis
    pays = loss + 0.5 * np.log(n_rows) * n_params / n_rows < normal
    return _Smooth(axis, mixture, bool(pays))


def _best_curve(x: np.ndarray, share: np.ndarray) -> Axis:
    """Return the axis with an arcsinh along which x is most like a normal.

    With one component this is Johnson's S_U; at its ends it takes logarithms.
    """
    at = [0.05, 0.25, 0.5, 0.75, 0.95]
    quantiles = np.interp(at, np.cumsum(share) - 0.5 * share, x)
    spread = max(quantiles[3] - quantiles[1], NARROWEST * (x[-1] - x[0]))
    beyond = [x[0] - 0.1 * spread, x[0], x[-1], x[-1] + 0.1 * spread]
    location = np.concatenate([quantiles, beyond])
    scale = spread * np.array([0.03, 0.1, 0.3, 1.0, 3.0])
    v = (x - location[:, None, None]) / scale[:, None]  # (locations, scales, n)
    u = np.arcsinh(v)
    std = np.sqrt((u - (u @ share)[..., None]) ** 2 @ share)
    loss = np.log(std) + np.log(np.hypot(1.0, v)) @ share + np.log(scale)
    i, j = np.unravel_index(np.argmin(loss), loss.shape)
    return Axis(float(location[i]), float(scale[j]), curved=True)
