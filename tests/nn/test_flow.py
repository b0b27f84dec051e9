"""`Flow`: its densities against closed forms and integrals, and the way there and back.

Flows are random ones: nothing here depends on how they are trained.
"""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from skode._nn.fields import ACTIVATIONS
from skode._nn.flow import Flow, log_normal
from skode._nn.flow_field import FlowField
from skode._nn.flow_training import probes_of
from skode._nn.integration import Integration
from tests.problems import normal


def flow_of(dim=2, hidden=(8, 6), activation="tanh", context=0, scale=0.5):
    flow = Flow(FlowField(dim, hidden, activation, context)).double()
    for i, param in enumerate(flow.parameters()):
        param.data = scale * normal(*param.shape, seed=i)
    return flow


def solved(tolerance=1e-8, method="dopri5", **changes):
    how = {
        "step_size": None,
        "max_steps": 1000,
        "gradient": "checkpoint",
        "compile": False,
        **changes,
    }
    return Integration(method=method, rtol=tolerance, atol=tolerance, **how)


# -------------------------------------------------------------------- densities


def test_the_base_is_a_standard_normal():
    z = normal(6, 3, seed=0)
    wanted = MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double())
    torch.testing.assert_close(log_normal(z), wanted.log_prob(z))


@pytest.mark.parametrize("hidden", [(), (8,), (8, 6), (5, 5, 5)], ids=len)
def test_a_field_at_rest_leaves_the_base(hidden):
    flow, x = Flow(FlowField(3, hidden)).double(), normal(6, 3, seed=0)
    densities = flow.log_densities(x, None, solved())
    torch.testing.assert_close(densities[:, 0], log_normal(x))


def test_a_linear_flow_is_a_gaussian():
    flow, x = flow_of(dim=3, hidden=()), normal(20, 3, seed=9)
    field = flow.field
    # (y, t, 1) moves by one matrix.
    joint = torch.zeros(5, 5).double()
    joint[:3, :3], joint[:3, 3] = field.weights[0].data, field.shifts[0].data
    joint[:3, 4], joint[3, 4] = field.biases[0].data, 1.0
    moved = torch.matrix_exp(joint)
    mean, root = moved[:3, 4], moved[:3, :3]
    wanted = MultivariateNormal(mean, root @ root.T).log_prob(x)
    ours = flow.log_densities(x, None, solved(1e-11))[:, 0]
    torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        flow.to_data(x, None, solved(1e-11)), x @ root.T + mean, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("hidden", [(), (8,), (8, 6), (5, 5, 5)], ids=len)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_density_is_that_of_the_change_of_variables(hidden, activation):
    flow, x = flow_of(hidden=hidden, activation=activation), normal(5, 2, seed=9)
    # Kinks let the error of a derivative fall with the root of the tolerance alone.
    how = solved(1e-10, gradient="backprop", max_steps=10_000)
    jac = torch.autograd.functional.jacobian(
        lambda x: flow.to_base(x, None, how).sum(dim=0), x
    ).transpose(0, 1)
    wanted = log_normal(flow.to_base(x, None, how)) + torch.linalg.slogdet(jac)[1]
    ours = flow.log_densities(x, None, how)[:, 0]
    close = 1e-3 if activation == "relu" else 1e-7
    torch.testing.assert_close(ours, wanted, rtol=close, atol=close)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@torch.no_grad()
def test_two_columns_integrate_to_one(activation):
    flow = flow_of(activation=activation)
    edge = torch.linspace(-12, 12, 161).double()
    points = torch.cartesian_prod(edge, edge)
    total = flow.log_densities(points, None, solved(1e-5)).exp().sum()
    assert float(total * (edge[1] - edge[0]) ** 2) == pytest.approx(1, abs=1e-3)


@torch.no_grad()
def test_eight_columns_integrate_to_one():
    flow = flow_of(dim=8, hidden=(16, 16), scale=0.25)
    drawn = flow.to_data(normal(2000, 8, seed=50), None, solved(1e-4))
    near = MultivariateNormal(drawn.mean(dim=0), 1.5 * drawn.T.cov())
    points = near.mean + normal(8000, 8, seed=51) @ near.scale_tril.T
    ours = flow.log_densities(points, None, solved(1e-4))[:, 0]
    ratio = (ours - near.log_prob(points)).exp()
    error = ratio.std() / math.sqrt(len(ratio))
    assert error < 0.05
    assert abs(ratio.mean() - 1) < 4 * error


@torch.no_grad()
def test_each_context_has_a_density_of_its_own():
    flow = flow_of(context=2)
    edge = torch.linspace(-12, 12, 121).double()
    points, densities = torch.cartesian_prod(edge, edge), []
    for context in ([0.0, 0.0], [1.0, -2.0]):
        given = torch.tensor(context, dtype=torch.float64).expand(len(points), -1)
        densities.append(flow.log_densities(points, given, solved(1e-5)).exp())
        total = densities[-1].sum() * (edge[1] - edge[0]) ** 2
        assert float(total) == pytest.approx(1, abs=1e-3)
    # Far apart in total variation.
    assert (densities[0] - densities[1]).abs().sum() > 0.2 * densities[0].sum()


# ------------------------------------------------------------------ there and back


@pytest.mark.parametrize("context", [0, 2])
@torch.no_grad()
def test_there_and_back_in_single_precision(context):
    flow, x = flow_of(dim=3, context=context).float(), normal(200, 3, seed=9).float()
    c = normal(200, context, seed=10).float() if context else None
    how = solved(1e-6)
    back = flow.to_data(flow.to_base(x, c, how), c, how)
    assert (back - x).abs().max() < 1e-5
    forth = flow.to_base(flow.to_data(x, c, how), c, how)
    assert (forth - x).abs().max() < 1e-5


@torch.no_grad()
def test_a_path_leads_from_the_data_to_the_base():
    flow, x = flow_of(), normal(7, 2, seed=9)
    path = flow.path(x, None, [1.0, 0.7, 0.2, 0.0], solved(1e-10))
    assert path.shape == (7, 4, 2) and torch.equal(path[:, 0], x)
    torch.testing.assert_close(path[:, -1], flow.to_base(x, None, solved(1e-10)))
    onward = flow.path(path[:, 1], None, [0.7, 0.2], solved(1e-10))[:, 1]
    torch.testing.assert_close(onward, path[:, 2], rtol=1e-7, atol=1e-7)


# ------------------------------------------------------------------------- rows


@pytest.mark.parametrize("hidden", [(), (8,), (8, 6), (5, 5, 5)], ids=len)
@torch.no_grad()
def test_rows_do_not_know_their_neighbours(hidden):
    flow, x = flow_of(hidden=hidden), 3 * normal(30, 2, seed=9)
    how, order = (
        solved(1e-3),
        torch.randperm(30, generator=torch.Generator().manual_seed(0)),
    )
    wanted = flow.log_densities(x, None, how)
    others = {
        "permuted": flow.log_densities(x[order], None, how)[order.argsort()],
        "split": torch.cat(
            [flow.log_densities(part, None, how) for part in x.split(7)]
        ),
        "single": torch.cat([flow.log_densities(row[None], None, how) for row in x]),
    }
    for ours in others.values():
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_evaluations_are_those_of_each_row():
    flow = flow_of(scale=1.0)
    x = torch.cat([normal(4, 2, seed=9), 8 * normal(4, 2, seed=10)])
    counts = flow.evaluations(x, None, solved(1e-4))
    alone = [flow.evaluations(row[None], None, solved(1e-4)) for row in x]
    assert counts.shape == (8,) and len(set(counts.tolist())) > 1
    assert torch.equal(counts, torch.cat(alone))
    assert (flow.evaluations(x, None, solved(1e-7)) > counts).all()


# -------------------------------------------------------------------- gradients


@pytest.mark.parametrize("hidden", [(), (3,), (3, 2), (2, 2, 2)], ids=len)
@pytest.mark.parametrize("context", [0, 1])
def test_gradients_of_densities(hidden, context):
    flow = flow_of(hidden=hidden, context=context)
    x, c = normal(3, 2, seed=9).requires_grad_(), None
    if context:
        c = normal(3, context, seed=10).requires_grad_()
    # Fixed steps: an adaptive mesh moves with its inputs, within the tolerance.
    how = solved(method="rk4", step_size=0.25)

    def densities(x, c, *_):
        return flow.log_densities(x, c, how)

    inputs = (x, c, *flow.parameters())
    assert torch.autograd.gradcheck(densities, inputs, eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("gradient", ["checkpoint", "adjoint", "backprop"])
def test_gradients_of_adaptive_densities(gradient):
    flow, x = flow_of(), normal(3, 2, seed=9).requires_grad_()
    wanted = flow.log_densities(x, None, solved(1e-11, gradient="backprop")).sum()
    ours = flow.log_densities(x, None, solved(1e-9, gradient=gradient)).sum()
    inputs = (x, *flow.parameters())
    pairs = zip(
        torch.autograd.grad(ours, inputs),
        torch.autograd.grad(wanted, inputs),
        strict=True,
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------ traces


def test_auto_is_exact_where_that_is_cheap():
    assert Flow(FlowField(500, (2, 2))).exact("auto")
    assert Flow(FlowField(64, (2, 2, 2))).exact("auto")
    deep_and_wide = Flow(FlowField(65, (2, 2, 2)))
    assert not deep_and_wide.exact("auto") and deep_and_wide.exact("exact")
    assert not Flow(FlowField(1, ())).exact("hutchinson")


@pytest.mark.parametrize("hidden", [(), (8,), (8, 6), (5, 5, 5)], ids=len)
@torch.no_grad()
def test_many_probes_come_to_the_exact_density(hidden):
    flow, x = flow_of(dim=4, hidden=hidden), normal(6, 4, seed=9)
    exact = flow.log_densities(x, None, solved(1e-6))
    estimates = flow.log_densities(x, None, solved(1e-6), probes_of(4000, 4, 0, x))
    assert estimates.shape == (6, 4000)
    error = estimates.std(dim=1) / math.sqrt(4000)
    assert ((estimates.mean(dim=1) - exact[:, 0]).abs() < 5 * error + 1e-5).all()


@torch.no_grad()
def test_the_spread_of_probes_is_the_error_of_their_mean():
    flow, x = flow_of(dim=4), normal(1, 4, seed=9)
    exact, how, off = flow.log_densities(x, None, solved(1e-4)), solved(1e-4), []
    for seed in range(200):
        few = flow.log_densities(x, None, how, probes_of(8, 4, seed, x))[0]
        off.append(float((few.mean() - exact) / (few.std() / math.sqrt(8))))
    inside = torch.tensor(off).abs() < 1.9  # Student's, of 7 degrees of freedom: 90 %
    assert 0.8 < inside.double().mean() < 0.97
