"""The table that a density is trained on: distinct rows, redrawn, and some held out.

A service of the front room: from arrays of numbers to tensors. n rows, D columns.
"""

import numpy as np

from skode._border import to_tensor, torch_dtype
from skode._nn.flow_training import Batch, Table
from skode._parameters import hold_out, holds_out

__all__ = ["smoothing", "training_table"]

_COPIES, _MOST_NUMBERS = 4, 20_000_000
"""Redrawn copies of a table with atoms, among which each batch chooses, as long as they
are no more numbers than that."""
_MOST_REPEATED = 4096
"""Equal rows of such a table are as many rows of each copy, up to so many in all."""
_HOLD_OUT_FROM = 100
_NOISY_ROWS, _LEAST_NOISE, _MOST_NOISE = 55.0, 0.008, 0.5


def training_table(est, X, context, weight, device, generator, early_stopping):
    """Return the table to train on, and the rows held out, or None; both whitened."""
    dtype = torch_dtype(est.dtype, X)
    seed, held = generator.initial_seed(), None
    index, weight = _distinct(X, context, weight)
    noise = _noise(est, weight)

    def tensors(rows, weight):
        given = None if context is None else to_tensor(context[rows], device, dtype)
        share = weight / weight.mean()
        return given, to_tensor(share, device, dtype)

    forward = est.preprocessing_.forward
    # Of equal rows, none can be held out from the others: they count once, and so a
    # weight is still a number of rows.
    if holds_out(early_stopping, len(index), _HOLD_OUT_FROM):
        train_rows, held_rows = hold_out(est, len(index), seed)
        index, held_index = index[train_rows], index[held_rows]
        x = to_tensor(forward(X[held_index])[0], device, dtype)
        held = Batch(x, *tensors(held_index, weight[held_index]))
    index, weight = _repeated(est, X, index, weight[index])
    copies = _copies(est, X[index], seed)
    x = to_tensor(copies, device, dtype)
    covariates = context is not None and est._conditions.labels is None
    context_noise = noise if covariates else 0.0
    return Table(x, *tensors(index, weight), noise, context_noise, generator), held


def _distinct(X, context, weight):
    """Return indices of rows that differ, and the weights of all that are the same.

    Noise is drawn for each row of a table. With one row for all that are the same, in
    one order, a weight is exactly a number of rows, also for what noise makes of it.
    """
    counts = np.flatnonzero(weight > 0)
    rows = X if context is None else np.hstack([X, context])
    _, first, same = np.unique(
        rows[counts], axis=0, return_index=True, return_inverse=True
    )
    total = np.zeros(len(X))
    total[counts[first]] = np.bincount(same, weight[counts])
    return counts[first], total


def _repeated(est, X, index, weight):
    """Return indices and weights of rows, several times where they are redrawn.

    `weight` is that of the rows at `index`. A few integers are all there is of a large
    table, and with one draw from each a batch would tell little of their intervals.
    """
    times = np.ceil(weight * min(1.0, _MOST_REPEATED / weight.sum())).astype(int)
    rows = X[index]
    moved = est.preprocessing_.jitter(rows, np.random.default_rng(0)) != rows
    times[~moved.any(axis=1)] = 1
    return np.repeat(index, times), np.repeat(weight / times, times)


def _copies(est, rows, seed):
    """Return the whitened rows, redrawn where their values stand for intervals.

    (1, n, D) if none do.
    """
    preprocessing, rng = est.preprocessing_, np.random.default_rng(seed)
    if np.array_equal(preprocessing.jitter(rows, rng), rows):
        return preprocessing.forward(rows)[0][None]
    times = max(1, min(_COPIES, _MOST_NUMBERS // rows.size))
    drawn = preprocessing.jitter(np.tile(rows, (times, 1)), rng)
    return preprocessing.forward(drawn)[0].reshape(times, *rows.shape)


def _noise(est, weight):
    """Return the standard deviation of the noise, in whitened units."""
    if est.noise != "auto":
        return est.noise
    few = (_NOISY_ROWS / weight.sum()) ** 2
    return min(_MOST_NOISE, _LEAST_NOISE + 0.5 * smoothing(est, weight) + few)


def smoothing(est, weight):
    """Return the rate at which the error of a density estimate falls with the rows.

    n^(-4 / (4 + D)), that of the best kernel density estimate in D dimensions, those of
    covariates among them. Few rows in many columns ask for strong regularisation, many
    in few for none.
    """
    field = est.module_.field
    return weight.sum() ** (-4 / (4 + field.dim + field.context))
