"""
=====================
Conditional densities
=====================

A density of X given y answers two kinds of questions:

1. given a label, what do rows of this class look like, and, by Bayes' rule, of which
   class is a row?
2. given covariates, how is a quantity distributed: not only its mean, but its spread,
   its skewness and its tails?

Run it with ``python examples/plot_conditional_density.py``, after which the name of
another picture may stand. It takes about ten seconds on one core.
"""

# %%
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from scipy.stats import norm
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_iris
from sklearn.discriminant_analysis import QuadraticDiscriminantAnalysis
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import KFold, StratifiedKFold, cross_val_score

from skode import CNFDensityEstimator, DensityDisplay

torch.set_num_threads(1)  # more do not help on tables this small

# %%
# Given a label
# -------------
# Iris: petals of three species. With ``conditional=True`` one flow learns the density
# of rows given the species; labels may be strings. Many rows are equal, and a fold has
# less than the hundred different ones from which on ``early_stopping="auto"`` holds
# some out: therefore ``early_stopping=True``.

iris = load_iris(as_frame=True)
petals = iris.data[["petal length (cm)", "petal width (cm)"]]
species = iris.target_names[iris.target]

flow = CNFDensityEstimator(conditional=True, early_stopping=True, random_state=0)
flow.fit(petals, species)
print("A petal of 4.9 cm by 1.7 cm: log-density in nats")
petal = pd.DataFrame([[4.9, 1.7]], columns=petals.columns)
for name in flow.classes_:
    print(f"{name:>12} {flow.score_samples(petal, [name])[0]:8.2f}")

# %%
# Bayes' rule
# -----------
# The species with the largest product of density and frequency is the most probable
# one. Accuracy on held-out folds, beside a model that takes each class as normal.


def bayes(flow, X, frequencies):
    """Return the most probable label of each row."""
    log_joint = [
        flow.score_samples(X, np.full(len(X), label)) + np.log(frequency)
        for label, frequency in frequencies.items()
    ]
    return np.array(list(frequencies))[np.argmax(log_joint, axis=0)]


folds = StratifiedKFold(3, shuffle=True, random_state=0)
right = np.zeros(len(species), dtype=bool)
for train, test in folds.split(petals, species):
    labels, counts = np.unique(species[train], return_counts=True)
    fold = clone(flow).fit(petals.iloc[train], species[train])
    found = bayes(fold, petals.iloc[test], dict(zip(labels, counts, strict=True)))
    right[test] = found == species[test]
quadratic = QuadraticDiscriminantAnalysis()
accuracy = cross_val_score(quadratic, petals, species, cv=folds).mean()
print("\nHeld-out accuracy, iris, two columns, three folds")
print(f"{'flow and Bayes rule':>35} {right.mean():.3f}")
print(f"{'QuadraticDiscriminantAnalysis':>35} {accuracy:.3f}")

# %%
# Given a covariate
# -----------------
# Diabetes: how far the disease has progressed after a year, given the body mass index
# (BMI) at its beginning. The quantity is X now, a table of one column, and the
# covariate y. The other model is a straight line with normal errors of one spread.

table = load_diabetes(as_frame=True, scaled=False)
progression = table.target.to_frame("progression")
bmi = table.data[["bmi"]].to_numpy()

by_bmi = CNFDensityEstimator(conditional=True, random_state=0)
flows, lines = [], []
for train, test in KFold(3, shuffle=True, random_state=0).split(bmi):
    now, later = progression.iloc[train], progression.iloc[test]
    flows.append(by_bmi.fit(now, bmi[train]).score(later, bmi[test]))
    line = LinearRegression().fit(bmi[train], now)
    spread = np.std(now.to_numpy() - line.predict(bmi[train]))
    errors = later.to_numpy() - line.predict(bmi[test])
    lines.append(norm.logpdf(errors, scale=spread).mean())
print("\nHeld-out log-density of the progression given BMI, nats per row, three folds")
print(f"{'CNFDensityEstimator':>35} {np.mean(flows):.3f} +- {np.std(flows):.3f}")
print(f"{'LinearRegression, normal errors':>35} {np.mean(lines):.3f}", end=" ")
print(f"+- {np.std(lines):.3f}")

# %%
# Samples given a covariate are what a simulation or an interval needs.

by_bmi.fit(progression, bmi)
print("\nProgression given BMI: quantiles of 5,000 samples")
print(f"{'BMI':>12} {'5 %':>8} {'50 %':>8} {'95 %':>8}")
for value in (20, 26, 32):
    samples = by_bmi.sample(5000, random_state=0, y=value)
    quantiles = np.quantile(samples, [0.05, 0.5, 0.95])
    print(f"{value:12}" + "".join(f"{q:9.0f}" for q in quantiles))

# %%
# The picture
# -----------
# Above: the density of petals given each species, and its rows. The thin line is a
# width of 0.2 cm, which half of the setosas share. Below: the density of the
# progression given three values of BMI, and the rows with a BMI within 1.5 of them. A
# tight tolerance makes for smooth curves.

for model in (flow, by_bmi):
    model.set_params(rtol=1e-6)
plt.rcParams.update(
    {"font.size": 10, "axes.titlesize": 11, "axes.titlelocation": "left"}
)
fig, (above, below) = plt.subplots(
    2, 3, figsize=(10.5, 6.8), layout="constrained", sharex="row", sharey="row"
)
for axes, name in zip(above, flow.classes_, strict=True):
    rows = petals[species == name]
    DensityDisplay.from_estimator(flow, rows, y=name, kind="density", ax=axes)
    axes.set_title(f"petals given {name}")
for axes, value in zip(below, (20, 26, 32), strict=True):
    rows = progression[np.abs(bmi[:, 0] - value) < 1.5]
    DensityDisplay.from_estimator(by_bmi, rows, y=value, kind="density", ax=axes)
    axes.set_title(f"progression given BMI {value}")
for axes in (*above[1:], *below[1:]):
    axes.set_ylabel("")
above[0].set(xlim=(0.5, 7.5), ylim=(-0.1, 2.8))
below[0].set(xlim=(0, 380))

here = Path(__file__).resolve().parent
picture = Path(sys.argv[1]) if len(sys.argv) > 1 else here / "conditional_density.png"
fig.savefig(picture, dpi=110)
print(f"\n{picture} written")
