"""Mixtures of gaussians on the line: their normal scores, quantiles and fits.

NumPy in float64. `n` points, `K` components.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import erfcx, log_ndtr, ndtr, ndtri_exp

__all__ = ["Mixture", "fit_mixture", "moments"]

_LOG_SQRT_2PI = 0.5 * np.log(2 * np.pi)
_MAX_STEPS = 100
# Of the mean log-likelihood; a step that gains less is the last.
_TOLERANCE = 1e-4
# Each component is pulled towards a width of std / K with the weight of so many rows.
_PRIOR_ROWS = 2.0
_NARROWEST = 1e-3
# A mixture is tabulated at this many points of each component.
_KNOTS = np.linspace(-4.0, 4.0, 17)
# A step of Newton's method this small, in the narrowest component's std, is the last.
_LAST_STEP = 1e-7
_ROWS_AT_ONCE = 4096
# Bisection alone narrows any bracket of float64 to neighbours in about so many steps.
_MAX_NEWTON_STEPS = 200


@dataclass(frozen=True, slots=True, eq=False)
class Mixture:
    """F(u) = sum_k w_k Phi((u - m_k) / s_k), a smooth distribution function."""

    log_weight: np.ndarray  # (K,)
    mean: np.ndarray  # (K,)
    std: np.ndarray  # (K,)

    def scores(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return z = Phi^-1(F(u)) and log dz/du, both (n,).

        Notes
        -----
        All is done in the nearer tail G = min(F, 1 - F) and on the log scale. With
        hazards h = phi / (1 - Phi), dz/du = sum_k (w_k G_k / G) h(a_k) / s_k / h(|z|):
        far out the plain f(u) / phi(z) is a quotient of zeros, and its logarithm a
        difference of huge numbers.
        """
        if len(self.mean) == 1:
            log_slope = np.full(len(u), -np.log(self.std[0]))
            return (u - self.mean[0]) / self.std[0], log_slope
        # Tables (n, K) of all rows at once would take gigabytes, and leave the cache.
        starts = range(0, max(len(u), 1), _ROWS_AT_ONCE)
        parts = [self._scores(u[start : start + _ROWS_AT_ONCE]) for start in starts]
        z, log_slope = zip(*parts, strict=True)
        return np.concatenate(z), np.concatenate(log_slope)

    def _scores(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return `scores` of some points, by tables of all components."""
        a = (u[:, None] - self.mean) / self.std  # (n, K)
        lower = ndtr(a) @ np.exp(self.log_weight) < 0.5
        outwards = np.where(lower[:, None], -a, a)
        share = self.log_weight + log_ndtr(-outwards)
        log_tail = _log_sum_exp(share)
        share -= log_tail[:, None]
        log_hazard = _log_sum_exp(share + _log_hazard(outwards) - np.log(self.std))
        z = ndtri_exp(log_tail)  # <= 0, but for rounding at the median
        return np.where(lower, z, -z), log_hazard - _log_hazard(-z)

    def quantiles(self, z: np.ndarray) -> np.ndarray:
        """Return u with Phi^-1(F(u)) = z, (n,): Newton's method inside a bracket."""
        if len(self.mean) == 1:
            return self.mean[0] + self.std[0] * z
        # F lies between the distribution functions of its components.
        ends = self.mean + self.std * z[:, None]
        low, high = ends.min(axis=1), ends.max(axis=1)
        knots = np.unique(self.mean + self.std * _KNOTS[:, None])
        table = np.maximum.accumulate(self.scores(knots)[0])
        place = np.searchsorted(table, z)
        padded = np.concatenate([[-np.inf], knots, [np.inf]])
        low, high = np.maximum(low, padded[place]), np.minimum(high, padded[place + 1])
        u = np.clip(np.interp(z, table, knots), low, high)
        active = np.arange(len(z))
        for _ in range(_MAX_NEWTON_STEPS):
            here = u[active]
            score, log_slope = self.scores(here)
            error = score - z[active]
            low[active] = np.where(error <= 0, here, low[active])
            high[active] = np.where(error >= 0, here, high[active])
            with np.errstate(over="ignore", invalid="ignore"):
                guess = here - error * np.exp(-log_slope)
            inside = (guess > low[active]) & (guess < high[active])
            middle = 0.5 * (low[active] + high[active])
            u[active] = np.where(error == 0, here, np.where(inside, guess, middle))
            moved = np.abs(u[active] - here)
            # The error of Newton's method is squared with each step.
            least = np.where(inside, _LAST_STEP * self.std.min(), 0.0)
            active = active[moved > np.maximum(least, 2 * np.spacing(np.abs(here)))]
            if not len(active):
                break
        return u


def _log_sum_exp(terms: np.ndarray) -> np.ndarray:
    """Return log(sum(exp(terms))) over the last axis; SciPy's takes thrice as long."""
    top = terms.max(axis=1)
    return top + np.log(np.exp(terms - top[:, None]).sum(axis=1))


def _log_hazard(a: np.ndarray) -> np.ndarray:
    """Return log(phi(a) / (1 - Phi(a))), accurate on both sides."""
    right = 0.5 * np.log(2 / np.pi) - np.log(erfcx(np.maximum(a, 0.0) / np.sqrt(2)))
    left = np.minimum(a, 0.0)
    return np.where(a > 0, right, -0.5 * left**2 - _LOG_SQRT_2PI - log_ndtr(-left))


def moments(u: np.ndarray, share: np.ndarray) -> tuple[float, float]:
    """Return mean and standard deviation of points with shares that sum to 1."""
    mean = float(u[0] + share @ (u - u[0]))
    return mean, float(np.sqrt(share @ (u - mean) ** 2))


def fit_mixture(
    u: np.ndarray, share: np.ndarray, n_rows: float, n_components: int
) -> tuple[Mixture, float]:
    """Fit a mixture by expectation-maximisation.

    Parameters
    ----------
    u : ndarray of shape (n,)
        Points, increasing.
    share : ndarray of shape (n,)
        Shares of the points, which sum to 1.
    n_rows : float
        Number of rows that the points stand for. Each component is pulled towards a
        width of std / n_components with the weight of two rows, so that none
        collapses onto few points.
    n_components : int
        Number of components. One is the normal, by its moments.

    Returns
    -------
    mixture : Mixture
        The mixture.
    log_likelihood : float
        Its mean over the points.
    """
    centre, std = moments(u, share)
    if n_components == 1:
        normal = Mixture(np.zeros(1), np.array([centre]), np.array([std]))
        return normal, -np.log(std) - 0.5 - _LOG_SQRT_2PI
    # The start: as many neighbours to each, softly.
    group = ((np.cumsum(share) - 0.5 * share) * n_components).astype(int)
    one = group[:, None] == np.arange(n_components)
    joint = share[:, None] * (0.05 / n_components + 0.95 * one)  # (n, K)
    pull, before = _PRIOR_ROWS / n_rows, -np.inf
    for _ in range(_MAX_STEPS):
        weight = joint.sum(axis=0) + np.finfo(float).tiny
        mean = u @ joint / weight
        offset = u[:, None] - mean
        squares = np.einsum("nk,nk->k", joint, offset**2)
        variance = (squares + pull * (std / n_components) ** 2) / (weight + pull)
        width = np.sqrt(np.maximum(variance, (_NARROWEST * std) ** 2))
        weight = weight / weight.sum()
        log_joint = np.log(weight / width) - _LOG_SQRT_2PI - 0.5 * (offset / width) ** 2
        top = log_joint.max(axis=1)
        density = np.exp(log_joint - top[:, None])
        total = density.sum(axis=1)
        log_likelihood = share @ (top + np.log(total))
        if log_likelihood < before + _TOLERANCE:
            break
        before = log_likelihood
        joint = (share / total)[:, None] * density
    return Mixture(np.log(weight), mean, width), float(log_likelihood)
