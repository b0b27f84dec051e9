"""Compare choices inside the engine: methods, controllers, threads.

    python benchmarks/choices.py methods | controllers | first | threads

A method or a controller is judged by what it takes for an error, not for a tolerance:
each problem is solved at thirteen tolerances, in float64, and a parabola through log
cost over log error tells the cost at errors of 1e-3 to 1e-6. A cell is the geometric
mean over these of the cost over that of the first row of the table. The error is the
geometric mean over the rows of their relative errors at the end.

Problems: `MLPField` of (B, D, H) = (64, 16, 64), mild and hard, and classics (Hairer,
Norsett & Wanner 1993; Kepler's orbit of eccentricity 0.5; Lorenz 1963), 64 rows each,
started nearby.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import torch
from contest import FACTORS, SIZES, Case, Clock, Contestant, make_field, make_y0, pin
from contest import take_turns as take_turns_at
from engine import prepare
from torch import Tensor

from skode._engine import plan
from skode._engine.control import PIController
from skode._engine.solve import solve

ROWS = 64
TOLERANCES = 10.0 ** -np.arange(2.0, 8.5, 0.5)
TARGETS = 10.0 ** -np.arange(3.0, 7.0)


@dataclass(frozen=True)
class Problem:
    """A field, first states and a time span."""

    name: str
    field: Callable[[Tensor, Tensor], Tensor]
    y0: Tensor
    end: float


def stacked(function: Callable[..., tuple]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a field of columns as one of rows."""
    return lambda t, y: torch.stack(function(*y.unbind(1)), dim=1)


def lotka_volterra(x, y):
    return 1.5 * x - x * y, x * y - 3.0 * y


def brusselator(x, y):
    return 1.0 + x * x * y - 4.0 * x, 3.0 * x - x * x * y


def van_der_pol(x, y):
    return y, 5.0 * (1.0 - x * x) * y - x


def lorenz(x, y, z):
    return 10.0 * (y - x), x * (28.0 - z) - y, x * y - 8.0 / 3.0 * z


def kepler(x, y, u, v):
    cube = (x * x + y * y) ** 1.5
    return u, v, -x / cube, -y / cube


def problems() -> list[Problem]:
    found = []
    for label, factor in FACTORS.items():
        size = (ROWS, 16, 64)
        field = make_field(size, factor, "cpu").double()
        y0 = make_y0(size, "cpu").detach().double()
        found.append(Problem(f"{label} net", field, y0, 1.0))
    generator = torch.Generator().manual_seed(2)
    for function, start, end in (
        (lotka_volterra, (1.0, 1.0), 10.0),
        (brusselator, (1.5, 3.0), 10.0),
        (van_der_pol, (2.0, 0.0), 10.0),
        (lorenz, (1.0, 1.0, 20.0), 2.0),
        (kepler, (0.5, 0.0, 0.0, 3.0**0.5), 20.0),
    ):
        y0 = torch.tensor(start, dtype=torch.float64)
        noise = torch.randn(ROWS, len(start), generator=generator, dtype=y0.dtype)
        y0 = y0 + 0.05 * noise
        found.append(Problem(function.__name__, stacked(function), y0, end))
    return found


@dataclass(frozen=True)
class Choice:
    """What a row of the table stands for."""

    name: str
    method: str = "dopri5"
    control: Callable[[PIController], object] | None = None
    """Changes the controller of a solve."""


@dataclass(frozen=True)
class Costs:
    """Of one choice and one problem, by tolerance."""

    error: np.ndarray
    evaluations: np.ndarray
    """Mean over the rows."""
    attempts: np.ndarray
    """Of the slowest row."""
    rejected: np.ndarray
    """Share of the attempts."""
    seconds: np.ndarray

    def at_equal_error(self, cost: str) -> np.ndarray:
        """Return the cost at each of the target errors."""
        good = np.isfinite(self.error) & (self.error > 1e-11) & (self.error < 0.3)
        x, y = np.log(self.error[good]), np.log(getattr(self, cost)[good])
        # Nothing is cheaper than the loosest tolerance, however good that is already.
        at = np.log(TARGETS).clip(x.min(), x.max())
        return np.exp(np.polyval(np.polyfit(x, y, deg=2), at))


@contextmanager
def controlled(control: Callable[[PIController], object] | None) -> Iterator[None]:
    """Have solves use another controller for a while."""

    class Changed:
        @staticmethod
        def of(*args):
            return control(PIController.of(*args))

    if control is not None:
        plan.PIController = Changed
    try:
        yield
    finally:
        plan.PIController = PIController


def run(problem: Problem, method: str, tol: float):
    span = torch.tensor([0.0, problem.end], dtype=torch.float64)
    return solve(problem.field, problem.y0, span, method=method, rtol=tol, atol=tol)


@torch.no_grad()
def costs(problem: Problem, choices: list[Choice], repeats: int) -> dict[str, Costs]:
    """Solve by all choices in turn."""
    exact = run(problem, "dopri8", 1e-12).require_success().y1
    rows = {choice.name: [] for choice in choices}
    for tol in TOLERANCES:
        taken = {choice.name: [] for choice in choices}
        solved = {}
        for _ in range(repeats):
            for choice in choices:
                with controlled(choice.control):
                    begin = time.perf_counter()
                    solved[choice.name] = run(problem, choice.method, float(tol))
                    taken[choice.name].append(time.perf_counter() - begin)
        for name, solution in solved.items():
            off = (solution.y1 - exact).norm(dim=1) / exact.norm(dim=1)
            stats = solution.stats
            attempts = stats.n_accepted + stats.n_rejected
            rows[name].append(
                (
                    off.clamp_min(1e-14).log().mean().exp().item(),
                    stats.nfe.double().mean().item(),
                    attempts.max().item(),
                    (stats.n_rejected.sum() / attempts.sum()).item(),
                    median(taken[name]),
                )
            )
    return {name: Costs(*np.array(found).T) for name, found in rows.items()}


def compare(choices: list[Choice], wanted: tuple[str, ...], repeats: int = 1) -> None:
    """Print the wanted costs at equal error, relative to the first choice."""
    found = {p.name: costs(p, choices, repeats) for p in problems()}
    for cost in wanted:
        print(f"| {cost} at equal error | {' | '.join(found)} | all | rejected |")
        print("|---" * (3 + len(found)) + "|")
        for choice in choices:
            means, rejected = [], []
            for by_choice in found.values():
                own, base = by_choice[choice.name], by_choice[choices[0].name]
                ratio = own.at_equal_error(cost) / base.at_equal_error(cost)
                means.append(np.exp(np.log(ratio).mean()))
                rejected.append(own.rejected.mean())
            overall = np.exp(np.log(means).mean())
            cells = " | ".join(f"{mean:.2f}" for mean in means)
            share = f"{100 * np.mean(rejected):.0f} %"
            print(f"| {choice.name} | {cells} | **{overall:.2f}** | {share} |")
        print()


def methods() -> None:
    names = ("dopri5", "tsit5", "bosh3", "dopri8")
    choices = [Choice(name, name) for name in names]
    compare(choices, ("evaluations", "attempts", "seconds"), repeats=5)


@dataclass(frozen=True, slots=True)
class Filter:
    """A digital filter as controller (Soderlind 2003, doi:10.1145/641876.641877).

    The next step is safety * r_n^(-b_1 / q) r_(n-1)^(-b_2 / q) r_(n-2)^(-b_3 / q) times
    the last one, r being the error ratios and q the order. Its memory is (A, 2).
    """

    plain: PIController
    b: tuple[float, float, float]

    def first(self, *args):
        return self.plain.first(*args)

    def decide(self, ratio: Tensor, step: Tensor, memory: Tensor):
        plain = self.plain
        if memory.ndim == 1:
            memory = torch.ones_like(memory)[:, None].expand(-1, 2)
        accept = ratio <= 1.0
        ratio = ratio.nan_to_num(nan=torch.inf, posinf=torch.inf)
        ratio = ratio.clamp_min(plain.noise)
        past = torch.cat((ratio[:, None], memory), dim=1)
        powers = -past.new_tensor(self.b) / plain.order
        factor = plain.safety * past.pow(powers).prod(dim=1)
        # After a refusal by this error alone: a filter's memory could let it grow.
        alone = plain.safety * ratio.pow(-1.0 / plain.order)
        factor = torch.where(accept, factor, torch.minimum(factor, alone))
        factor = factor.clamp(plain.shrink, plain.grow)
        kept = torch.where(accept[:, None], past[:, :2], memory).clamp(1e-4, 1.0)
        return accept, step * factor.to(step.dtype), kept


def first_step(share: float) -> Callable[[PIController], object]:
    """Aim the first step at this share of the tolerance, instead of a tenth."""
    return lambda plain: replace(
        plain, error_constant=plain.error_constant * 0.1 / share
    )


@torch.no_grad()
def first() -> None:
    """Print evaluations and errors of nets, by what the first step aims at."""
    shares, size = (0.1, 1.0, 10.0, 100.0), (256, 16, 64)
    heads = " | ".join(f"{share:g} tol" for share in shares)
    print(f"| evaluations (rejected steps), error; first step aims at | {heads} |")
    print("|---" * (1 + len(shares)) + "|")
    y0 = make_y0(size, "cpu").detach().double()
    for factor in (1.0, 2.0, 4.0):
        problem = Problem("", make_field(size, factor, "cpu").double(), y0, 1.0)
        exact = run(problem, "dopri8", 1e-12).y1
        for tol in (1e-2, 1e-3, 1e-4, 1e-5):
            cells = []
            for share in shares:
                with controlled(first_step(share)):
                    solution = run(problem, "dopri5", tol)
                stats = solution.stats
                nfe, refused = (
                    x.double().mean().item() for x in (stats.nfe, stats.n_rejected)
                )
                off = (solution.y1 - exact).norm() / exact.norm()
                cells.append(f"{nfe:.1f} ({refused:.1f}), {off:.0e}")
            print(f"| weights times {factor:g}, {tol:.0e} | {' | '.join(cells)} |")
    print()


def controllers() -> None:
    def changed(**values):
        return lambda plain: replace(plain, **values)

    def filtered(*b: float):
        return lambda plain: Filter(plain, b)

    choices = [
        Choice("as is: PI, beta 0.04, safety 0.9, 0.2 to 10"),
        Choice("I (beta 0)", control=changed(beta=0.0)),
        Choice("PI, beta 0.08", control=changed(beta=0.08)),
        Choice("safety 0.8", control=changed(safety=0.8)),
        Choice("safety 0.85", control=changed(safety=0.85)),
        Choice("safety 0.95", control=changed(safety=0.95)),
        Choice("grow at most 5", control=changed(grow=5.0)),
        Choice("shrink at most 0.5", control=changed(shrink=0.5)),
        Choice("shrink at most 0.1", control=changed(shrink=0.1)),
        Choice("first step at the tolerance", control=first_step(1.0)),
        Choice("first step at 10 times", control=first_step(10.0)),
        Choice("PI.3.4 (0.7, -0.4)", control=filtered(0.7, -0.4, 0.0)),
        Choice("PI.4.2 (0.6, -0.2)", control=filtered(0.6, -0.2, 0.0)),
        Choice("H211PI (1/6, 1/6)", control=filtered(1 / 6, 1 / 6, 0.0)),
        Choice("H312PID (1/18, 1/9, 1/18)", control=filtered(1 / 18, 1 / 9, 1 / 18)),
    ]
    compare(choices, ("evaluations", "attempts"))


def threads() -> None:
    """Print milliseconds by size and number of threads, taken in turn."""
    counts = (1, 2, 4)
    pin(max(counts))
    print(f"| milliseconds, by threads | {' | '.join(map(str, counts))} |")
    print("|---" * (1 + len(counts)) + "|")
    for kind, options in {
        "forward": {},
        "gradient": {"gradient": "checkpoint"},
    }.items():
        for size in SIZES:
            field, y0 = make_field(size, 1.0, "cpu"), make_y0(size, "cpu")
            case = Case(field, y0, 1e-5)
            clocks = {}
            for count in counts:

                def threaded(case, count=count, kind=kind, options=options):
                    plain = prepare(case, kind, **options)

                    def run():
                        torch.set_num_threads(count)
                        return plain()

                    return run

                clocks[count] = Clock.start(Contestant(str(count), threaded), case)[0]
            take_turns_at(clocks, 25, y0)
            cells = (f"{1e3 * clock.median:.3g}" for clock in clocks.values())
            print(f"| {kind} {size} 1e-05 mild | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    experiments = {
        "methods": methods,
        "controllers": controllers,
        "first": first,
        "threads": threads,
    }
    parser.add_argument("experiment", choices=experiments)
    args = parser.parse_args()
    if args.experiment != "threads":
        pin(1)
    experiments[args.experiment]()


if __name__ == "__main__":
    main()
