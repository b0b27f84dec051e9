"""The loop, driven by scripted controllers: exact times, counts and statuses."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from skode._engine.kernel import AutogradKernel
from skode._engine.loop import integrate, march
from skode._engine.observer import Step
from skode._engine.solution import Status, Tolerance
from skode._engine.tableau import TABLEAUX, coefficients


@dataclass
class Script:
    """Plays a list of (accept, next step), the same for all rows."""

    start: float
    moves: list[tuple[bool, float]]
    tried: list[list[float]] = field(default_factory=list)

    def first(self, kernel, t, y, slope, span) -> tuple[Tensor, int]:
        return torch.full_like(t, self.start), 0

    def decide(self, ratio, step, memory) -> tuple[Tensor, Tensor, Tensor]:
        accept, size = self.moves[min(len(self.tried), len(self.moves) - 1)]
        self.tried.append(step.tolist())
        return (
            torch.full_like(step, accept, dtype=torch.bool),
            torch.full_like(step, size),
            memory,
        )


@dataclass
class Halving:
    """Accepts steps of at most `longest`, and halves all others.

    The memory of a row counts its refusals, from the 1e-4 that the loop starts with.
    """

    longest: float
    memories: list[list[float]] = field(default_factory=list)

    def first(self, kernel, t, y, slope, span):
        return span.abs(), 0

    def decide(self, ratio, step, memory):
        accept = step <= self.longest
        memory = memory + ~accept
        self.memories.append([round(m, 3) for m in memory.tolist()])
        return accept, torch.where(accept, step, 0.5 * step), memory


@dataclass
class Record:
    """Keeps what it is told, copied."""

    steps: list[Step] = field(default_factory=list)

    def observe(self, step: Step) -> None:
        clone = [
            None if x is None else x.clone()
            for x in (getattr(step, name) for name in Step.__slots__)
        ]
        self.steps.append(Step(*clone))


def one(t, y):
    """Grow by one per unit of time: every method is exact."""
    return torch.ones_like(y)


def walk(
    controller,
    t1,
    t0=0.0,
    rhs=one,
    max_steps=1000,
    observers=(),
    method="dopri5",
    dtype=torch.float64,
):
    t1 = torch.as_tensor(t1, dtype=dtype).reshape(-1)
    t0 = torch.as_tensor(t0, dtype=dtype).expand_as(t1)
    y = torch.zeros(len(t1), 2, dtype=dtype)
    coef = coefficients(TABLEAUX[method], y.dtype, t1.dtype, y.device)
    tolerance = Tolerance(1e-3, 1e-6, None, max_steps)
    kernel = AutogradKernel(rhs, ())
    return integrate(kernel, coef, controller, y, t0, t1, tolerance, observers)


def test_the_script_is_played():
    script = Script(0.25, [(True, 0.125), (True, 0.375), (True, 0.375)])
    y, stats = walk(script, 1.0)
    assert script.tried == [[0.25], [0.125], [0.3125], [0.3125]]
    assert stats.n_accepted.tolist() == [4]
    assert stats.n_rejected.tolist() == [0]
    assert stats.status.tolist() == [Status.SUCCESS]
    torch.testing.assert_close(y, torch.ones(1, 2, dtype=torch.float64))


def test_a_refused_step_moves_nothing():
    record = Record()
    script = Script(0.5, [(False, 0.25), (False, 0.125), (True, 0.125), (True, 1.0)])
    y, stats = walk(script, 0.25, observers=[record])
    # 0.5 is cut to the end of the span.
    assert script.tried == [[0.25], [0.25], [0.125], [0.125]]
    assert [step.moved.tolist() for step in record.steps[:2]] == [[False], [False]]
    assert [step.moved for step in record.steps[2:]] == [None, None]
    assert [step.t.item() for step in record.steps] == [0, 0, 0, 0.125]
    assert [step.t1.item() for step in record.steps] == [0.25, 0.25, 0.125, 0.25]
    assert record.steps[2].y.tolist() == [[0, 0]]
    assert (stats.n_accepted.item(), stats.n_rejected.item()) == (2, 2)
    assert stats.nfe.item() == 1 + 4 * 6
    torch.testing.assert_close(y, torch.full((1, 2), 0.25).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("t0, t1", [(0.0, 0.3), (0.7, -1.1), (1e6, 1e6 + 1)])
def test_rows_land_exactly_on_their_end(t0, t1, dtype):
    record = Record()
    _, stats = walk(Script(0.1, [(True, 0.1)]), t1, t0, observers=[record], dtype=dtype)
    assert stats.t.item() == torch.tensor(t1, dtype=dtype).item()
    assert record.steps[-1].t1.item() == stats.t.item()
    for before, after in zip(record.steps[:-1], record.steps[1:], strict=True):
        assert before.t1.item() == after.t.item()


def test_two_equal_steps_rather_than_a_sliver():
    script = Script(0.3, [(True, 0.3)])
    walk(script, 1.0)
    sizes = torch.tensor(script.tried)[:, 0]
    torch.testing.assert_close(sizes, torch.tensor([0.3, 0.3, 0.2, 0.2]))


def test_the_last_step_stretches_by_a_hundredth():
    for first, steps in ((0.995, 1), (0.985, 2)):
        script = Script(first, [(True, 1.0)])
        _, stats = walk(script, 1.0)
        assert stats.n_accepted.tolist() == [steps]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_span_backwards_takes_negative_steps(sign):
    record = Record()
    y, stats = walk(Script(0.25, [(True, 0.25)]), sign, observers=[record])
    assert [step.h.item() for step in record.steps] == [0.25 * sign] * 4
    assert stats.t.tolist() == [sign]
    torch.testing.assert_close(y, torch.full((1, 2), sign).double())


def test_steps_below_the_resolution_of_time_end_a_row():
    # 1, 1/2, 1/4, ... until the next one is 16 ulps of t1 = 1, 2^-48.
    script = Script(1.0, [(False, 2.0**-n) for n in range(1, 100)])
    y, stats = walk(script, 1.0)
    assert stats.status.tolist() == [Status.STEP_UNDERFLOW]
    assert stats.n_rejected.tolist() == [48]
    assert stats.n_accepted.tolist() == [0]
    assert stats.t.tolist() == [0.0]
    assert y.tolist() == [[0.0, 0.0]]


def test_the_resolution_is_that_of_the_times():
    script = Script(1.0, [(False, 2.0**-n) for n in range(1, 100)])
    _, stats = walk(script, 1.0, dtype=torch.float32)
    assert stats.status.tolist() == [Status.STEP_UNDERFLOW]
    assert stats.n_rejected.tolist() == [19]  # 16 * 2^-23


def test_an_error_that_is_not_finite_has_a_status_of_its_own():
    def nan(t, y):
        return y * torch.nan

    script = Script(1.0, [(False, 2.0**-n) for n in range(1, 100)])
    _, stats = walk(script, 1.0, rhs=nan)
    assert stats.status.tolist() == [Status.NON_FINITE]
    assert stats.n_rejected.tolist() == [48]


def test_underflow_after_some_steps_tells_the_time_reached():
    moves = [(True, 0.25), (True, 0.25), *((False, 2.0**-n) for n in range(3, 99))]
    y, stats = walk(Script(0.25, moves), 1.0)
    assert stats.status.tolist() == [Status.STEP_UNDERFLOW]
    assert stats.t.tolist() == [0.5]
    assert stats.n_accepted.tolist() == [2]
    torch.testing.assert_close(y, torch.full((1, 2), 0.5).double())


@pytest.mark.parametrize("refused", [0, 2])
def test_too_many_attempts_end_a_row(refused):
    moves = [(False, 0.125)] * refused + [(True, 0.125)]
    _, stats = walk(Script(0.125, moves), 1.0, max_steps=5)
    assert stats.status.tolist() == [Status.MAX_STEPS]
    assert stats.n_accepted.tolist() == [5 - refused]
    assert stats.n_rejected.tolist() == [refused]
    assert stats.t.tolist() == [0.125 * (5 - refused)]


def test_exactly_as_many_steps_as_allowed_are_enough():
    script = Script(0.125, [(True, 0.125)])
    _, stats = walk(script, 1.0, max_steps=8)
    assert stats.status.tolist() == [Status.SUCCESS]
    assert stats.t.tolist() == [1.0]


def test_an_accepted_end_that_is_not_finite_is_no_success():
    def nan(t, y):
        return y * torch.nan

    _, stats = walk(Script(1.0, [(True, 1.0)]), 1.0, rhs=nan)
    assert stats.status.tolist() == [Status.NON_FINITE]


def test_every_row_has_its_own_step_acceptance_and_memory(monkeypatch):
    monkeypatch.setattr("skode._engine.step._WORTH_COMPACTING", 0)
    record = Record()
    controller = Halving(0.3)
    ends = [0.25, 1.0, 0.0, 2.0, -0.5, 4.0]
    y, stats = walk(controller, ends, observers=[record])
    # Spans are halved until 0.25, and then walked in steps of 0.25.
    assert stats.n_rejected.tolist() == [0, 2, 0, 3, 1, 4]
    assert stats.n_accepted.tolist() == [1, 4, 0, 8, 2, 16]
    assert stats.nfe.tolist() == [1 + 6 * n for n in (1, 6, 0, 11, 3, 20)]
    assert stats.t.tolist() == ends
    torch.testing.assert_close(y[:, 0], torch.tensor(ends, dtype=torch.float64))
    # The memory goes with its row when others leave.
    assert controller.memories[-1] == [4.0]
    assert len(controller.memories) == 20
    assert record.steps[-1].rows.tolist() == [5]


@pytest.mark.parametrize("worth", [0, 1000], ids=["compacted", "carried along"])
def test_observers_can_put_the_rows_together_again(worth, monkeypatch):
    monkeypatch.setattr("skode._engine.step._WORTH_COMPACTING", worth)
    record = Record()
    ends = torch.tensor([0.25, 1.0, 0.0, 2.0, -0.5, 4.0], dtype=torch.float64)
    y, stats = walk(
        Halving(0.3), ends, rhs=lambda t, y: t[:, None] + y, observers=[record]
    )
    t = torch.zeros_like(ends)
    count = torch.zeros(len(ends), dtype=torch.int64)
    states = torch.zeros(len(ends), 2, dtype=torch.float64)
    coef = coefficients(TABLEAUX["dopri5"], y.dtype, t.dtype, y.device)
    for step in record.steps:
        rows = torch.arange(len(ends)) if step.rows is None else step.rows
        moved = torch.ones(len(rows)).bool() if step.moved is None else step.moved
        assert torch.equal(step.t, t[rows])
        torch.testing.assert_close(step.y, states[rows], rtol=0, atol=1e-14)
        torch.testing.assert_close(step.k[0], step.t[:, None] + step.y)
        new = step.y + step.h[:, None] * torch.einsum("s,sad->ad", coef.b, step.k[:-1])
        torch.testing.assert_close(step.k[-1], (step.t + step.h)[:, None] + new)
        t[rows[moved]] = step.t1[moved]
        count[rows[moved]] += 1
        states[rows[moved]] = new[moved]
    assert torch.equal(t, ends)
    assert torch.equal(count, stats.n_accepted)
    torch.testing.assert_close(states, y, rtol=0, atol=1e-14)


@pytest.mark.parametrize("method", [n for n, t in TABLEAUX.items() if t.adaptive])
def test_the_first_stage_is_not_evaluated_again(method):
    calls = 0

    def counted(t, y):
        nonlocal calls
        calls += 1
        return torch.ones_like(y)

    script = Script(0.25, [(True, 0.25), (False, 0.25), (True, 0.25)])
    _, stats = walk(script, 1.0, rhs=counted, method=method)
    assert stats.n_accepted.item() + stats.n_rejected.item() == 5
    assert calls == stats.nfe.item() == 1 + 5 * TABLEAUX[method].stages


def march_rows(t1, step_size, max_steps=1000, rhs=one, observers=()):
    t1 = torch.tensor(t1, dtype=torch.float64)
    y = torch.zeros(len(t1), 2, dtype=torch.float64)
    coef = coefficients(TABLEAUX["rk4"], y.dtype, t1.dtype, y.device)
    tolerance = Tolerance(1e-3, 1e-6, step_size, max_steps)
    return march(
        AutogradKernel(rhs, ()),
        coef,
        y,
        torch.zeros_like(t1),
        t1,
        tolerance,
        observers,
    )


def test_marching_divides_every_span_evenly():
    record = Record()
    ends = [1.0, 0.1, 0.0, -0.35, 0.3]
    y, stats = march_rows(ends, 0.1, observers=[record])
    # 0.3 / 0.1 exceeds 3 by rounding only.
    assert stats.n_accepted.tolist() == [10, 1, 0, 4, 3]
    assert stats.t.tolist() == ends
    assert stats.n_rejected.tolist() == [0] * 5
    torch.testing.assert_close(y[:, 0], torch.tensor(ends, dtype=torch.float64))
    for row, (end, steps) in enumerate(zip(ends, [10, 1, 0, 4, 3], strict=True)):
        mine = [step.h[step.rows == row] for step in record.steps if row in step.rows]
        lengths = [h.item() for h in mine if h.item() != 0]
        assert lengths == pytest.approx([end / max(steps, 1)] * steps, rel=1e-12)


def test_marching_stops_at_max_steps():
    y, stats = march_rows([1.0, 0.25], 0.125, max_steps=3)
    assert stats.status.tolist() == [Status.MAX_STEPS, Status.SUCCESS]
    assert stats.n_accepted.tolist() == [3, 2]
    assert stats.t.tolist() == [0.375, 0.25]
    assert y[:, 0].tolist() == pytest.approx([0.375, 0.25])


def test_marching_tells_where_the_state_was_last_finite():
    def nan_after_half(t, y):
        return torch.where(t[:, None] > 0.55, torch.nan, torch.ones_like(y))

    _, stats = march_rows([1.0, 0.5], 0.125, rhs=nan_after_half)
    assert stats.status.tolist() == [Status.NON_FINITE, Status.SUCCESS]
    assert stats.t.tolist() == [0.5, 0.5]
