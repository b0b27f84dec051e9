"""Held-out log-densities, and the seconds they cost, of flows and their peers.

    python benchmarks/density.py --json density.json
    python benchmarks/density.py --only concrete iris --methods gmm-bic skode
    python benchmarks/density.py --scoring --only power-plant
    python benchmarks/density.py --check

zuko's flows need `pip install zuko` (see requirements.txt), the UCI tables their
folder (`--data`); skode must be installed, or be found by `PYTHONPATH=.`. Who or what
is absent is left out, and named. Methods stand in `density_peers.py`, data in
`density_data.py`.

Every table, and every toy, is standardised by the training rows for everyone, and nats
are in these units. Neural peers train for `--budget` CPU seconds at most; skode has its
default arguments, and stops by itself. Seconds are those of the CPU, one thread.

`--scoring` asks how fast continuous flows score rows: at rtol = atol = 1e-5, and at the
same accuracy, which is the loosest tolerance whose error, as root mean square against
the flow's own float64 solve at 1e-9, is no larger than skode's at 1e-5.
"""

import argparse
import importlib.util
import json
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from density_data import DATA, TOYS, UCI, check, make_split
from density_peers import CONTINUOUS, METHODS, NEURAL
from report import heading, markdown
from threadpoolctl import threadpool_limits

PACKAGES = ("torch", "torchdiffeq", "zuko", "scikit-learn")

ROOT = Path(__file__).resolve().parents[1]
RATE_ROWS, RATE_VALUES = 10_000, 100_000
"""A rate is measured on so many rows, or on so many values of wide tables."""
SMALL, LARGE = 600, 1000
"""Rows up to, and above, which a table is small or large: skode's aims differ."""
TOLERANCE = 1e-5
TOLERANCES = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6)
"""At 1e-7, solvers that compute in float32 may never end."""


def absent(methods, only, folder):
    """Return the names that cannot take part, and why."""
    why = {}
    for method in methods:
        if method.startswith("zuko") and importlib.util.find_spec("zuko") is None:
            why[method] = "pip install zuko"
        if method == "skode" and not _has_estimator():
            why[method] = "this skode has no CNFDensityEstimator"
    for name in only:
        if name in UCI and not (folder / f"{name}.csv").exists():
            why[name] = f"no {name}.csv in {folder}"
    return why


def _has_estimator():
    if importlib.util.find_spec("skode") is None:
        return False
    import skode

    return hasattr(skode, "CNFDensityEstimator")


# --- Measuring -----------------------------------------------------------------------


def clocked(function, *args):
    """Return what `function` returns, and the CPU seconds that it takes."""
    start = time.process_time()
    result = function(*args)
    return result, time.process_time() - start


def rate(function, argument, rows, runs=3, enough=5.0):
    """Return rows per CPU second: the median run; slow ones are not repeated."""
    seconds = []
    while len(seconds) < runs and sum(seconds) < enough:
        seconds.append(clocked(function, argument)[1])
    return rows / float(np.median(seconds))


def many(rows):
    """Return as many rows as a rate is measured on, drawn from `rows`."""
    count = min(RATE_ROWS, RATE_VALUES // rows.shape[1])
    return rows[np.random.default_rng(0).integers(len(rows), size=count)]


def warm_up(method, data):
    """Do what a library does once, at its first fit: nobody's fit time."""
    if method in NEURAL:
        fitted = METHODS[method](data.train[:100], 0.1, 0)
        fitted.score_samples(data.test[:10])


def measure(method, data, budget, seed):
    """Fit and score one method; return what its record says."""
    fitted, seconds = clocked(METHODS[method], data.train, budget, seed)
    nats = fitted.score_samples(data.test)
    rows = many(data.test)
    return {
        "nats": float(np.mean(nats)),
        "fit": seconds,
        "scored": rate(fitted.score_samples, rows, len(rows)),
        "sampled": rate(fitted.sample, len(rows), len(rows)),
        "note": fitted.note,
    }


def splits_of(name, args):
    return args.splits or (1 if name in TOYS else 3)


def run_all(args, records):
    """Run what `records` lacks: one split of everything first; save as results come."""
    keys = ("data", "split", "method", "seed", "budget")
    done = {tuple(r[k] for k in keys) for r in records}
    warm = set()
    for split in range(max([splits_of(name, args) for name in args.only], default=0)):
        for name in args.only:
            if split >= splits_of(name, args):
                continue
            data = make_split(name, split, args.data, args.seed)
            for method in args.methods:
                key = (name, split, method, args.seed, args.budget)
                if key in done:
                    continue
                record = dict(zip(keys, key, strict=True))
                record |= {"rows": len(data.train) + len(data.test)}
                record |= {"truth": data.truth if name in TOYS else None}
                try:
                    if method not in warm:
                        warm_up(method, data)
                        warm.add(method)
                    record |= measure(method, data, args.budget, args.seed + split)
                except (
                    Exception
                ) as error:  # one failure must not cost the others' hours
                    record["error"] = f"{type(error).__name__}: {error}"
                records.append(record)
                save(args.json, records)
                print(told(record), file=sys.stderr, flush=True)


def told(r):
    where = f"{r['data']}/{r['split']} {r['method']}: "
    if "error" in r:
        return where + r["error"]
    truth = "" if r["truth"] is None else f" (truth {r['truth']:.3f})"
    return where + (
        f"{r['nats']:.3f}{truth}, fit {r['fit']:.1f} s, scored {r['scored']:.0f}/s, "
        f"sampled {r['sampled']:.0f}/s, {r['note']}"
    )


def save(path, records):
    if path:
        aside = path.with_suffix(".part")
        aside.write_text(json.dumps(records, indent=1))
        aside.replace(path)


# --- Telling -------------------------------------------------------------------------


class Results:
    """The records of this run's data, methods, seed and budget."""

    def __init__(self, args, records):
        self.good = {
            (r["data"], r["method"], r["split"]): r
            for r in records
            if "error" not in r
            and (r["seed"], r["budget"]) == (args.seed, args.budget)
            and r["split"] < splits_of(r["data"], args)
        }

    def values(self, data, method, what):
        """Return a figure of every split that was run."""
        found = [r for (d, m, _), r in self.good.items() if (d, m) == (data, method)]
        return np.array([r[what] for r in sorted(found, key=lambda r: r["split"])])

    def mean(self, data, method, what):
        values = self.values(data, method, what)
        return values.mean() if len(values) else np.nan


def number(value, form):
    return "-" if np.isnan(value) else format(value, form)


def with_error(values):
    """Return 'mean ± standard error' of one figure per split."""
    if len(values) < 2:
        return "-" if not len(values) else f"{values[0]:.3f}"
    return f"{values.mean():.3f} ± {values.std(ddof=1) / np.sqrt(len(values)):.3f}"


def report(args, results):
    """Print the tables of nats, of gaps, of seconds and of rates."""
    methods = args.methods
    nats, gaps, fits, rates, ratios, verdicts = [], [], [], [], [], []
    for data in args.only:
        nats.append([data])
        fits.append([data])
        ratios.append([data])
        rates.append([data])
        gap = [data]
        for method in methods:
            values = results.values(data, method, "nats")
            nats[-1].append(with_error(values))
            if data in TOYS:
                truths = results.values(data, method, "truth")
                gap.append(with_error(values - truths))
            fit = results.mean(data, method, "fit")
            fits[-1].append(number(fit, ".3g"))
            ratios[-1].append(number(fit / results.mean(data, "skode", "fit"), ".2g"))
            thousands = [
                number(results.mean(data, method, what) / 1e3, ".3g")
                for what in ("scored", "sampled")
            ]
            rates[-1].append(" / ".join(thousands))
        if data in TOYS:
            gaps.append(gap)
        verdicts += verdict(data, results)
    print(
        "Held-out nats per row (mean ± standard error of the splits); more is better.\n"
    )
    print(markdown(["data", *methods], nats))
    if gaps:
        print("Toys: held-out nats less those of the true density on the same rows.\n")
        print(markdown(["data", *methods], gaps))
    print("Fit, CPU seconds.\n")
    print(markdown(["data", *methods], fits))
    if verdicts:
        print("Fit, in units of skode's.\n")
        print(markdown(["data", *methods], ratios))
    print("Thousands of rows per second: scored / sampled.\n")
    print(markdown(["data", *methods], rates))
    if verdicts:
        print(
            "skode against the best of its rivals. On toys, and above "
            f"{LARGE} rows: better than each neural one at a third of its fit time; up "
            f"to {SMALL} rows: than `gmm-bic`, `zuko-nsf` and `zuko-cnf` less 0.3 nats."
            " Fit: the rival's seconds, and the quickest one's, in units of skode's.\n"
        )
        head = ["data", "skode", "best rival", "nats", "ahead by", "fit", "met"]
        print(markdown(head, verdicts))


def verdict(data, results):
    """Return the row, if any, that compares ours with its best rival."""
    ours = results.mean(data, "skode", "nats")
    if np.isnan(ours):
        return []
    rows = results.values(data, "skode", "rows")[0]
    small = rows <= SMALL
    field = ("gmm-bic", "zuko-nsf", "zuko-cnf") if small else sorted(NEURAL - {"skode"})
    rivals = {m: results.mean(data, m, "nats") for m in field}
    rivals = {m: nats for m, nats in rivals.items() if not np.isnan(nats)}
    if not rivals:
        return []
    best = max(rivals, key=rivals.get)
    ahead = ours - rivals[best]
    spent = results.mean(data, "skode", "fit")
    ratios = {m: results.mean(data, m, "fit") / spent for m in rivals}
    if small:
        met = ahead > -0.3
    else:
        met = all(ours > rivals[m] and ratios[m] >= 3 for m in rivals)
    said = "-" if SMALL < rows <= LARGE else "yes" if met else "**no**"
    fits = f"{ratios[best]:.2g} / {min(ratios.values()):.2g}"
    return [
        [data, f"{ours:.3f}", best, f"{rivals[best]:.3f}", f"{ahead:+.3f}", fits, said]
    ]


def score_all(args):
    """Time the continuous flows at equal accuracy, and print the table."""
    rows = []
    # skode first: its error is what the others must reach.
    methods = sorted(set(args.methods) & CONTINUOUS, key=lambda m: (m != "skode", m))
    for name in args.only:
        data = make_split(name, 0, args.data, args.seed)
        points = torch.as_tensor(many(data.test))
        allowed, fastest = np.nan, np.nan
        for method in methods:
            warm_up(method, data)
            # In float32 for everyone: skode would follow the table.
            train = data.train.astype(np.float32)
            flow = METHODS[method](train, args.budget, args.seed).at_tolerance
            found = errors(flow, points[:1000])
            tolerances = [TOLERANCE]
            if method == "skode":
                allowed = found[TOLERANCE][0]
            elif not np.isnan(allowed):
                enough = [tol for tol in found if found[tol][0] <= allowed]
                tolerances.append(max(enough, default=min(found)))
            for tol in dict.fromkeys(tolerances):
                at = partial(flow, tol=tol)
                speed = rate(at, points.float(), len(points))
                if method == "skode":
                    fastest = speed
                rms, largest = found[tol]
                row = [f"{tol:.1g}", f"{rms:.1e}", f"{largest:.1e}", f"{speed:.3g}"]
                rows.append([name, method, *row, number(fastest / speed, ".3g")])
                print(*rows[-1], file=sys.stderr, flush=True)
    print(
        "Scoring: errors in nats of each flow against its own solve at 1e-9 in "
        "float64; the last row of a flow is the one at skode's accuracy.\n"
    )
    head = ["data", "flow", "rtol = atol", "RMS error", "largest", "rows / s"]
    print(markdown([*head, "skode : flow"], rows))


def errors(flow, points):
    """Return {tolerance: (RMS error, largest error)}."""
    exact = flow(points, 1e-9)
    off = {tol: (flow(points.float(), tol) - exact).abs() for tol in TOLERANCES}
    return {
        tol: (x.square().mean().sqrt().item(), x.max().item()) for tol, x in off.items()
    }


def parse():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--only", nargs="+", choices=DATA, default=DATA, metavar="DATA")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--splits", type=int, help="of each (tables 3, toys 1)")
    add("--budget", type=float, default=45.0, help="CPU seconds of a neural peer (45)")
    add("--seed", type=int, default=0)
    add("--data", type=Path, default=ROOT / "../shared/data/tables", metavar="DIR")
    add("--json", type=Path, metavar="FILE", help="keep results; run what it lacks")
    add("--again", action="store_true", help="run also what FILE has")
    add("--scoring", action="store_true", help="rows per second at equal accuracy")
    add("--check", action="store_true", help="test the toys' densities, and end")
    return parser.parse_args()


def read(args):
    """Return the records of a file but those that failed, or shall be run again."""
    if not args.json or not args.json.exists():
        return []
    records = [r for r in json.loads(args.json.read_text()) if "error" not in r]
    if not args.again:
        return records
    return [
        r
        for r in records
        if r["data"] not in args.only
        or r["method"] not in args.methods
        or (r["seed"], r["budget"]) != (args.seed, args.budget)
    ]


def main():
    """Run the benchmark and print its report."""
    args = parse()
    if args.check:
        check()
        return
    torch.set_num_threads(1)
    threadpool_limits(1)
    left_out = absent(args.methods, args.only, args.data)
    args.methods = [m for m in args.methods if m not in left_out]
    args.only = [name for name in args.only if name not in left_out]
    budget = f"{args.budget:g} CPU seconds at most for neural peers, seed {args.seed}"
    print(heading("density.py", PACKAGES, budget, left_out))
    if args.scoring:
        score_all(args)
        return
    records = read(args)
    run_all(args, records)
    report(args, Results(args, records))
    for r in records:
        if "error" in r:
            print(f"- {told(r)}")


if __name__ == "__main__":
    main()
