"""Rows that do not reach their end say so, and `require_success` says it aloud."""

import pickle

import pytest
import torch

from skode._engine.solution import Status
from skode._engine.solve import FIXED_STEP, solve
from skode._engine.tableau import TABLEAUX
from skode.exceptions import SolverError

ADAPTIVE = [name for name in TABLEAUX if name not in FIXED_STEP]
TIMES = torch.tensor([0.0, 0.25, 0.75, 2.0], dtype=torch.float64)


def van_der_pol(t, y):
    position, speed = y.unbind(dim=1)
    return torch.stack((speed, 1000 * (1 - position**2) * speed - position), dim=1)


def square(t, y):
    """y = y0 / (1 - y0 t)."""
    return y**2


def nan_after_half(t, y):
    return torch.where(t[:, None] > 0.5, torch.nan, -y)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_a_stiff_field_reaches_max_steps(method):
    y0 = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    solution = solve(
        van_der_pol, y0, 1000 * TIMES, method=method, rtol=1e-4, max_steps=60
    )
    assert solution.stats.status.tolist() == [Status.MAX_STEPS]
    assert solution.stats.n_accepted + solution.stats.n_rejected == 60
    assert 0 < solution.stats.t < 1000
    with pytest.raises(SolverError, match="reached max_steps=60") as error:
        solution.require_success()
    assert "Raise max_steps" in str(error.value)
    assert "'Radau'" in str(error.value)
    assert "1e-04" in str(error.value) or "0.0001" in str(error.value)
    assert error.value.status == "MAX_STEPS"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", ADAPTIVE)
def test_a_solution_that_blows_up_ends_before_it_does(method, dtype):
    y0 = torch.tensor([[1.0], [0.1]], dtype=dtype)
    # Of low order, they take too many steps to the pole at a tight tolerance.
    tolerance = {"adaptive_heun": 1e-3, "bosh3": 1e-3}.get(method, 1e-6)
    solution = solve(
        square,
        y0,
        TIMES.to(dtype),
        method=method,
        rtol=tolerance,
        atol=tolerance,
        max_steps=2000,
    )
    status = solution.stats.status.tolist()
    if method == "adaptive_heun" and dtype == torch.float64:
        assert status[0] == Status.MAX_STEPS  # the pole is 1e4 steps away
    else:
        assert status[0] in (Status.STEP_UNDERFLOW, Status.NON_FINITE)
    assert status[1] == Status.SUCCESS
    assert solution.stats.t[0].item() == pytest.approx(1.0, abs=1e-2)
    wanted = torch.stack((torch.ones(3), 0.1 * torch.ones(3))).to(dtype)
    wanted = wanted / (1 - wanted * TIMES[:3].to(dtype))
    torch.testing.assert_close(solution.ys[:, :3, 0], wanted, rtol=2e-2, atol=0)
    assert solution.ys[0, 3].isnan().all()
    assert solution.ys[1, 3].item() == pytest.approx(0.1 / 0.8, rel=1e-2)
    with pytest.raises(SolverError) as error:
        solution.require_success()
    assert error.value.rows == (0,)
    assert error.value.n_rows == 2
    assert error.value.t[0] == pytest.approx(1.0, abs=1e-2)
    assert "1 of 2 rows" in str(error.value)


@pytest.mark.parametrize("method", [name for name in TABLEAUX if name in FIXED_STEP])
def test_fixed_steps_do_not_hide_a_blow_up(method):
    y0 = torch.tensor([[1.0], [0.1]], dtype=torch.float64)
    times = 10 * TIMES  # steps enough to overflow
    solution = solve(square, y0[:1], times, method=method, step_size=0.01)
    assert solution.stats.status.tolist() == [Status.NON_FINITE]
    # Past the pole, which fixed steps do not see, but not by much.
    assert 0.9 < solution.stats.t[0] < 2.0
    assert solution.y1.isnan().all()
    with pytest.raises(SolverError, match="not finite"):
        solution.require_success()


@pytest.mark.parametrize("gradient", ["auto", "checkpoint", "adjoint", "backprop"])
@pytest.mark.parametrize("method", TABLEAUX)
def test_nan_is_found_where_it_begins(method, gradient):
    y0 = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    y0.requires_grad_(gradient != "auto")
    settings = {"step_size": 0.02, "rtol": 1e-4, "atol": 1e-4, "gradient": gradient}
    solution = solve(nan_after_half, y0, TIMES, method=method, **settings)
    assert solution.stats.status.tolist() == [Status.NON_FINITE]
    at = 0.02 if method in FIXED_STEP else 1e-6
    assert solution.stats.t.item() == pytest.approx(0.5, abs=2 * at)
    ys = solution.ys.detach()
    assert ys[:, 2:].isnan().all()
    wanted = y0.detach() * torch.exp(-TIMES[1])
    torch.testing.assert_close(ys[:, 1], wanted, rtol=1e-2, atol=0)
    assert torch.equal(ys[:, 0], y0.detach())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", TABLEAUX)
def test_a_field_that_is_never_finite(method, value):
    y0 = torch.ones(2, 3)
    solution = solve(
        lambda t, y: y * value, y0, TIMES.float(), method=method, step_size=0.1
    )
    assert solution.stats.status.tolist() == [Status.NON_FINITE] * 2
    assert solution.stats.t.tolist() == [0.0, 0.0]
    assert torch.equal(solution.ys[:, 0], y0)
    assert solution.ys[:, 1:].isnan().all()


@pytest.mark.parametrize("method", TABLEAUX)
def test_a_start_that_is_not_finite(method):
    y0 = torch.tensor([[1.0], [torch.nan]])
    solution = solve(lambda t, y: -y, y0, TIMES.float(), method=method, step_size=0.1)
    assert solution.stats.status.tolist() == [Status.SUCCESS, Status.NON_FINITE]
    assert solution.ys[0].isfinite().all()


@pytest.mark.parametrize("method", ADAPTIVE)
def test_a_tolerance_that_no_float_can_meet_ends(method):
    y0 = torch.tensor([[1.0, -0.5]])
    solution = solve(
        lambda t, y: torch.sin(5 * y) - t[:, None],
        y0,
        TIMES.float(),
        method=method,
        rtol=1e-16,
        atol=1e-16,
        max_steps=200,
    )
    assert solution.stats.status[0] in (Status.STEP_UNDERFLOW, Status.MAX_STEPS)
    with pytest.raises(SolverError):
        solution.require_success()


def test_a_refused_adjoint_names_the_way_out():
    """Backwards in time, a strong contraction expands past what max_steps allow."""
    y0 = torch.tensor([[1.0]], dtype=torch.float64, requires_grad=True)

    def contract(t, y):
        return -40 * (y - torch.cos(t)[:, None])

    times = torch.tensor([0.0, 3.0], dtype=torch.float64)
    settings = {"rtol": 1e-3, "atol": 1e-3, "gradient": "adjoint"}
    forward = int(solve(contract, y0.detach(), times, **settings).stats.n_accepted)
    refused = int(solve(contract, y0.detach(), times, **settings).stats.n_rejected)
    solution = solve(contract, y0, times, max_steps=forward + refused, **settings)
    solution.require_success()
    with pytest.raises(SolverError, match="gradient='checkpoint'"):
        solution.ys.sum().backward()


def test_success_returns_the_solution():
    solution = solve(lambda t, y: -y, torch.ones(2, 1), TIMES.float())
    assert solution.require_success() is solution


def test_the_error_tells_the_worst_rows_and_survives_pickling():
    # 12 rows fail, of 14.
    y0 = torch.tensor([[1.0]] * 6 + [[0.1]] * 2 + [[2.0]] * 6, dtype=torch.float64)
    solution = solve(square, y0, TIMES)
    with pytest.raises(SolverError) as caught:
        solution.require_success()
    error = caught.value
    worst = Status[error.status]
    assert error.rows == tuple(
        i for i, s in enumerate(solution.stats.status.tolist()) if s == worst
    )
    assert 6 not in error.rows and 7 not in error.rows
    assert f"{len(error.rows)} of 14 rows" in str(error)
    assert ", ..." in str(error)
    assert f"t={min(error.t):.6g}" in str(error)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is SolverError
    assert str(copy) == str(error)
    for name in ("rows", "n_rows", "t", "status", "remedy", "reason"):
        assert getattr(copy, name) == getattr(error, name)
