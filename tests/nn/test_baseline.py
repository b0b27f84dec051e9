"""Trend and seasons, against dense generalised least squares."""

import numpy as np
import pytest
import torch

from skode._nn import baseline as room
from skode._nn.baseline import Baseline
from tests.problems import normal

TIMES = torch.tensor([[-1.0, -0.8, -0.75, -0.3, -0.3, 0.0], [-2, -1, -0.4, -0.1, 0, 0]])
TIMES = TIMES.double()
MASK = torch.tensor(
    [
        [[1, 1], [1, 0], [1, 1], [0, 1], [1, 1], [1, 1]],
        [[1, 1], [1, 1], [0, 1], [1, 1], [0, 1], [0, 0]],
    ]
).bool()
VALUES = normal(2, 6, 2, seed=0) * MASK


def dense(baseline, row, channel):
    """Return mean, precision and scale of the coefficients by dense algebra."""
    there = MASK[row, :, channel].numpy()
    any_there = MASK[row].any(dim=1).numpy()
    times = TIMES[row].numpy()
    span = np.ptp(times[any_there])
    apart = np.abs(times[:, None] - times)[np.ix_(there, there)]
    cov = baseline.share * np.exp(-apart / (room.PERSISTENCE * span))
    cov += (1 - baseline.share) * np.eye(there.sum())
    terms = baseline.terms(TIMES)[row].numpy()[there]
    ridge = np.full(terms.shape[1], room._RIDGE)
    if baseline.trend != "none":
        ridge[0] = room._LEVEL_RIDGE
    inverse = np.linalg.inv(cov)
    precision = terms.T @ inverse @ terms + np.diag(ridge)
    values = VALUES[row, :, channel].numpy()[there]
    mean = np.linalg.solve(precision, terms.T @ inverse @ values)
    error = values - terms @ mean
    free = max(1, there.sum() - terms.shape[1])
    return mean, precision, np.sqrt(error @ inverse @ error / free)


@pytest.mark.parametrize("trend", ["none", "level", "linear"])
@pytest.mark.parametrize("periods", [(), (0.7,), (0.7, 0.2)])
def test_coefficients_are_those_of_dense_least_squares(trend, periods):
    baseline = Baseline(trend, periods)
    assert baseline.empty == (trend == "none" and not periods)
    if baseline.empty:
        return
    ours = baseline.fit(TIMES, VALUES, MASK)
    assert baseline.n_terms == baseline.terms(TIMES).shape[2] == ours.mean.shape[2]
    for row in range(2):
        for channel in range(2):
            mean, precision, scale = dense(baseline, row, channel)
            found = ours.mean[row, channel].numpy()
            np.testing.assert_allclose(found, mean, rtol=1e-6, atol=1e-9)
            factor = ours.factor[row, channel].numpy()
            np.testing.assert_allclose(factor @ factor.T, precision, rtol=1e-9)
            assert ours.scale[row, channel].item() == pytest.approx(
                max(scale, room._SMALLEST_SCALE), rel=1e-6
            )


def test_draws_have_the_covariance_of_the_coefficients():
    baseline = Baseline("linear", (0.7,))
    ours = baseline.fit(TIMES, VALUES, MASK)
    basis = torch.eye(baseline.n_terms).double()[None, :, None].expand(2, -1, 2, -1)
    drawn = ours.draw(basis) - ours.mean[:, None]  # a draw is linear in noise
    for row in range(2):
        for channel in range(2):
            root = drawn[row, :, channel].numpy()
            _, precision, scale = dense(baseline, row, channel)
            wanted = scale**2 * np.linalg.inv(precision)
            np.testing.assert_allclose(root.T @ root, wanted, rtol=1e-5, atol=1e-9)


def test_values_are_sums_of_terms():
    baseline = Baseline("linear", (0.7,))
    coefficients = normal(2, 3, 2, baseline.n_terms, seed=4)
    found = baseline.at(TIMES, coefficients)
    wanted = torch.einsum("btr,bkcr->bktc", baseline.terms(TIMES), coefficients)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(baseline.at(TIMES, coefficients[:, 0]), wanted[:, 0])


def test_a_line_and_a_season_are_found_and_continued():
    times = torch.linspace(-1, 0, 200).double()[None]
    later = torch.linspace(0, 0.5, 20).double()[None]

    def truth(t):
        return torch.stack((2 + t + torch.sin(2 * np.pi * t / 0.3), -3 * t), dim=2)

    baseline = Baseline("linear", (0.3,))
    values = truth(times)
    found = baseline.fit(times, values, torch.ones_like(values).bool())
    torch.testing.assert_close(
        baseline.at(later, found.mean), truth(later), rtol=0.02, atol=0.02
    )


def test_what_was_never_observed_has_no_baseline():
    mask = MASK.clone()
    mask[:, :, 1] = False
    mask[1] = False
    found = Baseline("linear", (0.5,)).fit(TIMES, VALUES * mask, mask)
    assert torch.isfinite(found.mean).all() and torch.isfinite(found.factor).all()
    assert not found.mean[:, 1].any() and not found.mean[1].any()


def test_rows_that_are_not_observed_change_nothing():
    baseline = Baseline("linear", (0.5,))
    wanted = baseline.fit(TIMES, VALUES, MASK)
    longer = torch.cat((TIMES, TIMES[:, -1:] + 3), dim=1)
    values = torch.cat((VALUES, torch.full((2, 1, 2), 9.0).double()), dim=1)
    mask = torch.cat((MASK, torch.zeros(2, 1, 2).bool()), dim=1)
    found = baseline.fit(longer, values, mask)
    for name in ("mean", "factor", "scale"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name))


def test_all_times_may_be_equal():
    times = torch.zeros(1, 5).double()
    values = normal(1, 5, 1, seed=1)
    found = Baseline("linear").fit(times, values, torch.ones_like(values).bool())
    assert found.mean[0, 0, 0].item() == pytest.approx(values.mean().item(), rel=1e-3)
    assert abs(found.mean[0, 0, 1].item()) < 1e-6
