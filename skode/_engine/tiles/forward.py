"""Steps on chip: many attempts of a tile of rows in one launch.

Formulas are those of `loop`, `control` and `dense`; `masked.advance` is the plain twin
of `advance`, `masked.start` that of `start`. N rows of a tile, B of the batch, D state,
T requested times, S stages, C slots of a tape. A launch leaves in global memory what
the next one goes on from (`Lanes`).
"""

import triton
import triton.language as tl

from skode._engine.tiles.field import (
    any_of,
    finite,
    length,
    slope_at,
    summed,
    weighted,
)


@triton.jit(do_not_specialize=["rows", "n_times"])
def start(
    flat,
    times,
    y0,
    clock,
    slope,
    rows,
    n_times,
    rtol,
    atol,
    START_FACTOR: tl.constexpr,
    ORDER: tl.constexpr,
    WIDTHS: tl.constexpr,
    PADDED: tl.constexpr,
    OFFSETS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write f(t0, y0) and the clock (t, t1, left, h, memory), each (B,)."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    valid = row < rows
    column = tl.arange(0, PADDED[0])
    cell = row[:, None] * WIDTHS[0] + column[None, :]
    inside = valid[:, None] & (column[None, :] < WIDTHS[0])
    y = tl.load(y0 + cell, mask=inside, other=0.0)
    t = tl.load(times + row.to(tl.int64) * n_times, mask=valid, other=0.0)
    last = row.to(tl.int64) * n_times + n_times - 1
    t1 = tl.load(times + last, mask=valid, other=0.0)

    span = t1 - t
    k = slope_at(
        flat, t.to(y.dtype), y, WIDTHS, PADDED, OFFSETS, ACTIVATION, PRECISION
    )
    near = tl.maximum(tl.abs(span).to(y.dtype), 1.1754943508222875e-38)
    scale = atol + rtol * tl.abs(y)
    speed = length(k / scale)
    speed = tl.where(speed < 1e-30, 1e-30, speed)
    probe = 0.01 * ((length(y / scale) + 1.0) / speed)
    probe = tl.where(probe > near, near, probe)
    signed = tl.where(span < 0, -probe, probe)
    there = slope_at(
        flat,
        (t + signed.to(t.dtype)).to(y.dtype),
        y + signed[:, None] * k,
        WIDTHS,
        PADDED,
        OFFSETS,
        ACTIVATION,
        PRECISION,
    )
    change = length((there - k) / scale) / probe
    wavelength = speed / change
    wavelength = tl.where(wavelength > near, near, wavelength)
    first = tl.exp2(tl.log2(speed * wavelength) * (-1.0 / ORDER)) * wavelength
    first = first * START_FACTOR
    # NaN fails the comparison: a probe that leaves the domain asks for a small step.
    floor = near * 1e-6
    first = tl.where(first > floor, first, floor)

    tl.store(slope + cell, k, mask=inside)
    tl.store(clock + row, t, mask=valid)
    tl.store(clock + rows + row, t1, mask=valid)
    tl.store(clock + 2 * rows + row, tl.abs(span), mask=valid)
    tl.store(clock + 3 * rows + row, first.to(t.dtype), mask=valid)
    tl.store(clock + 4 * rows + row, tl.full((TILE,), 1e-4, t.dtype), mask=valid)


@triton.jit(do_not_specialize=["rows", "n_times", "attempts", "slots"])
def advance(
    flat,
    times,
    clock,
    counts,
    y_state,
    slope,
    ys,
    tape_clock,
    tape_y,
    tape_due,
    used,
    alive,
    rows,
    n_times,
    attempts,
    slots,
    rtol,
    atol,
    noise,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    B_ERR: tl.constexpr,
    DENSE: tl.constexpr,
    ORDER: tl.constexpr,
    EPS: tl.constexpr,
    WIDTHS: tl.constexpr,
    PADDED: tl.constexpr,
    OFFSETS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    TAPED: tl.constexpr,
    INSIDE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Attempt up to `attempts` steps of every row that has a way to go.

    Parameters
    ----------
    clock : (5, B)
        t, t1, left, h and memory, in the dtype of the times.
    counts : (5, B) of int32
        Attempts, rejected, status, and which of the requested times comes next and
        at which to stop.
    y_state, slope : (B, D)
        State, and f(t, y) there.
    ys : (B, T, D)
        Written at the times inside accepted steps, if INSIDE.
    tape_clock, tape_y, tape_due, used : (2, C, B), (C, B, D), (2, C, B), (B,)
        t and h, y, and which times lie inside, of accepted steps, if TAPED; `used`
        tells how many. Steps that lead to, or begin in, a state that is not finite
        are left out.
    alive : (programs,) of int32
        Whether a row of the tile has yet a way to go.
    """
    STAGES: tl.constexpr = len(B)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    valid = row < rows
    column = tl.arange(0, PADDED[0])
    wide = row.to(tl.int64)[:, None]
    cell = wide * WIDTHS[0] + column[None, :]
    real = valid[:, None] & (column[None, :] < WIDTHS[0])

    left = tl.load(clock + 2 * rows + row, mask=valid, other=0.0)
    going = any_of(left > 0)
    if going > 0:
        y = tl.load(y_state + cell, mask=real, other=0.0)
        k0 = tl.load(slope + cell, mask=real, other=0.0)
        t = tl.load(clock + row, mask=valid, other=0.0)
        t1 = tl.load(clock + rows + row, mask=valid, other=0.0)
        h = tl.load(clock + 3 * rows + row, mask=valid, other=1.0)
        memory = tl.load(clock + 4 * rows + row, mask=valid, other=1.0).to(y.dtype)
        made = tl.load(counts + row, mask=valid, other=0)
        rejected = tl.load(counts + rows + row, mask=valid, other=0)
        status = tl.load(counts + 2 * rows + row, mask=valid, other=0)
        first = tl.load(times + row.to(tl.int64) * n_times, mask=valid, other=0.0)
        last = row.to(tl.int64) * n_times + n_times - 1
        final = tl.load(times + last, mask=valid, other=0.0)
        sign = tl.where(final < first, -1.0, 1.0).to(t.dtype)
        if INSIDE:
            due = tl.load(counts + 3 * rows + row, mask=valid, other=0)
            stop = tl.load(counts + 4 * rows + row, mask=valid, other=0)
        if TAPED:
            slot = tl.zeros((TILE,), tl.int32)

        todo = attempts
        while todo > 0:
            live = left > 0
            # Two equal steps at the end rather than a long one and a sliver.
            size = tl.where(h * 1.01 >= left, left, tl.minimum(h, 0.5 * left))
            signed = size * sign
            step = signed.to(y.dtype)[:, None]
            k = (k0,)
            for i in tl.static_range(1, STAGES):
                k = k + (
                    slope_at(
                        flat,
                        (t + C[i] * signed).to(y.dtype),
                        y + step * weighted(k, A[i], i),
                        WIDTHS,
                        PADDED,
                        OFFSETS,
                        ACTIVATION,
                        PRECISION,
                    ),
                )
            y1 = y + step * weighted(k, B, STAGES)
            end = slope_at(
                flat,
                (t + signed).to(y.dtype),
                y1,
                WIDTHS,
                PADDED,
                OFFSETS,
                ACTIVATION,
                PRECISION,
            )
            k = k + (end,)

            scale = atol + rtol * tl.maximum(tl.abs(y), tl.abs(y1))
            error = step * weighted(k, B_ERR, STAGES + 1)
            ratio = length(error / scale)
            accept = ratio <= 1.0
            ratio = tl.where(ratio < float("inf"), ratio, float("inf"))  # NaN, too
            ratio = tl.where(ratio < noise, noise, ratio)
            # memory ** beta * ratio ** (0.75 beta - 1 / q), beta = 0.04.
            power = 0.04 * tl.log2(memory) + (0.03 - 1.0 / ORDER) * tl.log2(ratio)
            factor = 0.9 * tl.exp2(power)
            factor = tl.minimum(tl.maximum(factor, 0.2), 10.0)
            h = size * factor.to(h.dtype)
            memory = tl.minimum(tl.maximum(ratio, 1e-4), 1.0)

            left_next = left - size
            t_next = t1 - sign * left_next
            moved = live & accept
            refused = live & (ratio > 1.0)
            sound = finite(y1)
            if INSIDE:
                before = due
                passing = moved & (due < stop)
                asked = tl.load(times + row.to(tl.int64) * n_times + due, mask=passing)
                passing = passing & (asked * sign <= t_next * sign)
                while any_of(passing) > 0:
                    theta = ((asked - t) / signed).to(y.dtype)
                    shown = y + step * _inside(k, DENSE, theta)
                    at = (wide * n_times + due[:, None]) * WIDTHS[0] + column[None, :]
                    tl.store(ys + at, shown, mask=real & passing[:, None])
                    due += passing.to(tl.int32)
                    passing = passing & (due < stop)
                    asked = tl.load(
                        times + row.to(tl.int64) * n_times + due, mask=passing
                    )
                    passing = passing & (asked * sign <= t_next * sign)
            if TAPED:
                keep = moved & sound & finite(y)
                place = slot.to(tl.int64) * rows + row
                size_of_tape = slots.to(tl.int64) * rows
                tl.store(tape_clock + place, t, mask=keep)
                tl.store(tape_clock + size_of_tape + place, signed, mask=keep)
                spot = place[:, None] * WIDTHS[0] + column[None, :]
                tl.store(tape_y + spot, y, mask=real & keep[:, None])
                if INSIDE:
                    tl.store(tape_due + place, before, mask=keep)
                    tl.store(tape_due + size_of_tape + place, due, mask=keep)
                slot += keep.to(tl.int32)

            made += live.to(tl.int32)
            rejected += refused.to(tl.int32)
            # Rows whose next step would not move time end here.
            ulp = tl.maximum(tl.abs(t), tl.abs(t1)) * EPS
            lost = refused & (h <= 16.0 * ulp)
            sound = sound & finite(summed(k))
            status = tl.where(lost, tl.where(sound, 2, 3), status)
            t1 = tl.where(lost, t, t1)
            t = tl.where(moved, t_next, t)
            left = tl.where(moved, left_next, tl.where(lost, 0.0, left))
            y = tl.where(moved[:, None], y1, y)
            k0 = tl.where(moved[:, None], end, k0)
            todo = (todo - 1) * any_of(left > 0)

        going = any_of(left > 0)
        tl.store(y_state + cell, y, mask=real)
        tl.store(slope + cell, k0, mask=real)
        tl.store(clock + row, t, mask=valid)
        tl.store(clock + rows + row, t1, mask=valid)
        tl.store(clock + 2 * rows + row, left, mask=valid)
        tl.store(clock + 3 * rows + row, h, mask=valid)
        tl.store(clock + 4 * rows + row, memory.to(t.dtype), mask=valid)
        tl.store(counts + row, made, mask=valid)
        tl.store(counts + rows + row, rejected, mask=valid)
        tl.store(counts + 2 * rows + row, status, mask=valid)
        if INSIDE:
            tl.store(counts + 3 * rows + row, due, mask=valid)
        if TAPED:
            tl.store(used + row, slot, mask=valid)
    elif TAPED:
        tl.store(used + row, tl.zeros((TILE,), tl.int32), mask=valid)
    tl.store(alive + tl.program_id(0), going)


@triton.jit
def _inside(k, DENSE: tl.constexpr, theta):
    """Return sum_i b_i(theta) k_i, (N, D), for shares theta (N,) of the step."""
    total = tl.zeros_like(k[0])
    for i in tl.static_range(len(DENSE)):
        total += polynomial(DENSE[i], theta)[:, None] * k[i]
    return total


@triton.jit
def polynomial(POWERS: tl.constexpr, theta):
    """Return sum_p POWERS_p theta^(p + 1)."""
    value = tl.zeros_like(theta) + POWERS[len(POWERS) - 1]
    for p in tl.static_range(1, len(POWERS)):
        value = value * theta + POWERS[len(POWERS) - 1 - p]
    return value * theta
