"""Marches on a coarse grid: their ends, their errors, and the gradients of both."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from skode._engine.grid import Grid
from skode._engine.solve import solve
from skode._engine.tableau import TABLEAUX
from skode._nn.flow_field import Dynamics, FlowField
from tests.problems import CUBIC, normal, perceptron

ADAPTIVE = [name for name, tableau in TABLEAUX.items() if tableau.adaptive]
each_method = pytest.mark.parametrize("method", ADAPTIVE)
KNOTS = [1.0, 0.6, 0.5, 0.0]


def grid_of(field, method="bosh3", controlled=3):
    return Grid(field, getattr(field, "params", ()), controlled, method)


@each_method
def test_steps_are_those_of_solve(method):
    field, y0 = perceptron(), normal(5, 3, seed=1)
    end, _ = grid_of(field, method).march(y0, KNOTS)
    for t0, t1 in pairwise(KNOTS):
        times = torch.tensor([t0, t1], dtype=torch.float64)
        # No error is too large for that tolerance: one step each.
        solution = solve(field, y0, times, method=method, rtol=1e9, atol=1e9)
        assert (solution.stats.nfe <= 2 * TABLEAUX[method].stages + 2).all()
        y0 = solution.ys[:, -1]
    torch.testing.assert_close(end, y0, rtol=1e-12, atol=1e-12)


def flow(hidden=(5, 4)):
    """Return dynamics with derivatives of their own, and a start."""
    field = FlowField(2, hidden, "tanh", 1).double()
    for i, param in enumerate(field.parameters()):
        param.data = 0.6 * normal(*param.shape, seed=i)
    dynamics = Dynamics(field, energy=True)
    return dynamics, dynamics.start(normal(4, 2, seed=20), normal(4, 1, seed=21))


@each_method
@pytest.mark.parametrize("controlled", [1, 4])
def test_gradients_are_those_of_finite_differences(method, controlled):
    dynamics, start = flow()

    def march(y0, *_):
        return Grid(dynamics, dynamics.params, controlled, method).march(y0, KNOTS)

    inputs = (start.requires_grad_(), *dynamics.params)
    assert torch.autograd.gradcheck(march, inputs, eps=1e-6, atol=1e-7)


@each_method
@pytest.mark.parametrize("hidden", [(5,), (5, 4)], ids=len)
def test_a_field_without_derivatives_of_its_own_gets_the_same(method, hidden):
    dynamics, start = flow(hidden)
    weights, results = normal(4, start.shape[1], seed=22), []
    for field in (dynamics, lambda t, s: dynamics(t, s)):
        y0 = start.clone().requires_grad_()
        grid = Grid(field, dynamics.params, 4, method)
        end, error = grid.march(y0, KNOTS)
        loss = (end * weights).sum() + 3 * (error * weights[:, 0]).sum()
        results.append([end, error])
        results[-1] += torch.autograd.grad(loss, (y0, *dynamics.params))
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-11, atol=1e-11)


@each_method
def test_the_end_comes_nearer_with_the_order_of_the_method(method):
    y0 = CUBIC.y0()
    steps = np.array([2, 4, 8] if TABLEAUX[method].order > 5 else [4, 8, 16, 32])
    errors = []
    for n in steps:
        knots = np.linspace(*CUBIC.span, n + 1).tolist()
        end, _ = grid_of(CUBIC.field, method, controlled=1).march(y0, knots)
        errors.append(CUBIC.error(torch.stack([y0, end], dim=1)))
    slope = np.polyfit(np.log(1 / steps), np.log(errors), deg=1)[0]
    assert slope > TABLEAUX[method].order - 0.5


@each_method
def test_the_error_tells_the_distance_to_a_finer_solve(method):
    field, y0 = perceptron(), normal(50, 3, seed=1)
    end, squared = grid_of(field, method).march(y0, torch.linspace(1, 0, 13).tolist())
    fine, _ = grid_of(field, method).march(y0, torch.linspace(1, 0, 201).tolist())
    distance, error = (end - fine).norm(dim=1), squared.sqrt()
    # That of the method of lower order is seldom too small, and knows the hard rows.
    assert (distance < error).double().mean() > 0.8
    assert torch.corrcoef(torch.stack([distance.log(), error.log()]))[0, 1] > 0.4


def test_the_error_falls_with_the_steps():
    field, y0 = perceptron(), normal(10, 3, seed=1)
    errors = [
        grid_of(field).march(y0, torch.linspace(1, 0, n + 1).tolist())[1].mean()
        for n in (4, 16, 64)
    ]
    # Squares of third-order errors, summed over the steps: 1 / n^5 in the end.
    assert errors[0] > 4**4 * errors[1] > 4**8.5 * errors[2]


def test_only_the_controlled_columns_count():
    field, y0 = perceptron(), normal(4, 3, seed=1)
    apart = [grid_of(field, controlled=m).march(y0, KNOTS)[1] for m in (1, 2, 3)]
    assert (apart[0] < apart[1]).all() and (apart[1] < apart[2]).all()


def test_a_grid_is_used_again():
    field = perceptron()
    kept = grid_of(field)
    for rows, knots, dtype in (
        (4, KNOTS, torch.float64),
        (4, KNOTS[::-1], torch.float64),
        (7, KNOTS[1:], torch.float64),
        (1, KNOTS, torch.float64),
    ):
        y0 = normal(rows, 3, seed=rows, dtype=dtype)
        for ours, fresh in zip(
            kept.march(y0, knots), grid_of(field).march(y0, knots), strict=True
        ):
            assert torch.equal(ours, fresh)


def test_parameters_may_change_between_marches():
    field, y0 = perceptron(), normal(4, 3, seed=1)
    kept = grid_of(field)
    before, _ = kept.march(y0, KNOTS)
    field.weight.mul_(2)
    after, _ = kept.march(y0, KNOTS)
    assert torch.equal(after, grid_of(field).march(y0, KNOTS)[0])
    assert not torch.equal(after, before)


def test_a_march_is_differentiated_before_the_next():
    dynamics, start = flow()
    grid = Grid(dynamics, dynamics.params, 4)
    first, second = (grid.march(start, KNOTS)[0].sum() for _ in range(2))
    with pytest.raises(AssertionError, match="before the next"):
        first.backward()
    second.backward()


def test_rows_do_not_know_their_neighbours():
    field, y0 = perceptron(), normal(9, 3, seed=1)
    together = grid_of(field).march(y0, KNOTS)
    alone = [grid_of(field).march(row[None], KNOTS) for row in y0]
    for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("method", ["rk4", "euler"])
def test_a_method_without_an_error_estimate_is_refused(method):
    with pytest.raises(ValueError, match=f"method='{method}' has no error estimate"):
        grid_of(perceptron(), method)
