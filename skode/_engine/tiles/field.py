"""The perceptron inside a kernel. N rows of a tile, widths padded to powers of two.

Parameters stand in one vector (`Layers.flat`) and are read as zeros in the padding, so
that what stands in columns of padding reaches no column of the state. WIDTHS, PADDED
and OFFSETS are those of `Shape`.
"""

import triton
import triton.language as tl


@triton.jit
def any_of(mask):
    """Return 1 if an entry of the mask (N,) is set, else 0."""
    return tl.max(mask.to(tl.int32), axis=0)


@triton.jit
def length(x):
    """Return the Euclidean norm (N,) of rows (N, D)."""
    return tl.sqrt(tl.sum(x * x, axis=1))


@triton.jit
def finite(x):
    """Return which rows of x (N, D) are finite."""
    return tl.sum((tl.abs(x) < float("inf")).to(tl.int32), axis=1) == x.shape[1]


@triton.jit
def weighted(parts, weights: tl.constexpr, count: tl.constexpr):
    """Return sum_j weights_j parts_j of the first `count` parts, (N, D)."""
    total = parts[0] * weights[0]
    for j in tl.static_range(1, count):
        if weights[j] != 0.0:
            total += parts[j] * weights[j]
    return total


@triton.jit
def summed(parts):
    """Return the sum of all parts, (N, D)."""
    total = parts[0]
    for j in tl.static_range(1, len(parts)):
        total += parts[j]
    return total


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tanh(x):
    """Return tanh x; by its odd series where the quotient would cancel.

    The polynomial is a least-squares fit over |x| <= 0.6, good to one rounding.
    """
    size = tl.abs(x)
    square = x * x
    series = -5.893945303310235e-3 * square + 2.0794617710165463e-2
    series = series * square - 5.3783293000347086e-2
    series = series * square + 1.3331915298815317e-1
    series = series * square - 3.3333297510128657e-1
    small = x + x * (square * series)
    large = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    large = tl.where(x < 0.0, -large, large)
    # Comparing this way round leaves NaN to the quotient, which passes it on.
    return tl.where(size < 0.6, small, large)


@triton.jit
def _softplus(x):
    """Return log(1 + e^x) without overflow, and without losing small e^x."""
    small = tl.exp(-tl.abs(x))
    above = 1.0 + small
    # log(1 + s) = log(w) s / (w - 1) for the rounded w = 1 + s (Kahan).
    rest = tl.where(above == 1.0, small, tl.log(above) * (small / (above - 1.0)))
    # NaN fails the comparison and stays NaN.
    return tl.where(x < 0.0, rest, x + rest)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Return the activation of x."""
    if ACTIVATION == "tanh":
        value = _tanh(x)
    elif ACTIVATION == "softplus":
        value = _softplus(x)
    elif ACTIVATION == "silu":
        value = x * _sigmoid(x)
    else:
        tl.static_assert(ACTIVATION == "relu", "unknown activation")
        value = tl.where(x < 0.0, 0.0, x)
    return value


@triton.jit
def activate_with_slope(x, ACTIVATION: tl.constexpr):
    """Return the activation of x and its derivative."""
    if ACTIVATION == "tanh":
        value = _tanh(x)
        slope = 1.0 - value * value
    elif ACTIVATION == "softplus":
        value = _softplus(x)
        slope = _sigmoid(x)
    elif ACTIVATION == "silu":
        slope = _sigmoid(x)
        value = x * slope
        slope = slope + value * (1.0 - slope)
    else:
        tl.static_assert(ACTIVATION == "relu", "unknown activation")
        value = tl.where(x < 0.0, 0.0, x)
        slope = tl.where(x > 0.0, 1.0, 0.0)
    return value, slope


@triton.jit
def matrix(
    flat,
    START: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED_ROWS: tl.constexpr,
    PADDED_COLUMNS: tl.constexpr,
):
    """Return a weight as (rows, columns), padded by zeros."""
    row = tl.arange(0, PADDED_ROWS)[:, None]
    column = tl.arange(0, PADDED_COLUMNS)[None, :]
    at = flat + START + row * COLUMNS + column
    if ROWS == PADDED_ROWS and COLUMNS == PADDED_COLUMNS:
        return tl.load(at)
    return tl.load(at, mask=(row < ROWS) & (column < COLUMNS), other=0.0)


@triton.jit
def transposed(
    flat,
    START: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED_ROWS: tl.constexpr,
    PADDED_COLUMNS: tl.constexpr,
):
    """Return a weight as (columns, rows), padded by zeros."""
    row = tl.arange(0, PADDED_ROWS)[None, :]
    column = tl.arange(0, PADDED_COLUMNS)[:, None]
    at = flat + START + row * COLUMNS + column
    if ROWS == PADDED_ROWS and COLUMNS == PADDED_COLUMNS:
        return tl.load(at)
    return tl.load(at, mask=(row < ROWS) & (column < COLUMNS), other=0.0)


@triton.jit
def vector(flat, START: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Return a bias or shift, padded by zeros."""
    at = tl.arange(0, PADDED)
    if SIZE == PADDED:
        return tl.load(flat + START + at)
    return tl.load(flat + START + at, mask=at < SIZE, other=0.0)


@triton.jit
def affine(
    flat,
    t,
    x,
    LAYER: tl.constexpr,
    WIDTHS: tl.constexpr,
    PADDED: tl.constexpr,
    OFFSETS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return W x + b + t u of one layer, (N, out)."""
    fan_out: tl.constexpr = WIDTHS[LAYER + 1]
    fan_in: tl.constexpr = WIDTHS[LAYER]
    wide: tl.constexpr = PADDED[LAYER + 1]
    bias = vector(flat, OFFSETS[LAYER][1], fan_out, wide)
    shift = vector(flat, OFFSETS[LAYER][2], fan_out, wide)
    weight = transposed(flat, OFFSETS[LAYER][0], fan_out, fan_in, wide, PADDED[LAYER])
    start = bias[None, :] + t[:, None] * shift[None, :]
    return tl.dot(x, weight, acc=start, input_precision=PRECISION)


@triton.jit
def slope_at(
    flat,
    t,
    y,
    WIDTHS: tl.constexpr,
    PADDED: tl.constexpr,
    OFFSETS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return dy/dt (N, D) at times (N,) and states (N, D)."""
    x = y
    for layer in tl.static_range(len(WIDTHS) - 1):
        x = affine(flat, t, x, layer, WIDTHS, PADDED, OFFSETS, PRECISION)
        if layer + 2 < len(WIDTHS):
            x = activate(x, ACTIVATION)
    return x
