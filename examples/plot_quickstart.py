"""
==========
Quickstart
==========

A neural ODE as a scikit-learn classifier, on tables that ship with scikit-learn:

1. search over the ODE solver and its tolerance with `GridSearchCV`;
2. compare with two models of scikit-learn on the same splits;
3. predict intervals with a regressor;
4. trade precision against speed with a fitted model, without fitting it again.

Run it with ``make quickstart``, or with ``python examples/plot_quickstart.py``, after
which the name of another picture may stand. It takes about half a minute on four cores.
"""

# %%
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from joblib import parallel_config
from sklearn.compose import TransformedTargetRegressor
from sklearn.datasets import load_diabetes, load_wine
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import (
    GridSearchCV,
    KFold,
    StratifiedKFold,
    cross_val_score,
    train_test_split,
)
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from skode import ODEClassifier, ODERegressor

started = time.perf_counter()
torch.set_num_threads(1)  # more do not help on tables this small

# %%
# Search over the solver and its tolerance
# ----------------------------------------
# Wine: 178 rows, 13 features, three classes. The solver is a parameter like any other.
# `rtol` is the relative error that the solver may make in a step; the absolute one,
# `atol`, follows it.
#
# Every worker of the search uses one thread: four fits at once on four cores are faster
# than four threads for each fit.

X, y = load_wine(return_X_y=True)
X_train, X_test, y_train, y_test = train_test_split(X, y, stratify=y, random_state=0)

pipeline = Pipeline(
    [
        ("scale", StandardScaler()),
        ("ode", ODEClassifier(random_state=0)),
    ]
)
grid = {
    "ode__solver": ["dopri5", "tsit5", "bosh3"],
    "ode__rtol": [1e-1, 1e-2, 1e-3],
}
search = GridSearchCV(pipeline, grid, cv=3, n_jobs=-1)
with parallel_config("loky", inner_max_num_threads=1):
    search.fit(X_train, y_train)

print("Accuracy of the search's nine candidates (mean of three folds)")
print(f"{'solver':>10}" + "".join(f"  rtol={rtol:g}" for rtol in grid["ode__rtol"]))
scores = search.cv_results_["mean_test_score"].reshape(3, 3)  # (rtol, solver)
for solver, row in zip(grid["ode__solver"], scores.T, strict=True):
    print(f"{solver:>10}" + "".join(f"{score:10.3f}" for score in row))
print(f"best: {search.best_params_}")
print(f"held-out accuracy: {search.score(X_test, y_test):.3f}\n")

# %%
# Compare on the same splits
# --------------------------
# Five folds of the whole table, the same for all three models. None of them is tuned.

classifiers = {
    "ODEClassifier": ODEClassifier(random_state=0),
    "MLPClassifier": MLPClassifier(max_iter=1000, random_state=0),
    "LogisticRegression": LogisticRegression(),
}
folds = StratifiedKFold(5, shuffle=True, random_state=0)
print("Held-out accuracy, wine (mean and spread of five folds)")
with parallel_config("loky", inner_max_num_threads=1):
    for name, classifier in classifiers.items():
        model = make_pipeline(StandardScaler(), classifier)
        accuracy = cross_val_score(model, X, y, cv=folds, n_jobs=-1)
        print(f"{name:>20} {accuracy.mean():.3f} +- {accuracy.std():.3f}")
print()

# %%
# A regressor with intervals
# --------------------------
# Diabetes: 442 rows, 10 features. The table is small and noisy, so early stopping is
# switched on. With ``loss="gaussian"`` the model learns how far a target may lie from
# its prediction, row by row. It scales the target itself; `MLPRegressor` needs help.

X_diabetes, y_diabetes = load_diabetes(return_X_y=True)
regressors = {
    "ODERegressor": ODERegressor(loss="gaussian", early_stopping=True, random_state=0),
    "MLPRegressor": TransformedTargetRegressor(
        MLPRegressor(early_stopping=True, random_state=0), transformer=StandardScaler()
    ),
    "Ridge": Ridge(),
}
folds = KFold(5, shuffle=True, random_state=0)
print("Held-out R2, diabetes (mean and spread of five folds)")
with parallel_config("loky", inner_max_num_threads=1):
    for name, regressor in regressors.items():
        model = make_pipeline(StandardScaler(), regressor)
        r2 = cross_val_score(model, X_diabetes, y_diabetes, cv=folds, n_jobs=-1)
        print(f"{name:>20} {r2.mean():.3f} +- {r2.std():.3f}")

train, test = next(folds.split(X_diabetes))
regressor = regressors["ODERegressor"].fit(X_diabetes[train], y_diabetes[train])
mean, std = regressor.predict(X_diabetes[test], return_std=True)
inside = np.abs(y_diabetes[test] - mean) < 1.645 * std
print(f"inside the 90 % interval: {inside.mean():.0%} of {len(test)} rows\n")

# %%
# Precision against speed, without a new fit
# ------------------------------------------
# The solver is read again at each prediction. One fitted model is asked at tolerances
# from 1 to 1e-6, and tells how often it evaluated its vector field, which is the price
# of a prediction. The reference is its own prediction at 1e-8: the last column shows
# the largest change of a predicted probability from there.

model = search.best_estimator_
scaler, ode = model["scale"], model["ode"]
rows = scaler.transform(X_test)
reference = ode.set_params(rtol=1e-8).predict_proba(rows)

tolerances = 10.0 ** np.arange(0, -7, -1)
accuracies, evaluations, changes = [], [], []
for tolerance in tolerances:
    ode.set_params(rtol=tolerance)
    accuracies.append(ode.score(rows, y_test))
    evaluations.append(ode.evaluations(rows).mean())
    changes.append(np.abs(ode.predict_proba(rows) - reference).max())

print("One fitted model at several tolerances; the last column is the")
print("largest change of a probability against that at a tolerance of 1e-8")
print(f"{'rtol=atol':>10} {'accuracy':>10} {'evaluations':>12} {'change of p':>12}")
for line in zip(tolerances, accuracies, evaluations, changes, strict=True):
    print("{:10.0e} {:10.3f} {:12.1f} {:12.1e}".format(*line))

# %%
# The picture
# -----------
# Left: what the tolerance changes and what it costs. Right: where the ODE takes the
# held-out rows from t = 0 to t = 1, in the two directions in which they differ most at
# the end.

ode.set_params(rtol=1e-4)
paths = ode.trajectory(rows, np.linspace(0, 1, 41))  # (rows, times, state)
plane = PCA(n_components=2).fit(paths[:, -1])
flat = plane.transform(paths.reshape(-1, paths.shape[2])).reshape(*paths.shape[:2], 2)

BLUE, ORANGE, GREEN, GREY = "#2a6f97", "#d1603d", "#6a994e", "#8d99ae"
plt.rcParams.update(
    {"font.size": 10, "axes.titlesize": 11, "axes.titlelocation": "left"}
)
fig, (left, right) = plt.subplots(
    ncols=2, figsize=(10, 4.2), layout="constrained", width_ratios=(1.1, 1)
)

left.loglog(tolerances, changes, "o-", color=BLUE)
left.set(
    title="One fitted model, seven tolerances",
    xlabel="tolerance (rtol = atol)",
)
left.set_ylabel("largest change of a probability, from 1e-8", color=BLUE)
left.tick_params(axis="y", colors=BLUE)
left.invert_xaxis()
left.grid(axis="y", alpha=0.25)
price = left.twinx()
price.semilogx(tolerances, evaluations, "s--", color=ORANGE)
price.set_ylim(0, 1.15 * max(evaluations))
price.set_ylabel("evaluations of the vector field, per row", color=ORANGE)
price.tick_params(axis="y", colors=ORANGE)

for label, color in enumerate((BLUE, ORANGE, GREEN)):
    some = flat[y_test == label]
    right.plot(*some.transpose(2, 1, 0), color=color, linewidth=0.7, alpha=0.35)
    right.scatter(*some[:, 0].T, s=5, color=GREY, alpha=0.6, zorder=2)
    right.scatter(*some[:, -1].T, s=16, color=color, zorder=3, label=f"class {label}")
right.scatter([], [], s=5, color=GREY, label="start")
right.set(
    title="Where the ODE takes each held-out row",
    xlabel="first principal component of the end states",
    ylabel="second",
)
right.legend(frameon=False)
for axes in (left, price, right):
    axes.spines["top"].set_visible(False)
right.spines["right"].set_visible(False)

# %%
# Next to this file, or where the first argument says.

here = Path(__file__).resolve().parent
picture = Path(sys.argv[1]) if len(sys.argv) > 1 else here / "quickstart.png"
fig.savefig(picture, dpi=110)
print(f"\n{picture} written; {time.perf_counter() - started:.0f} s in all")
