"""
=========================
Outliers by their density
=========================

Fraud is rare and has no labels at first: what there is, are past cases that turned out
fine. A density of these cases calls out new ones that do not look like them.

The table is real: 569 biopsies of breast tissue, 30 measurements each, from which some
values are missing here, as they are in tables that people fill in. Benign ones stand
for past cases; among the new cases a few are malignant, whose like no model has seen.

Run it with ``python examples/plot_outliers.py``, after which the name of another
picture may stand. It takes about ten seconds on one core.
"""

# %%
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import IsolationForest
from sklearn.impute import KNNImputer
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import KFold
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
# columns itself; the mixture, which is a single normal distribution here, and the
# neighbours need scaled ones. All have their default arguments.

models = {
    "CNFDensityEstimator": make_pipeline(
        KNNImputer(), CNFDensityEstimator(random_state=0)
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
# splits serve all models; how far they are apart says what the differences are worth.

n_splits = 5
precisions = {name: [] for name in models}
print(f"{'':>20} {'ROC AUC':>15} {'average precision':>20}")
for name, model in models.items():
    areas = []
    for seed in range(n_splits):
        past, new, is_fraud = split(seed)
        suspicion = -model.fit(past).score_samples(new)
        areas.append(roc_auc_score(is_fraud, suspicion))
        precisions[name].append(average_precision_score(is_fraud, suspicion))
    print(
        f"{name:>20} {np.mean(areas):8.3f} +- {np.std(areas):.3f}"
        f" {np.mean(precisions[name]):13.3f} +- {np.std(precisions[name]):.3f}"
    )

# %%
# Alarms
# ------
# `predict` calls a row an outlier if it is less probable than `contamination` of the
# training rows. With few rows and many columns a model knows its training rows better
# than new ones, so that it raises more alarms than that. The line is better drawn
# through densities of past cases by models that were not fitted to them. It is drawn
# here where one past case in twenty would have been a false alarm.

flow = models["CNFDensityEstimator"]
log_density = flow.score_samples(new)
unseen = np.concatenate(
    [
        clone(flow).fit(past[train]).score_samples(past[test])
        for train, test in KFold(5).split(past)
    ]
)
lines = {
    "of training rows": np.quantile(flow.score_samples(past), 0.05),
    "of past cases held out": np.quantile(unseen, 0.05),
}
print(f"\nAlarms among {len(new)} new cases, {is_fraud.sum()} of them malignant,")
print("below the 5 % quantile")
for name, line in lines.items():
    alarm = log_density < line
    print(f"{name:>25}: {alarm.sum():3}, of which {(alarm & is_fraud).sum():2} right")

# %%
# The picture
# -----------
# Left: log-densities of the last split's new cases. Differences are what counts: ten
# nats less is 22,000 times less probable. Right: the five splits of each model.

BLUE, ORANGE = "#2a6f97", "#d1603d"
plt.rcParams.update(
    {"font.size": 10, "axes.titlesize": 11, "axes.titlelocation": "left"}
)
fig, (left, right) = plt.subplots(ncols=2, figsize=(10, 3.9), layout="constrained")

low, high = np.quantile(log_density, [0.05, 1.0])
edges = np.linspace(low, high, 31)
shown = log_density.clip(low, high)  # the least probable are all in the first bin
left.hist(shown[~is_fraud], edges, color=BLUE, alpha=0.6, label="benign")
left.hist(shown[is_fraud], edges, color=ORANGE, alpha=0.8, label="malignant")
line = lines["of past cases held out"]
left.axvline(line, color="black", linestyle="--", linewidth=1)
left.annotate("alarm ", (line, 0.93), xycoords=("data", "axes fraction"), ha="right")
left.set(
    title="New cases",
    xlabel="log-density in nats; all lower ones are in the first bin",
    ylabel="cases",
)
left.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, 0.85))

for place, (name, values) in enumerate(reversed(precisions.items())):
    color = BLUE if name == "CNFDensityEstimator" else "#8d99ae"
    right.plot(values, np.full(n_splits, place), "o", color=color, alpha=0.5)
    right.plot(np.mean(values), place, "|", color=color, markersize=22, mew=2.5)
right.set(
    title="Five splits, and their mean",
    xlabel="average precision",
    yticks=range(len(precisions)),
    yticklabels=reversed(precisions),
    ylim=(-0.6, len(precisions) - 0.4),
)
right.grid(axis="x", alpha=0.25)
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)

here = Path(__file__).resolve().parent
picture = Path(sys.argv[1]) if len(sys.argv) > 1 else here / "outliers.png"
fig.savefig(picture, dpi=110)
print(f"\n{picture} written")
