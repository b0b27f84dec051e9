"""Fast code beside its twin: compiled solves, kernels. B rows, T times, D state."""

import pytest
import torch

from skode._engine import build
from skode._engine.solution import Status
from skode._engine.solve import solve
from tests.problems import normal


def _compiler_is_missing():
    # A compiler that is there and fails is a failure of the tests.
    try:
        build.compiler()
    except build.BuildError:
        return True
    return False


needs_compiler = pytest.mark.skipif(
    _compiler_is_missing(), reason="needs a C++ compiler"
)


def params_of(field):
    """Return the parameters of a module, or of what names its own."""
    module = isinstance(field, torch.nn.Module)
    return tuple(field.parameters()) if module else field.params


def solved(field, y0, t, *, compile, **how):
    how = {"rtol": 1e-6, "atol": 1e-6, "step_size": 0.07, **how}
    return solve(field, y0, t, params=params_of(field), compile=compile, **how)


def ragged(rows, count, dtype=torch.float64):
    """Return times (B, T), each row with a span of its own, some of them backwards."""
    ends = torch.linspace(-1.0, 2.0, rows, dtype=dtype)[:, None]
    return 0.3 + ends * torch.linspace(0, 1, count, dtype=dtype)


def both(field, y0, t, loss, **how):
    """Return (solution, gradients) of the twin and of compiled code."""
    pairs = []
    for compile in (False, True):
        inputs = [y0.clone().requires_grad_(), t.clone().requires_grad_()]
        solution = solved(field, *inputs, compile=compile, **how)
        wanted = (*inputs, *params_of(field))
        pairs.append(
            (
                solution,
                torch.autograd.grad(loss(solution.ys), wanted, materialize_grads=True),
            )
        )
    return pairs


def weighted(ys):
    weights = torch.linspace(-1, 2, ys.numel(), dtype=ys.dtype).view_as(ys)
    return (ys.square() * weights).sum() + (ys * weights).sum()


def assert_threads_change_nothing(field, y0, t):
    """Compare states and gradients of compiled solves with one and three threads."""
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            start = y0.clone().requires_grad_()
            ys = solved(field, start, t, compile=True).ys
            wanted = (start, *params_of(field))
            found.append((ys, *torch.autograd.grad(weighted(ys), wanted)))
    finally:
        torch.set_num_threads(before)
    one, three = found
    assert torch.equal(one[0], three[0]) and torch.equal(one[1], three[1])
    for x, y in zip(one[2:], three[2:], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-9)


def assert_same_kernels(fused, plain, field, params, width, at_once):
    """Compare a kernel with autograd's, over passes of several sizes."""
    slots = 3
    # Fewer rows than before, then more: the fused kernel reuses its memory.
    for round_, rows in enumerate([4, 4, 2, 5]):
        times = normal(slots, rows, seed=round_)
        y = 2 * normal(slots, rows, width, seed=100 + round_)
        v = normal(slots, rows, width, seed=200 + round_)
        ours, wanted = torch.empty_like(y), torch.empty_like(y)
        for kernel, out in ((fused, ours), (plain, wanted)):
            kernel.begin(times)
            for slot in range(slots):
                kernel.evaluate(slot, y[slot], out[slot])
        close(ours, wanted)
        close(ours, torch.stack([field(t, y) for t, y in zip(times, y, strict=True)]))
        for kernel, out in ((fused, ours), (plain, wanted)):
            states, cotangents = kernel.begin_linear(times, width)
            states.copy_(y)
            cotangents.copy_(v)
            out.zero_()
            if at_once:
                kernel.linearize_all()
            for slot in range(slots):
                if not at_once:
                    kernel.linearize(slot, out[slot])
        close(ours, wanted)
        for slot in range(slots):
            fused.pull(slot, ours[slot])
            plain.pull(slot, wanted[slot])
            close(fused.pull_time(slot), plain.pull_time(slot))
        close(ours, wanted)
        fused.accumulate(slots)
        plain.accumulate(slots)
    pairs = zip(fused.gradients(), plain.gradients(), params, strict=True)
    for ours, wanted, param in pairs:
        assert ours.shape == param.shape
        close(ours, wanted)


def close(ours, wanted):
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)


def assert_same(pairs, rtol=1e-10):
    (twin, twin_grads), (fast, fast_grads) = pairs
    torch.testing.assert_close(fast.ys, twin.ys, rtol=rtol, atol=rtol, equal_nan=True)
    assert torch.equal(fast.stats.status, twin.stats.status)
    # A march of the twin goes on with what is not finite; a compiled one ends there.
    sound = twin.stats.status != Status.NON_FINITE
    for name in ("n_accepted", "n_rejected"):
        counts = getattr(fast.stats, name), getattr(twin.stats, name)
        assert torch.equal(*(count[sound] for count in counts)), name
    torch.testing.assert_close(fast.stats.t, twin.stats.t)
    for one, other in zip(fast_grads, twin_grads, strict=True):
        # What is small beside the rest of a gradient is its rounding.
        atol = rtol * float(other.abs().max() + 1e-12)
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)
