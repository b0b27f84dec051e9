"""Latent ODEs for irregular series: `LatentODEForecaster`."""

import warnings
from dataclasses import replace
from numbers import Integral

import numpy as np
import torch
from sklearn.base import RegressorMixin
from sklearn.utils import check_random_state, check_scalar
from sklearn.utils.validation import check_is_fitted
from torch.quasirandom import SobolEngine

from skode._border import (
    PortableEstimator,
    at_least,
    choice,
    fit_context,
    inside,
    positive,
    resolve_device,
    seeded,
    to_array,
    undisturbed,
)
from skode._conditioning import questions_of
from skode._nn.fields import ACTIVATIONS
from skode._nn.latent import READERS, LatentODE, Shape
from skode._nn.latent_training import (
    BOUNDS,
    LatentObjective,
    Plan,
    calibrate,
    evaluate,
)
from skode._nn.predictive import Mixture
from skode._parameters import (
    SHARED,
    check_same_shape,
    integration,
    record,
    training,
    warn_unfinished,
    widths_of,
)
from skode._series.layout import learn
from skode._training import History as Course
from skode._training import train
from skode._training_series import learns_a_path, pieces_of, windows_of
from skode._units import measure
from skode.exceptions import SolverError, SolverWarning

__all__ = ["LatentODEForecaster"]

_PIECES = (256, 1024)
"""Training pieces of an epoch: at least, and at most."""
_BATCH = 32
_GROWN = 0.5
"""Share of a fit before which no plateau is looked for: until then, pieces grow."""
_VALIDATION_PATHS = 16
_SCORED_PATHS = 64
_NAMED = 5
"""Series that a message names."""
_CALIBRATED = 5
"""Held-out series by which forecasts may be narrowed."""
_DAY = 86400.0
_AT_ONCE = 400_000
"""Rows times paths that are in memory together."""


class LatentODEForecaster(RegressorMixin, PortableEstimator):
    r"""Forecaster of irregular series: a latent ODE with intervals.

    A row of X says when, and of which series; a row of y what was observed there, NaN
    where it was not. A recognition network reads the observations of a series backwards
    in time, and says what its latent state was at the first of them; the state follows
    a learned ODE, at the series' own times; a decoder says what is observed there, with
    which noise [1]_ [2]_. A forecast is a mixture over many such paths.

    Parameters
    ----------
    hidden_layer_sizes : int or array-like of int, default=(64, 64)
        Widths of the hidden layers of the vector field; empty for a linear field.
    activation : {"tanh", "softplus", "silu", "relu"}, default="tanh"
        Of the vector field. Smooth ones let the solver take long steps.
    time : hashable, default=None
        Name of the column or index level of X that holds times; of an array, the
        position of the column. None: the index, or the level of it that looks like
        times; of an array, the first column.
    series : hashable, default=None
        Name of the column or index level of X that says which series a row is of; of an
        array, the position. None: the other level of the index, if there is one, or
        else all rows are of one series.
    context : timedelta, str, float or None, default=None
        How far back a forecast looks: a span as pandas reads it, such as ``"30D"``,
        where X has stamps or time differences, a number in the units of X's times where
        it has numbers. None: all that is known, of 20 series or more; of fewer, half, a
        quarter or an eighth of the median record, whichever forecasts best within the
        training series.
    horizon : timedelta, str, float or None, default=None
        How far ahead the forecasts reach that the model is trained for, in the units of
        `context`. None: to the end of the series, of 20 series or more; of fewer, a
        quarter of the median record, but no further than the longest context that may
        be chosen. Forecasts may reach further; what they say there was not trained.
    trend : {"auto", "level", "linear"} or None, default="auto"
        What is fitted to each context by regression, and taken away before the model
        reads it. "auto": chosen as `context` is, of fewer than 20 series; None of more.
    seasonality : "auto", array-like of timedelta, str or float, or None, default="auto"
        Periods of seasons that are fitted and taken away with the trend, in the units
        of `context`. "auto": those of the day, the week and the year that help, of
        fewer than 20 series with stamps or time differences; none otherwise.
    path : bool or "auto", default="auto"
        Whether there is a latent path beside trend and seasons. Without, forecasts are
        those of the regression that each context does, with its uncertainty; nothing is
        trained, and covariates are not read. "auto": there is one, unless a line or
        seasons are fitted, without covariates and `event_times`, and the records fall
        into fewer than eight stretches of `context` and `horizon`.
    latent_dim : int, default=10
        Width of the latent state.
    encoder : {"gru", "ode_rnn"}, default="gru"
        The recognition network. "gru": a gated recurrent unit that is told the gaps.
        "ode_rnn": its state follows an ODE between observations [2]_; slower by the
        length of the context.
    encoder_size : int, default=64
        Width of the recognition network.
    decoder_layer_sizes : int or array-like of int, default=(32,)
        Widths of the hidden layers of the decoder; empty for a linear one.
    noise : {"varying", "constant"}, default="varying"
        Whether the scale of the noise follows the latent state, or is one number for
        each channel.
    persistence : bool, default=True
        Whether a part of what the latent path leaves unexplained persists for a time
        that is learned, so that a forecast begins near the last observation.
    event_times : "poisson" or None, default=None
        Whether to model when rows happen, as a Poisson process whose intensity follows
        the latent state [1]_; see `intensity`.
    unseen : {"prior", "raise"}, default="prior"
        What to do with a series that neither fit nor `history` knows: forecast it from
        the prior, as if it began at the first row that is asked of it, with a warning,
        or raise.
    score_context : float, default=0.5
        Share of the first rows of a series that `score` conditions on, where nothing
        else is known of it.
    n_paths : int, default=64
        Latent paths in the mixture of a forecast. May be changed after `fit`.
    bound : {"predictive", "elbo", "iwae"}, default="predictive"
        What `fit` maximises; see Notes.
    n_training_paths : int, default=4
        Latent paths of each training piece.
    consistency : float, default=0.3
        Weight of how far a path is from what its later observations alone say of it;
        see Notes.
    standardize : bool, default=True
        Whether channels and covariates get mean 0 and standard deviation 1 inside the
        model. Without, they should be near that by themselves. Times always have a unit
        of their own: the context's span.
    solver : str, default="dopri5"
        The ODE solver; the optimiser is `optimizer`. Adaptive: "dopri5", "tsit5",
        "bosh3", "adaptive_heun", "dopri8". Fixed step: "euler", "midpoint", "heun2",
        "rk4". All others of torchdiffeq and SciPy by their names, row by row and
        therefore slowly. May be changed after `fit`.
    rtol : float, default=1e-3
        Relative tolerance of the local error of each step, which each path meets with
        steps of its own. May be changed after `fit`.
    atol : float or None, default=None
        Absolute tolerance; None: the same number as `rtol`. May be changed after
        `fit`.
    step_size : float or None, default=None
        Longest step of a fixed-step solver, in spans of the context. Adaptive solvers
        ignore it. May be changed after `fit`.
    max_steps : int, default=1000
        Steps that a path may attempt. May be changed after `fit`.
    gradient : str, default="auto"
        How gradients pass a solve in `fit`: "auto", "checkpoint", "adjoint",
        "reversible" or "backprop"; see `ODEClassifier`.
    compile : bool or "auto", default="auto"
        Whether to solve in compiled code, several times faster: see `ODEClassifier`.
        May be changed after `fit`.
    averaging : float, default=0.995
        Share that the running average of the weights keeps of itself at each step of
        the optimiser. The average is what is watched and kept. 0: the weights
        themselves.
    optimizer : {"adam", "sgd"}, default="adam"
        Adam with decoupled weight decay, or gradient descent with Nesterov's momentum.
    alpha : float, default=1e-4
        Weight decay of matrices; biases are left alone.
    batch_size : int or "auto", default="auto"
        Pieces of series per step; "auto" is 32.
    learning_rate_init : float, default=1e-2
        Learning rate at the plateau of its schedule: it rises over five epochs and
        falls to zero over the last third of `max_iter`, or once the score has stopped
        improving.
    max_iter : int, default=200
        Epochs, of about one piece of each series; of few series, of some hundred
        pieces; of very many, of a thousand at random.
    tol : float, default=1e-3
        The fit has stopped improving when its best loss, or validation score, in nats
        per value has improved by less than `tol` in `n_iter_no_change` epochs of the
        second half. 0 asks for `max_iter` epochs, and for no `ConvergenceWarning`.
    n_iter_no_change : int, default=30
        Epochs over which `tol` is judged.
    early_stopping : bool or "auto", default="auto"
        Whether to hold out `validation_fraction` of the series, or the ends of fewer
        than 20 long ones, to watch how well these are forecast instead of the loss, and
        to keep the weights of the best epoch. "auto" does so from 50 series on, or
        where the longest of few has 60 rows.
    validation_fraction : float, default=0.1
        See `early_stopping`.
    warm_start : bool, default=False
        Whether `fit` goes on from the weights it finds, in their units. What shapes the
        model cannot change then: widths, channels and covariates, how contexts are cut,
        trend and seasons, whether there is a path, `standardize`.
    random_state : int, RandomState instance or None, default=None
        Of the initial weights, the pieces, the paths and the held-out series.
    device : str, default="auto"
        A torch device; "auto" is a GPU where there is one.
    dtype : {"float32", "float64"}, default="float32"
        To compute in. Times are read without rounding either way.
    verbose : bool or int, default=False
        Whether to show a progress bar.

    Attributes
    ----------
    module_ : torch.nn.Module
        The fitted model, of standardised values.
    histories_ : dict
        What is known of each series, by its id; None is the id of the only one.
        `observe` adds to it.
    layout_ : object
        How X and y say when, of which series and what.
    units_ : object
        Means and standard deviations of channels and covariates, and the unit of time.
    windows_ : object
        The context and horizon, in seconds or in the units of numeric times, the trend
        and the periods that were given or chosen; None: no limit.
    has_path_ : bool
        Whether there is a latent path; see `path`.
    loss_curve_ : list of float
        Mean training loss of each epoch, in nats per value. Pieces get longer over the
        first half, so it may rise there. Empty without a latent path.
    loss_ : float or None
        The last of them.
    best_loss_ : float or None
        The least of them.
    n_iter_ : int
        Number of epochs; 1 without a latent path.
    validation_scores_ : list of float or None
        Mean log-density per value of what was held out, given what came before, at each
        epoch with `early_stopping`; in standardised units.
    best_validation_score_ : float or None
        The largest of them.
    n_features_in_ : int
        Number of columns of X seen in `fit`.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Their names, if X had any.

    See Also
    --------
    CNFDensityEstimator : How rows are distributed that have no times.
    ForecastDisplay : Forecasts as pictures.

    Notes
    -----
    Of a series with observations :math:`x_1, \dots, x_n` at times
    :math:`t_1 < \dots < t_n`, in units of the context's span, the model says

    .. math::

        z(t_1) \sim N(0, I), \quad \frac{dz}{dt} = f(z), \quad
        x_i = b(t_i) + \mu(z(t_i)) + \sigma(z(t_i)) \, (u(t_i) + e_i),

    with networks :math:`f`, :math:`\mu` and :math:`\sigma`; covariates enter
    :math:`\mu` and :math:`\sigma`, but not :math:`f`. The *residual* of each channel
    has a part :math:`u` that persists, an Ornstein-Uhlenbeck process of variance
    :math:`a` and correlation time :math:`\tau`, and white noise :math:`e` of variance
    :math:`1 - a`; :math:`a` and :math:`\tau` are learned. Given a path, it is a
    Gaussian process, so that what the observations say of it is computed exactly, by
    Kalman's filter and a smoother [5]_. The *baseline* :math:`b`, if there is one, is a
    level or a line, and four harmonics of each period. Each context fits it for itself,
    by generalised least squares with errors that persist for a part of the context, so
    that it is known how uncertain its coefficients are, and they are drawn with the
    path. The recognition network reads what is left.

    *Recognition.* A recurrent network reads values, what was observed, times, gaps and
    covariates, the last row first, and gives the mean and the standard deviations of
    :math:`q(z(t_1) \mid x_1, \dots, x_m)`, independent normals. Of a long context it
    reads the first row, the last ones, and rows evenly between; the residual process
    sees all.

    *Training.* A random piece of a series is split at random into a context of m rows
    and what follows. With K paths :math:`z_k` drawn from :math:`q`,
    ``bound="predictive"`` maximises

    .. math::

        \frac1K \sum_k \sum_{i \le m} \log p(x_i \mid z_k, x_{<i})
        + \sum_{i > m} \log \frac1K \sum_k p(x_i \mid z_k, x_{<i})
        - KL(q \,\|\, N(0, I)) :

    the evidence lower bound (ELBO) [3]_ of the context, and the log-density of the
    mixture that a forecast is. "elbo" is the evidence lower bound of all rows, and
    "iwae" the importance-weighted bound [4]_. The divergence counts more and more over
    the first epochs, and pieces grow over the first half of a fit, since over many
    turns of a solution gradients say little until the first turn is right.

    *Consistency.* The loss adds `consistency` times
    :math:`-\log q(z_k(t_j) \mid x_j, \dots, x_n)` at a random row j: a path should
    pass where its later observations, read alone, place it. A path that leaves the
    states that observations speak of has no future that could be learned from others.

    *Forecasts.* The mean, standard deviation and quantiles are those of the mixture of
    `n_paths` normals at each time, one for each path, given what is known of the
    series. Paths are drawn with the same quasi-random numbers for all series and calls,
    so that the forecast of a series depends on no other and is the same each time.
    Intervals count the noise of an observation and what is not known of the state, but
    not what is not known of the weights: far beyond what training has seen they may be
    too narrow. Each is about one value at one time; `sample_paths` draws all rows of a
    series jointly, for questions about several at once.

    References
    ----------
    .. [1] Chen, Rubanova, Bettencourt & Duvenaud (2018). Neural ordinary differential
       equations. arXiv:1806.07366.
    .. [2] Rubanova, Chen & Duvenaud (2019). Latent ODEs for irregularly-sampled time
       series. arXiv:1907.03907.
    .. [3] Kingma & Welling (2014). Auto-encoding variational Bayes. arXiv:1312.6114.
    .. [4] Burda, Grosse & Salakhutdinov (2016). Importance weighted autoencoders.
       arXiv:1509.00519.
    .. [5] Sarkka & Garcia-Fernandez (2021). Temporal parallelization of Bayesian
       smoothers. arXiv:1905.13002.

    Examples
    --------
    One series, at times as they came:

    >>> import numpy as np
    >>> import pandas as pd
    >>> from skode import LatentODEForecaster
    >>> hours = np.sort(np.random.default_rng(0).uniform(0, 48, size=50))
    >>> stamps = pd.Timestamp("2024-05-01") + pd.to_timedelta(hours, unit="h")
    >>> level = pd.Series(np.sin(hours / 4), index=stamps, name="level").to_frame()
    >>> quick = {"hidden_layer_sizes": (8,), "encoder_size": 8, "tol": 0}
    >>> est = LatentODEForecaster(max_iter=2, random_state=0, **quick).fit(level)
    >>> later = stamps[-1] + pd.to_timedelta(["7min", "3h"])
    >>> est.predict(later).shape
    (2, 1)
    >>> est.predict_interval(later, coverage=0.9).columns.nlevels
    2

    Many series, and a new one given its first values:

    >>> X = pd.DataFrame({"id": np.repeat(["a", "b"], 25), "hour": hours})
    >>> y = pd.Series(np.sin(hours / 4), name="level")
    >>> est = LatentODEForecaster(
    ...     time="hour", series="id", max_iter=2, random_state=0, **quick
    ... ).fit(X, y)
    >>> new = pd.DataFrame({"id": ["c", "c"], "hour": [0.0, 2.0]})
    >>> known = new.assign(level=[0.1, 0.5])
    >>> len(est.predict(new.assign(hour=[5.0, 6.0]), history=known))
    2
    """

    _parameter_constraints = {
        **SHARED,
        "activation": [choice(ACTIVATIONS)],
        "time": "no_validation",
        "series": "no_validation",
        "context": "no_validation",
        "horizon": "no_validation",
        "trend": [choice(("auto", "level", "linear")), None],
        "seasonality": ["array-like", choice(("auto",)), None],
        "path": ["boolean", choice(("auto",))],
        "latent_dim": [at_least(1)],
        "encoder": [choice(READERS)],
        "encoder_size": [at_least(1)],
        "decoder_layer_sizes": ["array-like", at_least(1)],
        "noise": [choice(("varying", "constant"))],
        "persistence": ["boolean"],
        "event_times": [choice(("poisson",)), None],
        "unseen": [choice(("prior", "raise"))],
        "score_context": [inside(0, 1)],
        "n_paths": [at_least(1)],
        "bound": [choice(BOUNDS)],
        "n_training_paths": [at_least(1)],
        "consistency": [positive(closed="left")],
        "averaging": [inside(0, 1, closed="left")],
        "dtype": [choice(("float32", "float64"))],
    }

    def __init__(
        self,
        hidden_layer_sizes=(64, 64),
        *,
        activation="tanh",
        time=None,
        series=None,
        context=None,
        horizon=None,
        trend="auto",
        seasonality="auto",
        path="auto",
        latent_dim=10,
        encoder="gru",
        encoder_size=64,
        decoder_layer_sizes=(32,),
        noise="varying",
        persistence=True,
        event_times=None,
        unseen="prior",
        score_context=0.5,
        n_paths=64,
        bound="predictive",
        n_training_paths=4,
        consistency=0.3,
        standardize=True,
        solver="dopri5",
        rtol=1e-3,
        atol=None,
        step_size=None,
        max_steps=1000,
        gradient="auto",
        compile="auto",
        averaging=0.995,
        optimizer="adam",
        alpha=1e-4,
        batch_size="auto",
        learning_rate_init=1e-2,
        max_iter=200,
        tol=1e-3,
        n_iter_no_change=30,
        early_stopping="auto",
        validation_fraction=0.1,
        warm_start=False,
        random_state=None,
        device="auto",
        dtype="float32",
        verbose=False,
    ):
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.time = time
        self.series = series
        self.context = context
        self.horizon = horizon
        self.trend = trend
        self.seasonality = seasonality
        self.path = path
        self.latent_dim = latent_dim
        self.encoder = encoder
        self.encoder_size = encoder_size
        self.decoder_layer_sizes = decoder_layer_sizes
        self.noise = noise
        self.persistence = persistence
        self.event_times = event_times
        self.unseen = unseen
        self.score_context = score_context
        self.n_paths = n_paths
        self.bound = bound
        self.n_training_paths = n_training_paths
        self.consistency = consistency
        self.standardize = standardize
        self.solver = solver
        self.rtol = rtol
        self.atol = atol
        self.step_size = step_size
        self.max_steps = max_steps
        self.gradient = gradient
        self.compile = compile
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
        tags.target_tags.required = False
        tags.target_tags.multi_output = True
        tags.input_tags.allow_nan = False
        # `score` is a log-density, not the R2 that scikit-learn has a threshold for.
        tags.regressor_tags.poor_score = True
        return tags

    @fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y=None):
        """Fit the model.

        Parameters
        ----------
        X : DataFrame, Series, Index or array-like of shape (n_rows, n_columns)
            When, and of which series. Times are stamps, time differences or numbers, in
            the index or in the column `time`; series are told by the outer level of the
            index or the column `series`. All other columns are covariates, known at
            every time; without `y`, they are the channels. Of an array, the first
            column is time. Rows may come in any order; rows of a series at one time are
            one, with the means of their values.
        y : Series, DataFrame or array-like of shape (n_rows,) or \
                (n_rows, n_channels), default=None
            What was observed; NaN: not observed. None: the columns of X, beside times
            and series.

        Returns
        -------
        self : LatentODEForecaster
            The fitted estimator.

        Raises
        ------
        TypeError, ValueError
            If X or y does not say what it must: no times, as of a frame whose index
            only counts rows, missing ones, covariates with gaps, nothing observed; if
            parameters do not fit it, or each other. The message says what would.
        DivergenceError
            If the loss stopped being finite and lower learning rates did not help, or
            if no epoch succeeded; the best weights are kept.
        """
        integration(self)  # what cannot be solved is refused before anything is read
        fresh = not (self.warm_start and hasattr(self, "module_"))
        device = resolve_device(self.device)
        dtype = getattr(torch, self.dtype)
        layout, table = learn(X, y, self.time, self.series, owner=type(self).__name__)
        known = table.histories()
        histories = _in_order(known)
        with seeded(self.random_state, device) as generator:
            self._begin(layout, histories, device, dtype, generator, fresh)
            self._set_layout(layout)
            self.histories_ = known
            if not self.has_path_:
                return self._without_path()
            panel = pieces_of(
                self, histories, self.units_, self.windows_, device, dtype, generator
            )
            n_pieces = int(np.clip(len(panel.cutter.series.times), *_PIECES))
            how = self._training(n_pieces)
            course = Course()
            try:
                train(
                    self.module_,
                    self._objective(panel, n_pieces, how),
                    n_pieces,
                    how,
                    generator,
                    self._validation(panel),
                    course,
                )
            finally:
                self.module_.eval()
                record(self, course)
            self._calibrate(panel)
        warn_unfinished(self, course, bool(panel.watched))
        return self

    def predict(self, X, *, return_std=False, history=None):
        """Forecast the mean of each row.

        Parameters
        ----------
        X : DataFrame, Index or array-like of shape (n_rows, n_columns)
            Times, series and covariates as in `fit`: future times, past ones, and times
            between observations. An index of times will do where X has nothing else.
        return_std : bool, default=False
            Whether to return the standard deviation, too.
        history : DataFrame, array-like or tuple (X, y), default=None
            Observations of series that were not seen in `fit`, or other ones of those
            that were: they stand in place of what `fit` and `observe` saw of these
            series. A frame has the channels beside the columns of X, an array last.

        Returns
        -------
        mean : Series, DataFrame or ndarray, of shape (n_rows,) or (n_rows, n_channels)
            In y's kind and units, with X's index and y's columns.
        std : Series, DataFrame or ndarray, of the same shape
            Of an observation, noise included. With `return_std`.

        Raises
        ------
        TypeError, ValueError
            If X or `history` is not laid out as in `fit`, or a series is unknown and
            ``unseen="raise"``.
        SolverError
            If a path needs more than `max_steps` steps.

        Warns
        -----
        SolverWarning
            If a series is unknown, and forecast from the prior.
        """
        self._ready()
        mean, std = self._forecast(
            *self._questions(X, history), lambda found: (found.mean(), found.std())
        )
        mean = self.layout_.give(X, self.units_.values(mean))
        if not return_std:
            return mean
        return mean, self.layout_.give(X, std * self.units_.std)

    def predict_quantiles(self, X, quantiles=(0.05, 0.5, 0.95), *, history=None):
        """Forecast quantiles of each row.

        Parameters
        ----------
        X : DataFrame, Index or array-like of shape (n_rows, n_columns)
            See `predict`.
        quantiles : float or array-like of shape (n_quantiles,), \
                default=(0.05, 0.5, 0.95)
            Levels between 0 and 1.
        history : DataFrame, array-like or tuple (X, y), default=None
            See `predict`.

        Returns
        -------
        values : DataFrame, or ndarray of shape (n_rows, n_quantiles) or \
                (n_rows, n_channels, n_quantiles)
            Of a Series y, a frame with a column for each level; of a frame, one with
            the level "quantile" below y's columns; of an array, an axis at its end.

        Raises
        ------
        TypeError, ValueError, SolverError
            As `predict`, and if a level does not lie between 0 and 1.
        """
        self._ready()
        levels = _levels(quantiles)
        return self._quantiles(X, *self._questions(X, history), levels)

    def predict_interval(self, X, coverage=0.9, *, history=None):
        """Forecast an interval for each row.

        It leaves out (1 - coverage) / 2 of the probability on either side, of each
        channel and time by itself.

        Parameters
        ----------
        X : DataFrame, Index or array-like of shape (n_rows, n_columns)
            See `predict`.
        coverage : float, default=0.9
            Probability of an observation to lie in its interval, between 0 and 1.
        history : DataFrame, array-like or tuple (X, y), default=None
            See `predict`.

        Returns
        -------
        bounds : DataFrame, or ndarray of shape (n_rows, 2) or (n_rows, n_channels, 2)
            Two quantiles, as `predict_quantiles` returns them.

        Raises
        ------
        TypeError, ValueError, SolverError
            As `predict`, and if `coverage` does not lie between 0 and 1.
        """
        self._ready()
        if not 0 < coverage < 1:
            raise ValueError(f"coverage must lie between 0 and 1, got {coverage}.")
        tail = round((1 - coverage) / 2, 12)  # 0.05, not 0.04999999999999999
        levels = [tail, round(1 - tail, 12)]
        return self._quantiles(X, *self._questions(X, history), levels)

    def sample_paths(self, X, n_paths=100, *, history=None, random_state=None):
        """Draw possible observations, jointly over the rows of each series.

        For questions about several times or channels at once: the largest value of a
        week, a sum, when a threshold is first crossed. Noise is drawn, too. Series are
        drawn independently of each other, given what is known of them; so are rows that
        a limited `context` answers from different stretches of the past. The draws of a
        series depend on what else is asked in the same call.

        Parameters
        ----------
        X : DataFrame, Index or array-like of shape (n_rows, n_columns)
            See `predict`.
        n_paths : int, default=100
            How many draws.
        history : DataFrame, array-like or tuple (X, y), default=None
            See `predict`.
        random_state : int, RandomState instance or None, default=None
            Of the draws.

        Returns
        -------
        paths : DataFrame, or ndarray of shape (n_paths, n_rows) or \
                (n_paths, n_rows, n_channels)
            Of pandas' kinds of y, a frame with the level "path" of columns, below those
            of a frame.

        Raises
        ------
        TypeError, ValueError, SolverError
            As `predict`.
        """
        self._ready()
        check_scalar(n_paths, "n_paths", Integral, min_val=1)
        noise, how = self._noise(self.n_paths), integration(self)
        seed = check_random_state(random_state).randint(2**31 - 1)
        generator = torch.Generator().manual_seed(int(seed))
        table, questions = self._questions(X, history)

        def answer(context, asked):
            paths = self.module_.paths(context, asked, n_paths, generator, noise, how)
            return paths.transpose(1, 2)

        found = self._answers(table.queries(), questions, answer, n_paths)
        paths = self._in_rows(table, found)
        return self.layout_.give_paths(X, self.units_.values(np.moveaxis(paths, 1, 0)))

    def intensity(self, X, *, history=None):
        """Return how many rows are expected per day, or unit of numeric times.

        Parameters
        ----------
        X : DataFrame, Index or array-like of shape (n_rows, n_columns)
            See `predict`.
        history : DataFrame, array-like or tuple (X, y), default=None
            See `predict`.

        Returns
        -------
        intensity : Series or ndarray of shape (n_rows,)
            The mean over paths, per day where times are stamps or time differences, per
            unit where they are numbers.

        Raises
        ------
        TypeError, ValueError, SolverError
            As `predict`, and if the model was fitted with ``event_times=None``.
        """
        self._ready()
        if self.module_.shape.events is False:
            raise ValueError(
                "There is no intensity: fit with event_times='poisson' to model when "
                "observations happen."
            )
        table, questions = self._questions(X, history)
        noise, how = self._noise(self.n_paths), integration(self)

        def answer(context, asked):
            return self.module_.intensity(context, asked, noise, how)

        found = self._answers(table.queries(), questions, answer, self.n_paths)
        rates = self._in_rows(table, found)
        per = _DAY if self.layout_.seconds else 1.0
        rates = rates * (per / self.units_.time)
        return self.layout_.give_one(X, rates, "intensity")

    def score_samples(self, X, y=None, *, history=None):
        """Compute the log-density of each row's observation given what came before.

        Parameters
        ----------
        X : DataFrame, Index or array-like of shape (n_rows, n_columns)
            See `fit`.
        y : Series, DataFrame or array-like, default=None
            What was observed; None: columns of X, if it was so in `fit`.
        history : DataFrame, array-like or tuple (X, y), default=None
            See `predict`.

        Returns
        -------
        log_density : Series or ndarray of shape (n_rows,)
            In nats, in the units of y: of all channels that were observed, jointly; 0
            where none was. A row is given all rows of its series at earlier times,
            those of X among them.

        Raises
        ------
        TypeError, ValueError, SolverError
            As `predict`, and if there is no y and X does not hold the channels.

        Notes
        -----
        Each row is read with a context of its own, which costs as much as a forecast
        of a series.
        """
        self._ready()
        table = self.layout_.read_observations(X, y)
        known, new = self._known(history), table.histories()
        rows, contexts = {}, {}
        for key, asked in table.queries().items():
            own = known.get(key)
            every = new[key] if own is None else own.join(new[key])
            for row in range(len(asked)):
                rows[key, row] = asked.take(slice(row, row + 1))
                contexts[key, row] = every.before(asked.exact[row].item())
        # Channels are apart given the path alone: a row's density is that of all of it.
        density = self._log_densities(
            rows, contexts, _SCORED_PATHS, Mixture.log_density_of_rows
        )
        order = [
            (table.keys[code], position)
            for code, position in zip(table.codes, table.positions, strict=True)
        ]
        found = [density[at][0, 0] - self._log_units(rows[at])[0] for at in order]
        return self.layout_.give_one(X, np.array(found), "log_density")

    def score(self, X, y=None, *, history=None):
        """Return the mean predictive log-density of an observed value.

        A series of which more is known than the rows of X, by `fit`, `observe` or
        `history`, is conditioned on that; any other on its first `score_context` of
        rows, of which the rest is scored.

        Parameters
        ----------
        X : DataFrame, Index or array-like of shape (n_rows, n_columns)
            See `fit`.
        y : Series, DataFrame or array-like, default=None
            What was observed; None: columns of X, if it was so in `fit`.
        history : DataFrame, array-like or tuple (X, y), default=None
            See `predict`.

        Returns
        -------
        score : float
            In nats, of values in units of the training data's standard deviations, so
            that channels count alike. A standard normal forecast of standard normal
            values has -1.42.

        Raises
        ------
        TypeError, ValueError, SolverError
            As `score_samples`, and if nothing is left to be scored.
        """
        self._ready()
        table = self.layout_.read_observations(X, y)
        known, new = self._known(history), table.histories()
        rows, contexts = {}, {}
        for key, asked in new.items():
            own = known.get(key)
            if own is not None:
                own = own.take(~np.isin(own.exact, asked.exact))
            if own is None or not len(own):
                first = int(np.ceil(self.score_context * len(asked)))
                own, asked = asked.take(slice(first)), asked.take(slice(first, None))
            if len(asked):
                rows[key], contexts[key] = asked, own
        density = self._log_densities(rows, contexts, self.n_paths, _of_values)
        seen = sum(int((~np.isnan(asked.values)).sum()) for asked in rows.values())
        if not seen:
            raise ValueError(
                "There is nothing to score: no value was observed after the first "
                f"score_context={self.score_context} of each series' rows."
            )
        return sum(float(value.sum()) for value in density.values()) / seen

    def observe(self, X, y=None):
        """Take note of more observations, without refitting.

        Parameters
        ----------
        X : DataFrame, Index or array-like of shape (n_rows, n_columns)
            See `fit`. Series may be new.
        y : Series, DataFrame or array-like, default=None
            What was observed; None: columns of X, if it was so in `fit`.

        Returns
        -------
        self : LatentODEForecaster
            The estimator, which forecasts from these observations, too. At a time that
            was known already, the mean of old and new values counts.

        Raises
        ------
        TypeError, ValueError
            If X or y is not laid out as in `fit`.
        """
        self._ready()
        table = self.layout_.read_observations(X, y)
        joined = {}
        for key, history in table.histories().items():
            known = self.histories_.get(key)
            joined[key] = history if known is None else known.join(history)
        self.histories_ = {**self.histories_, **joined}
        return self

    def _ready(self):
        check_is_fitted(self, "module_")

    def _set_layout(self, layout):
        self.layout_ = layout
        self.n_features_in_ = layout.n_features
        if layout.feature_names is not None:
            self.feature_names_in_ = layout.feature_names
        elif hasattr(self, "feature_names_in_"):
            del self.feature_names_in_

    def _begin(self, layout, histories, device, dtype, generator, fresh):
        """Set windows, units, and an untrained net, or keep what there is."""
        shape = {
            "hidden_layer_sizes": widths_of(self.hidden_layer_sizes),
            "activation": self.activation,
            "latent_dim": self.latent_dim,
            "encoder": self.encoder,
            "encoder_size": self.encoder_size,
            "decoder_layer_sizes": widths_of(
                self.decoder_layer_sizes, "decoder_layer_sizes"
            ),
            "noise": self.noise,
            "persistence": self.persistence,
            "event_times": self.event_times,
            "standardize": self.standardize,
            "context": self.context,
            "horizon": self.horizon,
            "trend": self.trend,
            "seasonality": self.seasonality,
            "path": self.path,
            "times": layout.clock.kind,
            "channels": layout.channel_names,
            "covariates": list(layout.covariates),
        }
        if not fresh:
            check_same_shape(self, shape)
            self.module_.to(device, dtype).width.fill_(1.0)
            return
        windows = windows_of(self, histories, layout.seconds)
        unit = _DAY if layout.seconds else 1.0
        units = measure(histories, self.standardize, windows.context, unit)
        self._shape, self.windows_, self.units_ = shape, windows, units
        self.has_path_ = learns_a_path(self, histories, windows)
        parts = Shape(
            layout.n_channels,
            layout.n_covariates,
            self.latent_dim,
            shape["hidden_layer_sizes"],
            self.activation,
            self.encoder,
            self.encoder_size,
            shape["decoder_layer_sizes"],
            self.noise == "varying",
            self.persistence,
            self.event_times == "poisson",
        )
        baseline = self.windows_.baseline(self.units_.time)
        with undisturbed(generator):
            self.module_ = LatentODE(parts, baseline).to(device, dtype)
        self._seed = generator.initial_seed() % (2**31 - 1)

    def _without_path(self):
        """Finish a fit whose forecasts are a regression that each context does."""
        self.module_.eval().mute()
        record(self, Course())
        self.n_iter_ = 1  # the regression's
        return self

    def _training(self, n_pieces):
        how = training(
            self,
            n_pieces,
            _BATCH,
            averaging=self.averaging,
            plateau_from=round(_GROWN * self.max_iter),
        )
        return replace(how, batch_size=_BATCH) if self.batch_size == "auto" else how

    def _objective(self, panel, n_pieces, how):
        batches = max(1, -(-n_pieces // how.batch_size))
        plan = Plan(
            self.bound,
            self.n_training_paths,
            self.consistency,
            batches * how.max_iter,
            n_pieces,
        )
        way = integration(self)
        return LatentObjective(self.module_, panel.cutter, way, plan)

    def _validation(self, panel):
        if not panel.watched:
            return None
        noise, way = self._noise(_VALIDATION_PATHS), integration(self)

        def score():
            with torch.no_grad():
                found = [
                    evaluate(self.module_, piece, noise, way) for piece in panel.watched
                ]
            return sum(total for total, _ in found) / sum(n for _, n in found)

        return score

    def _calibrate(self, panel):
        """Widen forecasts to what was held out; by one record, never narrow them."""
        if not panel.watched:
            return
        least = 0.0 if len(panel.watched[0].rows) >= _CALIBRATED else 1.0
        with torch.no_grad():
            calibrate(
                self.module_,
                panel.watched,
                self._noise(self.n_paths),
                integration(self),
                least,
            )

    def _noise(self, n_paths):
        """Return standard normal draws (n_paths, N), evenly spread; of all series."""
        like = next(self.module_.parameters())
        width = self.module_.noise_width
        even = min(width, SobolEngine.MAXDIM)  # the others, of many channels, are not
        sobol = SobolEngine(even, scramble=True, seed=self._seed)
        uniform = sobol.draw(n_paths, dtype=torch.float64)
        if even < width:
            more = torch.Generator().manual_seed(self._seed)
            more = torch.rand(n_paths, width - even, generator=more).double()
            uniform = torch.cat((uniform, more), dim=1)
        uniform = uniform.clamp(1e-6, 1 - 1e-6)
        return torch.special.ndtri(uniform).to(like.device, like.dtype)

    def _known(self, history):
        """Return what each series is conditioned on: `history`, or what fit saw."""
        if history is None:
            return self.histories_
        return {**self.histories_, **self.layout_.read_history(history).histories()}

    def _questions(self, X, history):
        table = self.layout_.read(X)
        known = self._known(history)
        self._check_unseen([key for key in table.keys if key not in known])
        return table, self._asking(table.queries(), known)

    def _of_series(self, error, part):
        """Return an error that names series, of one that names rows of a solve.

        Those are the series of a part, each as many times as there are paths.
        """
        places = {row * len(part) // error.n_rows for row in error.rows}
        keys = list(dict.fromkeys(part[place].key for place in sorted(places)))
        named = ", ".join(repr(key) for key in keys[:_NAMED])
        after = min(error.t, default=0.0) * self.units_.time
        unit = " seconds" if self.layout_.seconds else ""
        return SolverError(
            f"Paths of series {named} {error.reason}, {after:.6g}{unit} from the first "
            "row of what they are conditioned on.",
            remedy=error.remedy,
            status=error.status,
        )

    def _check_unseen(self, unseen):
        if not unseen:
            return
        few = ", ".join(repr(key) for key in unseen[:_NAMED])
        more = f" and {len(unseen) - _NAMED} more" if len(unseen) > _NAMED else ""
        what = (
            f"Series without history, not seen in fit: {few}{more}. Pass history=, "
            "their first observations"
        )
        if self.unseen == "raise":
            raise ValueError(f"{what}, or set unseen='prior'.")
        warnings.warn(
            f"{what}; without, the forecast is from the prior, as of any series.",
            SolverWarning,
            stacklevel=4,
        )

    def _asking(self, queries, known):
        return questions_of(
            queries, known, self.windows_.context, self.layout_.n_channels
        )

    def _quantiles(self, X, table, questions, levels):
        found = self._forecast(
            table,
            questions,
            lambda found: [found.quantile(level) for level in levels],
        )
        values = np.stack([self.units_.values(level) for level in found], axis=-1)
        return self.layout_.give_quantiles(X, values, levels)

    def _forecast(self, table, questions, summary):
        """Return summaries of each row's predictive distribution, each (n, C)."""
        queries = table.queries()
        noise, how = self._noise(self.n_paths), integration(self)

        def answer(context, asked):
            return torch.stack(
                list(summary(self.module_.forecast(context, asked, noise, how))), dim=2
            )

        found = self._answers(queries, questions, answer, self.n_paths)
        return np.moveaxis(self._in_rows(table, found), 1, 0)

    @staticmethod
    def _in_rows(table, by_series):
        """Return answers (n, ...) in the order of the table's rows."""
        answers = [by_series[key] for key in table.keys]
        starts = np.cumsum([0, *map(len, answers)])[:-1]
        return np.concatenate(answers)[starts[table.codes] + table.positions]

    def _log_densities(self, rows, known, n_paths, density):
        """Return log-densities of standardised values by series, (n, ...).

        `density` takes predictive distributions, values and what of them is observed.
        """
        questions = self._asking(rows, known)
        noise, how = self._noise(n_paths), integration(self)

        def answer(context, asked):
            found = self.module_.forecast(context, asked, noise, how)
            return density(found, asked.values, asked.mask)

        return self._answers(rows, questions, answer, n_paths)

    def _log_units(self, rows):
        """Return what values cost in the user's units beyond standard ones, (n,)."""
        return (~np.isnan(rows.values) * np.log(self.units_.std)).sum(axis=1)

    def _answers(self, queries, questions, answer, n_paths):
        """Return the answers to questions, put together by series: (n, ...)."""
        like = next(self.module_.parameters())
        found = {}
        for part in _chunks(questions, n_paths):
            contexts = [question.context for question in part]
            asked = [question.queries for question in part]
            batches = [
                self.units_.batch(histories, like.device, like.dtype)
                for histories in (contexts, asked)
            ]
            try:
                with torch.no_grad():
                    result = answer(*batches)
            except SolverError as error:
                raise self._of_series(error, part) from error
            for question, rows in zip(part, to_array(result), strict=True):
                if question.key not in found:
                    shape = (len(queries[question.key]), *rows.shape[1:])
                    found[question.key] = np.empty(shape)
                kept = rows[: len(question.positions)]
                found[question.key][question.positions] = kept
        return found


def _in_order(histories):
    """Return series in an order that their rows decide, not their names.

    The bytes of a big-endian float that is not negative sort as the float does.
    """
    return sorted(
        histories.values(),
        key=lambda history: (
            len(history),
            history.times.astype(">f8").tobytes(),
            history.values.tobytes(),
            history.covariates.tobytes(),
        ),
    )


def _of_values(found, values, mask):
    """Return log-densities of each value apart, (B, Q, C); 0 where not observed."""
    return torch.where(mask, found.log_density(values), 0.0)


def _levels(quantiles):
    levels = np.atleast_1d(np.asarray(quantiles, dtype=float))
    if levels.ndim != 1 or not len(levels) or not ((levels > 0) & (levels < 1)).all():
        raise ValueError(f"quantiles must lie between 0 and 1, got {quantiles!r}.")
    return levels.tolist()


def _chunks(questions, n_paths):
    """Yield questions of similar lengths, so many that they fit into memory."""
    lengths = [len(q.context) + len(q.queries) for q in questions]
    part = []
    for index in np.argsort(lengths, kind="stable"):
        # Sorted, the next one is the longest of its part.
        if part and (len(part) + 1) * lengths[index] * n_paths > _AT_ONCE:
            yield part
            part = []
        part.append(questions[index])
    if part:
        yield part
