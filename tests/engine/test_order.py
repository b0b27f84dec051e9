"""Errors fall as the orders of the tableaux promise, at the ends and inside steps."""

import numpy as np
import pytest
import torch

from skode._engine.dense import DenseOutput, Requests
from skode._engine.kernel import AutogradKernel
from skode._engine.loop import march
from skode._engine.solution import Tolerance
from skode._engine.solve import FIXED_STEP, solve
from skode._engine.tableau import TABLEAUX, coefficients
from tests.problems import CUBIC, DECAY

FIXED = [name for name in TABLEAUX if name in FIXED_STEP]
# Asymptotic, and far enough from rounding.
STEPS = {1: (64, 128, 256), 2: (16, 32, 64), 3: (16, 32, 64), 4: (8, 16, 32)}
STEPS |= {5: (8, 12, 16, 24), 8: (2, 3, 4, 6)}
# Error inside a step, where it is not that of the method: a cubic Hermite is O(h^4)
# for rk4; the interpolant of order 5 of dopri8 is O(h^6).
DENSE_ORDER = {"dopri8": 6}


def slope(steps, errors):
    return np.polyfit(np.log(1 / np.array(steps)), np.log(errors), deg=1)[0]


def march_evenly(problem, tableau, n, times=None):
    """March with any tableau, adaptive or not; return y1 and states at `times`."""
    y0, ends = problem.y0(), problem.times()
    coef = coefficients(tableau, y0.dtype, y0.dtype, y0.device)
    dense = None
    if times is not None:
        dense = DenseOutput(Requests(times), y0, coef)
    tolerance = Tolerance(1e-3, 1e-6, (problem.span[1] - problem.span[0]) / n, 10_000)
    y1, stats = march(
        AutogradKernel(problem.field, ()),
        coef,
        y0,
        ends[:, 0],
        ends[:, -1],
        tolerance,
        [] if dense is None else [dense],
    )
    assert stats.n_accepted.tolist() == [n] * len(y0)
    return y1, None if dense is None else dense.ys


@pytest.mark.parametrize("name", TABLEAUX)
@pytest.mark.parametrize("problem", [DECAY, CUBIC], ids=lambda problem: problem.name)
def test_error_falls_with_the_order_of_the_tableau(name, problem):
    tableau = TABLEAUX[name]
    steps = STEPS[tableau.order]
    errors = []
    for n in steps:
        y1, _ = march_evenly(problem, tableau, n)
        errors.append(problem.error(torch.stack((problem.y0(), y1), dim=1)))
    assert min(errors) > 1e-14, "rounding, not the method"
    assert slope(steps, errors) > tableau.order - 0.3


@pytest.mark.parametrize("name", FIXED)
def test_error_falls_with_the_order_by_the_door(name):
    order = TABLEAUX[name].order
    steps = STEPS[order]
    span = CUBIC.span[1] - CUBIC.span[0]
    errors = [
        CUBIC.error(
            solve(
                CUBIC.field,
                CUBIC.y0(),
                CUBIC.times(2),
                method=name,
                step_size=span / n,
            ).ys
        )
        for n in steps
    ]
    assert slope(steps, errors) > order - 0.3


@pytest.mark.parametrize("name", TABLEAUX)
def test_error_inside_steps_falls_with_the_order_of_the_dense_output(name):
    tableau = TABLEAUX[name]
    order = DENSE_ORDER.get(name, tableau.order)
    steps = (8, 12, 16, 24) if order > 4 else STEPS[tableau.order]
    times = CUBIC.times(62)  # meets no step's end but the first and the last
    errors = []
    for n in steps:
        _, ys = march_evenly(CUBIC, tableau, n, times)
        ys[:, 0], ys[:, -1] = torch.nan, torch.nan
        wanted = CUBIC.exact(CUBIC.y0(), times)
        errors.append(float((ys - wanted)[:, 1:-1].abs().max()))
    assert slope(steps, errors) > order - 0.3


@pytest.mark.parametrize("name", TABLEAUX)
def test_a_single_step_is_interpolated_with_the_local_order(name):
    """Here nothing but the interpolant errs: one step, ever shorter."""
    tableau = TABLEAUX[name]
    order = {"euler": 2, "rk4": 4, "bosh3": 4, "dopri5": 5, "tsit5": 5, "dopri8": 6}
    sizes = [0.2, 0.1, 0.05]
    errors = []
    for h in sizes:
        y0 = CUBIC.y0()
        times = torch.linspace(0.0, h, 9, dtype=torch.float64).repeat(len(y0), 1)
        coef = coefficients(tableau, y0.dtype, y0.dtype, y0.device)
        dense = DenseOutput(Requests(times), y0, coef)
        march(
            AutogradKernel(CUBIC.field, ()),
            coef,
            y0,
            times[:, 0],
            times[:, -1],
            Tolerance(1e-3, 1e-6, h, 10),
            [dense],
        )
        wanted = CUBIC.exact(y0, times)
        errors.append(float((dense.ys - wanted)[:, 1:-1].abs().max()))
    assert slope([1 / h for h in sizes], errors) > order.get(name, 3) - 0.3


@pytest.mark.parametrize("name", [n for n in TABLEAUX if n not in FIXED])
def test_the_error_falls_with_the_tolerance(name):
    errors = []
    tolerances = (1e-3, 1e-5) if name == "adaptive_heun" else (1e-4, 1e-8)
    for tolerance in tolerances:
        solution = solve(
            CUBIC.field,
            CUBIC.y0(),
            CUBIC.times(7),
            method=name,
            rtol=tolerance,
            atol=tolerance,
        ).require_success()
        errors.append(CUBIC.error(solution.ys))
        assert errors[-1] < 20 * tolerance
    assert errors[1] < errors[0] / 10
