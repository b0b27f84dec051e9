"""Solutions against SciPy's DOP853, torchdiffeq and closed forms."""

import pytest
import torch
import torchdiffeq

from skode._engine.solve import FIXED_STEP, solve
from skode._engine.tableau import TABLEAUX
from tests.problems import CUBIC, LINEAR, normal, perceptron, scipy_reference

FIXED = [name for name in TABLEAUX if name in FIXED_STEP]
ADAPTIVE = [name for name in TABLEAUX if name not in FIXED_STEP]
TOLERANCE = {"adaptive_heun": 1e-5, "bosh3": 1e-6}
DTYPES = [torch.float32, torch.float64]

SHARED = torch.tensor([0.0, 0.31, 0.5, 1.2], dtype=torch.float64)
PER_ROW = torch.tensor(
    [
        [0.0, 0.1, 0.7, 1.0],
        [0.5, 0.2, -0.3, -0.6],
        [-1.0, 0.4, 1.1, 1.1],
        [0.3, 0.3, 0.3, 0.9],
    ],
    dtype=torch.float64,
)
TIMES = {"forwards": SHARED, "backwards": SHARED.flip(0), "per row": PER_ROW}


def as_rows(times):
    return times if times.ndim == 2 else times.expand(4, -1)


@pytest.fixture(scope="module")
def reference():
    field, y0 = perceptron(), normal(4, 3, seed=1)
    return {
        key: scipy_reference(field, y0, as_rows(times)) for key, times in TIMES.items()
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key", TIMES)
@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive_methods_agree_with_scipy(name, key, dtype, reference):
    tolerance = TOLERANCE.get(name, 1e-9) if dtype == torch.float64 else 1e-5
    solution = solve(
        perceptron(dtype=dtype),
        normal(4, 3, seed=1, dtype=dtype),
        TIMES[key].to(dtype),
        method=name,
        rtol=tolerance,
        atol=tolerance,
    ).require_success()
    assert solution.ys.dtype == dtype
    error = (solution.ys - reference[key]).abs().max()
    assert error < 50 * tolerance


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key", TIMES)
@pytest.mark.parametrize("name", FIXED)
def test_fixed_methods_agree_with_scipy(name, key, dtype, reference):
    step = {"euler": 2e-3, "rk4": 0.05}.get(name, 0.01)
    solution = solve(
        perceptron(dtype=dtype),
        normal(4, 3, seed=1, dtype=dtype),
        TIMES[key].to(dtype),
        method=name,
        step_size=step,
    ).require_success()
    error = (solution.ys - reference[key]).abs().max()
    # Error constants of a few units.
    assert error < max(20 * step ** TABLEAUX[name].order, 2e-5)


def by_torchdiffeq(field, y0, times, **settings):
    ys = torchdiffeq.odeint(
        lambda t, y: field(t.to(y.dtype).expand(len(y)), y), y0, times, **settings
    )
    return ys.transpose(0, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key", ["forwards", "backwards"])
@pytest.mark.parametrize("name", FIXED)
def test_fixed_methods_take_the_steps_of_torchdiffeq(name, key, dtype):
    field, y0 = perceptron(dtype=dtype), normal(4, 3, seed=1, dtype=dtype)
    # 0.31 lies inside a step, 0.5 does not.
    times = TIMES[key].to(dtype)
    ours = solve(field, y0, times, method=name, step_size=0.1)
    theirs = by_torchdiffeq(
        field,
        y0,
        times,
        method=name,
        options={"step_size": 0.1, "interp": "cubic"},
    )
    assert ours.stats.n_accepted.tolist() == [12] * 4
    torch.testing.assert_close(
        ours.ys, theirs, rtol=0, atol=1e-13 if dtype == torch.float64 else 2e-5
    )


@pytest.mark.parametrize("key", ["forwards", "backwards"])
@pytest.mark.parametrize("name", [n for n in ADAPTIVE if n != "tsit5"])
def test_adaptive_methods_agree_with_those_of_torchdiffeq(name, key):
    # torchdiffeq has no tsit5, and interpolates every requested time, the last one
    # among them, worse than it steps: it needs a tighter tolerance.
    tolerance = TOLERANCE.get(name, 1e-9)
    field, y0 = perceptron(), normal(4, 3, seed=1)
    tighter = tolerance * (1 if name == "adaptive_heun" else 1e-3)
    ours = solve(field, y0, TIMES[key], method=name, rtol=tolerance, atol=tolerance)
    theirs = by_torchdiffeq(
        field, y0, TIMES[key], method=name, rtol=tighter, atol=tighter
    )
    torch.testing.assert_close(ours.ys, theirs, rtol=0, atol=50 * tolerance)


@pytest.mark.parametrize("problem", [CUBIC, LINEAR], ids=lambda p: p.name)
@pytest.mark.parametrize("name", TABLEAUX)
def test_there_and_back_again(name, problem):
    settings = {"method": name, "rtol": 1e-6, "atol": 1e-6, "step_size": 0.01}
    times = problem.times(5)
    there = solve(problem.field, problem.y0(), times, **settings).require_success()
    back = solve(problem.field, there.y1, times.flip(1), **settings).require_success()
    bound = 0.1 if name == "euler" else 2e-3
    assert (back.y1 - problem.y0()).abs().max() < bound
    assert (back.ys.flip(1) - there.ys).abs().max() < bound


@pytest.mark.parametrize("name", TABLEAUX)
def test_requested_times_do_not_move_the_solution(name):
    """Dense output: asking for more times takes no more steps."""
    settings = {"method": name, "rtol": 1e-5, "atol": 1e-5, "step_size": 0.1}
    few = solve(CUBIC.field, CUBIC.y0(), CUBIC.times(2), **settings)
    many = solve(CUBIC.field, CUBIC.y0(), CUBIC.times(57), **settings)
    assert torch.equal(few.y1, many.y1)
    assert torch.equal(few.stats.n_accepted, many.stats.n_accepted)
    assert CUBIC.error(many.ys) < (0.05 if name == "euler" else 2e-3)


@pytest.mark.parametrize("times", [(0.0, 1.0), (0.0, 0.51, 1.0), (0.5, 0.5)], ids=str)
@pytest.mark.parametrize("name", TABLEAUX)
def test_nfe_is_what_the_field_was_asked(name, times):
    calls = 0

    def counted(t, y):
        nonlocal calls
        calls += 1
        return CUBIC.field(t, y)

    times = torch.tensor(times, dtype=torch.float64)
    stats = solve(counted, CUBIC.y0()[:1], times, method=name, step_size=0.1).stats
    assert stats.nfe.tolist() == [calls]


@pytest.mark.parametrize("name", TABLEAUX)
def test_times_may_be_more_precise_than_states(name):
    y0 = CUBIC.y0(torch.float32)
    seen = set()

    def watched(t, y):
        seen.add((t.dtype, y.dtype))
        return CUBIC.field(t, y)

    solution = solve(
        watched, y0, CUBIC.times(5), method=name, step_size=0.02, rtol=1e-5, atol=1e-5
    )
    assert seen == {(torch.float32, torch.float32)}
    assert solution.ys.dtype == torch.float32
    assert solution.stats.t.dtype == torch.float64
    assert CUBIC.error(solution.ys) < (0.02 if name == "euler" else 2e-4)


def test_double_times_tell_steps_apart_that_floats_cannot():
    """Step sizes near 1e-5 at t = 1000 vanish in float32."""
    start = torch.tensor([[1.0]])
    times = torch.tensor([1000.0, 1000.0 + 1e-4], dtype=torch.float64)
    solution = solve(lambda t, y: -1e4 * y, start, times, rtol=1e-5, atol=1e-7)
    assert solution.stats.status.tolist() == [0]
    assert solution.stats.n_accepted[0] > 3
    torch.testing.assert_close(
        solution.y1, torch.exp(torch.tensor([[-1.0]])), rtol=1e-4, atol=0
    )
