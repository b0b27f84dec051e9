"""Series of different lengths as tensors."""

import numpy as np
import torch

from skode._series.batch import pad
from skode._series.history import History

LONG = History(
    10.0,
    np.array([10.0, 11.0, 15.0]),
    np.array([[1.0, np.nan], [np.nan, np.nan], [3.0, 4.0]]),
    np.array([[0.5], [0.6], [0.7]]),
)
SHORT = LONG.take(slice(1, 2))
EMPTY = LONG.take(slice(0))


def test_padding_repeats_the_last_time():
    batch = pad([LONG, SHORT, EMPTY])
    assert batch.times.tolist() == [[0, 1, 5], [1, 1, 1], [0, 0, 0]]
    assert batch.present.tolist() == [[True] * 3, [True, False, False], [False] * 3]
    assert batch.covariates[:, :, 0].tolist() == [
        [0.5, 0.6, 0.7],
        [0.6, 0.6, 0.6],
        [0.0, 0.0, 0.0],
    ]


def test_what_was_not_observed_is_masked_and_zero():
    batch = pad([SHORT, LONG])
    assert batch.mask[1].tolist() == [[True, False], [False, False], [True, True]]
    assert batch.values[1].tolist() == [[1, 0], [0, 0], [3, 4]]
    assert not batch.mask[0].any() and not batch.values[0].any()


def test_the_repeated_row_is_not_observed_again():
    batch = pad([LONG.take(slice(2, 3)), LONG])
    assert batch.mask[0].tolist() == [[True, True], [False, False], [False, False]]
    assert batch.values[0].tolist() == [[3, 4], [0, 0], [0, 0]]


def test_a_series_reads_the_same_in_every_batch():
    alone, among = pad([SHORT]), pad([EMPTY, SHORT, LONG])
    for name in ("times", "values", "mask", "present", "covariates"):
        assert torch.equal(getattr(alone, name)[0], getattr(among, name)[1, :1])


def test_only_empty_series_have_one_row_that_is_not_there():
    batch = pad([EMPTY, EMPTY])
    assert batch.times.shape == (2, 1) and batch.values.shape == (2, 1, 2)
    assert not batch.present.any()


def test_one_row_and_ten_thousand_fit_one_batch():
    many = np.arange(10_000.0)
    long = History(0.0, many, many[:, None], np.empty((10_000, 0)))
    batch = pad([long.take(slice(1)), long])
    assert batch.values.shape == (2, 10_000, 1) and batch.covariates.shape[2] == 0
    assert batch.present.sum(dim=1).tolist() == [1, 10_000]


def test_numbers_are_in_the_dtype_asked_for():
    for batch in (pad([LONG], torch.float32), pad([LONG]).to(dtype=torch.float32)):
        numbers = (batch.times, batch.values, batch.covariates)
        assert {part.dtype for part in numbers} == {torch.float32}
        assert batch.mask.dtype == batch.present.dtype == torch.bool
    assert pad([LONG]).times.dtype == torch.float64


def test_a_batch_shares_no_memory_with_its_histories():
    batch = pad([LONG])
    batch.times.fill_(7)
    batch.values.fill_(7)
    assert LONG.times.tolist() == [0, 1, 5] and LONG.values[0, 0] == 1
