"""What a benchmark of solvers is made of: cases, contestants, the clock, the check.

A case is a field, its first states and a tolerance; B rows, D state, H hidden. The
field is an `MLPField` with two hidden layers of width H, solved from t = 0 to 1 in
float32; the loss is the sum of squares of the last states. A hard field is a mild one
with its parameters times four.

A contestant is a name and a function that prepares a run of a case. A run returns what
it computed: the last states, or the gradients with respect to the first states and to
the parameters, in the order of `field.parameters()`.
"""

import copy
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skode._engine.solve import solve
from skode._nn.fields import MLPField

SIZES = ((32, 8, 32), (256, 16, 64), (1024, 32, 128), (8192, 32, 128))
TOLERANCES = (1e-3, 1e-5)
FACTORS = {"mild": 1.0, "hard": 4.0}

BURST, SHARE, LONG = 0.015, 1.5, 4.0
"""Seconds for which a contestant repeats short runs in its turn; seconds of its turns
after which it has no further one; and seconds of a first run that is enough."""
SLACK = 100.0
"""How many times our error, or the tolerance, the error of a contestant may be. Those
of continuous adjoints on hard fields are thirty times as large; whoever solves
something else is off by one."""

Run = Callable[[], Sequence[Any]]


@dataclass(frozen=True)
class Case:
    """A field, first states (B, D), and rtol = atol."""

    field: MLPField
    y0: Tensor
    tol: float

    @property
    def params(self) -> tuple[Tensor, ...]:
        return tuple(self.field.parameters())

    @property
    def span(self) -> Tensor:
        return self.y0.new_tensor([0.0, 1.0])

    def forward(self, last: Callable[[], Tensor]) -> Run:
        """Return a run of a solver in torch that returns the last states."""

        @torch.no_grad()
        def run():
            return (last(),)

        return run

    def gradient(self, last: Callable[[], Tensor]) -> Run:
        """Return a run that differentiates the loss by autograd."""

        def run():
            loss = last().square().sum()
            return torch.autograd.grad(loss, (self.y0, *self.params))

        return run


@dataclass(frozen=True)
class Contestant:
    """Somebody who takes part."""

    name: str
    prepare: Callable[[Case], Run]
    most_rows: int | None = None
    """Cases with more rows take too long; None: there are no such cases."""
    compiled: bool = False
    """Whether the first run of a size compiles."""


def make_field(size: tuple[int, int, int], factor: float, device: str) -> MLPField:
    torch.manual_seed(0)
    _, dim, hidden = size
    field = MLPField(dim, (hidden, hidden))
    with torch.no_grad():
        for param in field.parameters():
            param.mul_(factor)
    return field.to(device)


def make_y0(size: tuple[int, int, int], device: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    y0 = torch.randn(*size[:2], generator=generator)
    return y0.to(device).requires_grad_()


def references(field: MLPField, y0: Tensor) -> dict[str, list[Tensor]]:
    """Return the last states, and the gradients, in float64 at a tight tolerance."""
    exact = copy.deepcopy(field).double()
    start = y0.detach().double().requires_grad_()
    params = tuple(exact.parameters())
    last = solve(
        exact,
        start,
        start.new_tensor([0.0, 1.0]),
        params=params,
        method="dopri8",
        rtol=1e-8,
        atol=1e-8,
        gradient="checkpoint",
    ).y1
    gradients = torch.autograd.grad(last.square().sum(), (start, *params))
    return {"forward": [last.detach()], "gradient": list(gradients)}


def error(found: Sequence[Any], reference: Sequence[Tensor]) -> float:
    """Return the relative error in the Euclidean norm: the worst of two parts.

    These are the first array, (B, D), and all parameters together.
    """
    arrays = [_array(x) for x in found]
    expected = [_array(x) for x in reference]
    parts = [(arrays[0], expected[0])]
    if len(expected) > 1:
        parts.append(tuple(_joined(x[1:]) for x in (arrays, expected)))
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in parts)


def _array(x: Any) -> np.ndarray:
    return x.detach().double().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in arrays])


def check(errors: Mapping[str, float], own: str, tol: float) -> None:
    """Refuse to time who computes something else.

    `own` stands for what the problem allows: neighbouring paths of a hard field part so
    quickly that a tolerance of 1e-3 is no promise for the gradient.
    """
    allowed = SLACK * max(errors[own], tol)
    for name, found in errors.items():
        assert found <= allowed, (
            f"{name} is off by {found:.1e}, {own} by {errors[own]:.1e}, at tol={tol:g}."
        )


@dataclass
class Clock:
    """Seconds of the runs of a contestant."""

    run: Run
    warm_up: float
    """Preparation and first run."""
    turns: list[float]
    """Median of each turn."""

    @classmethod
    def start(cls, contestant: Contestant, case: Case) -> "tuple[Clock, Sequence[Any]]":
        """Prepare, warm up, and return also what the first run computed."""
        begin = time.perf_counter()
        run = contestant.prepare(case)
        ready = time.perf_counter()
        found = run()
        _settle(case.y0)
        end = time.perf_counter()
        # A long run needs no warming up.
        long = end - ready > LONG and not contestant.compiled
        return cls(run, end - begin, [end - ready] if long else []), found

    def turn(self, like: Tensor) -> None:
        """Run for a moment, or once."""
        taken = []
        while sum(taken) < BURST:
            begin = time.perf_counter()
            self.run()
            _settle(like)
            taken.append(time.perf_counter() - begin)
        self.turns.append(median(taken))

    @property
    def median(self) -> float:
        return median(self.turns)

    def ratio(self, base: "Clock") -> float:
        """Return the median of the ratios to another clock, turn by turn."""
        pairs = zip(self.turns, base.turns, strict=False)
        return median(own / other for own, other in pairs)


def _settle(like: Tensor) -> None:
    if like.device.type == "cuda":
        torch.cuda.synchronize(like.device)


def take_turns(clocks: Mapping[str, Clock], turns: int, like: Tensor) -> None:
    """Time all in turn, so that a busy machine slows all alike."""
    for _ in range(turns):
        for clock in clocks.values():
            if sum(clock.turns) < SHARE:
                clock.turn(like)


def pin(threads: int) -> None:
    """Give this process so many cores, and all its libraries as many threads."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[-threads:])
    torch.set_num_threads(threads)
    if threads == 1:  # XLA takes a thread per core of the process otherwise
        os.environ["XLA_FLAGS"] = (
            "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        )
