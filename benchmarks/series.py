"""Forecasts of irregular series, how well their intervals hold, and what they cost.

    python benchmarks/series.py --cache series.jsonl
    python benchmarks/series.py --tasks spirals-30 pbc --methods gp skode --splits 3
    python benchmarks/series.py --race --tasks spirals-30
    python benchmarks/series.py --check

Tasks stand in `series_data.py`, methods in `series_peers.py`. torchdiffeq comes with
skode; statsmodels is in requirements.txt; the Brusselator and the patients need their
folder (`--data`); skode must be installed, or be found by `PYTHONPATH=.`. Who or what
is absent is left out, and named.

Whoever trains has `--budget` CPU seconds, one thread; skode has its default arguments
and stops by itself. Series are standardised by the training values for the peers, which
also know where the task cuts a history from its future; skode has the frames as they
are. Errors are divided by the task's scale. What is scored, on every value of every
test series:

- RMSE and MAE of the mean forecast, on the future without noise where that is known;
- NLL, nats per value, of the method's own predictive density: a normal, a mixture of
  normals, or what `series_view.by_quantiles` makes of quantiles (boosting and skode);
- CRPS by twice the mean pinball loss over 19 levels, 0.05 to 0.95: a sum over levels
  instead of the integral, the same for everyone;
- coverage of the interval from the quantile at 0.05 to that at 0.95;
- the RMSE inside a history's span, where a task has held values back there.

`--race` asks how soon skode reaches the RMSE at which the published latent ODE (the
better of both encoders, from the cache) ends its budget: skode is refitted with
`max_iter` 1, 2, 4, ... until its test RMSE is as low; the last fit alone is clocked.
"""

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from report import heading, markdown
from series_data import DATA, FILES, TASKS, make_task
from series_peers import EVEN, METHODS, PUBLISHED, fit_skode
from series_view import LEVELS, as_view, check
from threadpoolctl import threadpool_limits

PACKAGES = ("torch", "torchdiffeq", "scikit-learn", "statsmodels")

KEYS = ("task", "split", "method", "seed", "budget")
FIGURES = {
    "rmse": "RMSE",
    "mae": "MAE",
    "nll": "NLL",
    "crps": "CRPS",
    "coverage": "cover 90 %",
    "inside": "RMSE inside",
    "fit": "fit s",
    "predict": "predict s",
}


def absent(args):
    """Return the names that cannot take part, and why."""
    why = {}
    if importlib.util.find_spec("statsmodels") is None:
        why |= dict.fromkeys(("structural", "co2"), "pip install statsmodels")
    if "skode" in args.methods or args.race:
        try:
            import skode

            if not hasattr(skode, "LatentODEForecaster"):
                why["skode"] = "this skode has no LatentODEForecaster"
        except ImportError:
            why["skode"] = "pip install skode"
    for name, file in FILES.items():
        if not (args.data / file).exists():
            why[name] = f"no {file} in {args.data}"
    return {k: v for k, v in why.items() if k in (*args.tasks, *args.methods)}


# --- Measuring -----------------------------------------------------------------------


def clocked(function, *args, **params):
    """Return what `function` returns, and the CPU seconds that it takes."""
    start = time.process_time()
    result = function(*args, **params)
    return result, time.process_time() - start


def figures(view, forecast):
    """Return the scores of a forecast, in units of the task's scale."""
    task = view.task
    scale = task.scale.to_numpy()
    rows = slice(0, len(task.future))
    unit = view.spread / scale

    def scaled(frame):
        return (frame.to_numpy(dtype=float) - view.centre) / view.spread

    truth, seen = scaled(task.future), scaled(task.observed)
    kept = ~np.isnan(seen)
    mean, quantiles = forecast.mean[rows], forecast.quantiles[rows]
    if not (np.isfinite(mean[kept]).all() and np.isfinite(quantiles[kept]).all()):
        raise FloatingPointError("some forecasts are not finite")
    error = ((mean - truth) * unit)[~np.isnan(truth)]
    every = np.concatenate([seen, np.full((view.count - len(seen), len(unit)), np.nan)])
    nats = (forecast.log_density(every)[rows] - np.log(unit))[kept]
    above = seen[..., None] - quantiles  # (N, D, Q)
    pinball = np.maximum(LEVELS * above, (LEVELS - 1) * above).mean(axis=-1)
    covered = (quantiles[..., 0] <= seen) & (seen <= quantiles[..., -1])
    inside = np.nan
    if task.inside is not None:
        off = (forecast.mean[len(truth) :] - scaled(task.inside)) * unit
        inside = float(np.sqrt(np.mean(off**2)))
    return {
        "rmse": float(np.sqrt(np.mean(error**2))),
        "mae": float(np.mean(np.abs(error))),
        "nll": float(-nats.mean()),
        "crps": float((2 * pinball * unit)[kept].mean()),
        "coverage": float(covered[kept].mean()),
        "inside": inside,
    }


def measure(method, view, budget, seed):
    """Fit and score one method; return what its record says."""
    fitted, fit = clocked(METHODS[method], view, budget, seed)
    forecast, predict = clocked(fitted.predict)
    found = figures(view, forecast)
    return found | {"fit": fit, "predict": predict, "note": fitted.note}


def keep(args, record):
    """Append a record to the cache, and tell of it."""
    if args.cache:
        with args.cache.open("a") as file:
            file.write(json.dumps(record) + "\n")
    where = f"{record['task']}/{record['split']} {record['method']}: "
    told = ", ".join(f"{k} {record[k]:.3f}" for k in FIGURES if k in record)
    print(
        where + record.get("error", f"{told}; {record.get('note')}"),
        file=sys.stderr,
        flush=True,
    )


def read(args):
    """Return the records of the cache but those that failed; the latest ones win."""
    if not args.cache or not args.cache.exists():
        return []
    records = [json.loads(line) for line in args.cache.read_text().splitlines()]
    found = {tuple(r[k] for k in KEYS): r for r in records if "error" not in r}
    return list(found.values())


def run_all(args, records):
    """Run what `records` lacks: one split of everything first."""
    done = {tuple(r[k] for k in KEYS) for r in records}
    for split in args.splits:
        for name in args.tasks:
            wanted = [
                m
                for m in args.methods
                if (name, split, m, args.seed, args.budget) not in done
                and name in EVEN.get(m, TASKS)
            ]
            if args.again:
                wanted = [m for m in args.methods if name in EVEN.get(m, TASKS)]
            if not wanted:
                continue
            view = as_view(make_task(name, split, args.data))
            for method in wanted:
                key = (name, split, method, args.seed, args.budget)
                record = dict(zip(KEYS, key, strict=True))
                try:
                    record |= measure(method, view, args.budget, args.seed + split)
                except Exception as error:  # must not cost the others' hours
                    record["error"] = f"{type(error).__name__}: {error}"
                keep(args, record)
                records.append(record)


# --- The race ------------------------------------------------------------------------


def race(args, records):
    """Print how many seconds skode needs to be as good as the published latent ODE."""
    rows = []
    for name in args.tasks:
        for split in args.splits:
            known = [
                r
                for r in records
                if (r["task"], r["split"], r["seed"], r["budget"])
                == (name, split, args.seed, args.budget)
                and r["method"] in PUBLISHED
                and "error" not in r
            ]
            if not known:
                continue
            rival = min(known, key=lambda r: r["rmse"])
            view = as_view(make_task(name, split, args.data))
            row = [f"{name}/{split}", rival["method"], f"{rival['rmse']:.3f}"]
            row += [f"{rival['fit']:.1f}", *reach(args, view, split, rival)]
            rows.append(row)
            print(" ".join(row), file=sys.stderr, flush=True)
    head = ["task", "rival", "its RMSE", "its fit s", "max_iter", "RMSE", "fit s"]
    print(markdown([*head, "times faster"], rows))


def reach(args, view, split, rival):
    """Return the first of skode's fits that is as good as the rival's, as text."""
    iterations, spent = 1, 0.0
    while spent < rival["fit"]:
        fitted, spent = clocked(
            fit_skode, view, args.budget, args.seed + split, max_iter=iterations
        )
        rmse = figures(view, fitted.predict())["rmse"]
        if rmse <= rival["rmse"]:
            ratio = rival["fit"] / spent
            return str(iterations), f"{rmse:.3f}", f"{spent:.2f}", f"{ratio:.1f}"
        iterations *= 2
    return "-", f"{rmse:.3f}", f"{spent:.2f}", "-"


# --- Telling -------------------------------------------------------------------------


def cell(values, best):
    """Return 'mean ± standard error' of one figure per split."""
    values = np.asarray(values, dtype=float)
    if not len(values) or np.isnan(values).any():
        return "-"
    said = f"{values.mean():.3g}"
    if len(values) > 1:
        said += f" ± {values.std(ddof=1) / np.sqrt(len(values)):.2g}"
    return f"**{said}**" if values.mean() <= best else said


def report(args, records):
    """Print one table per task."""
    good = pd.DataFrame([r for r in records if "error" not in r])
    if good.empty:
        return
    good = good[
        (good["seed"] == args.seed)
        & (good["budget"] == args.budget)
        & good["split"].isin(args.splits)
        & good["method"].isin(args.methods)
    ]
    for name in args.tasks:
        found = good[good["task"] == name]
        if found.empty:
            continue
        means = found.groupby("method")[list(FIGURES)].mean()
        rows = []
        for method in args.methods:
            own = found[found["method"] == method]
            if own.empty:
                continue
            row = [f"{method} ({len(own)})"]
            for figure in FIGURES:
                marked = figure in ("rmse", "mae", "nll", "crps", "inside")
                best = means[figure].min() if marked else -np.inf
                row.append(cell(own[figure], best))
            rows.append(row)
        print(f"### {name}\n")
        print(markdown(["method (splits)", *FIGURES.values()], rows))
    for r in records:
        if "error" in r:
            print(f"- {r['task']}/{r['split']} {r['method']}: {r['error']}")


def parse():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--splits", type=int, default=1, help="how many, from 0 (1)")
    add("--budget", type=float, default=120.0, help="CPU seconds of a peer (120)")
    add("--seed", type=int, default=0)
    add("--data", type=Path, default=DATA, metavar="DIR")
    add("--cache", type=Path, metavar="FILE", help="keep results; run what it lacks")
    add("--again", action="store_true", help="run also what FILE has")
    add("--race", action="store_true", help="time to the published model's RMSE")
    add("--check", action="store_true", help="test the forecasts' densities, and end")
    args = parser.parse_args()
    args.splits = range(args.splits)
    return args


def main():
    """Run the benchmark and print its report."""
    args = parse()
    if args.check:
        check()
        return
    torch.set_num_threads(1)
    threadpool_limits(1)
    left_out = absent(args)
    args.methods = [m for m in args.methods if m not in left_out]
    args.tasks = [name for name in args.tasks if name not in left_out]
    records = read(args)
    budget = f"{args.budget:g} CPU seconds at most for whoever trains, seed {args.seed}"
    print(heading("series.py", PACKAGES, budget, left_out), flush=True)
    if args.race:
        race(args, records)
        return
    run_all(args, records)
    report(args, records)


if __name__ == "__main__":
    main()
