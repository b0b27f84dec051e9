"""Mixtures of normals, against SciPy."""

import numpy as np
import pytest
import torch
from scipy.stats import norm

from skode._nn.predictive import Mixture
from tests.problems import normal

MEANS = 3 * normal(2, 5, 4, 3, seed=0)
STDS = normal(2, 5, 4, 3, seed=1).exp()
MIXTURE = Mixture(MEANS, STDS)


def weigh(function):
    """Return the mean over components of a function of scipy's normals."""
    return function(norm(MEANS.numpy(), STDS.numpy())).mean(axis=1)


def test_densities_are_those_of_scipy():
    values = 4 * normal(2, 4, 3, seed=2)
    wanted = np.log(weigh(lambda parts: parts.pdf(values.numpy()[:, None])))
    np.testing.assert_allclose(MIXTURE.log_density(values), wanted, rtol=1e-10)


def test_far_from_all_components_the_density_is_finite():
    values = torch.full((2, 4, 3), 1e6).double()
    assert torch.isfinite(MIXTURE.log_density(values)).all()


@pytest.mark.parametrize("level", [0.001, 0.05, 0.5, 0.95, 0.999])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)]
)
def test_quantiles_invert_the_distribution(level, dtype, tolerance):
    found = Mixture(MEANS.to(dtype), STDS.to(dtype)).quantile(level)
    assert found.dtype == dtype
    below = weigh(lambda parts: parts.cdf(found.double().numpy()[:, None]))
    np.testing.assert_allclose(below, level, atol=tolerance)


def test_moments_are_those_of_the_density():
    grid = torch.linspace(-80, 80, 400_001).double()
    one = Mixture(MEANS[:1, :, :1, :1], STDS[:1, :, :1, :1])
    density = one.log_density(grid[:, None, None]).exp().ravel().numpy()
    grid = grid.numpy()
    mean, std = one.mean().item(), one.std().item()
    assert np.trapezoid(density, grid) == pytest.approx(1)
    assert np.trapezoid(density * grid, grid) == pytest.approx(mean)
    spread = np.trapezoid(density * (grid - mean) ** 2, grid)
    assert spread == pytest.approx(std**2)


def test_a_wider_mixture_keeps_its_mean_and_stretches_its_quantiles():
    wide = MIXTURE.widened(1.7)
    torch.testing.assert_close(wide.mean(), MIXTURE.mean())
    torch.testing.assert_close(wide.std(), 1.7 * MIXTURE.std())
    away = MIXTURE.quantile(0.9) - MIXTURE.mean()
    torch.testing.assert_close(wide.quantile(0.9), MIXTURE.mean() + 1.7 * away)
