"""torchdiffeq's and SciPy's methods behind our door."""

import pytest
import torch

from skode._engine.borrowed import BORROWED
from skode._engine.solution import Status
from skode._engine.solve import solve
from skode.exceptions import SolverError
from tests.problems import Linear, linear, normal, perceptron, scipy_reference

TIMES = torch.tensor(
    [
        [0.0, 0.13, 0.4, 1.0],
        [0.5, 0.2, -0.3, -0.6],
        [-1.0, 0.1, 0.2, 0.2],
        [0.3, 0.3, 0.3, 0.9],
        [0.4, 0.4, 0.4, 0.4],
        [0.0, 0.13, 0.4, 1.0],
    ],
    dtype=torch.float64,
)
SCIPY = [name for name, method in BORROWED.items() if not method.differentiable]
ADAPTIVE = [name for name, method in BORROWED.items() if not method.fixed_step]
# An upper bound for what a method reaches with these settings.
ERROR = {"fehlberg2": 1e-3, "heun3": 1e-5, "scipy_solver": 1e-4}


def settings_for(method):
    # fehlberg2 takes the error for a fraction of what it is.
    tolerance = 1e-7 if method == "fehlberg2" else 1e-6
    return {"method": method, "rtol": tolerance, "atol": tolerance, "step_size": 0.01}


@pytest.fixture(scope="module")
def reference():
    return scipy_reference(perceptron(), normal(6, 3, seed=1), TIMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", BORROWED)
def test_ragged_rows_in_both_directions(method, dtype, reference):
    solution = solve(
        perceptron(dtype=dtype),
        normal(6, 3, seed=1, dtype=dtype),
        TIMES.to(dtype),
        **settings_for(method),
    ).require_success()
    assert solution.ys.dtype == dtype
    assert solution.stats.status.dtype == torch.int8
    torch.testing.assert_close(
        solution.stats.t, TIMES[:, -1].to(dtype), rtol=0, atol=1e-6
    )
    error = (solution.ys - reference).abs().max()
    assert error < ERROR.get(method, 1e-3 if dtype == torch.float32 else 2e-4)


@pytest.mark.parametrize("method", BORROWED)
def test_times_may_be_more_precise_than_states(method, reference):
    solution = solve(
        perceptron(dtype=torch.float32),
        normal(6, 3, seed=1, dtype=torch.float32),
        TIMES,
        **settings_for(method),
    ).require_success()
    assert solution.ys.dtype == torch.float32
    assert (solution.ys - reference).abs().max() < 1e-3


@pytest.mark.parametrize("rows", [[5, 3, 1, 0, 4, 2], [2, 5], [1, 1, 0, 1]], ids=str)
@pytest.mark.parametrize("method", BORROWED)
def test_company_does_not_change_a_row(method, rows):
    y0 = normal(6, 3, seed=1)
    settings = {**settings_for(method), "rtol": 1e-2, "atol": 1e-2, "step_size": 0.05}
    whole = solve(perceptron(), y0, TIMES, **settings).ys
    part = solve(perceptron(), y0[rows], TIMES[rows], **settings).ys
    torch.testing.assert_close(part, whole[rows], rtol=0, atol=1e-11)


@pytest.mark.parametrize("method", BORROWED)
def test_nothing_to_do(method):
    field, y0 = perceptron(), normal(3, 3, seed=1)
    settings = settings_for(method)
    for times in (torch.tensor([0.5]), torch.tensor([0.5, 0.5])):
        ys = solve(field, y0, times.double(), **settings).require_success().ys
        assert torch.equal(ys, y0[:, None].expand(-1, len(times), -1))
    empty = solve(field, y0[:0], torch.zeros(2).double(), **settings)
    assert empty.require_success().ys.shape == (0, 2, 3)


@pytest.mark.parametrize(
    "method, gradient",
    [
        ("heun3", "auto"),
        ("heun3", "adjoint"),
        ("explicit_adams", "auto"),
        ("fehlberg2", "auto"),
        ("RK45", "auto"),
        ("DOP853", "adjoint"),
    ],
)
def test_gradients_are_those_of_the_closed_form(method, gradient):
    weights = normal(*TIMES.shape, 2, seed=2)
    grads = []
    for exactly in (True, False):
        y0 = normal(6, 2, seed=1).requires_grad_()
        matrix = linear().matrix.requires_grad_()
        if exactly:
            ys = Linear(matrix).exact(y0, TIMES)
        else:
            ys = (
                solve(
                    Linear(matrix),
                    y0,
                    TIMES,
                    params=(matrix,),
                    gradient=gradient,
                    **settings_for(method),
                )
                .require_success()
                .ys
            )
        grads.append(torch.autograd.grad((ys * weights).sum(), (y0, matrix)))
    for wanted, ours in zip(*grads, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=5e-3)


@pytest.mark.parametrize("gradient", ["auto", "adjoint"])
@pytest.mark.parametrize("method", ["heun3", "RK45"])
def test_gradients_of_the_times(method, gradient):
    grads = []
    times = TIMES[:2]
    for exactly in (True, False):
        y0, t = normal(2, 2, seed=1), times.clone().requires_grad_()
        if exactly:
            ys = linear().exact(y0, t)
        else:
            ys = solve(linear(), y0, t, gradient=gradient, **settings_for(method)).ys
        weights = normal(*times.shape, 2, seed=2)
        grads.append(torch.autograd.grad((ys * weights).sum(), t)[0])
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=5e-3)


@pytest.mark.parametrize("gradient", ["checkpoint", "backprop"])
@pytest.mark.parametrize("method", SCIPY)
def test_no_gradient_passes_scipy(method, gradient):
    with pytest.raises(ValueError, match="through which no gradient passes") as error:
        solve(linear(), torch.ones(1, 2), TIMES[0], method=method, gradient=gradient)
    assert repr(method) in str(error.value)
    assert "'adjoint'" in str(error.value)


@pytest.mark.parametrize("method", ["heun3", "fehlberg2", "RK45", "explicit_adams"])
def test_no_graph_without_grad(method):
    matrix = linear().matrix.requires_grad_()
    y0 = normal(6, 2, seed=1).requires_grad_()
    settings = {"params": (matrix,), **settings_for(method)}
    with torch.no_grad():
        assert not solve(Linear(matrix), y0, TIMES, **settings).ys.requires_grad
    plain = solve(linear(), y0.detach(), TIMES, **settings_for(method))
    assert not plain.ys.requires_grad


def van_der_pol(t, y):
    position, speed = y.unbind(dim=1)
    return torch.stack((speed, 1000 * (1 - position**2) * speed - position), dim=1)


@pytest.mark.parametrize("method", ["Radau", "BDF", "LSODA"])
def test_implicit_methods_solve_stiff_fields(method):
    y0 = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    times = torch.tensor([0.0, 100.0], dtype=torch.float64)
    solution = solve(van_der_pol, y0, times, method=method, rtol=1e-4, atol=1e-6)
    solution.require_success()
    # On the slow branch: y' = y / (1000 (1 - y^2)).
    y = solution.y1[0, 0]
    slow = torch.log(y) - y**2 / 2 - (torch.log(torch.tensor(2.0)) - 2)
    assert slow.item() == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize("method", BORROWED)
def test_max_steps_end_them_all(method):
    calls = 0

    def field(t, y):
        nonlocal calls
        calls += 1
        return van_der_pol(t, y)

    y0 = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    times = torch.tensor([0.0, 2000.0], dtype=torch.float64)
    solution = solve(
        field, y0, times, method=method, step_size=0.5, max_steps=2, rtol=1e-10
    )
    assert solution.stats.status.tolist() == [Status.MAX_STEPS]
    assert calls <= 101
    assert solution.y1.isnan().all()
    assert torch.equal(solution.ys[:, 0], y0)
    with pytest.raises(SolverError, match="reached max_steps=2"):
        solution.require_success()


# An implicit method of torchdiffeq warns of what our status tells, too.
@pytest.mark.filterwarnings("ignore:Functional iteration did not converge")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", BORROWED)
def test_a_blow_up_is_a_status(method, dtype):
    y0 = torch.tensor([[0.1], [1.0]], dtype=dtype)
    times = torch.tensor([0.0, 0.5, 3.0], dtype=dtype)
    solution = solve(
        lambda t, y: y**2, y0, times, method=method, step_size=0.05, max_steps=100
    )
    assert solution.stats.status[0] == Status.SUCCESS
    assert solution.y1[0].item() == pytest.approx(0.1 / 0.7, rel=5e-2)
    assert solution.stats.status[1] != Status.SUCCESS
    assert solution.ys[1, 2].isnan().all()
    with pytest.raises(SolverError, match="1 of 2 rows"):
        solution.require_success()


# An implicit method of torchdiffeq warns of what our status tells, too.
@pytest.mark.filterwarnings("ignore:Functional iteration did not converge")
@pytest.mark.parametrize("when", [-1.0, 0.5], ids=["always", "after half"])
@pytest.mark.parametrize("method", BORROWED)
def test_nan_is_a_status(method, when):
    def field(t, y):
        return torch.where(t[:, None] > when, torch.nan, -y)

    y0 = torch.ones(1, 2, dtype=torch.float64)
    times = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    solution = solve(field, y0, times, method=method, step_size=0.02, max_steps=100)
    assert solution.stats.status[0] != Status.SUCCESS
    assert solution.ys[0, -1].isnan().all()
    assert torch.equal(solution.ys[:, 0], y0)


def test_an_adjoint_of_too_many_steps_is_an_error_of_ours():
    def field(t, y):
        return -y

    y0 = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
    times = torch.tensor([0.0, 1.0], dtype=torch.float64)
    settings = {"method": "RK45", "rtol": 1e-4, "atol": 1e-4, "max_steps": 1}
    ys = solve(field, y0, times, **settings).require_success().ys
    with pytest.raises(SolverError, match="reached max_steps") as error:
        for _ in range(50):
            ys.sum().backward(retain_graph=True)
    assert error.value.status == "MAX_STEPS"


@pytest.mark.parametrize("method", ["heun3", "RK45"])
def test_an_assertion_of_the_field_is_not_swallowed(method):
    def field(t, y):
        raise AssertionError("mine")

    with pytest.raises(AssertionError, match="mine"):
        solve(field, torch.ones(1, 2), TIMES[0].float(), method=method, step_size=0.1)
