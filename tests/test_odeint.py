"""`skode.odeint` and `skode.odeint_adjoint` against torchdiffeq and closed forms.

B rows, D state, T times; nothing here is batched: a state of any shape is one row.
"""

import warnings

import pytest
import torch
import torchdiffeq
from torch import nn

from skode import SolverError, odeint, odeint_adjoint

ADAPTIVE = ("dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun")
FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4")
ADAMS = ("explicit_adams", "implicit_adams", "fixed_adams")
BOTH = pytest.mark.parametrize("solver", [odeint, odeint_adjoint])

TIMES = torch.tensor([0.2, 0.5, 1.1, 1.3], dtype=torch.float64)
TIGHT = {"rtol": 1e-10, "atol": 1e-12}


class Swirl(nn.Module):
    """dy/dt = tanh(A y) sin t + b, with a parameter that nobody uses."""

    def __init__(self, dim=3):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        numbers = torch.randn(dim, dim, dtype=torch.float64, generator=generator)
        self.A = nn.Parameter(numbers)
        self.b = nn.Parameter(torch.full((dim,), 0.3, dtype=torch.float64))
        self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.calls = 0

    def forward(self, t, y):
        self.calls += 1
        return torch.tanh(y @ self.A) * torch.sin(t) + self.b


def start(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def decay(t, y):
    return -y


def stiff(t, y):
    """Prothero and Robinson: y = cos t attracts at a rate of 1e8."""
    return -1e8 * (y - torch.cos(t))


def explode(t, y):
    """y = 1 / (1 - t) from y(0) = 1."""
    return y.square()


def test_both_are_public():
    import skode

    assert {"odeint", "odeint_adjoint"} <= set(skode.__all__)


class TestMethods:
    @pytest.mark.parametrize("backwards", [False, True])
    @pytest.mark.parametrize("method", ADAPTIVE)
    def test_adaptive(self, method, backwards):
        loose = method in ("fehlberg2", "adaptive_heun")
        tols = {"rtol": 1e-5, "atol": 1e-7} if loose else {"rtol": 1e-9, "atol": 1e-11}
        t = TIMES.flip(0) if backwards else TIMES
        field, y0 = Swirl(), start(2, 3)
        ours = odeint(field, y0, t, method=method, **tols)
        exact = torchdiffeq.odeint(field, y0, t, **TIGHT)
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e3 * tols["rtol"])

    @pytest.mark.parametrize("method", (*FIXED, *ADAMS))
    def test_fixed_steps(self, method):
        """Of 1/128, which divides the span in whole steps, as torchdiffeq's do."""
        t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
        options = {"step_size": 2.0**-7}
        if method == "explicit_adams":
            options["max_order"] = 4
        field, y0 = Swirl(), start(3)
        ours = odeint(field, y0, t, method=method, options=options)
        theirs = torchdiffeq.odeint(field, y0, t, method=method, options=options)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("method", FIXED)
    def test_without_a_step_size_the_times_are_the_grid(self, method):
        field, y0 = Swirl(), start(3)
        ours = odeint(field, y0, TIMES, method=method)
        assert torch.equal(ours, torchdiffeq.odeint(field, y0, TIMES, method=method))

    @pytest.mark.filterwarnings("ignore:.*have no effect.*min_step")
    @pytest.mark.parametrize("name", ["RK45", "DOP853", "Radau", "BDF", "LSODA"])
    def test_scipy(self, name):
        options, field, y0 = {"solver": name}, Swirl(), start(3)
        settings = {"rtol": 1e-8, "atol": 1e-10, "options": options}
        ours = odeint(field, y0, TIMES, method="scipy_solver", **settings)
        exact = torchdiffeq.odeint(field, y0, TIMES, **TIGHT)
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-5)

    def test_one_that_torchdiffeq_lacks(self):
        y = odeint(decay, start(3), TIMES, method="tsit5", **TIGHT)
        exact = start(3) * torch.exp(TIMES[0] - TIMES)[:, None]
        torch.testing.assert_close(y, exact, rtol=0, atol=1e-9)

    @BOTH
    def test_none_of_that_name(self, solver):
        with pytest.raises(ValueError, match=r"no method 'rk45'.*tsit5.*fehlberg2"):
            solver(Swirl(), start(3), TIMES, method="rk45")

    def test_ours_alone_names_what_it_reads(self):
        with pytest.raises(ValueError, match=r"'tsit5'.*max_num_steps.*'dopri5'"):
            odeint(decay, start(3), TIMES, method="tsit5", options={"max_step": 0.1})


class TestShapes:
    @BOTH
    @pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (2, 1, 3)])
    def test_any(self, solver, shape):
        settings = {"adjoint_params": ()} if solver is odeint_adjoint else {}
        y0 = start(*shape)
        y = solver(decay, y0, TIMES, **TIGHT, **settings)
        rate = torch.exp(TIMES[0] - TIMES).view(-1, *(1 for _ in shape))
        torch.testing.assert_close(y, rate * y0, rtol=0, atol=1e-9)
        assert torch.equal(y[0], y0)

    def test_strides_are_the_callers_own_affair(self):
        y0 = start(3, 2).T
        y = odeint(decay, y0, TIMES, **TIGHT)
        exact = torchdiffeq.odeint(decay, y0, TIMES, **TIGHT)
        torch.testing.assert_close(y, exact, rtol=0, atol=1e-9)

    @BOTH
    def test_tuple(self, solver):
        def field(t, y):
            position, velocity, still = y
            return velocity, -position, torch.zeros_like(still)

        settings = {"adjoint_params": ()} if solver is odeint_adjoint else {}
        y0 = (torch.ones(2, 1), torch.zeros(2, 1), torch.tensor(7.0))
        t = torch.tensor([0.0, 1.0, 2.0])
        y = solver(field, y0, t, rtol=1e-5, atol=1e-6, **settings)
        assert isinstance(y, tuple)
        assert [part.shape for part in y] == [(3, 2, 1), (3, 2, 1), (3,)]
        torch.testing.assert_close(y[0][:, 0, 0], torch.cos(t), rtol=0, atol=1e-4)
        torch.testing.assert_close(y[1][:, 1, 0], -torch.sin(t), rtol=0, atol=1e-4)
        assert torch.equal(y[2], torch.full((3,), 7.0))

    def test_the_error_of_each_part_of_a_tuple_counts(self):
        """One fast number beside 9999 at rest: their common mean would hide it."""

        def field(t, y):
            return torch.cos(20 * t) * 20 * torch.ones_like(y[0]), 0 * y[1]

        t = torch.tensor([0.0, 1.0], dtype=torch.float64)
        y0 = torch.zeros(1, dtype=torch.float64), torch.zeros(9999, dtype=torch.float64)
        fast, _ = odeint(field, y0, t, rtol=0, atol=1e-6)
        assert abs(fast[-1].item() - torch.sin(20 * t[-1]).item()) < 1e-5

    @BOTH
    def test_complex(self, solver):
        settings = {"adjoint_params": ()} if solver is odeint_adjoint else {}
        y0 = torch.tensor([1.0 + 0.5j, 2.0], dtype=torch.complex128)
        y = solver(lambda t, y: 1j * y, y0, TIMES, **TIGHT, **settings)
        exact = y0 * torch.exp(1j * (TIMES - TIMES[0]))[:, None]
        torch.testing.assert_close(y, exact, rtol=0, atol=1e-8)

    def test_one_time(self):
        y0 = start(2, 3)
        assert torch.equal(odeint(decay, y0, TIMES[:1]), y0[None])

    def test_times_keep_their_precision_when_states_do_not(self):
        """At t = 1e6 a float32 cannot tell times a hundredth apart."""
        t = torch.tensor([1e6, 1e6 + 0.01], dtype=torch.float64)
        y = odeint(lambda t, y: torch.ones_like(y), torch.zeros(1), t)
        assert abs(y[-1].item() - 0.01) < 1e-6

    def test_dtype_and_shape_of_the_slope_follow_the_state(self):
        y0 = torch.zeros(3)
        t = torch.tensor([0.0, 2.0])
        for slope in (torch.tensor(1), torch.ones(1, 3, dtype=torch.float64)):
            y = odeint(lambda t, y, slope=slope: slope, y0, t)
            torch.testing.assert_close(y[-1], torch.full((3,), 2.0))

    def test_states_that_the_field_keeps_stay_as_they_were(self):
        kept, copies = [], []

        def field(t, y):
            kept.append(y)
            copies.append(y.clone())
            return -y

        odeint(field, start(2, 3), TIMES)
        assert all(map(torch.equal, kept, copies))

    @pytest.mark.parametrize("slope", [torch.ones(2), torch.ones(3, 3)])
    def test_slope_of_another_shape(self, slope):
        with pytest.raises(ValueError, match=r"derivative of y's shape, \(3,\)"):
            odeint(lambda t, y: slope, start(3), TIMES)

    def test_slope_that_is_no_tensor(self):
        with pytest.raises(TypeError, match="func must return a tensor"):
            odeint(lambda t, y: 1.0, start(3), TIMES)

    def test_slopes_fewer_than_states(self):
        with pytest.raises(ValueError, match="a tuple of 2 derivatives"):
            odeint(lambda t, y: (y[0],), (start(3), start(2)), TIMES)


def gradients(solver, field, y0, t, **settings):
    """Return the gradient of a loss that looks at all times, in one list."""
    y0, t = y0.clone().requires_grad_(), t.clone().requires_grad_()
    y = solver(field, y0, t, **settings)
    loss = (y * torch.arange(1, len(t) + 1).view(-1, *(1 for _ in y0.shape))).square()
    inputs = (y0, t, field.A, field.b)
    return torch.autograd.grad(loss.sum(), inputs)


def assert_all_close(ours, theirs, atol):
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=atol, atol=atol)


class TestGradients:
    @BOTH
    @pytest.mark.parametrize("backwards", [False, True])
    @pytest.mark.parametrize("method", ["dopri5", "tsit5", "dopri8"])
    def test_against_torchdiffeq(self, solver, backwards, method):
        t = TIMES.flip(0) if backwards else TIMES
        tols = {"rtol": 1e-9, "atol": 1e-11}
        exact = gradients(torchdiffeq.odeint, Swirl(), start(2, 3), t, **TIGHT)
        ours = gradients(solver, Swirl(), start(2, 3), t, method=method, **tols)
        assert_all_close(ours, exact, 1e-6)

    @pytest.mark.parametrize("method", ["dopri5", "rk4", "euler"])
    def test_are_those_of_the_computed_solution(self, method):
        """Finite differences of what fixed steps compute, however coarse they are."""
        options = {"step_size": 0.2} if method != "dopri5" else {}
        settings = {"method": method, "options": options}
        field, y0 = Swirl(), start(2, 3).requires_grad_()
        t = TIMES.clone().requires_grad_()

        def module(y0, t):
            return odeint(field, y0, t, **settings)

        def function(y0, t, A, b):
            def rate(t, y):
                return torch.tanh(y @ A) * torch.sin(t) + b

            return odeint(rate, y0, t, **settings)

        assert torch.autograd.gradcheck(module, (y0, t))
        assert torch.autograd.gradcheck(function, (y0, t, field.A, field.b))

    def test_of_the_adjoint_are_those_of_the_exact_solution(self):
        field, y0 = Swirl(2), start(2).requires_grad_()
        t = TIMES.clone().requires_grad_()

        def adjoint(y0, t, A, b):
            def rate(t, y):
                return torch.tanh(y @ A) * torch.sin(t) + b

            return odeint_adjoint(rate, y0, t, adjoint_params=(A, b))

        assert torch.autograd.gradcheck(adjoint, (y0, t, field.A, field.b), atol=1e-5)

    def test_modules_and_functions_agree(self):
        """The one takes checkpoints of its steps, the other every operation."""
        field = Swirl()
        module = gradients(odeint, field, start(2, 3), TIMES)
        function = gradients(
            lambda _, *args: odeint(lambda t, y: field(t, y), *args),
            field,
            start(2, 3),
            TIMES,
        )
        assert_all_close(module, function, 1e-11)

    def test_of_tuples(self):
        weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

        def field(t, y):
            return weight * y[1], -y[0] * t

        def loss(solver, **settings):
            y0 = start(2).requires_grad_(), start(2, seed=2).requires_grad_()
            a, b = solver(field, y0, TIMES, **TIGHT, **settings)
            total = a.square().sum() + (a * b).sum()
            return torch.autograd.grad(total, (*y0, weight))

        theirs = loss(torchdiffeq.odeint)
        assert_all_close(loss(odeint), theirs, 1e-8)
        assert_all_close(loss(odeint_adjoint, adjoint_params=[weight]), theirs, 1e-8)

    def test_of_a_parameter_that_is_not_used(self):
        """As in torchdiffeq: none, and for the adjoint, 0."""
        field, y0 = Swirl(), start(3)
        odeint(field, y0, TIMES)[-1].sum().backward()
        assert field.unused.grad is None
        odeint_adjoint(field, y0, TIMES)[-1].sum().backward()
        assert torch.equal(field.unused.grad, torch.zeros(2, dtype=torch.float64))

    @pytest.mark.parametrize("since", [0.0, 0.6])
    @pytest.mark.parametrize("module", [False, True])
    def test_of_what_the_field_reaches_outside_itself(self, module, since):
        """Though y0 and t need none, and the field has no parameters."""
        scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

        class Outside(nn.Module):
            def forward(self, t, y):
                return -scale * y if t >= since else -0.5 * y

        field = Outside() if module else Outside().forward
        y0 = start(3)
        y = odeint(field, y0, TIMES, **TIGHT)[-1]
        (ours,) = torch.autograd.grad(y.sum(), scale)
        reached = TIMES[-1] - max(since, TIMES[0].item())
        exact = (-reached * y0 * torch.exp(-0.5 * (TIMES[-1] - TIMES[0]))).sum()
        torch.testing.assert_close(ours, exact, rtol=1e-2 if since else 1e-8, atol=0)

    @pytest.mark.parametrize("field", [decay, nn.Tanh()], ids=["function", "module"])
    def test_of_nothing(self, field):
        def rate(t, y):
            return field(t, y) if field is decay else field(y)

        assert not odeint(rate, start(3), TIMES).requires_grad

    def test_of_what_a_module_with_parameters_reaches_only_later(self):
        scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

        class Later(nn.Module):
            def __init__(self):
                super().__init__()
                self.own = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

            def forward(self, t, y):
                return -self.own * y if t < 0.6 else -scale * y

        field, y0 = Later(), start(3)
        y = odeint(field, y0, TIMES, **TIGHT)[-1]
        ours = torch.autograd.grad(y.sum(), (field.own, scale))
        end = (y0 * torch.exp(-0.5 * (TIMES[-1] - TIMES[0]))).sum()
        # A step that is smooth passes over the corner, and counts as either's.
        assert_all_close(ours, (-0.4 * end, -0.7 * end), 2e-2)

    @pytest.mark.parametrize("method", ["dopri5", "tsit5"])
    def test_large_states_are_computed_again_and_small_ones_kept(self, method):
        """7000 numbers have a step of 49000 that is kept, 20000 one that is not."""
        for rows, again in ((7000, False), (20_000, True)):
            field, y0 = Swirl(1), start(rows, 1).requires_grad_()
            y = odeint(field, y0, TIMES, method=method)
            calls = field.calls
            y.square().sum().backward()
            assert (field.calls > calls) is again
            ours = y0.grad, field.A.grad, field.b.grad
            field.zero_grad()
            y0.grad = None
            y = odeint(field.forward, y0, TIMES, method=method)
            y.square().sum().backward()
            assert_all_close(ours, (y0.grad, field.A.grad, field.b.grad), 1e-9)

    def test_a_graph_can_be_walked_again(self):
        field, y0 = Swirl(), start(3).requires_grad_()
        t = TIMES.clone().requires_grad_()
        loss = odeint(field, y0, t).square().sum()
        inputs = (y0, t, field.A)
        once = torch.autograd.grad(loss, inputs, create_graph=True)
        twice = torch.autograd.grad(loss, inputs, retain_graph=True)
        again = torch.autograd.grad(loss, inputs)
        assert_all_close(once, twice, 1e-12)
        assert all(map(torch.equal, twice, again))

    def test_steps_that_were_refused_have_no_part(self):
        """The first step is far too long, and so are some behind the corner."""

        class Corner(nn.Module):
            def __init__(self):
                super().__init__()
                self.rate = nn.Parameter(torch.tensor(9.0, dtype=torch.float64))

            def forward(self, t, y):
                return self.rate * torch.tanh(50 * (t - 0.7)) * y

        field, y0 = Corner(), start(3).requires_grad_()
        settings = {"rtol": 1e-7, "atol": 1e-9, "options": {"first_step": 1.0}}
        for t in (TIMES, TIMES[[0, -1]]):
            y = odeint(field, y0, t, **settings)
            ours = torch.autograd.grad(y.sum(), (y0, field.rate))
            y = odeint(field.forward, y0, t, **settings)
            exact = torch.autograd.grad(y.sum(), (y0, field.rate))
            assert_all_close(ours, exact, 1e-10)

    def test_through_a_tensor_made_before_the_solve(self):
        seed = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        rate = seed.exp()
        y0 = start(3)
        y = odeint_adjoint(
            lambda t, y: -rate * y, y0, TIMES, adjoint_params=(rate,), **TIGHT
        )
        (ours,) = torch.autograd.grad(y[-1].sum(), seed)
        span = TIMES[-1] - TIMES[0]
        exact = (-span * rate * y0 * torch.exp(-span * rate)).sum()
        torch.testing.assert_close(ours, exact, rtol=1e-8, atol=0)

    def test_of_gradients(self):
        def penalty(solver):
            field, y0 = Swirl(), start(3).requires_grad_()
            y = solver(field, y0, TIMES, **TIGHT)[-1]
            (slope,) = torch.autograd.grad(y.square().sum(), y0, create_graph=True)
            return torch.autograd.grad(slope.square().sum(), (y0, field.A))

        assert_all_close(penalty(odeint), penalty(torchdiffeq.odeint), 1e-7)

    def test_a_field_that_is_a_gradient_itself(self):
        """Of a Hamiltonian net, say; it counts on autograd being on."""

        class Downhill(nn.Module):
            def __init__(self):
                super().__init__()
                self.k = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

            def forward(self, t, y):
                energy = 0.5 * self.k * y.square().sum()
                return -torch.autograd.grad(energy, y, create_graph=True)[0]

        field, y0 = Downhill(), start(3).requires_grad_()
        y = odeint(field, y0, TIMES, **TIGHT)[-1]
        (ours,) = torch.autograd.grad(y.sum(), field.k)
        span = TIMES[-1] - TIMES[0]
        exact = (-span * y0 * torch.exp(-2 * span)).sum()
        torch.testing.assert_close(ours, exact, rtol=1e-7, atol=0)

    def test_none_is_recorded_where_autograd_is_off(self):
        with torch.no_grad():
            y = odeint(Swirl(), start(3).requires_grad_(), TIMES)
        assert not y.requires_grad


class TestOptions:
    def test_step_size(self):
        field = Swirl()
        odeint(
            field, start(3), TIMES[[0, -1]], method="euler", options={"step_size": 0.1}
        )
        assert field.calls == 11  # over a span of 1.1

    def test_first_step(self):
        """The first evaluation inside the first step stands at a fifth of it."""
        times = []

        def field(t, y):
            times.append(t.item())
            return -y

        for first in (0.25, torch.tensor(0.25)):
            for t, sign in ((TIMES, 1), (TIMES.flip(0), -1)):
                times.clear()
                odeint(field, start(3), t, options={"first_step": first})
                assert abs(times[1] - (t[0].item() + sign * 0.05)) < 1e-12

    @BOTH
    def test_max_num_steps(self, solver):
        with pytest.raises(
            SolverError, match=r"took 9 steps.*'max_num_steps'"
        ) as caught:
            solver(Swirl(), start(3), TIMES, options={"max_num_steps": 3}, **TIGHT)
        assert caught.value.status == "MAX_STEPS"
        assert 0.2 <= caught.value.t[0] < 1.3

    def test_max_num_steps_is_for_each_interval(self):
        t = torch.linspace(0, 10, 200, dtype=torch.float64)
        options = {"max_num_steps": 2}
        y = odeint(decay, start(3), t, rtol=1e-6, atol=1e-8, options=options)
        torchdiffeq.odeint(decay, start(3), t, rtol=1e-6, atol=1e-8, options=options)
        exact = start(3) * torch.exp(-t)[:, None]
        torch.testing.assert_close(y, exact, rtol=0, atol=1e-4)

    @pytest.mark.parametrize(
        ("method", "options"),
        [
            ("dopri5", {"norm": lambda y: y.abs().max()}),
            ("dopri5", {"jump_t": TIMES[1:2] + 0.1}),
            ("dopri5", {"step_t": TIMES[1:2] + 0.1}),
            ("dopri5", {"min_step": 0.3}),
            ("dopri5", {"max_step": 0.01}),
            ("dopri5", {"safety": 0.5}),
            ("dopri5", {"ifactor": 2.0}),
            ("dopri5", {"dfactor": 0.5}),
            ("dopri5", {"dtype": torch.float32}),
            ("rk4", {"step_size": 0.3, "perturb": True}),
            ("rk4", {"step_size": 0.3, "interp": "cubic"}),
            (
                "rk4",
                {
                    "grid_constructor": lambda f, y, t: torch.cat((t, t + 0.01)).sort()[
                        0
                    ][:-1]
                },
            ),
            ("implicit_adams", {"step_size": 0.01, "max_iters": 9, "max_order": 5}),
        ],
        ids=lambda value: value if isinstance(value, str) else next(reversed(value)),
    )
    @BOTH
    def test_what_torchdiffeq_alone_reads(self, solver, method, options):
        field, y0 = Swirl(), start(3)
        settings = {"method": method, "options": options}
        ours = solver(field, y0, TIMES, **settings)
        theirs = getattr(torchdiffeq, solver.__name__)(field, y0, TIMES, **settings)
        assert torch.equal(ours, theirs)

    def test_an_option_of_another_method_is_not_swallowed(self):
        with pytest.warns(UserWarning, match="Unexpected arguments.*step_size"):
            odeint(decay, start(3), TIMES, options={"step_size": 0.1})

    @pytest.mark.parametrize("name", ["first_step", "step_size"])
    def test_a_step_that_is_none(self, name):
        method = "dopri5" if name == "first_step" else "rk4"
        with pytest.raises(ValueError, match=f"{name} must be a number > 0"):
            odeint(decay, start(3), TIMES, method=method, options={name: -1.0})

    def test_options_stay_as_they_were(self):
        options, adjoint_options = {"max_num_steps": 99}, {"norm": "seminorm"}
        odeint_adjoint(
            Swirl(), start(3), TIMES, options=options, adjoint_options=adjoint_options
        )
        assert options == {"max_num_steps": 99}
        assert adjoint_options == {"norm": "seminorm"}

    def test_tolerances_of_each_tensor(self):
        def field(t, y):
            return -y[0], y[1] * torch.cos(9 * t)

        y0 = start(3), start(2)
        tols = {"rtol": (1e-3, 1e-8), "atol": (1e-3, torch.tensor(1e-9))}
        ours = odeint(field, y0, TIMES, **tols)
        theirs = torchdiffeq.odeint(field, y0, TIMES, **tols)
        assert all(map(torch.equal, ours, theirs))

    def test_tolerances_may_be_tensors(self):
        tols = {
            name: torch.tensor(value, dtype=torch.float64)
            for name, value in TIGHT.items()
        }
        y = odeint(decay, start(3), TIMES, **tols)
        assert torch.equal(y, odeint(decay, start(3), TIMES, **TIGHT))

    @BOTH
    def test_events(self, solver):
        settings = {"adjoint_params": ()} if solver is odeint_adjoint else {}

        def event(t, y):
            return y[0] - 0.5

        y0 = torch.ones(1, dtype=torch.float64)
        t, y = solver(
            decay, y0, TIMES[:2], event_fn=event, rtol=1e-9, atol=1e-9, **settings
        )
        assert abs(t.item() - (0.2 + torch.log(torch.tensor(2.0)).item())) < 1e-6
        assert abs(y[-1].item() - 0.5) < 1e-6
        # torchdiffeq's own function for gradients of the event's time takes ours.
        again, _ = torchdiffeq.odeint_event(
            decay, y0, TIMES[0], event_fn=event, odeint_interface=solver,
            rtol=1e-9, atol=1e-9, **settings,
        )  # fmt: skip
        torch.testing.assert_close(again, t)

    @BOTH
    @pytest.mark.parametrize("name", ["callback_step", "callback_accept_step"])
    def test_callbacks(self, solver, name):
        told = []
        field = Swirl()
        setattr(field, name, lambda t, y, dt: told.append(float(t.detach())))
        solver(field, start(3), TIMES)
        assert told[0] == 0.2

    def test_callbacks_of_the_adjoint(self):
        told = []
        field = Swirl()
        field.callback_step_adjoint = lambda t, y, dt: told.append(float(t))
        odeint_adjoint(field, start(3).requires_grad_(), TIMES)[-1].sum().backward()
        assert told[0] == 1.3

    @pytest.mark.parametrize(
        "t", [torch.tensor([0.0, 1.0, 1.0]), torch.tensor([0.0, 1.0, 0.5])]
    )
    def test_times_that_stand_still_or_turn_back(self, t):
        with pytest.raises(AssertionError, match="strictly increasing or decreasing"):
            odeint(decay, torch.ones(2), t)


class TestAdjoint:
    def test_a_function_must_name_its_parameters(self):
        with pytest.raises(ValueError, match=r"torch\.nn\.Module.*adjoint_params=\(\)"):
            odeint_adjoint(decay, start(3), TIMES)

    def test_params(self):
        """Gradients for those, and for no others."""
        field = Swirl()
        y = odeint_adjoint(field, start(3), TIMES, adjoint_params=iter([field.b]))
        y[-1].sum().backward()
        assert field.A.grad is None
        assert field.b.grad.abs().min() > 0

    def test_params_without_gradient(self):
        field = Swirl()
        field.A.requires_grad_(False)
        odeint_adjoint(field, start(3), TIMES)[-1].sum().backward()
        assert field.A.grad is None
        assert field.b.grad.abs().min() > 0

    @pytest.mark.parametrize(
        "settings",
        [
            {"adjoint_method": "dopri8"},
            {"adjoint_method": "fehlberg2", "adjoint_rtol": 1e-6, "adjoint_atol": 1e-6},
            {"adjoint_method": "rk4", "adjoint_options": {"step_size": 0.01}},
            {"adjoint_options": {"norm": "seminorm"}},
            {"adjoint_options": {"norm": lambda state: state[1].abs().max()}},
            {"adjoint_options": {"first_step": 0.01, "max_num_steps": 10_000}},
            {"options": {"first_step": 0.1}},
            {"options": {"norm": lambda y: y.abs().max()}},
            {"method": "rk4", "options": {"step_size": 0.01}},
        ],
        ids=lambda settings: "-".join(settings),
    )
    def test_how_to_solve_backwards(self, settings):
        exact = gradients(torchdiffeq.odeint, Swirl(), start(3), TIMES, **TIGHT)
        tols = {"rtol": 1e-8, "atol": 1e-10}
        ours = gradients(odeint_adjoint, Swirl(), start(3), TIMES, **tols, **settings)
        # torchdiffeq's fehlberg2 errs by thousands of its tolerances.
        loose = settings.get("adjoint_method") == "fehlberg2"
        assert_all_close(ours, exact, 1e-2 if loose else 1e-4)

    def test_its_tolerance_is_its_own(self):
        spent = []
        for tol in (1e-3, 1e-9):
            field = Swirl()
            settings = {"adjoint_rtol": tol, "adjoint_atol": tol}
            y = odeint_adjoint(field, start(3), TIMES, **settings)
            field.calls = 0
            y[-1].sum().backward()
            spent.append(field.calls)
        assert spent[0] < 0.5 * spent[1]

    def test_options_of_another_method_cannot_be_guessed(self):
        with pytest.raises(ValueError, match=r"adjoint_method='rk4'.*adjoint_options"):
            odeint_adjoint(
                Swirl(), start(3), TIMES, options={"first_step": 0.1},
                adjoint_method="rk4",
            )  # fmt: skip

    def test_a_solve_that_fails_backwards_says_so(self):
        y = odeint_adjoint(
            Swirl(), start(3), TIMES, adjoint_options={"max_num_steps": 1}
        )
        with pytest.raises(SolverError, match=r"backwards.*odeint.*adjoint_options"):
            y[-1].sum().backward()

    def test_second_derivatives_are_refused(self):
        y0 = start(3).requires_grad_()
        y = odeint_adjoint(Swirl(), y0, TIMES)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(y.sum(), y0, create_graph=True)


SPAN = torch.tensor([0.0, 2.0], dtype=torch.float64)
IN_TORCHDIFFEQ = {"safety": 0.9}  # their default, which sends a solve there


class TestFailures:
    """No assertion "underflow in dt" reaches the caller."""

    @BOTH
    @pytest.mark.parametrize("extra", [{}, IN_TORCHDIFFEQ], ids=["ours", "theirs"])
    def test_stiff(self, solver, extra):
        settings = {"adjoint_params": ()} if solver is odeint_adjoint else {}
        y0 = torch.zeros(1, dtype=torch.float64)
        options = {"max_num_steps": 50, **extra}
        with pytest.raises(SolverError, match=r"stiff.*'Radau'") as caught:
            solver(stiff, y0, SPAN, options=options, **settings)
        assert caught.value.status == "MAX_STEPS"

    @pytest.mark.filterwarnings("ignore:.*have no effect.*min_step")
    def test_the_advice_for_stiff_problems_works(self):
        y0 = torch.zeros(1, dtype=torch.float64)
        settings = {"method": "scipy_solver", "options": {"solver": "Radau"}}
        y = odeint(stiff, y0, SPAN, **settings)
        assert abs(y[-1].item() - torch.cos(SPAN[-1]).item()) < 1e-5
        y0.requires_grad_()
        y = odeint_adjoint(decay, y0, SPAN, adjoint_params=(), **settings)
        (ours,) = torch.autograd.grad(y[-1].sum(), y0)
        torch.testing.assert_close(ours, torch.exp(-SPAN[-1:]), rtol=1e-5, atol=0)

    def test_van_der_pol(self):
        def field(t, y):
            x, v = y
            return torch.stack((v, 1e5 * (1 - x * x) * v - x))

        y0 = torch.tensor([2.0, 0.0], dtype=torch.float64)
        with pytest.raises(SolverError, match="stiff"):
            odeint(field, y0, SPAN, options={"max_num_steps": 200})

    @BOTH
    @pytest.mark.parametrize("extra", [{}, IN_TORCHDIFFEQ], ids=["ours", "theirs"])
    def test_exploding(self, solver, extra):
        settings = {"adjoint_params": ()} if solver is odeint_adjoint else {}
        y0 = torch.ones(1, dtype=torch.float64)
        with pytest.raises(SolverError) as caught:
            solver(explode, y0, SPAN, options=extra, **settings)
        assert caught.value.status in ("STEP_UNDERFLOW", "NON_FINITE")
        assert not caught.value.t or abs(caught.value.t[0] - 1) < 1e-6

    @pytest.mark.parametrize("extra", [{}, IN_TORCHDIFFEQ], ids=["ours", "theirs"])
    def test_slope_that_is_not_finite(self, extra):
        def field(t, y):
            return y * torch.where(t < 1, 1.0, torch.nan)

        with pytest.raises(SolverError) as caught:
            odeint(field, torch.ones(2).double(), SPAN, options=extra)
        assert caught.value.status in ("STEP_UNDERFLOW", "NON_FINITE")

    def test_fixed_steps_to_infinity(self):
        y0 = torch.full((1,), 9.0, dtype=torch.float64)
        with pytest.raises(SolverError, match="not finite"):
            odeint(explode, y0, SPAN, method="euler", options={"step_size": 0.1})

    @pytest.mark.parametrize("name", ["Radau", "DOP853", "BDF"])
    def test_scipy(self, name):
        y0 = torch.ones(1, dtype=torch.float64)
        with warnings.catch_warnings(), pytest.raises(SolverError):
            warnings.simplefilter("ignore")
            odeint(explode, y0, SPAN, method="scipy_solver", options={"solver": name})

    def test_backwards_in_torchdiffeq(self):
        """Forwards y leaves the singularity behind; backwards it runs into it."""
        y0 = torch.ones(1, dtype=torch.float64, requires_grad=True)
        y = odeint_adjoint(
            decay, y0, SPAN, adjoint_params=(), options=IN_TORCHDIFFEQ,
            adjoint_options={"max_num_steps": 1},
        )  # fmt: skip
        with pytest.raises(SolverError, match="backwards"):
            y[-1].sum().backward()


@pytest.mark.parametrize("solver", [odeint, odeint_adjoint])
@pytest.mark.parametrize("part", [lambda y: -y[:1], lambda y: -y[:, :1]])
def test_a_derivative_of_another_shape_is_refused(solver, part):
    field = torch.nn.Module()
    field.forward = lambda t, y: part(y)
    with pytest.raises(ValueError, match=r"y's shape, \(4, 2\), got"):
        solver(field, torch.ones(4, 2), TIMES)


@pytest.mark.parametrize("method", ["euler", "rk4", "heun3", "explicit_adams"])
def test_what_fixed_steps_blow_up_is_told(method):
    with pytest.raises(SolverError, match="not finite") as failure:
        odeint(
            lambda t, y: y**3,
            torch.full((2,), 1e6),
            torch.tensor([0.0, 1.0]),
            method=method,
            options={"step_size": 0.05},
        )
    assert failure.value.status == "NON_FINITE"
