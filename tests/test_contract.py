"""scikit-learn's contract, and its tools around our estimators."""

import pickle

import joblib
import numpy as np
import pandas as pd
import polars as pl
import pytest
import sklearn
import torch
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import BaggingClassifier, StackingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, KFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.utils.estimator_checks import (
    check_methods_sample_order_invariance,
    check_methods_subset_invariance,
    parametrize_with_checks,
)

from skode import (
    CNFDensityEstimator,
    LatentODEForecaster,
    ODEClassifier,
    ODERegressor,
)
from tests.panels import forecaster
from tests.tables import Spring, blobs, classifier, curve, density, moons, regressor

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
BOTH = pytest.mark.parametrize(
    ("make", "table"), [(classifier, blobs), (regressor, curve)]
)
VARIANTS = (
    {},
    {"dtype": "float64"},
    {"encoder": "augment", "state_size": "auto"},
    {"solver": "rk4", "step_size": 0.5},
)


@parametrize_with_checks(
    [
        make(batch_size=1000, learning_rate_init=0.1, max_iter=15, **variant)
        for make in (classifier, regressor)
        for variant in VARIANTS
    ]
)
def test_scikit_learn_accepts_a_small_net(estimator, check):
    check(estimator)


@parametrize_with_checks(
    [
        density(hidden_layer_sizes=(4,), max_iter=5, **variant)
        for variant in (
            {},
            {"dtype": "float64", "marginals": "auto", "objective": "two_stage"},
            {"trace": "hutchinson", "objective": "flow_matching"},
        )
    ]
)
# One check has more columns than rows.
@pytest.mark.filterwarnings("ignore:X has .* too few rows:UserWarning")
def test_scikit_learn_accepts_a_small_flow(estimator, check):
    check(estimator)


FORECASTERS = (
    {},
    {"path": True, "trend": None, "bound": "iwae"},
    {"path": False, "trend": "linear"},
    {
        "encoder": "ode_rnn",
        "event_times": "poisson",
        "context": 2.0,
        "noise": "constant",
        "persistence": False,
        "consistency": 0.0,
    },
)


def failures_of_forecasters(estimator):
    """Return which checks fail, and why they must."""
    density = "score_samples wants y, which these checks do not pass to it"
    return {
        "check_methods_sample_order_invariance": density,
        "check_methods_subset_invariance": density,
    }


@parametrize_with_checks(
    [forecaster(max_iter=1, dtype="float64", **variant) for variant in FORECASTERS],
    expected_failed_checks=failures_of_forecasters,
)
def test_scikit_learn_accepts_a_small_forecaster(estimator, check):
    check(estimator)


class WithoutDensity(LatentODEForecaster):
    """A forecaster whose predictions alone are looked at."""

    @property
    def score_samples(self):
        raise AttributeError("hidden")


@pytest.mark.parametrize(
    "check",
    [check_methods_sample_order_invariance, check_methods_subset_invariance],
    ids=lambda check: check.__name__,
)
@pytest.mark.parametrize("variant", FORECASTERS, ids=["auto", "path", "trend", "more"])
def test_scikit_learn_finds_forecasts_of_rows_apart(variant, check):
    # The last time asked ends a solve, whose last step is a little shorter for it: rows
    # are apart up to the tolerance, which is asked to be well below the check's.
    exact = {"rtol": 1e-9, "dtype": "float64"}
    params = forecaster(**{"max_iter": 1, **variant, **exact}).get_params()
    check("LatentODEForecaster", WithoutDensity(**params))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:X has .* too few rows:UserWarning")
@parametrize_with_checks([ODEClassifier(), ODERegressor(), CNFDensityEstimator()])
def test_scikit_learn_accepts_the_defaults(estimator, check):
    check(estimator)


# ---------------------------------------------------------------- compositions


def mixed_frame():
    X, y = blobs()
    frame = pd.DataFrame(X, columns=["a", "b", "c"])
    frame["colour"] = np.where(y == 1, "red", "blue")
    return frame, y


def test_in_a_pipeline_behind_a_column_transformer():
    frame, y = mixed_frame()
    columns = ColumnTransformer(
        [("one", OneHotEncoder(), ["colour"]), ("two", "passthrough", ["a", "b"])]
    )
    model = make_pipeline(columns, classifier()).fit(frame, y)
    assert model.score(frame, y) > 0.95
    assert model[-1].n_features_in_ == 4


def test_as_a_transformer_in_a_pipeline():
    X, y = blobs(n_classes=3)
    model = make_pipeline(classifier(), LogisticRegression()).fit(X, y)
    assert model.score(X, y) > 0.95
    assert model[-1].n_features_in_ == model[0].state_size_ == 4


def test_grid_search_over_solver_and_tolerance_in_two_processes():
    X, y = curve(40)
    grid = {"solver": ["dopri5", "bosh3"], "rtol": [1e-1, 1e-3]}
    search = GridSearchCV(regressor(max_iter=10), grid, cv=2, n_jobs=2).fit(X, y)
    scores = search.cv_results_["mean_test_score"]
    assert np.isfinite(scores).all() and len(set(scores)) == 4
    alone = regressor(max_iter=10, **search.best_params_).fit(X, y)
    assert np.array_equal(search.predict(X), alone.predict(X))


def test_cross_validation():
    X, y = blobs()
    assert cross_val_score(classifier(), X, y, cv=3).min() > 0.9


@pytest.mark.parametrize(
    "meta",
    [
        BaggingClassifier(classifier(max_iter=40), n_estimators=3, random_state=0),
        CalibratedClassifierCV(classifier(), cv=2, ensemble=False),
        StackingClassifier(
            [("ode", classifier()), ("log", LogisticRegression())], cv=2
        ),
    ],
    ids=lambda meta: type(meta).__name__,
)
def test_inside_a_meta_estimator(meta):
    X, y = blobs(n_classes=3)
    names = np.array(["x", "y", "z"])[y]
    fitted = meta.fit(X, names)
    assert fitted.score(X, names) > 0.95
    np.testing.assert_allclose(fitted.predict_proba(X).sum(axis=1), 1, rtol=1e-5)


# ----------------------------------------------------------------- round trips


@BOTH
def test_a_clone_is_unfitted_and_fits_the_same(make, table):
    X, y = table()
    model = make(field=Spring).fit(X, y)
    copy = clone(model)
    assert not hasattr(copy, "module_") and copy.field is Spring
    assert np.array_equal(copy.fit(X, y).predict(X), model.predict(X))


@BOTH
@pytest.mark.parametrize("field", [None, Spring])
def test_pickled_it_predicts_the_same(make, table, field):
    X, y = table()
    model = make(field=field).fit(X, y)
    loaded = pickle.loads(pickle.dumps(model))
    assert np.array_equal(loaded.predict(X), model.predict(X))
    assert loaded.loss_curve_ == model.loss_curve_


@BOTH
def test_joblib_dumps_and_loads(make, table, tmp_path):
    X, y = table()
    model = make().fit(X, y)
    joblib.dump(model, tmp_path / "model.joblib")
    assert np.array_equal(
        joblib.load(tmp_path / "model.joblib").predict(X), model.predict(X)
    )


@pytest.mark.gpu
@BOTH
def test_fitted_on_a_gpu_and_loaded_on_the_cpu(make, table):
    X, y = table()
    model = make(device="cuda", dtype="float64").fit(X, y)
    assert next(model.module_.parameters()).device.type == "cuda"
    data = pickle.dumps(model)
    assert next(model.module_.parameters()).device.type == "cuda"
    loaded = pickle.loads(data)
    assert next(loaded.module_.parameters()).device.type == "cpu"
    loaded.set_params(device="cpu")
    np.testing.assert_allclose(loaded.transform(X), model.transform(X), rtol=1e-9)
    assert model.score(X, y) > 0.8


@pytest.mark.gpu
@BOTH
def test_gpu_and_cpu_learn_the_same(make, table):
    X, y = table()
    fits = [make(device=d, dtype="float64").fit(X, y) for d in ("cuda", "cpu")]
    np.testing.assert_allclose(fits[0].loss_curve_, fits[1].loss_curve_, rtol=1e-6)


@pytest.mark.gpu
def test_partial_fit_and_warm_start_stay_on_the_gpu():
    X, y = blobs()
    model = classifier(device="cuda").partial_fit(X, y, classes=[0, 1])
    model.partial_fit(X, y)
    model.set_params(warm_start=True).fit(X, y)
    assert model.score(X, y) > 0.9
    assert model.set_params(device="cpu").score(X, y) > 0.9


# ------------------------------------------------------------ metadata routing


def test_weights_are_routed_through_a_pipeline():
    X, y = blobs()
    weight = np.random.default_rng(0).uniform(0, 2, len(X))
    with sklearn.config_context(enable_metadata_routing=True):
        scaler = StandardScaler().set_fit_request(sample_weight=False)
        model = classifier().set_fit_request(sample_weight=True)
        routed = make_pipeline(scaler, model).fit(X, y, sample_weight=weight)
    scaled = StandardScaler().fit_transform(X)
    plain = classifier().fit(scaled, y, sample_weight=weight)
    unweighted = classifier().fit(scaled, y)
    assert np.array_equal(routed.predict_proba(X), plain.predict_proba(scaled))
    assert not np.array_equal(routed.predict_proba(X), unweighted.predict_proba(scaled))


def test_weights_are_routed_through_a_grid_search():
    X, y = curve(40, noise=0.3)
    weight = np.random.default_rng(0).uniform(0, 2, len(X))
    grid, cv = {"rtol": [1e-1, 1e-3]}, KFold(2)
    with sklearn.config_context(enable_metadata_routing=True):
        model = regressor(max_iter=5)
        model.set_fit_request(sample_weight=True)
        model.set_score_request(sample_weight=True)
        search = GridSearchCV(model, grid, cv=cv).fit(X, y, sample_weight=weight)
    train, test = next(iter(cv.split(X)))
    fold = regressor(max_iter=5, rtol=1e-1)
    fold.fit(X[train], y[train], sample_weight=weight[train])
    score = fold.score(X[test], y[test], sample_weight=weight[test])
    assert search.cv_results_["split0_test_score"][0] == pytest.approx(score)


# ---------------------------------------------------------------- frames, dtypes


@pytest.mark.parametrize("frame", [pd.DataFrame, pl.DataFrame])
@BOTH
def test_frames_are_read_by_name(make, table, frame):
    X, y = table()
    names = [f"column {i}" for i in range(X.shape[1])]
    rows = frame(dict(zip(names, X.T, strict=True)))
    model = make().fit(rows, y)
    assert list(model.feature_names_in_) == names
    assert np.array_equal(model.predict(rows), make().fit(X, y).predict(X))
    with pytest.raises(ValueError, match="feature names should match"):
        model.predict(rows[names[::-1]])


@pytest.mark.parametrize(
    ("library", "frame"), [("pandas", pd.DataFrame), ("polars", pl.DataFrame)]
)
@BOTH
def test_states_come_as_the_frame_asked_for(make, table, library, frame):
    X, y = table()
    model = make().set_output(transform=library).fit(X, y)
    states = model.transform(X)
    prefix = type(model).__name__.lower()
    assert isinstance(states, frame)
    assert list(states.columns) == [f"{prefix}{i}" for i in range(4)]
    assert list(model.get_feature_names_out()) == list(states.columns)
    plain = model.set_output(transform="default").transform(X)
    assert np.array_equal(states.to_numpy(), plain)


@BOTH
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_auto_keeps_the_dtype(make, table, dtype):
    X, y = table()
    model = make().fit(X.astype(dtype), y)
    assert model.transform(X.astype(dtype)).dtype == dtype
    assert (
        next(model.module_.parameters()).dtype
        == torch.from_numpy(np.empty(0, dtype)).dtype
    )
    soft = getattr(model, "predict_proba", model.predict)(X.astype(dtype))
    assert soft.dtype == dtype


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("given", [np.float32, np.float64, np.int64])
def test_dtype_is_what_is_computed_in(make, table, dtype, given):
    X, y = table()
    model = make(dtype=dtype, max_iter=2).fit(X.astype(given), y)
    assert model.transform(X.astype(given)).dtype == dtype


# -------------------------------------------------------------------- densities


def test_a_density_in_a_pipeline_with_names():
    frame = pd.DataFrame(moons(), columns=["a", "b"])
    model = make_pipeline(StandardScaler(), density()).fit(frame)
    assert model.score(frame) == model[-1].score(model[0].transform(frame))
    assert model.predict(frame).shape == model.score_samples(frame).shape == (200,)
    assert list(model.get_feature_names_out()) == [
        "cnfdensityestimator0",
        "cnfdensityestimator1",
    ]


def test_a_density_as_a_transformer_in_a_pipeline():
    X, y = blobs(n_features=2)
    model = make_pipeline(density(), LogisticRegression()).fit(X, y)
    assert model.score(X, y) > 0.9


def test_grid_search_of_densities_by_score_in_two_processes():
    X = moons(100)
    grid = {
        "solver": ["dopri5", "bosh3"],
        "rtol": [1e-1, 1e-3],
        "hidden_layer_sizes": [(4,), (8, 8)],
    }
    search = GridSearchCV(density(max_iter=10), grid, cv=2, n_jobs=2).fit(X)
    scores = search.cv_results_["mean_test_score"]
    assert np.isfinite(scores).all() and len(set(scores)) > 4
    alone = density(max_iter=10, **search.best_params_).fit(X)
    assert np.array_equal(search.score_samples(X), alone.score_samples(X))
    assert search.best_score_ == scores.max()


def test_grid_search_of_conditional_densities():
    X, y = blobs(n_classes=2, n_features=2)
    model = density(conditional=True, max_iter=10)
    search = GridSearchCV(model, {"activation": ["tanh", "silu"]}, cv=2).fit(X, y)
    assert np.isfinite(search.best_score_)
    assert cross_val_score(model, X, y, cv=3).shape == (3,)


@pytest.mark.parametrize("conditional", [False, True])
def test_a_pickled_density_is_the_same(conditional, tmp_path):
    X = moons(60)
    y = np.where(X[:, 0] > X[:, 0].mean(), "right", "left") if conditional else None
    model = density(conditional=conditional, marginals="auto", trace="hutchinson")
    model.fit(X, y)
    joblib.dump(model, tmp_path / "model.joblib")
    joblibbed = joblib.load(tmp_path / "model.joblib")
    for loaded in (pickle.loads(pickle.dumps(model)), joblibbed):
        assert np.array_equal(loaded.score_samples(X, y), model.score_samples(X, y))
        wanted = model.sample(5, random_state=0, y=None if y is None else "left")
        drawn = loaded.sample(5, random_state=0, y=None if y is None else "left")
        assert np.array_equal(drawn, wanted)
        assert loaded.loss_curve_ == model.loss_curve_
        loaded.partial_fit(X, y)


def test_a_clone_of_a_density_is_unfitted_and_fits_the_same():
    X = moons(60)
    model = density().fit(X)
    copy = clone(model)
    assert not hasattr(copy, "module_")
    assert np.array_equal(copy.fit(X).score_samples(X), model.score_samples(X))


@pytest.mark.parametrize("frame", [pd.DataFrame, pl.DataFrame])
def test_densities_read_frames_by_name(frame):
    X = moons(60)
    rows = frame({"a": X[:, 0], "b": X[:, 1]})
    model = density().fit(rows)
    assert list(model.feature_names_in_) == ["a", "b"]
    assert np.array_equal(model.score_samples(rows), density().fit(X).score_samples(X))
    with pytest.raises(ValueError, match="feature names should match"):
        model.score_samples(rows[["b", "a"]])


@pytest.mark.parametrize(
    ("library", "frame"), [("pandas", pd.DataFrame), ("polars", pl.DataFrame)]
)
def test_points_of_the_base_come_as_the_frame_asked_for(library, frame):
    X = moons(60)
    model = density().set_output(transform=library).fit(X)
    points = model.transform(X)
    assert isinstance(points, frame)
    assert list(points.columns) == list(model.get_feature_names_out())
    plain = model.set_output(transform="default").transform(X)
    assert np.array_equal(points.to_numpy(), plain)
    np.testing.assert_allclose(model.inverse_transform(points), X, rtol=1e-2)


@pytest.mark.parametrize(
    "y",
    [
        pd.Series(["a", "b"] * 30),
        pd.Series(["a", "b"] * 30, dtype="category"),
        pd.DataFrame({"u": np.arange(60.0), "v": np.ones(60)}),
        pl.Series(["a", "b"] * 30),
        [True, False] * 30,
    ],
    ids=["series", "category", "frame", "polars", "list"],
)
def test_conditions_come_in_any_kind(y):
    X = moons(60)
    model = density(conditional=True, max_iter=2).fit(X, y)
    ours = density(conditional=True, max_iter=2).fit(X, np.asarray(y))
    assert np.array_equal(
        model.score_samples(X, y), ours.score_samples(X, np.asarray(y))
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("given", [np.float32, np.float64, np.int64])
def test_densities_are_in_the_dtype_asked_for(dtype, given):
    X = (10 * moons(60)).astype(given)
    model = density(dtype=dtype, max_iter=2).fit(X)
    results = [model.score_samples(X), model.sample(3), model.transform(X)]
    results += [model.inverse_transform(results[2]), model.trajectory(X, [0.0, 1.0])]
    assert [result.dtype for result in results] == [dtype] * 5


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_densities_keep_the_dtype_by_default(dtype):
    X = moons(60).astype(dtype)
    model = density(max_iter=2).fit(X)
    assert model.score_samples(X).dtype == model.transform(X).dtype == dtype
    assert model.sample(2).dtype == dtype


def test_weights_are_routed_to_a_density():
    X, weight = moons(60), np.random.default_rng(0).uniform(0, 2, 60)
    with sklearn.config_context(enable_metadata_routing=True):
        scaler = StandardScaler().set_fit_request(sample_weight=False)
        model = density().set_fit_request(sample_weight=True)
        routed = make_pipeline(scaler, model).fit(X, sample_weight=weight)
    scaled = StandardScaler().fit_transform(X)
    plain = density().fit(scaled, sample_weight=weight)
    assert np.array_equal(routed.score_samples(X), plain.score_samples(scaled))
    assert not np.array_equal(
        plain.score_samples(scaled), density().fit(scaled).score_samples(scaled)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("objective", ["likelihood", "flow_matching"])
def test_a_density_of_a_gpu_is_that_of_the_cpu(objective):
    X = moons()
    gpu, cpu = (
        density(device=device, dtype="float64", objective=objective).fit(X)
        for device in ("cuda", "cpu")
    )
    np.testing.assert_allclose(gpu.loss_curve_, cpu.loss_curve_, rtol=1e-6)
    loaded = pickle.loads(pickle.dumps(gpu)).set_params(device="cpu")
    assert next(loaded.module_.parameters()).device.type == "cpu"
    np.testing.assert_allclose(
        loaded.score_samples(X), gpu.score_samples(X), rtol=1e-9, atol=1e-9
    )
    assert gpu.sample(3, random_state=0).shape == (3, 2)
