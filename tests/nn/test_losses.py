"""Losses against their formulas."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal

from skode._nn.losses import (
    classification_loss,
    gaussian,
    mean_and_std,
    regression_loss,
    weighted_mean,
)
from tests.problems import normal


def loss(name, delta=1.0, quantile=0.5):
    return regression_loss(name, delta=delta, quantile=quantile)


def test_cross_entropy_is_minus_the_log_probability_summed_over_targets():
    logits = normal(2, 5, seed=0)
    codes = torch.tensor([[2, 1], [0, 0]])
    first, second = logits[:, :3].log_softmax(1), logits[:, 3:].log_softmax(1)
    wanted = -torch.stack([first[0, 2] + second[0, 1], first[1, 0] + second[1, 0]])
    torch.testing.assert_close(classification_loss((3, 2))(logits, codes), wanted)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("squared_error", [(0.5 * 4.0 + 0.5 * 0.25) / 2]),
        ("absolute_error", [(2.0 + 0.5) / 2]),
        ("huber", [(1.0 * (2.0 - 0.5) + 0.5 * 0.25) / 2]),
        ("quantile", [(0.9 * 2.0 + 0.1 * 0.5) / 2]),
    ],
)
def test_regression_losses(name, wanted):
    outputs, targets = torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0, 0.5]])
    computed = loss(name, quantile=0.9)(outputs, targets)
    torch.testing.assert_close(computed, torch.tensor(wanted))


def test_gaussian_is_the_negative_log_likelihood_without_its_constant():
    outputs, targets = normal(4, 6, seed=0), normal(4, 3, seed=1)
    mean, std = mean_and_std(outputs).chunk(2, dim=1)
    wanted = -Normal(mean, std).log_prob(targets).mean(1) - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(gaussian(outputs, targets), wanted)


def test_spreads_stay_within_bounds():
    outputs = torch.tensor([[0.0, -1e6], [0.0, 1e6], [0.0, 0.1]])
    std = mean_and_std(outputs)[:, 1]
    assert np.allclose(std, [math.exp(-6), math.exp(6), math.exp(0.05)], rtol=1e-4)


@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.8])
def test_the_quantile_minimises_the_pinball_loss(quantile):
    data = normal(400, 1, seed=0)
    candidates = torch.linspace(-3, 3, 601, dtype=torch.float64)
    pinball = loss("quantile", quantile=quantile)
    means = [pinball(c.expand(400, 1), data).mean() for c in candidates]
    best = candidates[int(torch.stack(means).argmin())]
    assert float((data <= best).double().mean()) == pytest.approx(quantile, abs=0.02)


def test_weights_count_rows():
    losses, weights = torch.tensor([1.0, 3.0, 100.0]), torch.tensor([2.0, 1.0, 0.0])
    assert float(weighted_mean(losses, weights)) == pytest.approx(5 / 3)
