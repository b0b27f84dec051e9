"""Preprocessing: there and back, its determinants, atoms, and columns that are ugly."""

import pickle
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import norm
from sklearn.datasets import load_breast_cancer, load_iris

from skode._marginals.preprocessing import fit_preprocessing

KINDS = ["auto", "normal", None]
N = 600


def draw(name, n=N, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "normal": rng.normal(5.0, 3.0, n),
        "lognormal": np.exp(rng.standard_normal(n)),
        "cauchy": rng.standard_cauchy(n),
        "t": -40 + 1e-3 * rng.standard_t(2, n),
        "uniform": rng.uniform(7, 8, n),
        "exponential": rng.exponential(1e4, n),
        "two modes": np.where(rng.random(n) < 0.3, 0.0, 9.0) + rng.standard_normal(n),
        "half zeros": np.where(rng.random(n) < 0.5, 0.0, rng.gamma(3.0, 20.0, n)),
        "grades": rng.binomial(5, 0.5, n) + 3.0,
        "rounded": np.round(rng.normal(3.3, 0.15, n), 2),
        "binary": np.where(rng.random(n) < 0.4, -0.0446, 0.0507),
        "large": 1e9 + rng.standard_normal(n),
    }[name]


NAMES = ["normal", "lognormal", "cauchy", "t", "uniform", "exponential"]
NAMES += ["two modes", "half zeros", "grades", "rounded", "binary", "large"]
every_column = pytest.mark.parametrize("name", NAMES)
every_kind = pytest.mark.parametrize("kind", KINDS)


def fitted(X, kind="auto", weight=None, **options):
    X = X if X.ndim == 2 else X[:, None]
    weight = np.ones(len(X)) if weight is None else weight
    return fit_preprocessing(X, weight, kind, **options)


def nats(preprocessing, X):
    """Log-density of rows under independent normal scores."""
    Z, log_det = preprocessing.forward(X if X.ndim == 2 else X[:, None])
    return norm.logpdf(Z).sum(axis=1) + log_det


def table(n=N, seed=0):
    """One column of each sort, with dependence between them."""
    X = np.column_stack([draw(name, n, seed) for name in NAMES])
    X[:, 1] += X[:, 0] ** 2
    X[:, 4] += X[:, 8]
    return X


# ----------------------------------------------------------------- there and back


@every_kind
@pytest.mark.parametrize("standardize", [True, False])
def test_rows_come_back(kind, standardize):
    X = table()
    it = fitted(X, kind, standardize=standardize)
    back = it.inverse(it.forward(X)[0])
    error = np.abs(back - X) / (np.abs(X) + X.std(axis=0))
    assert error.max() < 1e-10


@every_kind
def test_scores_come_back(kind):
    it = fitted(table(), kind)
    Z = np.random.default_rng(1).standard_normal((300, len(NAMES)))
    np.testing.assert_allclose(it.forward(it.inverse(Z))[0], Z, atol=1e-5)


@every_kind
@pytest.mark.parametrize("standardize", [True, False])
def test_determinant_against_differences(kind, standardize):
    X = table()[:, [0, 1, 2, 4, 6, 7]]
    it = fitted(X, kind, standardize=standardize)
    points = it.jitter(X[:40], np.random.default_rng(2))
    step = 1e-7 * X.std(axis=0)
    step[2] = 1e-6  # a Cauchy's standard deviation is no measure of it
    _, log_det = it.forward(points)
    jacobian = np.stack(
        [
            (it.forward(points + h * e)[0] - it.forward(points - h * e)[0]) / (2 * h)
            for h, e in zip(step, np.eye(6), strict=True)
        ],
        axis=2,
    )
    np.testing.assert_allclose(np.linalg.slogdet(jacobian)[1], log_det, atol=1e-4)


@every_column
@every_kind
def test_density_integrates_to_one(name, kind):
    x = draw(name)
    it = fitted(x, kind)
    # Where the mass is, and dense there: quantiles of the density itself.
    z = np.linspace(-9, 9, 100_001)
    grid = it.inverse(z[:, None])[:, 0]
    grid, first = np.unique(grid, return_index=True)
    density = np.exp(nats(it, grid))
    total = np.sum(0.5 * (density[1:] + density[:-1]) * np.diff(grid))
    assert len(first) > 1000
    assert total == pytest.approx(1, abs=2e-3)


# ------------------------------------------------------------------------- tails


@every_column
@every_kind
def test_far_out_all_is_finite_and_orderly(name, kind):
    x = draw(name)
    it = fitted(x, kind)
    far = x.mean() + x.std() * np.array([-1e30, -1e6, -1e3, -10, 10, 1e3, 1e6, 1e30])
    Z, log_det = it.forward(far[:, None])
    assert np.isfinite(Z).all() and np.isfinite(log_det).all()
    assert (np.diff(Z[:, 0]) > 0).all()
    scores = nats(it, far)
    assert (np.diff(scores[:4]) > 0).all() and (np.diff(scores[4:]) < 0).all()


@every_column
def test_the_largest_of_float32_comes_back(name):
    x = draw(name)
    it = fitted(x)
    far = np.array([[-3e38], [-1e20], [1e20], [3e38]])
    back = it.inverse(it.forward(far)[0])
    np.testing.assert_allclose(back, far, rtol=1e-9)


def test_no_number_of_float64_is_an_error():
    it = fitted(table())
    rows = np.full((2, len(NAMES)), np.finfo(float).max) * [[1], [-1]]
    Z, log_det = it.forward(rows)
    assert np.isfinite(Z).all() and np.isfinite(log_det).all()
    wild = it.inverse(np.array([[1e4], [-1e4]]) * np.ones(len(NAMES)))
    assert np.isfinite(wild).all()


# ---------------------------------------------------------------- what is mapped


@pytest.mark.parametrize("seed", range(5))
def test_a_normal_column_stays_as_it_is(seed):
    x = draw("normal", seed=seed)
    (column,) = fitted(x).columns
    assert column.affine
    assert (column.axis.location, column.axis.scale) == pytest.approx(
        (x.mean(), x.std())
    )


@pytest.mark.parametrize("name", sorted({*NAMES} - {"normal", "rounded", "large"}))
def test_other_columns_are_mapped_and_gain(name):
    x, new = draw(name), draw(name, seed=1)
    auto, plain = fitted(x), fitted(x, None)
    assert not auto.columns[0].affine
    assert nats(auto, new).mean() > nats(plain, new).mean() + 0.02


def test_none_is_mean_and_standard_deviation():
    X = table()
    it = fitted(X, None)
    assert all(column.affine for column in it.columns)
    covariance = np.cov(it.forward(X)[0], rowvar=False)
    np.testing.assert_allclose(covariance, np.eye(len(NAMES)), atol=0.1)


@pytest.mark.parametrize(
    ("name", "entropy"),
    [
        ("normal", 0.5 * np.log(2 * np.pi * np.e) + np.log(3.0)),
        ("lognormal", 0.5 * np.log(2 * np.pi * np.e)),
        ("cauchy", np.log(4 * np.pi)),
        ("uniform", 0.0),
        ("exponential", 1 + np.log(1e4)),
    ],
)
def test_nats_are_near_the_truth(name, entropy):
    # Of many rows, "auto" leaves a uniform column to the flow.
    it = fitted(draw(name, 3000), "normal")
    assert nats(it, draw(name, 20_000, seed=1)).mean() == pytest.approx(
        -entropy, abs=0.1
    )


def test_without_standardize_and_marginals_rows_stay_as_they_are():
    X = table()
    Z, log_det = fitted(X, None, standardize=False).forward(X)
    assert np.array_equal(Z, X) and not log_det.any()


def test_without_standardize_normal_columns_stay_as_they_are():
    X = np.column_stack([draw("normal"), draw("lognormal")])
    Z, _ = fitted(X, standardize=False).forward(X)
    assert np.array_equal(Z[:, 0], X[:, 0])
    assert abs(Z[:, 1].mean()) < 0.05


@every_kind
def test_units_do_not_matter(kind):
    X = table()
    scale, shift = np.geomspace(1e-3, 1e3, len(NAMES)), np.arange(len(NAMES))
    one, other = fitted(X, kind), fitted(X * scale + shift, kind)
    np.testing.assert_allclose(
        nats(other, X * scale + shift) + np.log(scale).sum(), nats(one, X), rtol=1e-4
    )


@every_kind
def test_the_order_of_rows_and_columns_does_not_matter(kind):
    X = table()
    rng = np.random.default_rng(3)
    rows, columns = rng.permutation(len(X)), rng.permutation(X.shape[1])
    one, other = fitted(X, kind), fitted(X[rows][:, columns], kind)
    Z = one.forward(X)[0][:, columns]
    np.testing.assert_allclose(other.forward(X[:, columns])[0], Z, atol=1e-6)


# ----------------------------------------------------------------------- weights


def test_weights_that_sum_to_one_are_no_error():
    X = table()
    assert np.isfinite(nats(fitted(X, weight=np.full(N, 1 / N)), X)).all()


@every_kind
def test_a_weight_is_a_repetition(kind):
    X = table(200)
    weight = np.random.default_rng(4).integers(0, 4, len(X))
    one = fitted(X, kind, weight.astype(float))
    other = fitted(np.repeat(X, weight, axis=0), kind)
    np.testing.assert_allclose(nats(one, X), nats(other, X), rtol=1e-6)


# ------------------------------------------------------------------------- atoms


def test_an_atom_is_found_where_many_rows_are():
    (column,) = fitted(draw("half zeros")).columns
    assert column.atoms.tolist() == [0.0]
    (column,) = fitted(draw("grades")).columns
    assert column.atoms.tolist() == [3, 4, 5, 6, 7, 8]
    assert column.atom_width == pytest.approx(1 / 20)


@pytest.mark.parametrize("name", ["normal", "rounded", "uniform", "cauchy"])
def test_rounding_makes_no_atoms(name):
    assert not len(fitted(draw(name)).columns[0].atoms)


def test_a_density_at_an_atom_is_its_share_over_its_width():
    x = draw("half zeros")
    it = fitted(x)
    width = it.columns[0].atom_width
    expected = np.log((x == 0).mean() * norm.pdf(0) / width)
    assert nats(it, np.zeros(1))[0] == pytest.approx(expected, abs=0.05)


def test_jitter_fills_the_scores_of_an_atom():
    x = draw("half zeros")[:, None]
    it = fitted(x)
    moved = it.jitter(x, np.random.default_rng(5))
    assert len(np.unique(moved)) == len(moved)
    assert np.array_equal(moved[x != 0], x[x != 0])
    assert moved[x == 0].std() == pytest.approx(it.columns[0].atom_width, rel=0.1)
    Z = np.sort(it.forward(moved)[0][:, 0])
    ideal = norm.ppf((np.arange(N) + 0.5) / N)
    assert np.abs(Z - ideal).mean() < 0.1


def test_jitter_knows_atoms_in_float32():
    x = draw("binary").astype(np.float32)[:, None]
    it = fitted(x)
    moved = it.jitter(x, np.random.default_rng(5))
    assert len(np.unique(moved)) == len(moved)


def test_jitter_leaves_the_rest_alone():
    x = draw("lognormal")[:, None]
    assert np.array_equal(fitted(x).jitter(x, np.random.default_rng(5)), x)


def test_dequantized_columns_have_probabilities_of_integers():
    X = np.column_stack([draw("grades"), draw("lognormal")])
    it = fitted(X, dequantize=True)
    first, second = it.columns
    assert (first.cell, second.cell) == (1.0, 0.0)
    moved = it.jitter(X, np.random.default_rng(6))
    assert (np.rint(moved[:, 0]) == X[:, 0]).mean() > 0.98
    assert np.array_equal(moved[:, 1], X[:, 1])
    alone = fitted(X[:, 0], dequantize=True)
    counts = np.bincount(X[:, 0].astype(int), minlength=9)[3:] / N
    density = np.exp(nats(alone, np.arange(3.0, 9.0)))
    np.testing.assert_allclose(density, counts, atol=0.005)


def integers(name, n=1000):
    rng = np.random.default_rng(0)
    family, value = name.split()
    if family == "poisson":
        return rng.poisson(float(value), (n, 1)).astype(float)
    return (rng.random((n, 1)) < float(value)).astype(float)


INTEGERS = [f"poisson {rate}" for rate in (0.1, 0.5, 1, 3, 8, 20)]
INTEGERS += ["binary 0", "binary 0.5", "binary 0.9", "binary 0.999"]


@pytest.mark.parametrize("kind", ["auto", "normal"])
@pytest.mark.parametrize("name", INTEGERS)
def test_probabilities_of_integers_sum_to_one(name, kind):
    X = integers(name)
    it = fitted(X, kind, dequantize=True)
    values = np.arange(-60.0, 120.0)
    density = np.exp(nats(it, values))
    assert density.sum() == pytest.approx(1, abs=0.01)
    share = (values == X).mean(axis=0)
    often = share > 0.05
    np.testing.assert_allclose(density[often], share[often], rtol=0.02)


@pytest.mark.parametrize("name", INTEGERS)
def test_normal_scores_settle_to_the_share_of_each_integer(name):
    X = integers(name)
    it = fitted(X, dequantize=True)
    moved = it.jitter(X, np.random.default_rng(1))
    assert len(np.unique(moved)) == len(moved)
    assert (it.settle(moved) == X).mean() > 0.98
    Z = np.sort(it.forward(moved)[0][:, 0])
    ideal = norm.ppf((np.arange(len(X)) + 0.5) / len(X))
    assert np.abs(Z - ideal).mean() < 0.1
    drawn = it.settle(it.inverse(ideal[:, None]))
    values = np.arange(60.0)
    lost = (values == X).mean(axis=0) - (drawn == values).mean(axis=0)
    assert np.abs(lost).sum() < 0.04


def test_an_integer_in_half_the_rows_stands_out_among_many():
    rng = np.random.default_rng(0)
    X = np.where(rng.random(N) < 0.5, 0, rng.poisson(rng.gamma(3, 30, N)))[:, None]
    it = fitted(X, dequantize=True)
    assert np.array_equal(it.columns[0].atoms, [0.0])
    density = np.exp(nats(it, np.arange(-2000.0, 4000.0)))
    assert density.sum() == pytest.approx(1, abs=0.02)
    assert density[2000] == pytest.approx((X == 0).mean(), rel=0.03)
    moved = it.jitter(X, rng)
    assert len(np.unique(moved)) == len(moved)
    assert (it.settle(moved) == X).mean() > 0.98


def test_huge_integers_are_as_good_as_reals():
    X = np.tile([[0.0], [3e12]], (50, 1))
    it = fitted(X, dequantize=True)
    assert not len(it.columns[0].atoms)
    assert np.isfinite(it.forward(X)[0]).all()


def test_settle_undoes_jitter():
    X = np.column_stack([draw("half zeros"), draw("grades"), draw("normal")])
    for dequantize in (False, True):
        it = fitted(X, dequantize=dequantize)
        settled = it.settle(it.jitter(X, np.random.default_rng(8)))
        assert np.array_equal(settled[:, 2], X[:, 2])
        assert (settled == X).mean() > 0.98
    rows = fitted(X, None, standardize=False).settle(X)
    assert np.array_equal(rows, X)


def test_rows_beside_the_atoms_keep_their_share():
    x = np.repeat([0.0, 0.3, 1.0, 1.7, 90.0], [400, 7, 550, 6, 8])
    it = fitted(x)
    assert it.columns[0].atoms.tolist() == [0, 0.3, 1, 1.7, 90]  # few values: all
    x = np.concatenate([x, np.linspace(2, 80, 120) ** 1.01])
    it = fitted(x)
    assert it.columns[0].atoms.tolist() == [0, 1]
    x = np.concatenate([np.zeros(500), np.arange(4) * 1.1, np.full(600, 9.0)])
    it = fitted(np.tile(x, 1), weight=np.full(len(x), 0.03))
    for fit in (it, fitted(x)):
        total = np.exp(fit.columns[0].mixture.log_weight).sum()
        assert total == pytest.approx(1)


# ------------------------------------------------- columns that have no density


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@every_kind
def test_totals_and_codes_are_named_behind_maps(kind, dtype):
    rng = np.random.default_rng(0)
    parts = rng.lognormal(size=(N, 3))
    codes = np.eye(3)[rng.integers(0, 3, N)]
    X = np.column_stack([parts, 1e-3 * parts.sum(axis=1), draw("cauchy"), codes])
    with pytest.warns(UserWarning, match="Columns 0, 1, 2, 3, 5, ... of X: each"):
        it = fitted(X.astype(dtype), kind)
    assert np.isfinite(nats(it, X)).all()
    if kind is not None:  # codes that stand for cells have probabilities
        fitted(codes, kind, dequantize=True)


def test_rows_far_out_are_no_dependence():
    X = np.random.default_rng(0).standard_cauchy((N, 3))
    X[0] = 1e9
    fitted(X)


@every_kind
def test_a_constant_column_is_named(kind):
    X = np.column_stack([draw("normal"), np.full(N, 7.0), draw("lognormal")])
    with pytest.warns(UserWarning, match="Column 1 of X: constant"):
        it = fitted(X, kind)
    assert np.isfinite(nats(it, X)).all()
    moved = it.jitter(X, np.random.default_rng(7))
    np.testing.assert_allclose(it.forward(moved)[0].std(axis=0), 1, atol=0.12)
    other = X.copy()
    other[:, 1] = 8.0
    assert (nats(it, other) < nats(it, X) - 1000).all()


@every_kind
def test_columns_that_repeat_others_are_named(kind):
    x, y = draw("normal"), draw("normal", seed=1)
    X = np.column_stack([x, y, draw("lognormal"), 3 * x - 2 * y])
    with pytest.warns(UserWarning, match="Columns 0, 1, 3 of X: each follows"):
        it = fitted(X, kind)
    assert np.isfinite(nats(it, X)).all()
    moved = it.jitter(X, np.random.default_rng(7))
    spread = np.linalg.eigvalsh(np.cov(it.forward(moved)[0], rowvar=False))
    np.testing.assert_allclose(spread, 1, atol=0.2)
    broken = X + np.array([0, 0, 0, 1])
    assert (nats(it, broken) < nats(it, X) - 1000).all()


@every_kind
@pytest.mark.parametrize("n", [5, 20, 30, 50])
def test_few_rows_for_the_columns(kind, n):
    X, new = (np.random.default_rng(s).normal(2, 3, (200, 20)) for s in (0, 1))
    few = r"rows and 20 columns, too few"
    with pytest.warns(UserWarning, match=few) if n <= 20 else nullcontext():
        it = fitted(X[:n], kind)
    assert np.isfinite(nats(it, X)).all()
    truth = norm.logpdf(new, 2, 3).sum(axis=1).mean()
    assert n == 5 or nats(it, new).mean() > truth - 15


@pytest.mark.parametrize("n", [30, 70, 120, 400])
def test_noise_in_the_spectrum_is_taken_out(n):
    """Of a white table all scores have the spread that the rows show, and no more."""
    X = np.random.default_rng(0).standard_normal((n, 40))
    with pytest.warns(UserWarning, match="too few") if n <= 40 else nullcontext():
        it = fitted(X, None)
    spread = np.linalg.eigvalsh(it.colouring @ it.colouring)
    assert spread.min() > 0.7 and spread.max() < 1.5
    assert it.log_det == pytest.approx(-0.5 * np.log(spread).sum())
    sample = np.linalg.eigvalsh(np.cov(X, rowvar=False))
    assert sample.min() < 0.7 and sample.max() > 1.5


def test_narrow_directions_are_kept_where_rows_are_many():
    X = np.random.default_rng(0).standard_normal((2000, 5))
    X[:, 4] = X[:, 0] + 0.01 * X[:, 4]
    covariance = np.cov(fitted(X, None).forward(X)[0], rowvar=False)
    np.testing.assert_allclose(covariance, np.eye(5), atol=0.05)


def test_an_overflowing_range_is_an_error():
    X = np.column_stack([draw("normal")[:2], [-1.7e308, 1.7e308]])
    with pytest.raises(ValueError, match="Column 1 of X: the range"):
        fitted(X)


numbers = st.floats(-(2.0**100), 2.0**100, width=32) | st.sampled_from(
    [0.0, 1.0, 0.5, -1e9]
)


@given(
    X=arrays(
        np.float32, st.tuples(st.integers(1, 40), st.integers(1, 3)), elements=numbers
    ),
    kind=st.sampled_from(KINDS),
    dequantize=st.booleans(),
    seed=st.integers(0, 9),
)
@settings(max_examples=200, deadline=None)
def test_ugly_columns_never_give_nan(X, kind, dequantize, seed):
    weight = np.random.default_rng(seed).exponential(size=len(X))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", UserWarning)
        it = fitted(X, kind, weight, dequantize=dequantize)
        for column in it.columns:
            assert np.exp(column.mixture.log_weight).sum() == pytest.approx(1)
        moved = it.jitter(X, np.random.default_rng(seed))
        for rows in (X, moved, it.inverse(np.ones(X.shape))):
            Z, log_det = it.forward(rows)
            assert np.isfinite(Z).all() and np.isfinite(log_det).all()


# -------------------------------------------------------------------- and so on


def test_pickle():
    X = table()
    it = fitted(X)
    copy = pickle.loads(pickle.dumps(it))
    assert np.array_equal(copy.forward(X)[0], it.forward(X)[0])
    assert np.array_equal(copy.inverse(X), it.inverse(X))


@pytest.mark.parametrize(
    ("load", "least"), [(load_iris, -2.9), (load_breast_cancer, 0.0)]
)
def test_rows_that_were_not_seen(load, least):
    """Marginals and a normal copula alone are a good density of small tables."""
    X = load().data
    X = (X - X.mean(axis=0)) / X.std(axis=0)
    order = np.random.default_rng(0).permutation(len(X))
    seen, new = np.split(X[order], [int(0.8 * len(X))])
    assert nats(fitted(seen), new).mean() > least


@pytest.mark.parametrize(("n_rows", "mapped"), [(300, True), (9000, False)])
def test_several_modes_are_left_to_the_flow_where_rows_are_many(n_rows, mapped):
    rng = np.random.default_rng(0)
    x = np.where(rng.random(n_rows) < 0.5, -2.0, 2.0) + rng.normal(size=n_rows)
    assert fitted(x).columns[0].affine is not mapped
    assert not fitted(x, "normal").columns[0].affine
