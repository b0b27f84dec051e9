"""Continuous normalizing flows for tables: `CNFDensityEstimator`."""

import warnings
from numbers import Integral

import numpy as np
from sklearn.base import ClassNamePrefixFeaturesOutMixin, DensityMixin, TransformerMixin
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from skode._border import (
    FLOATS,
    PortableEstimator,
    apply,
    at_least,
    check_weights,
    choice,
    fit_context,
    inside,
    positive,
    resolve_device,
    seeded,
    torch_dtype,
    undisturbed,
)
from skode._conditions import Conditions
from skode._marginals.preprocessing import fit_preprocessing
from skode._nn.fields import ACTIVATIONS
from skode._nn.flow import Flow
from skode._nn.flow_field import FlowField
from skode._nn.flow_training import (
    FlowMatching,
    Likelihood,
    Penalties,
    probes_of,
)
from skode._parameters import (
    SHARED,
    check_same_shape,
    integration,
    ready_optimizer,
    record,
    training,
    warn_unfinished,
    widths_of,
)
from skode._training import History, train, train_once
from skode._training_table import smoothing, training_table
from skode.exceptions import SolverError, SolverWarning

__all__ = ["CNFDensityEstimator"]

_GRID_TOLERANCE = 0.02
_LEAST_ALPHA = 0.005
_SMALLEST_BATCH = 128
_OFFSET_ROWS = 10_000


class CNFDensityEstimator(
    ClassNamePrefixFeaturesOutMixin, DensityMixin, TransformerMixin, PortableEstimator
):
    """Density estimator whose samples flow from a normal distribution to the data.

    A learned vector field carries a standard normal distribution at t = 0 to the data
    at t = 1. The log-density of a row is that of the point it came from, less the
    divergence of the field along the way [1]_, which is exact here, not sampled.

    Parameters
    ----------
    hidden_layer_sizes : int or array-like of int, default=(64, 64)
        Widths of the hidden layers of the vector field; empty for a linear field.
    activation : {"tanh", "softplus", "silu", "relu"}, default="tanh"
        Of the vector field. Smooth ones let the solver take long steps.
    conditional : bool, default=False
        Whether to estimate p(X | y), the density of rows given `y`: a vector of labels
        (strings, booleans or integers), or covariates (floats, or several columns).
        If not, `y` is ignored, as by scikit-learn's other density estimators.
    objective : {"likelihood", "flow_matching", "two_stage"}, default="likelihood"
        What to maximise. "likelihood": that of the training rows. "flow_matching":
        minimise the distance from the field to straight lines between random pairs of
        normal points and rows [2]_; it solves nothing and computes no divergence, so it
        is fast in many columns, and ends at a lower likelihood. "two_stage": first one,
        then the other, each for `max_iter` epochs.
    trace : {"auto", "exact", "hutchinson"}, default="auto"
        How the divergence is computed. "exact": by a closed form with up to two hidden
        layers, whatever the number of columns; with more, column by column.
        "hutchinson": estimated by `n_probes` random directions; `score_samples` tells
        the standard error. "auto" is exact with up to two hidden layers, or up to 64
        columns.
    n_probes : int, default=8
        Directions of ``trace="hutchinson"``: the same ones for all rows of
        `score_samples`, new ones for every batch in `fit`.
    marginals : {"auto", "normal"} or None, default="auto"
        How each column is carried to normal scores before the flow: by the distribution
        function of a mixture of gaussians, on a curved scale where tails are heavy and
        with a narrow component at every value that is often repeated. "auto" does so
        where it describes the column better than a normal distribution; "normal" does
        so always; None never.
    standardize : bool, default=True
        Whether to whiten the columns inside the model: mean 0, standard deviation 1,
        uncorrelated. Raw tables then work. Without, rows reach the flow as they are and
        `marginals` are ignored: columns should have means near 0 and standard
        deviations near 1, as noise, tolerances and learning rate expect; far from it,
        a fit is poor or diverges.
    dequantize : bool, default=False
        Whether to take integer columns as rounded: each value stands for the interval
        of length 1 around it. The density at integers is then nearly their probability.
    contamination : float, default=0.1
        Share of the training rows that `predict` calls outliers. Read in `fit`, which
        sets `offset_`; a later change does nothing.
    solver : str, default="dopri5"
        The ODE solver of densities and samples (the optimiser is `optimizer`; `fit`
        steps on a coarse grid of its own). Adaptive: "dopri5", "tsit5", "bosh3",
        "adaptive_heun", "dopri8". Fixed step: "euler", "midpoint", "heun2", "rk4". All
        others of torchdiffeq and SciPy by their names, row by row and therefore slowly.
        May be changed after `fit`.
    rtol : float, default=1e-4
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
        How gradients pass a solve of `module_`, for your own use of it: see
        `ODEClassifier`. `fit` differentiates the steps of its grid. May be changed
        after `fit`.
    compile : bool or "auto", default="auto"
        Whether to solve in compiled code, several times faster: see `ODEClassifier`.
        May be changed after `fit`.
    kinetic_penalty : float, default=0.01
        Weight, in nats per row, of the integral of the squared velocity: straighter
        paths need fewer steps [3]_.
    jacobian_penalty : float, default=0.0
        Weight of the integral of the squared Frobenius norm of the field's Jacobian,
        estimated by one random direction per batch [3]_.
    error_penalty : float, default=10.0
        Weight of the squared error estimates of the grid's steps: a field that is easy
        for few steps stays so [4]_.
    noise : float or "auto", default="auto"
        Standard deviation of the normal noise that is added to the whitened rows of
        each batch, against overfitting. "auto" is less the more rows there are, and
        the fewer columns.
    averaging : float, default=0.99
        Share that the running average of the weights keeps of itself at each step of
        the optimiser in `fit`. The average is what is watched and kept. 0: the weights
        themselves.
    optimizer : {"adam", "sgd"}, default="adam"
        Adam with decoupled weight decay, or gradient descent with Nesterov's momentum.
    alpha : float or "auto", default="auto"
        Weight decay of matrices; biases are left alone. "auto" is less the more rows
        there are, and the fewer columns.
    batch_size : int or "auto", default="auto"
        Rows per step. "auto" takes all of a table of up to 128 rows; an eighth of
        larger ones, but at least 128 and at most 512 rows.
    learning_rate_init : float, default=2e-2
        Learning rate at the plateau of its schedule: it rises over five epochs and
        falls to zero over the last third of `max_iter`, or once the score has stopped
        improving.
    max_iter : int, default=120
        Epochs.
    tol : float, default=1e-3
        The loss has stopped improving when its best value, in nats, has fallen by less
        than `tol` in `n_iter_no_change` epochs. A fit that ends at `max_iter` gives a
        `ConvergenceWarning` if that was more than 1000 `tol`. 0 asks for `max_iter`
        epochs, and for no such warning.
    n_iter_no_change : int, default=20
        Epochs over which `tol` is judged, at most half of `max_iter`.
    early_stopping : bool or "auto", default="auto"
        Whether to hold out `validation_fraction` of the rows, to watch the likelihood
        there instead of the loss, and to keep the weights of the best epoch. "auto"
        does so from 100 rows on, of which equal ones count once.
    validation_fraction : float, default=0.1
        See `early_stopping`.
    warm_start : bool, default=False
        Whether `fit` goes on from the weights it finds. What shapes the net cannot
        change then: `hidden_layer_sizes`, `activation`, `conditional`, `marginals`,
        `standardize` and `dequantize`. `loss_curve_` and `n_iter_` start anew.
    random_state : int, RandomState instance or None, default=None
        Of the initial weights, the batches, the noise and the held-out rows.
    device : str, default="auto"
        A torch device; "auto" is a GPU where there is one.
    dtype : {"auto", "float32", "float64"}, default="auto"
        To compute in; "auto" follows X.
    verbose : bool or int, default=False
        Whether to show a progress bar.

    Attributes
    ----------
    module_ : torch.nn.Module
        The fitted flow, between the base and whitened rows.
    preprocessing_ : object
        The map of rows to whitened normal scores.
    offset_ : float
        Log-density below which `predict` calls a row an outlier.
    n_steps_ : int
        Steps of the grid at the end of `fit`.
    classes_ : ndarray of shape (n_classes,)
        Labels, if conditional on labels.
    loss_curve_ : list of float
        Mean training loss of each epoch of the last `fit`, in its second stage if there
        are two; each `partial_fit` adds one.
    loss_ : float
        The last of them.
    best_loss_ : float
        The least of them.
    n_iter_ : int
        Number of epochs, the length of `loss_curve_`.
    validation_scores_ : list of float or None
        Mean log-density of the held-out rows at each epoch with `early_stopping`, in
        nats, of whitened rows on the grid.
    best_validation_score_ : float or None
        The largest of them.
    n_features_in_ : int
        Number of features seen in `fit`.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Their names, if X had any.

    See Also
    --------
    sklearn.mixture.GaussianMixture : Fewer parameters, fitted in less time.
    sklearn.neighbors.KernelDensity : Nothing to fit; slow to score.

    Notes
    -----
    Natural logarithms throughout: log-densities are in nats, per row, with respect to
    the units of X. `score` is their mean, while that of `KernelDensity` is their sum.

    References
    ----------
    .. [1] Chen, Rubanova, Bettencourt & Duvenaud (2018). Neural ordinary differential
       equations. arXiv:1806.07366.
    .. [2] Lipman, Chen, Ben-Hamu, Nickel & Le (2023). Flow matching for generative
       modeling. arXiv:2210.02747.
    .. [3] Finlay, Jacobsen, Nurbekyan & Oberman (2020). How to train your neural ODE.
       arXiv:2002.02798.
    .. [4] Pal, Ma, Shah & Rackauckas (2021). Opening the blackbox: accelerating neural
       differential equations by regularizing internal solver heuristics.
       arXiv:2105.03918.

    Examples
    --------
    >>> import numpy as np
    >>> from skode import CNFDensityEstimator
    >>> X = np.random.default_rng(0).normal([0, 5], [1, 2], size=(200, 2))
    >>> flow = CNFDensityEstimator(max_iter=20, random_state=0, tol=0.1).fit(X)
    >>> log_density = flow.score_samples([[0, 5], [9, 9]])
    >>> bool(log_density[0] > log_density[1])
    True
    >>> flow.sample(3, random_state=0).shape
    (3, 2)
    """

    _parameter_constraints = {
        **SHARED,
        "activation": [choice(ACTIVATIONS)],
        "conditional": ["boolean"],
        "objective": [choice(("likelihood", "flow_matching", "two_stage"))],
        "trace": [choice(("auto", "exact", "hutchinson"))],
        "n_probes": [at_least(1)],
        "marginals": [choice(("auto", "normal")), None],
        "dequantize": ["boolean"],
        "contamination": [inside(0, 0.5, closed="right")],
        "kinetic_penalty": [positive(closed="left")],
        "jacobian_penalty": [positive(closed="left")],
        "error_penalty": [positive(closed="left")],
        "alpha": [positive(closed="left"), choice(("auto",))],
        "averaging": [inside(0, 1, closed="left")],
        "noise": [positive(closed="left"), choice(("auto",))],
    }

    def __init__(
        self,
        hidden_layer_sizes=(64, 64),
        *,
        activation="tanh",
        conditional=False,
        objective="likelihood",
        trace="auto",
        n_probes=8,
        marginals="auto",
        standardize=True,
        dequantize=False,
        contamination=0.1,
        solver="dopri5",
        rtol=1e-4,
        atol=None,
        step_size=None,
        max_steps=1000,
        gradient="auto",
        compile="auto",
        kinetic_penalty=0.01,
        jacobian_penalty=0.0,
        error_penalty=10.0,
        noise="auto",
        averaging=0.99,
        optimizer="adam",
        alpha="auto",
        batch_size="auto",
        learning_rate_init=2e-2,
        max_iter=120,
        tol=1e-3,
        n_iter_no_change=20,
        early_stopping="auto",
        validation_fraction=0.1,
        warm_start=False,
        random_state=None,
        device="auto",
        dtype="auto",
        verbose=False,
    ):
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.conditional = conditional
        self.objective = objective
        self.trace = trace
        self.n_probes = n_probes
        self.marginals = marginals
        self.standardize = standardize
        self.dequantize = dequantize
        self.contamination = contamination
        self.solver = solver
        self.rtol = rtol
        self.atol = atol
        self.step_size = step_size
        self.max_steps = max_steps
        self.gradient = gradient
        self.compile = compile
        self.kinetic_penalty = kinetic_penalty
        self.jacobian_penalty = jacobian_penalty
        self.error_penalty = error_penalty
        self.noise = noise
        self.averaging = averaging
        self.optimizer = optimizer
        self.alpha = alpha
        self.batch_size = batch_size
        self.learning_rate_init = learning_rate_init
        self.max_iter = max_iter
        self.tol = tol
        self.n_iter_no_change = n_iter_no_change
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.warm_start = warm_start
        self.random_state = random_state
        self.device = device
        self.dtype = dtype
        self.verbose = verbose

    def __sklearn_tags__(self):
        """Describe the estimator to scikit-learn."""
        tags = super().__sklearn_tags__()
        tags.target_tags.required = self.conditional
        both = ["float64", "float32"]
        tags.transformer_tags.preserves_dtype = both if self.dtype == "auto" else []
        return tags

    @fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y=None, sample_weight=None):
        """Fit the flow.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Rows; raw units are fine while `standardize` is True.
        y : array-like of shape (n_samples,) or (n_samples, n_covariates), default=None
            What the density is conditional on, with ``conditional=True``; ignored
            without.
        sample_weight : array-like of shape (n_samples,) or None, default=None
            How many rows each row counts for. Divide weights of importance by their
            mean: noise and weight decay follow the sum, as the number of rows.

        Returns
        -------
        self : CNFDensityEstimator
            The fitted estimator.

        Raises
        ------
        DivergenceError
            If the loss stopped being finite and lower learning rates did not help, or
            if no epoch succeeded; the best weights are kept.
        """
        integration(self)  # how to solve is wanted at the end, and checked now
        fresh = not (self.warm_start and hasattr(self, "module_"))
        X, weight = self._rows(X, sample_weight, fresh)
        device = resolve_device(self.device)
        with seeded(self.random_state, device) as generator:
            context = self._begin(X, y, weight, device, generator, fresh)
            table, held = training_table(
                self, X, context, weight, device, generator, self.early_stopping
            )
            self._optimizer = None
            watched = _likelihood(self, generator, fresh)
            history = History()
            try:
                for objective in _STAGES[self.objective]:
                    history = History()
                    train(
                        self.module_,
                        _objective(self, objective, watched, table),
                        len(table),
                        _training(self, len(table), weight),
                        generator,
                        _validation(objective, watched, held),
                        history,
                    )
                    if history.interrupted:
                        break
            finally:
                self.module_.eval()
                self.n_steps_ = watched.steps
                record(self, history)
        self._set_offset(X, y, weight)
        warn_unfinished(self, history, held is not None)
        return self

    @fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X, y=None, sample_weight=None):
        """Train for one epoch on these rows, going on from the last call.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Rows. Those of the first call decide how features are mapped.
        y : array-like of shape (n_samples,) or (n_samples, n_covariates), default=None
            As in `fit`; all labels must be in the first call.
        sample_weight : array-like of shape (n_samples,) or None, default=None
            How many rows each row counts for, as in `fit`.

        Returns
        -------
        self : CNFDensityEstimator
            The estimator; `offset_` is that of these rows.

        Raises
        ------
        DivergenceError
            If the loss was not finite; the weights stay as they were.

        Notes
        -----
        Every call takes its steps at the whole `learning_rate_init`, while `fit` ends
        at a rate of zero, with averaged weights. After `fit`, the first calls therefore
        lose some of what it had gained; a tenth of the rate loses less.
        """
        integration(self)  # how to solve is wanted at the end, and checked now
        fresh = not hasattr(self, "module_")
        X, weight = self._rows(X, sample_weight, fresh)
        device = resolve_device(self.device)
        with seeded(self.random_state, device) as generator:
            context = self._begin(X, y, weight, device, generator, fresh)
            if fresh:
                record(self, History())
            table, _ = training_table(
                self, X, context, weight, device, generator, False
            )
            how = _training(self, len(table), weight)
            ready_optimizer(self, how)
            watched = _likelihood(self, generator, fresh)
            objective = _STAGES[self.objective][-1]
            try:
                loss = train_once(
                    self.module_,
                    _objective(self, objective, watched, table),
                    len(table),
                    how,
                    self._optimizer,
                    generator,
                )
            finally:
                self.module_.eval()
            self.n_steps_ = watched.steps
        record(self, History(loss=[*self.loss_curve_, loss]))
        self._set_offset(X, y, weight)
        return self

    def score_samples(self, X, y=None, return_std=False):
        """Compute the log-density of each row.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Rows in the units of the training data.
        y : array-like of shape (n_samples,) or (n_samples, n_covariates), default=None
            What each row's density is conditional on, if the model is.
        return_std : bool, default=False
            Whether to return the standard error of ``trace="hutchinson"``, too: that
            of the mean over `n_probes`; 0 for exact traces, NaN for a single probe.

        Returns
        -------
        log_density : ndarray of shape (n_samples,)
            In nats, in units of X; exact up to `rtol` and `atol`.
        std : ndarray of shape (n_samples,)
            With `return_std`.

        Raises
        ------
        SolverError
            If a row needs more than `max_steps` steps, or blows up.
        """
        log_density, estimates = self._log_densities(*self._checked(X, y))
        if not return_std:
            return log_density
        n = estimates.shape[1]
        if self.module_.exact(self.trace):
            return log_density, np.zeros_like(log_density)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of a single probe: NaN
            return log_density, estimates.std(axis=1, ddof=1) / np.sqrt(n)

    def score(self, X, y=None, sample_weight=None):
        """Return the mean log-density of the rows.

        `KernelDensity.score` is the sum.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Rows in the units of the training data.
        y : array-like of shape (n_samples,) or (n_samples, n_covariates), default=None
            As for `score_samples`; ignored if the model is not conditional.
        sample_weight : array-like of shape (n_samples,) or None, default=None
            How many rows each row counts for; only their proportions matter.

        Returns
        -------
        score : float
            In nats per row.
        """
        check_is_fitted(self, "module_")
        densities = self.score_samples(X, y if self._conditions is not None else None)
        return float(np.average(densities, weights=sample_weight))

    def sample(self, n_samples=1, random_state=None, y=None):
        """Draw rows from the fitted density.

        Parameters
        ----------
        n_samples : int, default=1
            How many.
        random_state : int, RandomState instance or None, default=None
            Of the draws.
        y : scalar or array-like of shape (n_samples, ...), default=None
            What each row is drawn given, if the model is conditional: one for all, or
            one each.

        Returns
        -------
        X : ndarray of shape (n_samples, n_features)
            Rows in the units of the training data.

        Raises
        ------
        ValueError
            If `n_samples` is no integer from 1 on, or `y` is for another number.
        SolverError
            If a row needs more than `max_steps` steps, or blows up.
        """
        check_is_fitted(self, "module_")
        if not isinstance(n_samples, Integral) or n_samples < 1:
            raise ValueError(
                f"n_samples must be an integer of at least 1, got {n_samples}."
            )
        rng = check_random_state(random_state)
        z = rng.standard_normal((n_samples, self.n_features_in_))
        if self._conditions is not None and y is not None:
            y = self._conditions.repeated(y, n_samples)
        rows = self._to_data(z, self._context(y, n_samples))
        return self.preprocessing_.settle(rows).astype(rows.dtype)

    def transform(self, X, y=None):
        """Carry rows back to the base, where the training data are standard normal.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Rows in the units of the training data.
        y : array-like of shape (n_samples,) or (n_samples, n_covariates), default=None
            What each row is conditional on, if the model is.

        Returns
        -------
        Z : ndarray of shape (n_samples, n_features)
            Independent standard normal scores, if the density is right.

        Raises
        ------
        SolverError
            If a row needs more than `max_steps` steps, or blows up.
        """
        X, context = self._checked(X, y)
        how = integration(self)
        return self._apply(
            lambda x: self.module_.to_base(*self._split(x), how),
            self.preprocessing_.forward(X)[0],
            context,
        )

    def inverse_transform(self, X, y=None):
        """Carry points of the base to the data.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Points of the base, as `transform` returns them.
        y : array-like of shape (n_samples,) or (n_samples, n_covariates), default=None
            What each row is conditional on, if the model is.

        Returns
        -------
        X_original : ndarray of shape (n_samples, n_features)
            Rows in the units of the training data.

        Raises
        ------
        SolverError
            If a row needs more than `max_steps` steps, or blows up.
        """
        check_is_fitted(self, "module_")
        Z = check_array(
            X,
            dtype=FLOATS,
            ensure_2d=False,  # the message below says more
            allow_nd=True,
            estimator=self,
            input_name="X",
        )
        if Z.ndim != 2 or Z.shape[1] != self.n_features_in_:
            raise ValueError(
                f"X must have shape (n_samples, {self.n_features_in_}), as transform "
                f"returns it, got {Z.shape}."
            )
        return self._to_data(Z, self._context(y, len(Z)))

    def fit_transform(self, X, y=None, sample_weight=None):
        """Fit the flow and carry the rows to the base.

        Parameters
        ----------
        X, y, sample_weight
            As for `fit`.

        Returns
        -------
        Z : ndarray of shape (n_samples, n_features)
            As `transform` returns it.
        """
        self.fit(X, y, sample_weight)
        return self.transform(X, y if self.conditional else None)

    def decision_function(self, X, y=None):
        """Return how far the log-density of each row is above the outliers'.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Rows in the units of the training data.
        y : array-like of shape (n_samples,) or (n_samples, n_covariates), default=None
            What each row's density is conditional on, if the model is.

        Returns
        -------
        decision : ndarray of shape (n_samples,)
            ``score_samples(X) - offset_``: negative for outliers.
        """
        check_is_fitted(self, "offset_")  # a fit that raised left none
        return self.score_samples(X, y) - self.offset_

    def predict(self, X, y=None):
        """Tell outliers from inliers.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Rows in the units of the training data.
        y : array-like of shape (n_samples,) or (n_samples, n_covariates), default=None
            What each row's density is conditional on, if the model is.

        Returns
        -------
        labels : ndarray of shape (n_samples,)
            -1 for rows less probable than the `contamination` least probable of the
            training rows, 1 for all others.
        """
        return np.where(self.decision_function(X, y) < 0, -1, 1)

    def fit_predict(self, X, y=None, sample_weight=None):
        """Fit the flow and tell outliers from inliers among its rows.

        Parameters
        ----------
        X, y, sample_weight
            As for `fit`.

        Returns
        -------
        labels : ndarray of shape (n_samples,)
            As `predict` returns them.
        """
        self.fit(X, y, sample_weight)
        return self.predict(X, y if self.conditional else None)

    def trajectory(self, X, t, y=None):
        """Follow rows on their way from the base to the data.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Rows in the units of the training data: where they are at t = 1.
        t : array-like of shape (n_times,)
            Times from 0, the base, to 1, the data, in increasing order.
        y : array-like of shape (n_samples,) or (n_samples, n_covariates), default=None
            What each row is conditional on, if the model is.

        Returns
        -------
        path : ndarray of shape (n_samples, n_times, n_features)
            In the units of the training data at every time.

        Raises
        ------
        ValueError
            If the times do not increase from 0 or later to 1 or earlier.
        SolverError
            If a row needs more than `max_steps` steps, or blows up.
        """
        X, context = self._checked(X, y)
        t = np.asarray(t, dtype=np.float64)
        increasing = t.ndim == 1 and len(t) > 0 and (np.diff(t) >= 0).all()
        if not increasing or not 0 <= t[0] <= t[-1] <= 1:
            raise ValueError(f"t must increase from 0 or later to 1 at most, got {t}.")
        times, how = [1.0, *t[::-1]], integration(self)
        paths = self._apply(
            lambda x: self.module_.path(*self._split(x), times, how)[:, 1:],
            self.preprocessing_.forward(X)[0],
            context,
        )
        flat = paths[:, ::-1].reshape(-1, X.shape[1])
        rows = self.preprocessing_.inverse(flat.astype(np.float64))
        return rows.reshape(paths.shape).astype(paths.dtype)

    def evaluations(self, X, y=None):
        """Count how often the solver evaluates the vector field for each row.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Rows in the units of the training data.
        y : array-like of shape (n_samples,) or (n_samples, n_covariates), default=None
            What each row's density is conditional on, if the model is.

        Returns
        -------
        n_evaluations : ndarray of shape (n_samples,)
            The price of a density with the present `solver`, `rtol` and `atol`.
        """
        X, context = self._checked(X, y)
        how = integration(self)
        return self._apply(
            lambda x: self.module_.evaluations(*self._split(x), how, _probes(self, x)),
            self.preprocessing_.forward(X)[0],
            context,
        )

    @property
    def _n_features_out(self):
        return self.n_features_in_

    # ------------------------------------------------------------------ rows

    def _rows(self, X, sample_weight, fresh):
        least = 2 if fresh else 1  # of one row there is no spread to learn
        X = validate_data(self, X, dtype=FLOATS, reset=fresh, ensure_min_samples=least)
        return X, check_weights(sample_weight, X)

    def _begin(self, X, y, weight, device, generator, fresh):
        """Fit what comes before the flow, and make one, or check the one there is."""
        dtype, y = torch_dtype(self.dtype, X), y if self.conditional else None
        if fresh:
            for name in ("classes_", "offset_", "_optimizer"):
                vars(self).pop(name, None)  # the fit before
            self._conditions = None
            if self.conditional:
                self._conditions = Conditions.of(y, weight)
                if self._conditions.labels is not None:
                    self.classes_ = self._conditions.labels
            context = self._context(y, len(X))
            self.preprocessing_ = fit_preprocessing(
                X,
                weight,
                self.marginals if self.standardize else None,
                standardize=self.standardize,
                dequantize=self.dequantize,
            )
            with undisturbed(generator):
                width = 0 if context is None else context.shape[1]
                self.module_ = Flow(
                    FlowField(
                        X.shape[1],
                        widths_of(self.hidden_layer_sizes),
                        self.activation,
                        width,
                    )
                )
            self._shape = _shape(self)
            self._probe_seed = generator.initial_seed()
        else:
            check_same_shape(self, _shape(self))
            context = self._context(y, len(X))
        self.module_.to(device, dtype)
        return context

    def _context(self, y, n_rows):
        """Return what the flow is told beside rows, (n_rows, C), or None."""
        if self._conditions is None:
            if y is not None:
                raise ValueError(
                    "This density is not conditional, so y means nothing to it: leave "
                    "y out, or fit with conditional=True."
                )
            return None
        if y is None:
            raise ValueError(
                "This density is conditional on y: pass y, one for each row."
            )
        return self._conditions.encode(y, n_rows)

    def _checked(self, X, y):
        """Return valid rows and their context."""
        check_is_fitted(self, "module_")
        X = validate_data(self, X, dtype=FLOATS, reset=False)
        return X, self._context(y, len(X))

    def _apply(self, function, scores, context):
        """Map rows, with their context behind them, through a function of tensors."""
        self.module_.to(resolve_device(self.device))
        rows = scores if context is None else np.hstack([scores, context])
        return apply(function, rows, self.module_)

    def _split(self, x):
        """Return rows and context of tensors that hold both."""
        if self._conditions is None:
            return x, None
        return x[:, : self.n_features_in_], x[:, self.n_features_in_ :]

    def _log_densities(self, X, context):
        """Return (n,) of checked rows, and (n, n_probes) estimates before the map."""
        scores, log_det = self.preprocessing_.forward(X)
        how = integration(self)

        def densities(x):
            probes = _probes(self, x)
            return self.module_.log_densities(*self._split(x), how, probes)

        estimates = self._apply(densities, scores, context)
        log_density = (estimates.mean(axis=1) + log_det).astype(estimates.dtype)
        return log_density, estimates

    def _to_data(self, Z, context):
        how = integration(self)
        scores = self._apply(
            lambda z: self.module_.to_data(*self._split(z), how), Z, context
        )
        rows = self.preprocessing_.inverse(scores.astype(np.float64))
        return rows.astype(scores.dtype)

    def _set_offset(self, X, y, weight):
        """Set `offset_`, of the training rows or ten thousand of them."""
        index = np.flatnonzero(weight)
        if len(index) > _OFFSET_ROWS:
            rng = np.random.default_rng(self._probe_seed)
            index = rng.choice(index, _OFFSET_ROWS, replace=False)
        given = None if self._conditions is None else np.asarray(y)[index]
        try:
            # Not score_samples, which would miss the names of a frame's columns.
            context = self._context(given, len(index))
            densities, _ = self._log_densities(X[index], context)
        except SolverError as error:
            # The fit is not lost for want of a threshold.
            self.offset_ = np.nan
            warnings.warn(
                f"offset_ is unknown, and predict calls no row an outlier: {error}",
                SolverWarning,
                stacklevel=4,
            )
            return
        offset = np.quantile(
            densities, self.contamination, weights=weight[index], method="inverted_cdf"
        )
        below = densities[densities < offset]
        # Halfway down to the next row: on a row itself, rounding would decide.
        self.offset_ = float(0.5 * (offset + below.max()) if len(below) else offset)


_STAGES = {
    "likelihood": ("likelihood",),
    "flow_matching": ("flow_matching",),
    "two_stage": ("flow_matching", "likelihood"),
}


def _likelihood(est, generator, fresh):
    """Return the objective of the present parameters, on a grid to begin with."""
    probes = 0 if est.module_.exact(est.trace) else est.n_probes
    penalties = Penalties(
        kinetic=est.kinetic_penalty,
        jacobian=est.jacobian_penalty,
        error=est.error_penalty,
    )
    likelihood = Likelihood(
        est.module_, penalties, probes, _GRID_TOLERANCE, generator, bool(est.compile)
    )
    if not fresh:  # the field that is there was trained on more steps, perhaps
        likelihood.steps = max(likelihood.steps, getattr(est, "n_steps_", 0))
    return likelihood


def _objective(est, name, likelihood, table):
    """Return the loss of some rows as a function of their indices."""
    loss = likelihood
    if name == "flow_matching":
        loss = FlowMatching(est.module_, table.generator)
    return lambda rows: loss(table.batch(rows))


def _validation(objective, likelihood, held):
    """Return a function that scores the held-out rows on the grid, or None."""
    if held is None:
        return None

    def validate():
        if objective == "flow_matching":  # which solves nothing else on the grid
            likelihood.watch(held)
        score = float(held.mean(likelihood.log_densities(held.x, held.context)))
        if not np.isfinite(score):
            raise FloatingPointError("The held-out likelihood is not finite.")
        return score

    return validate


def _training(est, n_rows, weight):
    """Return how to train on a table of so many rows."""
    alpha = est.alpha
    if alpha == "auto":
        alpha = _LEAST_ALPHA + 2 * smoothing(est, weight)
    return training(est, n_rows, _SMALLEST_BATCH, alpha, est.averaging)


def _probes(est, x):
    """Return the tangents of a solve, always the same, or None for an exact trace."""
    if est.module_.exact(est.trace):
        return None
    return probes_of(est.n_probes, est.n_features_in_, est._probe_seed, x)


def _shape(est):
    """Return the parameters that shape a net, each in one way of writing it."""
    return {
        "hidden_layer_sizes": widths_of(est.hidden_layer_sizes),
        "activation": est.activation,
        "conditional": bool(est.conditional),
        "marginals": est.marginals,
        "standardize": bool(est.standardize),
        "dequantize": bool(est.dequantize),
    }
