"""Marches on a grid in compiled code against their twin. B rows, D state."""

import pytest
import torch

from skode._engine import build, compiled_march
from skode._engine.compiled_march import CompiledMarch
from skode._engine.grid import Grid
from skode._engine.tableau import TABLEAUX
from skode._nn.fields import ACTIVATIONS
from skode._nn.flow_field import Dynamics, FlowField
from tests.problems import normal
from tests.twins import needs_compiler, params_of

pytestmark = needs_compiler

KNOTS = (1.0, 0.7, 0.45, 0.0)
ADAPTIVE = [name for name, tableau in TABLEAUX.items() if tableau.adaptive]


def make_flow(hidden=(7, 9), activation="tanh", *, dim=3, context=0, energy=False):
    torch.manual_seed(0)
    field = FlowField(dim, hidden, activation, context).double()
    with torch.no_grad():
        for param in field.parameters():
            fan_in = param.shape[-1] if param.ndim > 1 else 1
            param.copy_(torch.randn_like(param) / fan_in**0.5)
    return Dynamics(field, energy)


def start(flow, rows, dtype=torch.float64):
    known = flow.field.dim + flow.field.context
    return normal(rows, known + flow.traces + flow.energy, seed=1, dtype=dtype)


def marched(field, y, knots=KNOTS, *, compile, controlled=4, method="bosh3"):
    grid = Grid(field, params_of(field), controlled, method, compile=compile)
    return grid.march(y, knots)


def assert_same(field, y, rtol=1e-10, **how):
    found = []
    for compile in (False, True):
        y = y.detach().clone().requires_grad_()
        y1, error = marched(field, y, compile=compile, **how)
        weights = torch.linspace(-1, 2, y1.numel(), dtype=y.dtype).view_as(y1)
        loss = (y1.square() * weights).sum() + (error * weights[:, 0]).sum()
        grads = torch.autograd.grad(loss, (y, *params_of(field)))
        found.append((y1.detach(), error.detach(), *grads))
    for twin, fast in zip(*found, strict=True):
        atol = rtol * float(twin.abs().max() + 1e-12)
        torch.testing.assert_close(fast, twin, rtol=rtol, atol=atol)


def assert_compiled(field, y):
    march = CompiledMarch.of(field, (), TABLEAUX["bosh3"], KNOTS, 1, y)
    assert isinstance(march, CompiledMarch)


@pytest.mark.parametrize("energy", [False, True])
@pytest.mark.parametrize("hidden", [(), (1,), (16,), (33, 5), (8, 12)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_agrees_for_every_activation_and_depth(activation, hidden, energy):
    flow = make_flow(hidden, activation, energy=energy, context=1)
    assert_compiled(flow, start(flow, 20))
    assert_same(flow, start(flow, 20))


@pytest.mark.parametrize("method", ADAPTIVE)
def test_it_agrees_by_every_method(method):
    flow = make_flow(energy=True)
    assert_same(flow, start(flow, 37), method=method)


@pytest.mark.parametrize("rows", [1, 7, 16, 17, 100])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_it_agrees_for_any_number_of_rows_and_steps(rows, steps):
    flow = make_flow()
    knots = torch.linspace(0, 1, steps + 1, dtype=torch.float64).tolist()
    assert_same(flow, start(flow, rows), knots=knots)


@pytest.mark.parametrize("controlled", [1, 3, 5])
def test_the_error_is_that_of_the_first_columns(controlled):
    flow = make_flow(energy=True)
    assert_same(flow, start(flow, 9), controlled=controlled)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_single_precision_agrees_up_to_its_rounding(activation):
    flow = make_flow((32, 32), activation, energy=True)
    flow = Dynamics(flow.field.float(), energy=True)
    assert_same(flow, start(flow, 100, torch.float32), rtol=2e-4)


@pytest.mark.parametrize("hidden", [(3,), (3, 4)])
def test_its_gradients_are_those_of_finite_differences(hidden):
    flow = make_flow(hidden, dim=2, energy=True)

    def run(y, *_):
        return marched(flow, y, compile=True)

    inputs = (start(flow, 3).requires_grad_(), *params_of(flow))
    assert torch.autograd.gradcheck(run, inputs, eps=1e-5, atol=1e-6)


def test_without_a_gradient_it_keeps_nothing_and_is_the_same():
    flow = make_flow()
    with torch.no_grad():
        plain = marched(flow, start(flow, 20), compile=True)
    traced = marched(flow, start(flow, 20), compile=True)
    assert not plain[0].requires_grad and traced[0].requires_grad
    assert all(map(torch.equal, plain, traced))


def test_threads_change_no_state_and_no_gradient():
    flow, before, found = make_flow((64, 64)), torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            y = start(flow, 700).requires_grad_()
            y1, error = marched(flow, y, compile=True)
            grads = torch.autograd.grad(
                y1.square().sum() + error.sum(), (y, *params_of(flow))
            )
            found.append((y1, error, *grads))
    finally:
        torch.set_num_threads(before)
    one, three = found
    assert all(map(torch.equal, one[:3], three[:3]))
    for x, y in zip(one[3:], three[3:], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-9)


def test_a_march_in_parts_is_the_same(monkeypatch):
    # Control returns to Python after every few rows, as it does once in a while.
    flow, found = make_flow(energy=True), []
    for at_once in (compiled_march._AT_ONCE, 1):
        monkeypatch.setattr(compiled_march, "_AT_ONCE", at_once)
        y = start(flow, 70).requires_grad_()
        y1, error = marched(flow, y, compile=True)
        grads = torch.autograd.grad(
            y1.square().sum() + error.sum(), (y, *params_of(flow))
        )
        found.append((y1, error, *grads))
    whole, parts = found
    assert all(map(torch.equal, whole[:3], parts[:3]))
    for x, y in zip(whole[3:], parts[3:], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-9)


def test_no_gradient_of_parameters_that_are_gone():
    flow = make_flow()
    y1, _ = marched(flow, start(flow, 5), compile=True)
    with torch.no_grad():
        flow.field.biases[0].mul_(2.0)
    with pytest.raises(RuntimeError, match="inplace operation"):
        torch.autograd.grad(y1.sum(), params_of(flow))


def test_a_grid_follows_the_parameters_between_marches():
    flow, y = make_flow(), start(make_flow(), 5)
    grid = Grid(flow, params_of(flow), 3, compile=True)
    before, _ = grid.march(y, KNOTS)
    with torch.no_grad():
        flow.field.weights[1].mul_(2.0)
    after, _ = grid.march(y, KNOTS)
    wanted, _ = marched(flow, y, compile=False)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, wanted)


def test_where_there_is_no_compiled_code_the_twin_marches(monkeypatch):
    flow = make_flow()
    y = start(flow, 5)
    deep = make_flow((4, 4, 4))
    probed = Dynamics(flow.field, probes=normal(1, 3, seed=2))
    for field in (deep, probed):
        found = [marched(field, y, compile=compile)[0] for compile in (False, True)]
        assert torch.equal(*found)
    build._outcome.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    try:
        found = [marched(flow, y, compile=compile)[0] for compile in (False, True)]
    finally:
        build._outcome.cache_clear()
    assert torch.equal(*found)
