"""The solver as seen through a fitted estimator: after `fit`, per row, and failing."""

import pickle
import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from skode import DivergenceError, SolverError, SolverWarning, _border
from tests.tables import Spring, Still, blobs, classifier, curve, encoded, regressor

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
BOTH = pytest.mark.parametrize(
    ("make", "table"), [(classifier, blobs), (regressor, curve)]
)


@pytest.fixture(scope="module")
def fitted():
    """A regressor whose field is lively, so that tolerances matter, and its rows."""
    X, y = curve()
    model = regressor(activation="silu", max_iter=10).fit(X, y)
    for weight in model.module_.field.weights:
        weight.data.mul_(3.0)
    return pickle.dumps(model), X


@pytest.fixture
def lively(fitted):
    data, X = fitted
    return pickle.loads(data), X


def solved(model, X, **params):
    return model.set_params(**params).transform(X)


# ------------------------------------------------------- solver after the fit


@BOTH
def test_compiled_code_changes_a_fit_by_rounding_alone(make, table):
    X, y = table()
    tight = {"rtol": 1e-6, "max_iter": 3, "dtype": "float64"}
    fast, twin = (make(compile=c, **tight).fit(X, y) for c in ("auto", False))
    np.testing.assert_allclose(fast.loss_curve_, twin.loss_curve_, rtol=1e-9)
    np.testing.assert_allclose(fast.transform(X), twin.transform(X), rtol=1e-7)


def test_a_field_of_the_user_cannot_be_compiled():
    X, y = curve()
    with pytest.raises(ValueError, match="compile=True is not possible here: the fie"):
        regressor(field=Spring, compile=True).fit(X, y)


def test_tighter_tolerances_come_closer(lively):
    model, X = lively
    answer = solved(model, X, rtol=1e-9, atol=1e-9)
    errors = [
        np.abs(solved(model, X, rtol=tol, atol=tol) - answer).max()
        for tol in (1e-1, 1e-3, 1e-5)
    ]
    assert errors[0] > 10 * errors[1] > 100 * errors[2] > 0
    assert errors[2] < 1e-3


def test_the_absolute_tolerance_follows_the_relative_one(lively):
    model, X = lively
    for rtol in (1e-1, 1e-5):
        followed = solved(model, X, rtol=rtol, atol=None)
        assert np.array_equal(followed, solved(model, X, rtol=rtol, atol=rtol))
    assert not np.array_equal(followed, solved(model, X, atol=1e-2))


@pytest.mark.parametrize(
    ("params", "advice"),
    [
        ({"rtol": "tight"}, "'rtol' parameter"),
        ({"max_steps": 0}, "'max_steps' parameter"),
        ({"solver": 5}, "'solver' parameter"),
        ({"solver": "rk45"}, "There is no solver 'rk45'. Adaptive: .*dopri5"),
    ],
)
def test_parameters_set_after_the_fit_are_checked(lively, params, advice):
    model, X = lively
    with pytest.raises(ValueError, match=advice):
        model.set_params(**params).predict(X)


def test_tighter_tolerances_cost_more(lively):
    model, X = lively
    costs = [
        model.set_params(rtol=tol, atol=tol).evaluations(X)
        for tol in (1e-1, 1e-3, 1e-5, 1e-7)
    ]
    assert all(cost.shape == (len(X),) and cost.dtype == np.int64 for cost in costs)
    means = [cost.mean() for cost in costs]
    assert means == sorted(set(means)) and means[-1] > 3 * means[0]
    # Every row has a price of its own.
    assert len(set(costs[-1])) > 3


def test_fixed_steps_cost_what_was_asked(lively):
    model, X = lively
    model.set_params(solver="rk4", step_size=0.1)
    tenth = model.evaluations(X)
    fifth = model.set_params(step_size=0.2).evaluations(X)
    assert (tenth - fifth == 20).all()


@pytest.mark.parametrize(
    "params",
    [
        {"solver": "tsit5"},
        {"solver": "bosh3"},
        {"solver": "dopri8"},
        {"solver": "LSODA"},
        {"solver": "Radau"},
        {"solver": "rk4", "step_size": 0.004},
        {"solver": "implicit_adams", "step_size": 0.004},
    ],
    ids=lambda params: params["solver"],
)
def test_all_solvers_agree_where_it_is_tight(lively, params):
    model, X = lively
    answer = solved(model, X[:3], rtol=1e-9, atol=1e-9)
    other = solved(model, X[:3], rtol=1e-7, atol=1e-7, **params)
    assert not np.array_equal(other, answer)
    np.testing.assert_allclose(other, answer, rtol=1e-4, atol=1e-4)


@BOTH
@pytest.mark.parametrize(
    "params",
    [
        {"solver": "euler", "step_size": 0.5},
        {"solver": "adaptive_heun"},
        {"solver": "RK45", "rtol": 0.3, "atol": 0.3, "max_iter": 2},
        {"gradient": "adjoint"},
        {"gradient": "reversible"},
        {"gradient": "reversible", "solver": "rk4", "step_size": 0.25},
        {"gradient": "backprop"},
        {"optimizer": "sgd"},
        {"activation": "relu"},
        {"activation": "softplus"},
    ],
    ids=lambda params: "-".join(str(value) for value in params.values()),
)
def test_it_learns_by_other_means(make, table, params):
    X, y = table(n_rows=12 if params.get("solver") == "RK45" else 60)
    model = make(**params).fit(X, y)
    assert model.loss_curve_[-1] < model.loss_curve_[0]
    assert np.isfinite(model.transform(X)).all()


def test_gradients_by_different_means_agree():
    X, y = curve()
    tight = {"rtol": 1e-8, "atol": 1e-8, "max_iter": 3}
    curves = [
        regressor(gradient=gradient, **tight).fit(X, y).loss_curve_
        for gradient in ("checkpoint", "adjoint", "backprop", "reversible")
    ]
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-5)
    np.testing.assert_allclose(curves[2], curves[0], rtol=1e-9)
    np.testing.assert_allclose(curves[3], curves[0], rtol=1e-5)


@BOTH
def test_a_reversible_model_predicts_by_the_steps_it_was_trained_with(make, table):
    X, y = table()
    settings = {"solver": "euler", "step_size": 0.25, "max_iter": 2}
    model = make(gradient="reversible", **settings).fit(X, y)
    reversible = model.transform(X)
    model.set_params(gradient="auto")
    assert np.abs(model.transform(X) - reversible).max() > 1e-6
    model.set_params(gradient="reversible")
    np.testing.assert_array_equal(model.transform(X), reversible)


# ------------------------------------------------------------------ trajectory


def test_the_trajectory_begins_at_the_encoder(lively):
    model, X = lively
    states = model.trajectory(X, [0.0, 0.5, 1.0])
    assert states.shape == (len(X), 3, 4)
    np.testing.assert_allclose(states[:, 0], encoded(model, X), rtol=1e-12, atol=1e-15)
    assert np.array_equal(model.trajectory(X, [0.0])[:, 0], states[:, 0])


def test_the_trajectory_ends_at_the_transform(lively):
    model, X = lively
    assert np.array_equal(model.trajectory(X, [1.0])[:, -1], model.transform(X))
    answer = model.set_params(rtol=1e-8, atol=1e-8).transform(X)
    path = model.trajectory(X, np.linspace(0, 1, 7))
    np.testing.assert_allclose(path[:, -1], answer, rtol=1e-5, atol=1e-6)


def test_times_of_a_trajectory_do_not_depend_on_each_other(lively):
    model, X = lively
    model.set_params(rtol=1e-8, atol=1e-8)
    path = model.trajectory(X, [0.3, 0.3, 0.8, 2.0])
    assert np.array_equal(path[:, 0], path[:, 1])
    for i, t in enumerate([0.3, 0.3, 0.8, 2.0]):
        np.testing.assert_allclose(
            path[:, i], model.trajectory(X, [t])[:, 0], rtol=1e-4, atol=1e-5
        )


def test_a_trajectory_follows_the_field(lively):
    model, X = lively
    model.set_params(rtol=1e-10, atol=1e-10)
    h = 1e-4
    before, at, after = np.moveaxis(model.trajectory(X, [0.5 - h, 0.5, 0.5 + h]), 1, 0)
    with torch.no_grad():
        slope = model.module_.field(
            torch.full((len(X),), 0.5).double(), torch.tensor(at)
        )
    np.testing.assert_allclose((after - before) / (2 * h), slope, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "times", [[], [1.0, 0.5], [-0.1, 1.0], [0.0, np.nan], [np.inf], 5, [[0.0], [1.0]]]
)
def test_times_that_make_no_trajectory(lively, times):
    model, X = lively
    with pytest.raises(ValueError, match="t must be a list of times that increase"):
        model.trajectory(X, times)


# ------------------------------------------------------------------------ rows


def test_rows_do_not_know_their_neighbours(lively):
    model, X = lively
    X = np.concatenate([X, 5 * X[:5]])
    model.set_params(rtol=1e-2, atol=1e-2)
    assert len(set(model.evaluations(X))) > 1
    whole, predicted = model.transform(X), model.predict(X)
    order = np.random.default_rng(0).permutation(len(X))
    close = {"rtol": 1e-9, "atol": 1e-9}
    np.testing.assert_allclose(model.transform(X[order]), whole[order], **close)
    np.testing.assert_allclose(model.transform(X[::7]), whole[::7], **close)
    one_by_one = np.concatenate([model.predict(X[i : i + 1]) for i in range(len(X))])
    np.testing.assert_allclose(one_by_one, predicted, **close)


# ---------------------------------------------------------------- custom field


@BOTH
def test_a_field_of_ones_own(make, table):
    X, y = table()
    model = make(field=Spring, max_iter=30).fit(X, y)
    assert isinstance(model.module_.field, Spring)
    assert model.score(X, y) > 0.8
    with torch.no_grad():
        flow = torch.matrix_exp(model.module_.field.matrix.weight)
    wanted = encoded(model, X) @ flow.T
    exact = model.set_params(rtol=1e-8, atol=1e-8).transform(X)
    np.testing.assert_allclose(exact, wanted, rtol=1e-5, atol=1e-6)


@BOTH
def test_a_field_that_stands_still_leaves_encoder_and_head(make, table):
    X, y = table()
    model = make(field=Still).fit(X, y)
    start = encoded(model, X)
    with torch.no_grad():
        raw = model.module_.head(start).numpy()
    np.testing.assert_allclose(model.transform(X), start, rtol=1e-12, atol=1e-15)
    if make is classifier:
        assert np.array_equal(model.predict(X), raw.argmax(axis=1))
        assert model.score(X, y) > 0.9
    else:
        np.testing.assert_allclose(
            model.predict(X), raw[:, 0] * y.std() + y.mean(), rtol=1e-9, atol=1e-12
        )


class TooNarrow(Spring):
    def forward(self, t, y):
        return super().forward(t, y)[:, :3]


def test_a_field_of_the_wrong_shape_is_told_both_shapes():
    X, y = curve()
    with pytest.raises(ValueError, match=r"y has shape \(60, 4\).* shape \(60, 3\)"):
        regressor(field=TooNarrow).fit(X, y)


@pytest.mark.parametrize("field", [Spring(4), lambda width: lambda t, y: y])
def test_a_field_that_makes_no_module(field):
    X, y = curve()
    with pytest.raises(TypeError, match="field must be a callable that takes the wid"):
        regressor(field=field).fit(X, y)


# -------------------------------------------------------------------- failures


def test_too_many_steps_name_rows_and_remedy(lively):
    model, X = lively
    before = model.predict(X)
    model.set_params(rtol=1e-9, atol=1e-9, max_steps=1)
    advice = r"of 60 rows reached max_steps=1 at t=.* Raise max_steps, loosen rtol"
    for call in (model.predict, model.transform, lambda X: model.trajectory(X, [0.5])):
        with pytest.raises(SolverError, match=advice) as error:
            call(X)
        assert error.value.status == "MAX_STEPS" and error.value.n_rows == 60
        assert 0 < len(error.value.rows) == len(error.value.t)
    model.set_params(rtol=1e-2, atol=1e-2, max_steps=1000)
    assert np.array_equal(model.predict(X), before)


def test_fixed_steps_that_are_too_many_name_the_step(lively):
    model, X = lively
    model.set_params(solver="rk4", step_size=0.01, max_steps=10)
    advice = r"max_steps=10 at .* or take longer steps: step_size is 0\.01\."
    with pytest.raises(SolverError, match=advice):
        model.predict(X)


def test_rows_that_cannot_be_solved_have_no_price(lively):
    model, X = lively
    with pytest.raises(SolverError, match="max_steps=1 at"):
        model.set_params(rtol=1e-9, max_steps=1).evaluations(X)


class Picky(Still):
    """A field that cannot be solved from states far out."""

    def forward(self, t, y):
        far = y.abs().amax(dim=1, keepdim=True) > 50
        return torch.where(far, torch.nan, 0.0 * y)


@pytest.mark.parametrize("early_stopping", [False, True])
def test_rows_that_fail_in_a_fit_are_rows_of_the_table(early_stopping):
    X, y = curve(300)
    weight = np.ones(300)
    X[:20], weight[:20] = 1e9, 0.0  # dropped, and not the rows that fail
    X[123] = 1e6
    model = regressor(
        field=Picky,
        encoder="augment",
        standardize=False,
        early_stopping=early_stopping,
        max_iter=1,
    )
    with pytest.raises(DivergenceError, match=r"1 of \d+ rows .* \(rows 123\)"):
        model.fit(X, y, weight)


def test_rows_that_fail_in_a_prediction_are_rows_of_the_table(monkeypatch):
    X, y = curve()
    model = regressor(field=Picky, encoder="augment", max_iter=1).fit(X, y)
    monkeypatch.setattr(_border, "_ROWS_AT_ONCE", 7)
    X[[23, 26]] = 1e6
    with pytest.raises(SolverError, match=r"\(rows 23, 26\)") as error:
        model.predict(X)
    assert error.value.rows == (23, 26)


class Brittle(nn.Module):
    """dy/dt = W y, but not a number once a weight has moved beyond 5."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, width))

    def forward(self, t, y):
        broken = (self.weight.abs().amax() > 5).to(y.dtype)
        return y @ self.weight + torch.where(broken > 0, torch.nan, 0.0)


@BOTH
def test_a_rate_that_is_too_high_is_lowered(make, table):
    X, y = table()
    model = make(field=Brittle, learning_rate_init=20.0, max_iter=15)
    with pytest.warns(SolverWarning) as caught:
        model.fit(X, y)
    (told,) = [w for w in caught if w.category is SolverWarning]
    assert re.fullmatch(
        r"The fit went back to its best weights (once|\d times), and lowered the "
        r"learning rate to [\d.]+ in the end; set learning_rate_init to that to avoid "
        r"this\. Epoch 2 diverged: 60 of 60 rows met values that are not finite .*\.",
        str(told.message),
    )
    assert np.isfinite(model.predict(X)).all()
    assert np.isfinite(model.loss_curve_).all() and model.n_iter_ > 1


class Tiring(Spring):
    """A field that calls `weary` on being evaluated in training too often."""

    calls, limit = 0, 60

    def forward(self, t, y):
        if self.training and torch.is_grad_enabled():
            self.calls += 1
            if self.calls > self.limit:
                return self.weary(t, y)
        return super().forward(t, y)


class Exploding(Tiring):
    def weary(self, t, y):
        return y * torch.nan


class Interrupted(Tiring):
    def weary(self, t, y):
        raise KeyboardInterrupt


@BOTH
def test_a_fit_that_no_rate_saves_can_still_predict(make, table):
    X, y = table()
    model = make(field=Exploding)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the error tells it
        with pytest.raises(DivergenceError, match="diverged in epoch") as error:
            model.fit(X, y)
    assert model.n_iter_ == len(model.loss_curve_) > 2
    assert error.value.epoch == model.n_iter_ + 6
    assert not model.module_.training
    assert np.isfinite(model.predict(X)).all()
    # The weights kept are those of the best loss that was seen.
    assert _loss(model, X, y) == pytest.approx(model.best_loss_, rel=1e-6)


class Hopeless(Spring):
    """A field that is never a number in training."""

    def forward(self, t, y):
        return y * torch.nan if torch.is_grad_enabled() else super().forward(t, y)


@pytest.mark.parametrize("max_iter", [1, 3, 20])
@BOTH
def test_a_fit_none_of_whose_epochs_succeeded_says_so(make, table, max_iter):
    X, y = table()
    model = make(field=Hopeless, max_iter=max_iter)
    tried = min(max_iter, 6)
    advice = f"diverged in epoch {tried} .* those it began with .* not finite"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DivergenceError, match=advice):
            model.fit(X, y)
    assert model.n_iter_ == 0 and model.loss_ is None


@BOTH
def test_an_interrupted_fit_is_fitted(make, table):
    X, y = table()
    model = make(field=Interrupted)
    with pytest.warns(SolverWarning, match=r"Interrupted after \d+ epochs"):
        assert model.fit(X, y) is model
    assert 2 < model.n_iter_ < 20
    assert _loss(model, X, y) == pytest.approx(model.best_loss_, rel=1e-6)
    assert np.isfinite(model.predict(X)).all()
    pickle.loads(pickle.dumps(model)).predict(X)


def test_an_interrupted_fit_with_early_stopping_keeps_the_best_score():
    X, y = curve()
    model = regressor(field=Interrupted, early_stopping=True)
    with pytest.warns(SolverWarning, match="Interrupted"):
        model.fit(X, y)
    assert model.best_validation_score_ == max(model.validation_scores_)


def test_a_diverging_partial_fit_changes_nothing():
    X, y = curve()
    model = regressor().partial_fit(X, y)
    before, epochs = model.predict(X), model.n_iter_
    model.set_params(max_steps=1, rtol=1e-9, atol=1e-9)
    with pytest.raises(DivergenceError, match="max_steps=1"):
        model.partial_fit(X, y)
    model.set_params(max_steps=1000, rtol=1e-2, atol=1e-2)
    assert np.array_equal(model.predict(X), before) and model.n_iter_ == epochs
    assert model.partial_fit(X, y).n_iter_ == epochs + 1


def _loss(model, X, y):
    """Return the training loss of a fitted model, full batch."""
    if hasattr(model, "classes_"):
        return -model.predict_log_proba(X)[np.arange(len(y)), y].mean()
    return 0.5 * np.square((model.predict(X) - y) / y.std()).mean()
