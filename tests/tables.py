"""Small tables, and estimators small enough to be fitted to them in a moment."""

import numpy as np
import torch
from sklearn.preprocessing import StandardScaler
from torch import nn

from skode import CNFDensityEstimator, ODEClassifier, ODERegressor

QUICK = {
    "hidden_layer_sizes": (8,),
    "state_size": 4,
    "learning_rate_init": 0.05,
    "max_iter": 20,
    "random_state": 0,
}

QUICK_FLOW = {
    "hidden_layer_sizes": (8,),
    "marginals": None,
    "learning_rate_init": 0.02,
    "max_iter": 15,
    "random_state": 0,
}


def classifier(**params):
    """Return a small classifier."""
    return ODEClassifier(**{**QUICK, **params})


def regressor(**params):
    """Return a small regressor."""
    return ODERegressor(**{**QUICK, **params})


def density(**params):
    """Return a small density estimator."""
    return CNFDensityEstimator(**{**QUICK_FLOW, **params})


def moons(n_rows=200, seed=0):
    """Return two columns, in units far from standard, around two half circles."""
    rng = np.random.default_rng(seed)
    upper, angle = rng.random(n_rows) < 0.5, rng.uniform(0, np.pi, n_rows)
    side = np.where(upper, 1.0, -1.0)
    rows = np.column_stack([side * (np.cos(angle) - 0.5), side * np.sin(angle)])
    rows += 0.15 * rng.standard_normal((n_rows, 2))
    return rows * [3.0, 0.2] + [-5.0, 40.0]


def blobs(n_classes=2, n_rows=60, n_features=3, seed=0):
    """Return rows around one centre per class, and their classes 0, 1, ..."""
    rng = np.random.default_rng(seed)
    y = np.arange(n_rows) % n_classes
    centres = 3.0 * rng.standard_normal((n_classes, n_features))
    return centres[y] + 0.3 * rng.standard_normal((n_rows, n_features)), y


def curve(n_rows=60, noise=0.0, seed=0):
    """Return two features and a smooth target of both."""
    rng = np.random.default_rng(seed)
    X = rng.uniform(-2.0, 2.0, (n_rows, 2))
    y = np.sin(X[:, 0]) + 0.5 * X[:, 1] + noise * rng.standard_normal(n_rows)
    return X, y


def encoded(model, X):
    """Return the states of the rows it was fitted to at t = 0, as a tensor."""
    with torch.no_grad():
        return model.module_.encoder(torch.tensor(StandardScaler().fit_transform(X)))


class Still(nn.Module):
    """dy/dt = 0."""

    def __init__(self, width):
        super().__init__()

    def forward(self, t, y):
        return 0.0 * y


class Spring(nn.Module):
    """dy/dt = W y, a field of one's own."""

    def __init__(self, width):
        super().__init__()
        self.matrix = nn.Linear(width, width, bias=False)

    def forward(self, t, y):
        return self.matrix(y)
