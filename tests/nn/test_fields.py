"""`MLPField` and the kernel that is its fused twin."""

import pytest
import torch

from skode._engine.kernel import AutogradKernel, bind
from skode._engine.solve import solve
from skode._nn.fields import ACTIVATIONS, MLPField, MLPKernel
from tests.problems import normal
from tests.twins import assert_same_kernels, close

DEPTHS = [(), (6,), (6, 5)]
SLOTS = 3
each_field = pytest.mark.parametrize("activation", ACTIVATIONS)
each_depth = pytest.mark.parametrize("hidden", DEPTHS, ids=len)


def field_of(hidden, activation, dim=3, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MLPField(dim, hidden, activation).double()


@each_field
@each_depth
@pytest.mark.parametrize("at_once", [False, True], ids=["each", "all"])
@torch.no_grad()
def test_the_kernel_agrees_with_autograd(activation, hidden, at_once):
    field = field_of(hidden, activation)
    params = tuple(field.parameters())
    fused, plain = field.own_kernel(params), AutogradKernel(field, params)
    assert_same_kernels(fused, plain, field, params, 3, at_once)


@torch.no_grad()
def test_only_the_slots_asked_for_are_summed():
    field = field_of((6,), "tanh")
    params = tuple(field.parameters())
    sums = []
    for used in (1, 2):
        kernel = field.own_kernel(params)
        times = normal(SLOTS, 4, seed=0)
        states, cotangents = kernel.begin_linear(times, 3)
        states.copy_(normal(SLOTS, 4, 3, seed=1))
        cotangents.copy_(normal(SLOTS, 4, 3, seed=2))
        kernel.linearize_all()
        for slot in range(used):
            kernel.pull(slot, torch.empty(4, 3, dtype=torch.float64))
        kernel.accumulate(1)
        sums.append(kernel.gradients())
    for one, other in zip(*sums, strict=True):
        close(one, other)


def test_a_kernel_that_pulled_nothing_has_no_gradient():
    field = field_of((6,), "tanh")
    kernel = field.own_kernel(tuple(field.parameters()))
    assert kernel.gradients() == (None,) * 6


def test_other_parameters_get_the_kernel_of_autograd():
    field, other = field_of((6,), "tanh"), field_of((6,), "tanh", seed=1)
    own = tuple(field.parameters())
    assert isinstance(bind(field, own), MLPKernel)
    assert isinstance(bind(field, ()), MLPKernel)
    assert isinstance(bind(field, own[:-1]), AutogradKernel)
    assert isinstance(bind(field, tuple(other.parameters())), AutogradKernel)


@pytest.mark.parametrize(
    ("activation", "gradient"),
    # The adjoint is exact up to the tolerance, which kinks do not let it meet.
    [(name, "checkpoint") for name in ACTIVATIONS]
    + [(name, "adjoint") for name in ACTIVATIONS if name != "relu"],
)
def test_gradients_of_a_solve_are_those_of_backprop(activation, gradient):
    field = field_of((6, 5), activation)
    y0 = normal(4, 3, seed=1).requires_grad_()
    t = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    params = tuple(field.parameters())
    solver, close = (1e-3, 1e-10) if gradient == "checkpoint" else (1e-9, 1e-6)

    def gradients(how, of):
        ys = solve(
            of, y0, t, params=params, rtol=solver, atol=solver, gradient=how
        ).require_success()
        return torch.autograd.grad(ys.ys.square().sum(), (y0, *params))

    wanted = gradients("backprop", lambda t, y: field(t, y))
    for ours, reference in zip(gradients(gradient, field), wanted, strict=True):
        torch.testing.assert_close(ours, reference, rtol=close, atol=close)


@each_depth
def test_every_layer_feels_time(hidden):
    field = field_of(hidden, "tanh")
    y = normal(2, 3, seed=0)
    early, late = (field(torch.full((2,), t).double(), y) for t in (0.0, 1.0))
    assert (early - late).abs().min() > 1e-6
    assert len(field.shifts) == len(hidden) + 1
    for shift in field.shifts:
        shift.data.zero_()
    assert torch.equal(*(field(torch.full((2,), t).double(), y) for t in (0.0, 1.0)))


def test_a_field_without_hidden_layers_is_linear():
    field = field_of((), "relu")
    t, y, z = torch.zeros(2).double(), normal(2, 3, seed=0), normal(2, 3, seed=1)
    zero = field(t, torch.zeros_like(y))
    close(field(t, y + z) - zero, field(t, y) + field(t, z) - 2 * zero)


@pytest.mark.parametrize("gradient", ["checkpoint", "adjoint", "backprop"])
def test_a_solve_need_not_ask_for_the_parameters(gradient):
    field = field_of((6,), "tanh")
    y0 = normal(4, 3, seed=1).requires_grad_()
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    solve(field, y0, t, gradient=gradient).ys.sum().backward()
    assert y0.grad.abs().min() > 0
    if gradient != "backprop":
        assert all(param.grad is None for param in field.parameters())


def test_a_wrong_dtype_is_told_with_the_right_one():
    field = field_of((6,), "tanh").float()
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    with pytest.raises(TypeError, match=r"parameters are torch.float32. .*to\(torch.f"):
        solve(field, normal(4, 3, seed=1), t)
