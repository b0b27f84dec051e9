"""The first step: long enough to matter, short enough to be accepted."""

import pytest
import torch

from skode._engine.control import PIController
from skode._engine.kernel import AutogradKernel
from skode._engine.solution import Tolerance
from skode._engine.tableau import TABLEAUX, coefficients

ADAPTIVE = [name for name, tableau in TABLEAUX.items() if tableau.adaptive]


def estimate(tableau, h):
    """Return the estimated error of one step of y' = y from y = 1."""
    k = []
    for row in (*tableau.a, tableau.b):
        k.append(1 + h * sum(a * x for a, x in zip(row, k, strict=True)))
    return abs(h * sum(b * x for b, x in zip(tableau.b_err, k, strict=True)))


@pytest.mark.parametrize("method", ADAPTIVE)
def test_the_error_constant_is_that_of_the_estimate(method):
    tableau = TABLEAUX[method]
    h = 0.1
    found = estimate(tableau, h) / h**tableau.order
    assert found == pytest.approx(tableau.error_constant, rel=0.2)


def first(rate, y=1.0, span=1.0, tol=1e-5, method="dopri5"):
    y = torch.full((1, 2), y, dtype=torch.float64)
    t = torch.zeros(1, dtype=torch.float64)
    coef = coefficients(TABLEAUX[method], y.dtype, t.dtype, y.device)
    controller = PIController.of(
        Tolerance(tol, tol, None, 9), y, coef.order, coef.error_constant
    )
    kernel = AutogradKernel(lambda t, y: rate * y, ())
    step, nfe = controller.first(kernel, t, y, rate * y, torch.full_like(t, span))
    assert nfe == 1
    return step.item()


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("rate", [1.0, 30.0])
def test_the_first_step_errs_as_every_step_is_meant_to(method, rate):
    tol = 1e-8
    step = first(rate, span=1.0, tol=tol, method=method)
    share = estimate(TABLEAUX[method], rate * step) / (2 * tol)
    wanted = 0.9 ** TABLEAUX[method].order
    # The step of dopri8 is as long as the state is old, and the state shrinks.
    assert wanted * (0.5 if method == "dopri8" else 0.9) < share < 1.1 * wanted


def test_the_first_step_is_measured_in_units_of_the_time_scale():
    assert first(100.0, span=0.01) == pytest.approx(first(1.0) / 100)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_first_step_is_positive_and_finite_where_nothing_moves(sign):
    assert 0 < first(0.0, span=sign) < float("inf")
    assert 0 < first(1.0, y=0.0, span=sign) < float("inf")


def test_a_probe_that_is_not_finite_asks_for_a_small_step():
    assert first(float("nan")) == pytest.approx(1e-6)
