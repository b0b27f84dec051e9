"""The units that a latent ODE computes in."""

import numpy as np
import pytest
import torch

from skode._series.history import History
from skode._units import measure

NAN = np.nan


def history(times, values, covariates=None):
    times = np.asarray(times, dtype=float)
    if covariates is None:
        covariates = np.empty((len(times), 0))
    return History(times[0], times, np.asarray(values), np.asarray(covariates))


ONE = history([5, 9], [[1.0, NAN], [3.0, 7.0]], [[10.0], [20.0]])
OTHER = history([0, 2, 6], [[5.0, 7.0], [NAN, NAN], [7.0, 7.0]], [[0.0], [10], [40]])


def test_moments_are_of_what_was_observed():
    units = measure([ONE, OTHER], True, None)
    np.testing.assert_allclose(units.mean, [4, 7])
    np.testing.assert_allclose(units.std, [np.sqrt(5), 1])
    np.testing.assert_allclose(units.covariate_mean, [16])
    np.testing.assert_allclose(units.covariate_std, [np.std([10, 20, 0, 10, 40])])
    assert units.time == 5  # the median of the spans 4 and 6


@pytest.mark.parametrize(
    ("times", "given", "expected"),
    [([[0, 4], [0, 6]], 3.0, 3.0), ([[0, 4], [1]], None, 4.0), ([[1], [2]], None, 9.0)],
)
def test_the_unit_of_time_is_a_span(times, given, expected):
    series = [history(t, np.zeros((len(t), 1))) for t in times]
    assert measure(series, True, given, otherwise=9.0).time == expected


def test_without_standardising_units_are_the_users():
    units = measure([ONE, OTHER], False, None)
    assert not units.mean.any() and (units.std == 1).all()
    assert not units.covariate_mean.any() and (units.covariate_std == 1).all()


def test_batches_are_in_these_units_and_back():
    units = measure([ONE, OTHER], True, 2.0)
    batch = units.batch([OTHER], torch.device("cpu"), torch.float64)
    assert batch.times.tolist() == [[0, 1, 3]]
    back = units.values(batch.values[0].numpy())
    seen = ~np.isnan(OTHER.values)
    np.testing.assert_allclose(back[seen], OTHER.values[seen])
    assert not batch.values[~batch.mask].any()
    covariates = batch.covariates[0].numpy() * units.covariate_std
    np.testing.assert_allclose(covariates + units.covariate_mean, OTHER.covariates)


def test_a_channel_without_values_has_plain_units():
    units = measure([history([0, 1], [[NAN], [NAN]])], True, None)
    assert units.mean.tolist() == [0] and units.std.tolist() == [1]


def test_overflows_are_told():
    with pytest.raises(ValueError, match="variance overflows: rescale"):
        measure([history([0, 1], [[1e200], [-1e200]])], True, None)
    with pytest.raises(ValueError, match="variance overflows: rescale"):
        covariates = [[1e200], [-1e200]]
        measure([history([0, 1], [[0.0], [1.0]], covariates)], True, None)
