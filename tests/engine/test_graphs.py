"""Attempts that need no host: on a CPU made one by one, on a GPU recorded.

B rows, T times, D state.
"""

import pytest
import torch

from skode._engine.graphs import GraphProgram, recorded
from skode._engine.plan import Plan
from skode._engine.solution import Status, Tolerance
from skode._engine.solve import solve
from skode._engine.tableau import TABLEAUX
from skode._nn.fields import MLPField
from tests.problems import CUBIC, normal, perceptron

ADAPTIVE = [name for name, tableau in TABLEAUX.items() if tableau.adaptive]
SPANS = [0.0, 0.02, 3.0, 0.3, -0.7, 1.0, 0.05, -2.0, 0.0, 0.5, 4.0, 0.1]


def batch(dtype=torch.float64):
    ends = torch.tensor(SPANS, dtype=dtype)[:, None]
    starts = torch.linspace(-0.5, 0.5, len(SPANS), dtype=dtype)[:, None]
    times = starts + ends * torch.tensor([0.0, 0.13, 0.5, 0.5, 1.0], dtype=dtype)
    times[3, 3:] = times[3, 2:3]  # padded
    return normal(len(SPANS), 3, seed=3, dtype=dtype), times


def plan_of(field, method="dopri5", tol=1e-3, max_steps=1000, params=()):
    tolerance = Tolerance(tol, tol, None, max_steps)
    return Plan(field, TABLEAUX[method], tolerance, tuple(params))


def assert_same(ours, wanted, tol=1e-9):
    ys, stats = ours[:2]
    torch.testing.assert_close(ys, wanted[0], rtol=tol, atol=tol, equal_nan=True)
    for name in ("status", "n_accepted", "n_rejected", "nfe"):
        assert torch.equal(getattr(stats, name), getattr(wanted[1], name)), name
    torch.testing.assert_close(stats.t, wanted[1].t, rtol=tol, atol=tol)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_attempts_without_the_host_are_those_of_the_loop(method):
    plan = plan_of(perceptron(scale=3.0), method)
    y0, times = batch()
    with torch.no_grad():
        wanted = plan.forward(y0, times)
        assert_same(GraphProgram(plan).forward(y0, times), wanted)
        assert_same(GraphProgram(plan).record(y0, times), wanted)
    assert wanted[1].n_rejected.sum() > 0


def test_a_closed_solution():
    plan = plan_of(CUBIC.field, tol=1e-9)
    times = CUBIC.times(7)
    ys, _ = GraphProgram(plan).forward(CUBIC.y0(), times)
    assert CUBIC.error(ys) < 1e-7


@pytest.mark.parametrize("field", ["autograd", "MLPField"])
@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_gradients_are_those_of_checkpoint(field, method):
    if field == "autograd":
        rhs = perceptron(scale=3.0)
        params = tuple(param.requires_grad_() for param in rhs.params)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            rhs = MLPField(3, (8,)).double()
        params = tuple(rhs.parameters())
    plan = plan_of(rhs, method, params=params)
    y0, times = batch()
    y0.requires_grad_(), times.requires_grad_()
    settings = {"method": method, "rtol": 1e-3, "atol": 1e-3}
    ys = solve(rhs, y0, times, params=params, gradient="checkpoint", **settings).ys
    weights = normal(*ys.shape, seed=4)
    # Times that repeat an end are added above the program.
    weights[:, 2] = weights[:, 3] = 0.0
    weights[[0, 3, 8]] = 0.0
    wanted = torch.autograd.grad((ys * weights).sum(), (y0, times, *params))
    program = GraphProgram(plan)
    with torch.no_grad():
        _, _, chunks = program.record(y0.detach(), times.detach())
        grad_y0, grad_times, grads = program.pull(times.detach(), chunks, weights, True)
    assert len(chunks) > 1
    for x, y in zip((grad_y0, grad_times, *grads), wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [1000, 6, 2])
def test_rows_that_fail_fail_alike(steps):
    def field(t, y):
        return torch.where(y > 1, y**2, -y) + torch.where(t > 0.7, torch.nan, 0.0)[
            :, None
        ] * (y < -5)

    y0 = torch.tensor([[2.0, 0.5], [0.5, -0.3], [-9.0, 0.1], [torch.nan, 1.0]])
    times = torch.tensor([0.0, 0.2, 3.0]).expand(4, -1)
    plan = plan_of(field, max_steps=steps)
    with torch.no_grad():
        wanted = plan.forward(y0, times)
        ours = GraphProgram(plan).forward(y0, times)
    assert_same(ours, wanted, tol=1e-4)
    assert len(set(wanted[1].status.tolist())) > 1
    assert (wanted[1].status == Status.MAX_STEPS).any() == (steps < 1000)


def test_on_a_cpu_nothing_is_recorded():
    def attempt():
        raise AssertionError("made, rather than recorded")

    assert recorded(attempt, torch.device("cpu")) is attempt


def test_the_tape_holds_every_accepted_step_once():
    y0, times = batch()
    with torch.no_grad():
        program = GraphProgram(plan_of(perceptron()))
        _, stats, chunks = program.record(y0, times)
    assert torch.equal(sum(chunk.used for chunk in chunks), stats.n_accepted.int())
    # Attempts made one by one fill one slot each, and keep no memory for more.
    assert all(len(chunk.y) == 1 for chunk in chunks)


@pytest.mark.gpu
@pytest.mark.parametrize("gradient", [False, True])
def test_a_recorded_solve_is_that_of_a_cpu(gradient):
    ends = []
    for device in ("cuda", "cpu"):
        field = perceptron(scale=4.0)
        params = tuple(param.to(device) for param in field.params)
        field = type(field)(*params)
        y0, times = (x.to(device) for x in batch())
        settings = {"rtol": 1e-6, "atol": 1e-6}
        if gradient:
            y0.requires_grad_(), times.requires_grad_()
            for param in params:
                param.requires_grad_()
            settings["params"] = params
        solution = solve(field, y0, times, compile="auto", **settings)
        assert solution.stats.n_accepted.max() > 8
        found = [solution.ys.detach()]
        if gradient:
            found += torch.autograd.grad(solution.ys.sum(), (y0, times, *params))
        ends.append([x.cpu() for x in found])
    for x, y in zip(*ends, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
def test_a_field_that_asks_the_host_is_not_recorded():
    def field(t, y):
        return -y * (1.0 if float(t.max()) < 1e9 else 0.0)

    y0 = torch.ones(3, 2, device="cuda", dtype=torch.float64)
    times = torch.tensor([0.0, 9.0], device="cuda", dtype=torch.float64)
    with pytest.warns(UserWarning, match="cannot be recorded"):
        ys = solve(field, y0, times, rtol=1e-8, atol=1e-8, compile=True).ys
    torch.testing.assert_close(ys[:, 1], y0 * torch.exp(-times[1]), rtol=1e-5, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [[7, 2, 11, 0, 9, 4, 1, 3, 10, 5, 8, 6], [10]])
@pytest.mark.parametrize("field", ["perceptron", "MLPField"])
def test_company_does_not_change_a_row_on_a_gpu(rows, field):
    dtype = torch.float64 if field == "perceptron" else torch.float32
    if field == "perceptron":
        rhs = perceptron(scale=3.0)
        rhs = type(rhs)(*(param.cuda() for param in rhs.params))
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            rhs = MLPField(3, (8,)).cuda()
    y0, times = (x.cuda() for x in batch(dtype))
    settings = {"rtol": 1e-2, "atol": 1e-2, "compile": True}
    whole = solve(rhs, y0, times, **settings).ys
    part = solve(rhs, y0[rows], times[rows], **settings).ys
    bound = 1e-11 if dtype == torch.float64 else 5e-5
    torch.testing.assert_close(part, whole[rows], rtol=0, atol=bound)
