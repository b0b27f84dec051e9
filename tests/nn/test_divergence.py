"""Traces of perceptrons, against the matrix product that the Jacobian is."""

from itertools import pairwise, product

import pytest
import torch

from skode._nn.divergence import along, axes, closed_form, pushed, rademacher
from tests.problems import normal

DIM, ROWS = 3, 4
each_depth = pytest.mark.parametrize("hidden", [(), (6,), (6, 5), (6, 5, 7)], ids=len)


def layers(hidden, context=0):
    """Return weights and slopes of a perceptron."""
    widths = (DIM + context, *hidden, DIM)
    weights = [
        normal(fan_out, fan_in, seed=i)
        for i, (fan_in, fan_out) in enumerate(pairwise(widths))
    ]
    return weights, [normal(ROWS, h, seed=10 + i) for i, h in enumerate(hidden)]


def jacobian(weights, slopes):
    """Return df/dy, (ROWS, DIM, DIM)."""
    moved = weights[0][:, :DIM].expand(ROWS, -1, -1)
    for slope, weight in zip(slopes, weights[1:], strict=True):
        moved = weight @ (slope[:, :, None] * moved)
    return moved


def trace(weights, slopes):
    return jacobian(weights, slopes).diagonal(dim1=1, dim2=2).sum(dim=1)


def close(ours, wanted):
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("hidden", [(), (6,), (6, 5)], ids=len)
@pytest.mark.parametrize("context", [0, 2])
def test_the_closed_form_is_the_trace(hidden, context):
    weights, slopes = layers(hidden, context)
    close(closed_form(weights, slopes).expand(ROWS), trace(weights, slopes))


@each_depth
@pytest.mark.parametrize("context", [0, 2])
def test_all_axes_together_give_the_trace(hidden, context):
    weights, slopes = layers(hidden, context)
    each = along(weights, slopes, axes(DIM, weights[0]))
    close(each.sum(dim=-1).expand(ROWS), trace(weights, slopes))


@each_depth
def test_tangents_are_pushed_by_the_jacobian(hidden):
    weights, slopes = layers(hidden)
    tangents = normal(5, DIM, seed=20)
    wanted = torch.einsum("aij,pj->api", jacobian(weights, slopes), tangents)
    close(pushed(weights, slopes, tangents).expand(ROWS, -1, -1), wanted)


@each_depth
def test_signs_give_trace_and_squared_norm_in_the_mean(hidden):
    weights, slopes = layers(hidden)
    # The mean over all signs there are is what random ones give in the long run.
    signs = torch.tensor([*product([-1.0, 1.0], repeat=DIM)], dtype=torch.float64)
    estimates = along(weights, slopes, signs).expand(ROWS, -1)
    close(estimates.mean(dim=1), trace(weights, slopes))
    lengths = pushed(weights, slopes, signs).square().sum(dim=-1).expand(ROWS, -1)
    close(lengths.mean(dim=1), jacobian(weights, slopes).square().sum(dim=(1, 2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_signs_are_those_of_the_generator(dtype):
    like = torch.empty(0, dtype=dtype)
    draws = [
        rademacher(400, DIM, torch.Generator().manual_seed(seed), like)
        for seed in (0, 0, 1)
    ]
    assert draws[0].dtype == dtype and draws[0].shape == (400, DIM)
    assert torch.equal(draws[0].abs(), torch.ones_like(draws[0]))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert draws[0].mean(dim=0).abs().max() < 0.2
