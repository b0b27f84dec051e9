"""What the door says to callers who pass something else."""

import pytest
import torch

from skode._engine.borrowed import BORROWED
from skode._engine.solve import ADAPTIVE, FIXED_STEP, METHODS, solve
from tests.problems import DECAY

Y0 = torch.ones(2, 3)
T = torch.tensor([0.0, 1.0])


def ask(y0=Y0, t=T, **settings):
    return solve(DECAY.field, y0, t, **settings)


@pytest.mark.parametrize("t", [torch.empty(0), torch.empty(2, 0)], ids=str)
def test_no_times(t):
    with pytest.raises(ValueError, match="at least one time"):
        ask(t=t)


@pytest.mark.parametrize("t", [torch.tensor(1.0), torch.zeros(2, 1, 1)], ids=str)
def test_times_of_a_wrong_rank(t):
    with pytest.raises(ValueError, match=r"shape \(times,\) or \(rows, times\), got"):
        ask(t=t)


def test_times_of_other_rows():
    with pytest.raises(ValueError, match=r"each of the 2 rows of y0, got \(3, 2\)"):
        ask(t=torch.zeros(3, 2))


@pytest.mark.parametrize("y0", [torch.ones(3), torch.ones(2, 3, 1), torch.ones(2, 0)])
def test_states_of_a_wrong_shape(y0):
    with pytest.raises(ValueError, match=r"y0 must have shape \(rows, state\)") as e:
        ask(y0=y0)
    assert str(tuple(y0.shape)) in str(e.value)


@pytest.mark.parametrize("bad", [[1.0], torch.ones(2, 3, dtype=torch.int64), None])
@pytest.mark.parametrize("name", ["y0", "t"])
def test_arguments_that_are_no_floats(name, bad):
    kind = str(bad.dtype) if isinstance(bad, torch.Tensor) else type(bad).__name__
    with pytest.raises(
        TypeError, match=f"{name} must be a tensor of floats, got {kind}"
    ):
        ask(**{name: bad})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_times_that_are_not_finite(bad):
    with pytest.raises(ValueError, match="t must be finite; pad short rows"):
        ask(t=torch.tensor([[0.0, 1.0], [0.0, bad]]))


@pytest.mark.parametrize(
    "t",
    [
        torch.tensor([0.0, 1.0, 0.5]),
        torch.tensor([[0.0, 0.5, 1.0], [1.0, 0.0, 0.5]]),
        torch.tensor([1.0, 1.0, 0.5, 0.7]),
    ],
    ids=str,
)
def test_times_that_turn_back(t):
    with pytest.raises(ValueError, match="t must not turn back"):
        ask(t=t)


def test_rows_may_go_in_different_directions():
    t = torch.tensor([[0.0, 0.5, 1.0], [1.0, 0.5, 0.0]])
    assert ask(t=t).require_success().ys.shape == (2, 3, 3)


@pytest.mark.parametrize("method", ["rk5", "", "DOPRI5"])
def test_an_unknown_method_lists_those_there_are(method):
    with pytest.raises(ValueError, match=f"no solver {method!r}") as error:
        ask(method=method)
    for name in METHODS:
        assert name in str(error.value)


@pytest.mark.parametrize("method", FIXED_STEP)
def test_a_fixed_step_needs_its_size(method):
    with pytest.raises(ValueError, match="pass step_size, for example") as error:
        ask(method=method)
    assert repr(method) in str(error.value)
    assert all(name in str(error.value) for name in ADAPTIVE)


def test_every_method_is_adaptive_or_not():
    assert set(ADAPTIVE) | set(FIXED_STEP) == set(METHODS)
    assert not set(ADAPTIVE) & set(FIXED_STEP)
    assert {"euler", "midpoint", "heun2", "rk4"} <= set(FIXED_STEP)


def test_an_unknown_gradient_lists_those_there_are():
    with pytest.raises(ValueError, match="gradient must be one of") as error:
        ask(gradient="autograd")
    for name in ("auto", "checkpoint", "adjoint", "reversible", "backprop"):
        assert repr(name) in str(error.value)


@pytest.mark.parametrize("method", BORROWED)
def test_only_our_own_solvers_are_reversible(method):
    with pytest.raises(ValueError, match="needs a solver of our own") as error:
        ask(gradient="reversible", method=method, step_size=0.1)
    assert repr(method) in str(error.value)
    assert "dopri5" in str(error.value)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_both_tolerances_zero(method):
    with pytest.raises(ValueError, match="rtol and atol must not both be 0"):
        ask(rtol=0.0, atol=0.0, method=method, step_size=0.1)


@pytest.mark.parametrize("name", ["rtol", "atol"])
def test_one_tolerance_may_be_zero(name):
    solution = ask(**{name: 0.0}).require_success()
    wanted = torch.full_like(solution.y1, float(torch.exp(torch.tensor(-1.0))))
    torch.testing.assert_close(solution.y1, wanted, rtol=1e-2, atol=0)


@pytest.mark.parametrize("bad", [-1e-3, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["rtol", "atol"])
def test_tolerances_that_are_none(name, bad):
    with pytest.raises(ValueError, match=f"{name} must be a number >= 0, got {bad!r}"):
        ask(**{name: bad})


@pytest.mark.parametrize("bad", [0.0, -0.1, float("nan"), float("inf")])
def test_step_sizes_that_are_none(bad):
    with pytest.raises(ValueError, match=f"step_size must be a number > 0, got {bad}"):
        ask(method="rk4", step_size=bad)


@pytest.mark.parametrize("bad", [0, -3])
def test_no_steps_at_all(bad):
    with pytest.raises(ValueError, match=f"max_steps must be at least 1, got {bad}"):
        ask(max_steps=bad)


def test_parts_must_make_up_the_state():
    with pytest.raises(ValueError, match=r"parts must sum to 3, got \(1, 1\)"):
        solve(lambda t, y: -y, torch.ones(2, 3), torch.tensor([0.0, 1.0]), parts=(1, 1))


@pytest.mark.parametrize("first_step", [0.0, -1.0, float("inf")])
def test_first_step_must_be_positive(first_step):
    t = torch.tensor([0.0, 1.0])
    with pytest.raises(ValueError, match="first_step must be a number > 0"):
        solve(lambda t, y: -y, torch.ones(2, 3), t, first_step=first_step)
