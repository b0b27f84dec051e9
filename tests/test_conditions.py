"""What a conditional density is given, as numbers."""

import numpy as np
import pytest

from skode._conditions import Conditions

LABELS = [
    np.array(["b", "a", "c", "a"]),
    np.array(["b", "a", "c", "a"], dtype=object),
    np.array([True, False, True, True]),
    np.array([7, -3, 5, 7]),
    np.array([7, 3, 5, 7], dtype=np.uint8),
]
each_label = pytest.mark.parametrize("y", LABELS, ids=lambda y: y.dtype.name)


def conditions_of(y, weight=None):
    return Conditions.of(y, np.ones(len(y)) if weight is None else weight)


@each_label
def test_labels_become_unit_vectors(y):
    conditions = conditions_of(y)
    codes = conditions.encode(y, len(y))
    assert codes.shape == (4, len(np.unique(y))) and codes.dtype == np.float64
    assert list(conditions.labels) == sorted(set(y.tolist()))
    assert np.array_equal(conditions.labels[codes.argmax(axis=1)], y)
    assert np.array_equal(codes.sum(axis=1), np.ones(4))


@pytest.mark.parametrize("shape", [(50,), (50, 1), (50, 3)])
def test_covariates_are_standardised(shape):
    y = np.random.default_rng(0).normal(1e3, 20, shape)
    codes = conditions_of(y).encode(y, 50)
    assert codes.shape == (50, 1 if len(shape) == 1 else shape[1])
    np.testing.assert_allclose(codes.mean(axis=0), 0, atol=1e-9)
    np.testing.assert_allclose(codes.std(axis=0), 1, rtol=1e-9)


def test_integers_in_columns_are_covariates():
    y = np.arange(12).reshape(6, 2)
    conditions = conditions_of(y)
    assert conditions.labels is None and conditions.encode(y, 6).shape == (6, 2)


def test_weights_count_rows_of_covariates():
    y, times = np.array([0.0, 1.0, 5.0, 9.0]), np.array([1, 0, 3, 2])
    weighted = conditions_of(y, times.astype(float))
    repeated = conditions_of(y.repeat(times))
    np.testing.assert_allclose(weighted.encode(y, 4), repeated.encode(y, 4))


def test_a_constant_covariate_is_zero():
    y = np.full((5, 1), 3.7)
    assert not conditions_of(y).encode(y, 5).any()


def test_one_condition_stands_for_all_rows():
    labels = conditions_of(LABELS[0])
    assert list(labels.repeated("a", 3)) == ["a", "a", "a"]
    assert list(labels.repeated(["a", "b"], 2)) == ["a", "b"]
    one = conditions_of(np.arange(4.0))
    assert np.array_equal(one.repeated(2.0, 3), np.full(3, 2.0))
    assert np.array_equal(one.repeated([1.0, 2.0], 2), [1.0, 2.0])
    two = conditions_of(np.arange(8.0).reshape(4, 2))
    assert two.encode(two.repeated([1.0, 2.0], 3), 3).shape == (3, 2)
    assert np.array_equal(two.repeated(np.eye(2), 2), np.eye(2))


def test_a_missing_y_is_told_with_a_remedy():
    with pytest.raises(ValueError, match="pass y, a vector of labels, or covariates"):
        Conditions.of(None, np.ones(3))


@pytest.mark.parametrize("y", [[1, 2], 3.0])
def test_another_length_is_an_error(y):
    with pytest.raises(ValueError, match="one entry for each of 3 rows"):
        Conditions.of(y, np.ones(3))
    with pytest.raises(ValueError, match="one entry for each of 3 rows"):
        conditions_of(np.arange(4.0)).encode(y, 3)


def test_unknown_labels_are_named():
    with pytest.raises(ValueError, match=r"labels \['z'\] .* \['a', 'b', 'c'\]"):
        conditions_of(LABELS[0]).encode(["a", "z"], 2)


def test_labels_are_told_as_python_has_them():
    conditions = conditions_of(np.array([np.str_("a")], dtype=object))
    with pytest.raises(ValueError, match=r"labels \['z'\] .* \['a'\]"):
        conditions.encode(np.array([np.str_("z")], dtype=object), 1)


def test_another_number_of_covariates_is_an_error():
    with pytest.raises(ValueError, match=r"2 covariates, .* fitted given 3"):
        conditions_of(np.ones((4, 3))).encode(np.ones((4, 2)), 4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_covariates_must_be_finite(bad):
    y = np.array([0.0, bad, 1.0])
    with pytest.raises(ValueError, match="NaN or infinity: drop or fill"):
        conditions_of(y)
    with pytest.raises(ValueError, match="NaN or infinity: drop or fill"):
        conditions_of(np.arange(3.0)).encode(y, 3)


def test_words_among_covariates_are_an_error():
    with pytest.raises(ValueError, match="labels go into a vector of their own"):
        conditions_of(np.array([["a", "1"], ["b", "2"]]))


def test_words_for_a_label_among_numbers_are_unknown():
    with pytest.raises(ValueError, match="not there in fit"):
        conditions_of(np.array([1, 2, 3])).encode(["a"], 1)


@pytest.mark.parametrize(
    "y", [["a", None, "b"], ["a", 1, "b"], [1, np.nan, 2], ["a", np.nan, "b"]]
)
def test_missing_and_mixed_labels_are_an_error(y):
    y = np.array(y, dtype=object)
    with pytest.raises(ValueError, match=r"one kind.*: drop or fill"):
        conditions_of(y)
    with pytest.raises(ValueError, match=r"one kind.*: drop or fill"):
        conditions_of(np.array(["a", "b", "b"], dtype=object)).encode(y, 3)


def test_labels_are_a_vector():
    known = Conditions.of(np.array(["a", "b"]), np.ones(2))
    with pytest.raises(ValueError, match="must be a vector"):
        known.encode(np.array([["a"], ["b"]]), 2)


def test_a_constant_covariate_has_no_spread_by_rounding():
    weight = np.random.default_rng(1).random(333)
    known = conditions_of(np.full(333, 0.1), weight)
    np.testing.assert_allclose(known.encode(np.array([0.1, 0.2]), 2), [[0], [0.1]])
