"""Neural ODEs for tables: `ODEClassifier` and `ODERegressor`."""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral

import numpy as np
from sklearn.base import (
    ClassifierMixin,
    ClassNamePrefixFeaturesOutMixin,
    RegressorMixin,
    TransformerMixin,
)
from sklearn.metrics import accuracy_score, r2_score
from sklearn.utils import compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from skode._border import (
    FLOATS,
    PortableEstimator,
    apply,
    at_least,
    check_weights,
    choice,
    fit_context,
    flat_if_one,
    inside,
    log_softmax,
    positive,
    resolve_device,
    seeded,
    softmax,
    to_tensor,
    torch_dtype,
    undisturbed,
    weighted_moments,
)
from skode._nn.fields import ACTIVATIONS
from skode._nn.losses import (
    classification_loss,
    mean_and_std,
    regression_loss,
    weighted_mean,
)
from skode._nn.ode_net import build
from skode._parameters import (
    SHARED,
    check_same_shape,
    hold_out,
    holds_out,
    integration,
    ready_optimizer,
    record,
    training,
    warn_unfinished,
    widths_of,
)
from skode._training import History, train, train_once
from skode.exceptions import SolverError

__all__ = ["ODEClassifier", "ODERegressor"]

_HOLD_OUT_FROM = 1000


class _ODEEstimator(
    ClassNamePrefixFeaturesOutMixin, TransformerMixin, PortableEstimator
):
    """What both have in common: parameters, tags, and how a fitted net is read."""

    _parameter_constraints = {
        **SHARED,
        "activation": [choice(ACTIVATIONS)],
        "encoder": [choice(("linear", "augment"))],
        "state_size": [at_least(1), choice(("auto",))],
        "field": [callable, None],
    }

    def __sklearn_tags__(self):
        """Describe the estimator to scikit-learn."""
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        both = ["float64", "float32"]
        tags.transformer_tags.preserves_dtype = both if self.dtype == "auto" else []
        return tags

    def transform(self, X):
        """Return the state at the end of the ODE.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Rows in the units of the training data.

        Returns
        -------
        states : ndarray of shape (n_samples, state_size_)
            What the linear head sees, at t = 1.

        Raises
        ------
        SolverError
            If a row needs more than `max_steps` steps, or blows up.
        """
        X = _check_rows(self, X)
        return _apply(self, lambda x: self.module_.final_state(x, integration(self)), X)

    def trajectory(self, X, t):
        """Return the states of the ODE at several times.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Rows in the units of the training data.
        t : array-like of shape (n_times,)
            Increasing times >= 0; the model was fitted for t from 0 to 1.

        Returns
        -------
        states : ndarray of shape (n_samples, n_times, state_size_)
            The state of each row at each time; that at t = 0 is the encoder's.

        Raises
        ------
        ValueError
            If the times do not increase, or start before 0.
        SolverError
            If a row needs more than `max_steps` steps, or blows up.
        """
        X = _check_rows(self, X)
        t = np.asarray(t, dtype=np.float64)
        if (
            t.ndim != 1
            or len(t) == 0
            or not np.isfinite(t).all()
            or t[0] < 0
            or (np.diff(t) < 0).any()
        ):
            raise ValueError(
                "t must be a list of times that increase and start at 0 or later, "
                f"got {t}."
            )
        times = np.concatenate(([0.0], t))
        return _apply(
            self,
            lambda x: self.module_.trajectory(
                x, x.new_tensor(times), integration(self)
            )[:, 1:],
            X,
        )

    def evaluations(self, X):
        """Count how often the solver evaluates the vector field for each row.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Rows in the units of the training data.

        Returns
        -------
        n_evaluations : ndarray of shape (n_samples,)
            The price of a prediction with the present `solver`, `rtol` and `atol`.

        Raises
        ------
        SolverError
            If a row needs more than `max_steps` steps, or blows up.
        """
        X = _check_rows(self, X)
        return _apply(self, lambda x: self.module_.evaluations(x, integration(self)), X)

    @property
    def _n_features_out(self):
        return self.state_size_


class ODEClassifier(ClassifierMixin, _ODEEstimator):
    """Classifier whose layers are one ordinary differential equation.

    A linear encoder turns a row into a state, the state follows a learned vector field
    from t = 0 to t = 1, and a linear head reads the classes off its end.

    Parameters
    ----------
    hidden_layer_sizes : int or array-like of int, default=(64,)
        Widths of the hidden layers of the vector field; empty for a linear field.
    activation : {"tanh", "softplus", "silu", "relu"}, default="tanh"
        Of the vector field. Smooth ones let the solver take long steps.
    encoder : {"linear", "augment"}, default="linear"
        How a row becomes the initial state: through a linear layer, or by appending
        zeros to its features [2]_.
    state_size : int or "auto", default="auto"
        Width of the state. "auto" is the number of features, at least 16 and at
        most 64, for a linear encoder, and five more than it for zero augmentation.
    field : callable or None, default=None
        Your own vector field: called with the width of the state, returns a
        `torch.nn.Module` whose ``forward(t, y)`` maps times (n,) and states (n, width)
        to (n, width), row by row. None is a multilayer perceptron whose every layer
        is shifted by time.
    solver : str, default="dopri5"
        The ODE solver (the optimiser is `optimizer`). Adaptive: "dopri5", "tsit5",
        "bosh3", "adaptive_heun", "dopri8". Fixed step: "euler", "midpoint", "heun2",
        "rk4". All others of torchdiffeq and SciPy by their names, row by row and
        therefore slowly. May be changed after `fit`.
    rtol : float, default=1e-2
        Relative tolerance of the local error of each step, which each row meets with
        steps of its own. May be changed after `fit`.
    atol : float or None, default=None
        Absolute tolerance; None: the same number as `rtol`. May be changed after
        `fit`.
    step_size : float or None, default=None
        Longest step of a fixed-step solver; time runs from 0 to 1. Adaptive solvers
        ignore it. May be changed after `fit`.
    max_steps : int, default=1000
        Steps that a row may attempt. May be changed after `fit`.
    gradient : {"auto", "checkpoint", "adjoint", "reversible", "backprop"}, \
            default="auto"
        How gradients pass the solver: "checkpoint" is exact for the computed solution
        and stores the state of each step; "adjoint" solves the adjoint ODE backwards
        in constant memory; "reversible" is exact in nearly constant memory, by steps
        of its own, in `fit` and in `predict`, that cost twice as much and are less
        stable; "backprop" is plain autograd. "auto" is "checkpoint" where the solver
        allows it.
    compile : bool or "auto", default="auto"
        Whether to solve in compiled code, several times faster: for the field made
        here (`field` None) and the solvers listed first. On a CPU the machine's C++
        compiler translates it when it is first needed, in seconds, and it is kept in
        the user's cache directory; a GPU runs Triton kernels and CUDA graphs. "auto":
        where it can be; True: or say why not; False: never. Results agree to rounding,
        with "relu" within the tolerance. May be changed after `fit`.
    optimizer : {"adam", "sgd"}, default="adam"
        Adam with decoupled weight decay, or gradient descent with Nesterov's momentum.
    alpha : float, default=0.5
        Weight decay of matrices; biases are left alone.
    batch_size : int or "auto", default="auto"
        Rows per step. "auto" takes all of a table of up to 128 rows; an eighth of
        larger ones, but at least 128 and at most 512 rows.
    learning_rate_init : float, default=1.5e-2
        Learning rate at the plateau of its schedule: it rises over five epochs and
        falls to zero over the last third of `max_iter`, or once the loss has stopped
        improving.
    max_iter : int, default=40
        Epochs.
    tol : float, default=1e-4
        The loss, in standardised units, has stopped improving when its best value
        has fallen by less than `tol` in `n_iter_no_change` epochs. A fit that ends at
        `max_iter` gives a `ConvergenceWarning` if that was more than 1000 `tol`. 0
        asks for `max_iter` epochs, and for no such warning.
    n_iter_no_change : int, default=20
        Epochs over which `tol` is judged, at most half of `max_iter`.
    early_stopping : bool or "auto", default=False
        Whether to hold out `validation_fraction` of the rows, to watch the score there
        instead of the loss, and to keep the weights of the best epoch: for small or
        noisy tables, which are overfitted without. "auto" does so from 1,000 rows on.
    validation_fraction : float, default=0.1
        See `early_stopping`.
    standardize : bool, default=True
        Whether to shift and scale each feature to mean 0 and standard
        deviation 1 inside the model. Raw tables then work.
    class_weight : dict, list of dict, "balanced" or None, default=None
        Weights of the classes, times `sample_weight`.
    warm_start : bool, default=False
        Whether `fit` goes on from the weights it finds. What shapes the net cannot
        change then: `hidden_layer_sizes`, `activation`, `encoder`, `state_size`,
        `field` and `standardize`. `loss_curve_` and `n_iter_` start anew.
    random_state : int, RandomState instance or None, default=None
        Of the initial weights, the batches and the held-out rows.
    device : str, default="auto"
        A torch device; "auto" is a GPU where there is one.
    dtype : {"auto", "float32", "float64"}, default="auto"
        To compute in; "auto" follows X.
    verbose : bool or int, default=False
        Whether to show a progress bar.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,), or list of them for several targets
        Class labels.
    n_outputs_ : int
        Number of targets.
    module_ : torch.nn.Module
        The fitted net; with `standardize`, it takes standardised rows.
    state_size_ : int
        Width of the state.
    loss_curve_ : list of float
        Mean training loss of each epoch of the last `fit`, even of one that went on
        from another (`warm_start`); each `partial_fit` adds one.
    loss_ : float
        The last of them.
    best_loss_ : float
        The least of them.
    n_iter_ : int
        Number of epochs, the length of `loss_curve_`.
    validation_scores_ : list of float or None
        Validation score of each epoch with `early_stopping`.
    best_validation_score_ : float or None
        The largest of them.
    n_features_in_ : int
        Number of features seen in `fit`.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Their names, if X had any.

    Notes
    -----
    The layers of a residual network, y <- y + f(y), are Euler steps of dy/dt = f(t, y)
    [1]_. Here the steps are the solver's: it takes as many as the tolerance asks for,
    for every row by itself, so that a prediction does not depend on the rows beside it.

    References
    ----------
    .. [1] Chen, Rubanova, Bettencourt & Duvenaud (2018). Neural ordinary differential
       equations. arXiv:1806.07366.
    .. [2] Dupont, Doucet & Teh (2019). Augmented neural ODEs. arXiv:1904.01681.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from skode import ODEClassifier
    >>> X, y = load_iris(return_X_y=True)
    >>> model = ODEClassifier(max_iter=30, random_state=0, tol=1e-1).fit(X, y)
    >>> bool(model.score(X, y) > 0.9)
    True
    >>> model.set_params(rtol=1e-5).predict_proba(X[:2]).shape
    (2, 3)
    """

    _parameter_constraints = {
        **_ODEEstimator._parameter_constraints,
        "class_weight": [dict, list, choice(("balanced",)), None],
    }

    def __init__(
        self,
        hidden_layer_sizes=(64,),
        *,
        activation="tanh",
        encoder="linear",
        state_size="auto",
        field=None,
        solver="dopri5",
        rtol=1e-2,
        atol=None,
        step_size=None,
        max_steps=1000,
        gradient="auto",
        compile="auto",
        optimizer="adam",
        alpha=0.5,
        batch_size="auto",
        learning_rate_init=1.5e-2,
        max_iter=40,
        tol=1e-4,
        n_iter_no_change=20,
        early_stopping=False,
        validation_fraction=0.1,
        standardize=True,
        class_weight=None,
        warm_start=False,
        random_state=None,
        device="auto",
        dtype="auto",
        verbose=False,
    ):
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.encoder = encoder
        self.state_size = state_size
        self.field = field
        self.solver = solver
        self.rtol = rtol
        self.atol = atol
        self.step_size = step_size
        self.max_steps = max_steps
        self.gradient = gradient
        self.compile = compile
        self.optimizer = optimizer
        self.alpha = alpha
        self.batch_size = batch_size
        self.learning_rate_init = learning_rate_init
        self.max_iter = max_iter
        self.tol = tol
        self.n_iter_no_change = n_iter_no_change
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.standardize = standardize
        self.class_weight = class_weight
        self.warm_start = warm_start
        self.random_state = random_state
        self.device = device
        self.dtype = dtype
        self.verbose = verbose

    def __sklearn_tags__(self):
        """Describe the estimator to scikit-learn."""
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags

    @fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y, sample_weight=None):
        """Fit the model.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Rows; raw units are fine while `standardize` is True.
        y : array-like of shape (n_samples,) or (n_samples, n_outputs)
            Class labels: numbers, strings or booleans.
        sample_weight : array-like of shape (n_samples,) or None, default=None
            How many rows each row counts for.

        Returns
        -------
        self : ODEClassifier
            The fitted estimator.

        Raises
        ------
        DivergenceError
            If the loss stopped being finite and lower learning rates did not help, or
            if no epoch succeeded; the best weights are kept.
        """
        fresh = not (self.warm_start and hasattr(self, "module_"))
        X, y = validate_data(self, X, y, dtype=FLOATS, multi_output=True, reset=fresh)
        y = flat_if_one(y)
        check_classification_targets(y)
        classes = _classes_of(y)
        if fresh:
            self._set_classes(classes, y.ndim)
        else:
            _check_same_classes(self.classes_, classes, y.ndim)
        weight = self._weights(X, y, sample_weight)
        _fit(self, X, self._encode(y), weight, self._task(), fresh)
        return self

    @fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X, y, classes=None, sample_weight=None):
        """Train for one epoch on these rows, going on from the last call.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Rows. Those of the first call decide how features are scaled.
        y : array-like of shape (n_samples,)
            Class labels.
        classes : array-like of shape (n_classes,) or None, default=None
            All labels that will ever come; needed in the first call.
        sample_weight : array-like of shape (n_samples,) or None, default=None
            How many rows each row counts for.

        Returns
        -------
        self : ODEClassifier
            The estimator.

        Raises
        ------
        DivergenceError
            If the loss was not finite; the weights stay as they were.
        """
        fresh = not hasattr(self, "module_")
        X, y = validate_data(self, X, y, dtype=FLOATS, multi_output=True, reset=fresh)
        y = flat_if_one(y)
        check_classification_targets(y)
        if classes is not None:
            listed = classes if y.ndim == 2 else [classes]
            classes = [np.unique(labels) for labels in listed]
        elif fresh:
            raise ValueError(
                "The first call of partial_fit needs classes=, all labels that will "
                "ever come."
            )
        if fresh:
            self._set_classes(classes, y.ndim)
        elif classes is not None:
            _check_same_classes(self.classes_, classes, y.ndim)
        weight = self._weights(X, y, sample_weight)
        _partial_fit(self, X, self._encode(y), weight, self._task(), fresh)
        return self

    def predict(self, X):
        """Predict class labels.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Rows in the units of the training data.

        Returns
        -------
        labels : ndarray of shape (n_samples,) or (n_samples, n_outputs)
            The most probable class of each row.

        Raises
        ------
        SolverError
            If a row needs more than `max_steps` steps, or blows up.
        """
        logits = self._logits(X)
        if isinstance(self.classes_, list):
            columns = [
                classes[part.argmax(axis=1)]
                for classes, part in zip(self.classes_, logits, strict=True)
            ]
            return np.stack(columns, axis=1)
        return self.classes_[logits[0].argmax(axis=1)]

    def predict_proba(self, X):
        """Predict class probabilities.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Rows in the units of the training data.

        Returns
        -------
        probabilities : ndarray of shape (n_samples, n_classes), or list of them
            In the order of `classes_`; one array per target for several targets.

        Raises
        ------
        SolverError
            If a row needs more than `max_steps` steps, or blows up.
        """
        parts = [softmax(part) for part in self._logits(X)]
        return parts if isinstance(self.classes_, list) else parts[0]

    def predict_log_proba(self, X):
        """Predict logarithms of class probabilities.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Rows in the units of the training data.

        Returns
        -------
        log_probabilities : ndarray of shape (n_samples, n_classes), or list of them
            As `predict_proba`.
        """
        parts = [log_softmax(part) for part in self._logits(X)]
        return parts if isinstance(self.classes_, list) else parts[0]

    def score(self, X, y, sample_weight=None):
        """Return the accuracy; of several targets, the mean of theirs.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Rows in the units of the training data.
        y : array-like of shape (n_samples,) or (n_samples, n_outputs)
            True labels.
        sample_weight : array-like of shape (n_samples,) or None, default=None
            How many rows each row counts for.

        Returns
        -------
        score : float
            Between 0 and 1.
        """
        predicted, y = self.predict(X), np.asarray(y)
        if predicted.ndim == 1:
            return accuracy_score(y, predicted, sample_weight=sample_weight)
        return float(np.average((predicted == y).mean(axis=1), weights=sample_weight))

    def _logits(self, X):
        """Return a list of (n_samples, n_classes), one per target."""
        X = _check_rows(self, X)
        logits = _apply(self, lambda x: self.module_(x, integration(self)), X)
        return np.split(logits, np.cumsum(self._sizes())[:-1], axis=1)

    def _sizes(self):
        listed = self.classes_ if isinstance(self.classes_, list) else [self.classes_]
        return tuple(len(classes) for classes in listed)

    def _set_classes(self, classes, ndim):
        self.classes_ = classes if ndim == 2 else classes[0]
        self.n_outputs_ = len(classes)

    def _encode(self, y):
        """Return integer codes, (n_samples, n_outputs)."""
        listed = self.classes_ if isinstance(self.classes_, list) else [self.classes_]
        columns = y.reshape(len(y), -1).T
        if len(columns) != len(listed):
            raise ValueError(
                f"y has {len(columns)} targets, but the model being continued has "
                f"{len(listed)}."
            )
        for classes, column in zip(listed, columns, strict=True):
            unknown = np.setdiff1d(column, classes)
            if len(unknown):
                raise ValueError(
                    f"y has labels {_plain(unknown)} that are not in classes_ "
                    f"{_plain(classes)}; pass all of them as classes= in the first "
                    "call."
                )
        codes = [
            np.searchsorted(c, col) for c, col in zip(listed, columns, strict=True)
        ]
        return np.stack(codes, axis=1)

    def _weights(self, X, y, sample_weight):
        weight = check_weights(sample_weight, X)
        if self.class_weight is None:
            return weight
        weight = weight * compute_sample_weight(self.class_weight, y)
        if not weight.any():
            raise ValueError(
                f"class_weight={self.class_weight} leaves no row of y a weight above 0."
            )
        return weight

    def _task(self):
        sizes = self._sizes()
        return _Task(
            loss=classification_loss(sizes),
            n_outputs=sum(sizes),
            score=lambda outputs, codes, weight: _accuracy(
                outputs, codes, weight, sizes
            ),
            stratify=self.n_outputs_ == 1,
            smallest_batch=128,
        )


class ODERegressor(RegressorMixin, _ODEEstimator):
    """Regressor whose layers are one ordinary differential equation.

    A linear encoder turns a row into a state, the state follows a learned vector field
    from t = 0 to t = 1, and a linear head reads the target off its end.

    Parameters
    ----------
    hidden_layer_sizes : int or array-like of int, default=(64,)
        Widths of the hidden layers of the vector field; empty for a linear field.
    activation : {"tanh", "softplus", "silu", "relu"}, default="tanh"
        Of the vector field. Smooth ones let the solver take long steps.
    encoder : {"linear", "augment"}, default="linear"
        How a row becomes the initial state: through a linear layer, or by appending
        zeros to its features [2]_.
    state_size : int or "auto", default="auto"
        Width of the state. "auto" is the number of features, at least 16 and at
        most 64, for a linear encoder, and five more than it for zero augmentation.
    field : callable or None, default=None
        Your own vector field: called with the width of the state, returns a
        `torch.nn.Module` whose ``forward(t, y)`` maps times (n,) and states (n, width)
        to (n, width), row by row. None is a multilayer perceptron whose every layer
        is shifted by time.
    solver : str, default="dopri5"
        The ODE solver (the optimiser is `optimizer`). Adaptive: "dopri5", "tsit5",
        "bosh3", "adaptive_heun", "dopri8". Fixed step: "euler", "midpoint", "heun2",
        "rk4". All others of torchdiffeq and SciPy by their names, row by row and
        therefore slowly. May be changed after `fit`.
    rtol : float, default=1e-2
        Relative tolerance of the local error of each step, which each row meets with
        steps of its own. May be changed after `fit`.
    atol : float or None, default=None
        Absolute tolerance; None: the same number as `rtol`. May be changed after
        `fit`.
    step_size : float or None, default=None
        Longest step of a fixed-step solver; time runs from 0 to 1. Adaptive solvers
        ignore it. May be changed after `fit`.
    max_steps : int, default=1000
        Steps that a row may attempt. May be changed after `fit`.
    gradient : {"auto", "checkpoint", "adjoint", "reversible", "backprop"}, \
            default="auto"
        How gradients pass the solver: "checkpoint" is exact for the computed solution
        and stores the state of each step; "adjoint" solves the adjoint ODE backwards
        in constant memory; "reversible" is exact in nearly constant memory, by steps
        of its own, in `fit` and in `predict`, that cost twice as much and are less
        stable; "backprop" is plain autograd. "auto" is "checkpoint" where the solver
        allows it.
    compile : bool or "auto", default="auto"
        Whether to solve in compiled code, several times faster: for the field made
        here (`field` None) and the solvers listed first. On a CPU the machine's C++
        compiler translates it when it is first needed, in seconds, and it is kept in
        the user's cache directory; a GPU runs Triton kernels and CUDA graphs. "auto":
        where it can be; True: or say why not; False: never. Results agree to rounding,
        with "relu" within the tolerance. May be changed after `fit`.
    optimizer : {"adam", "sgd"}, default="adam"
        Adam with decoupled weight decay, or gradient descent with Nesterov's momentum.
    alpha : float, default=0.02
        Weight decay of matrices; biases are left alone.
    batch_size : int or "auto", default="auto"
        Rows per step. "auto" takes all of a table of up to 128 rows; an eighth of
        larger ones, but at least 32 and at most 512 rows.
    learning_rate_init : float, default=1e-2
        Learning rate at the plateau of its schedule: it rises over five epochs and
        falls to zero over the last third of `max_iter`, or once the loss has stopped
        improving.
    max_iter : int, default=100
        Epochs.
    tol : float, default=1e-5
        The loss, in standardised units, has stopped improving when its best value
        has fallen by less than `tol` in `n_iter_no_change` epochs. A fit that ends at
        `max_iter` gives a `ConvergenceWarning` if that was more than 1000 `tol`. 0
        asks for `max_iter` epochs, and for no such warning.
    n_iter_no_change : int, default=20
        Epochs over which `tol` is judged, at most half of `max_iter`.
    early_stopping : bool or "auto", default="auto"
        Whether to hold out `validation_fraction` of the rows, to watch the score there
        instead of the loss, and to keep the weights of the best epoch: for small or
        noisy tables, which are overfitted without. "auto" does so from 1,000 rows on.
    validation_fraction : float, default=0.1
        See `early_stopping`.
    standardize : bool, default=True
        Whether to shift and scale each feature and target to mean 0 and standard
        deviation 1 inside the model. Raw tables then work.
    loss : {"squared_error", "absolute_error", "huber", "quantile", "gaussian"}, \
            default="squared_error"
        What to minimise. "gaussian" also learns the spread, which may vary from row
        to row: ``predict(X, return_std=True)``.
    quantile : float, default=0.5
        Which quantile ``loss="quantile"`` predicts.
    huber_delta : float, default=1.35
        Where ``loss="huber"`` turns linear, in standardised units.
    warm_start : bool, default=False
        Whether `fit` goes on from the weights it finds. What shapes the net cannot
        change then: `hidden_layer_sizes`, `activation`, `encoder`, `state_size`,
        `field` and `standardize`. `loss_curve_` and `n_iter_` start anew.
    random_state : int, RandomState instance or None, default=None
        Of the initial weights, the batches and the held-out rows.
    device : str, default="auto"
        A torch device; "auto" is a GPU where there is one.
    dtype : {"auto", "float32", "float64"}, default="auto"
        To compute in; "auto" follows X.
    verbose : bool or int, default=False
        Whether to show a progress bar.

    Attributes
    ----------
    n_outputs_ : int
        Number of targets.
    module_ : torch.nn.Module
        The fitted net; with `standardize`, it takes standardised rows.
    state_size_ : int
        Width of the state.
    loss_curve_ : list of float
        Mean training loss of each epoch of the last `fit`, even of one that went on
        from another (`warm_start`); each `partial_fit` adds one.
    loss_ : float
        The last of them.
    best_loss_ : float
        The least of them.
    n_iter_ : int
        Number of epochs, the length of `loss_curve_`.
    validation_scores_ : list of float or None
        Validation score of each epoch with `early_stopping`.
    best_validation_score_ : float or None
        The largest of them.
    n_features_in_ : int
        Number of features seen in `fit`.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Their names, if X had any.

    Notes
    -----
    The layers of a residual network, y <- y + f(y), are Euler steps of dy/dt = f(t, y)
    [1]_. Here the steps are the solver's: it takes as many as the tolerance asks for,
    for every row by itself, so that a prediction does not depend on the rows beside it.

    References
    ----------
    .. [1] Chen, Rubanova, Bettencourt & Duvenaud (2018). Neural ordinary differential
       equations. arXiv:1806.07366.
    .. [2] Dupont, Doucet & Teh (2019). Augmented neural ODEs. arXiv:1904.01681.

    Examples
    --------
    >>> from sklearn.datasets import load_diabetes
    >>> from skode import ODERegressor
    >>> X, y = load_diabetes(return_X_y=True)
    >>> model = ODERegressor(max_iter=20, random_state=0, tol=1.0).fit(X, y)
    >>> bool(model.score(X, y) > 0.4)
    True
    """

    _parameter_constraints = {
        **_ODEEstimator._parameter_constraints,
        "loss": [
            choice(("squared_error", "absolute_error", "huber", "quantile", "gaussian"))
        ],
        "quantile": [inside(0, 1)],
        "huber_delta": [positive()],
    }

    def __init__(
        self,
        hidden_layer_sizes=(64,),
        *,
        activation="tanh",
        encoder="linear",
        state_size="auto",
        field=None,
        solver="dopri5",
        rtol=1e-2,
        atol=None,
        step_size=None,
        max_steps=1000,
        gradient="auto",
        compile="auto",
        optimizer="adam",
        alpha=0.02,
        batch_size="auto",
        learning_rate_init=1e-2,
        max_iter=100,
        tol=1e-5,
        n_iter_no_change=20,
        early_stopping="auto",
        validation_fraction=0.1,
        standardize=True,
        loss="squared_error",
        quantile=0.5,
        huber_delta=1.35,
        warm_start=False,
        random_state=None,
        device="auto",
        dtype="auto",
        verbose=False,
    ):
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.encoder = encoder
        self.state_size = state_size
        self.field = field
        self.solver = solver
        self.rtol = rtol
        self.atol = atol
        self.step_size = step_size
        self.max_steps = max_steps
        self.gradient = gradient
        self.compile = compile
        self.optimizer = optimizer
        self.alpha = alpha
        self.batch_size = batch_size
        self.learning_rate_init = learning_rate_init
        self.max_iter = max_iter
        self.tol = tol
        self.n_iter_no_change = n_iter_no_change
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.standardize = standardize
        self.loss = loss
        self.quantile = quantile
        self.huber_delta = huber_delta
        self.warm_start = warm_start
        self.random_state = random_state
        self.device = device
        self.dtype = dtype
        self.verbose = verbose

    @fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y, sample_weight=None):
        """Fit the model.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Rows; raw units are fine while `standardize` is True.
        y : array-like of shape (n_samples,) or (n_samples, n_outputs)
            Targets.
        sample_weight : array-like of shape (n_samples,) or None, default=None
            How many rows each row counts for.

        Returns
        -------
        self : ODERegressor
            The fitted estimator.

        Raises
        ------
        DivergenceError
            If the loss stopped being finite and lower learning rates did not help, or
            if no epoch succeeded; the best weights are kept.
        """
        fresh = not (self.warm_start and hasattr(self, "module_"))
        X, weight, targets = self._targets(X, y, sample_weight, fresh)
        _fit(self, X, targets, weight, self._task(), fresh)
        return self

    @fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X, y, sample_weight=None):
        """Train for one epoch on these rows, going on from the last call.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Rows. Those of the first call decide how features and targets are scaled.
        y : array-like of shape (n_samples,) or (n_samples, n_outputs)
            Targets.
        sample_weight : array-like of shape (n_samples,) or None, default=None
            How many rows each row counts for.

        Returns
        -------
        self : ODERegressor
            The estimator.

        Raises
        ------
        DivergenceError
            If the loss was not finite; the weights stay as they were.
        """
        fresh = not hasattr(self, "module_")
        X, weight, targets = self._targets(X, y, sample_weight, fresh)
        _partial_fit(self, X, targets, weight, self._task(), fresh)
        return self

    def predict(self, X, return_std=False):
        """Predict targets.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Rows in the units of the training data.
        return_std : bool, default=False
            Whether to return the standard deviation too; for ``loss="gaussian"``.

        Returns
        -------
        predictions : ndarray of shape (n_samples,) or (n_samples, n_outputs)
            In the units of y.
        std : ndarray of the same shape
            Standard deviation of the target given the row; only with `return_std`.

        Raises
        ------
        ValueError
            If `return_std` is asked of another loss than "gaussian".
        SolverError
            If a row needs more than `max_steps` steps, or blows up.
        """
        X = _check_rows(self, X)
        if return_std and not self._gaussian:
            raise ValueError(
                "return_std=True needs a model of the spread: fit with "
                "loss='gaussian'; this one was fitted with another."
            )

        def outputs(x):
            raw = self.module_(x, integration(self))
            return mean_and_std(raw) if self._gaussian else raw

        values = _apply(self, outputs, X)
        k = self.n_outputs_
        mean = values[:, :k] * self._target_scale + self._target_shift
        shape = (len(X),) if self._flat_target else (len(X), k)
        mean = mean.astype(values.dtype).reshape(shape)
        if not return_std:
            return mean
        std = values[:, k:] * self._target_scale
        return mean, std.astype(values.dtype).reshape(shape)

    def _targets(self, X, y, sample_weight, fresh):
        """Return X, weights, and targets in standardised units."""
        X, y = validate_data(
            self, X, y, dtype=FLOATS, multi_output=True, y_numeric=True, reset=fresh
        )
        y = flat_if_one(y)
        weight = check_weights(sample_weight, X)
        targets = y.astype(np.float64).reshape(len(y), -1)
        if fresh:
            self.n_outputs_ = targets.shape[1]
            self._flat_target = y.ndim == 1
            self._gaussian = self.loss == "gaussian"
            self._target_shift, self._target_scale = _moments(
                self, targets, weight, "y"
            )
        elif targets.shape[1] != self.n_outputs_:
            raise ValueError(
                f"y has {targets.shape[1]} targets, but the model being continued has "
                f"{self.n_outputs_}."
            )
        elif self._gaussian != (self.loss == "gaussian"):
            raise ValueError(
                "A model cannot be continued with loss='gaussian' if it was begun "
                "without, nor the other way round."
            )
        return X, weight, (targets - self._target_shift) / self._target_scale

    def _task(self):
        loss = regression_loss(
            self.loss, delta=self.huber_delta, quantile=self.quantile
        )
        centred = self.loss in ("squared_error", "absolute_error", "huber")
        return _Task(
            loss=loss,
            n_outputs=self.n_outputs_ * (2 if self._gaussian else 1),
            score=_r2 if centred else None,
            stratify=False,
            smallest_batch=32,
        )


@dataclass(frozen=True)
class _Task:
    """What distinguishes classification from regression in a fit."""

    loss: Callable
    """Tensors (B, O), (B, K) -> (B,)."""
    n_outputs: int
    score: Callable | None
    """Arrays outputs, targets, weights -> float; None: minus the loss."""
    stratify: bool
    smallest_batch: int
    """Regression needs more steps on small tables than classification does."""


def _fit(est, X, targets, weight, task, fresh):
    """Train a net, new or found, until it converges; set the fitted attributes."""
    device = resolve_device(est.device)
    with seeded(est.random_state, device) as generator:
        if fresh:
            est._feature_shift, est._feature_scale = _moments(est, X, weight, "X")
        else:
            check_same_shape(est, _shape(est))
        n_rows = np.count_nonzero(weight)
        held_out = holds_out(est.early_stopping, n_rows, _HOLD_OUT_FROM)
        seed = generator.initial_seed() if held_out else None
        data = _Data.of(est, X, targets, weight, task, device, seed)
        if fresh:
            est.module_ = _new_net(est, X.shape[1], task, generator)
        est.module_.to(device, data.x.dtype)
        est._optimizer = None
        history = History()
        try:
            train(
                est.module_,
                _objective(est, data, task),
                len(data.x),
                training(est, len(data.x), task.smallest_batch),
                generator,
                _validation(est, data, task) if held_out else None,
                history,
            )
        finally:
            est.module_.eval()
            record(est, history)
    warn_unfinished(est, history, held_out, stacklevel=5)  # not a method


def _partial_fit(est, X, targets, weight, task, fresh):
    """Train for one epoch; keep the optimiser's memory between calls."""
    device = resolve_device(est.device)
    with seeded(est.random_state, device) as generator:
        if fresh:
            est._feature_shift, est._feature_scale = _moments(est, X, weight, "X")
        else:
            check_same_shape(est, _shape(est))
        data = _Data.of(est, X, targets, weight, task, device, seed=None)
        if fresh:
            est.module_ = _new_net(est, X.shape[1], task, generator)
            record(est, History())
        est.module_.to(device, data.x.dtype)
        how = training(est, len(data.x), task.smallest_batch)
        ready_optimizer(est, how)
        try:
            loss = train_once(
                est.module_,
                _objective(est, data, task),
                len(data.x),
                how,
                est._optimizer,
                generator,
            )
        finally:
            est.module_.eval()
    record(est, History(loss=[*est.loss_curve_, loss]))


def _moments(est, values, weight, name):
    """Return shift and scale by column: 0 and 1 without `standardize`."""
    if not est.standardize:
        return np.zeros(values.shape[1]), np.ones(values.shape[1])
    shift, scale = weighted_moments(values, weight)
    finite = np.isfinite(shift) & np.isfinite(scale)
    if not finite.all():
        raise ValueError(
            f"Columns {np.flatnonzero(~finite).tolist()} of {name} hold numbers so "
            "large that their variance overflows: rescale them, or take logarithms."
        )
    return shift, scale


def _standardized(est, X):
    """Return features in standardised units.

    In float64 even where the net computes in float32, which would keep next to nothing
    of a column such as timestamps: large, and all alike.
    """
    return (X - est._feature_shift) / est._feature_scale


def _new_net(est, n_features, task, generator):
    """Return an untrained net, of weights that the generator's seed decides."""
    width = est.state_size
    if width == "auto":
        width = n_features + 5
        if est.encoder == "linear":
            width = min(64, max(16, n_features))
    est.state_size_ = width
    with undisturbed(generator):
        net = build(
            n_features,
            task.n_outputs,
            encoder=est.encoder,
            width=width,
            hidden=widths_of(est.hidden_layer_sizes),
            activation=est.activation,
            field=est.field,
        )
    est._shape = _shape(est)
    return net


def _shape(est):
    """Return the parameters that shape a net, each in one way of writing it."""
    size = est.state_size
    return {
        "hidden_layer_sizes": widths_of(est.hidden_layer_sizes),
        "activation": est.activation,
        "encoder": est.encoder,
        "state_size": int(size) if isinstance(size, Integral) else size,
        "field": est.field,
        "standardize": bool(est.standardize),
    }


@dataclass(frozen=True)
class _Data:
    """Training rows as tensors, and held-out rows; both in standardised units."""

    x: object
    y: object
    weight: object
    index: np.ndarray
    """Which rows of the table they are."""
    held: tuple | None
    """X, targets, weights and index of the rows held out."""

    @classmethod
    def of(cls, est, X, targets, weight, task, device, seed):
        """Drop rows of weight 0, hold some out unless `seed` is None, make tensors."""
        dtype = torch_dtype(est.dtype, X)
        kept = weight > 0
        index = np.flatnonzero(kept)
        X, targets, weight = _standardized(est, X[kept]), targets[kept], weight[kept]
        held = None
        if seed is not None:
            rows, held_rows = _split(est, targets, task, seed)
            held = X[held_rows], targets[held_rows], weight[held_rows], index[held_rows]
            X, targets, weight = X[rows], targets[rows], weight[rows]
            index = index[rows]
        codes = targets.dtype.kind == "i"
        return cls(
            to_tensor(X, device, dtype),
            to_tensor(targets, device, None if codes else dtype),
            to_tensor(weight / weight.mean(), device, dtype),
            index,
            held,
        )


def _split(est, targets, task, seed):
    """Return indices of training and of held-out rows."""
    stratify = targets[:, 0] if task.stratify and len(targets) else None
    return hold_out(est, len(targets), seed, stratify)


def _objective(est, data, task):
    """Return the loss of some rows as a function of their indices."""
    how = integration(est)

    def objective(rows):
        try:
            outputs = est.module_(data.x[rows], how)
        except SolverError as error:  # knows its batch only
            error.rows = tuple(
                data.index[rows.cpu().numpy()][list(error.rows)].tolist()
            )
            raise
        return weighted_mean(task.loss(outputs, data.y[rows]), data.weight[rows])

    return objective


def _validation(est, data, task):
    """Return a function that scores the held-out rows."""
    X, targets, weight, index = data.held
    how = integration(est)

    def validate():
        try:
            outputs = apply(lambda x: est.module_(x, how), X, est.module_)
        except SolverError as error:  # knows the held-out rows only
            error.rows = tuple(index[list(error.rows)].tolist())
            raise
        if task.score is not None:
            return float(task.score(outputs, targets, weight))
        cpu = resolve_device("cpu")
        losses = task.loss(
            to_tensor(outputs, cpu), to_tensor(targets.astype(outputs.dtype), cpu)
        )
        return -float(np.average(losses.numpy(), weights=weight))

    return validate


def _check_rows(est, X):
    check_is_fitted(est, "module_")
    return validate_data(est, X, dtype=FLOATS, reset=False)


def _apply(est, function, X):
    """Map rows through a function of tensors, on the device asked for now."""
    est.module_.to(resolve_device(est.device))
    return apply(function, _standardized(est, X), est.module_)


def _classes_of(y):
    return [np.unique(column) for column in y.reshape(len(y), -1).T]


def _check_same_classes(known, classes, ndim):
    listed = known if isinstance(known, list) else [known]
    same = len(listed) == len(classes) and all(
        np.array_equal(a, b) for a, b in zip(listed, classes, strict=True)
    )
    if not same or isinstance(known, list) != (ndim == 2):
        raise ValueError(
            f"A model is continued with the same classes: it has {_plain(known)}, not "
            f"{_plain(classes if ndim == 2 else classes[0])}."
        )


def _plain(classes):
    """Return the classes of one target, or of several, for a message."""
    if isinstance(classes, list):
        return [_plain(labels) for labels in classes]
    return classes.tolist()


def _accuracy(outputs, codes, weight, sizes):
    parts = np.split(outputs, np.cumsum(sizes)[:-1], axis=1)
    right = [part.argmax(axis=1) == codes[:, i] for i, part in enumerate(parts)]
    return np.average(np.mean(right, axis=0), weights=weight)


def _r2(outputs, targets, weight):
    if len(targets) < 2:
        return -float(np.square(outputs - targets).mean())
    return r2_score(targets, outputs, sample_weight=weight)
