"""Rows are independent: company changes a row by rounding only."""

import pytest
import torch

from skode._engine.solve import solve
from skode._engine.tableau import TABLEAUX
from skode._nn.fields import MLPField
from tests.problems import CUBIC, normal, perceptron

# One row in five methods would do; all is cheap.
METHODS = list(TABLEAUX)
DTYPES = [torch.float32, torch.float64]
ROUNDING = {torch.float32: 5e-5, torch.float64: 1e-11}

# Spans from nothing to long: rows leave at very different times.
SPANS = [0.0, 0.02, 3.0, 0.3, -0.7, 1.0, 0.05, -2.0, 0.0, 0.5, 4.0, 0.1]


def batch(dtype):
    """Return y0 (B, D) and times (B, T), ragged, in both directions."""
    ends = torch.tensor(SPANS, dtype=dtype)[:, None]
    starts = torch.linspace(-0.5, 0.5, len(SPANS), dtype=dtype)[:, None]
    times = starts + ends * torch.tensor([0.0, 0.13, 0.5, 0.5, 1.0], dtype=dtype)
    times[3, 3:] = times[3, 2:3]  # padded
    return normal(len(SPANS), 3, seed=3, dtype=dtype), times


def solved(method, y0, times, rows, gradient=None):
    """Return ys and gradients per row of some of the rows."""
    dtype = y0.dtype
    field = perceptron(scale=3.0, dtype=dtype)
    y0, times = y0[rows].clone(), times[rows].clone()
    settings = {"method": method, "rtol": 1e-2, "atol": 1e-2, "step_size": 0.15}
    if gradient is None:
        return solve(field, y0, times, **settings).require_success().ys, None
    y0.requires_grad_(), times.requires_grad_()
    params = [param.requires_grad_() for param in field.params]
    ys = solve(field, y0, times, params=params, gradient=gradient, **settings).ys
    weights = normal(*batch(dtype)[1].shape, 3, seed=4, dtype=dtype)[rows]
    return ys.detach(), torch.autograd.grad((ys * weights).sum(), (y0, times, *params))


SELECTIONS = {
    "permuted": [7, 2, 11, 0, 9, 4, 1, 3, 10, 5, 8, 6],
    "reversed": list(range(12))[::-1],
    "split": [2, 3, 4, 6],
    "duplicated": [5, 5, 10, 10, 10, 0, 4, 4],
    "alone": [10],
}


@pytest.mark.parametrize("key", SELECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_company_does_not_change_a_row(method, dtype, key):
    y0, times = batch(dtype)
    whole, _ = solved(method, y0, times, list(range(12)))
    part, _ = solved(method, y0, times, SELECTIONS[key])
    bound = ROUNDING[dtype]
    if method == "dopri8" and dtype == torch.float32:
        # Its error estimate is itself rounding here, 1e-4 of the tolerance, and so
        # is the next step: the solution moves within the tolerance of 1e-2.
        bound = 5e-3
    torch.testing.assert_close(part, whole[SELECTIONS[key]], rtol=0, atol=bound)


@pytest.mark.parametrize(
    "gradient", ["checkpoint", "adjoint", "reversible", "backprop"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", ["rk4", "dopri5", "bosh3"])
def test_company_does_not_change_the_gradient_of_a_row(method, dtype, gradient):
    y0, times = batch(dtype)
    _, whole = solved(method, y0, times, list(range(12)), gradient)
    bound = 100 * ROUNDING[dtype]
    for rows in SELECTIONS.values():
        _, part = solved(method, y0, times, rows, gradient)
        for i in range(2):  # of y0 and times
            torch.testing.assert_close(part[i], whole[i][rows], rtol=bound, atol=bound)


@pytest.mark.parametrize(
    "gradient", ["checkpoint", "adjoint", "reversible", "backprop"]
)
@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_the_gradient_of_the_parameters_is_a_sum_over_rows(method, gradient):
    y0, times = batch(torch.float64)
    _, whole = solved(method, y0, times, list(range(12)), gradient)
    parts = [
        solved(method, y0, times, rows, gradient)[1]
        for rows in ([3, 0, 2], [1, 4, 5, 8, 11, 9], [6], [7, 10])
    ]
    for i in range(2, len(whole)):
        torch.testing.assert_close(
            sum(part[i] for part in parts), whole[i], rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("method", METHODS)
def test_statistics_belong_to_the_row(method):
    y0, times = batch(torch.float64)
    field = perceptron(scale=3.0)
    settings = {"method": method, "rtol": 1e-2, "atol": 1e-2, "step_size": 0.15}
    whole = solve(field, y0, times, **settings).stats
    for row in range(12):
        alone = solve(field, y0[[row]], times[[row]], **settings).stats
        for name in ("status", "t", "n_accepted", "n_rejected", "nfe"):
            assert getattr(alone, name)[0] == getattr(whole, name)[row], name
    assert torch.equal(whole.t, times[:, -1])
    assert whole.n_accepted[0] == 0
    assert len(set(whole.n_accepted.tolist())) > 3


def blow_up_or_decay(t, y):
    """Rows that start above 1 blow up before t = 1; those below do not."""
    return torch.where(y > 1, y**2, -y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_row_that_blows_up_does_not_change_its_neighbour(method, dtype):
    good = torch.tensor([[0.5, -0.3], [0.1, 0.2], [-1.0, 0.9]], dtype=dtype)
    bad = torch.tensor([[2.0, 0.5], [4.0, 3.0]], dtype=dtype)
    mixed = torch.stack((bad[0], good[0], good[1], bad[1], good[2]))
    times = torch.tensor([0.0, 0.4, 1.0, 3.0], dtype=dtype)
    settings = {"method": method, "rtol": 1e-2, "atol": 1e-3, "step_size": 0.05}
    alone = solve(blow_up_or_decay, good, times, **settings).require_success()
    together = solve(blow_up_or_decay, mixed, times, **settings)
    assert (together.stats.status != 0).tolist() == [True, False, False, True, False]
    assert together.ys[[0, 3], -1].isnan().all()
    torch.testing.assert_close(
        together.ys[[1, 2, 4]], alone.ys, rtol=0, atol=ROUNDING[dtype]
    )


@pytest.mark.parametrize("gradient", ["checkpoint", "reversible", "backprop"])
@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_a_row_that_blows_up_does_not_change_its_neighbours_gradient(method, gradient):
    start = torch.tensor([[2.0, 0.5], [0.5, -0.3]], dtype=torch.float64)
    times = torch.tensor([0.0, 0.4, 1.0, 3.0], dtype=torch.float64)
    grads = []
    for rows, good in (([0, 1], 1), ([1], 0)):
        y0 = start[rows].clone().requires_grad_()
        t = times.expand(len(rows), -1).clone().requires_grad_()
        ys = solve(
            blow_up_or_decay, y0, t, method=method, step_size=0.05, gradient=gradient
        ).ys
        grads.append([g[good] for g in torch.autograd.grad(ys[good].sum(), (y0, t))])
    for together, alone in zip(*grads, strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_t0_equal_to_t1_returns_y0(method):
    y0 = normal(3, 2, seed=5)
    times = torch.full((4,), 0.7, dtype=torch.float64)
    solution = solve(perceptron(dim=2), y0, times, method=method, step_size=0.1)
    assert torch.equal(solution.ys, y0[:, None].expand(-1, 4, -1))
    assert solution.stats.n_accepted.tolist() == [0, 0, 0]
    assert solution.stats.t.tolist() == [0.7, 0.7, 0.7]


@pytest.mark.parametrize("method", METHODS)
def test_a_single_time_returns_y0(method):
    y0 = normal(3, 2, seed=5)
    for times in (torch.tensor([0.3]).double(), torch.zeros(3, 1).double()):
        solution = solve(perceptron(dim=2), y0, times, method=method, step_size=0.1)
        assert torch.equal(solution.ys, y0[:, None])


@pytest.mark.parametrize("method", METHODS)
def test_one_row_of_one_dimension(method):
    y0 = CUBIC.y0()[:1]
    times = torch.linspace(0, 1, 4).double()
    solution = solve(
        CUBIC.field, y0, times, method=method, step_size=0.01, rtol=1e-5, atol=1e-5
    ).require_success()
    assert solution.ys.shape == (1, 4, 1)
    wanted = CUBIC.exact(y0, times[None])
    bound = 5e-3 if method == "euler" else 1e-4
    torch.testing.assert_close(solution.ys, wanted, rtol=0, atol=bound)


@pytest.mark.parametrize("shape", [(3,), (0, 3)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_no_rows(method, shape):
    y0 = torch.empty(0, 2)
    times = torch.linspace(0, 1, 3).expand(shape)
    solution = solve(perceptron(dim=2), y0, times, method=method, step_size=0.1)
    assert solution.require_success().ys.shape == (0, 3, 2)
    assert solution.y1.shape == (0, 2)
    for name in ("status", "t", "n_accepted", "n_rejected", "nfe"):
        assert getattr(solution.stats, name).shape == (0,)


@pytest.mark.parametrize(
    "gradient", [None, "checkpoint", "adjoint", "reversible", "backprop"]
)
@pytest.mark.parametrize("method", METHODS)
def test_arguments_are_left_as_they_are(method, gradient):
    """Also where rows have nothing to do, and are compacted away at once."""
    y0, times = batch(torch.float64)
    times[[1, 3, 6, 9, 11]] = times[[1, 3, 6, 9, 11], :1]
    before = y0.clone(), times.clone()
    settings = {"method": method, "rtol": 1e-2, "atol": 1e-2, "step_size": 0.15}
    if gradient is not None:
        y0.requires_grad_(), times.requires_grad_()
        settings["gradient"] = gradient
    solution = solve(perceptron(), y0, times, **settings)
    kept = solution.ys.detach().clone()
    if gradient is not None:
        solution.ys.sum().backward()
    assert torch.equal(y0, before[0])
    assert torch.equal(times, before[1])
    assert torch.equal(solution.ys, kept)
    # Nor does the solution share memory with the start.
    with torch.no_grad():
        solution.ys.zero_()
    assert torch.equal(y0, before[0])


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_a_start_may_be_a_view(method):
    wide = normal(3, 5, seed=6)
    times = torch.tensor([0.0, 0.2, 1.0], dtype=torch.float64)
    settings = {"method": method, "step_size": 0.1, "rtol": 1e-2, "atol": 1e-2}
    for view in (wide.T[:, 1:], wide[:, ::2], wide[:1, :3].expand(4, -1)):
        field = perceptron(dim=view.shape[1])
        ours = solve(field, view, times, **settings).ys
        plain = solve(field, view.contiguous(), times, **settings).ys
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-13)


class Fallible:
    """Rows whose derivatives are infinite where they start, or that blow up."""

    def __init__(self):
        self.a = torch.ones((), dtype=torch.float64, requires_grad=True)

    def __call__(self, t, y):
        return self.a * (y.abs().sqrt() + y**3)


IDLE = [
    ([0.0, 0.0], [0.0, 0.0, 0.0]),  # padding: the derivative there is no number
    ([1e60, 1e60], [0.0, 0.5, 1.0]),  # blows up
    ([torch.inf, 1.0], [0.0, 0.5, 1.0]),
    ([torch.nan, 1.0], [0.0, 0.0, 0.0]),
]


@pytest.mark.parametrize(
    "gradient", ["checkpoint", "adjoint", "reversible", "backprop"]
)
@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "dopri5", "dopri8"])
@pytest.mark.parametrize("field", [Fallible, lambda: MLPField(2, (8,)).double()])
def test_rows_that_fail_or_stay_have_no_part_in_the_gradient(method, gradient, field):
    def gradients(rows):
        torch.manual_seed(0)
        rhs = field()
        params = [rhs.a] if isinstance(rhs, Fallible) else list(rhs.parameters())
        y0 = torch.tensor([row[0] for row in rows], dtype=torch.float64)
        t = torch.tensor([row[1] for row in rows], dtype=torch.float64)
        y0.requires_grad_(), t.requires_grad_()
        settings = {"method": method, "step_size": 0.1, "max_steps": 500}
        ys = solve(rhs, y0, t, params=params, gradient=gradient, **settings).ys
        return torch.autograd.grad(ys[:2].square().sum(), (y0, t, *params))

    good = [([0.5, 0.3], [0.0, 0.1, 0.2]), ([0.4, -0.9], [0.0, 0.15, 0.25])]
    with torch.random.fork_rng():
        alone, company = gradients(good), gradients(good + IDLE)
    for ours, wanted in zip(company[:2], alone[:2], strict=True):
        torch.testing.assert_close(ours[:2], wanted, rtol=1e-8, atol=1e-10)
        assert not torch.nan_to_num(ours[2:], nan=0.0).any()
    for ours, wanted in zip(company[2:], alone[2:], strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-8, atol=1e-10)
