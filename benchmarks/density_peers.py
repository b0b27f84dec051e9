"""Who takes part in `density.py`, and how they are trained.

A method is a function of the training rows, a budget of CPU seconds and a seed that
returns something with `score_samples(X)` and `sample(n)`. The budget binds the neural
ones only. Libraries are imported when their turn comes: who is absent is left out.
"""

import copy
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.neighbors import KernelDensity

HIDDEN = (64, 64)
BATCH = 256
EXACT_UP_TO = 3
"""Columns up to which a continuous flow trains with its exact trace; it estimates it by
one probe beyond. Scores, those of the held-out rows among them, are always exact."""
LEARNING = {"nsf": 5e-3, "maf": 5e-3, "cnf": 1e-2, "ffjord": 1e-2}
"""Adam's learning rates: the better of a few by the scores of `density.py` itself,
which flatters the peers; 1e-3, the papers', is too slow for the budget."""


@dataclass
class Fitted:
    """A density that somebody fitted, and what there is to say about the fit."""

    score_samples: Callable[[np.ndarray], np.ndarray]
    sample: Callable[[int], np.ndarray]
    note: str = ""
    at_tolerance: Callable[[torch.Tensor, float], torch.Tensor] | None = None
    """A continuous flow's log-density of rows at rtol = atol, in the rows' dtype."""


# --- Without gradients ---------------------------------------------------------------


def fit_kde(X, budget, seed):
    folds = KFold(5, shuffle=True, random_state=seed)
    # Near-duplicates ask for ever smaller widths; the grid ends at a hundredth of a
    # standard deviation.
    widths = np.geomspace(0.01, 2.0, 20)
    search = GridSearchCV(
        KernelDensity(rtol=1e-4), {"bandwidth": widths}, cv=folds, error_score="raise"
    ).fit(X)
    best = search.best_estimator_
    return Fitted(
        best.score_samples,
        lambda n: best.sample(n, random_state=seed),
        f"width {best.bandwidth:.3g}",
    )


def mixtures(rows, seed):
    """Yield mixtures of every kind, but none of more components than half the rows."""
    for kind in ("full", "tied", "diag"):
        for count in (*range(1, 11), 12, 14, 16, 20, 25, 30):
            if count <= rows // 2:
                yield GaussianMixture(count, covariance_type=kind, random_state=seed)


def describe(mixture):
    return Fitted(
        mixture.score_samples,
        lambda n: mixture.sample(n)[0],
        f"{mixture.n_components} {mixture.covariance_type}",
    )


def fit_gmm_bic(X, budget, seed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fits = [mixture.fit(X) for mixture in mixtures(len(X), seed)]
        return describe(min(fits, key=lambda mixture: mixture.bic(X)))


def fit_gmm_cv(X, budget, seed):
    folds = list(KFold(5, shuffle=True, random_state=seed).split(X))

    def held_out(mixture):
        return np.mean([mixture.fit(X[a]).score(X[b]) for a, b in folds])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        best = max(mixtures(4 * len(X) // 5, seed), key=held_out)
        return describe(best.fit(X))


# --- Flows ---------------------------------------------------------------------------


def train(module, log_density, X, budget, seed, learning_rate, clip=5.0):
    """Train with Adam on the mean log-density; keep the best weights; say how it went.

    The learning rate falls by a half cosine over the budget. A tenth of the rows is
    held out, and scored after each epoch, and once more when the budget is spent.
    Training ends there, or once 50 epochs, and 100 at least, have not improved the
    held-out score.
    """
    start = time.process_time()
    rng = torch.Generator().manual_seed(seed)
    X = torch.as_tensor(X, dtype=torch.float32)
    order = torch.randperm(len(X), generator=rng)
    held_out, rows = X[order[: len(X) // 10]], X[order[len(X) // 10 :]]
    optimizer = torch.optim.Adam(module.parameters(), lr=learning_rate)
    best, best_epoch, weights = -np.inf, 0, copy.deepcopy(module.state_dict())
    epoch, steps, in_time = 0, 0, True
    while in_time and not (epoch >= 100 and epoch - best_epoch > 50):
        epoch += 1
        module.train()
        for batch in torch.randperm(len(rows), generator=rng).split(BATCH):
            share = min(1.0, (time.process_time() - start) / budget)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * 0.5 * (1 + np.cos(np.pi * share))
            optimizer.zero_grad()
            loss = -log_density(rows[batch]).mean()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
            if torch.isfinite(norm):
                optimizer.step()
            steps += 1
            in_time = time.process_time() - start < budget
            if not in_time:
                break
        module.eval()
        with torch.no_grad():
            score = log_density(held_out).mean().item()
        if score > best:
            best, best_epoch = score, epoch
            weights = copy.deepcopy(module.state_dict())
    module.load_state_dict(weights)
    module.eval()
    return f"{steps} steps, {epoch} epochs, best {best_epoch}"


def batched(function, X, rows=10_000):
    """Return `function` of float32 rows as float64 arrays, part by part."""
    parts = torch.as_tensor(X, dtype=torch.float32).split(rows)
    with torch.no_grad():
        return torch.cat([function(part) for part in parts]).double().numpy()


def fit_zuko(make, log_density, learning_rate, X, budget, seed):
    """Train one of zuko's flows; return it, and what it is for the benchmark."""
    torch.manual_seed(seed)
    flow = make(X.shape[1])
    log_density = partial(log_density, flow)
    note = train(flow, log_density, X, budget, seed, learning_rate)

    def sample(n):
        with torch.no_grad():
            return flow().sample((n,)).numpy()

    return flow, Fitted(lambda X: batched(log_density, X), sample, note)


def autoregressive_log_density(flow, x):
    return flow().log_prob(x)


def continuous_log_density(flow, x):
    flow.transform.exact = not flow.training or x.shape[1] <= EXACT_UP_TO
    return flow().log_prob(x)


def fit_nsf(X, budget, seed):
    from zuko.flows import NSF

    make = partial(NSF, transforms=3, hidden_features=HIDDEN)
    how = autoregressive_log_density, LEARNING["nsf"]
    return fit_zuko(make, *how, X, budget, seed)[1]


def fit_maf(X, budget, seed):
    from zuko.flows import MAF

    make = partial(MAF, transforms=3, hidden_features=HIDDEN)
    how = autoregressive_log_density, LEARNING["maf"]
    return fit_zuko(make, *how, X, budget, seed)[1]


def fit_cnf(X, budget, seed):
    from zuko.flows import CNF

    make = partial(CNF, hidden_features=HIDDEN)
    how = continuous_log_density, LEARNING["cnf"]
    flow, fitted = fit_zuko(make, *how, X, budget, seed)

    def at_tolerance(x, tol):
        twin = copy.deepcopy(flow).to(x.dtype)
        twin.transform.rtol = twin.transform.atol = tol
        with torch.no_grad():
            return continuous_log_density(twin, x)

    return replace(fitted, at_tolerance=at_tolerance)


def fit_ffjord(X, budget, seed):
    from density_ffjord import FFJORD

    torch.manual_seed(seed)
    flow = FFJORD(X.shape[1], HIDDEN, EXACT_UP_TO)
    note = train(flow, flow.log_density, X, budget, seed, LEARNING["ffjord"])

    def at_tolerance(x, tol):
        twin = copy.deepcopy(flow).to(x.dtype)
        twin.tol = tol
        with torch.no_grad():
            return twin.log_density(x)

    def sample(n):
        with torch.no_grad():
            return flow.sample(n).numpy()

    return Fitted(lambda X: batched(flow.log_density, X), sample, note, at_tolerance)


def fit_skode(X, budget, seed, **params):
    import skode

    # The flows of this file compute in float32; ours follows its rows.
    X = X.astype(np.float32)
    estimator = skode.CNFDensityEstimator(random_state=seed, **params).fit(X)

    def at_tolerance(x, tol):
        twin = copy.deepcopy(estimator).set_params(rtol=tol, atol=tol)
        twin.module_.to(x.dtype)
        return torch.as_tensor(twin.score_samples(x.numpy()))

    return Fitted(
        estimator.score_samples,
        lambda n: estimator.sample(n, random_state=seed),
        f"{estimator.n_iter_} iterations",
        at_tolerance,
    )


METHODS = {
    "kde": fit_kde,
    "gmm-bic": fit_gmm_bic,
    "gmm-cv": fit_gmm_cv,
    "zuko-nsf": fit_nsf,
    "zuko-maf": fit_maf,
    "zuko-cnf": fit_cnf,
    "ffjord": fit_ffjord,
    "skode": fit_skode,
    # Without maps of columns, its nats compare with the peers' where values repeat.
    "skode-unmapped": partial(fit_skode, marginals=None),
}
NEURAL = {"zuko-nsf", "zuko-maf", "zuko-cnf", "ffjord", "skode"}
CONTINUOUS = {"zuko-cnf", "ffjord", "skode"}
