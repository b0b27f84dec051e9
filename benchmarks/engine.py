"""Time solves and their gradients against bare arithmetic and against peers.

    pip install -r benchmarks/requirements.txt
    python benchmarks/engine.py [--quick] [--threads 1] [--device cpu] [--no-memory]

Prints markdown tables: how many times the bare arithmetic everybody takes, forwards
and with the gradient; the ratios of peers to us; the errors; the seconds that compiled
peers spend compiling; and the peak memory against steps (`memory.py`). torchdiffeq
comes with skode; torchode and diffrax take part where they are installed.

All solve the same fields (`contest.py`) by `dopri5` with rtol = atol in float32, in one
process on so many cores with as many threads each, and take turns. Who is off by
far more than we, or than the tolerance, is not timed: the run ends there.
Peers get the field in the form that suits them: one time for all rows, or one per row.

"bare" (`bare.py`) is the arithmetic without a solver, with as many evaluations as the
slowest row takes, each of them once, of all rows. Two more bares, for comparison: of
as many as a row takes on average; and of a gradient that evaluates every accepted step
a second time, as one that keeps no activations must.
"""

import argparse
import importlib
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import bare
import memory
import torch
from bare import Work
from contest import (
    FACTORS,
    SIZES,
    TOLERANCES,
    Case,
    Clock,
    Contestant,
    Run,
    check,
    error,
    make_field,
    make_y0,
    pin,
    references,
    take_turns,
)
from peer_torchdiffeq import evaluations
from torch import Tensor

from skode._engine.solve import solve

# What `solve` is called with, by the name in the tables. The first one's error is the
# measure of the others'.
OURS = {
    "forward": {"compiled": {"compile": True}, "ours": {}},
    "gradient": {
        "compiled": {"compile": True},
        "checkpoint": {"gradient": "checkpoint"},
        "adjoint": {"gradient": "adjoint"},
        "backprop": {"gradient": "backprop"},
    },
}
JUDGED = {"forward": ("compiled", "ours"), "gradient": ("compiled", "checkpoint")}
"""Those of ours with a table of ratios."""
COMPILED = {"compiled"}
"""Those of ours whose first run of a size compiles."""
PEERS = {"torchdiffeq": True, "torchode": True, "diffrax": False}
"""Libraries, and whether they run on CUDA here (jax's CUDA build is gigabytes)."""
RIVALS = {
    "odeint_adjoint": ("odeint_adjoint", "odeint_adjoint seminorm"),
    "odeint": ("odeint",),
    "torchode": ("torchode", "torchode backsolve"),
    "diffrax joint": ("diffrax joint", "diffrax joint backsolve"),
    "diffrax vmap": ("diffrax vmap", "diffrax vmap backsolve"),
}
"""Columns of the ratios: the faster one of each group counts."""
BARES = BARE, MEAN, REPLAYED = "bare", "bare, mean row", "bare, replayed"


def prepare(case: Case, kind: str, **options) -> Run:
    """Return a run of ours."""

    def last() -> Tensor:
        tols = {"rtol": case.tol, "atol": case.tol}
        return solve(
            case.field, case.y0, case.span, params=case.params, **tols, **options
        ).y1

    return case.forward(last) if kind == "forward" else case.gradient(last)


def ours(kind: str) -> list[Contestant]:
    return [
        Contestant(
            name, partial(prepare, kind=kind, **options), compiled=name in COMPILED
        )
        for name, options in OURS[kind].items()
    ]


def peers(device: str) -> dict[str, list[Contestant]]:
    """Return who can take part; say who cannot, and why."""
    found: dict[str, list[Contestant]] = {"forward": [], "gradient": []}
    for name, on_cuda in PEERS.items():
        if device != "cpu" and not on_cuda:
            print(f"{name} is left out: it takes part on the CPU only.\n")
            continue
        try:
            # Now, and not above: XLA reads the number of threads when it is imported.
            module = importlib.import_module(f"peer_{name}")
        except ImportError as reason:
            print(
                f"{name} is left out ({reason}); to have it, "
                "pip install -r benchmarks/requirements.txt.\n"
            )
            continue
        found["forward"] += module.FORWARD
        found["gradient"] += module.GRADIENT
    return found


def work_of(case: Case) -> tuple[Work, Work]:
    """Return what the slowest row takes, and what a row takes on average."""
    tols = {"rtol": case.tol, "atol": case.tol}
    with torch.no_grad():
        stats = solve(case.field, case.y0, case.span, **tols).stats
    counts = torch.stack((stats.nfe, stats.n_accepted)).double()
    slowest = counts[:, int(stats.nfe.argmax())]
    return tuple(
        Work(*(round(x) for x in c.tolist())) for c in (slowest, counts.mean(1))
    )


def yardsticks(kind: str, slowest: Work, mean: Work) -> list[Contestant]:
    """Return the bares of a case."""
    if kind == "forward":
        counts = {BARE: (slowest.evaluations, 0), MEAN: (mean.evaluations, 0)}
    else:
        counts = {BARE: slowest.once(), MEAN: mean.once(), REPLAYED: slowest.replayed()}
    return [
        Contestant(name, partial(bare.prepare, counts=count))
        for name, count in counts.items()
    ]


@dataclass
class Table:
    """Times and errors of one kind of run, by case and name."""

    names: list[str]
    clocks: dict[str, dict[str, Clock]] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    evaluations: dict[str, str] = field(default_factory=dict)

    def overheads(self, title: str) -> str:
        """Return everybody's time over that of the bare arithmetic."""
        some = next(iter(self.clocks.values()))
        names = [n for n in self.names if n != BARE and (n not in BARES or n in some)]
        lines = _head(f"{title}, times bare", "evaluations", f"{BARE}, ms", *names)
        for case, clocks in self.clocks.items():
            base = clocks[BARE]
            cells = (
                _cell(clocks[n].ratio(base) if n in clocks else None) for n in names
            )
            ms = f"{1e3 * base.median:.3g}"
            lines.append(_line(case, self.evaluations[case], ms, *cells))
        return "\n".join(lines)

    def ratios(self, title: str, judged: str) -> str:
        """Return the peers' time over that of one of ours."""
        rivals = {
            label: group
            for label, group in RIVALS.items()
            if any(name in self.names for name in group)
        }
        lines = _head(f"{title}, times {judged}", f"{judged}, ms", *rivals)
        for case, clocks in self.clocks.items():
            own = clocks[judged]
            best = (
                min((clocks[n].ratio(own) for n in group if n in clocks), default=None)
                for group in rivals.values()
            )
            lines.append(_line(case, f"{1e3 * own.median:.3g}", *map(_cell, best)))
        return "\n".join(lines)

    def accuracy(self, title: str) -> str:
        """Return everybody's error."""
        names = [name for name in self.names if name not in BARES]
        lines = _head(f"{title}, relative error", *names)
        for case, errors in self.errors.items():
            cells = (f"{errors[n]:.1e}" if n in errors else "-" for n in names)
            lines.append(_line(case, *cells))
        return "\n".join(lines)


def _head(*names: str) -> list[str]:
    return [_line(*names), "|---" * len(names) + "|"]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


@dataclass
class Benchmark:
    """All cases, one after the other."""

    contestants: Mapping[str, Sequence[Contestant]]
    device: str
    turns: int
    tables: dict[str, Table] = field(default_factory=dict)
    compiling: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)
    """By kind and name, then by size."""

    def run(self, sizes: Sequence[tuple[int, int, int]]) -> None:
        for size in sizes:
            y0 = make_y0(size, self.device)
            for label, factor in FACTORS.items():
                net = make_field(size, factor, self.device)
                expected = references(net, y0)
                for tol in TOLERANCES:
                    name = f"{size} {tol:.0e} {label}"
                    print(name, file=sys.stderr, flush=True)
                    self.one(name, str(size), Case(net, y0, tol), expected)

    def one(
        self, name: str, size: str, case: Case, expected: Mapping[str, Sequence[Tensor]]
    ) -> None:
        """Check and time one case."""
        slowest, mean = work_of(case)
        for kind, contestants in self.contestants.items():
            own, clocks, errors = contestants[0].name, {}, {}
            for contestant in contestants:
                if len(case.y0) > (contestant.most_rows or len(case.y0)):
                    continue
                clock, found = Clock.start(contestant, case)
                clocks[contestant.name] = clock
                errors[contestant.name] = error(found, expected[kind])
            check(errors, own, case.tol)
            for yardstick in yardsticks(kind, slowest, mean):
                clocks[yardstick.name] = Clock.start(yardstick, case)[0]
            take_turns(clocks, self.turns, case.y0)
            for contestant in contestants:
                if contestant.compiled and contestant.name in clocks:
                    clock = clocks[contestant.name]
                    by_size = self.compiling.setdefault((kind, contestant.name), {})
                    by_size.setdefault(size, clock.warm_up - clock.median)
            names = [*(c.name for c in contestants), *BARES]
            table = self.tables.setdefault(kind, Table(names))
            table.clocks[name], table.errors[name] = clocks, errors
            table.evaluations[name] = (
                f"{slowest.evaluations} / {mean.evaluations} / {evaluations(case)}"
            )

    def compile_seconds(self) -> str:
        sizes = list(
            dict.fromkeys(s for by_size in self.compiling.values() for s in by_size)
        )
        lines = _head("seconds to compile", *sizes)
        for (kind, name), by_size in self.compiling.items():
            cells = (f"{by_size[s]:.1f}" if s in by_size else "-" for s in sizes)
            lines.append(_line(f"{name}, {kind}", *cells))
        return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="the two small sizes")
    parser.add_argument("--no-memory", action="store_true", help="no table of memory")
    args = parser.parse_args()
    begin = time.perf_counter()
    pin(args.threads)
    rivals = peers(args.device)
    benchmark = Benchmark(
        {kind: [*ours(kind), *rivals[kind]] for kind in OURS},
        args.device,
        turns=10 if args.quick else 25,
    )
    benchmark.run(SIZES[:2] if args.quick else SIZES)
    print(
        f"Medians, torch {torch.__version__}, {args.device}, {args.threads} thread(s). "
        "Evaluations: ours, slowest row / ours, mean row / odeint. "
        "Cases: (B, D, H) tol.\n"
    )
    titles = {"forward": "forward", "gradient": "forward and gradient"}
    for kind, table in benchmark.tables.items():
        print(table.overheads(titles[kind]), end="\n\n")
    for kind, table in benchmark.tables.items():
        for name in JUDGED[kind]:
            print(table.ratios(titles[kind], name), end="\n\n")
    for kind, table in benchmark.tables.items():
        print(table.accuracy(titles[kind]), end="\n\n")
    if benchmark.compiling:
        print(benchmark.compile_seconds(), end="\n\n")
    print(f"Measured in {time.perf_counter() - begin:.0f} s.")
    if not args.no_memory:
        print()
        memory.table(quick=args.quick)


if __name__ == "__main__":
    main()
