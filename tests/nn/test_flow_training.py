"""What flows are trained on: the likelihood on a watched grid, and flow matching."""

import math
from functools import partial

import pytest
import torch

from skode._engine.solve import solve
from skode._nn.flow import Flow, log_normal
from skode._nn.flow_field import Dynamics, FlowField
from skode._nn.flow_training import (
    Batch,
    FlowMatching,
    Likelihood,
    Penalties,
    Table,
    probes_of,
)
from skode._nn.integration import Integration
from tests.problems import normal

NONE = Penalties(kinetic=0.0, jacobian=0.0, error=0.0)
EXACTLY = Integration("dopri5", 1e-9, 1e-9, None, 1000, "checkpoint", False)


def flow_of(dim=2, hidden=(8, 6), context=0, scale=0.5):
    flow = Flow(FlowField(dim, hidden, "tanh", context)).double()
    for i, param in enumerate(flow.parameters()):
        param.data = scale * normal(*param.shape, seed=i)
    return flow


def likelihood_of(flow, penalties=NONE, probes=0, tolerance=0.02, compile=False):
    generator = torch.Generator().manual_seed(0)
    return Likelihood(flow, penalties, probes, tolerance, generator, compile)


def batch_of(rows, dim=2, context=0, weight=None, seed=20):
    c = normal(rows, context, seed=seed + 1) if context else None
    weight = torch.ones(rows).double() if weight is None else weight
    return Batch(normal(rows, dim, seed=seed), c, weight)


def fitted(make_loss, batch, epochs=120, dim=2):
    """Return a flow after a few steps of Adam, always from the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flow = Flow(FlowField(dim, (12, 12))).double()
    loss = make_loss(flow)
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.01)
    for _ in range(epochs):
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()
    return flow


def ring(rows, seed=0):
    """Return a batch around a circle: not normal, and not hard."""
    angle, z = normal(rows, seed=seed), normal(rows, 2, seed=seed + 1)
    circle = torch.stack([(9 * angle).cos(), (9 * angle).sin()], dim=1)
    return Batch(1.4 * circle + 0.2 * z, None, torch.ones(rows).double())


# ------------------------------------------------------------------------ batches


def table_of(copies, noise=0.0, seed=0, context=None):
    n = copies.shape[1]
    generator = torch.Generator().manual_seed(seed)
    return Table(
        copies, context, torch.arange(1.0, n + 1).double(), noise, 0.0, generator
    )


def test_a_batch_has_the_rows_asked_for_of_one_copy():
    copies, context = normal(3, 9, 2, seed=0), normal(9, 4, seed=1)
    table, rows, seen = (
        table_of(copies, context=context),
        torch.tensor([7, 0, 3]),
        set(),
    )
    assert len(table) == 9
    for _ in range(40):
        batch = table.batch(rows)
        (which,) = [k for k in range(3) if torch.equal(batch.x, copies[k, rows])]
        seen.add(which)
        assert torch.equal(batch.context, context[rows])
        assert torch.equal(batch.weight, 1.0 + rows)
    assert seen == {0, 1, 2}


def test_noise_is_added_to_batches_and_not_to_the_table():
    copies = normal(1, 4000, 2, seed=0)
    table, before = table_of(copies, noise=0.3), copies.clone()
    noise = table.batch(torch.arange(4000)).x - copies[0]
    again = table.batch(torch.arange(4000)).x - copies[0]
    assert torch.equal(copies, before)
    assert float(noise.std()) == pytest.approx(0.3, rel=0.05)
    assert torch.corrcoef(torch.stack([noise.ravel(), again.ravel()]))[0, 1] < 0.05


def test_means_are_weighted():
    weight = torch.tensor([1.0, 0.0, 3.0]).double()
    batch, values = batch_of(3, weight=weight), torch.tensor([2.0, 100.0, 6.0])
    assert float(batch.mean(values)) == 5.0


@pytest.mark.parametrize("rows", [1, 2, 3, 6, 7])
def test_some_of_a_batch_are_from_all_over(rows):
    # A batch of all rows has them in order.
    context = torch.arange(7.0)[:, None]
    batch = Batch(torch.arange(7.0)[:, None], context, torch.arange(7.0))
    some = batch.some(rows)
    assert 1 <= len(some.x) <= rows and torch.equal(some.x, some.context)
    assert torch.equal(some.x[:, 0], some.weight)
    assert rows == 1 or float(some.x.max()) >= 4


# --------------------------------------------------------------------- likelihood


@pytest.mark.parametrize("hidden", [(), (8,), (8, 6), (5, 5, 5)], ids=len)
@pytest.mark.parametrize("context", [0, 2])
def test_a_fine_grid_has_the_densities_of_an_exact_solve(hidden, context):
    flow, batch = flow_of(hidden=hidden, context=context), batch_of(6, context=context)
    wanted = flow.log_densities(batch.x, batch.context, EXACTLY)[:, 0].detach()
    likelihood = likelihood_of(flow)
    errors = [
        (likelihood.log_densities(batch.x, batch.context, n) - wanted).abs().max()
        for n in (4, 8, 100)
    ]
    assert errors[0] > 4 * errors[1] and errors[2] < 1e-5


@pytest.mark.parametrize("probes", [0, 3])
def test_the_loss_is_the_mean_negative_log_likelihood(probes):
    weight = torch.tensor([1.0, 2.0, 0.0, 4.0]).double()
    flow, batch = flow_of(scale=0.1), batch_of(4, weight=weight)
    loss = likelihood_of(flow, probes=probes, tolerance=1e-9)
    loss.steps = 32
    value = loss(batch).detach()
    wanted = -batch.mean(flow.log_densities(batch.x, None, EXACTLY)[:, 0]).detach()
    close = {"rtol": 0, "atol": 1e-5 if probes == 0 else 0.2}
    torch.testing.assert_close(value, wanted, **close)


@pytest.mark.parametrize(
    "penalties", [NONE, Penalties(0.1, 0.0, 3.0), Penalties(0.1, 0.2, 3.0)]
)
@pytest.mark.parametrize("probes", [0, 3])
@pytest.mark.parametrize("hidden", [(3,), (3, 2), (2, 2, 2)], ids=len)
def test_gradients_of_the_loss(penalties, probes, hidden):
    flow, batch = flow_of(hidden=hidden, context=1), batch_of(4, context=1)

    def loss(*_):
        return likelihood_of(flow, penalties, probes)(batch)

    inputs = tuple(flow.parameters())
    ours = torch.autograd.grad(loss(), inputs)
    step = 1e-6
    for param, slope in zip(inputs, ours, strict=True):
        along = normal(*param.shape, seed=3)
        values = []
        for sign in (1, -1):
            param.data.add_(along, alpha=sign * step)
            values.append(loss().detach())
            param.data.add_(along, alpha=-sign * step)
        difference = (values[0] - values[1]) / (2 * step)
        torch.testing.assert_close(
            (slope * along).sum(), difference, rtol=1e-6, atol=1e-7
        )


@pytest.mark.parametrize("penalties", [NONE, Penalties(0.1, 0.0, 3.0)])
@pytest.mark.parametrize("hidden", [(), (8,), (8, 6), (5, 5, 5)], ids=len)
def test_compiled_code_has_the_same_loss(penalties, hidden):
    flow, batch = flow_of(hidden=hidden, context=1), batch_of(4, context=1)
    plain, fast = (
        likelihood_of(flow, penalties, compile=compile)(batch)
        for compile in (False, True)
    )
    torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-10)
    params = tuple(flow.parameters())
    for ours, wanted in zip(
        torch.autograd.grad(fast, params),
        torch.autograd.grad(plain, params),
        strict=True,
    ):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)


def test_penalties_are_integrals_along_the_path():
    flow, batch = flow_of(), batch_of(5)
    weights = {"kinetic": 0.7, "jacobian": 0.0, "error": 0.0}
    plain, more = (
        likelihood_of(flow, penalties, tolerance=1e-9)
        for penalties in (NONE, Penalties(**weights))
    )
    plain.steps = more.steps = 32
    extra = more(batch) - plain(batch)
    times = torch.linspace(1, 0, 401).double()
    path = flow.path(batch.x, None, times.tolist(), EXACTLY)
    speed = torch.stack(
        [
            flow.field(t.expand(5), y).square().sum(dim=1)
            for t, y in zip(times, path.unbind(1), strict=True)
        ]
    )
    wanted = 0.7 * -torch.trapezoid(speed, times, dim=0).mean()
    torch.testing.assert_close(extra, wanted, rtol=1e-4, atol=0)


def test_the_jacobian_penalty_is_the_squared_norm_in_the_mean():
    flow, batch = flow_of(hidden=()), batch_of(3)
    # The Jacobian of a linear field is one matrix, everywhere.
    norm = float(flow.field.weights[0].detach().square().sum())
    loss = likelihood_of(flow, Penalties(0.0, 0.5, 0.0), tolerance=1e9)
    plain = likelihood_of(flow, tolerance=1e9)(batch).detach()
    loss.steps = 2
    values = torch.stack([loss(batch).detach() - plain for _ in range(300)])
    error = values.std() / math.sqrt(300)
    assert abs(values.mean() - 0.5 * norm) < 4 * error + 1e-2
    assert error > 0


def integral(flow, batch, **columns):
    """Return the last column of these dynamics, from t = 0 to 1, of each row."""
    dynamics = Dynamics(flow.field, **columns)
    start = dynamics.start(batch.x, None)
    ys = solve(dynamics, start, torch.tensor([1.0, 0.0]).double(), rtol=1e-6, atol=1e-6)
    return -ys.ys[:, -1, -1].detach()


def kinetic(flow, batch):
    return integral(flow, batch, energy=True).mean()


def jacobian(flow, batch):
    signs = [torch.tensor([[1.0, sign]]).double() for sign in (1, -1)]
    return sum(integral(flow, batch, tangent=v).mean() for v in signs) / 2


def error(flow, batch):
    likelihood = likelihood_of(flow)
    likelihood.steps = 3
    rough, fine = (likelihood.log_densities(batch.x, None, n) for n in (3, 30))
    return (rough - fine).abs().mean()


@pytest.mark.parametrize(
    ("measure", "penalties"),
    [
        (kinetic, Penalties(3.0, 0.0, 0.0)),
        (jacobian, Penalties(0.0, 0.1, 0.0)),
        (error, Penalties(0.0, 0.0, 100.0)),
    ],
    ids=["kinetic", "jacobian", "error"],
)
def test_penalties_lower_what_they_penalise(measure, penalties):
    batch, measures = ring(100), []
    for some in (NONE, penalties):
        # A tolerance that keeps the grid coarse: its error is the penalty's to keep.
        loss = partial(likelihood_of, penalties=some, tolerance=1e9)
        flow = fitted(loss, batch)
        measures.append(measure(flow, batch))
    assert measures[1] < 0.8 * measures[0]


def test_training_raises_the_likelihood():
    batch, held = ring(300), ring(300, seed=5)
    flow = fitted(likelihood_of, batch)
    before, after = (
        x.mean()
        for x in (log_normal(held.x), flow.log_densities(held.x, None, EXACTLY))
    )
    assert after > before + 0.2


# --------------------------------------------------------------------- the grid


def test_the_grid_gets_finer_where_its_error_asks_for_it():
    flow, batch = flow_of(scale=1.5), batch_of(20)
    loss = likelihood_of(flow, tolerance=0.01)
    for _ in range(40):
        loss.watch(batch)
    fine = loss.steps
    exact = flow.log_densities(batch.x, None, EXACTLY)[:, 0]
    off = (loss.log_densities(batch.x, None) - exact).abs().mean()
    assert fine > 4 and off < 0.02
    for param in flow.parameters():
        param.data.mul_(0.05)
    for _ in range(40):
        loss.watch(batch)
    assert 1 <= loss.steps < fine


def test_the_grid_has_an_end_even_where_densities_are_not_finite():
    flow, batch = flow_of(hidden=(2,)), batch_of(1)
    flow.field.weights[0].data.fill_(math.nan)
    loss = likelihood_of(flow)
    for _ in range(40):
        loss.watch(batch)
    assert loss.steps == 32


def test_the_loss_watches_its_grid_from_time_to_time():
    flow, batch = flow_of(scale=1.5), batch_of(50)
    loss = likelihood_of(flow, tolerance=1e9)
    steps = []
    for _ in range(25):
        loss(batch)
        steps.append(loss.steps)
    assert steps == [2] * 20 + [1] * 5


def test_the_first_look_at_the_grid_makes_it_fine_enough():
    flow, batch = flow_of(scale=1.5), batch_of(50)
    loss = likelihood_of(flow, tolerance=1e-3)
    loss(batch)
    assert loss.steps > 4
    assert not loss.watch(batch)


def test_inner_knots_move_and_stay_in_order():
    loss = likelihood_of(flow_of())
    loss.steps, draws = 5, []
    for _ in range(100):
        knots = torch.tensor(loss._moved_knots())
        assert knots[0] == 1 and knots[-1] == 0 and (knots.diff() < 0).all()
        draws.append(knots)
    spread = torch.stack(draws).std(dim=0)
    assert (spread[1:-1] > 0.02).all()


def test_watching_does_not_change_the_probes_of_the_loss_it_compares():
    flow, batch = flow_of(dim=4, scale=0.01), batch_of(8, dim=4)
    # With one probe, other draws would be off by more than any grid.
    loss = likelihood_of(flow, probes=1, tolerance=1e-3)
    for _ in range(10):
        loss.watch(batch)
    assert loss.steps < 3


# ------------------------------------------------------------------ flow matching


def test_flow_matching_is_least_at_the_mean_velocity():
    # From N(0, 1) to N(m, s^2), the mean velocity is affine in y at every time.
    batch = Batch(
        0.5 * normal(20_000, 1, seed=0) + 2, None, torch.ones(20_000).double()
    )

    class Affine(torch.nn.Module):
        def __init__(self, shift):
            super().__init__()
            self.shift = shift

        def forward(self, t, y):
            variance = (1 - t) ** 2 + (0.5 * t) ** 2
            slope = (0.25 * t - (1 - t)) / variance
            return self.shift + 2 + (slope * (y[:, 0] - 2 * t))[:, None]

    losses = []
    for shift in (0.0, 0.2, -0.2):
        flow = Flow(FlowField(1, ()))
        flow.field = Affine(shift)
        generator = torch.Generator().manual_seed(0)
        losses.append(float(FlowMatching(flow, generator)(batch)))
    assert losses[1] == pytest.approx(losses[0] + 0.04, abs=0.01)
    assert losses[2] == pytest.approx(losses[0] + 0.04, abs=0.01)


def test_flow_matching_is_weighted():
    flow, rows = flow_of(context=1), 4
    weight = torch.tensor([1.0, 0.0, 2.0, 1.0]).double()
    batch = batch_of(rows, context=1, weight=weight)
    changed = Batch(batch.x.clone(), batch.context, weight)
    changed.x[1] = 100.0
    values = [
        FlowMatching(flow, torch.Generator().manual_seed(0))(some)
        for some in (batch, changed)
    ]
    assert torch.equal(*values)


def test_flow_matching_carries_the_base_to_the_data():
    batch = ring(400)

    def matching(flow):
        return FlowMatching(flow, torch.Generator().manual_seed(0))

    flow = fitted(matching, batch, epochs=400)
    with torch.no_grad():
        drawn = flow.to_data(normal(2000, 2, seed=3), None, EXACTLY)
    assert float(drawn.norm(dim=1).mean()) == pytest.approx(1.4, abs=0.15)
    assert float(drawn.norm(dim=1).std()) < 0.45


def test_probes_are_those_of_a_seed():
    like = torch.empty(0)
    assert torch.equal(probes_of(5, 3, 1, like), probes_of(5, 3, 1, like))
    assert not torch.equal(probes_of(5, 3, 1, like), probes_of(5, 3, 2, like))
