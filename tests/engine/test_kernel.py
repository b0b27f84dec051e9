"""The kernel that autograd makes of any callable, and how a field brings its own."""

import pytest
import torch

from skode._engine.kernel import AutogradKernel, bind
from skode._engine.solve import solve
from tests.problems import normal, perceptron

TIMES = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
GRADIENTS = ["checkpoint", "adjoint", "backprop"]


def test_products_are_those_of_autograd():
    field = perceptron()
    params = [param.requires_grad_() for param in field.params]
    kernel = AutogradKernel(field, params)
    total = [torch.zeros_like(param) for param in params]
    times = normal(2, 4, seed=0)
    states, cotangents = kernel.begin_linear(times, 3)
    for slot in range(2):
        t, y = times[slot].clone(), normal(4, 3, seed=10 + slot)
        v = normal(4, 3, seed=20 + slot)
        states[slot].copy_(y)
        cotangents[slot].copy_(v)
        t.requires_grad_(), y.requires_grad_()
        wanted = torch.autograd.grad(field(t, y), (y, t, *params), v)
        out, value, plain = (torch.empty(4, 3, dtype=torch.float64) for _ in range(3))
        kernel.linearize(slot, value)
        kernel.evaluate(slot, y, plain)
        kernel.pull(slot, out)
        assert torch.equal(value, plain)
        torch.testing.assert_close(value, field(t, y).detach())
        torch.testing.assert_close(out, wanted[0])
        torch.testing.assert_close(kernel.pull_time(slot), wanted[1])
        for sum_, part in zip(total, wanted[2:], strict=True):
            sum_ += part
        assert not out.requires_grad and not value.requires_grad
    assert kernel.gradients() == (None,) * 4
    kernel.accumulate(2)
    for ours, wanted_ in zip(kernel.gradients(), total, strict=True):
        torch.testing.assert_close(ours, wanted_)
    assert kernel.gradients() == (None,) * 4  # and forgotten
    assert all(param.grad is None for param in params)


def wrong_shape(t, y):
    return y[:, :1]


def one_row_less(t, y):
    return y[1:]


def flat(t, y):
    return y.sum(dim=1)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("method", ["rk4", "dopri5", "fehlberg2", "RK45"])
@pytest.mark.parametrize("field", [wrong_shape, one_row_less, flat])
def test_a_wrong_shape_is_told_with_the_right_one(field, method, gradient):
    y0 = normal(4, 3, seed=1).requires_grad_()
    if method == "RK45":
        gradient = "adjoint"
    rows = 4 if method in ("rk4", "dopri5") else 1
    wrong = {"wrong_shape": (rows, 1), "one_row_less": (rows - 1, 3), "flat": (rows,)}
    with pytest.raises(ValueError) as error:
        solve(field, y0, TIMES, method=method, step_size=0.1, gradient=gradient)
    assert f"y has shape ({rows}, 3)" in str(error.value)
    assert str(wrong[field.__name__]) in str(error.value)


@pytest.mark.parametrize("method", ["rk4", "dopri5", "fehlberg2", "RK45"])
def test_a_wrong_dtype_is_told_with_the_right_one(method):
    with pytest.raises(TypeError) as error:
        solve(
            lambda t, y: y.double(), torch.ones(2, 3), TIMES, method=method, step_size=1
        )
    assert "y is torch.float32, f(t, y) is torch.float64" in str(error.value)
    assert "field.to(torch.float32)" in str(error.value)


def test_a_field_that_returns_no_tensor():
    with pytest.raises(TypeError, match="must return a tensor, not tuple"):
        solve(lambda t, y: (y,), torch.ones(2, 3), TIMES)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("method", ["rk4", "dopri5"])
class TestFieldsThatIgnore:
    """Autograd has no gradient to give; the kernel says zero."""

    def grads(self, field, method, gradient, params=()):
        y0 = normal(2, 3, seed=1).requires_grad_()
        t = TIMES.clone().requires_grad_()
        settings = {"method": method, "step_size": 0.1, "gradient": gradient}
        ys = solve(field, y0, t, params=params, **settings).ys
        grads = torch.autograd.grad(ys.sum(), (y0, t, *params), allow_unused=True)
        return ys.detach() - y0.detach()[:, None], grads

    def test_everything(self, method, gradient):
        moved, (grad_y0, grad_t) = self.grads(
            lambda t, y: torch.full_like(y, 2.0), method, gradient
        )
        torch.testing.assert_close(moved, (2 * TIMES)[None, :, None].expand(2, -1, 3))
        torch.testing.assert_close(grad_y0, torch.full_like(grad_y0, 3.0))
        # Two rows of three entries move by 2 per unit of time.
        torch.testing.assert_close(grad_t, torch.tensor([-24.0, 12, 12]).double())

    def test_the_state(self, method, gradient):
        moved, (grad_y0, grad_t) = self.grads(
            lambda t, y: (2 * t[:, None]).expand_as(y), method, gradient
        )
        torch.testing.assert_close(
            moved, (TIMES**2)[None, :, None].expand(2, -1, 3), rtol=1e-9, atol=1e-9
        )
        torch.testing.assert_close(grad_y0, torch.full_like(grad_y0, 3.0))
        torch.testing.assert_close(
            grad_t, 12 * torch.tensor([0, 0.3, 1.0]).double(), rtol=1e-6, atol=1e-6
        )

    def test_the_time(self, method, gradient):
        _, (grad_y0, grad_t) = self.grads(lambda t, y: -y, method, gradient)
        decays = torch.exp(-TIMES)
        wanted = torch.full_like(grad_y0, float(decays.sum()))
        torch.testing.assert_close(grad_y0, wanted, rtol=5e-3, atol=0)
        assert grad_t.abs().min() > 0

    def test_a_parameter(self, method, gradient):
        used = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        unused = torch.ones(3, dtype=torch.float64, requires_grad=True)
        frozen = torch.ones(3, dtype=torch.float64)
        with pytest.raises(RuntimeError):  # nothing to differentiate by
            torch.autograd.grad(unused.sum(), frozen)
        y0 = normal(2, 3, seed=1)
        ys = solve(
            lambda t, y: used * frozen * y,
            y0,
            TIMES,
            params=(unused, frozen, used),
            method=method,
            step_size=0.1,
            rtol=1e-9,
            atol=1e-9,
            gradient=gradient,
        ).ys
        ys.sum().backward()
        assert frozen.grad is None
        assert unused.grad is None or not unused.grad.any()
        wanted = (y0[:, None] * (TIMES * torch.exp(0.5 * TIMES))[:, None]).sum()
        torch.testing.assert_close(used.grad, wanted, rtol=1e-4, atol=0)


class OwnKernel:
    """y' = y with derivatives of its own; counts who asks for them."""

    def __init__(self, refuse=False):
        self.bound = []
        self.refuse = refuse

    def __call__(self, t, y):
        return y.clone()

    def own_kernel(self, params):
        self.bound.append(tuple(params))
        return None if self.refuse else AutogradKernel(self, params)


def test_a_field_may_bring_its_own_kernel():
    field = OwnKernel()
    y0 = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    solve(field, y0, TIMES).ys.sum().backward()
    assert len(field.bound) >= 2  # forwards and backwards
    wanted = torch.exp(TIMES).sum().reshape(1, 1)
    torch.testing.assert_close(y0.grad, wanted, rtol=1e-3, atol=0)


def test_a_field_may_leave_it_to_autograd():
    field = OwnKernel(refuse=True)
    assert isinstance(bind(field, ()), AutogradKernel)
    assert field.bound == [()]


def test_fields_with_dropout_see_the_mode_of_autograd():
    """`evaluate` runs without autograd, whoever calls it."""
    modes = set()

    def field(t, y):
        modes.add(torch.is_grad_enabled())
        return -y

    solve(field, torch.ones(1, 1), TIMES.float())
    assert modes == {False}


class Crowded(torch.nn.Module):
    """A field whose attributes have the names that a field of ours might use."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
        self.kernel = torch.nn.Parameter(torch.ones(2))
        self.perceptron = "none"

    def forward(self, t, y):
        return self.layers[0](y) * self.kernel


def test_a_users_names_are_not_taken_for_ours():
    field, y0 = Crowded(), torch.ones(3, 2)
    t = torch.tensor([0.0, 1.0])
    ys = solve(field, y0, t, params=tuple(field.parameters()), compile="auto").ys
    ys.sum().backward()
    assert torch.isfinite(field.kernel.grad).all()
