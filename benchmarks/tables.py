"""Scores and seconds of ODE estimators and their peers on small tables.

    python benchmarks/tables.py --jobs 4 --save tables.json
    python benchmarks/tables.py --estimators linear mlp histgb forest handwritten

Five splits (80/20, seeds 0 to 4, stratified for classes) of four tables of scikit-learn
and, where their folder is there, five of the UCI repository. A unit of work is one
split of one table: one process with one thread fits all estimators in turn. Inputs are
standardised on the training rows for everyone. skode must be installed, or be found by
`PYTHONPATH=.`; it is imported only when it takes part.

Everyone runs with default arguments. `mlp` regresses on a standardised target: on raw
ones its default 200 epochs end too early to be a fair peer (yacht 8.3 against 3.8).
skode and the hand-written net scale the target themselves; the others do not care.
"""

import argparse
import json
import os
import platform
import shlex
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import date
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from sklearn import datasets
from sklearn.compose import TransformedTargetRegressor
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.preprocessing import StandardScaler

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ("iris", "wine", "breast_cancer", "digits")
TARGETS = ("yacht", "energy", "concrete", "wine-quality-red", "power-plant")
ESTIMATORS = ("linear", "mlp", "histgb", "forest", "handwritten", "skode")


def load(table, folder):
    """Return X, y of a table by name."""
    if table in CLASSES:
        return getattr(datasets, f"load_{table}")(return_X_y=True)
    rows = np.loadtxt(folder / f"{table}.csv", delimiter=",", skiprows=1)
    return rows[:, :-1], rows[:, -1]


def make(name, classify, **params):
    """Return the estimator `name`; `params` reach those that have such an argument."""
    if name == "handwritten":
        from handwritten import HandwrittenODE

        estimator = HandwrittenODE(classify)
    elif name == "skode":
        import skode

        estimator = skode.ODEClassifier() if classify else skode.ODERegressor()
    elif classify:
        estimator = {
            "linear": LogisticRegression,
            "mlp": MLPClassifier,
            "histgb": HistGradientBoostingClassifier,
            "forest": RandomForestClassifier,
        }[name]()
    else:
        estimator = {
            "linear": Ridge(),
            "mlp": TransformedTargetRegressor(
                MLPRegressor(), transformer=StandardScaler()
            ),
            "histgb": HistGradientBoostingRegressor(),
            "forest": RandomForestRegressor(),
        }[name]
    names = {key.removeprefix("regressor__"): key for key in estimator.get_params()}
    return estimator.set_params(
        **{names[k]: v for k, v in params.items() if k in names}
    )


def run_unit(table, split, estimators, folder):
    """Fit and score the estimators on one split of one table; return their records."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ConvergenceWarning)
    classify = table in CLASSES
    X, y = load(table, folder)
    X_train, X_test, y_train, y_test = train_test_split(
        X, y, test_size=0.2, random_state=split, stratify=y if classify else None
    )
    scaler = StandardScaler().fit(X_train)
    X_train, X_test = scaler.transform(X_train), scaler.transform(X_test)
    records = []
    for name in estimators:
        record = {"table": table, "split": split, "estimator": name}
        try:
            # What a library does once, at its first fit, is nobody's fit time.
            make(name, classify, max_iter=2).fit(X_train[:100], y_train[:100])
            estimator = make(name, classify, random_state=split)
            start = time.perf_counter()
            estimator.fit(X_train, y_train)
            record["fit"] = time.perf_counter() - start
            seconds = []
            for _ in range(3):
                start = time.perf_counter()
                predicted = estimator.predict(X_test)
                seconds.append(time.perf_counter() - start)
            record["predict"] = float(np.median(seconds))
            record["score"] = float(
                np.mean(predicted == y_test)
                if classify
                else np.sqrt(np.mean((predicted - y_test) ** 2))
            )
        except Exception as error:  # one failure must not cost the others' hours
            record["error"] = f"{type(error).__name__}: {error}"
        records.append(record)
    return records


def run_all(args, records):
    """Run what `records` lacks, `args.jobs` units at a time; save as results come."""
    done = {(r["table"], r["split"], r["estimator"]) for r in records}
    units = []
    for table in args.tables:
        for split in range(args.splits):
            left = [e for e in args.estimators if (table, split, e) not in done]
            if left:
                units.append((table, split, left))
    # Large tables first, so that no long unit is left alone at the end.
    size = {table: load(table, args.data)[0].size for table in args.tables}
    units.sort(key=lambda unit: -size[unit[0]])
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = "1"  # read by the processes that are spawned below
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(run_unit, *unit, args.data) for unit in units]
        for count, future in enumerate(as_completed(futures), start=1):
            new = future.result()
            records += new
            if args.save:
                aside = args.save.with_suffix(".part")
                aside.write_text(json.dumps(records, indent=1))
                aside.replace(args.save)
            said = ", ".join(
                f"{r['estimator']} {r['error']}"
                if "error" in r
                else f"{r['estimator']} {r['score']:.3f} ({r['fit']:.2f} s)"
                for r in new
            )
            where = f"{new[0]['table']}/{new[0]['split']}"
            print(f"[{count}/{len(units)}] {where}: {said}", file=sys.stderr)


def standard_error(values):
    """Return the standard error of the mean."""
    values = np.asarray(values)
    return values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan


def markdown(header, rows):
    """Return a markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def report(args, records):
    """Print the tables of scores, of seconds and of ours against its nearest peers."""
    good = {}  # (table, estimator) -> {split: record}
    for r in records:
        if "error" not in r and r["split"] < args.splits:
            good.setdefault((r["table"], r["estimator"]), {})[r["split"]] = r

    def values(table, name, what, splits=None):
        found = good.get((table, name), {})
        return np.array([found[s][what] for s in sorted(splits or found)])

    def seconds(table, name, what):
        found = values(table, name, what)
        return found.mean() if len(found) else np.nan

    def number(value, form=".3g"):
        return "-" if np.isnan(value) else format(value, form)

    scores, times, verdicts = [], [], []
    for table in args.tables:
        score_row, time_row = [table], [table]
        for name in args.estimators:
            found = values(table, name, "score")
            cell = (
                f"{found.mean():.3f} ± {standard_error(found):.3f}"
                if len(found)
                else "-"
            )
            missing = args.splits - len(found)
            score_row.append(f"{cell} ({missing} failed)" if missing else cell)
            fit, predict = seconds(table, name, "fit"), seconds(table, name, "predict")
            time_row.append(f"{number(fit)} / {number(1e3 * predict)}")
        ours = seconds(table, "skode", "fit")
        time_row.append(number(seconds(table, "handwritten", "fit") / ours, ".1f"))
        time_row.append(number(ours / seconds(table, "mlp", "fit"), ".1f"))
        scores.append(score_row)
        times.append(time_row)
        verdicts += verdict(table, values, good)

    names = list(args.estimators)
    print(heading(args))
    print("Accuracy (classes) or RMSE (yacht and below): mean ± standard error.\n")
    print(markdown(["table", *names], scores))
    print("Fit seconds / predict milliseconds, one thread; fit-time ratios.\n")
    print(markdown(["table", *names, "handwritten : skode", "skode : mlp"], times))
    if verdicts:
        print(
            "skode against the better of mlp and handwritten; worse by > 0 is worse. "
            "Not worse: by no more than one standard error, of the paired difference / "
            "the larger of the two.\n"
        )
        head = ["table", "peer", "worse by", "SE paired", "larger SE", "not worse"]
        print(markdown(head, verdicts))
    for r in records:
        if "error" in r:
            print(f"- {r['table']}/{r['split']} {r['estimator']}: {r['error']}")


def verdict(table, values, good):
    """Return the row, if any, that compares ours with the better of its two peers."""
    peers = [n for n in ("mlp", "handwritten") if (table, n) in good]
    if not peers or (table, "skode") not in good:
        return []
    sign = -1 if table in CLASSES else 1  # scores -> losses
    peer = min(peers, key=lambda name: sign * values(table, name, "score").mean())
    splits = good[table, "skode"].keys() & good[table, peer].keys()
    if not splits:
        return []
    ours, theirs = (values(table, name, "score", splits) for name in ("skode", peer))
    worse = sign * (ours - theirs)
    paired = standard_error(worse)
    larger = max(standard_error(ours), standard_error(theirs))
    answers = ["yes" if worse.mean() <= se else "**no**" for se in (paired, larger)]
    figures = [f"{worse.mean():+.4f}", f"{paired:.4f}", f"{larger:.4f}"]
    return [[table, peer, *figures, " / ".join(answers)]]


def heading(args):
    """Say how, where and when these numbers were made."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if "model name" in line]
    packages = ("torch", "torchdiffeq", "scikit-learn")
    return (
        f"`python benchmarks/tables.py {shlex.join(sys.argv[1:])}`\n\n"
        f"{date.today()}; {os.cpu_count()} cores, "
        f"{models[0] if models else platform.machine()}; "
        f"Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in packages)
        + f"; {args.splits} splits, {args.jobs} processes of one thread.\n"
    )


def parse():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--tables", nargs="+", choices=CLASSES + TARGETS, default=CLASSES + TARGETS)
    add("--estimators", nargs="+", choices=ESTIMATORS, default=ESTIMATORS)
    add("--splits", type=int, default=5, help="how many, from seed 0 (5)")
    add("--jobs", type=int, default=1, help="units of work at a time (1)")
    add("--data", type=Path, default=ROOT / "../shared/data/tables", metavar="DIR")
    add("--save", type=Path, metavar="FILE.json", help="keep raw results as they come")
    add("--resume", action="store_true", help="run only what FILE.json lacks")
    args = parser.parse_args()
    if args.resume and not args.save:
        parser.error("--resume needs --save FILE.json")
    absent = [
        t for t in args.tables if t in TARGETS and not (args.data / f"{t}.csv").exists()
    ]
    if absent:
        print(f"not in {args.data}, left out: {', '.join(absent)}", file=sys.stderr)
        args.tables = [t for t in args.tables if t not in absent]
    return args


def main():
    """Run the benchmark and print its report."""
    args = parse()
    records = []
    if args.resume and args.save.exists():
        records = [r for r in json.loads(args.save.read_text()) if "error" not in r]
    run_all(args, records)
    report(args, records)


if __name__ == "__main__":
    main()
