"""Gradients: against finite differences, each other, and closed forms."""

import pytest
import torch

from skode._engine.solve import FIXED_STEP, solve
from skode._engine.tableau import TABLEAUX, coefficients
from tests.problems import Linear, Perceptron, linear, normal, perceptron

GRADIENTS = ["checkpoint", "adjoint", "reversible", "backprop"]
ADAPTIVE = [name for name in TABLEAUX if name not in FIXED_STEP]

SHARED = torch.tensor([0.0, 0.13, 0.37], dtype=torch.float64)
PER_ROW = torch.tensor([[0.0, 0.13, 0.37], [0.5, 0.4, 0.21]], dtype=torch.float64)
# Ragged: padded behind, padded in front, backwards, two times, nothing at all.
RAGGED = torch.tensor(
    [
        [0.0, 0.3, 0.31, 0.7, 1.0],
        [0.0, 0.6, 0.62, 1.4, 2.0],
        [1.0, 0.7, 0.31, 0.3, 0.0],
        [0.0, 0.3, 0.31, 0.31, 0.31],
        [0.2, 0.2, 0.25, 0.9, 0.9],
        [0.5, 0.5, 0.5, 0.5, 0.5],
    ],
    dtype=torch.float64,
)


def grads_of(solution, weights, *wanted):
    return torch.autograd.grad((solution.ys * weights).sum(), wanted, allow_unused=True)


@pytest.mark.parametrize("times", [SHARED, PER_ROW], ids=["shared", "per row"])
@pytest.mark.parametrize("method", ["rk4", "dopri5", "tsit5"])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_are_those_of_finite_differences(gradient, method, times):
    field, y0 = perceptron(dim=2, width=2), normal(2, 2, seed=1)

    def solved(y0, times, *params):
        return solve(
            Perceptron(*params),
            y0,
            times,
            params=params,
            method=method,
            rtol=1e-10,
            atol=1e-10,
            step_size=0.045,
            gradient=gradient,
        ).ys

    inputs = [x.clone().requires_grad_() for x in (y0, times, *field.params)]
    # The mesh of an adaptive method moves with its inputs, within the tolerance: a
    # difference over less than the square root of that would see the mesh. The
    # continuous adjoint differentiates the exact solution.
    atol = 1e-5 if method == "rk4" else 1e-6
    assert torch.autograd.gradcheck(solved, inputs, eps=1e-4, atol=atol, rtol=1e-6)


@pytest.mark.parametrize("method", ["rk4", "dopri5", "tsit5", "dopri8"])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_are_those_of_the_closed_form(gradient, method):
    weights = normal(*RAGGED.shape, 2, seed=2)
    y0 = normal(len(RAGGED), 2, seed=1)

    matrix = linear().matrix.requires_grad_()
    wanted = [y0.clone().requires_grad_(), matrix, RAGGED.clone().requires_grad_()]
    exact = Linear(matrix).exact(wanted[0], wanted[2])
    wanted_grads = torch.autograd.grad((exact * weights).sum(), wanted)

    matrix = linear().matrix.requires_grad_()
    given = [y0.clone().requires_grad_(), matrix, RAGGED.clone().requires_grad_()]
    solution = solve(
        Linear(matrix),
        given[0],
        given[2],
        params=(matrix,),
        method=method,
        rtol=1e-10,
        atol=1e-10,
        step_size=0.02,
        gradient=gradient,
    ).require_success()
    torch.testing.assert_close(solution.ys, exact, rtol=0, atol=3e-8)
    for grad, wanted_grad in zip(
        grads_of(solution, weights, *given), wanted_grads, strict=True
    ):
        torch.testing.assert_close(grad, wanted_grad, rtol=0, atol=3e-7)


def replay(gradient, method, times, dtype=torch.float64, tolerance=1e-3, scale=10.0):
    """Return the solution and gradients of a field that refuses some steps."""
    field = perceptron(scale=scale, dtype=dtype)
    y0 = normal(len(RAGGED), 3, seed=1, dtype=dtype).requires_grad_()
    times = times.to(dtype).clone().requires_grad_()
    params = [param.requires_grad_() for param in field.params]
    solution = solve(
        field,
        y0,
        times,
        params=params,
        method=method,
        rtol=tolerance,
        atol=tolerance,
        step_size=0.09,
        gradient=gradient,
    ).require_success()
    weights = normal(*solution.ys.shape, seed=2, dtype=dtype)
    return solution, grads_of(solution, weights, y0, times, *params)


CASES = {
    "ragged": RAGGED,
    "shared": RAGGED[1],
    "ends": RAGGED[:, [0, -1]],
    "backwards": RAGGED[1].flip(0),
}


@pytest.fixture(params=["small", "large"])
def size(request, monkeypatch):
    """Treat a few rows as the few they are, or as if they were thousands."""
    if request.param == "large":
        monkeypatch.setattr("skode._engine.step._WORTH_COMPACTING", 0)
        monkeypatch.setattr("skode._engine.tape._WORTH_GATHERING", 0)
        monkeypatch.setattr("skode._engine.tape._MOST_AT_ONCE", 0)


@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("key", CASES)
@pytest.mark.parametrize("method", TABLEAUX)
def test_checkpoint_is_backprop_to_rounding(method, key):
    ours, our_grads = replay("checkpoint", method, CASES[key])
    plain, plain_grads = replay("backprop", method, CASES[key])
    torch.testing.assert_close(ours.ys, plain.ys, rtol=0, atol=1e-10)
    for ours_, plain_ in zip(our_grads, plain_grads, strict=True):
        assert plain_.abs().max() > 1e-3
        scale = float(plain_.abs().max())
        torch.testing.assert_close(ours_, plain_, rtol=0, atol=1e-8 * scale)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_the_field_of_these_tests_refuses_steps(method):
    solution, _ = replay("checkpoint", method, RAGGED)
    assert solution.stats.n_rejected.any()
    assert len(set(solution.stats.n_accepted.tolist())) > 3


@pytest.mark.parametrize("method", TABLEAUX)
def test_checkpoint_is_backprop_in_single_precision(method):
    _, ours = replay("checkpoint", method, RAGGED, torch.float32)
    _, plain = replay("backprop", method, RAGGED, torch.float32)
    for ours_, plain_ in zip(ours, plain, strict=True):
        assert ours_.dtype == torch.float32
        scale = float(plain_.abs().max())
        torch.testing.assert_close(ours_, plain_, rtol=0, atol=2e-4 * scale)


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "dopri8", "bosh3"])
def test_the_adjoint_tends_to_the_gradient_of_the_steps(method):
    tolerance = 1e-8 if method == "bosh3" else 1e-10
    _, exact = replay("checkpoint", method, RAGGED, tolerance=tolerance, scale=4.0)
    _, adjoint = replay("adjoint", method, RAGGED, tolerance=tolerance, scale=4.0)
    for exact_, adjoint_ in zip(exact, adjoint, strict=True):
        scale = float(exact_.abs().max())
        torch.testing.assert_close(
            adjoint_, exact_, rtol=0, atol=2e3 * tolerance * scale
        )


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_gradient_scales_with_the_loss(gradient):
    """However small the loss: the tolerances of the adjoint are relative to it."""
    field, y0 = perceptron(), normal(3, 3, seed=1).requires_grad_()
    grads = []
    for factor in (1.0, 1e-9):
        ys = solve(field, y0, SHARED, gradient=gradient).ys
        grads.append(torch.autograd.grad(factor * ys.sum(), y0)[0] / factor)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-7, atol=0)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_only_what_wants_a_gradient_gets_one(gradient, method):
    settings = {"method": method, "step_size": 0.1, "gradient": gradient}
    weights = normal(2, 3, 3, seed=2)
    everything = None
    for wanted in ({0, 1, 2}, {0}, {1}, {2}, {0, 2}, set()):
        field = perceptron()
        inputs = [normal(2, 3, seed=1), SHARED.clone(), field.weight]
        for i in wanted:
            inputs[i].requires_grad_()
        solution = solve(field, inputs[0], SHARED, params=field.params, **settings)
        solution = solve(field, inputs[0], inputs[1], params=field.params, **settings)
        assert solution.ys.requires_grad == bool(wanted)
        if not wanted:
            continue
        (solution.ys * weights).sum().backward()
        if everything is None:
            everything = [x.grad for x in inputs]
        for i, x in enumerate(inputs):
            if i in wanted:
                torch.testing.assert_close(x.grad, everything[i])
            else:
                assert x.grad is None


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_solve_can_be_part_of_a_longer_graph(gradient):
    """Two solves, one after the other, are one over both spans."""
    field, y0 = perceptron(), normal(2, 3, seed=1)
    params = [param.requires_grad_() for param in field.params]
    settings = {"params": params, "rtol": 1e-9, "atol": 1e-9, "gradient": gradient}
    first = torch.tensor([0.0, 0.5], dtype=torch.float64)
    middle = solve(field, torch.sin(y0), first, **settings).y1
    twice = solve(field, middle, first + 0.5, **settings).y1
    once = solve(field, torch.sin(y0), 2 * first, **settings).y1
    torch.testing.assert_close(twice, once, rtol=0, atol=1e-7)
    for two, one in zip(
        torch.autograd.grad(twice.square().sum(), params),
        torch.autograd.grad(once.square().sum(), params),
        strict=True,
    ):
        torch.testing.assert_close(two, one, rtol=0, atol=1e-6)


@pytest.mark.parametrize("gradient", ["auto", *GRADIENTS])
@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_no_graph_without_grad(method, gradient):
    settings = {"method": method, "step_size": 0.1, "gradient": gradient}
    field, y0 = perceptron(), normal(2, 3, seed=1)
    assert not solve(field, y0, SHARED, **settings).ys.requires_grad
    y0.requires_grad_()
    for param in field.params:
        param.requires_grad_()
    with torch.no_grad():
        ys = solve(field, y0, SHARED, params=field.params, **settings).ys
    assert not ys.requires_grad
    assert solve(field, y0, SHARED, params=field.params, **settings).ys.requires_grad


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_statistics_have_no_gradient(gradient):
    y0 = normal(2, 3, seed=1).requires_grad_()
    stats = solve(perceptron(), y0, SHARED, gradient=gradient).stats
    for name in ("status", "t", "n_accepted", "n_rejected", "nfe"):
        assert not getattr(stats, name).requires_grad


@pytest.mark.parametrize("gradient", ["adjoint", "reversible"])
def test_second_derivatives_are_refused(gradient):
    """Even of a loss whose own derivative is constant: a penalty would lose a term."""
    y0 = normal(2, 3, seed=1).requires_grad_()
    ys = solve(perceptron(), y0, SHARED, gradient=gradient).ys
    with pytest.raises(RuntimeError, match=r"no second derivative.*'checkpoint'"):
        torch.autograd.grad(ys.sum(), y0, create_graph=True)


def test_second_derivatives_of_checkpoint_are_those_of_backprop():
    field, times = perceptron(), SHARED.clone().requires_grad_()
    y0 = normal(2, 3, seed=1).requires_grad_()
    inputs = (y0, times, *(param.requires_grad_() for param in field.params))
    second = []
    for gradient in ("checkpoint", "backprop"):
        solution = solve(field, y0, times, params=field.params, gradient=gradient)
        loss = solution.ys.square().sum()
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        penalty = sum(part.square().sum() for part in first)
        second.append(torch.autograd.grad(penalty, inputs))
    for one, other in zip(*second, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("gradient", ["checkpoint", "adjoint", "reversible"])
def test_a_graph_can_be_walked_again(gradient):
    y0 = normal(2, 3, seed=1).requires_grad_()
    field = perceptron()
    params = [param.requires_grad_() for param in field.params]
    loss = solve(field, y0, SHARED, params=params, gradient=gradient).ys.square().sum()
    first = torch.autograd.grad(loss, (y0, *params), retain_graph=True)
    second = torch.autograd.grad(loss, (y0, *params))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("gradient", ["checkpoint", "adjoint", "reversible"])
def test_times_changed_in_place_are_noticed(gradient):
    y0 = normal(2, 3, seed=1).requires_grad_()
    t = SHARED.clone()
    ys = solve(perceptron(), y0, t, gradient=gradient).ys
    t.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ys.sum().backward()


def test_the_steps_are_freed_by_the_backward_pass():
    y0 = normal(64, 3, seed=1).requires_grad_()
    ys = solve(perceptron(), y0, SHARED).ys
    node = ys.grad_fn
    assert len(node.saved_tensors) > 8
    ys.sum().backward()
    with pytest.raises(RuntimeError, match="freed"):
        _ = node.saved_tensors
    assert set(vars(node)) <= {"plan", "steps", "needs_input_grad"}


def test_a_solve_in_inference_mode_leaves_later_ones_differentiable():
    coefficients.cache_clear()
    y0 = normal(2, 3, seed=1)
    with torch.inference_mode():
        solve(perceptron(), y0, SHARED)
    y0.requires_grad_()
    solve(perceptron(), y0, SHARED, gradient="backprop").ys.sum().backward()
    assert y0.grad is not None


class Root:
    """y' = -a sqrt(y), which is not a number where a step overshoots 0."""

    def __init__(self):
        self.a = torch.ones((), dtype=torch.float64, requires_grad=True)

    def __call__(self, t, y):
        return self.a * torch.sqrt(y)


def test_the_adjoint_survives_a_refused_step_that_left_the_domain():
    grads = []
    # At this tolerance "reversible", whose solution is another, differs by 3e-3.
    for gradient in ("checkpoint", "adjoint", "backprop"):
        field, y0 = Root(), torch.tensor([[1e-4]], dtype=torch.float64)
        t = torch.tensor([0.0, 10.0], dtype=torch.float64)
        settings = {"rtol": 1e-2, "atol": 1e-2, "gradient": gradient}
        ys = solve(field, y0, t, params=[field.a], **settings).require_success().ys
        grads.append(torch.autograd.grad(ys.sum(), field.a)[0].item())
    assert grads == pytest.approx([grads[0]] * 3, rel=1e-3)
