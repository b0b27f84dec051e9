"""Compiled solves beside their twins in PyTorch. B rows, T times, D state."""

import pytest
import torch

from skode._engine import build
from skode._engine.solution import Status
from skode._engine.solve import solve


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
