"""Compiled solves against their twin in PyTorch, and what happens without a compiler.

B rows, T times, D state.
"""

import gc
import multiprocessing
import os
import stat
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn.utils import prune

from skode._engine import build, compiled
from skode._engine.solution import Status
from skode._engine.solve import FIXED_STEP, solve
from skode._engine.tableau import TABLEAUX
from skode._nn.fields import ACTIVATIONS, MLPField
from tests.problems import normal, scipy_reference
from tests.twins import (
    assert_same,
    assert_threads_change_nothing,
    both,
    needs_compiler,
    ragged,
    solved,
    weighted,
)

pytestmark = needs_compiler


def make_field(dim=3, hidden=(7, 9), activation="tanh", scale=2.0, dtype=torch.float64):
    torch.manual_seed(0)
    field = MLPField(dim, hidden, activation).to(dtype)
    with torch.no_grad():
        for param in field.parameters():
            param.mul_(scale)
    return field


@pytest.mark.parametrize("count", [2, 6])
@pytest.mark.parametrize("method", TABLEAUX)
def test_it_agrees_with_its_twin_by_every_method(method, count):
    field, y0 = make_field(), normal(37, 3, seed=1)
    tol = 1e-4 if method in ("adaptive_heun", "bosh3") else 1e-7
    t = ragged(37, count)
    assert_same(both(field, y0, t, weighted, method=method, rtol=tol, atol=tol), 1e-9)


@pytest.mark.parametrize("hidden", [(), (1,), (16,), (33, 5), (8, 12, 3)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_agrees_for_every_activation_and_depth(activation, hidden):
    field = make_field(5, hidden, activation, scale=1.3)
    y0, t = normal(20, 5, seed=1), torch.linspace(0, 1, 4, dtype=torch.float64)
    tol = 1e-3 if activation == "relu" else 1e-7
    assert_same(both(field, y0, t, weighted, rtol=tol, atol=tol), 1e-9)


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 6, 7, 8, 9, 17])
def test_it_agrees_for_widths_that_fill_no_register(dim):
    field = make_field(dim, (dim + 1, 2 * dim + 1), scale=1.0)
    y0, t = normal(dim, dim, seed=1), torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert_same(both(field, y0, t, weighted))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_single_precision_agrees_up_to_its_rounding(activation):
    field = make_field(8, (32, 32), activation, 1.5, torch.float32)
    y0, t = normal(100, 8, seed=1, dtype=torch.float32), torch.tensor([0.0, 0.5, 1.0])
    (twin, grads), (fast, fast_grads) = both(
        field, y0, t, weighted, method="rk4", step_size=0.05
    )
    torch.testing.assert_close(fast.ys, twin.ys, rtol=1e-4, atol=1e-4)
    for one, other in zip(fast_grads, grads, strict=True):
        scale = float(other.abs().max())
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_right_to_rounding_everywhere(activation, dtype):
    # One step of Euler's method with unit weights adds the activation itself.
    field = MLPField(1, (1,), activation).to(dtype)
    with torch.no_grad():
        for param in field.parameters():
            param.zero_()
        for weight in field.weights:
            weight.fill_(1.0)
    size = torch.logspace(-30, 3, 400, dtype=dtype)
    x = torch.cat((-size.flip(0), torch.zeros(1, dtype=dtype), size))[:, None]
    t = torch.tensor([0.0, 1.0], dtype=dtype)
    solution = solved(field, x, t, compile=True, method="euler", step_size=1.0)
    function = getattr(torch, activation, None) or getattr(
        torch.nn.functional, activation
    )
    eps = torch.finfo(dtype).eps
    # softplus: to a rounding of x + softplus(x), which is all that is seen here; and
    # PyTorch's own sum of 1 + exp(x) loses what is small.
    torch.testing.assert_close(solution.y1, x + function(x), rtol=4 * eps, atol=2 * eps)


def test_it_is_right_by_scipy():
    field, y0 = make_field(scale=3.0), normal(9, 3, seed=3)
    t = ragged(9, 4)
    solution = solved(field, y0, t, compile=True, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        solution.ys, scipy_reference(field, y0, t), rtol=1e-7, atol=1e-7
    )


def test_its_gradients_are_those_of_finite_differences():
    field, y0 = make_field(2, (3,), scale=1.0), normal(3, 2, seed=1)
    t = torch.tensor([0.0, 0.13, 0.37], dtype=torch.float64)

    def run(y0, t, *_):
        return solved(field, y0, t, compile=True, method="rk4").ys

    inputs = [x.clone().requires_grad_() for x in (y0, t)]
    assert torch.autograd.gradcheck(
        run, (*inputs, *field.parameters()), eps=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_a_row_does_not_depend_on_its_neighbours(method):
    field, y0 = (
        make_field(scale=4.0, dtype=torch.float32),
        normal(100, 3, seed=1, dtype=torch.float32),
    )
    t = ragged(100, 4, torch.float32)
    together = solved(field, y0, t, compile=True, method=method)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))[:41]
    apart = solved(field, y0[order], t[order], compile=True, method=method)
    assert torch.equal(apart.ys, together.ys[order])
    assert torch.equal(apart.stats.nfe, together.stats.nfe[order])
    alone = solved(field, y0[7:8], t[7:8], compile=True, method=method)
    assert torch.equal(alone.ys[0], together.ys[7])


def test_threads_change_no_state_and_no_gradient():
    field, y0 = make_field(8, (64, 64), scale=1.5), normal(700, 8, seed=1)
    t = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    assert_threads_change_nothing(field, y0, t)


def test_a_solve_that_is_looked_at_often_is_the_same(monkeypatch):
    # Control returns to Python after every few steps, as it does once in a while.
    field, y0, t = make_field(scale=4.0), normal(50, 3, seed=1), ragged(50, 5)
    how = {"rtol": 1e-9, "atol": 1e-9}
    twice = []
    for patience in (compiled._PATIENCE, 0.0):
        monkeypatch.setattr(compiled, "_PATIENCE", patience)
        twice.append(both(field, y0, t, weighted, **how)[1])
    (whole, whole_grads), (parts, part_grads) = twice
    assert torch.equal(whole.ys, parts.ys)
    assert all(map(torch.equal, whole_grads, part_grads))


def exploding():
    """Return y' = relu(1000 y): e^1000 over one unit of time."""
    field = MLPField(1, (1,), "relu").double()
    with torch.no_grad():
        for param in field.parameters():
            param.zero_()
        field.weights[0].fill_(1000.0)
        field.weights[1].fill_(1.0)
    return field


def sound(ys):
    """Return a loss that does not look at what has failed."""
    return torch.where(torch.isfinite(ys), ys, 0.0).clamp(max=1e3).sum()


@pytest.mark.parametrize(
    "how",
    [
        {"max_steps": 7},
        {"method": "rk4", "step_size": 0.1, "max_steps": 5},
        {"method": "rk4", "step_size": 0.001},
        {"method": "euler", "step_size": 0.0005},
    ],
    ids=["max_steps", "march", "march overflows", "euler overflows"],
)
def test_failures_are_those_of_its_twin(how):
    field = exploding()
    y0 = torch.tensor([[-1.0], [1.0], [torch.nan], [1e-300], [2.0]]).double()
    t = torch.tensor([0.0, 0.03, 1.0], dtype=torch.float64).repeat(5, 1)
    t[4] = 0.5

    pairs = both(field, y0, t, sound, **how)
    assert_same(pairs, 1e-8)
    assert (pairs[1][0].stats.status != Status.SUCCESS).any()
    assert all(bool(torch.isfinite(x[[0, 4]]).all()) for x in pairs[1][1][:2])


def test_a_row_that_overflows_is_its_own_business():
    field, t = exploding(), torch.tensor([0.0, 0.03, 1.0], dtype=torch.float64)
    y0 = torch.tensor([[-1.0], [1.0], [2.0]], dtype=torch.float64)
    (twin, _), (fast, grads) = both(field, y0, t, sound)
    for solution in (twin, fast):
        assert (solution.stats.status != Status.SUCCESS).tolist() == [False, True, True]
        assert (
            torch.isfinite(solution.ys[0]).all() and torch.isnan(solution.y1[1:]).all()
        )
        # The time inside was passed long before.
        assert torch.isfinite(solution.ys[:, 1]).all()
    assert all(bool(torch.isfinite(grad).all()) for grad in grads[:2])


def test_a_step_that_cannot_get_shorter_ends_the_row():
    # The slope jumps from -1e12 to 1e12 at y = 0: no step is short enough.
    field = MLPField(1, (1,), "tanh")
    with torch.no_grad():
        for param in field.parameters():
            param.zero_()
        field.weights[0].fill_(1e30)
        field.weights[1].fill_(-1e12)
    for compile in (False, True):
        solution = solved(
            field,
            torch.tensor([[1.0]]),
            torch.tensor([0.0, 1.0]),
            compile=compile,
            rtol=1e-6,
            atol=1e-30,
        )
        assert solution.stats.status.tolist() == [Status.STEP_UNDERFLOW]


def test_rows_that_stay_and_times_that_repeat():
    field, y0 = make_field(), normal(6, 3, seed=1)
    t = torch.tensor(
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
    for method in ("dopri5", "rk4", "dopri8"):
        assert_same(both(field, y0, t, weighted, method=method))
    still = torch.full((6, 2), 0.5, dtype=torch.float64)
    assert_same(both(field, y0, still, weighted))


def test_evaluations_are_counted_as_by_its_twin():
    field, y0 = make_field(scale=4.0), normal(20, 3, seed=1)
    for method in ("dopri5", "rk4"):
        for t in (ragged(20, 2), ragged(20, 5)):
            with torch.no_grad():
                twin, fast = (
                    solved(field, y0, t, compile=compile, method=method).stats
                    for compile in (False, True)
                )
            # The twin evaluates the end of a march for whoever listens to its steps.
            if method in FIXED_STEP and t.shape[1] > 2:
                assert ((twin.nfe - fast.nfe) <= 1).all()
            else:
                assert torch.equal(twin.nfe, fast.nfe)


def test_backward_again_after_retaining_the_graph():
    field, y0 = make_field(), normal(20, 3, seed=1).requires_grad_()
    loss = weighted(solved(field, y0, ragged(20, 3), compile=True).ys)
    (first,) = torch.autograd.grad(loss, y0, retain_graph=True)
    (second,) = torch.autograd.grad(loss, y0)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, y0)


def test_second_derivatives_are_those_of_autograd():
    field, t = make_field(scale=1.0), ragged(5, 3)
    found = []
    for how in ({"compile": True}, {"compile": False, "gradient": "backprop"}):
        y0 = normal(5, 3, seed=1).requires_grad_()
        ys = solved(field, y0, t, **how).ys
        (grad,) = torch.autograd.grad(weighted(ys), y0, create_graph=True)
        wanted = (y0, *field.parameters())
        found.append(torch.autograd.grad(grad.square().sum(), wanted))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_no_second_derivative_of_parameters_that_are_gone():
    field, y0 = make_field(), normal(5, 3, seed=1).requires_grad_()
    loss = weighted(solved(field, y0, ragged(5, 2), compile=True).ys)
    with torch.no_grad():
        field.weights[0].mul_(2.0)
    with pytest.raises(RuntimeError, match="have changed since the solve"):
        torch.autograd.grad(loss, y0, create_graph=True)


def test_states_may_be_changed_in_place():
    field, y0 = make_field(), normal(5, 3, seed=1).requires_grad_()
    loop, fast = (
        solved(field, y0, ragged(5, 2), compile=c).ys.mul_(2.0) for c in (False, True)
    )
    torch.testing.assert_close(loop, fast)
    grads = [torch.autograd.grad(ys.sum(), y0)[0] for ys in (loop, fast)]
    torch.testing.assert_close(*grads)


def test_threads_may_share_a_graph():
    field, y0 = make_field(8, (64,)), normal(200, 8, seed=1).requires_grad_()
    loss = weighted(solved(field, y0, ragged(200, 2), compile=True).ys)
    (wanted,) = torch.autograd.grad(loss, y0, retain_graph=True)

    def run(_):
        return [torch.autograd.grad(loss, y0, retain_graph=True)[0] for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        for grads in pool.map(run, range(4)):
            assert all(torch.equal(grad, wanted) for grad in grads)


def test_a_failed_row_that_met_no_more_times_leaves_the_gradient_alone():
    # Row 0 stops at once; in single precision its later times are 1e8 steps away.
    field = MLPField(2, (4,), "relu")
    with torch.no_grad():
        for param in field.parameters():
            param.zero_()
        field.weights[0].copy_(torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]]))
        field.weights[1][0, :2] = torch.tensor([-1e6, 1e6])
        field.weights[1][1, 2:] = torch.tensor([-1.0, 1.0])
    y0, t = torch.tensor([[0.0, 1.0], [1.0, 1.0]]), torch.linspace(0, 100, 5).double()
    how = {"method": "dopri8", "max_steps": 1000, "rtol": 1e-3, "atol": 1e-6}
    solution = solved(field, y0, t, compile=True, **how)
    good = solution.stats.status == Status.SUCCESS
    assert good.tolist() == [True, False]
    grads = torch.autograd.grad(solution.ys[good].sum(), tuple(field.parameters()))
    assert all(bool(torch.isfinite(grad).all()) for grad in grads)


def test_negated_views_and_endless_steps():
    field, t = make_field(1, (4,)), torch.tensor([0.0, 1.0], dtype=torch.float64)
    y0 = torch.tensor([[1.0 + 2.0j]], dtype=torch.complex128).conj().imag
    assert y0.is_neg()
    loop, fast = (
        solved(field, y0, t, compile=c, max_steps=10**20).ys for c in (False, True)
    )
    torch.testing.assert_close(loop, fast)


def test_the_gradient_is_that_of_the_parameters_as_they_were():
    field, y0 = make_field(), normal(5, 3, seed=1).requires_grad_()
    t = ragged(5, 2)
    (wanted,) = torch.autograd.grad(weighted(solved(field, y0, t, compile=True).ys), y0)
    loss = weighted(solved(field, y0, t, compile=True).ys)
    with torch.no_grad():
        for param in field.parameters():
            param.add_(1.0)
    (found,) = torch.autograd.grad(loss, y0)
    assert torch.equal(found, wanted)


def test_steps_are_freed_as_saved_tensors_are():
    field, y0 = make_field(), normal(5, 3, seed=1).requires_grad_()
    ys = solved(field, y0, ragged(5, 2), compile=True).ys
    program = ys.grad_fn.program
    ys.sum().backward(retain_graph=True)
    assert program() is not None
    ys.sum().backward()
    assert program() is None
    ys = solved(field, y0, ragged(5, 2), compile=True).ys
    program = ys.grad_fn.program
    del ys
    gc.collect()
    assert program() is None


def test_a_forward_solve_serves_the_adjoint_too():
    field, y0 = make_field(scale=1.0), normal(5, 3, seed=1)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    how = {"gradient": "adjoint", "rtol": 1e-9, "atol": 1e-9}
    assert_same(both(field, y0, t, weighted, **how), 1e-6)


def wide():
    return MLPField(64, [16]).double()


def thin():
    return MLPField(2, [16]).double()


def elsewhere():
    return MLPField(3, [8]).double().to("meta")


def torn():
    field = MLPField(3, [8]).double()
    field.biases[0] = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    return field


def single():
    return MLPField(3, [8])


@pytest.mark.parametrize("make", [wide, thin, elsewhere, torn, single])
def test_layers_that_do_not_fit_never_reach_compiled_code(make):
    field, y0, t = make(), normal(3, 3, seed=1), ragged(3, 2)
    with pytest.raises(ValueError, match="do not fit the state"):
        solved(field, y0, t, compile=True)
    with pytest.raises((RuntimeError, TypeError, ValueError)) as loop:
        solved(field, y0, t, compile=False)
    with pytest.raises(loop.type):
        solved(field, y0, t, compile="auto")


class Doubled(MLPField):
    def forward(self, t, y):
        return 2 * super().forward(t, y)


def hooked():
    field = make_field()
    field.register_forward_hook(lambda module, args, out: 2 * out)
    return field


def pruned():
    field = make_field()
    prune.l1_unstructured(field.weights, "0", amount=0.5)
    return field


@pytest.mark.parametrize("make", [lambda: Doubled(3, (5,)).double(), hooked, pruned])
def test_a_field_that_is_more_than_its_data_is_called(make):
    field, y0, t = make(), normal(3, 3, seed=1).requires_grad_(), ragged(3, 2)
    plain = solve(lambda t, y: field(t, y), y0, t, rtol=1e-8, atol=1e-8).y1
    for compile in (False, "auto"):
        found = solved(field, y0, t, compile=compile, rtol=1e-8, atol=1e-8).y1
        torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-6)


def own(t, y):
    return -y


@pytest.mark.parametrize(
    ("field", "how", "message"),
    [
        (own, {}, "the field is your own"),
        (None, {"method": "implicit_adams"}, "not a solver of our own"),
        (None, {"gradient": "backprop"}, "autograd"),
        (None, {"gradient": "reversible"}, "steps of its own"),
    ],
)
def test_true_says_what_is_in_the_way_and_auto_goes_round_it(field, how, message):
    mlp = make_field()
    y0, t = normal(3, 3, seed=1), torch.tensor([0.0, 0.5], dtype=torch.float64)
    field = field or mlp
    how = {"params": tuple(mlp.parameters()), "step_size": 0.1, **how}
    with pytest.raises(ValueError, match=message):
        solve(field, y0, t, compile=True, **how)
    auto = solve(field, y0, t, compile="auto", **how)
    assert torch.equal(auto.ys, solve(field, y0, t, compile=False, **how).ys)


def test_parameters_of_another_field_are_in_the_way():
    mlp, other = make_field(), make_field()
    y0, t = normal(3, 3, seed=1), torch.tensor([0.0, 0.5], dtype=torch.float64)
    with pytest.raises(ValueError, match="the field's own parameters"):
        solve(mlp, y0, t, params=tuple(other.parameters()), compile=True)
    with pytest.raises(ValueError, match="must be True, False or 'auto'"):
        solve(mlp, y0, t, compile="yes")


@pytest.fixture
def nothing_built(monkeypatch, tmp_path):
    """Forget what was compiled, in memory and on disk."""
    monkeypatch.setenv("SKODE_CACHE", str(tmp_path / "cache"))
    build._outcome.cache_clear()
    yield tmp_path
    build._outcome.cache_clear()


def test_without_a_compiler_auto_solves_in_pytorch(nothing_built, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    field, y0, t = make_field(), normal(3, 3, seed=1), ragged(3, 2)
    with pytest.raises(ValueError, match=r"no C\+\+ compiler: install"):
        solved(field, y0, t, compile=True)
    fast, twin = (solved(field, y0, t, compile=c) for c in ("auto", False))
    assert torch.equal(fast.ys, twin.ys)


def test_a_batch_is_not_kept_where_there_is_no_compiler(nothing_built, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    y0 = normal(3, 3, seed=1)
    batch = weakref.ref(y0)
    solved(make_field(), y0, ragged(3, 2), compile="auto")
    del y0
    gc.collect()
    assert batch() is None


@pytest.mark.parametrize("damage", [b"", b"nonsense"])
def test_a_damaged_library_is_made_again(nothing_built, damage):
    build.library("double", "tanh")
    (path,) = (nothing_built / "cache").glob("*.so")
    path.unlink()
    path.write_bytes(damage)
    build._outcome.cache_clear()
    assert build.library("double", "tanh").skode_tile() > 0
    assert path.stat().st_size > 1000


def test_a_directory_that_others_may_write_to_is_not_trusted(nothing_built):
    shared = nothing_built / "cache"
    shared.mkdir()
    shared.chmod(0o777)
    assert build.cache_directory() is None
    assert build.library("double", "tanh").skode_tile() > 0
    assert not list(shared.iterdir())


def test_without_a_home_there_is_no_cache(nothing_built, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SKODE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(build.Path, "home", homeless)
    assert build.cache_directory() is None


def test_a_compiler_may_have_arguments(monkeypatch):
    monkeypatch.setenv("CXX", "sh -c")
    assert build.compiler() == ["sh", "-c"]


def test_a_compiler_that_fails_is_quoted(nothing_built, monkeypatch):
    broken = nothing_built / "broken"
    broken.write_text("#!/bin/sh\necho it is broken >&2\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(build.BuildError, match="it is broken"):
        build.library("double", "tanh")
    assert not list((nothing_built / "cache").glob("*.so"))


def test_a_library_that_cannot_be_loaded_is_in_the_way(nothing_built, monkeypatch):
    fake = nothing_built / "fake"
    fake.write_text(
        '#!/bin/sh\nfor last; do :; done\nwhile [ "$1" != -o ]; do shift;'
        ' done\necho nonsense > "$2"\n'
    )
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(fake))
    with pytest.raises(build.BuildError, match="made or loaded"):
        build.library("double", "tanh")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written_is_done_without(nothing_built):
    nothing_built.chmod(0o500)
    assert build.library("double", "tanh").skode_tile() > 0


def test_a_cache_that_is_a_file_is_done_without(nothing_built):
    (nothing_built / "cache").write_text("in the way")
    assert build.library("double", "tanh").skode_tile() > 0


def _tile(_):
    return build.library("float", "relu").skode_tile()


def test_processes_that_compile_at_once_share_one_library(nothing_built):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        tiles = pool.map(_tile, range(2), chunksize=1)
    assert tiles[0] == tiles[1] > 0
    assert len(list((nothing_built / "cache").glob("*float-relu*.so"))) == 1
