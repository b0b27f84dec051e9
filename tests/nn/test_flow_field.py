"""`FlowField`, its augmented dynamics, and the kernel that is their fused twin."""

import pytest
import torch

from skode._engine.kernel import AutogradKernel, bind
from skode._engine.solve import solve
from skode._nn.fields import ACTIVATIONS
from skode._nn.flow_field import Dynamics, FlowField, FlowKernel
from tests.problems import normal
from tests.twins import assert_same_kernels, close

DIM = 3
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
each_depth = pytest.mark.parametrize("hidden", [(6,), (6, 5)], ids=len)
each_context = pytest.mark.parametrize("context", [0, 2])
each_energy = pytest.mark.parametrize("energy", [False, True], ids=["", "energy"])


def field_of(hidden, activation="tanh", context=0, seed=0):
    """Return a field no layer of which is zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        field = FlowField(DIM, hidden, activation, context).double()
        for param in field.parameters():
            param.data.normal_(0, 0.6)
    return field


def inputs(rows, context, seed=0):
    """Return times (rows,), states (rows, DIM), and contexts or None."""
    times, y = normal(rows, seed=seed), normal(rows, DIM, seed=seed + 1)
    return times, y, normal(rows, context, seed=seed + 2) if context else None


def jacobian(field, t, y, context):
    """Return df/dy by autograd, (rows, DIM, DIM)."""

    def f(t, y, c):
        return field(t[None], torch.cat([y, c])[None])[0]

    c = y.new_empty(len(y), 0) if context is None else context
    return torch.vmap(torch.func.jacrev(f, argnums=1))(t, y, c).detach()


# ------------------------------------------------------------------ the field


@pytest.mark.parametrize("hidden", [(), (6,), (6, 5)], ids=len)
def test_it_starts_at_the_identity(hidden):
    x = normal(5, DIM + 1, seed=0).float()
    assert not FlowField(DIM, hidden, "tanh", 1)(torch.ones(5), x).any()


@each_activation
def test_slopes_are_the_derivatives_of_the_activation(activation):
    field = field_of((6,), activation)
    t, y, _ = inputs(4, 0)
    field.weights[-1].data = torch.eye(DIM, 6, dtype=torch.float64)
    hidden = torch.nn.functional.linear(y, field.weights[0], field.biases[0])
    hidden = (hidden + t[:, None] * field.shifts[0]).detach().requires_grad_()
    plain = {"tanh": torch.tanh, "relu": torch.relu}.get(activation)
    value = (plain or getattr(torch.nn.functional, activation))(hidden)
    f, (slope,) = field.layers(t, y)
    close(f, value[:, :DIM] + field.biases[1] + t[:, None] * field.shifts[1])
    close(slope, torch.autograd.grad(value.sum(), hidden)[0])


@pytest.mark.parametrize("hidden", [(), (6,), (6, 5), (4, 4, 4)], ids=len)
def test_every_layer_feels_time(hidden):
    x = normal(2, DIM, seed=0)
    times = [torch.full((2,), t, dtype=torch.float64) for t in (0.0, 1.0)]
    for layer in range(len(hidden) + 1):
        field = field_of(hidden)
        for i, shift in enumerate(field.shifts):
            shift.data.mul_(i == layer)
        assert (field(times[0], x) - field(times[1], x)).abs().max() > 1e-3
        field.shifts[layer].data.zero_()
        assert torch.equal(field(times[0], x), field(times[1], x))


# --------------------------------------------------------------- the dynamics


@each_activation
@pytest.mark.parametrize("hidden", [(), (6,), (6, 5), (4, 5, 4)], ids=len)
@each_context
def test_the_trace_is_that_of_the_jacobian_by_autograd(activation, hidden, context):
    field = field_of(hidden, activation, context)
    t, y, c = inputs(7, context)
    dynamics = Dynamics(field, energy=True)
    f, traces, (energy,) = dynamics.split(dynamics(t, dynamics.start(y, c)))
    close(traces[:, 0], jacobian(field, t, y, c).diagonal(dim1=1, dim2=2).sum(dim=1))
    x = y if c is None else torch.cat([y, c], dim=1)
    close(f, field(t, x))
    close(energy, f.square().sum(dim=1))


@pytest.mark.parametrize("hidden", [(), (6,), (6, 5), (4, 5, 4)], ids=len)
@each_context
def test_probes_and_tangent_go_through_the_jacobian(hidden, context):
    field = field_of(hidden, "tanh", context)
    t, y, c = inputs(7, context)
    probes, tangent = normal(4, DIM, seed=8).sign(), normal(1, DIM, seed=9).sign()
    dynamics = Dynamics(field, True, probes, tangent)
    _, traces, extra = dynamics.split(dynamics(t, dynamics.start(y, c)))
    jac = jacobian(field, t, y, c)
    close(traces, torch.einsum("pi,aij,pj->ap", probes, jac, probes))
    close(extra[1], (jac @ tangent[0]).square().sum(dim=1))


@each_context
def test_start_and_split_are_there_and_back(context):
    _, y, c = inputs(4, context)
    dynamics = Dynamics(field_of((6,), "tanh", context), True, normal(5, DIM, seed=3))
    state = dynamics.start(y, c)
    back, traces, extra = dynamics.split(state)
    assert torch.equal(back, y) and traces.shape == (4, 5) and len(extra) == 1
    assert not traces.any() and not extra[0].any()
    if c is not None:
        assert torch.equal(state[:, DIM : DIM + context], c)


def test_the_context_stands_still():
    field = field_of((6, 5), "tanh", 2)
    _, y, c = inputs(4, 2)
    dynamics = Dynamics(field, energy=True)
    times = torch.tensor([1.0, 0.3, 0.0], dtype=torch.float64)
    ys = solve(dynamics, dynamics.start(y, c), times, params=dynamics.params).ys
    assert torch.equal(ys[:, :, DIM : DIM + 2], c[:, None].expand(-1, 3, -1))


# ----------------------------------------------------------------- the kernel


@each_activation
@each_depth
@each_context
@each_energy
@pytest.mark.parametrize("at_once", [False, True], ids=["each", "all"])
@torch.no_grad()
def test_the_kernel_agrees_with_autograd(activation, hidden, context, energy, at_once):
    dynamics = Dynamics(field_of(hidden, activation, context), energy)
    params, width = dynamics.params, DIM + context + 1 + energy
    fused, plain = dynamics.own_kernel(params), AutogradKernel(dynamics, params)
    assert isinstance(fused, FlowKernel)
    assert_same_kernels(fused, plain, dynamics, params, width, at_once)
    assert fused.gradients() == (None,) * len(params)


@each_activation
@each_depth
@each_context
@each_energy
def test_gradients_of_a_solve_are_those_of_autograd(
    activation, hidden, context, energy
):
    dynamics = Dynamics(field_of(hidden, activation, context), energy)
    _, y, c = inputs(5, context)
    start = dynamics.start(y, c)
    weights = normal(start.shape[1], seed=7)

    def gradients(field):
        s0 = start.clone().requires_grad_()
        t = torch.tensor([1.0, 0.4, 0.0], dtype=torch.float64, requires_grad=True)
        solution = solve(
            field,
            s0,
            t,
            params=dynamics.params,
            method="bosh3",
            rtol=1e-3,
            atol=1e-3,
            gradient="checkpoint",
        ).require_success()
        loss = ((solution.ys - s0[:, None]) * weights).tanh().sum()
        return loss, *torch.autograd.grad(loss, (s0, t, *dynamics.params))

    wanted = gradients(lambda t, s: dynamics(t, s))
    for ours, reference in zip(gradients(dynamics), wanted, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("hidden", [(), (4, 4, 4)], ids=len)
def test_depths_without_a_closed_form_of_two_products_go_to_autograd(hidden):
    dynamics = Dynamics(field_of(hidden))
    assert dynamics.own_kernel(dynamics.params) is None


def test_what_the_kernel_does_not_know_goes_to_autograd():
    field, other = field_of((6,)), field_of((6,), seed=1)
    own, signs = tuple(field.parameters()), torch.ones(1, DIM, dtype=torch.float64)
    assert isinstance(bind(Dynamics(field), own), FlowKernel)
    assert isinstance(bind(Dynamics(field), ()), FlowKernel)
    assert isinstance(bind(Dynamics(field), own[:-1]), AutogradKernel)
    assert isinstance(bind(Dynamics(field), tuple(other.parameters())), AutogradKernel)
    assert Dynamics(field, probes=signs).own_kernel(own) is None
    assert Dynamics(field, tangent=signs).own_kernel(own) is None


def test_another_dtype_is_told_with_a_remedy():
    dynamics = Dynamics(field_of((6,)))
    start = dynamics.start(torch.ones(2, DIM), None)
    with pytest.raises(TypeError, match=r"field\.to\(torch\.float32\)"):
        solve(dynamics, start, torch.tensor([1.0, 0.0]), params=dynamics.params)
