"""Mixtures on the line: scores, their slopes, quantiles and fits."""

import numpy as np
import pytest
from scipy.stats import norm

from skode._marginals.mixture import Mixture, fit_mixture, moments


def mixture(weight, mean, std):
    weight = np.asarray(weight, dtype=float)
    return Mixture(np.log(weight / weight.sum()), np.array(mean), np.array(std))


MIXTURES = {
    "normal": mixture([1], [0.3], [2.0]),
    "two modes": mixture([1, 3], [-1.0, 2.0], [0.5, 0.3]),
    "narrow on wide": mixture([1, 1, 0.01], [0.0, 1.0, 0.0], [1e-3, 1e-3, 4.0]),
    "scales": mixture([1, 1, 1], [0.0, 0.1, 5.0], [0.1, 1.0, 100.0]),
    "far apart": mixture([1, 1, 1e-4], [-300.0, 300.0, 0.0], [0.1, 0.1, 900.0]),
}
every_mixture = pytest.mark.parametrize("F", MIXTURES.values(), ids=MIXTURES)


def distribution(F, u):
    return norm.cdf((u[:, None] - F.mean) / F.std) @ np.exp(F.log_weight)


@every_mixture
def test_scores_are_quantiles_of_the_normal(F):
    u = F.quantiles(np.linspace(-5, 5, 101))
    z, _ = F.scores(u)
    np.testing.assert_allclose(norm.cdf(z), distribution(F, u), rtol=1e-10)


@every_mixture
def test_slope_is_the_quotient_of_the_densities(F):
    u = F.quantiles(np.linspace(-5, 5, 101))
    z, log_slope = F.scores(u)
    density = norm.pdf((u[:, None] - F.mean) / F.std) / F.std @ np.exp(F.log_weight)
    np.testing.assert_allclose(log_slope, np.log(density / norm.pdf(z)), atol=1e-9)


@every_mixture
def test_slope_against_differences(F):
    u = F.quantiles(np.linspace(-30, 30, 62))
    h = 1e-4 * F.std.min()
    rise = F.scores(u + h)[0] - F.scores(u - h)[0]
    np.testing.assert_allclose(
        np.log(rise / (2 * h)), F.scores(u)[1], atol=2e-5 + 1e-14 * np.abs(u / h).max()
    )


@every_mixture
@pytest.mark.parametrize("z", [np.linspace(-6, 6, 301), np.geomspace(6, 1e6, 50)])
def test_quantiles_undo_scores(F, z):
    for sign in (1, -1):
        back, _ = F.scores(F.quantiles(sign * z))
        u = F.quantiles(back)
        np.testing.assert_allclose(
            u, F.quantiles(sign * z), rtol=1e-10, atol=1e-10 * F.std.max()
        )


@every_mixture
def test_the_tails_are_those_of_the_widest_component(F):
    far = F.std.max() * np.array([-1e40, -1e9, -1e5, 1e5, 1e9, 1e40])
    z, log_slope = F.scores(far)
    np.testing.assert_allclose(z, far / F.std.max(), rtol=1e-3)
    np.testing.assert_allclose(log_slope, -np.log(F.std.max()), rtol=1e-3, atol=1e-9)
    np.testing.assert_allclose(F.quantiles(z), far, rtol=1e-12)


def test_a_mixture_is_found_again():
    truth = mixture([1, 3], [-1.0, 2.0], [0.5, 0.3])
    u = truth.quantiles(norm.ppf((np.arange(2000) + 0.5) / 2000))
    found, log_likelihood = fit_mixture(u, np.full(2000, 1 / 2000), 2000, 2)
    np.testing.assert_allclose(np.exp(found.log_weight), [0.25, 0.75], atol=0.01)
    np.testing.assert_allclose(found.mean, truth.mean, atol=0.02)
    np.testing.assert_allclose(found.std, truth.std, rtol=0.05)
    z, log_slope = truth.scores(u)
    np.testing.assert_allclose(
        log_likelihood, np.mean(norm.logpdf(z) + log_slope), atol=1e-3
    )


def test_components_do_not_collapse_onto_a_point():
    u = np.sort(np.random.default_rng(0).standard_normal(40))
    u[10:20] = u[10]
    found, _ = fit_mixture(u, np.full(40, 1 / 40), 40, 4)
    assert found.std.min() > 0.05


def test_one_component_is_the_normal():
    u, share = np.array([0.0, 1.0, 5.0]), np.array([0.5, 0.25, 0.25])
    normal, log_likelihood = fit_mixture(u, share, 4, 1)
    mean, std = moments(u, share)
    assert (normal.mean[0], normal.std[0]) == (mean, std)
    assert log_likelihood == pytest.approx(share @ norm.logpdf(u, mean, std))


@every_mixture
def test_scores_of_many_points_are_those_of_few(F):
    u = F.quantiles(np.linspace(-5, 5, 10_000))
    z, log_slope = F.scores(u)
    for some in (slice(0, 1), slice(4000, 4200), slice(9999, None)):
        few, few_log_slope = F.scores(u[some])
        np.testing.assert_allclose(z[some], few, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(log_slope[some], few_log_slope, rtol=1e-12)
    assert F.scores(u[:0])[0].shape == (0,)
