"""What `ODEClassifier` and `ODERegressor` learn: targets, weights, losses, calls."""

import copy
import pickle
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import (
    ConvergenceWarning,
    DataConversionWarning,
    NotFittedError,
)
from sklearn.linear_model import LinearRegression
from sklearn.metrics import accuracy_score, r2_score

from skode import ODEClassifier, ODERegressor, _parameters, supervised
from tests.tables import Spring, blobs, classifier, curve, regressor

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
BOTH = pytest.mark.parametrize(
    ("make", "table"), [(classifier, blobs), (regressor, curve)]
)


def weights_of(model):
    """Return all weights of a fitted net in one array."""
    return torch.cat([p.detach().ravel() for p in model.module_.parameters()]).numpy()


def outputs(model, X):
    """Return what a small change of the weights would change."""
    return model.predict_proba(X) if hasattr(model, "classes_") else model.predict(X)


# --------------------------------------------------------------------- classes


@pytest.mark.parametrize(
    "labels",
    [
        np.array([0, 1]),
        np.array([-1.0, 1.0]),
        np.array(["no", "yes"]),
        np.array(["no", "yes"], dtype=object),
        np.array([False, True]),
        np.array([7, 3, 5]),
        np.array(["b", "c", "a", "d"]),
    ],
    ids=lambda labels: f"{labels.dtype}-{len(labels)}",
)
def test_labels_of_any_kind_come_back(labels):
    X, codes = blobs(n_classes=len(labels), n_rows=80)
    y = labels[codes]
    model = classifier(max_iter=30).fit(X, y)
    assert np.array_equal(model.classes_, np.unique(labels))
    predicted = model.predict(X)
    assert predicted.dtype == labels.dtype and predicted.shape == y.shape
    assert model.score(X, y) == accuracy_score(y, predicted) > 0.9
    chances = model.predict_proba(X)
    assert chances.shape == (80, len(labels))
    np.testing.assert_allclose(chances.sum(axis=1), 1, rtol=1e-12)
    assert np.array_equal(model.classes_[chances.argmax(axis=1)], predicted)
    np.testing.assert_allclose(model.predict_log_proba(X), np.log(chances), atol=1e-9)


def test_a_single_class_is_predicted_for_sure():
    X, y = blobs()
    model = classifier().fit(X, np.full(len(y), "only"))
    assert set(model.predict(X)) == {"only"}
    assert np.array_equal(model.predict_proba(X), np.ones((len(X), 1)))


def several_targets():
    X, a = blobs(n_classes=3, n_rows=90)
    return X, np.stack([a, 10 + (X[:, 0] > X[:, 0].mean())], axis=1)


def test_several_targets_with_classes_of_their_own():
    X, y = several_targets()
    model = classifier(max_iter=40).fit(X, y)
    assert [list(c) for c in model.classes_] == [[0, 1, 2], [10, 11]]
    assert model.n_outputs_ == 2
    predicted = model.predict(X)
    assert predicted.shape == y.shape
    right = (predicted == y).mean(axis=0)
    assert right.min() > 0.9
    assert model.score(X, y) == pytest.approx(right.mean())
    chances, logs = model.predict_proba(X), model.predict_log_proba(X)
    for i, (chance, log) in enumerate(zip(chances, logs, strict=True)):
        np.testing.assert_allclose(chance.sum(axis=1), 1)
        np.testing.assert_allclose(log, np.log(chance), atol=1e-9)
        best = model.classes_[i][chance.argmax(axis=1)]
        assert np.array_equal(best, predicted[:, i])


def test_the_score_of_several_targets_weighs_rows():
    X, y = several_targets()
    model = classifier(max_iter=3).fit(X, y)
    weight = np.where(np.arange(len(X)) < 10, 1.0, 0.0)
    assert model.score(X, y, weight) == pytest.approx(model.score(X[:10], y[:10]))


def test_multilabel_indicators():
    X, codes = blobs(n_classes=3, n_rows=90)
    y = np.stack([codes == 0, codes > 0, codes == 2], axis=1).astype(int)
    model = classifier(max_iter=40).fit(X, y)
    predicted = model.predict(X)
    assert predicted.dtype == y.dtype and (predicted == y).mean() > 0.9
    assert [chance.shape for chance in model.predict_proba(X)] == [(90, 2)] * 3


# --------------------------------------------------------------------- weights


@BOTH
def test_a_weight_of_n_is_n_rows(make, table):
    X, y = table(n_rows=40)
    times = np.arange(40) % 3  # zero among them
    weighted = make(max_iter=8).fit(X, y, sample_weight=times)
    repeated = make(max_iter=8).fit(X.repeat(times, axis=0), y.repeat(times))
    np.testing.assert_allclose(weights_of(weighted), weights_of(repeated), rtol=1e-7)
    plain = make(max_iter=8).fit(X, y)
    assert not np.allclose(weights_of(plain), weights_of(repeated), rtol=1e-3)


@BOTH
def test_a_weight_of_zero_drops_a_row(make, table):
    X, y = table(n_rows=40)
    X[5:9], weight = 1e3, np.ones(40)
    weight[5:9] = 0
    dropped = make(max_iter=8).fit(
        np.delete(X, slice(5, 9), 0), np.delete(y, slice(5, 9))
    )
    weighted = make(max_iter=8).fit(X, y, sample_weight=weight)
    np.testing.assert_allclose(weights_of(weighted), weights_of(dropped), rtol=1e-9)


@BOTH
def test_only_ratios_of_weights_count(make, table):
    X, y = table(n_rows=40)
    weight = 1.0 + np.arange(40)
    small, large = (
        make(max_iter=8).fit(X, y, sample_weight=scale * weight)
        for scale in (1e-3, 1e3)
    )
    np.testing.assert_allclose(weights_of(small), weights_of(large), rtol=1e-7)


def unbalanced():
    X, y = blobs(n_rows=60)
    kept = (y == 0) | (np.arange(60) < 12)
    return X[kept], y[kept]


def test_class_weights_are_sample_weights():
    X, y = unbalanced()
    ratio = {0: 1.0, 1: 5.0}
    by_class = classifier(max_iter=8, class_weight=ratio).fit(X, y)
    by_row = classifier(max_iter=8).fit(X, y, sample_weight=np.where(y == 1, 5.0, 1.0))
    assert np.array_equal(weights_of(by_class), weights_of(by_row))
    balanced = classifier(max_iter=8, class_weight="balanced").fit(X, y)
    np.testing.assert_allclose(weights_of(balanced), weights_of(by_class), rtol=1e-9)


def test_class_weights_multiply_sample_weights():
    X, y = unbalanced()
    weight = 1.0 + np.arange(len(y))
    both = classifier(max_iter=4, class_weight={0: 1.0, 1: 5.0})
    both.fit(X, y, sample_weight=weight)
    one = classifier(max_iter=4).fit(X, y, weight * np.where(y == 1, 5.0, 1.0))
    assert np.array_equal(weights_of(both), weights_of(one))


def test_class_weights_of_several_targets():
    X, y = several_targets()
    weights = [{0: 1.0, 1: 2.0, 2: 3.0}, {10: 1.0, 11: 4.0}]
    both = classifier(max_iter=4, class_weight=weights).fit(X, y)
    product = (1.0 + y[:, 0]) * np.where(y[:, 1] == 11, 4.0, 1.0)
    one = classifier(max_iter=4).fit(X, y, sample_weight=product)
    np.testing.assert_allclose(weights_of(both), weights_of(one), rtol=1e-9)


def test_class_weights_that_leave_no_row_are_an_error():
    X, y = blobs()
    with pytest.raises(ValueError, match="class_weight"):
        classifier(class_weight={0: 0.0, 1: 0.0}).fit(X, y)


# ----------------------------------------------------------------- partial_fit


def test_partial_fit_learns_from_chunks():
    X, y = blobs(n_classes=3, n_rows=120)
    model = classifier()
    for _ in range(15):
        for chunk in np.split(np.arange(120), 4):
            model.partial_fit(X[chunk], y[chunk], classes=[0, 1, 2])
    assert model.score(X, y) > 0.9
    assert model.n_iter_ == len(model.loss_curve_) == 60
    assert model.loss_ == model.loss_curve_[-1] < 0.2 * model.loss_curve_[0]
    assert model.best_loss_ == min(model.loss_curve_)


def test_partial_fit_of_a_regressor():
    X, y = curve()
    model = regressor()
    for _ in range(80):
        model.partial_fit(1e3 * X, 1e6 * y + 1e7)
    assert model.score(1e3 * X, 1e6 * y + 1e7) > 0.9


def test_the_first_call_decides_the_scales():
    X, y = curve()
    model = regressor().partial_fit(X, y)
    for other in (100 + 50 * X, X):
        np.testing.assert_allclose(model._feature_shift, X.mean(axis=0))
        np.testing.assert_allclose(model._feature_scale, X.std(axis=0))
        model.partial_fit(other, y)


def test_partial_fit_needs_the_classes_first():
    X, y = blobs(n_classes=3)
    model = classifier()
    with pytest.raises(ValueError, match=r"first call of partial_fit needs classes="):
        model.partial_fit(X, y)
    with pytest.raises(ValueError, match=r"labels \[2\] that .* classes_ \[0, 1\]"):
        model.partial_fit(X, y, classes=[0, 1])
    model.partial_fit(X[y < 2], y[y < 2], classes=[2, 1, 0])
    assert list(model.classes_) == [0, 1, 2]
    model.partial_fit(X, y)
    with pytest.raises(ValueError, match=r"has \[0, 1, 2\], not \[0, 1, 2, 3\]"):
        model.partial_fit(X, y, classes=[0, 1, 2, 3])
    with pytest.raises(ValueError, match="not in classes_"):
        model.partial_fit(X, y + 7)


def test_partial_fit_of_several_targets():
    X, y = several_targets()
    model = classifier()
    for _ in range(40):
        model.partial_fit(X, y, classes=[[0, 1, 2], [10, 11]])
    assert model.score(X, y) > 0.9
    with pytest.raises(ValueError, match="1 target"):
        model.partial_fit(X, y[:, 0])
    model.partial_fit(X, y, classes=[[0, 1, 2], [10, 11]])
    with pytest.raises(ValueError, match=r"not \[\[0, 1, 2\], \[10, 12\]\]"):
        model.partial_fit(X, y, classes=[[0, 1, 2], [10, 12]])


def test_partial_fit_does_not_forget_the_optimiser():
    X, y = blobs()
    model = classifier().partial_fit(X, y, classes=[0, 1])
    optimiser = model._optimizer
    model.partial_fit(X, y)
    assert model._optimizer is optimiser
    assert next(iter(optimiser.state.values()))["step"] == 2


@BOTH
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_partial_fit_takes_chunks_of_either_dtype(make, table, optimizer):
    X, y = table()
    model = make(optimizer=optimizer)
    classes = {"classes": [0, 1]} if make is classifier else {}
    for dtype in (np.float64, np.float32, np.float64):
        model.partial_fit(X.astype(dtype), y, **classes)
        assert model.transform(X.astype(dtype)).dtype == dtype
    assert model.n_iter_ == 3


def test_partial_fit_reads_the_learning_rate_anew():
    X, y = curve()
    model = regressor().partial_fit(X, y)
    before = weights_of(model)
    model.set_params(learning_rate_init=1e-6).partial_fit(X, y)
    assert 0 < np.abs(weights_of(model) - before).max() < 1e-4


def test_partial_fit_counts_weights():
    X, y = blobs(n_rows=40)
    times = 1 + np.arange(40) % 3
    one = classifier().partial_fit(X, y, classes=[0, 1], sample_weight=times)
    other = classifier().partial_fit(
        X.repeat(times, axis=0), y.repeat(times), classes=[0, 1]
    )
    np.testing.assert_allclose(weights_of(one), weights_of(other), rtol=1e-7)


@BOTH
def test_partial_fit_goes_on_from_fit(make, table):
    X, y = table()
    model = make().fit(X, y)
    module, epochs = model.module_, model.n_iter_
    model.partial_fit(X, y)
    assert model.module_ is module and model.n_iter_ == epochs + 1
    with pytest.raises(ValueError, match=r"features"):
        model.partial_fit(X[:, :1], y)


# ------------------------------------------------------------------ warm_start


@BOTH
def test_warm_start_goes_on(make, table):
    X, y = table()
    model = make(warm_start=True).fit(X, y)
    module, first = model.module_, model.loss_curve_
    model.fit(X, y)
    assert model.module_ is module
    assert model.loss_curve_[0] < 0.5 * first[0]
    cold = make().fit(X, y)
    before = cold.module_
    assert cold.fit(X, y).module_ is not before


def test_warm_start_keeps_the_targets():
    X, y = blobs(n_classes=3)
    model = classifier(warm_start=True, max_iter=3).fit(X, y)
    for other in (y % 2, y + 1, np.stack([y, y], axis=1)):
        with pytest.raises(ValueError, match=r"the same classes: it has \[0, 1, 2\],"):
            model.fit(X, other)
    X, y = curve()
    model = regressor(warm_start=True, max_iter=3).fit(X, y)
    with pytest.raises(ValueError, match=r"y has 2 targets, but .* has 1"):
        model.fit(X, np.stack([y, y], axis=1))
    with pytest.raises(ValueError, match="cannot be continued with loss='gaussian'"):
        model.set_params(loss="gaussian").fit(X, y)


@BOTH
def test_warm_start_keeps_the_features(make, table):
    X, y = table()
    model = make(warm_start=True, max_iter=3).fit(X, y)
    with pytest.raises(ValueError, match=r"X has 1 features, but .* is expecting"):
        model.fit(X[:, :1], y)
    assert outputs(model, X).shape[0] == len(X)


def make_spring(width):
    return Spring(width)


class Maker:
    """A callable that compares in a way of its own."""

    def __call__(self, width):
        return Spring(width)

    def __eq__(self, other):
        return np.array([True, True])

    __hash__ = None


@BOTH
@pytest.mark.parametrize(
    "params",
    [
        {"hidden_layer_sizes": (9,)},
        {"activation": "relu"},
        {"encoder": "augment"},
        {"state_size": 5},
        {"field": Spring},
        {"standardize": False},
        {"activation": "relu", "field": Maker()},
    ],
    ids=lambda params: "-".join(params),
)
def test_a_net_is_continued_in_its_shape(make, table, params):
    X, y = table()
    model = make(warm_start=True, max_iter=2).fit(X, y)
    before = outputs(model, X)
    model.set_params(**params)
    refusal = f"^{', '.join(params)} cannot change while a model is continued"
    for call in (model.fit, model.partial_fit):
        with pytest.raises(ValueError, match=refusal):
            call(X, y)
    model.set_params(**{name: make().get_params()[name] for name in params})
    assert np.array_equal(outputs(model, X), before)
    model.fit(X, y)
    model.set_params(warm_start=False, **params).fit(X, y)


@BOTH
@pytest.mark.parametrize("field", [None, Spring, make_spring, Maker()])
def test_a_shape_may_be_written_in_other_ways(make, table, field):
    X, y = table()
    sizes = np.array([8, 4])
    model = make(field=field, hidden_layer_sizes=sizes, warm_start=True, max_iter=2)
    model.fit(X, y)
    for other in (model, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        other.set_params(hidden_layer_sizes=[8, 4], state_size=np.int64(4))
        other.fit(X, y).partial_fit(X, y)
    assert not hasattr(clone(model), "module_")
    clone(model).fit(X, y)


# ------------------------------------------------------- convergence, stopping


@pytest.mark.filterwarnings("error::sklearn.exceptions.ConvergenceWarning")
@BOTH
def test_it_warns_where_it_has_not_converged_and_only_there(make, table):
    X, y = table()
    advice = (
        r"ended at max_iter=15, and the loss fell by more than 1000 \* tol = 0\.001 in "
        r"its last n_iter_no_change epochs: set early_stopping=True .* raise max_iter"
    )
    with pytest.warns(ConvergenceWarning, match=advice) as caught:
        make(max_iter=15, tol=1e-6).fit(X, y)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = make(max_iter=200, tol=1e-3).fit(X, y)
    assert model.n_iter_ < 200


def test_with_early_stopping_it_warns_of_the_score():
    X, y = curve(200)
    model = regressor(early_stopping=True, max_iter=15, tol=1e-6)
    advice = r"the validation score rose by more than .*: raise max_iter\.$"
    with pytest.warns(ConvergenceWarning, match=advice):
        model.fit(X, y)


@pytest.mark.filterwarnings("error::sklearn.exceptions.ConvergenceWarning")
@BOTH
@pytest.mark.parametrize("max_iter", [1, 15])
def test_with_tol_0_all_epochs_are_what_was_asked_for(make, table, max_iter):
    model = make(max_iter=max_iter, tol=0.0).fit(*table())
    assert model.n_iter_ == max_iter


def test_it_has_converged_when_the_score_has_stopped_improving(monkeypatch):
    X, y = curve(200)
    # A plateau of 6 epochs; then the falling rate finds a little more.
    scores = iter([0.5] * 9 + [0.6 + 0.01 * i for i in range(60)])
    monkeypatch.setattr(supervised, "r2_score", lambda *args, **kwargs: next(scores))
    model = regressor(early_stopping=True, max_iter=60, n_iter_no_change=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.fit(X, y)
    assert model.n_iter_ == 11


@BOTH
def test_the_loss_falls(make, table):
    X, y = table()
    model = make().fit(X, y)
    assert model.n_iter_ == len(model.loss_curve_) == 20
    assert model.loss_ == model.loss_curve_[-1] < 0.5 * model.loss_curve_[0]
    assert model.best_loss_ == min(model.loss_curve_)
    assert model.validation_scores_ is None and model.best_validation_score_ is None


@pytest.mark.parametrize("loss", ["squared_error", "quantile", "gaussian"])
def test_early_stopping_keeps_the_best_weights_of_a_regressor(loss, monkeypatch):
    _check_best_weights(regressor(loss=loss, quantile=0.8), curve, monkeypatch)


def test_early_stopping_keeps_the_best_weights_of_a_classifier(monkeypatch):
    def hard(n_rows):
        rng = np.random.default_rng(0)
        X = rng.standard_normal((n_rows, 3))
        return X, (X[:, 0] + rng.standard_normal(n_rows) > 0).astype(int)

    _check_best_weights(classifier(), hard, monkeypatch)


def _check_best_weights(model, table, monkeypatch):
    """Score the rows that were held out with the weights that were kept."""
    X, y = table(n_rows=100)
    held, split = [], _parameters.train_test_split

    def spy(*args, **kwargs):
        rows, held_rows = split(*args, **kwargs)
        held.append((rows, held_rows))
        return rows, held_rows

    monkeypatch.setattr(_parameters, "train_test_split", spy)
    model.set_params(
        early_stopping=True,
        validation_fraction=0.3,
        max_iter=30,
        tol=0.0,
        learning_rate_init=0.2,
    ).fit(X, y)
    ((rows, held_rows),) = held
    assert len(held_rows) == 30 and len(set(rows) | set(held_rows)) == 100
    assert len(model.validation_scores_) == model.n_iter_ == len(model.loss_curve_)
    best = model.best_validation_score_
    assert best == max(model.validation_scores_) > model.validation_scores_[0]
    assert len(set(model.validation_scores_)) > 3
    assert _held_out_score(model, X[held_rows], y[held_rows]) == pytest.approx(best)


def _held_out_score(model, X, y):
    if isinstance(model, ODEClassifier) or model.loss == "squared_error":
        return model.score(X, y)
    scale, shift = model._target_scale, model._target_shift
    if model.loss == "quantile":
        error = (y - model.predict(X)) / scale
        return -np.maximum(0.8 * error, -0.2 * error).mean()
    mean, std = model.predict(X, return_std=True)
    std, error = std / scale, (y - mean) / scale
    assert shift.shape == scale.shape == (1,)
    return -(np.log(std) + 0.5 * (error / std) ** 2).mean()


def test_early_stopping_stops_early():
    X, y = blobs(n_rows=100)
    model = classifier(early_stopping=True, max_iter=200, n_iter_no_change=5).fit(X, y)
    assert model.n_iter_ < 100 and model.best_validation_score_ == 1


@pytest.mark.parametrize("rows", [2, 3])
def test_early_stopping_with_too_few_rows(rows):
    X, y = blobs(n_rows=rows)
    with pytest.raises(
        ValueError, match=rf"cannot hold out validation_fraction=0.1 of {rows} rows"
    ):
        classifier(early_stopping=True).fit(X, y)


def test_early_stopping_of_a_regressor_with_one_held_out_row():
    X, y = curve(n_rows=8)
    model = regressor(early_stopping=True, max_iter=3).fit(X, y)
    assert np.isfinite(model.validation_scores_).all()


# ---------------------------------------------------------------------- losses


def test_regression():
    X, y = curve(200)
    model = regressor(max_iter=60).fit(X[:150], y[:150])
    assert model.score(X[150:], y[150:]) > 0.93
    linear = LinearRegression().fit(X[:150], y[:150])
    assert model.score(X[150:], y[150:]) > linear.score(X[150:], y[150:])


@pytest.mark.parametrize(
    "loss", ["squared_error", "absolute_error", "huber", "quantile", "gaussian"]
)
@pytest.mark.parametrize("shape", [(60,), (60, 2)])
def test_every_loss_learns_targets_of_every_shape(loss, shape):
    X, y = curve()
    y = (
        np.stack([y, 100 - 50 * y], axis=1)[:, : shape[-1]].reshape(shape)
        if (len(shape) == 2)
        else y
    )
    model = regressor(loss=loss, max_iter=30).fit(X, y)
    predicted = model.predict(X)
    assert predicted.shape == shape
    assert model.n_outputs_ == (shape[1] if len(shape) == 2 else 1)
    assert r2_score(y, predicted) > 0.9
    if loss == "gaussian":
        mean, std = model.predict(X, return_std=True)
        assert np.array_equal(mean, predicted)
        assert std.shape == shape and (std > 0).all()


@BOTH
@pytest.mark.parametrize("call", ["fit", "partial_fit"])
def test_a_column_of_targets_is_a_vector(make, table, call):
    X, y = table()
    params = {"classes": [0, 1]} if (make, call) == (classifier, "partial_fit") else {}
    flat, column = make(max_iter=2), make(max_iter=2)
    getattr(flat, call)(X, y, **params)
    with pytest.warns(DataConversionWarning, match="column-vector y was passed"):
        getattr(column, call)(X, y[:, None], **params)
    assert column.predict(X).shape == y.shape
    assert np.array_equal(outputs(column, X), outputs(flat, X))


def test_robust_losses_forgive_outliers():
    X, clean = curve(100)
    y = clean.copy()
    y[::10] += 50.0
    errors = {
        loss: np.abs(
            regressor(loss=loss, max_iter=40, huber_delta=0.1).fit(X, y).predict(X)
            - clean
        ).mean()
        for loss in ("squared_error", "absolute_error", "huber", "quantile")
    }
    for robust in ("absolute_error", "huber", "quantile"):
        assert errors[robust] < 0.25 * errors["squared_error"]


def test_delta_is_where_huber_turns():
    X, y = curve(noise=0.5)
    fits = {
        name: weights_of(regressor(max_iter=4, **params).fit(X, y))
        for name, params in {
            "square": {"loss": "squared_error"},
            "wide": {"loss": "huber", "huber_delta": 1e3},
            "narrow": {"loss": "huber", "huber_delta": 0.1},
        }.items()
    }
    np.testing.assert_allclose(fits["wide"], fits["square"], rtol=1e-9)
    assert not np.allclose(fits["narrow"], fits["square"], rtol=1e-2)


@pytest.mark.parametrize("quantile", [0.1, 0.9])
def test_the_quantile_has_its_share_of_the_data_below(quantile):
    X, y = curve(300, noise=0.5)
    model = regressor(loss="quantile", quantile=quantile, batch_size=300, max_iter=60)
    below = (y < model.fit(X, y).predict(X)).mean()
    assert below == pytest.approx(quantile, abs=0.04)


def test_gaussian_learns_a_spread_that_varies():
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 1, 600)
    spread = 10.0 * (0.1 + x)
    y = 1000 + 20 * x + spread * rng.standard_normal(600)
    model = regressor(loss="gaussian", max_iter=40).fit(x[:, None], y)
    grid = np.array([[0.1], [0.5], [0.9]])
    mean, std = model.predict(grid, return_std=True)
    np.testing.assert_allclose(std, [2.0, 6.0, 10.0], rtol=0.3)
    np.testing.assert_allclose(mean, [1002.0, 1010.0, 1018.0], atol=2.0)


def test_spread_of_another_loss_is_an_error():
    X, y = curve()
    model = regressor(max_iter=2).fit(X, y)
    with pytest.raises(ValueError, match="fit with loss='gaussian'"):
        model.predict(X, return_std=True)
    # What counts is what was fitted.
    model.set_params(loss="gaussian")
    with pytest.raises(ValueError, match="fit with loss='gaussian'"):
        model.predict(X, return_std=True)


# ---------------------------------------------------------------------- scales


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_raw_units_work(dtype):
    X, y = curve(100)
    raw = (1e6 * X + 5e6).astype(dtype)
    target = -1e6 * y + 3e6
    assert regressor(max_iter=30).fit(raw, target).score(raw, target) > 0.9
    labels = y > y.mean()
    assert classifier(max_iter=30).fit(raw, labels).score(raw, labels) > 0.9


@BOTH
@pytest.mark.parametrize("given", [np.float64, np.int64])
def test_float32_keeps_what_a_large_offset_hides(make, table, given):
    X, y = table()
    X = (1e4 * X).round()
    times = (X + 1_700_000_000).astype(given)  # neighbours in float32: 128 apart
    close = {"rtol": 1e-4, "atol": 1e-5}
    offset = make(dtype="float32", max_iter=5).fit(times, y)
    plain = make(dtype="float32", max_iter=5).fit(X, y)
    np.testing.assert_allclose(outputs(offset, times), outputs(plain, X), **close)
    np.testing.assert_allclose(offset.transform(times), plain.transform(X), **close)
    np.testing.assert_allclose(
        offset.trajectory(times, [0.5]), plain.trajectory(X, [0.5]), **close
    )
    assert np.array_equal(offset.evaluations(times), plain.evaluations(X))
    offset.partial_fit(times, y), plain.partial_fit(X, y)
    np.testing.assert_allclose(outputs(offset, times), outputs(plain, X), **close)
    held = make(dtype="float32", max_iter=20, early_stopping=True).fit(times, y)
    assert held.best_validation_score_ > 0.8


def test_units_do_not_matter():
    X, y = curve()
    plain = regressor().fit(X, y)
    scaled = regressor().fit(1e6 * X - 7e5, 1e3 * y + 5)
    np.testing.assert_allclose(
        scaled.predict(1e6 * X - 7e5), 1e3 * plain.predict(X) + 5, rtol=1e-4
    )


@BOTH
def test_without_standardisation_the_net_sees_raw_rows(make, table):
    X, y = table()
    raw = make(standardize=False, max_iter=4).fit(X, y)
    with torch.no_grad():
        start = raw.module_.encoder(torch.tensor(X)).numpy()
    assert np.array_equal(raw.trajectory(X, [0.0])[:, 0], start)
    assert not np.allclose(outputs(raw, X), outputs(make(max_iter=4).fit(X, y), X))


def test_without_standardisation_targets_are_raw():
    X, y = curve()
    model = regressor(standardize=False, max_iter=1).fit(X, 1e4 + y)
    assert model.loss_ == pytest.approx(0.5e8, rel=0.01)


def test_constant_features_and_targets_do_no_harm():
    X, y = curve()
    X = np.column_stack([X, np.full(len(X), 0.1)])
    model = regressor(max_iter=30).fit(X, y)
    assert model.score(X, y) > 0.9
    X[:, 2] += 1e-9
    assert model.score(X, y) > 0.9
    flat = regressor().fit(X, np.full(len(X), 7.3))
    np.testing.assert_allclose(flat.predict(X), 7.3, atol=0.2)


@BOTH
def test_columns_too_large_for_a_variance_are_told(make, table):
    X, y = table()
    X[:, 1] *= 1e200
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(
            ValueError, match=r"Columns \[1\] of X hold numbers so large"
        ):
            make().fit(X, y)


def test_targets_too_large_for_a_variance_are_told():
    X, y = curve()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(
            ValueError, match=r"Columns \[0\] of y hold numbers so large"
        ):
            regressor().fit(X, 1e200 * y)


# ----------------------------------------------------------------------- seeds


@BOTH
@pytest.mark.parametrize("params", [{}, {"early_stopping": True}], ids=["", "stop"])
def test_the_seed_decides_the_fit_to_the_bit(make, table, params):
    X, y = table(n_rows=300)  # two batches or more
    fits = [
        weights_of(make(random_state=seed, max_iter=3, **params).fit(X, y))
        for seed in (3, 3, 4, np.random.RandomState(3), None, None)
    ]
    assert np.array_equal(fits[0], fits[1]) and np.array_equal(fits[0], fits[3])
    assert not np.array_equal(fits[0], fits[2])
    assert not np.array_equal(fits[4], fits[5])


@BOTH
@pytest.mark.parametrize("seed", [0, None])
def test_global_random_states_are_left_alone(make, table, seed):
    X, y = table(n_rows=300)
    torchs, numpys = torch.random.get_rng_state(), np.random.get_state()[1:3]  # noqa: NPY002
    keys, position = numpys[0].copy(), numpys[1]
    model = make(random_state=seed, max_iter=2, early_stopping=True).fit(X, y)
    model.partial_fit(X, y)
    model.predict(X)
    assert torch.equal(torch.random.get_rng_state(), torchs)
    after = np.random.get_state()[1:3]  # noqa: NPY002
    assert np.array_equal(after[0], keys) and after[1] == position


class Forgetful(Spring):
    """A field that draws from torch's global generator whenever it is trained."""

    def forward(self, t, y):
        return super().forward(t, torch.nn.functional.dropout(y, 0.2, self.training))


@BOTH
def test_the_seed_decides_the_dropout_of_a_field(make, table):
    X, y = table()
    params = {"field": Forgetful, "solver": "rk4", "step_size": 0.5, "max_iter": 3}
    fits = [
        weights_of(make(random_state=seed, **params).fit(X, y)) for seed in (0, 0, 1)
    ]
    assert np.array_equal(fits[0], fits[1])
    assert not np.array_equal(fits[0], fits[2])


def test_scores_are_taken_without_dropout():
    X, y = curve(200)
    params = {"field": Forgetful, "solver": "rk4", "step_size": 0.5, "tol": 0.0}
    model = regressor(early_stopping=True, learning_rate_init=1e-9, **params).fit(X, y)
    assert np.ptp(model.validation_scores_) < 1e-4


def slow_to_build(width):
    time.sleep(0.05)  # lets another thread draw between the encoder and this
    return Spring(width)


@BOTH
def test_fits_in_two_threads_are_those_of_one(make, table):
    X, y = table(n_rows=300)
    models = [
        make(random_state=seed, max_iter=3, field=slow_to_build) for seed in (0, 1)
    ]
    alone = [weights_of(clone(model).fit(X, y)) for model in models]
    before = torch.get_rng_state()
    with ThreadPoolExecutor(2) as pool:
        together = [weights_of(m) for m in pool.map(lambda m: m.fit(X, y), models)]
    assert torch.equal(torch.get_rng_state(), before)
    for one, other in zip(alone, together, strict=True):
        assert np.array_equal(one, other)


# ---------------------------------------------------------------------- advice


@BOTH
@pytest.mark.parametrize("call", ["predict", "transform", "evaluations"])
def test_before_fit(make, table, call):
    with pytest.raises(NotFittedError):
        getattr(make(), call)(table()[0])


@BOTH
def test_rows_are_checked(make, table):
    X, y = table()
    model = make(max_iter=2).fit(X, y)
    holed = X.copy()
    holed[3, 1] = np.nan
    for call in (model.predict, model.transform, lambda X: model.fit(X, y)):
        with pytest.raises(ValueError, match="contains NaN"):
            call(holed)
    with pytest.raises(ValueError, match=r"X has 1 features, but .* is expecting"):
        model.predict(X[:, :1])
    words = X.astype(str)
    words[0, 0] = "many"
    with pytest.raises(ValueError, match=r"could not convert string to float: .*many"):
        model.fit(words, y)


@BOTH
def test_numbers_in_strings_are_numbers(make, table):
    X, y = table()
    model = make(max_iter=2).fit(X, y)
    assert np.array_equal(outputs(model, X.astype(str)), outputs(model, X))


def test_a_continuous_target_is_not_classes():
    X, y = curve()
    with pytest.raises(ValueError, match="Unknown label type"):
        classifier().fit(X, y)


@BOTH
@pytest.mark.parametrize(
    ("params", "advice"),
    [
        ({"solver": "rk45"}, "There is no solver 'rk45'. Adaptive: .*dopri5.* Fixed"),
        ({"solver": "rk4"}, r"'rk4' takes fixed steps: pass step_size, for example"),
        ({"encoder": "augment", "state_size": 1}, "state_size must be at least"),
        ({"device": "cuda:77"}, r"device='cuda:77' is not to be had here"),
        ({"device": "abacus"}, r"device='abacus' is not to be had here"),
        ({"rtol": 0.0, "atol": 0.0}, "rtol and atol must not both be 0"),
        ({"rtol": 0.0}, "rtol and atol must not both be 0"),
        ({"hidden_layer_sizes": (8, 0)}, "hidden_layer_sizes"),
        ({"hidden_layer_sizes": (8, 2.5)}, "hidden_layer_sizes"),
        ({"activation": "sigmoid"}, "'activation' parameter .* must be a str among"),
        ({"max_iter": 0}, "'max_iter' parameter"),
        ({"learning_rate_init": -1.0}, "'learning_rate_init' parameter"),
        ({"field": "mlp"}, "'field' parameter"),
        (
            {"solver": "LSODA", "gradient": "backprop"},
            "use gradient='adjoint' or 'auto'",
        ),
        (
            {"solver": "Radau", "gradient": "reversible"},
            r"gradient='reversible' needs a solver of our own \(euler, .*'auto'",
        ),
    ],
)
def test_errors_are_advice(make, table, params, advice):
    X, y = table()
    with pytest.raises(ValueError, match=advice):
        make(**params).fit(X, y)


def test_one_width_may_stand_alone():
    X, y = blobs()
    model = ODEClassifier(5, max_iter=1, random_state=0).fit(X, y)
    assert [tuple(w.shape) for w in model.module_.field.weights] == [(5, 16), (16, 5)]
    linear = ODERegressor((), max_iter=1, random_state=0).fit(X, y)
    assert [tuple(w.shape) for w in linear.module_.field.weights] == [(16, 16)]


@pytest.mark.parametrize("width", [1, 7])
@pytest.mark.parametrize("encoder", ["linear", "augment"])
def test_the_width_of_the_state(encoder, width):
    X, y = curve()
    if encoder == "augment":
        width = max(width, 2)
    model = regressor(encoder=encoder, state_size=width, max_iter=1).fit(X, y)
    assert model.state_size_ == width == model.transform(X).shape[1]
    auto = regressor(encoder=encoder, state_size="auto", max_iter=1).fit(X, y)
    assert auto.state_size_ == (16 if encoder == "linear" else 7)
