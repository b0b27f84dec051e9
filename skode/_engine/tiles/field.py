"""The perceptron inside a kernel. N rows of a tile, widths padded to powers of two.

Parameters stand in one vector (`Layers.flat`) and are read as zeros in the padding, so
that what stands in columns of padding reaches no column of the state.

Between layers, activations pass through memory of the program's own, small enough to
stay in the caches of its multiprocessor: matrices go through the registers chunk by
chunk. (Held in registers as a whole, they spill: 26,000 local loads in a step of 20,000
multiplications was what the assembler made of it.) A slot of that memory holds the
inputs of all layers, (N, PADDED[l]) one behind the other: PLACES tells where, in
columns. What one thread writes there another reads, so barriers stand in between.
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
    return tl.min((tl.abs(x) < float("inf")).to(tl.int32), axis=1) > 0


@triton.jit
def weighted(
    table,
    stages,
    cell,
    count,
    MOST: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
):
    """Return sum_j table_j k_j of the first `count` of at most MOST stages, (N, D).

    Unrolled, so that all loads are under way at once.
    """
    total = tl.zeros((N, D), tl.float32)
    for j in tl.static_range(MOST):
        here = j < count
        weight = tl.load(table + j, mask=here, other=0.0)
        total += weight * tl.load(stages + j * N * D + cell, mask=here, other=0.0)
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
def affine(
    flat,
    source,
    time,
    first,
    LAYER: tl.constexpr,
    N: tl.constexpr,
    OUT: tl.constexpr,
    WIDTHS: tl.constexpr,
    PADDED: tl.constexpr,
    OFFSETS: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Return OUT columns of W x + b + t u from column `first` on, for x at `source`."""
    fan_out: tl.constexpr = WIDTHS[LAYER + 1]
    fan_in: tl.constexpr = WIDTHS[LAYER]
    wide: tl.constexpr = PADDED[LAYER]
    # Of exact products every thread holds its share of a chunk in registers.
    chunk: tl.constexpr = 16 if PRECISION == "ieee" else min(32, wide)
    row = tl.arange(0, N)[:, None]
    column = first + tl.arange(0, OUT)
    real = column < fan_out
    bias = tl.load(flat + OFFSETS[LAYER][1] + column, mask=real, other=0.0)
    shift = tl.load(flat + OFFSETS[LAYER][2] + column, mask=real, other=0.0)
    total = bias[None, :] + time[:, None] * shift[None, :]
    weights = flat + OFFSETS[LAYER][0] + column[None, :] * fan_in
    for begin in tl.range(0, wide, chunk, num_stages=DEPTH):
        inner = begin + tl.arange(0, chunk)
        x = tl.load(source + row * wide + inner[None, :])
        mask = real[None, :] & (inner[:, None] < fan_in)
        weight = tl.load(weights + inner[:, None], mask=mask, other=0.0)
        total = tl.dot(x, weight, acc=total, input_precision=PRECISION)
    return total


@triton.jit
def _hidden(
    flat,
    slot,
    slopes,
    time,
    LAYER: tl.constexpr,
    N: tl.constexpr,
    WIDTHS: tl.constexpr,
    PADDED: tl.constexpr,
    PLACES: tl.constexpr,
    OFFSETS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPTH: tl.constexpr,
    REMEMBER: tl.constexpr,
):
    """Fill the slot's next layer from this one."""
    wide: tl.constexpr = PADDED[LAYER + 1]
    part: tl.constexpr = min(128, wide)
    row = tl.arange(0, N)[:, None]
    for first in range(0, wide, part):
        x = affine(
            flat,
            slot + N * PLACES[LAYER],
            time,
            first,
            LAYER,
            N,
            part,
            WIDTHS,
            PADDED,
            OFFSETS,
            PRECISION,
            DEPTH,
        )
        at = N * PLACES[LAYER + 1] + row * wide + first + tl.arange(0, part)[None, :]
        if REMEMBER:
            x, slope = activate_with_slope(x, ACTIVATION)
            tl.store(slopes + at, slope)
        else:
            x = activate(x, ACTIVATION)
        tl.store(slot + at, x)


@triton.jit
def evaluate(
    flat,
    slot,
    slopes,
    time,
    y,
    N: tl.constexpr,
    WIDTHS: tl.constexpr,
    PADDED: tl.constexpr,
    PLACES: tl.constexpr,
    OFFSETS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPTH: tl.constexpr,
    REMEMBER: tl.constexpr,
):
    """Return dy/dt (N, D) at times (N,) and states (N, D); fill the slot.

    If REMEMBER, write the slopes of the activations, too, as `pull` expects them.
    """
    row = tl.arange(0, N)[:, None]
    last: tl.constexpr = len(WIDTHS) - 2
    tl.store(slot + row * PADDED[0] + tl.arange(0, PADDED[0])[None, :], y)
    tl.debug_barrier()
    for layer in tl.static_range(last):
        _hidden(
            flat,
            slot,
            slopes,
            time,
            layer,
            N,
            WIDTHS,
            PADDED,
            PLACES,
            OFFSETS,
            ACTIVATION,
            PRECISION,
            DEPTH,
            REMEMBER,
        )
        tl.debug_barrier()
    return affine(
        flat,
        slot + N * PLACES[last],
        time,
        0,
        last,
        N,
        PADDED[last + 1],
        WIDTHS,
        PADDED,
        OFFSETS,
        PRECISION,
        DEPTH,
    )


@triton.jit
def pull(
    flat,
    deltas,
    N: tl.constexpr,
    WIDTHS: tl.constexpr,
    PADDED: tl.constexpr,
    PLACES: tl.constexpr,
    OFFSETS: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Return v . df/dy (N, D) for the cotangent v that stands first in `deltas`.

    Behind it stand the slopes of the activations, which the cotangents of the layers
    take the place of.
    """
    last: tl.constexpr = len(WIDTHS) - 2
    tl.debug_barrier()
    for n in tl.static_range(last):
        _pull_hidden(
            flat,
            deltas,
            last - n,
            N,
            WIDTHS,
            PADDED,
            PLACES,
            OFFSETS,
            PRECISION,
            DEPTH,
        )
        tl.debug_barrier()
    return _pulled(
        flat,
        deltas,
        0,
        0,
        N,
        PADDED[0],
        WIDTHS,
        PADDED,
        PLACES,
        OFFSETS,
        PRECISION,
        DEPTH,
    )


@triton.jit
def _pull_hidden(
    flat,
    deltas,
    LAYER: tl.constexpr,
    N: tl.constexpr,
    WIDTHS: tl.constexpr,
    PADDED: tl.constexpr,
    PLACES: tl.constexpr,
    OFFSETS: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Turn the slopes at the input of a layer into cotangents."""
    wide: tl.constexpr = PADDED[LAYER]
    part: tl.constexpr = min(128, wide)
    row = tl.arange(0, N)[:, None]
    for first in range(0, wide, part):
        delta = _pulled(
            flat,
            deltas,
            first,
            LAYER,
            N,
            part,
            WIDTHS,
            PADDED,
            PLACES,
            OFFSETS,
            PRECISION,
            DEPTH,
        )
        at = N * PLACES[LAYER] + row * wide + first + tl.arange(0, part)[None, :]
        tl.store(deltas + at, delta * tl.load(deltas + at))


@triton.jit
def _pulled(
    flat,
    deltas,
    first,
    LAYER: tl.constexpr,
    N: tl.constexpr,
    IN: tl.constexpr,
    WIDTHS: tl.constexpr,
    PADDED: tl.constexpr,
    PLACES: tl.constexpr,
    OFFSETS: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Return IN columns of (cotangent of a layer's output) W, from `first` on."""
    fan_out: tl.constexpr = WIDTHS[LAYER + 1]
    fan_in: tl.constexpr = WIDTHS[LAYER]
    wide: tl.constexpr = PADDED[LAYER + 1]
    chunk: tl.constexpr = 16 if PRECISION == "ieee" else min(32, wide)
    row = tl.arange(0, N)[:, None]
    column = first + tl.arange(0, IN)[None, :]
    # The cotangent of the field's value stands in the first place.
    above = deltas + N * PLACES[(LAYER + 1) % (len(WIDTHS) - 1)]
    total = tl.zeros((N, IN), tl.float32)
    for begin in tl.range(0, wide, chunk, num_stages=DEPTH):
        inner = begin + tl.arange(0, chunk)
        delta = tl.load(above + row * wide + inner[None, :])
        mask = (inner[:, None] < fan_out) & (column < fan_in)
        at = flat + OFFSETS[LAYER][0] + inner[:, None] * fan_in + column
        weight = tl.load(at, mask=mask, other=0.0)
        total = tl.dot(delta, weight, acc=total, input_precision=PRECISION)
    return total


@triton.jit
def pull_time(
    flat,
    deltas,
    N: tl.constexpr,
    WIDTHS: tl.constexpr,
    PADDED: tl.constexpr,
    PLACES: tl.constexpr,
    OFFSETS: tl.constexpr,
):
    """Return v . df/dt (N,), after `pull` of v."""
    total = tl.zeros((N,), tl.float32)
    for layer in tl.static_range(len(WIDTHS) - 1):
        total += _along_shift(flat, deltas, layer, N, WIDTHS, PADDED, PLACES, OFFSETS)
    return total


@triton.jit
def _along_shift(
    flat,
    deltas,
    LAYER: tl.constexpr,
    N: tl.constexpr,
    WIDTHS: tl.constexpr,
    PADDED: tl.constexpr,
    PLACES: tl.constexpr,
    OFFSETS: tl.constexpr,
):
    """Return (cotangent of a layer's output) . u, (N,)."""
    fan_out: tl.constexpr = WIDTHS[LAYER + 1]
    wide: tl.constexpr = PADDED[LAYER + 1]
    part: tl.constexpr = min(64, wide)
    row = tl.arange(0, N)[:, None]
    above = deltas + N * PLACES[(LAYER + 1) % (len(WIDTHS) - 1)]
    total = tl.zeros((N,), tl.float32)
    for first in range(0, wide, part):
        column = first + tl.arange(0, part)
        at = flat + OFFSETS[LAYER][2] + column
        shift = tl.load(at, mask=column < fan_out, other=0.0)
        delta = tl.load(above + row * wide + column[None, :])
        total += tl.sum(delta * shift[None, :], axis=1)
    return total


@triton.jit
def accumulate(
    sums,
    slots,
    used,
    t,
    h,
    nodes,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTHS: tl.constexpr,
    PADDED: tl.constexpr,
    PLACES: tl.constexpr,
    OFFSETS: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Add the parameter gradient of the first `used` slots to the program's sums.

    A slot holds the inputs of all layers, (N, WIDTH), and behind them the cotangents.
    """
    tl.debug_barrier()
    for layer in tl.static_range(len(WIDTHS) - 1):
        _accumulate_weight(
            sums,
            slots,
            used,
            layer,
            N,
            WIDTH,
            WIDTHS,
            PADDED,
            PLACES,
            OFFSETS,
            PRECISION,
            DEPTH,
        )
        _accumulate_bias(
            sums,
            slots,
            used,
            t,
            h,
            nodes,
            layer,
            N,
            WIDTH,
            WIDTHS,
            PADDED,
            PLACES,
            OFFSETS,
        )
    tl.debug_barrier()


@triton.jit
def _accumulate_weight(
    sums,
    slots,
    used,
    LAYER: tl.constexpr,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTHS: tl.constexpr,
    PADDED: tl.constexpr,
    PLACES: tl.constexpr,
    OFFSETS: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Add sum_slots delta^T x, (out, in), block by block."""
    fan_out: tl.constexpr = WIDTHS[LAYER + 1]
    fan_in: tl.constexpr = WIDTHS[LAYER]
    high: tl.constexpr = PADDED[LAYER + 1]
    wide: tl.constexpr = PADDED[LAYER]
    up: tl.constexpr = min(64, high)
    along: tl.constexpr = min(64, wide)
    inputs = slots + N * PLACES[LAYER]
    deltas = slots + N * (WIDTH + PLACES[(LAYER + 1) % (len(WIDTHS) - 1)])
    for top in range(0, high, up):
        out = top + tl.arange(0, up)
        for first in range(0, wide, along):
            column = first + tl.arange(0, along)
            total = tl.zeros((up, along), tl.float32)
            for begin in tl.range(0, used * N, 16, num_stages=DEPTH):
                slot = (begin // N) * (2 * N * WIDTH)
                row = begin % N + tl.arange(0, 16)
                delta = tl.load(deltas + slot + row[None, :] * high + out[:, None])
                x = tl.load(inputs + slot + row[:, None] * wide + column[None, :])
                total = tl.dot(delta, x, acc=total, input_precision=PRECISION)
            at = sums + OFFSETS[LAYER][0] + out[:, None] * fan_in + column[None, :]
            real = (out[:, None] < fan_out) & (column[None, :] < fan_in)
            tl.store(at, tl.load(at, mask=real, other=0.0) + total, mask=real)


@triton.jit
def _accumulate_bias(
    sums,
    slots,
    used,
    t,
    h,
    nodes,
    LAYER: tl.constexpr,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTHS: tl.constexpr,
    PADDED: tl.constexpr,
    PLACES: tl.constexpr,
    OFFSETS: tl.constexpr,
):
    """Add sum_slots delta, and delta times the time of the stage, (out,)."""
    fan_out: tl.constexpr = WIDTHS[LAYER + 1]
    high: tl.constexpr = PADDED[LAYER + 1]
    up: tl.constexpr = min(64, high)
    row = tl.arange(0, N)[:, None]
    deltas = slots + N * (WIDTH + PLACES[(LAYER + 1) % (len(WIDTHS) - 1)])
    for top in range(0, high, up):
        out = top + tl.arange(0, up)
        bias = tl.zeros((up,), tl.float32)
        shift = tl.zeros((up,), tl.float32)
        for i in range(used):
            slot = i * (2 * N * WIDTH)
            delta = tl.load(deltas + slot + row * high + out[None, :])
            time = (t + tl.load(nodes + i) * h).to(tl.float32)
            bias += tl.sum(delta, axis=0)
            shift += tl.sum(delta * time[:, None], axis=0)
        real = out < fan_out
        at = sums + OFFSETS[LAYER][1] + out
        tl.store(at, tl.load(at, mask=real, other=0.0) + bias, mask=real)
        at = sums + OFFSETS[LAYER][2] + out
        tl.store(at, tl.load(at, mask=real, other=0.0) + shift, mask=real)
