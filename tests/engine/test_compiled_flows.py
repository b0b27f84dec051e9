"""Compiled solves of flows against their twin in PyTorch. B rows, T times, D state."""

import pytest
import torch

from skode._engine.layers import Layers, Quadratures
from skode._engine.solution import Status
from skode._engine.solve import solve
from skode._engine.tableau import TABLEAUX
from skode._nn.divergence import trace_weights
from skode._nn.fields import ACTIVATIONS
from skode._nn.flow_field import Dynamics, FlowField, Transport
from tests.problems import normal
from tests.twins import (
    assert_same,
    assert_threads_change_nothing,
    both,
    needs_compiler,
    params_of,
    ragged,
    solved,
    weighted,
)

pytestmark = needs_compiler


def make_flow(
    dim=3,
    hidden=(7, 9),
    activation="tanh",
    *,
    context=0,
    energy=False,
    scale=1.0,
    dtype=torch.float64,
):
    torch.manual_seed(0)
    field = FlowField(dim, hidden, activation, context).double()
    with torch.no_grad():
        for param in field.parameters():
            fan_in = param.shape[-1] if param.ndim > 1 else 1
            param.copy_(scale * torch.randn_like(param) / fan_in**0.5)
    return Dynamics(field.to(dtype), energy)


def starts(flow, rows, seed=1, dtype=torch.float64):
    """Return states (B, .) whose quadratures have begun before."""
    known = flow.field.dim + flow.field.context
    return normal(rows, known + flow.traces + flow.energy, seed=seed, dtype=dtype)


UNIT = torch.linspace(0, 1, 4, dtype=torch.float64)


@pytest.mark.parametrize("count", [2, 6])
@pytest.mark.parametrize("method", TABLEAUX)
def test_it_agrees_with_its_twin_by_every_method(method, count):
    flow = make_flow(energy=True, context=2)
    tol = 1e-4 if method in ("adaptive_heun", "bosh3") else 1e-7
    y0, t = starts(flow, 37), ragged(37, count)
    assert_same(both(flow, y0, t, weighted, method=method, rtol=tol, atol=tol), 1e-9)


@pytest.mark.parametrize("energy", [False, True])
@pytest.mark.parametrize("hidden", [(), (1,), (16,), (33, 5), (8, 12)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_agrees_for_every_activation_and_depth(activation, hidden, energy):
    flow = make_flow(5, hidden, activation, energy=energy)
    # The trace of a relu field jumps: no error estimate is the same twice.
    how = {"method": "rk4"} if activation == "relu" else {"rtol": 1e-7, "atol": 1e-7}
    assert_same(both(flow, starts(flow, 20), UNIT, weighted, **how), 1e-9)


@pytest.mark.parametrize("context", [0, 1, 4])
@pytest.mark.parametrize("dim", [1, 2, 7, 8, 9, 17])
def test_it_agrees_for_widths_that_fill_no_register(dim, context):
    flow = make_flow(dim, (dim + 1, 2 * dim + 1), energy=True, context=context)
    assert_same(both(flow, starts(flow, dim), UNIT, weighted))


@pytest.mark.parametrize("hidden", [(32,), (32, 32)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_single_precision_agrees_up_to_its_rounding(activation, hidden):
    single = torch.float32
    flow = make_flow(8, hidden, activation, energy=True, dtype=single)
    y0, t = starts(flow, 100, dtype=single), UNIT.to(single)
    pairs = both(flow, y0, t, weighted, method="rk4", step_size=0.05)
    (twin, grads), (fast, fast_grads) = pairs
    torch.testing.assert_close(fast.ys, twin.ys, rtol=1e-4, atol=1e-4)
    for one, other in zip(fast_grads, grads, strict=True):
        scale = float(other.abs().max())
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("activation", ["tanh", "softplus", "silu"])
def test_its_density_is_as_exact_in_single_precision_as_the_tolerance(activation):
    how = {"rtol": 1e-5, "atol": 1e-5}
    double = make_flow(2, (64, 64), activation)
    single = make_flow(2, (64, 64), activation, dtype=torch.float32)
    y0, t = starts(double, 300), UNIT[[0, -1]]
    with torch.no_grad():
        exact = solved(double, y0, t, compile=True, rtol=1e-10, atol=1e-10).y1
        error = solved(double, y0, t, compile=True, **how).y1 - exact
        found = solved(single, y0.float(), t.float(), compile=True, **how)
    assert (found.stats.status == Status.SUCCESS).all()
    assert (found.y1 - exact).abs().max() < 1.5 * error.abs().max() + 1e-5


@pytest.mark.parametrize("hidden", [(), (3,), (3, 4)])
@pytest.mark.parametrize("activation", ["tanh", "softplus", "silu"])
def test_its_gradients_are_those_of_finite_differences(activation, hidden):
    flow = make_flow(2, hidden, activation, energy=True, context=1)
    t = torch.tensor([0.0, 0.13, 0.37], dtype=torch.float64)

    def run(y0, t, *_):
        return solved(flow, y0, t, compile=True, method="rk4").ys

    inputs = [x.clone().requires_grad_() for x in (starts(flow, 3), t)]
    assert torch.autograd.gradcheck(
        run, (*inputs, *params_of(flow)), eps=1e-4, atol=1e-5
    )


def test_the_context_stands_still():
    flow = make_flow(context=2, energy=True)
    y0 = starts(flow, 9)
    ys = solved(flow, y0, UNIT, compile=True).ys
    assert torch.equal(ys[:, :, 3:5], y0[:, None, 3:5].expand(-1, 4, -1))


@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("hidden", [(), (5,), (7, 9), (4, 5, 6)])
def test_points_are_carried_without_a_density(hidden, context):
    flow = make_flow(hidden=hidden, context=context)
    transport, y0 = Transport(flow.field), normal(20, 3 + context, seed=1)
    pairs = both(transport, y0, ragged(20, 4), weighted, rtol=1e-8, atol=1e-8)
    assert_same(pairs, 1e-9)
    beside = flow.start(y0[:, :3], y0[:, 3:])
    how = {"compile": "auto", "rtol": 1e-9, "atol": 1e-9}
    ys, alone = (
        solved(flow, beside, UNIT, **how).ys,
        solved(transport, y0, UNIT, **how).ys,
    )
    torch.testing.assert_close(alone, ys[..., : 3 + context], rtol=1e-7, atol=1e-7)


def test_quadratures_do_not_feed_back_but_are_in_the_norm_of_the_error():
    flow = make_flow(energy=True, scale=2.0)
    y0 = starts(flow, 9)
    later = y0.clone()
    later[:, 3:] += 1.0
    one, other = (
        solved(flow, s, UNIT, compile=True, method="rk4").ys for s in (y0, later)
    )
    assert torch.equal(one[..., :3], other[..., :3])
    torch.testing.assert_close(one[..., 3:] + 1, other[..., 3:])
    far = y0.clone()
    far[:, 3:] = 1e3  # a loose tolerance for them
    tight, loose = (
        solved(flow, s, UNIT, compile=True, rtol=1e-9, atol=1e-9) for s in (y0, far)
    )
    assert (tight.stats.n_accepted > loose.stats.n_accepted).any()


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_a_row_does_not_depend_on_its_neighbours(method):
    single = torch.float32
    flow = make_flow(scale=2.0, energy=True, context=1, dtype=single)
    y0, t = starts(flow, 100, dtype=single), ragged(100, 4, single)
    together = solved(flow, y0, t, compile=True, method=method)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))[:41]
    apart = solved(flow, y0[order], t[order], compile=True, method=method)
    assert torch.equal(apart.ys, together.ys[order])
    assert torch.equal(apart.stats.nfe, together.stats.nfe[order])


def test_threads_change_no_state_and_no_gradient():
    flow = make_flow(8, (64, 64), energy=True)
    t = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    assert_threads_change_nothing(flow, starts(flow, 700), t)


@pytest.mark.parametrize("hidden", [(4,), (4, 5)])
def test_failures_are_those_of_its_twin(hidden):
    flow = make_flow(1, hidden, scale=6.0)
    y0 = torch.tensor([[-1.0, 0], [1.0, 0], [torch.nan, 0], [0.1, torch.nan]]).double()
    t = torch.tensor([0.0, 0.03, 1.0], dtype=torch.float64).repeat(4, 1)
    t[0] = 0.5

    def sound(ys):
        return torch.where(torch.isfinite(ys), ys, 0.0).sum()

    for how in ({"max_steps": 3}, {"method": "rk4", "max_steps": 5}):
        pairs = both(flow, y0, t, sound, **how)
        assert_same(pairs, 1e-8)
        failed = pairs[1][0].stats.status != Status.SUCCESS
        assert failed.tolist() == [False, True, True, True]


def test_second_derivatives_are_those_of_autograd():
    flow, t = make_flow(energy=True), ragged(5, 3)
    found = []
    for how in ({"compile": True}, {"compile": False, "gradient": "backprop"}):
        y0 = starts(flow, 5).requires_grad_()
        ys = solved(flow, y0, t, **how).ys
        wanted = (y0, *params_of(flow))
        grads = torch.autograd.grad(weighted(ys), wanted, create_graph=True)
        square = sum(grad.square().sum() for grad in grads)
        found.append(torch.autograd.grad(square, wanted))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_backward_again_after_retaining_the_graph():
    flow = make_flow(energy=True)
    y0, wanted = starts(flow, 20), params_of(flow)
    loss = weighted(solved(flow, y0, ragged(20, 3), compile=True).ys)
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    second = torch.autograd.grad(loss, wanted)
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, wanted)


def test_no_gradient_of_parameters_that_are_gone():
    # Theirs is made of the weights beside those of the solve.
    flow = make_flow()
    loss = weighted(solved(flow, starts(flow, 5), ragged(5, 2), compile=True).ys)
    with torch.no_grad():
        flow.field.weights[0].mul_(2.0)
    with pytest.raises(RuntimeError, match="inplace operation"):
        torch.autograd.grad(loss, params_of(flow))


def test_parameters_that_were_not_named_get_no_gradient():
    flow = make_flow()
    y0 = starts(flow, 5).requires_grad_()
    for compile in (False, True):
        ys = solve(flow, y0, ragged(5, 2), compile=compile).ys
        grads = torch.autograd.grad(ys.sum(), (y0, *params_of(flow)), allow_unused=True)
        assert [grad is None for grad in grads] == [False] + [True] * 9


def test_a_forward_solve_serves_the_adjoint_too():
    flow, t = make_flow(), torch.tensor([0.0, 1.0], dtype=torch.float64)
    how = {"gradient": "adjoint", "rtol": 1e-9, "atol": 1e-9}
    assert_same(both(flow, starts(flow, 5), t, weighted, **how), 1e-6)


def test_what_has_no_closed_form_is_solved_in_pytorch():
    deep, probed = make_flow(hidden=(4, 4, 4)), make_flow()
    probed = Dynamics(probed.field, probes=normal(2, 3, seed=2))
    for flow in (deep, probed):
        y0 = starts(flow, 3)
        assert flow.own_layers(()) is None
        auto, plain = (solved(flow, y0, UNIT, compile=c).ys for c in ("auto", False))
        assert torch.equal(auto, plain)


@pytest.mark.parametrize("columns", [3, 5])
def test_a_state_without_room_for_the_quadratures_never_reaches_compiled_code(columns):
    flow = make_flow()
    with pytest.raises(ValueError, match="do not fit the state"):
        solved(flow, normal(3, columns, seed=1), UNIT, compile=True)


@pytest.mark.parametrize("hidden", [(), (4,), (4, 5)])
def test_the_trace_fits_its_layers(hidden):
    field = make_flow(3, hidden).field
    parts = map(tuple, (field.weights, field.biases, field.shifts))
    trace = trace_weights(tuple(field.weights))
    layers = Layers(*parts, field.activation, Quadratures(trace, False))
    state = normal(2, 4, seed=1)
    assert layers.fits(state)
    wrong = Quadratures(trace.new_zeros(6, 6), False)
    assert not Layers(
        layers.weights, layers.biases, layers.shifts, field.activation, wrong
    ).fits(state)
