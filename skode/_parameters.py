"""Parameters that all estimators share: their ranges, and what becomes of them.

A service of the front rooms: it reads estimators, and knows no model.
"""

import warnings
from numbers import Integral

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split

from skode._border import at_least, choice, inside, positive
from skode._nn.integration import Integration
from skode._training import Training, make_optimizer

__all__ = [
    "SHARED",
    "check_same_shape",
    "hold_out",
    "holds_out",
    "integration",
    "ready_optimizer",
    "record",
    "training",
    "warn_unfinished",
    "widths_of",
]

_FULL_BATCH, _LARGEST_BATCH = 128, 512

SHARED = {
    "hidden_layer_sizes": ["array-like", at_least(1)],
    "solver": [str],
    "rtol": [positive(closed="left")],
    "atol": [positive(closed="left"), None],
    "step_size": [positive(), None],
    "max_steps": [at_least(1)],
    "gradient": [choice(("auto", "checkpoint", "adjoint", "reversible", "backprop"))],
    "compile": ["boolean", choice(("auto",))],
    "optimizer": [choice(("adam", "sgd"))],
    "alpha": [positive(closed="left")],
    "batch_size": [at_least(1), choice(("auto",))],
    "learning_rate_init": [positive()],
    "max_iter": [at_least(1)],
    "tol": [positive(closed="left")],
    "n_iter_no_change": [at_least(1)],
    "early_stopping": ["boolean", choice(("auto",))],
    "validation_fraction": [inside(0, 1)],
    "standardize": ["boolean"],
    "warm_start": ["boolean"],
    "random_state": ["random_state"],
    "device": [str],
    "dtype": [choice(("auto", "float32", "float64"))],
    "verbose": ["verbose"],
}
"""Constraints of the parameters, as scikit-learn reads them."""


def widths_of(sizes, name="hidden_layer_sizes"):
    """Return the widths of the hidden layers; a number is one layer."""
    widths = (sizes,) if isinstance(sizes, Integral) else tuple(sizes)
    if not all(isinstance(width, Integral) and width > 0 for width in widths):
        raise ValueError(f"{name} must hold integers above 0, got {sizes}.")
    return tuple(int(width) for width in widths)


def integration(est):
    """Return how to solve, from the parameters as they are now."""
    est._validate_params()  # they may have been set after the fit
    return Integration(
        method=est.solver,
        rtol=est.rtol,
        atol=est.rtol if est.atol is None else est.atol,
        step_size=est.step_size,
        max_steps=est.max_steps,
        gradient=est.gradient,
        compile=est.compile,
    )


def record(est, history):
    """Set the fitted attributes that tell how the training went."""
    est.loss_curve_ = history.loss
    est.loss_ = history.loss[-1] if history.loss else None
    est.best_loss_ = min(history.loss, default=None)
    est.n_iter_ = len(history.loss)
    held_out = bool(history.scores)
    est.validation_scores_ = history.scores if held_out else None
    est.best_validation_score_ = history.best_score


def training(est, n_rows, smallest_batch, alpha=None, averaging=0.0, plateau_from=0):
    """Return how to train on so many rows; `alpha` None: the parameter."""
    batch_size = est.batch_size
    if batch_size == "auto":
        share = min(_LARGEST_BATCH, max(smallest_batch, n_rows // 8))
        batch_size = n_rows if n_rows <= _FULL_BATCH else share
    return Training(
        max_iter=est.max_iter,
        batch_size=batch_size,
        learning_rate=est.learning_rate_init,
        optimizer=est.optimizer,
        alpha=est.alpha if alpha is None else alpha,
        tol=est.tol,
        n_iter_no_change=est.n_iter_no_change,
        verbose=bool(est.verbose),
        averaging=averaging,
        plateau_from=plateau_from,
    )


def ready_optimizer(est, how):
    """Make the optimiser of `partial_fit`, or move the last one to the net's device."""
    if getattr(est, "_optimizer", None) is None:
        est._optimizer = make_optimizer(est.module_, how)
    # Loading moves its memory to where the weights are now, and to their dtype.
    est._optimizer.load_state_dict(est._optimizer.state_dict())


def holds_out(early_stopping, n_rows, least):
    """Return whether rows are held out; "auto": if there are `least` of them."""
    return n_rows >= least if early_stopping == "auto" else early_stopping


def hold_out(est, n_rows, seed, stratify=None, what="rows"):
    """Return indices of training and of held-out rows."""
    try:
        return train_test_split(
            np.arange(n_rows),
            test_size=est.validation_fraction,
            random_state=seed,
            stratify=stratify,
        )
    except ValueError as error:
        raise ValueError(
            f"early_stopping=True cannot hold out validation_fraction="
            f"{est.validation_fraction} of {n_rows} {what} ({error}). Pass more, "
            "another fraction, or early_stopping=False."
        ) from error


def check_same_shape(est, shape):
    """Refuse to continue a net that other parameters than `shape` have shaped."""
    before = est._shape
    changed = [
        name
        for name, value in shape.items()
        # A field may be any object, and compare in ways of its own.
        if not (value is before[name] or (value == before[name]) is True)
    ]
    if changed:
        raise ValueError(
            f"{', '.join(changed)} cannot change while a model is continued: set "
            "warm_start=False, or clone the estimator, to begin a new one."
        )


def warn_unfinished(est, history, held_out, stacklevel=4):
    """Warn of a fit that ended before the loss had stopped improving.

    At a `stacklevel` of 4, the warning points through scikit-learn's wrapper at the
    caller of the method that calls this function.
    """
    if history.converged or history.interrupted:
        return
    watched = "validation score rose" if held_out else "loss fell"
    advice = "" if held_out else "set early_stopping=True if more would overfit, or "
    warnings.warn(
        f"The fit ended at max_iter={est.max_iter}, and the {watched} by more than "
        f"1000 * tol = {1000 * est.tol:g} in its last n_iter_no_change epochs: "
        f"{advice}raise max_iter.",
        ConvergenceWarning,
        stacklevel=stacklevel,
    )
