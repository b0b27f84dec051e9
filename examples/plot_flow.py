"""
==================
A flow in pictures
==================

Points of a normal distribution flow along a learned vector field until they are
distributed as the data. Here the data are a pinwheel in the plane, so that the whole of
it can be seen:

1. fit the flow, and compare its held-out log-density with two models of scikit-learn;
2. ask the fitted model at several tolerances;
3. draw the flow and the density.

Run it with ``python examples/plot_flow.py``, after which the name of another picture
may stand. It takes about ten seconds on one core.
"""

# %%
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KernelDensity

from skode import CNFDensityEstimator, DensityDisplay, FlowDisplay

torch.set_num_threads(1)  # more do not help on tables this small

# %%
# A pinwheel of five blades
# -------------------------


def pinwheel(n_rows, seed):
    rng = np.random.default_rng(seed)
    radius = 1.0 + 0.3 * rng.standard_normal(n_rows)
    across = 0.1 * rng.standard_normal(n_rows)
    turn = 2 * np.pi * rng.integers(5, size=n_rows) / 5 + 0.25 * np.exp(radius)
    x, y = 2.0 * radius, 2.0 * across
    return np.column_stack(
        [
            x * np.cos(turn) - y * np.sin(turn),
            x * np.sin(turn) + y * np.cos(turn),
        ]
    )


X, X_test = pinwheel(1500, seed=0), pinwheel(5000, seed=1)

# %%
# Three densities
# ---------------
# `score_samples` gives natural logarithms of densities, in nats, for all three. The
# mean over held-out rows says which one describes the data best: a nat more is a
# density e times as high at the typical row. (Beware that ``KernelDensity.score`` is a
# sum, the two others' a mean.) The peers are tuned, the flow is not; but for
# ``marginals=None``, with which the flow does all of the work, from a normal base, and
# none is left to maps of single columns.

mixtures = [GaussianMixture(k, random_state=0).fit(X) for k in range(5, 26, 5)]
models = {
    "CNFDensityEstimator": CNFDensityEstimator(marginals=None, random_state=0),
    "GaussianMixture, by BIC": min(mixtures, key=lambda mixture: mixture.bic(X)),
    "KernelDensity, by CV": GridSearchCV(
        KernelDensity(), {"bandwidth": np.geomspace(0.1, 0.3, 4)}
    )
    .fit(X)
    .best_estimator_,
}
print(f"{'':>25} {'held-out nats':>14} {'training nats':>14}")
for name, model in models.items():
    model.fit(X)
    held_out, training = (model.score_samples(rows).mean() for rows in (X_test, X))
    print(f"{name:>25} {held_out:14.3f} {training:14.3f}")

# %%
# Precision against speed
# -----------------------
# The solver is read again at each prediction. The reference is the same model at a
# tolerance of 1e-8; the last columns are the mean and the largest error of a
# log-density, in nats. The largest are those of rows in the gaps between the blades.

flow = models["CNFDensityEstimator"]
reference = flow.set_params(rtol=1e-8).score_samples(X_test)
print(f"\n{'rtol=atol':>10} {'evaluations':>12} {'rows/s':>10}", end="")
print(f"{'mean error':>12} {'largest':>10}")
for rtol in (1e-2, 1e-3, 1e-4, 1e-5):
    flow.set_params(rtol=rtol)
    started = time.perf_counter()
    log_density = flow.score_samples(X_test)
    rate = len(X_test) / (time.perf_counter() - started)
    error = np.abs(log_density - reference)
    evaluations = flow.evaluations(X_test).mean()
    print(f"{rtol:10.0e} {evaluations:12.1f} {rate:10,.0f}", end="")
    print(f"{error.mean():12.1e} {error.max():10.1e}")

# %%
# The pictures
# ------------
# Above: samples on their way from the base, t = 0, to the data, t = 1. Each keeps the
# colour of the direction in which it started: neighbours stay neighbours. Below, left:
# the ways they take. Right: the density over some of the data; the regions hold 10, 30,
# 50, 70, 90 and 99 % of the probability.

flow.set_params(rtol=1e-4)
plt.rcParams.update(
    {"font.size": 10, "axes.titlesize": 11, "axes.titlelocation": "left"}
)
fig = plt.figure(figsize=(11, 7.6), layout="constrained")
above, below = fig.subfigures(2, height_ratios=(1, 1.75))
snapshots = FlowDisplay.from_estimator(
    flow,
    n_samples=2500,
    random_state=0,
    kind="snapshots",
    ax=above.subplots(ncols=5, sharey=True),
    scatter_kw={"s": 4},
)
left, right = below.subplots(ncols=2)
FlowDisplay.from_estimator(flow, n_samples=400, random_state=0, ax=left)
left.set_title("From the base to the data")
DensityDisplay.from_estimator(flow, X[:700], grid_resolution=150, ax=right)
right.set_title("The density, and rows of the data")
for axes in (*snapshots.ax_, left, right):
    axes.set_aspect("equal", adjustable="datalim" if axes is left else "box")

here = Path(__file__).resolve().parent
picture = Path(sys.argv[1]) if len(sys.argv) > 1 else here / "flow.png"
fig.savefig(picture, dpi=110)
print(f"\n{picture} written")
