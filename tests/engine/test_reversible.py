"""The reversible scheme: against its plain twin, its base method, and SciPy."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from skode._engine.plan import Plan
from skode._engine.reversible import walk
from skode._engine.solution import Status, Tolerance
from skode._engine.solve import FIXED_STEP, solve
from skode._engine.tableau import TABLEAUX
from skode._nn.fields import MLPField
from tests.problems import CUBIC, DECAY, Perceptron, normal, perceptron, scipy_reference

ADAPTIVE = [name for name in TABLEAUX if name not in FIXED_STEP]
FIXED = list(FIXED_STEP[:4])
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
    ends = {float(t0): start[None], float(t1): y if arrived else lost}
    states = []
    for i in range(len(row)):
        at = inside.get(i, lost) if float(row[i]) not in ends else ends[float(row[i])]
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
        loss = (torch.nan_to_num(ys) * weights).sum()
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
        monkeypatch.setattr("skode._engine.pair_loop._WORTH_COMPACTING", 0)
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
