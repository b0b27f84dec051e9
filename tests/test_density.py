"""What `CNFDensityEstimator` estimates: densities, samples, conditions, outliers."""

import warnings

import numpy as np
import pytest
import torch
from scipy.stats import kstest, norm
from sklearn.exceptions import ConvergenceWarning, NotFittedError

from skode import density as room
from skode.exceptions import DivergenceError, SolverError, SolverWarning
from tests.tables import density, moons

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
each_objective = pytest.mark.parametrize(
    "objective", ["likelihood", "flow_matching", "two_stage"]
)


@pytest.fixture(scope="module")
def moon():
    """Return an estimator of two columns that has learned something."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return density(hidden_layer_sizes=(16, 16), max_iter=80, rtol=1e-6).fit(moons())


def weights_of(model):
    """Return all weights of a fitted flow in one array."""
    return torch.cat([p.detach().ravel() for p in model.module_.parameters()]).numpy()


def gaussian(X, others):
    """Return the mean log-density of other rows under the gaussian of X."""
    mean, cov = X.mean(axis=0), np.cov(X.T)
    off = np.einsum("ij,jk,ik->i", others - mean, np.linalg.inv(cov), others - mean)
    return -0.5 * (off.mean() + np.linalg.slogdet(2 * np.pi * cov)[1])


def two_modes(n_rows=300, seed=0):
    rng = np.random.default_rng(seed)
    left = rng.random(n_rows) < 0.4
    return np.where(left, rng.normal(-20, 5, n_rows), rng.normal(15, 8, n_rows))[
        :, None
    ]


def integral(model, X, y=None, points=201):
    """Return the integral over a box around X, of one or two columns."""
    low, high, spread = X.min(axis=0), X.max(axis=0), X.std(axis=0)
    edges = np.linspace(low - 10 * spread, high + 10 * spread, points)
    mesh = np.meshgrid(*edges.T, indexing="ij")
    rows = np.column_stack([side.ravel() for side in mesh])
    given = None if y is None else np.repeat(np.asarray(y)[None], len(rows), axis=0)
    densities = np.exp(model.score_samples(rows, given))
    return densities.sum() * np.prod(edges[1] - edges[0])


# -------------------------------------------------------------------- densities


@each_objective
@pytest.mark.parametrize("marginals", [None, "normal", "auto"])
def test_densities_integrate_to_one(objective, marginals):
    X = moons()
    model = density(objective=objective, marginals=marginals).fit(X)
    assert integral(model, X) == pytest.approx(1, abs=1e-2)
    model.set_params(rtol=1e-5)
    assert integral(model, X) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("trace", ["auto", "exact"])
@pytest.mark.parametrize("hidden", [(), (8,), (8, 6), (5, 5, 5)], ids=len)
def test_densities_of_every_depth_integrate_to_one(trace, hidden):
    X = moons(100)
    model = density(hidden_layer_sizes=hidden, trace=trace, rtol=1e-5).fit(X)
    assert integral(model, X) == pytest.approx(1, abs=1e-3)


def test_a_density_of_one_column_integrates_to_one():
    X = two_modes()
    model = density(rtol=1e-5).fit(X)
    assert integral(model, X, points=4001) == pytest.approx(1, abs=1e-3)


@each_objective
def test_it_learns_what_a_gaussian_cannot(objective):
    X, held = moons(300), moons(300, seed=1)
    model = density(hidden_layer_sizes=(16, 16), objective=objective, max_iter=120)
    assert model.fit(X).score(held) > gaussian(X, held) + 0.3


def test_score_is_the_mean_of_the_log_densities(moon):
    X = moons(50)
    densities, weight = moon.score_samples(X), np.arange(50.0)
    assert densities.shape == (50,)
    assert moon.score(X) == pytest.approx(densities.mean())
    weighted = np.average(densities, weights=weight)
    assert moon.score(X, sample_weight=weight) == pytest.approx(weighted)


@pytest.mark.parametrize("marginals", [None, "auto", "normal"])
def test_densities_are_in_the_units_of_the_rows(marginals):
    X, scale = moons(100), np.array([1e-4, 1e3])
    model = density(marginals=marginals).fit(X)
    other = density(marginals=marginals).fit(X * scale + 7)
    np.testing.assert_allclose(
        other.score_samples(X * scale + 7),
        model.score_samples(X) - np.log(scale).sum(),
        rtol=1e-4,
        atol=1e-4,
    )


def test_without_standardize_rows_are_taken_as_they_are():
    X = np.random.default_rng(0).standard_normal((200, 2))
    model = density(standardize=False, rtol=1e-5).fit(X)
    # Far from where it was trained, so far from the base.
    assert model.score(X) > model.score(X + 5) + 5
    assert integral(model, X) == pytest.approx(1, abs=1e-3)


def test_a_row_does_not_know_its_neighbours(moon):
    X = 1.5 * moons(60, seed=2)
    wanted, order = moon.score_samples(X), np.random.default_rng(0).permutation(60)
    np.testing.assert_allclose(moon.score_samples(X[order]), wanted[order], rtol=1e-12)
    parts = [moon.score_samples(part) for part in np.split(X, [1, 8, 40])]
    np.testing.assert_allclose(np.concatenate(parts), wanted, rtol=1e-12)


def test_tolerance_and_solver_are_read_at_every_call():
    X = moons(100)
    model = density(max_iter=40, rtol=1e-8).fit(X)
    exact, price = model.score_samples(X), model.evaluations(X)
    model.set_params(rtol=1e-2)
    assert 1e-7 < np.abs(model.score_samples(X) - exact).max() < 0.1
    assert (model.evaluations(X) < price).all()
    for solver in ("tsit5", "bosh3", "dopri8"):
        model.set_params(solver=solver, rtol=1e-7)
        np.testing.assert_allclose(model.score_samples(X), exact, atol=1e-5)
    model.set_params(solver="rk4", step_size=0.02)
    np.testing.assert_allclose(model.score_samples(X), exact, atol=1e-5)


@pytest.mark.parametrize("far", [1e6, -1e12])
@pytest.mark.parametrize("marginals", [None, "auto"])
def test_rows_far_away_are_improbable_and_never_nan(far, marginals):
    X = moons(100)
    model = density(marginals=marginals, max_iter=40).fit(X)
    densities = model.score_samples(X.mean(axis=0) + far * X.std(axis=0) * np.eye(2))
    assert np.isfinite(densities).all() and densities.max() < -1000
    assert (model.predict(X.mean(axis=0) + far * X.std(axis=0) * np.eye(2)) == -1).all()


def test_a_solve_that_fails_is_told_with_a_remedy(moon):
    X = moons(20)
    steps, moon.max_steps = moon.max_steps, 1
    try:
        with pytest.raises(SolverError, match="max_steps") as caught:
            moon.score_samples(X)
        assert len(caught.value.rows) > 0 and caught.value.n_rows == 20
        with pytest.raises(SolverError, match="max_steps"):
            moon.sample(20, random_state=0)
    finally:
        moon.max_steps = steps


def test_a_threshold_that_cannot_be_computed_does_not_lose_the_fit():
    X = moons(50)
    with pytest.warns(SolverWarning, match="offset_ is unknown.*max_steps"):
        model = density(max_iter=40, max_steps=1, rtol=1e-9).fit(X)
    assert np.isnan(model.offset_)
    model.set_params(max_steps=1000)
    assert np.isfinite(model.score_samples(X)).all()


# ------------------------------------------------------- samples and the way there


@pytest.mark.parametrize("marginals", [None, "auto"])
def test_samples_are_those_of_the_density(marginals):
    X = two_modes()
    model = density(marginals=marginals, max_iter=60, rtol=1e-5).fit(X)
    grid = np.linspace(-120, 120, 6001)
    share = np.exp(model.score_samples(grid[:, None])) * (grid[1] - grid[0])
    drawn = model.sample(2000, random_state=0)[:, 0]
    assert kstest(drawn, lambda x: np.interp(x, grid, share.cumsum())).pvalue > 1e-3


def test_samples_are_decided_by_the_seed(moon):
    assert moon.sample().shape == (1, 2)
    draws = [moon.sample(9, random_state=seed) for seed in (0, 0, 1)]
    assert np.array_equal(draws[0], draws[1]) and not np.array_equal(draws[0], draws[2])
    rng = np.random.RandomState(0)
    assert np.array_equal(moon.sample(9, random_state=rng), draws[0])
    assert not np.array_equal(moon.sample(9, random_state=rng), draws[0])
    for wrong in (0, 2.5):
        with pytest.raises(ValueError, match=f"integer of at least 1, got {wrong}"):
            moon.sample(wrong)


@pytest.mark.parametrize("marginals", [None, "auto", "normal"])
def test_there_and_back(marginals):
    X = moons(100)
    model = density(marginals=marginals, rtol=1e-8, max_iter=40).fit(X)
    back = model.inverse_transform(model.transform(X))
    assert (np.abs(back - X) / X.std(axis=0)).max() < 1e-6


def test_there_and_back_in_single_precision():
    X = np.random.default_rng(0).normal([0, 1], [1, 2], (100, 2)).astype(np.float32)
    model = density(rtol=1e-6, max_iter=40).fit(X)
    back = model.inverse_transform(model.transform(X))
    assert back.dtype == np.float32
    assert np.abs(back - X).max() < 1e-5


def test_the_base_is_standard_normal(moon):
    held = moons(500, seed=3)
    for column in moon.transform(held).T:
        assert kstest(column, "norm").statistic < 0.12


def test_inverse_transform_wants_points_of_the_base(moon):
    for wrong in (np.ones((3, 5)), np.ones(2)):
        with pytest.raises(ValueError, match=r"shape \(n_samples, 2\), as transform"):
            moon.inverse_transform(wrong)
    with pytest.raises(ValueError, match="Input X contains NaN"):
        moon.inverse_transform([[0.0, np.nan]])


def test_fit_transform_is_fit_and_transform():
    X = moons(50)
    ours = density().fit_transform(X)
    assert np.array_equal(ours, density().fit(X).transform(X))


def test_a_trajectory_leads_from_the_base_to_the_row(moon):
    X = moons(20)
    path = moon.trajectory(X, [0.0, 0.3, 1.0])
    assert path.shape == (20, 3, 2)
    np.testing.assert_allclose(path[:, -1], X, rtol=1e-9)
    start = moon.preprocessing_.inverse(moon.transform(X))
    np.testing.assert_allclose(path[:, 0], start, rtol=1e-2)
    np.testing.assert_allclose(moon.trajectory(X, [0.3])[:, 0], path[:, 1], rtol=1e-2)


@pytest.mark.parametrize("t", [[0.5, 0.2], [-0.1, 1.0], [0.0, 1.1], [], 0.5])
def test_times_of_a_trajectory_increase(moon, t):
    with pytest.raises(ValueError, match="t must increase from 0 or later to 1"):
        moon.trajectory(moons(3), t)


# ------------------------------------------------------------------- conditions


def conditional_table(kind, n_rows=200):
    """Return rows whose mean y decides, y, and two of its values."""
    rng = np.random.default_rng(0)
    codes = np.arange(n_rows) % 2
    X = rng.standard_normal((n_rows, 2)) + 4.0 * codes[:, None] * [1, -1]
    if kind == "labels":
        return X, np.array(["left", "right"])[codes], ("left", "right")
    if kind == "a covariate":
        return X, codes + 0.1 * rng.standard_normal(n_rows), (0.0, 1.0)
    return X, np.column_stack([1e3 * codes, codes % 1]), ([0.0, 0.0], [1e3, 0.0])


each_condition = pytest.mark.parametrize(
    "kind", ["labels", "a covariate", "two covariates"]
)


@each_condition
@each_objective
def test_each_condition_has_a_density_of_its_own(kind, objective):
    X, y, (one, other) = conditional_table(kind)
    model = density(conditional=True, objective=objective, max_iter=60, rtol=1e-5)
    model.fit(X, y)
    for given in (one, other):
        assert integral(model, X, given, points=201) == pytest.approx(1, abs=1e-3)
    swapped = np.roll(y, 1, axis=0)
    assert model.score(X, y) > model.score(X, swapped) + 1
    assert model.score(X, y) > density(max_iter=60).fit(X).score(X)


@each_condition
def test_samples_obey_their_condition(kind):
    X, y, (one, other) = conditional_table(kind)
    model = density(conditional=True, max_iter=60).fit(X, y)
    draws = [model.sample(200, random_state=0, y=given) for given in (one, other)]
    wanted = X[1::2].mean(axis=0) - X[::2].mean(axis=0)
    np.testing.assert_allclose(
        draws[1].mean(axis=0) - draws[0].mean(axis=0), wanted, atol=1
    )
    each = np.array([one, other] * 100)
    mixed = model.sample(200, random_state=0, y=each)
    np.testing.assert_allclose(mixed[::2], draws[0][::2], rtol=1e-6)
    np.testing.assert_allclose(mixed[1::2], draws[1][1::2], rtol=1e-6)


def test_conditions_go_with_every_method():
    X, y, _ = conditional_table("labels")
    model = density(conditional=True, rtol=1e-7).fit(X, y)
    assert list(model.classes_) == ["left", "right"]
    Z = model.transform(X, y)
    assert not np.allclose(Z, model.transform(X, y[::-1]))
    np.testing.assert_allclose(model.inverse_transform(Z, y), X, atol=1e-5)
    assert model.trajectory(X, [0.0, 1.0], y).shape == (200, 2, 2)
    assert model.evaluations(X, y).shape == model.predict(X, y).shape == (200,)
    np.testing.assert_allclose(model.fit_transform(X, y), Z)


def test_many_integers_for_labels_are_told():
    X, y = moons(42), np.arange(42) // 2
    model = density(conditional=True, max_iter=1)
    with pytest.warns(UserWarning, match=r"21 different.*y\.astype\(float\)") as caught:
        model.fit(X, y)
    assert caught[0].filename == __file__ and len(model.classes_) == 21
    for quiet in (y[:40], y.astype(float), y.astype(str)):
        model.fit(X[: len(quiet)], quiet)


def test_as_many_samples_as_conditions():
    X, y, _ = conditional_table("labels")
    model = density(conditional=True, max_iter=2).fit(X, y)
    with pytest.raises(ValueError, match=r"3 conditions .* or n_samples=3"):
        model.sample(y=y[:3])
    assert model.sample(3, y=y[:3]).shape == (3, X.shape[1])


def test_a_conditional_density_asks_for_y():
    X, y, _ = conditional_table("labels")
    with pytest.raises(ValueError, match="pass y, a vector of labels, or covariates"):
        density(conditional=True).fit(X)
    model = density(conditional=True, max_iter=2).fit(X, y)
    for call in (model.score_samples, model.transform, model.predict):
        with pytest.raises(ValueError, match="conditional on y: pass y"):
            call(X)
    with pytest.raises(ValueError, match="conditional on y: pass y"):
        model.sample(3)
    with pytest.raises(ValueError, match=r"labels \['middle'\]"):
        model.sample(3, y="middle")
    with pytest.raises(ValueError, match="one entry for each of 200 rows"):
        model.score_samples(X, y[:5])


def test_a_plain_density_takes_no_y(moon):
    X = moons(20)
    with pytest.raises(ValueError, match="leave y out, or fit with conditional=True"):
        moon.score_samples(X, np.zeros(20))
    # As scikit-learn's tools pass y to everything, fit and score ignore it.
    assert moon.score(X, np.zeros(20)) == moon.score(X)
    for call in (moon.inverse_transform, moon.transform, moon.predict):
        with pytest.raises(ValueError, match="not conditional"):
            call(X, np.zeros(20))
    with pytest.raises(ValueError, match="not conditional"):
        moon.sample(20, y=np.zeros(20))
    labels = np.repeat(["a", "b"], 10)
    assert np.array_equal(
        weights_of(density().fit(X, labels)), weights_of(density().fit(X))
    )


# --------------------------------------------------------------------- outliers


@pytest.mark.parametrize("contamination", [0.05, 0.2])
def test_contamination_is_the_share_of_training_rows_called_outliers(contamination):
    X = moons()
    model = density(contamination=contamination).fit(X)
    labels = model.predict(X)
    assert set(labels) == {-1, 1}
    assert (labels == -1).mean() == pytest.approx(contamination, abs=0.01)
    decision = model.decision_function(X)
    np.testing.assert_allclose(decision, model.score_samples(X) - model.offset_)
    assert np.array_equal(labels == -1, decision < 0)


def test_the_threshold_is_not_on_a_row():
    X = moons(50)
    model = density(dtype="float32").fit(X)
    gaps = np.abs(model.decision_function(X))
    assert gaps.min() > 1e-3
    below = np.sort(model.score_samples(X))[3:5]
    assert model.offset_ == pytest.approx(below.mean(), abs=1e-5)


def test_planted_outliers_are_found():
    X = moons()
    planted = X.mean(axis=0) + X.std(axis=0) * [[8, 8], [-9, 3], [0, 12]]
    model = density(contamination=0.05).fit(np.vstack([X, planted]))
    assert (model.predict(planted) == -1).all()
    assert (model.predict(X) == 1).mean() > 0.95
    both = np.vstack([X, planted])
    assert np.array_equal(model.fit_predict(both), model.predict(both))


def test_the_threshold_counts_weights():
    X, weight = moons(100), np.where(np.arange(100) < 50, 3.0, 1.0)
    model = density(contamination=0.2).fit(X, sample_weight=weight)
    assert np.average(model.predict(X) == -1, weights=weight) == pytest.approx(
        0.2, abs=0.03
    )


# ------------------------------------------------------------------------ traces


def wide(n_rows=100, n_columns=6):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((n_rows, n_columns))
    return np.tanh(2 * X + X[:, ::-1])


def test_hutchinson_is_near_and_says_how_near():
    X = wide()
    model = density(trace="hutchinson", n_probes=200, max_iter=30).fit(X)
    ours, error = model.score_samples(X, return_std=True)
    assert np.array_equal(model.score_samples(X), ours)
    model.set_params(trace="exact")
    exact, none = model.score_samples(X, return_std=True)
    assert not none.any() and (error > 0).all()
    # One standard error for two thirds of the rows, or so: they share the probes.
    off = np.abs(ours - exact) / error
    assert 0.2 < np.median(off) < 1.5 and off.max() < 6


def test_evaluations_are_those_of_the_trace_that_is_asked_for():
    X = moons(100)
    model = density(hidden_layer_sizes=(8, 8, 8), trace="hutchinson", rtol=1e-6).fit(X)
    probed = model.evaluations(X)
    assert not np.array_equal(model.set_params(trace="exact").evaluations(X), probed)


def test_a_single_probe_has_no_standard_error():
    X = wide(20)
    model = density(trace="hutchinson", n_probes=1, max_iter=2).fit(X)
    assert np.isnan(model.score_samples(X, return_std=True)[1]).all()


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_both_traces_learn(trace):
    X = wide(200)
    model = density(trace=trace, max_iter=60, hidden_layer_sizes=(16,)).fit(X)
    model.set_params(trace="exact")
    assert model.score(X) > gaussian(X, X) + 0.2


# ------------------------------------------------------------------ regularisers


def test_penalties_make_densities_cheaper_to_solve():
    X = moons()
    free = {"kinetic_penalty": 0.0, "error_penalty": 0.0, "jacobian_penalty": 0.0}
    plain = density(max_iter=60, **free).fit(X)
    for name in free:
        model = density(max_iter=60, **{**free, name: 1000.0}).fit(X)
        assert model.evaluations(X).sum() < plain.evaluations(X).sum()
        assert model.score(X) < plain.score(X)


def test_noise_flattens():
    X = moons(60)
    quiet, loud = (density(noise=noise, max_iter=80).fit(X) for noise in (0.0, 1.0))
    assert quiet.score(X) > loud.score(X) + 0.1


# ----------------------------------------------------------------------- weights


@each_objective
@pytest.mark.parametrize("marginals", [None, "auto"])
@pytest.mark.parametrize("conditional", [False, True])
def test_a_weight_is_a_number_of_rows(objective, marginals, conditional):
    X, times = moons(40), 1 + np.arange(40) % 3
    X[:8, 0] = X[0, 0]  # an atom, whose rows are redrawn
    y = np.arange(40.0) if conditional else None
    plain = {"objective": objective, "marginals": marginals, "batch_size": 16}
    one, other = (density(conditional=conditional, **plain) for _ in range(2))
    one.fit(X, y, sample_weight=times)
    again = np.random.default_rng(0).permutation(np.arange(40).repeat(times))
    other.fit(X[again], None if y is None else y[again])
    np.testing.assert_allclose(weights_of(one), weights_of(other), atol=1e-6)
    assert one.offset_ == pytest.approx(other.offset_, abs=1e-4)


@pytest.mark.parametrize("marginals", [None, "auto"])
def test_rows_without_weight_are_ignored(marginals):
    X, weight = moons(60), np.ones(60)
    weight[5:9] = 0
    X[5:9] = 1e3
    weighted = density(marginals=marginals).fit(X, sample_weight=weight)
    dropped = density(marginals=marginals).fit(np.delete(X, slice(5, 9), 0))
    np.testing.assert_allclose(weights_of(weighted), weights_of(dropped), rtol=1e-9)
    assert weighted.offset_ == pytest.approx(dropped.offset_)


def test_weights_move_the_density():
    X = two_modes()
    weight = np.where(X[:, 0] < 0, 5.0, 1.0)
    plain = density(max_iter=60).fit(X)
    weighted = density(max_iter=60).fit(X, sample_weight=weight)
    left = np.array([[-20.0]])
    gain = weighted.score(left) - plain.score(left)
    share = 0.4 * 5 / (0.4 * 5 + 0.6)
    assert gain == pytest.approx(np.log(share / 0.4), abs=0.35)


# --------------------------------------------------- one epoch more, and once more


@each_objective
@pytest.mark.parametrize("conditional", [False, True])
def test_partial_fit_learns_from_chunks(objective, conditional):
    X = moons(240)
    y = X[:, 0] > X[:, 0].mean() if conditional else None
    model = density(objective=objective, conditional=conditional)
    for _ in range(20):
        for chunk in np.split(np.arange(240), 3):
            model.partial_fit(X[chunk], None if y is None else y[chunk])
    assert np.mean(model.loss_curve_[-20:]) < np.mean(model.loss_curve_[:5])
    assert np.isfinite(model.score(X, y))
    assert model.n_iter_ == len(model.loss_curve_) == 60
    assert model.loss_ == model.loss_curve_[-1]
    assert model.best_loss_ == min(model.loss_curve_)


def test_partial_fit_goes_on_from_fit():
    X = moons(80)
    model = density().fit(X)
    module, epochs = model.module_, model.n_iter_
    model.partial_fit(X)
    assert model.module_ is module and model.n_iter_ == epochs + 1
    with pytest.raises(ValueError, match="features"):
        model.partial_fit(X[:, :1])


def test_partial_fit_knows_the_labels_of_its_first_call():
    X, y, _ = conditional_table("labels")
    model = density(conditional=True).partial_fit(X, y)
    with pytest.raises(ValueError, match=r"labels \['middle'\]"):
        model.partial_fit(X, np.where(y == "left", "middle", y))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_partial_fit_takes_chunks_of_either_dtype(optimizer):
    X, model = moons(60), density(optimizer=optimizer)
    for dtype in (np.float64, np.float32, np.float64):
        model.partial_fit(X.astype(dtype))
        assert model.score_samples(X.astype(dtype)).dtype == dtype
    assert model.n_iter_ == 3


def test_partial_fit_goes_on_with_a_single_row():
    X = moons(100)
    with pytest.raises(ValueError, match="minimum of 2"):
        density().partial_fit(X[:1])
    assert density().partial_fit(X).partial_fit(X[:1]).n_iter_ == 2


def test_a_fit_that_goes_on_keeps_its_grid():
    X = moons(100)
    model = density(max_iter=1, warm_start=True).fit(X)
    model.n_steps_ = 9
    assert model.fit(X).n_steps_ >= 8  # one less at most, where that is enough


def test_warm_start_goes_on():
    X = moons(100)
    model = density(warm_start=True, max_iter=60).fit(X)
    module, first = model.module_, model.loss_curve_
    model.fit(X)
    assert model.module_ is module
    assert model.loss_curve_[0] < 0.5 * (first[0] + first[-1])
    model.set_params(warm_start=False).fit(X)
    assert model.module_ is not module
    np.testing.assert_allclose(model.loss_curve_, first)


@pytest.mark.parametrize(
    "params",
    [
        {"hidden_layer_sizes": (9,)},
        {"activation": "softplus"},
        {"conditional": True},
        {"marginals": "auto"},
        {"standardize": False},
        {"dequantize": True},
    ],
    ids=lambda params: "-".join(params),
)
def test_a_flow_is_continued_in_its_shape(params):
    X, y = moons(40), np.zeros(40)
    model = density(warm_start=True, max_iter=2).fit(X)
    before = model.score_samples(X)
    original = {name: model.get_params()[name] for name in params}
    model.set_params(**params)
    for call in (model.fit, model.partial_fit):
        with pytest.raises(ValueError, match=f"^{next(iter(params))} cannot change"):
            call(X, y)
    model.set_params(**original)
    assert np.array_equal(model.score_samples(X), before)
    model.set_params(hidden_layer_sizes=8).fit(X)


# ------------------------------------------------------------ training, its end


def test_the_seed_decides_everything():
    X = moons(100)
    models = [density(noise=0.1, random_state=seed).fit(X) for seed in (0, 0, 1)]
    assert np.array_equal(weights_of(models[0]), weights_of(models[1]))
    assert not np.array_equal(weights_of(models[0]), weights_of(models[2]))
    assert models[0].loss_curve_ == models[1].loss_curve_
    fresh = [density(random_state=None, max_iter=1).fit(X) for _ in range(2)]
    assert not np.array_equal(weights_of(fresh[0]), weights_of(fresh[1]))


def test_a_fit_leaves_the_global_generators_alone():
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    density(max_iter=2).fit(moons(40))
    assert torch.equal(torch.rand(3), wanted)


def test_the_advice_without_held_out_rows_begins_with_early_stopping():
    plain = density(max_iter=15, tol=1e-7, noise=0.0, early_stopping=False)
    with pytest.warns(ConvergenceWarning, match="epochs: set early_stopping=True"):
        plain.fit(moons(100))


def test_early_stopping_keeps_the_best_weights():
    X = moons(150)
    model = density(
        early_stopping=True,
        validation_fraction=0.4,
        hidden_layer_sizes=(32,),
        learning_rate_init=0.1,
        noise=0.0,
        max_iter=60,
    ).fit(X)
    scores = model.validation_scores_
    assert len(scores) == model.n_iter_ and np.isfinite(scores).all()
    assert model.best_validation_score_ == max(scores)
    short = density(max_iter=2, early_stopping=False).fit(X)
    assert short.validation_scores_ is None and short.best_validation_score_ is None


def test_early_stopping_says_what_it_cannot_hold_out():
    model = density(early_stopping=True, validation_fraction=0.9)
    with pytest.raises(
        ValueError, match=r"fraction=0\.9 of 2 rows .*or early_stopping"
    ):
        model.fit([[0.0], [1.0]])


def test_equal_rows_count_once_for_what_is_held_out():
    X = moons(60)
    twice = density(max_iter=1).fit(np.repeat(X, 2, axis=0))
    weighted = density(max_iter=1).fit(X, sample_weight=np.full(60, 2.0))
    assert twice.validation_scores_ is None and weighted.validation_scores_ is None
    np.testing.assert_allclose(twice.score_samples(X), weighted.score_samples(X))
    with pytest.warns(UserWarning, match="constant"):
        density(max_iter=1).fit(np.ones((1000, 2)))


def test_flow_matching_is_validated_on_a_grid_that_is_watched():
    X = moons(300)
    model = density(objective="flow_matching", early_stopping=True, max_iter=60).fit(X)
    assert model.n_steps_ != 3  # with which it began


def test_auto_stops_early_from_a_hundred_rows_on():
    assert density(max_iter=1).fit(moons(99)).validation_scores_ is None
    assert len(density(max_iter=1).fit(moons(100)).validation_scores_) == 1


@pytest.mark.filterwarnings("error::sklearn.exceptions.ConvergenceWarning")
def test_it_warns_where_it_has_not_converged_and_only_there():
    X = moons(100)
    with pytest.warns(ConvergenceWarning, match="ended at max_iter=15") as caught:
        density(max_iter=15, tol=1e-7, noise=0.0).fit(X)
    assert caught[0].filename == __file__
    density(max_iter=15, tol=0.0).fit(X)
    assert density(max_iter=300, tol=1.0).fit(X).n_iter_ < 300


def stopped_by(error, calls):
    """Return a likelihood that raises an error from so many batches on."""

    class Stopped(room.Likelihood):
        seen = 0

        def __call__(self, batch):
            Stopped.seen += 1
            if Stopped.seen > calls:
                raise error
            return super().__call__(batch)

    return Stopped


def test_an_interrupted_fit_keeps_its_best_weights(monkeypatch):
    X = moons(100)
    monkeypatch.setattr(room, "Likelihood", stopped_by(KeyboardInterrupt, 10))
    with pytest.warns(SolverWarning, match="Interrupted after 10 epochs"):
        model = density(max_iter=50).fit(X)
    assert model.n_iter_ == 10 and np.isfinite(model.offset_)
    assert np.isfinite(model.score_samples(X)).all()
    monkeypatch.setattr(room, "Likelihood", stopped_by(KeyboardInterrupt, 0))
    with pytest.raises(KeyboardInterrupt):
        density(max_iter=50).fit(X)


def test_an_interruption_ends_a_fit_of_two_stages(monkeypatch):
    calls = []

    class Stopped(room.FlowMatching):
        def __call__(self, batch):
            calls.append(batch)
            if len(calls) > 3:
                raise KeyboardInterrupt
            return super().__call__(batch)

    monkeypatch.setattr(room, "FlowMatching", Stopped)
    monkeypatch.setattr(room, "Likelihood", stopped_by(AssertionError, 0))
    with pytest.warns(SolverWarning, match="Interrupted after 3 epochs"):
        model = density(objective="two_stage").fit(moons(100))
    assert model.n_iter_ == 3 and np.isfinite(model.offset_)


def test_a_fit_forgets_the_one_before(monkeypatch):
    X = moons(100)
    model = density(conditional=True, max_iter=1).fit(X, X[:, 0] > 0)
    assert hasattr(model, "classes_")
    model.set_params(conditional=False).fit(X)
    assert not hasattr(model, "classes_")
    broken = FloatingPointError("The loss is not finite.")
    monkeypatch.setattr(room, "Likelihood", stopped_by(broken, 0))
    with pytest.raises(DivergenceError):
        model.fit(X)
    # No threshold belongs to these weights, least of all that of other ones.
    with pytest.raises(NotFittedError):
        model.predict(X)


def test_a_fit_that_diverges_says_so_and_keeps_its_best_weights(monkeypatch):
    X, broken = moons(100), FloatingPointError("The loss is not finite.")
    monkeypatch.setattr(room, "Likelihood", stopped_by(broken, 10))
    model = density(max_iter=50)
    with pytest.raises(DivergenceError, match="lower learning_rate_init"):
        model.fit(X)
    assert model.n_iter_ == 10 and np.isfinite(model.score_samples(X)).all()


def test_a_learning_rate_that_is_too_high_is_recovered_from_or_told():
    X = moons(100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SolverWarning)
        try:
            model = density(learning_rate_init=1e3, max_iter=20).fit(X)
        except DivergenceError:
            return
    try:
        assert np.isfinite(model.score_samples(X)).all()
    except SolverError as error:
        assert "rows" in str(error)


def test_two_stages_each_have_their_epochs():
    X = moons(100)
    model = density(objective="two_stage", tol=0.0, max_iter=7).fit(X)
    # The history is that of the likelihood, in nats of whitened rows.
    assert model.n_iter_ == 7
    assert model.loss_curve_[0] < 3.5


# -------------------------------------------------------------------- ugly tables


@pytest.mark.parametrize("marginals", [None, "auto", "normal"])
def test_constant_columns_are_told_and_survived(marginals):
    X = np.column_stack([moons(60), np.full(60, 3.0)])
    with pytest.warns(
        UserWarning, match=r"Column 2 of X: constant.*Leave such columns"
    ):
        model = density(marginals=marginals).fit(X)
    assert np.isfinite(model.score_samples(X)).all()
    assert np.isfinite(model.sample(20, random_state=0)).all()
    other = X + np.array([0, 0, 1])
    assert model.score(other) < model.score(X) - 10


@pytest.mark.parametrize("marginals", [None, "auto"])
def test_duplicated_columns_are_told_and_survived(marginals):
    X = moons(60)[:, [0, 1, 0]]
    with pytest.warns(UserWarning, match=r"Columns 0, 2 of X: each follows.*Leave out"):
        model = density(marginals=marginals).fit(X)
    assert np.isfinite(model.score_samples(X)).all()
    drawn = model.sample(50, random_state=0)
    assert np.corrcoef(drawn[:, 0], drawn[:, 2])[0, 1] > 0.999


@pytest.mark.parametrize("marginals", [None, "auto"])
def test_fewer_rows_than_columns_are_told_and_survived(marginals):
    X = np.random.default_rng(0).standard_normal((8, 20))
    with pytest.warns(UserWarning, match="8 rows and 20 columns.*Reduce the columns"):
        model = density(marginals=marginals).fit(X)
    assert np.isfinite(model.score_samples(X)).all()
    assert np.isfinite(model.score(X + 1))


def test_two_rows_are_enough():
    X = np.array([[0.0], [1.0]])
    model = density().fit(X)
    assert np.isfinite(model.score_samples(X)).all()
    with pytest.raises(ValueError, match="minimum of 2 is required"):
        density().fit(X[:1])


def test_repeated_values_do_not_raise_the_density_without_end():
    X = np.where(np.arange(200) % 2, 0.0, np.random.default_rng(0).normal(5, 1, 200))
    model = density(marginals="auto", max_iter=60).fit(X[:, None])
    assert np.isfinite(model.score(X[:, None])) and model.score(X[:, None]) < 10
    drawn = model.sample(1000, random_state=0)
    assert (drawn == 0).mean() == pytest.approx(0.5, abs=0.1)


@pytest.mark.slow
def test_300_columns():
    X = np.random.default_rng(0).standard_normal((400, 300)) @ np.diag(
        np.arange(1, 301)
    )
    model = density(max_iter=3).fit(X)
    assert (
        model.score(X) > norm.logpdf(X, scale=np.arange(1, 301)).sum(axis=1).mean() - 60
    )
    assert model.sample(3, random_state=0).shape == (3, 300)


def test_300_columns_by_probes():
    X = np.random.default_rng(0).standard_normal((100, 300))
    model = density(max_iter=2, trace="hutchinson", n_probes=2, standardize=False).fit(
        X
    )
    assert np.isfinite(model.score_samples(X)).all()


def test_dequantised_densities_are_probabilities():
    rng = np.random.default_rng(0)
    X = np.column_stack([rng.binomial(6, 0.4, 400), rng.normal(50, 3, 400)])
    model = density(dequantize=True, max_iter=40).fit(X[:, :1])
    at = np.exp(model.score_samples(np.arange(7.0)[:, None]))
    counts = np.bincount(X[:, 0].astype(int), minlength=7) / 400
    np.testing.assert_allclose(at, counts, atol=0.03)
    assert at.sum() == pytest.approx(1, abs=0.04)
    drawn = density(dequantize=True).fit(X).sample(100, random_state=0)
    assert np.array_equal(drawn[:, 0], np.rint(drawn[:, 0]))
    assert not np.array_equal(drawn[:, 1], np.rint(drawn[:, 1]))


@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_few_integers_are_trained_on_as_many_draws_as_rows(rate):
    # They are three rows that differ: one draw of each said nothing of their cells.
    X = np.random.default_rng(0).poisson(rate, (1000, 1)).astype(float)
    model = density(dequantize=True, max_iter=40).fit(X)
    at = np.exp(model.score_samples(np.arange(-30.0, 30.0)[:, None]))
    assert at.sum() == pytest.approx(1, abs=0.08)
    assert at[30] == pytest.approx((X == 0).mean(), abs=0.05)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_must_be_finite(moon, bad):
    X = moons(20)
    X[3, 1] = bad
    for call in (density().fit, density().partial_fit, moon.score_samples):
        with pytest.raises(ValueError, match="contains"):
            call(X)
    with pytest.raises(ValueError, match="contains"):
        density().fit(moons(20), sample_weight=X[:, 1])


@pytest.mark.parametrize("weight", [-np.ones(20), np.zeros(20), np.ones(19)])
def test_weights_must_be_weights(weight):
    with pytest.raises(ValueError, match="weight"):
        density().fit(moons(20), sample_weight=weight)


@pytest.mark.parametrize(
    "params",
    [
        {"objective": "score"},
        {"trace": "some"},
        {"n_probes": 0},
        {"marginals": "uniform"},
        {"contamination": 0.0},
        {"contamination": 0.6},
        {"kinetic_penalty": -1.0},
        {"noise": -0.1},
        {"activation": "sine"},
        {"rtol": -1.0},
        {"hidden_layer_sizes": (8, 0)},
        {"hidden_layer_sizes": 0},
        {"max_iter": 0},
        {"conditional": "yes"},
    ],
    ids=lambda params: "-".join(map(str, *params.items())),
)
def test_a_wrong_parameter_is_named(params):
    with pytest.raises(ValueError, match=next(iter(params))):
        density(**params).fit(moons(20))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"solver": "dopri6"}, "There is no solver 'dopri6'"),
        ({"solver": "rk4"}, "pass step_size"),
        ({"rtol": 0}, "rtol and atol must not both be 0"),
    ],
    ids=str,
)
def test_how_to_solve_is_checked_before_the_fit(params, message):
    model = density(**params)
    for begin in (model.fit, model.partial_fit):
        with pytest.raises(ValueError, match=message):
            begin(moons(20))
        assert not hasattr(model, "module_")


def test_before_fit_nothing_is_known():
    X, model = moons(5), density()
    calls = [model.score_samples, model.score, model.predict, model.transform]
    for call in [*calls, model.inverse_transform, model.decision_function]:
        with pytest.raises(NotFittedError):
            call(X)
    with pytest.raises(NotFittedError):
        model.sample()
