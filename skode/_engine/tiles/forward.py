"""Steps on chip: many attempts of a tile of rows in one launch.

Formulas are those of `loop`, `control` and `dense`; `masked.advance` is the plain twin
of `advance`, `masked.start` that of `start`. N rows of a tile, B of the batch, D state,
T requested times, S stages, P powers of theta, C slots of a tape. A launch leaves in
global memory what the next one goes on from (`Lanes`).

A program goes through every so-manieth tile with memory of its own, `scratch`: S + 1
stages (N, D), and the inputs of the layers, WIDTH columns (N,).
"""

import triton
import triton.language as tl

from skode._engine.tiles.field import any_of, evaluate, finite, length, weighted


@triton.jit(do_not_specialize=["rows", "n_times"])
def start(
    flat,
    times,
    y0,
    clock,
    slope,
    scratch,
    rows,
    n_times,
    rtol,
    atol,
    factor,
    ORDER: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    WIDTHS: tl.constexpr,
    PADDED: tl.constexpr,
    PLACES: tl.constexpr,
    OFFSETS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Write f(t0, y0), and the clock (t, t1, left, h, memory), each (B,)."""
    program = tl.program_id(0)
    slot = scratch + program.to(tl.int64) * (TILE * WIDTH)
    column = tl.arange(0, PADDED[0])[None, :]
    for tile in range(program, tl.cdiv(rows, TILE), tl.num_programs(0)):
        row = tile * TILE + tl.arange(0, TILE)
        valid = row < rows
        wide = row.to(tl.int64)
        cell = wide[:, None] * WIDTHS[0] + column
        real = valid[:, None] & (column < WIDTHS[0])
        y = tl.load(y0 + cell, mask=real, other=0.0)
        t = tl.load(times + wide * n_times, mask=valid, other=0.0)
        t1 = tl.load(times + wide * n_times + n_times - 1, mask=valid, other=0.0)

        span = t1 - t
        k = evaluate(
            flat,
            slot,
            slot,
            t.to(y.dtype),
            y,
            TILE,
            WIDTHS,
            PADDED,
            PLACES,
            OFFSETS,
            ACTIVATION,
            PRECISION,
            DEPTH,
            False,
        )
        tl.debug_barrier()
        near = tl.maximum(tl.abs(span).to(y.dtype), 1.1754943508222875e-38)
        scale = atol + rtol * tl.abs(y)
        speed = length(k / scale)
        speed = tl.where(speed < 1e-30, 1e-30, speed)
        probe = 0.01 * ((length(y / scale) + 1.0) / speed)
        probe = tl.where(probe > near, near, probe)
        signed = tl.where(span < 0, -probe, probe)
        there = evaluate(
            flat,
            slot,
            slot,
            (t + signed.to(t.dtype)).to(y.dtype),
            y + signed[:, None] * k,
            TILE,
            WIDTHS,
            PADDED,
            PLACES,
            OFFSETS,
            ACTIVATION,
            PRECISION,
            DEPTH,
            False,
        )
        tl.debug_barrier()
        change = length((there - k) / scale) / probe
        wavelength = speed / change
        wavelength = tl.where(wavelength > near, near, wavelength)
        first = tl.exp2(tl.log2(speed * wavelength) * (-1.0 / ORDER)) * wavelength
        first = first * factor
        # A probe that leaves the domain (NaN) asks for a small step.
        floor = near * 1e-6
        first = tl.where(first > floor, first, floor)

        tl.store(slope + cell, k, mask=real)
        tl.store(clock + row, t, mask=valid)
        tl.store(clock + rows + row, t1, mask=valid)
        tl.store(clock + 2 * rows + row, tl.abs(span), mask=valid)
        tl.store(clock + 3 * rows + row, first.to(t.dtype), mask=valid)
        tl.store(clock + 4 * rows + row, tl.full((TILE,), 1e-4, t.dtype), mask=valid)


@triton.jit(do_not_specialize=["rows", "n_times", "attempts", "slots"])
def advance(
    flat,
    table,
    nodes,
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
    scratch,
    rows,
    n_times,
    attempts,
    slots,
    rtol,
    atol,
    noise,
    STAGES: tl.constexpr,
    POWERS: tl.constexpr,
    ORDER: tl.constexpr,
    EPS: tl.constexpr,
    TAPED: tl.constexpr,
    INSIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    WIDTHS: tl.constexpr,
    PADDED: tl.constexpr,
    PLACES: tl.constexpr,
    OFFSETS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Attempt up to `attempts` steps of every row that has a way to go.

    Parameters
    ----------
    table : (S + 2 + P, S + 1)
        Weights of the stages: of the arguments of all stages, of the step, of its
        error, and of the powers of theta.
    nodes : (S + 1,)
        In the dtype of the times.
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
    alive : (tiles,) of int32
        Whether a row of the tile has yet a way to go.
    """
    SLOTS: tl.constexpr = STAGES + 1
    D: tl.constexpr = PADDED[0]
    program = tl.program_id(0)
    stages = scratch + program.to(tl.int64) * (TILE * (SLOTS * D + WIDTH))
    slot = stages + TILE * SLOTS * D
    column = tl.arange(0, D)[None, :]
    local = tl.arange(0, TILE)[:, None] * D + column
    size_of_tape = tl.cast(slots, tl.int64) * rows
    for tile in range(program, tl.cdiv(rows, TILE), tl.num_programs(0)):
        row = tile * TILE + tl.arange(0, TILE)
        valid = row < rows
        wide = row.to(tl.int64)
        cell = wide[:, None] * WIDTHS[0] + column
        real = valid[:, None] & (column < WIDTHS[0])

        y = tl.load(y_state + cell, mask=real, other=0.0)
        k0 = tl.load(slope + cell, mask=real, other=0.0)
        t = tl.load(clock + row, mask=valid, other=0.0)
        t1 = tl.load(clock + rows + row, mask=valid, other=0.0)
        left = tl.load(clock + 2 * rows + row, mask=valid, other=0.0)
        h = tl.load(clock + 3 * rows + row, mask=valid, other=1.0)
        memory = tl.load(clock + 4 * rows + row, mask=valid, other=1.0).to(y.dtype)
        made = tl.load(counts + row, mask=valid, other=0)
        rejected = tl.load(counts + rows + row, mask=valid, other=0)
        status = tl.load(counts + 2 * rows + row, mask=valid, other=0)
        due = tl.load(counts + 3 * rows + row, mask=valid, other=0)
        stop = tl.load(counts + 4 * rows + row, mask=valid, other=0)
        begin = tl.load(times + wide * n_times, mask=valid, other=0.0)
        final = tl.load(times + wide * n_times + n_times - 1, mask=valid, other=0.0)
        sign = tl.where(final < begin, -1.0, 1.0).to(t.dtype)
        taken = tl.zeros((TILE,), tl.int32)

        todo = attempts * any_of(left > 0)
        while todo > 0:
            live = left > 0
            # Two equal steps at the end rather than a long one and a sliver.
            size = tl.where(h * 1.01 >= left, left, tl.minimum(h, 0.5 * left))
            signed = size * sign
            step = signed.to(y.dtype)[:, None]
            tl.store(stages + local, k0)
            tl.debug_barrier()
            y1 = y
            for i in range(1, SLOTS):
                # Row S of the table are the weights of the step: stage S is its end.
                y1 = y + step * weighted(
                    table + i * SLOTS, stages, local, i, STAGES, TILE, D
                )
                k = evaluate(
                    flat,
                    slot,
                    slot,
                    (t + tl.load(nodes + i) * signed).to(y.dtype),
                    y1,
                    TILE,
                    WIDTHS,
                    PADDED,
                    PLACES,
                    OFFSETS,
                    ACTIVATION,
                    PRECISION,
                    DEPTH,
                    False,
                )
                tl.store(stages + i * (TILE * D) + local, k)
                tl.debug_barrier()

            error = step * weighted(
                table + SLOTS * SLOTS, stages, local, SLOTS, SLOTS, TILE, D
            )
            scale = atol + rtol * tl.maximum(tl.abs(y), tl.abs(y1))
            ratio = length(error / scale)
            accept = ratio <= 1.0
            ratio = tl.where(ratio < float("inf"), ratio, float("inf"))  # NaN, too
            ratio = tl.where(ratio < noise, noise, ratio)
            # memory ** beta * ratio ** (0.75 beta - 1 / q), beta = 0.04.
            power = 0.04 * tl.log2(memory) + (0.03 - 1.0 / ORDER) * tl.log2(ratio)
            factor = tl.minimum(tl.maximum(0.9 * tl.exp2(power), 0.2), 10.0)
            h = size * factor.to(h.dtype)
            memory = tl.minimum(tl.maximum(ratio, 1e-4), 1.0)

            left_next = left - size
            t_next = t1 - sign * left_next
            moved = live & accept
            refused = live & (ratio > 1.0)
            before = due
            if INSIDE:
                passing = moved & (due < stop)
                asked = tl.load(times + wide * n_times + due, mask=passing, other=0.0)
                passing = passing & (asked * sign <= t_next * sign)
                while any_of(passing) > 0:
                    theta = ((asked - t) / signed).to(y.dtype)
                    shown = y + step * between(
                        table + (SLOTS + 1) * SLOTS, stages, local, theta, SLOTS, POWERS
                    )
                    at = (wide * n_times + due)[:, None] * WIDTHS[0] + column
                    tl.store(ys + at, shown, mask=real & passing[:, None])
                    due += passing.to(tl.int32)
                    passing = passing & (due < stop)
                    asked = tl.load(
                        times + wide * n_times + due, mask=passing, other=0.0
                    )
                    passing = passing & (asked * sign <= t_next * sign)
            sound = finite(y1)
            if TAPED:
                keep = moved & sound & finite(y)
                place = taken.to(tl.int64) * rows + row
                tl.store(tape_clock + place, t, mask=keep)
                tl.store(tape_clock + size_of_tape + place, signed, mask=keep)
                spot = place[:, None] * WIDTHS[0] + column
                tl.store(tape_y + spot, y, mask=real & keep[:, None])
                if INSIDE:
                    tl.store(tape_due + place, before, mask=keep)
                    tl.store(tape_due + size_of_tape + place, due, mask=keep)
                taken += keep.to(tl.int32)

            made += live.to(tl.int32)
            rejected += refused.to(tl.int32)
            # Rows whose next step would not move time end here.
            ulp = tl.maximum(tl.abs(t), tl.abs(t1)) * EPS
            lost = refused & (h <= 16.0 * ulp)
            if any_of(lost) > 0:
                for i in range(SLOTS):
                    k = tl.load(stages + i * (TILE * D) + local)
                    sound = sound & finite(k)
                status = tl.where(lost, tl.where(sound, 2, 3), status)
                t1 = tl.where(lost, t, t1)
            t = tl.where(moved, t_next, t)
            left = tl.where(moved, left_next, tl.where(lost, 0.0, left))
            y = tl.where(moved[:, None], y1, y)
            end = tl.load(stages + STAGES * (TILE * D) + local)
            k0 = tl.where(moved[:, None], end, k0)
            # The next step writes over the stages.
            tl.debug_barrier()
            todo = (todo - 1) * any_of(left > 0)

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
        tl.store(counts + 3 * rows + row, due, mask=valid)
        if TAPED:
            tl.store(used + row, taken, mask=valid)
        tl.store(alive + tile, any_of(left > 0))


@triton.jit
def between(table, stages, cell, theta, SLOTS: tl.constexpr, POWERS: tl.constexpr):
    """Return sum_i b_i(theta) k_i, (N, D), for shares theta (N,) of the step."""
    size: tl.constexpr = cell.shape[0] * cell.shape[1]
    total = tl.zeros(cell.shape, tl.float32)
    for i in range(SLOTS):
        weight = polynomial(table + i, theta, SLOTS, POWERS)
        total += weight[:, None] * tl.load(stages + i * size + cell)
    return total


@triton.jit
def polynomial(column, theta, STRIDE: tl.constexpr, POWERS: tl.constexpr):
    """Return sum_p c_p theta^(p + 1) for the c_p in a column of the table, (N,)."""
    value = tl.zeros_like(theta) + tl.load(column + (POWERS - 1) * STRIDE)
    for p in tl.static_range(1, POWERS):
        value = value * theta + tl.load(column + (POWERS - 1 - p) * STRIDE)
    return value * theta
