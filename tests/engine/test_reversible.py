"""The reversible scheme: against its plain twin, its base method, and SciPy."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from skode._engine.kernel import AutogradKernel
from skode._engine.pair_loop import march_pair
from skode._engine.plan import Plan
from skode._engine.reversible import walk
from skode._engine.solution import Status, Tolerance
from skode._engine.solve import FIXED_STEP, solve
from skode._engine.tableau import TABLEAUX, coefficients
from skode._nn.fields import MLPField
from skode.exceptions import SolverError
from tests.problems import CUBIC, DECAY, normal, perceptron, scipy_reference

ADAPTIVE = [name for name in TABLEAUX if name not in FIXED_STEP]
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
TIMES = {
    "ragged": RAGGED,
    "shared": RAGGED[1],
    "ends": RAGGED[:, [0, -1]],
    "backwards": RAGGED[1].flip(0),
}


def increment(tableau, field, t, h, y):
    """Return Psi_h(t, y), (1, D), and its stages."""
    k = []
    for node, row in zip(tableau.c, tableau.a, strict=True):
        state = y + h * sum(a * x for a, x in zip(row, k, strict=True)) if k else y
        k.append(field((t + node * h).to(y.dtype)[None], state))
    return h * sum(b * x for b, x in zip(tableau.b, k, strict=True)), k


def steps_of(plan, y0, times):
    """Return, row by row, what was left of the span before each step, and the step."""
    with torch.no_grad():
        _, walked = walk(plan, y0.detach(), times.detach())
    steps = [[] for _ in y0]
    for stride in walked.trail.backwards():
        rows = torch.arange(len(y0)) if stride.rows is None else stride.rows
        for place, row in enumerate(rows.tolist()):
            if stride.h[place] != 0:
                steps[row].insert(0, (stride.left[place], stride.share[place]))
    return steps


def twin(plan, y0, times):
    """Solve row by row, under autograd, by the equations as they are printed."""
    steps = steps_of(plan, y0, times)
    return torch.stack([twin_row(plan, *row) for row in zip(y0, times, steps)])  # noqa: B905


def twin_row(plan, start, row, steps):
    """Return the states (T, D) of one row."""
    tableau, field = plan.tableau, plan.field
    y = z = start[None]
    t0, t1 = row[0], row[-1]
    inside = {}
    for left, share in steps:
        h, t = share * (t1 - t0), t1 - left * (t1 - t0)
        damped = math.exp(-12 * float(share))
        there, k = increment(tableau, field, t, h, z)
        y1 = damped * y + (1 - damped) * z + there
        back, m = increment(tableau, field, t + h, -h, y1)
        for i in range(len(row)):
            theta = (row[i] - t) / h
            if 0 < theta < 1 and t0 != row[i] != t1:
                moved = -(1 - damped) * theta * (y - z)
                for slope, weights in zip([*k, m[0]], tableau.dense, strict=True):
                    powers = enumerate(weights, start=1)
                    moved = moved + h * slope * sum(c * theta**p for p, c in powers)
                inside[i] = y + moved
        y, z = y1, z - back
    arrived = t0 == t1 or (steps and steps[-1][0] - steps[-1][1] < 1e-14)
    lost = torch.full_like(y, torch.nan)
    ends = {t0.item(): start[None], t1.item(): y if arrived else lost}
    states = []
    for i in range(len(row)):
        at = ends.get(row[i].item(), inside.get(i, lost))
        anchor = len(row) - 1 if t0 != t1 and row[i] == t1 else 0
        if i != anchor and row[i] == row[anchor]:
            # A time that repeats an end has the slope there for a gradient.
            slope = field(row[anchor].detach()[None], at.detach()).detach()
            at = at + slope * (row[i] - row[anchor])
        states.append(at)
    return torch.cat(states)


def make_plan(method, params, field, tolerance=1e-3, step_size=0.09, max_steps=1000):
    return Plan(
        field,
        TABLEAUX[method],
        Tolerance(tolerance, tolerance, step_size, max_steps),
        tuple(params),
    )


def both(method, times, field, params, y0, **settings):
    """Return states and gradients by the engine, and by the twin."""
    plan = make_plan(method, params, field, **settings)
    results = []
    for solver in (lambda y, t: by_the_door(plan, y, t).ys, lambda *x: twin(plan, *x)):
        y, t = y0.clone(), times.expand(len(y0), -1).clone()
        y.requires_grad_(), t.requires_grad_()
        ys = solver(y, t)
        weights = normal(*ys.shape, seed=2, dtype=ys.dtype)
        good = ys[:, -1].isfinite().all(dim=1)
        assert good.double().mean() > 0.6
        loss = (ys * weights)[good].sum()
        results.append((ys.detach(), *torch.autograd.grad(loss, (y, t, *params))))
    return results


def by_the_door(plan, y0, times):
    return solve(
        plan.field,
        y0,
        times,
        params=plan.params,
        method=plan.tableau.name,
        rtol=plan.tolerance.rtol,
        atol=plan.tolerance.atol,
        step_size=plan.tolerance.step_size,
        max_steps=plan.tolerance.max_steps,
        gradient="reversible",
    )


def assert_same(ours, plain, bound):
    for got, wanted in zip(ours, plain, strict=True):
        scale = float(torch.nan_to_num(wanted).abs().max())
        assert scale > 1e-3
        torch.testing.assert_close(
            got, wanted, rtol=0, atol=bound * scale, equal_nan=True
        )


@pytest.fixture(params=["small", "large"])
def size(request, monkeypatch):
    """Treat a few rows as the few they are, or as if they were thousands."""
    if request.param == "large":
        monkeypatch.setattr("skode._engine.step._WORTH_COMPACTING", 0)
        monkeypatch.setattr("skode._engine.reversible._WORTH_GATHERING", 0)
        monkeypatch.setattr("skode._engine.trail._CHUNK", 3)


@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("key", TIMES)
@pytest.mark.parametrize("method", TABLEAUX)
def test_the_gradient_is_that_of_the_plain_twin(method, key):
    field = perceptron(scale=3.0)
    params = [param.requires_grad_() for param in field.params]
    y0 = normal(len(RAGGED), 3, seed=1)
    assert_same(*both(method, TIMES[key], field, params, y0), bound=1e-9)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_a_field_with_a_kernel_of_its_own(method):
    torch.manual_seed(0)
    field = MLPField(3, (8, 5), "silu").double()
    y0 = normal(len(RAGGED), 3, seed=1)
    ours, plain = both(method, RAGGED, field, list(field.parameters()), y0)
    assert_same(ours, plain, bound=1e-9)


def blow_up_or_decay(t, y):
    """Rows that start above 1 blow up before t = 1; those below do not."""
    return torch.where(y > 1, y**2, -y)


LOST = {  # how the second of three rows fails
    "pole": (blow_up_or_decay, [0.5, 2.0, -0.3], {"tolerance": 1e-2}),
    "steps": (
        lambda t, y: torch.cos(t * y[:, 0].abs())[:, None] * y,
        [0.5, 40.0, 0.3],
        {"max_steps": 12, "step_size": 0.3},
    ),
    "start": (lambda t, y: -y, [0.5, torch.inf, 0.3], {}),
}


@pytest.mark.parametrize("key", LOST)
@pytest.mark.parametrize("method", TABLEAUX)
def test_rows_that_fail_have_no_way_back(method, key):
    """Nor any part in their neighbours' gradient."""
    field, start, settings = LOST[key]
    plan = make_plan(method, (), field, **{"step_size": 0.05, **settings})
    y0 = torch.tensor(start, dtype=torch.float64)[:, None].repeat(1, 2)
    times = torch.tensor([0.0, 0.1, 1.0], dtype=torch.float64).repeat(3, 1)
    times[1, -1] = 10.0
    times[[0, 2], -1] = 0.2
    grads = []
    for rows in ([0, 1, 2], [0, 2]):
        y, t = y0[rows].requires_grad_(), times[rows].requires_grad_()
        solution = by_the_door(plan, y, t)
        good = solution.stats.status == Status.SUCCESS
        assert good.tolist() == [row != 1 for row in rows]
        loss = solution.ys[good].sum()
        grads.append(torch.autograd.grad(loss, (y, t), retain_graph=True))
    assert (grads[0][0][1] == 0).all() and (grads[0][1][1] == 0).all()
    for together, alone in zip(*grads, strict=True):
        torch.testing.assert_close(together[[0, 2]], alone, rtol=1e-12, atol=1e-12)
    solution = by_the_door(plan, y0.requires_grad_(), times)
    with pytest.raises(RuntimeError, match=r"rows \[1\].*gradient='checkpoint'"):
        solution.ys.sum().backward()


def test_rounding_does_not_grow_with_the_steps():
    """With the constant lambda of 0.99 it would, to 0.99^-3000 = 1e13."""
    field, y0 = perceptron(), normal(1, 3, seed=1)
    params = [param.requires_grad_() for param in field.params]
    settings = {"step_size": 1 / 3000, "max_steps": 3000}
    ours, plain = both("midpoint", RAGGED[:1, [0, -1]], field, params, y0, **settings)
    assert_same(ours, plain, bound=1e-9)


def test_single_precision():
    grads = []
    for dtype in (torch.float32, torch.float64):
        field = perceptron(dtype=dtype)
        params = [param.requires_grad_() for param in field.params]
        y0 = normal(6, 3, seed=1, dtype=dtype).requires_grad_()
        t = RAGGED.to(dtype).clone().requires_grad_()
        plan = make_plan("rk4", params, field, step_size=0.01)
        ys = by_the_door(plan, y0, t).require_success().ys
        loss = (ys * normal(*ys.shape, seed=2, dtype=dtype)).sum()
        grads.append(torch.autograd.grad(loss, (y0, t, *params)))
    for single, double in zip(*grads, strict=True):
        assert single.dtype == torch.float32
        scale = float(double.abs().max())
        torch.testing.assert_close(single.double(), double, rtol=0, atol=2e-3 * scale)


# -------------------------------------------------------------------- the scheme


# Asymptotic, and far enough from rounding.
STEPS = {1: (64, 128, 256), 2: (16, 32, 64), 3: (16, 32, 64), 4: (32, 64, 128)}
STEPS |= {5: (24, 32, 48, 64), 8: (3, 4, 6)}


@pytest.mark.parametrize("method", TABLEAUX)
@pytest.mark.parametrize("problem", [DECAY, CUBIC], ids=lambda problem: problem.name)
def test_error_falls_with_the_order_of_the_method(method, problem):
    """Of both states, at even steps, adaptive methods too."""
    tableau = TABLEAUX[method]
    y0, ends = problem.y0(), problem.times()
    coef = coefficients(tableau, y0.dtype, y0.dtype, y0.device)
    errors = []
    for n in STEPS[tableau.order]:
        step_size = (problem.span[1] - problem.span[0]) / n
        walked = march_pair(
            AutogradKernel(problem.field, ()),
            coef,
            y0,
            ends[:, 0],
            ends[:, -1],
            Tolerance(1e-3, 1e-6, step_size, 10_000),
            None,
        )
        assert walked.stats.n_accepted.tolist() == [n] * len(y0)
        errors.append(
            [problem.error(torch.stack((y0, y), dim=1)) for y in (walked.y, walked.z)]
        )
    assert np.min(errors) > 1e-14, "rounding, not the method"
    for found in np.transpose(errors):
        slope = np.polyfit(np.log(1 / np.array(STEPS[tableau.order])), np.log(found), 1)
        assert slope[0] > tableau.order - 0.6


@pytest.mark.parametrize("method", ["bosh3", "dopri5", "tsit5", "dopri8"])
def test_it_agrees_with_scipy(method):
    field, y0 = perceptron(), normal(len(RAGGED), 3, seed=1)
    tolerance = 1e-7 if method == "bosh3" else 1e-10
    plan = make_plan(method, (), field, tolerance=tolerance, max_steps=10_000)
    ys = by_the_door(plan, y0, RAGGED).require_success().ys
    wanted = scipy_reference(field, y0, RAGGED)
    # Inside a step dopri8 has an interpolant of order 5, as everywhere.
    bound = 1e-5 if method == "dopri8" else 1e3 * tolerance
    torch.testing.assert_close(ys, wanted, rtol=0, atol=bound)
    torch.testing.assert_close(ys[:, -1], wanted[:, -1], rtol=0, atol=1e3 * tolerance)


@pytest.mark.parametrize("method", TABLEAUX)
def test_the_solution_is_the_same_without_a_gradient(method):
    y0, field = normal(len(RAGGED), 3, seed=1), perceptron(scale=3.0)
    plan = make_plan(method, (), field)
    without = by_the_door(plan, y0, RAGGED)
    wanted = by_the_door(plan, y0.requires_grad_(), RAGGED)
    assert torch.equal(without.ys.isnan(), wanted.ys.isnan())
    assert torch.equal(without.ys.nan_to_num(), wanted.ys.detach().nan_to_num())
    for one, other in zip(without.stats.columns(), wanted.stats.columns(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", ["rk4", *ADAPTIVE])
def test_the_way_back_is_the_way_there(method, dtype):
    """Bit by bit: shares of the span add up to the whole of it."""
    rows = 40
    y0 = normal(rows, 3, seed=3, dtype=dtype)
    times = torch.stack((torch.zeros(rows), torch.linspace(1, 2, rows)), 1).to(dtype)
    times[::3] = times[::3].flip(1)
    tolerance = 1e-2 if method == "adaptive_heun" else 1e-4
    plan = make_plan(method, (), perceptron(scale=2.0, dtype=dtype), tolerance)
    _, walked = walk(plan, y0, times)
    assert (walked.stats.n_accepted > 2).sum() > 0.9 * rows
    begin = (walked.stats.n_accepted == 0).to(dtype)
    for stride in walked.trail.backwards():
        where = torch.arange(rows) if stride.rows is None else stride.rows
        moved = stride.h != 0
        begin[where[moved]] = stride.left[moved]
    assert torch.equal(begin, torch.ones_like(begin))


def contract(t, y):
    return -40 * (y - torch.cos(t)[:, None])


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3", "rk4"])
def test_two_states_that_part_are_a_failure(method):
    """The field contracts by e^-120 over its span, one state expands by as much."""
    y0 = torch.tensor([[1.0], [1.0]], dtype=torch.float64)
    times = torch.tensor([[0.0, 0.01, 3.0], [0.0, 0.01, 0.05]], dtype=torch.float64)
    plan = make_plan(method, (), contract, step_size=0.01, max_steps=10_000)
    solution = by_the_door(plan, y0, times)
    assert solution.stats.status.tolist() == [Status.PARTED, Status.SUCCESS]
    assert solution.ys[0, -1].isnan().all()
    if method != "rk4":  # which looks at the end only
        assert solution.stats.t[0] < 3.0
        assert solution.stats.n_accepted[0] < 200
    with pytest.raises(SolverError, match="two states parted") as error:
        solution.require_success()
    assert error.value.status == "PARTED"
    assert "Take gradient='checkpoint'" in str(error.value)
    checkpointed = solve(contract, y0, times, method=method, step_size=0.01)
    checkpointed.require_success()


# -------------------------------------------------------------------- its memory


MEASURE = """
import resource, sys, torch
from skode._engine.solve import solve

method, number, steps = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)

def turn(t, y):
    return torch.cat((-y[:, 64:], y[:, :64]), dim=1)

def peak(number):
    y0 = torch.ones(64, 128, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    solution = solve(
        turn, y0, t, method=method, gradient="reversible", rtol=number, atol=number,
        step_size=number, max_steps=20_000,
    )
    solution.require_success().y1.square().sum().backward()
    wanted = torch.full_like(y0, 2.0)  # a turn changes no length
    torch.testing.assert_close(y0.grad, wanted, rtol=0, atol=0.1)
    return solution.stats.n_accepted.max().item(), (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )

_, before = peak(0.01)
taken, after = peak(number)
assert 0.5 * steps < taken < 2 * steps, taken
print((after - before) / (2**20 if sys.platform == "darwin" else 2**10))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "numbers"),
    [("euler", (1e-2, 1e-4)), ("adaptive_heun", (3e-5, 3e-9))],
)
def test_memory_is_flat(method, numbers):
    """States of 10,000 steps would be 625 MiB, those of 100 are 6."""
    growth = []
    for number, steps in zip(numbers, (100, 10_000), strict=True):
        command = [sys.executable, "-c", MEASURE, method, str(number), str(steps)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        growth.append(float(done.stdout))
    assert growth[1] - growth[0] < 8
