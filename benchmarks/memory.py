"""Measure the peak memory of a gradient against the number of steps.

    python benchmarks/memory.py [--quick]

Prints a markdown table of MiB by which the resident set of a fresh process peaks
above what it needed for the same gradient over one step. `MLPField`, (B, D, H) =
(256, 16, 64), fixed-step `rk4`, float32, one thread. "states" is what one state per
step takes: steps * B * D * 4 bytes. "adaptive": `adaptive_heun` in float64, whose
tolerance makes the slowest row take about so many steps. diffrax, which has no `rk4`,
steps by `dopri5`; its programs are compiled before the measurement begins.
"""

import argparse
import importlib.util
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from contest import Case, make_field, make_y0, pin
from torch import Tensor
from torchdiffeq import odeint, odeint_adjoint

from skode._engine.solve import solve

SIZE = (256, 16, 64)
STEPS = (10, 100, 1_000, 10_000)

Prepare = Callable[[Case, int], Callable[[], object]]
"""A case and a number of steps -> a run that takes the gradient over so many."""


def ours(case: Case, steps: int, **options):
    def last() -> Tensor:
        solution = solve(
            case.field,
            case.y0,
            case.span.double(),
            params=case.params,
            method="rk4",
            step_size=1 / steps,
            **options,
        )
        assert int(solution.stats.n_accepted[0]) == steps
        return solution.y1

    return case.gradient(last)


def adaptive(case: Case, steps: int, **options):
    exact = Case(case.field.double(), case.y0.detach().double(), TOLERANCES[steps])
    exact.y0.requires_grad_()

    def last() -> Tensor:
        solution = solve(
            exact.field,
            exact.y0,
            exact.span,
            params=exact.params,
            method="adaptive_heun",
            rtol=exact.tol,
            atol=exact.tol,
            max_steps=2 * max(steps, 10),
            **options,
        ).require_success()
        assert steps / 2 < int(solution.stats.n_accepted.max()) < 2 * steps + 2
        return solution.y1

    return exact.gradient(last)


def torchdiffeq(case: Case, steps: int, function: Callable):
    from peer_torchdiffeq import SharedTime

    field, options = SharedTime(case.field), {"step_size": 1 / steps}

    def last() -> Tensor:
        span = case.span.double()
        return function(field, case.y0, span, method="rk4", options=options)[-1]

    return case.gradient(last)


def diffrax(case: Case, steps: int, backsolve: bool):
    from peer_diffrax import fixed_steps

    return fixed_steps(case, steps, backsolve)


TOLERANCES = {1: 1.0, 10: 3e-3, 100: 2e-5, 1_000: 2e-7, 10_000: 2e-9}
"""With which `adaptive_heun` takes about so many steps."""

CONTESTANTS: dict[str, tuple[Prepare, int]] = {
    "checkpoint": (partial(ours, gradient="checkpoint"), 10_000),
    "compiled": (partial(ours, compile=True), 10_000),
    "adjoint": (partial(ours, gradient="adjoint"), 10_000),
    "reversible": (partial(ours, gradient="reversible"), 10_000),
    "reversible, adaptive": (partial(adaptive, gradient="reversible"), 10_000),
    "backprop": (partial(ours, gradient="backprop"), 1_000),
    "odeint": (partial(torchdiffeq, function=odeint), 1_000),
    "odeint_adjoint": (partial(torchdiffeq, function=odeint_adjoint), 1_000),
    "diffrax joint": (partial(diffrax, backsolve=False), 10_000),
    "diffrax joint backsolve": (partial(diffrax, backsolve=True), 10_000),
}
"""Each with the most steps that it is asked for."""


def peak() -> float:
    """Return the highest resident set so far, in MiB.

    Linux hands what `getrusage` calls the maximum from parent to child, so a child of
    a large process would see no growth; its memory map tells its own peak.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text().splitlines()
        found = next(line for line in lines if line.startswith("VmHWM"))
        return int(found.split()[1]) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def child(name: str, most: int) -> None:
    """Print a growth for each number of steps: the next one's peak is higher."""
    pin(1)
    case = Case(make_field(SIZE, 1.0, "cpu"), make_y0(SIZE, "cpu"), 1e-3)
    prepare, limit = CONTESTANTS[name]
    steps = [1, *(n for n in STEPS if n <= min(limit, most))]
    runs = [prepare(case, n) for n in steps]
    peaks = []
    for run in runs:
        run()
        peaks.append(peak())
    print(*(growth - peaks[0] for growth in peaks[1:]))


def growths(name: str, most: int) -> list[str]:
    """Measure in a process of its own; return MiB for each number of steps."""
    command = [sys.executable, __file__, "--child", name, str(most)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [f"{float(growth):.1f}" for growth in done.stdout.split()]


def table(quick: bool) -> None:
    """Print the table."""
    steps = STEPS[:2] if quick else STEPS
    batch, dim, _ = SIZE
    columns = {"states": [f"{n * batch * dim * 4 / 2**20:.1f}" for n in steps]}
    for name in CONTESTANTS:
        if not name.startswith("diffrax") or importlib.util.find_spec("diffrax"):
            columns[name] = growths(name, steps[-1])
    print(f"| steps: growth of memory, MiB | {' | '.join(columns)} |")
    print("|---" * (1 + len(columns)) + "|")
    for i, n in enumerate(steps):
        cells = (column[i] if i < len(column) else "-" for column in columns.values())
        print(f"| {n} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="up to 100 steps")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], int(args.child[1]))
        return
    table(args.quick)


if __name__ == "__main__":
    main()
