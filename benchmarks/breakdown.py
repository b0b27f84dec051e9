"""Where the time of a solve goes.

    python benchmarks/breakdown.py

Prints two markdown tables, of solves and of solves with their gradient. A cell is, of a
group of functions, without what the functions of other groups that they call take: its
share in the time; the microseconds for each attempted step; and the operations of
PyTorch that it calls, again for each attempted step.

Time is taken by a stopwatch around the functions of `GROUPS`, which costs half a
microsecond a call; operations are counted by torch.profiler in another run. The case of
one row has next to no arithmetic: what it takes is dispatch, by Python and by PyTorch.

The name: `profile.py` beside a script would hide the module of the standard library
that `cProfile`, and `torch.compile` with it, imports.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from statistics import median

import torch
from contest import FACTORS, Case, Run, make_field, make_y0, pin
from engine import prepare
from torch.profiler import ProfilerActivity, profile, record_function

from skode._engine import checkpoint, control, loop, plan, tape
from skode._engine.solve import solve
from skode._nn import fields

CASES = (
    ((1, 8, 32), 1e-3, "mild"),
    ((32, 8, 32), 1e-3, "mild"),
    ((32, 8, 32), 1e-5, "hard"),
    ((256, 16, 64), 1e-3, "mild"),
    ((256, 16, 64), 1e-5, "hard"),
)
KINDS = {"forward": {}, "gradient": {"gradient": "checkpoint"}}
SECONDS = 2.0
"""For each measurement."""

KERNEL = fields.MLPKernel
GROUPS: dict[str, tuple[tuple[object, str], ...]] = {
    "field: evaluations": ((KERNEL, "begin"), (KERNEL, "evaluate")),
    "field: linearisations": (
        (KERNEL, "begin_linear"),
        (KERNEL, "linearize"),
        (KERNEL, "linearize_all"),
    ),
    "field: cotangents": ((KERNEL, "pull"),),
    "field: parameters": ((KERNEL, "accumulate"), (KERNEL, "gradients")),
    "stages, forwards": (
        (loop, "fill_stages"),
        (loop, "end_of_step"),
        (loop, "stage_times"),
    ),
    "stages, backwards": ((checkpoint._Reverse, "_step"),),
    "error and controller": (
        (control.ErrorNorm, "ratio"),
        (control.PIController, "decide"),
    ),
    "first step": ((control.PIController, "first"),),
    "acceptance and bookkeeping": ((loop, "_attempt"),),
    "tape": ((tape.Recorder, "observe"), (tape.Recorder, "tape")),
    "start and end of the loops": (
        (plan, "integrate"),
        (checkpoint._Reverse, "run"),
    ),
}
"""Functions, by what they do. A function's time is its group's until it calls one of
another group."""
DOOR = "the door, autograd, the loss"
"""What is left."""
ALL = "all"


@dataclass
class Stopwatch:
    """Seconds of each group, without those of the groups that it calls."""

    seconds: Counter = field(default_factory=Counter)
    inner: list[float] = field(default_factory=list)

    def around(self, group: str, function: Callable) -> Callable:
        inner, seconds, now = self.inner, self.seconds, time.perf_counter

        @wraps(function)
        def timed(*args, **kwargs):
            begin = now()
            inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                spent = now() - begin
                seconds[group] += spent - inner.pop()
                if inner:
                    inner[-1] += spent

        return timed


def annotated(group: str, function: Callable) -> Callable:
    """Return the function in a range that the profiler sees."""

    @wraps(function)
    def ranged(*args, **kwargs):
        with record_function(group):
            return function(*args, **kwargs)

    return ranged


@contextmanager
def wrapped(around: Callable[[str, Callable], Callable]) -> Iterator[None]:
    """Wrap the functions of all groups for a while."""
    places = [(g, *place) for g, places in GROUPS.items() for place in places]
    plain = [getattr(owner, name) for _, owner, name in places]
    for (group, owner, name), function in zip(places, plain, strict=True):
        setattr(owner, name, around(group, function))
    try:
        yield
    finally:
        for (_, owner, name), function in zip(places, plain, strict=True):
            setattr(owner, name, function)


def repeatedly(run: Run) -> list[float]:
    """Run for a while; return the seconds of each run."""
    taken = []
    while sum(taken) < SECONDS:
        begin = time.perf_counter()
        run()
        taken.append(time.perf_counter() - begin)
    return taken


def shares(run: Run) -> dict[str, float]:
    """Return the share of each group in the time of a run."""
    watch = Stopwatch()
    with wrapped(watch.around):
        repeatedly(watch.around(DOOR, run))
    total = sum(watch.seconds.values())
    return {group: spent / total for group, spent in watch.seconds.items()}


def operations(run: Run) -> Counter:
    """Return the number of operations of each group, those that call no other."""
    count = Counter()
    with (
        wrapped(annotated),
        profile(activities=[ProfilerActivity.CPU]) as profiler,
    ):
        run()
    for event in profiler.events():
        above = event.cpu_parent
        if not event.name.startswith("aten::") or (
            above is not None and above.name.startswith("aten::")
        ):
            continue
        while above is not None and above.name not in GROUPS:
            above = above.cpu_parent
        count[DOOR if above is None else above.name] += 1
    return count


@dataclass
class Column:
    """One case."""

    share: dict[str, float]
    operations: Counter
    ms: float
    attempts: int

    def cell(self, group: str) -> str:
        share = self.share.get(group, 0.0)
        if not share:
            return "-"
        spent = 1e3 * share * self.ms / self.attempts
        count = self.operations[group] / self.attempts
        return f"{100 * share:.0f} % · {spent:.0f} µs · {count:.0f}"


def measure(case: Case, kind: str) -> Column:
    run = prepare(case, kind, **KINDS[kind])
    with torch.no_grad():
        tols = {"rtol": case.tol, "atol": case.tol}
        stats = solve(case.field, case.y0, case.span, **tols).stats
    attempts = int((stats.n_accepted + stats.n_rejected).max())
    run()
    ms = 1e3 * median(repeatedly(run))
    return Column(shares(run), operations(run), ms, attempts)


def table(kind: str) -> str:
    columns = {}
    for size, tol, label in CASES:
        net = make_field(size, FACTORS[label], "cpu")
        name = f"{size} {tol:.0e} {label}"
        columns[name] = measure(Case(net, make_y0(size, "cpu"), tol), kind)
    lines = [
        f"| {kind}: share · per attempt · operations | {' | '.join(columns)} |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for group in (*GROUPS, DOOR):
        cells = [column.cell(group) for column in columns.values()]
        if any(cell != "-" for cell in cells):
            lines.append(f"| {group} | {' | '.join(cells)} |")
    for column in columns.values():
        column.share = {ALL: 1.0}
        column.operations = Counter({ALL: column.operations.total()})
    cells = [column.cell(ALL) for column in columns.values()]
    lines.append(f"| {ALL} | {' | '.join(cells)} |")
    facts = {
        "milliseconds": lambda c: f"{c.ms:.2f}",
        "attempted steps": lambda c: str(c.attempts),
    }
    for name, fact in facts.items():
        cells = [fact(column) for column in columns.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    pin(args.threads)
    print("\n\n".join(table(kind) for kind in KINDS))


if __name__ == "__main__":
    main()
