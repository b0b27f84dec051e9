"""Kernels agree with their twins: on a GPU where there is one, else interpreted.

B rows, T times, D state.
"""

import os
import subprocess
import sys

import pytest
import torch

from skode._engine import fused as fused_module
from skode._engine import masked
from skode._engine import solve as solve_module
from skode._engine.checkpoint import _Reverse
from skode._engine.dense import Requests
from skode._engine.lanes import Chunk, Lanes, drive, tape_of
from skode._engine.plan import Plan
from skode._engine.solution import Status, Tolerance
from skode._engine.tableau import TABLEAUX, coefficients
from skode._nn.fields import ACTIVATIONS, MLPField
from tests.problems import normal

triton = pytest.importorskip("triton", reason="kernels need triton")
tl = pytest.importorskip("triton.language")

from skode._engine.tiles import field as device_functions  # noqa: E402
from skode._engine.tiles import program as program_module  # noqa: E402
from skode._engine.tiles.launch import Launcher, _precision  # noqa: E402
from skode._engine.tiles.program import TileProgram  # noqa: E402

# The interpreter computes in numpy, which tells of every division by zero.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Spans from nothing to long, in both directions.
SPANS = [0.0, 0.02, 1.5, 0.3, -0.7, 1.0, 0.05, -1.2, 0.0, 0.5, 0.9, 0.1]
SPANS += [0.4, -0.1, 0.0, 1.1, 0.6, -0.3]


def network(dim, hidden, activation="tanh", scale=1.5, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        field = MLPField(dim, hidden, activation)
    with torch.no_grad():
        for param in field.parameters():
            param.mul_(scale)
    return field.to(DEVICE)


def batch(rows, dim, shares=(0.0, 0.13, 0.5, 0.5, 1.0), dtype=torch.float32):
    """Return y0 (B, D) and times (B, T) of spans that differ."""
    spans = torch.tensor(SPANS[:rows], dtype=dtype)[:, None]
    starts = torch.linspace(-0.5, 0.5, rows, dtype=dtype)[:, None]
    times = starts + spans * torch.tensor(shares, dtype=dtype)
    return normal(rows, dim, seed=3, dtype=torch.float32).to(DEVICE), times.to(DEVICE)


def plan_of(field, method, tol=1e-3, max_steps=200):
    tolerance = Tolerance(tol, tol, None, max_steps)
    return Plan(field, TABLEAUX[method], tolerance, tuple(field.parameters()))


def launcher_of(plan, rows):
    layers = plan.field.own_layers(plan.params)
    return Launcher.of(layers, plan.tableau, plan.tolerance, rows)


def means_of(plan, y0, times):
    tableau, dtype = plan.tableau, y0.dtype
    coef = coefficients(tableau, dtype, times.dtype, y0.device)
    return masked.Means.of(plan.untrained_kernel(), coef, plan.tolerance, y0)


def both(plan, y0, times, attempts):
    """Start, and make some attempts, by the kernels and by their twins."""
    ends = []
    with torch.no_grad():
        for by_kernel in (True, False):
            lanes = Lanes.at(y0, Requests(times))
            chunk = Chunk.like(lanes, attempts)
            if by_kernel:
                launcher = launcher_of(plan, len(y0))
                launcher.start(lanes)
                started = lanes.clock.clone(), lanes.slope.clone()
                alive = launcher.advance(lanes, chunk, attempts)
            else:
                means = means_of(plan, y0, times)
                masked.start(means, lanes)
                started = lanes.clock.clone(), lanes.slope.clone()
                alive = masked.advance(means, lanes, chunk, attempts)
            ends.append((started, lanes, chunk, bool(alive.any())))
    return ends


def assert_same_way(ours, twin, tol=1e-4):
    (started, lanes, chunk, alive), (started_, lanes_, chunk_, alive_) = ours, twin
    for x, y in zip(started, started_, strict=True):
        torch.testing.assert_close(x, y, rtol=tol, atol=tol)
    assert alive == alive_
    assert torch.equal(lanes.counts, lanes_.counts)
    assert torch.equal(chunk.used, chunk_.used)
    moving = lanes.clock[2] > 0
    # The next step and the memory of rows that have arrived are nobody's business.
    for x, y in ((lanes.clock[:3], lanes_.clock[:3]), (lanes.y, lanes_.y)):
        torch.testing.assert_close(x, y, rtol=tol, atol=tol)
    torch.testing.assert_close(
        lanes.clock[:, moving], lanes_.clock[:, moving], rtol=10 * tol, atol=tol
    )
    torch.testing.assert_close(lanes.slope, lanes_.slope, rtol=10 * tol, atol=tol)
    if lanes.inside is not None:
        torch.testing.assert_close(
            lanes.inside, lanes_.inside, rtol=tol, atol=tol, equal_nan=True
        )
    filled = torch.arange(len(chunk.y), device=DEVICE)[:, None] < chunk.used
    for x, y in ((chunk.clock, chunk_.clock), (chunk.due, chunk_.due)):
        if x.numel():
            x, y = x[:, filled], y[:, filled]
            torch.testing.assert_close(x, y, rtol=10 * tol, atol=tol)
    torch.testing.assert_close(chunk.y[filled], chunk_.y[filled], rtol=tol, atol=tol)


@pytest.mark.parametrize(
    ("method", "hidden", "activation", "scale", "rows", "dim"),
    [
        ("dopri5", (10, 8), "tanh", 2.5, 18, 3),
        ("tsit5", (8,), "silu", 1.5, 5, 2),
        ("bosh3", (33, 20, 9), "relu", 1.5, 12, 4),
        ("dopri8", (12,), "softplus", 1.5, 7, 8),
        ("adaptive_heun", (), "tanh", 1.5, 12, 5),
    ],
)
def test_steps_agree_with_the_twin(method, hidden, activation, scale, rows, dim):
    plan = plan_of(network(dim, hidden, activation, scale), method)
    y0, times = batch(rows, dim)
    ours, twin = both(plan, y0, times, 60)
    assert_same_way(ours, twin)
    assert not ours[3]  # all arrived
    if method == "dopri5":
        assert ours[1].counts[1].sum() > 0  # some after a refusal


@pytest.mark.parametrize("shares", [(0.0, 1.0), (0.0,), (0.0, 0.0, 1.0, 1.0)])
def test_steps_agree_where_no_time_lies_inside(shares):
    plan = plan_of(network(3, (8,)), "dopri5")
    y0, times = batch(12, 3, shares)
    ours, twin = both(plan, y0, times, 30)
    assert_same_way(ours, twin)
    assert ours[1].inside is None


def test_times_keep_their_dtype():
    plan = plan_of(network(3, (8,)), "dopri5")
    y0, times = batch(8, 3, dtype=torch.float64)
    times = times + 1e5  # where float32 would see no time pass
    ours, twin = both(plan, y0, times, 30)
    assert ours[1].clock.dtype == torch.float64
    assert_same_way(ours, twin)
    torch.testing.assert_close(ours[1].clock[0], times[:, -1], rtol=0, atol=0)


def test_what_a_launch_leaves_undone_the_next_one_does():
    plan = plan_of(network(3, (8,), scale=2.5), "dopri5")
    y0, times = batch(12, 3)
    first, twin = both(plan, y0, times, 1)
    assert_same_way(first, twin)
    assert first[3]  # a row has yet a way to go
    whole, _ = both(plan, y0, times, 60)
    lanes, launcher = first[1], launcher_of(plan, len(y0))
    made = drive(lambda n: launcher.advance(lanes, None, n), 2, 200)
    assert made > 1
    torch.testing.assert_close(lanes.y, whole[1].y)
    torch.testing.assert_close(lanes.inside, whole[1].inside, equal_nan=True)
    assert torch.equal(lanes.counts, whole[1].counts)


def pulled(plan, y0, times, chunks, grad):
    """Return gradients by the kernel, and by the replay of the same steps."""
    rows = len(y0)
    program = TileProgram(plan, launcher_of(plan, rows))
    with torch.no_grad():
        grad_y0, grad_times, grads = program.pull(times, chunks, grad, True)
        twin = _Reverse(plan, tape_of(chunks), Requests(times), grad, True)
        twin_y0 = twin.run(y0)
    return (grad_y0, grad_times, *grads), (
        twin_y0,
        twin.grad_times,
        *twin.kernel.gradients(),
    )


@pytest.mark.parametrize(
    ("method", "hidden", "activation", "rows", "shares"),
    [
        ("dopri5", (10, 8), "tanh", 18, (0.0, 1.0)),
        ("dopri5", (9,), "silu", 12, (0.0, 0.13, 0.5, 0.52, 1.0)),
        ("tsit5", (), "tanh", 12, (0.0, 0.4, 1.0)),
        ("bosh3", (33, 20, 9), "softplus", 5, (0.0, 0.4, 1.0)),
        ("adaptive_heun", (8,), "relu", 5, (0.0, 1.0)),
    ],
)
def test_gradients_agree_with_the_twin(method, hidden, activation, rows, shares):
    plan = plan_of(network(3, hidden, activation), method)
    y0, times = batch(rows, 3, shares)
    _, _, chunk, _ = both(plan, y0, times, 40)[0]
    grad = normal(*times.shape, 3, seed=5, dtype=torch.float32).to(DEVICE)
    ours, twin = pulled(plan, y0, times, [chunk], grad)
    for x, y in zip(ours, twin, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    assert all(x.abs().max() > 1e-2 for x in ours)


MODE = {"compile": False}
"""The loop in PyTorch, until a test takes `kernels_everywhere`."""


def solve(*args, **settings):
    return solve_module.solve(*args, **MODE, **settings)


@pytest.fixture
def kernels_everywhere(monkeypatch):
    """Let solves use the kernels on any device; return the tapes that they record."""
    tapes, record = [], TileProgram.record

    def spy(self, y0, times):
        found = record(self, y0, times)
        tapes.append(found[2])
        return found

    def fast(plan, y0, times, gradient, wanted):
        return fused_module.fused(plan, y0, times)

    monkeypatch.setitem(MODE, "compile", True)
    monkeypatch.setattr(solve_module, "_fast", fast)
    monkeypatch.setattr(fused_module, "has_kernels", lambda device: True)
    monkeypatch.setattr(program_module, "_MANY", 2)  # steps per launch
    monkeypatch.setattr(TileProgram, "record", spy)
    return tapes


def solved(y0, times, field, method, gradient="checkpoint"):
    """Return states, statistics and all gradients."""
    y0, times = y0.clone().requires_grad_(), times.clone().requires_grad_()
    params = list(field.parameters())
    settings = {"method": method, "rtol": 1e-3, "atol": 1e-3, "gradient": gradient}
    solution = solve(field, y0, times, params=params, **settings)
    weights = normal(*solution.ys.shape, seed=4, dtype=torch.float32).to(DEVICE)
    grads = torch.autograd.grad((solution.ys * weights).sum(), (y0, times, *params))
    return solution.ys.detach(), solution.stats, grads


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_the_door_leads_to_the_kernels(method, request):
    field = network(4, (9, 12), scale=2.0)
    y0, times = batch(12, 4)
    times[3, 3:] = times[3, 2:3]  # padded
    plain = solved(y0, times, field, method)
    exact = solved(y0.double(), times.double(), field.double(), method, "backprop")
    field.float()
    tapes = request.getfixturevalue("kernels_everywhere")
    ours = solved(y0, times, field, method)
    assert len(tapes) == 1 and len(tapes[0]) > 1
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-4, atol=1e-4)
    for name in ("status", "n_accepted", "n_rejected", "nfe", "t"):
        assert torch.equal(getattr(ours[1], name), getattr(plain[1], name)), name
    for x, y, z in zip(ours[2], plain[2], exact[2], strict=True):
        torch.testing.assert_close(x, y, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(x.double(), z.double(), rtol=5e-2, atol=5e-2)


def growth(rate, dim=2):
    """Return the field y' = rate y."""
    field = network(dim, ())
    with torch.no_grad():
        for param in field.parameters():
            param.zero_()
        field.weights[0].fill_diagonal_(rate)
    return field


BAD = {
    "a start that is not finite": (1.0, [[1.0, 2.0], [torch.nan, 1.0], [torch.inf, 0]]),
    "a field that is never finite": (torch.nan, [[1.0, 2.0], [0.0, 1.0]]),
    "a solution that overflows": (90.0, [[1e-30, 1e-32], [1.0, 2.0]]),
}


@pytest.mark.parametrize("steps", [500, 3])
@pytest.mark.parametrize("key", BAD)
def test_rows_that_fail_fail_alike(key, steps, request):
    rate, start = BAD[key]
    field, y0 = growth(rate), torch.tensor(start, device=DEVICE)
    times = torch.tensor([0.0, 0.4, 1.0], device=DEVICE)

    def run():
        settings = {"rtol": 1e-2, "atol": 1e-2, "max_steps": steps}
        params = list(field.parameters())
        shown = solve(field, y0, times, **settings)
        ys = solve(field, y0, times, params=params, **settings).ys
        kept = torch.isfinite(ys).all(dim=(1, 2))
        if not kept.any():
            return shown, ()
        return shown, torch.autograd.grad(ys[kept].sum(), params)

    plain, plain_grads = run()
    tapes = request.getfixturevalue("kernels_everywhere")
    ours, grads = run()
    assert len(tapes) == 1
    assert (plain.stats.status != 0).any()
    for name in ("status", "n_accepted", "n_rejected"):
        x, y = getattr(ours.stats, name), getattr(plain.stats, name)
        assert torch.equal(x, y), name
    torch.testing.assert_close(ours.stats.t, plain.stats.t, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.ys, plain.ys, rtol=1e-3, atol=0, equal_nan=True)
    for x, y in zip(grads, plain_grads, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


def test_a_row_that_starts_at_infinity_has_no_part_in_the_gradient(kernels_everywhere):
    """Its slopes are finite, so its steps are accepted; 0 times its state is NaN.

    The widths need no padding, in which infinity would become NaN at once.
    """
    field = network(16, (16,))
    params = list(field.parameters())
    start = torch.full((2, 16), 0.5, device=DEVICE)
    start[1, 0] = torch.inf
    times = torch.tensor([0.0, 0.1, 0.2], device=DEVICE)
    grads = []
    for y0 in (start, start[:1]):
        solution = solve(field, y0, times, params=params)
        grads.append(torch.autograd.grad(solution.ys[0].sum(), params))
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y)


def test_a_step_below_the_resolution_of_time_ends_the_row(kernels_everywhere):
    """Far from 0, float32 has no times close enough for so fast a field."""
    field, y0 = growth(-3e4), torch.ones(3, 2, device=DEVICE)
    times = torch.tensor([[1e3, 1e3 + 1], [1e3, 1e3 - 1], [1e3, 1e3]]).to(DEVICE)
    stats = solve(field, y0, times, rtol=1e-3, atol=1e-6).stats
    # Backwards in time, the same field blows up.
    wanted = [Status.STEP_UNDERFLOW, Status.NON_FINITE, Status.SUCCESS]
    assert stats.status.tolist() == wanted
    assert (stats.t - 1e3).abs().max() < 1.0


@pytest.mark.parametrize(
    "rows", [[7, 2, 11, 0, 9, 4, 1, 3, 10, 5, 8, 6], [5, 5, 10], [7]], ids=len
)
def test_company_does_not_change_a_row(rows, kernels_everywhere):
    field = network(3, (9,), scale=2.0)
    y0, times = batch(12, 3)
    whole, parts = (
        solved(y0[some], times[some], field, "dopri5") for some in (range(12), rows)
    )
    torch.testing.assert_close(parts[0], whole[0][rows], rtol=0, atol=5e-5)


def test_a_second_derivative_is_refused(kernels_everywhere):
    field = network(2, (4,))
    y0, times = batch(3, 2, (0.0, 1.0))
    ys = solve(field, y0.requires_grad_(), times).ys
    with pytest.raises(RuntimeError, match="backprop"):
        torch.autograd.grad(ys.sum(), y0, create_graph=True)


def test_only_what_suits_goes_to_the_kernels(monkeypatch):
    field, (y0, times) = network(3, (8,)), batch(5, 3)
    plan = plan_of(field, "dopri5")

    def on_chip(plan, y0=y0, times=times):
        found = fused_module.fused(plan, y0, times)
        return isinstance(getattr(found, "program", None), TileProgram)

    assert on_chip(plan) == (DEVICE.type == "cuda")
    monkeypatch.setattr(fused_module, "has_kernels", lambda device: True)
    assert on_chip(plan)
    assert on_chip(plan, times=times.double())
    assert not on_chip(plan_of(field, "rk4"))
    assert not on_chip(plan, y0.double())
    wide = network(130, (8,))
    assert not on_chip(plan_of(wide, "dopri5"), torch.ones(5, 130).to(DEVICE))
    foreign = Plan(field, plan.tableau, plan.tolerance, plan.params[:1])
    assert not on_chip(foreign)
    own = Plan(lambda t, y: -y, plan.tableau, plan.tolerance, ())
    assert not on_chip(own)
    monkeypatch.setattr(fused_module, "has_kernels", lambda device: False)
    assert not on_chip(plan)


def steps_of(tape):
    """Return (row, t, h) of every step, and the requested times inside it."""
    steps, inside = [], []
    for taken in tape:
        rows = range(len(taken.t)) if taken.rows is None else taken.rows.tolist()
        for row, t, h in zip(rows, taken.t.tolist(), taken.h.tolist(), strict=True):
            if h != 0:
                steps.append((row, abs(t), t, h))
        if taken.events is not None:
            inside += zip(
                taken.events.row.tolist(), taken.events.index.tolist(), strict=True
            )
    return sorted(steps), sorted(inside)


def test_the_tape_is_that_of_the_loop():
    plan = plan_of(network(3, (8,), scale=2.0), "dopri5")
    y0, times = batch(12, 3)
    _, (_, _, chunk, _) = both(plan, y0, times, 40)
    with torch.no_grad():
        _, _, _, tape = plan.record(y0, times)
    (steps, inside), (wanted, wanted_inside) = map(steps_of, (tape_of([chunk]), tape))
    assert inside == wanted_inside and inside
    for x, y in zip(steps, wanted, strict=True):
        assert x == pytest.approx(y, rel=1e-4, abs=1e-6)


def test_driving_reads_the_answer_of_the_launch_before():
    """On a GPU, when the next launch is under way; on a CPU there is no other."""
    left = [5, 3, 0, 0, 0, 0]
    launched = []

    def launch(attempts):
        launched.append(attempts)
        return torch.tensor([left[len(launched) - 1], 0], device=DEVICE)

    assert drive(launch, 4, 100) == 3
    assert launched == [4] * (3 if DEVICE.type == "cpu" else 4)
    launched.clear()
    left[:] = [1] * 6
    assert drive(launch, 4, 10) == 3
    assert launched == [4, 4, 2]


ARGUMENTS = {
    torch.tanh: "tanh",
    torch.nn.functional.softplus: "softplus",
    torch.nn.functional.silu: "silu",
    torch.relu: "relu",
}


def test_the_names_are_those_of_the_field():
    assert set(ARGUMENTS.values()) == set(ACTIVATIONS)


@pytest.mark.parametrize("plain", ARGUMENTS, ids=lambda plain: plain.__name__)
def test_activations_are_exact(plain):
    """To a few roundings, near 0 as well as far away, and in their derivatives."""
    near = torch.logspace(-8, 1.9, 512)
    x = torch.cat((near, -near, torch.zeros(1024 - 2 * len(near)))).to(DEVICE)
    found = torch.empty(3, len(x), device=DEVICE)
    activations_of[(1,)](x, found, len(x), ARGUMENTS[plain])
    exact = x.double().requires_grad_()
    value = plain(exact)
    (slope,) = torch.autograd.grad(value.sum(), exact)
    # Below float32's smallest numbers only the absolute error is bounded.
    close = {"rtol": 2e-6, "atol": 1e-30}
    torch.testing.assert_close(found[0].double(), value.detach(), **close)
    torch.testing.assert_close(found[1].double(), value.detach(), **close)
    # 1 - tanh^2 loses digits where it is small.
    torch.testing.assert_close(found[2].double(), slope, rtol=2e-6, atol=2e-7)


@triton.jit
def activations_of(x, found, N: tl.constexpr, ACTIVATION: tl.constexpr):
    at = tl.arange(0, N)
    argument = tl.load(x + at)
    value, slope = device_functions.activate_with_slope(argument, ACTIVATION)
    tl.store(found + at, device_functions.activate(argument, ACTIVATION))
    tl.store(found + N + at, value)
    tl.store(found + 2 * N + at, slope)


BUILD = """
from itertools import accumulate
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from skode._engine.tableau import DOPRI5
from skode._engine.tiles import backward, forward

widths, padded = (5, 20, 9, 5), (16, 32, 16, 16)
constants = {
    "STAGES": 6, "POWERS": len(DOPRI5.dense[0]), "ORDER": 5, "EPS": 1e-7,
    "TAPED": True, "INSIDE": True, "TIMED": True, "WIDTH": 64, "TILE": 16,
    "WIDTHS": widths, "PADDED": padded, "PLACES": (0, *accumulate(padded[:-1])),
    "OFFSETS": ((0, 325, 359), (100, 345, 379), (280, 354, 388)), "DEPTH": 2,
}
integers = {"counts", "tape_due", "used", "alive"}
times = {"times", "clock", "tape_clock", "nodes", "grad_times"}
scalars = {"rtol": "fp32", "atol": "fp32", "noise": "fp32", "factor": "fp32"}
scalars |= dict.fromkeys(("rows", "n_times", "attempts", "slots", "n_params"), "i32")

def type_of(name, known):
    if name in known:
        return "constexpr"
    if name in scalars:
        return scalars[name]
    return "*i32" if name in integers else "*fp64" if name in times else "*fp32"

for kernel, activation, precision in (
    (forward.start, "tanh", "ieee"),
    (forward.advance, "silu", "ieee"),
    (forward.advance, "relu", "tf32"),
    (backward.replay, "softplus", "ieee"),
    (backward.replay, "tanh", "tf32"),
):
    names = [parameter.name for parameter in kernel.params]
    known = {**constants, "ACTIVATION": activation, "PRECISION": precision}
    known = {name: value for name, value in known.items() if name in names}
    types = {name: type_of(name, known) for name in names}
    built = triton.compile(
        ASTSource(kernel, types, constexprs=known),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 4, "enable_fp_fusion": True},
    )
    assert ".entry" in built.asm["ptx"] and built.asm["cubin"]
    print("built")
"""


@pytest.mark.slow
def test_kernels_compile_for_a_gpu_that_is_not_there(tmp_path):
    """What the interpreter takes, the compiler may refuse."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", BUILD], env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == ["built"] * 5, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "dopri8"])
def test_a_gpu_solves_as_a_cpu_does(method, monkeypatch):
    monkeypatch.setitem(MODE, "compile", "auto")
    field = network(8, (32, 32), scale=2.0)
    y0, times = batch(18, 8)
    ours = solved(y0, times, field, method)
    theirs = solved(y0.cpu(), times.cpu(), field.cpu(), method)
    torch.testing.assert_close(ours[0].cpu(), theirs[0], rtol=1e-3, atol=1e-3)
    for x, y in zip(ours[2], theirs[2], strict=True):
        torch.testing.assert_close(x.cpu(), y, rtol=1e-2, atol=1e-2)


def test_products_follow_the_switch_of_pytorch():
    switch = torch.backends.cuda.matmul
    before = switch.allow_tf32
    try:
        for allowed, wanted in ((True, "tf32"), (False, "ieee")):
            switch.allow_tf32 = allowed
            assert _precision() == wanted
    finally:
        switch.allow_tf32 = before


@pytest.mark.gpu
def test_tf32_is_a_choice(monkeypatch):
    """Of PyTorch's own switch; without it products are exact."""
    monkeypatch.setitem(MODE, "compile", "auto")
    field = network(32, (64, 64), scale=2.0)
    y0 = normal(64, 32, seed=3, dtype=torch.float32).to(DEVICE)
    times = torch.tensor([0.0, 1.0], device=DEVICE)
    settings = {"rtol": 1e-6, "atol": 1e-6}
    exact = solve(field.double(), y0.double(), times.double(), **settings).y1
    field.float()
    errors = []
    for allowed in (False, True):
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", allowed)
        found = solve(field, y0, times, rtol=1e-5, atol=1e-5).y1
        errors.append(float((found - exact).abs().max()))
    assert errors[0] < 1e-4 and errors[1] > 3 * errors[0]
