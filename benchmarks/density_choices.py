"""What each default of `CNFDensityEstimator` is worth: fits without it.

    python benchmarks/density_choices.py [--only checkerboard concrete ...] [--data DIR]

One fit each on the first split of `density_data.py`, in float32: held-out nats, less
those of the default arguments, and CPU seconds of the fit over theirs.
"""

import argparse
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from density_data import make_split

from skode import CNFDensityEstimator

CHOICES = {
    "default": {},
    "error_penalty=0": {"error_penalty": 0.0},
    "kinetic_penalty=0": {"kinetic_penalty": 0.0},
    "jacobian_penalty=0.01": {"jacobian_penalty": 0.01},
    "noise=0": {"noise": 0.0},
    "alpha=0": {"alpha": 0.0},
    "averaging=0": {"averaging": 0.0},
    "marginals=None": {"marginals": None},
    "marginals='normal'": {"marginals": "normal"},
    "early_stopping=True": {"early_stopping": True},
    "hidden (64,)": {"hidden_layer_sizes": (64,)},
    "hidden (128, 128)": {"hidden_layer_sizes": (128, 128)},
    "hidden (64, 64, 64)": {"hidden_layer_sizes": (64, 64, 64)},
    "trace='hutchinson'": {"trace": "hutchinson"},
    "flow matching": {"objective": "flow_matching"},
    "two stages, 60 epochs": {"objective": "two_stage", "max_iter": 60},
}


def measure(data, params):
    """Return held-out nats and CPU seconds of a fit."""
    start = time.process_time()
    model = CNFDensityEstimator(random_state=0, **params)
    model.fit(data.train.astype(np.float32))
    seconds = time.process_time() - start
    return model.score(data.test.astype(np.float32)), seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tables = ["checkerboard", "power-plant", "concrete", "breast_cancer", "iris"]
    parser.add_argument("--only", nargs="+", default=tables)
    shared = Path(__file__).resolve().parents[2] / "shared" / "data" / "tables"
    parser.add_argument("--data", type=Path, default=shared)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    splits = {name: make_split(name, 0, args.data, 0) for name in args.only}
    print(f"| | {' | '.join(args.only)} |\n| --- |{' --- |' * len(args.only)}")
    first = {}
    for choice, params in CHOICES.items():
        cells = []
        for name, data in splits.items():
            if not params:
                measure(data, {"max_iter": 1})  # compiles, once on a machine
            nats, seconds = measure(data, params)
            base_nats, base_seconds = first.setdefault(name, (nats, seconds))
            shown = f"{nats - base_nats:+.3f}" if params else f"{nats:.3f}"
            cells.append(f"{shown}, {seconds / base_seconds:.2g}")
        print(f"| {choice} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
