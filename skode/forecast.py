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
from skode._nn.latent_training import BOUNDS, LatentObjective, Plan, evaluate
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
from skode._series.history import History
from skode._series.layout import learn
from skode._training import History as Course
from skode._training import train
from skode._training_series import learns_a_path, pieces_of, windows_of
from skode._units import measure
from skode.exceptions import SolverWarning

__all__ = ["LatentODEForecaster"]

_PIECES = (256, 1024)
"""Training pieces of an epoch: at least, and at most."""
_BATCH = 32
_GROWN = 0.5
"""Share of a fit before which no plateau is looked for: until then, pieces grow."""
_VALIDATION_PATHS = 16
_SCORED_PATHS = 64
_DAY = 86400.0
_AT_ONCE = 400_000
"""Rows times paths that are in memory together."""


class LatentODEForecaster(RegressorMixin, PortableEstimator):
    """TODO"""

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
        n_paths=128,
        bound="predictive",
        n_training_paths=2,
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
        """Fit the model."""
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
            self.has_path_ = learns_a_path(self, histories, self.windows_)
            if not self.has_path_:
                return self._without_path()
            panel = pieces_of(
                self, histories, self.units_, self.windows_, device, dtype, generator
            )
            n_pieces = int(np.clip(len(panel.training.times), *_PIECES))
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
        warn_unfinished(self, course, bool(panel.watched))
        return self

    def predict(self, X, *, return_std=False, history=None):
        """Forecast the mean."""
        self._ready()
        mean, std = self._forecast(
            *self._questions(X, history), lambda found: (found.mean(), found.std())
        )
        mean = self.layout_.give(X, self.units_.values(mean))
        if not return_std:
            return mean
        return mean, self.layout_.give(X, std * self.units_.std)

    def predict_quantiles(self, X, quantiles=(0.05, 0.5, 0.95), *, history=None):
        """Forecast quantiles."""
        self._ready()
        levels = _levels(quantiles)
        return self._quantiles(X, *self._questions(X, history), levels)

    def predict_interval(self, X, coverage=0.9, *, history=None):
        """Forecast central intervals."""
        self._ready()
        if not 0 < coverage < 1:
            raise ValueError(f"coverage must lie between 0 and 1, got {coverage}.")
        tail = (1 - coverage) / 2
        levels = [tail, 1 - tail]
        return self._quantiles(X, *self._questions(X, history), levels)

    def sample_paths(self, X, n_paths=100, *, history=None, random_state=None):
        """Draw possible observations, jointly over the rows of each series."""
        self._ready()
        check_scalar(n_paths, "n_paths", Integral, min_val=1)
        how = integration(self)
        seed = check_random_state(random_state).randint(2**31 - 1)
        generator = torch.Generator().manual_seed(int(seed))
        table, questions = self._questions(X, history)

        def answer(context, asked):
            paths = self.module_.paths(context, asked, n_paths, generator, how)
            return paths.transpose(1, 2)

        found = self._answers(table.queries(), questions, answer, n_paths)
        paths = self._in_rows(table, found)
        return self.layout_.give_paths(X, self.units_.values(np.moveaxis(paths, 1, 0)))

    def intensity(self, X, *, history=None):
        """Return how many observations are expected per day, or unit of numeric times."""
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
        """Return the log-density of each row's observation given what came before."""
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
        """Return the mean predictive log-density of an observed value."""
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
        """Take note of more observations, without refitting."""
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
        """Set the units, the windows and an untrained net, or keep those there are."""
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
            self.module_.to(device, dtype)
            return
        windows = windows_of(self, histories, layout.seconds)
        unit = _DAY if layout.seconds else 1.0
        units = measure(histories, self.standardize, windows.context, unit)
        self._shape, self.windows_, self.units_ = shape, windows, units
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
            return sum(total for total, _ in found) / max(1, sum(n for _, n in found))

        return score

    def _noise(self, n_paths):
        """Return standard normal draws (n_paths, N), evenly spread; of all series."""
        like = next(self.module_.parameters())
        width = self.module_.noise_width
        sobol = SobolEngine(width, scramble=True, seed=self._seed)
        uniform = sobol.draw(n_paths, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
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

    def _check_unseen(self, unseen):
        if not unseen:
            return
        what = (
            f"{len(unseen)} series were not seen in fit and have no history, "
            f"{unseen[0]!r} among them: pass history=, their first observations"
        )
        if self.unseen == "raise":
            raise ValueError(f"{what}, or set unseen='prior'.")
        warnings.warn(
            f"{what}. They are forecast from the prior, as any series might be.",
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
        values = {key: asked.values for key, asked in rows.items()}

        def answer(context, asked):
            found = self.module_.forecast(context, asked, noise, how)
            return density(found, asked.values, asked.mask)

        return self._answers(values, questions, answer, n_paths, values)

    def _log_units(self, rows):
        """Return what values cost in the user's units beyond standard ones, (n,)."""
        return (~np.isnan(rows.values) * np.log(self.units_.std)).sum(axis=1)

    def _answers(self, queries, questions, answer, n_paths, values=None):
        """Return the answers to questions, put together by series: (n, ...)."""
        like = next(self.module_.parameters())
        found = {}
        for part in _chunks(questions, n_paths):
            asked = [question.queries for question in part]
            if values is not None:
                asked = [
                    History(
                        question.queries.origin,
                        question.queries.exact,
                        values[question.key][question.positions],
                        question.queries.covariates,
                    )
                    for question in part
                ]
            contexts = [question.context for question in part]
            with torch.no_grad():
                result = answer(
                    self.units_.batch(contexts, like.device, like.dtype),
                    self.units_.batch(asked, like.device, like.dtype),
                )
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
