"""
=========================
Outliers by their density
=========================

Fraud is rare and has no labels at first: what there is, are past cases that turned out
fine. A density of these cases calls out new ones that do not look like them.

The table is real: 569 biopsies of breast tissue, 30 measurements each, from which values
are missing here, as they are in tables that people fill in. Benign ones stand for past
cases; among the new cases a few are malignant, whom no model has seen.

Run it with ``python examples/plot_outliers.py``, after which the name of another picture
may stand. It takes about a quarter of a minute on one core.
"""

# %%
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import IsolationForest
from sklearn.impute import KNNImputer
from sklearn.metrics import (
    PrecisionRecallDisplay,
    average_precision_score,
    roc_auc_score,
)
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import LocalOutlierFactor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skode import CNFDensityEstimator

torch.set_num_threads(1)  # more do not help on tables this small

# %%
# Past cases and new ones
# -----------------------
# Half of the benign rows are past cases. The other half and 15 malignant rows are new:
# one outlier in thirteen.

X, y = load_breast_cancer(return_X_y=True, as_frame=True)
X = X.mask(np.random.default_rng(0).random(X.shape) < 0.02)  # missing values
benign, malignant = X[y == 1].to_numpy(), X[y == 0].to_numpy()


def split(seed):
    rng = np.random.default_rng(seed)
    fine, fraud = rng.permutation(benign), rng.permutation(malignant)[:15]
    past, rest = np.array_split(fine, 2)
    return past, np.vstack([rest, fraud]), np.arange(len(rest) + 15) >= len(rest)


# %%
# One pipeline each
# -----------------
# Missing values are filled in from similar rows. The flow scales and straightens the
# columns itself; the mixture and the neighbours need scaled ones. All have the default
# arguments; a mixture of one component is a single normal distribution.

models = {
    "CNFDensityEstimator": make_pipeline(
        KNNImputer(), CNFDensityEstimator(contamination=0.05, random_state=0)
    ),
    "IsolationForest": make_pipeline(KNNImputer(), IsolationForest(random_state=0)),
    "GaussianMixture": make_pipeline(
        StandardScaler(), KNNImputer(), GaussianMixture(random_state=0)
    ),
    "LocalOutlierFactor": make_pipeline(
        StandardScaler(), KNNImputer(), LocalOutlierFactor(novelty=True)
    ),
}

# %%
# How well are the few found?
# ---------------------------
# Five splits. All four have `score_samples`, low for outliers. With few outliers, the
# average precision is the stricter measure: what share of the alarms is right. The same
# splits serve all models, and their spread is larger than most differences.

n_splits = 5
print(f"{'':>20} {'ROC AUC':>15} {'average precision':>20}")
for name, model in models.items():
    areas, precisions = [], []
    for seed in reversed(range(n_splits)):  # the pictures show the split of seed 0
        past, new, is_fraud = split(seed)
        suspicion = -model.fit(past).score_samples(new)
        areas.append(roc_auc_score(is_fraud, suspicion))
        precisions.append(average_precision_score(is_fraud, suspicion))
    print(
        f"{name:>20} {np.mean(areas):8.3f} +- {np.std(areas):.3f}"
        f" {np.mean(precisions):13.3f} +- {np.std(precisions):.3f}"
    )

# %%
# Alarms
# ------
# `predict` draws a line, below which `contamination` of the past cases lie: here the
# share of false alarms that one is ready to look at.

flow = models["CNFDensityEstimator"]
alarm = flow.predict(new) == -1
print(f"\nalarms: {alarm.sum()} of {len(new)} new cases, of which", end=" ")
print(f"{(alarm & is_fraud).sum()} right; malignant in all: {is_fraud.sum()}")

# %%
# The picture
# -----------
# Left: log-densities of new cases. Differences are what counts: a case ten nats below
# another is 22,000 times less probable. Right: how many alarms are right, as more and
# more of the outliers are found.

BLUE, ORANGE = "#2a6f97", "#d1603d"
plt.rcParams.update(
    {"font.size": 10, "axes.titlesize": 11, "axes.titlelocation": "left"}
)
fig, (left, right) = plt.subplots(ncols=2, figsize=(10, 4.2), layout="constrained")

log_density = flow.score_samples(new)
low, high = np.quantile(log_density, [0.05, 1.0])
edges = np.linspace(low, high, 31)
shown = log_density.clip(low, high)  # the least probable are all in the first bin
left.hist(shown[~is_fraud], edges, color=BLUE, alpha=0.6, label="benign")
left.hist(shown[is_fraud], edges, color=ORANGE, alpha=0.8, label="malignant")
left.axvline(flow[-1].offset_, color="black", linestyle="--", linewidth=1)
left.annotate(
    "alarm ", (flow[-1].offset_, 0.93), xycoords=("data", "axes fraction"), ha="right"
)
left.set(
    title="Density of new cases",
    xlabel="log-density, nats (lower ones in the first bin)",
    ylabel="cases",
)
left.legend(frameon=False, loc="center left")

colors = (BLUE, ORANGE, "#6a994e", "#8d99ae")
for (name, model), color in zip(models.items(), colors, strict=True):
    PrecisionRecallDisplay.from_predictions(
        is_fraud,
        -model.score_samples(new),
        name=name,
        ax=right,
        curve_kwargs={"color": color, "drawstyle": "default"},
    )
right.set(
    title="One of the five splits",
    xlabel="malignant cases found",
    ylabel="alarms that are right",
    aspect="auto",
)
right.legend(frameon=False, loc="lower left")
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)

here = Path(__file__).resolve().parent
picture = Path(sys.argv[1]) if len(sys.argv) > 1 else here / "outliers.png"
fig.savefig(picture, dpi=110)
print(f"{picture} written")
