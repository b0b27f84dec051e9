"""The gradient of recorded steps, tile by tile.

Formulas stand at the head of `checkpoint`, whose replay of the same steps is the plain
twin. N rows of a tile, B of the batch, D state, T requested times, S stages, P powers
of theta, C slots of a tape. Slots are replayed from the last one down; rows that did
not fill a slot get cotangents of 0 there.

A program goes through every so-manieth tile with memory of its own, `scratch`: S + 1
slots of the inputs and the cotangents of all layers, 2 WIDTH columns (N,), then the
stages, what was pulled back through them, and the moments of the requested cotangents:
2 (S + 1) + P + 1 blocks (N, D). Parameter gradients are summed in memory of the
program's own, too: the result does not depend on who comes first.
"""

import triton
import triton.language as tl

from skode._engine.tiles.field import (
    accumulate,
    any_of,
    evaluate,
    pull,
    pull_time,
    weighted,
)


@triton.jit(do_not_specialize=["rows", "n_times", "slots", "n_params"])
def replay(
    flat,
    table,
    nodes,
    times,
    tape_clock,
    tape_y,
    tape_due,
    used,
    cotangent,
    grad,
    grad_times,
    sums,
    scratch,
    rows,
    n_times,
    slots,
    n_params,
    STAGES: tl.constexpr,
    POWERS: tl.constexpr,
    INSIDE: tl.constexpr,
    TIMED: tl.constexpr,
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
    """Pull cotangents back through the steps of a chunk, the last one first.

    Parameters
    ----------
    table, nodes, tape_clock, tape_y, tape_due, used
        As of `forward.advance`.
    cotangent : (B, D)
        Of the states after the chunk; becomes that of the states before.
    grad : (B, T, D)
        Cotangent of the requested states, read inside steps if INSIDE.
    grad_times : (B, T)
        Added to, if TIMED; the ends of a row take the share of all its steps.
    sums : (programs, P)
        Parameter gradients; added to.
    """
    SLOTS: tl.constexpr = STAGES + 1
    USED: tl.constexpr = SLOTS if INSIDE else STAGES
    D: tl.constexpr = PADDED[0]
    BLOCK: tl.constexpr = TILE * D
    SLOT: tl.constexpr = 2 * TILE * WIDTH
    program = tl.program_id(0)
    own = SLOTS * SLOT + (2 * SLOTS + POWERS + 1) * BLOCK
    layers = scratch + program.to(tl.int64) * own
    stages = layers + SLOTS * SLOT
    pulled = stages + SLOTS * BLOCK
    moments = pulled + SLOTS * BLOCK
    total = sums + program.to(tl.int64) * n_params
    column = tl.arange(0, D)[None, :]
    local = tl.arange(0, TILE)[:, None] * D + column
    size_of_tape = tl.cast(slots, tl.int64) * rows
    dense = table + (SLOTS + 1) * SLOTS
    for tile in range(program, tl.cdiv(rows, TILE), tl.num_programs(0)):
        row = tile * TILE + tl.arange(0, TILE)
        valid = row < rows
        wide = row.to(tl.int64)
        cell = wide[:, None] * WIDTHS[0] + column
        real = valid[:, None] & (column < WIDTHS[0])
        u = tl.load(cotangent + cell, mask=real, other=0.0)
        count = tl.load(used + row, mask=valid, other=0)
        start = tl.load(times + wide * n_times, mask=valid, other=0.0)
        end = tl.load(times + wide * n_times + n_times - 1, mask=valid, other=1.0)
        span = tl.where(end == start, 1.0, end - start).to(start.dtype)
        grad_start = tl.zeros_like(start)
        grad_end = tl.zeros_like(start)
        place = tl.max(count, axis=0) - 1
        while place >= 0:
            active = place < count
            at = tl.cast(place, tl.int64) * rows + row
            t = tl.load(tape_clock + at, mask=active, other=0.0)
            h = tl.load(tape_clock + size_of_tape + at, mask=active, other=0.0)
            spot = at[:, None] * WIDTHS[0] + column
            y = tl.load(tape_y + spot, mask=real & active[:, None], other=0.0)
            step = h.to(y.dtype)[:, None]

            for i in range(USED):
                # Row S of the table are the weights of the step: stage S is its end.
                k = evaluate(
                    flat,
                    layers + i * SLOT,
                    layers + i * SLOT + TILE * WIDTH,
                    (t + tl.load(nodes + i) * h).to(y.dtype),
                    y
                    + step
                    * weighted(table + i * SLOTS, stages, local, i, STAGES, TILE, D),
                    TILE,
                    WIDTHS,
                    PADDED,
                    PLACES,
                    OFFSETS,
                    ACTIVATION,
                    PRECISION,
                    DEPTH,
                    True,
                )
                tl.store(stages + i * BLOCK + local, k)
                tl.debug_barrier()

            grad_t = tl.zeros_like(t)
            grad_h = tl.zeros_like(t)
            direct = tl.zeros_like(u)
            if INSIDE:
                first = tl.load(tape_due + at, mask=active, other=0)
                stop = tl.load(tape_due + size_of_tape + at, mask=active, other=0)
                for p in range(POWERS + 1):
                    due = first
                    moment = tl.zeros_like(u)
                    passing = due < stop
                    while any_of(passing) > 0:
                        where = wide * n_times + due
                        asked = tl.load(times + where, mask=passing, other=0.0)
                        theta = ((asked - t) / tl.where(passing, h, 1.0)).to(u.dtype)
                        wanted = tl.load(
                            grad + where[:, None] * WIDTHS[0] + column,
                            mask=real & passing[:, None],
                            other=0.0,
                        )
                        weight = tl.where(passing, 1.0, 0.0)
                        for _ in range(p):
                            weight = weight * theta
                        moment += weight[:, None] * wanted
                        # One is known when the kernel is built, the other is not.
                        if TIMED:  # noqa: SIM102
                            if p == 0:
                                slope = _rate(
                                    dense, stages, local, theta, SLOTS, POWERS
                                )
                                rate = tl.sum(wanted * slope, axis=1).to(t.dtype)
                                rate = tl.where(passing, rate, 0.0)
                                known = tl.load(grad_times + where, mask=passing)
                                tl.store(grad_times + where, known + rate, mask=passing)
                                grad_t -= rate
                                grad_h -= rate * theta.to(t.dtype)
                        due += passing.to(tl.int32)
                        passing = due < stop
                    tl.store(moments + p * BLOCK + local, moment)
                tl.debug_barrier()
                direct = tl.load(moments + local)

            back = tl.zeros_like(u)
            for n in range(USED):
                i = USED - 1 - n
                weight = tl.load(table + STAGES * SLOTS + i)
                v = weight * u + _from_later(table, pulled, local, i, STAGES)
                if INSIDE:
                    for p in range(POWERS):
                        weight = tl.load(dense + p * SLOTS + i)
                        v += weight * tl.load(moments + (p + 1) * BLOCK + local)
                v = tl.where(active[:, None], step * v, 0.0)
                deltas = layers + i * SLOT + TILE * WIDTH
                tl.store(deltas + local, v)
                pull_back = pull(
                    flat,
                    deltas,
                    TILE,
                    WIDTHS,
                    PADDED,
                    PLACES,
                    OFFSETS,
                    PRECISION,
                    DEPTH,
                )
                tl.store(pulled + i * BLOCK + local, pull_back)
                tl.debug_barrier()
                if TIMED:
                    moved = pull_time(
                        flat, deltas, TILE, WIDTHS, PADDED, PLACES, OFFSETS
                    ).to(t.dtype)
                    k = tl.load(stages + i * BLOCK + local)
                    along = tl.sum(k * v, axis=1).to(t.dtype)
                    grad_t += moved
                    grad_h += tl.load(nodes + i) * moved
                    grad_h += along / tl.where(h == 0, 1.0, h).to(t.dtype)
                if i == STAGES:
                    u += pull_back
                else:
                    back += pull_back
            u = tl.where(active[:, None], u + back + direct, u)
            if TIMED:
                before = (t - start) / span
                share = h / span
                grad_start += tl.where(
                    active, (1.0 - before) * grad_t - share * grad_h, 0.0
                )
                grad_end += tl.where(active, before * grad_t + share * grad_h, 0.0)
            accumulate(
                total,
                layers,
                USED,
                t,
                h,
                nodes,
                TILE,
                WIDTH,
                WIDTHS,
                PADDED,
                PLACES,
                OFFSETS,
                PRECISION,
                DEPTH,
            )
            place -= 1
        tl.store(cotangent + cell, u, mask=real)
        if TIMED:
            at = grad_times + wide * n_times
            tl.store(at, tl.load(at, mask=valid) + grad_start, mask=valid)
            at = at + n_times - 1
            tl.store(at, tl.load(at, mask=valid) + grad_end, mask=valid)


@triton.jit
def _from_later(table, pulled, cell, stage, STAGES: tl.constexpr):
    """Return sum_j a_j,stage l_j over the later stages j, (N, D)."""
    size: tl.constexpr = cell.shape[0] * cell.shape[1]
    total = tl.zeros(cell.shape, tl.float32)
    # Stage S, the end of the step, feeds no stage: its column holds zeros.
    behind = tl.zeros(cell.shape, tl.int32) + stage
    for j in tl.static_range(1, STAGES):
        later = behind < j
        weight = tl.load(table + j * (STAGES + 1) + stage)
        total += weight * tl.load(pulled + j * size + cell, mask=later, other=0.0)
    return total


@triton.jit
def _rate(dense, stages, cell, theta, SLOTS: tl.constexpr, POWERS: tl.constexpr):
    """Return dy/dt of the dense output, (N, D), at shares theta (N,) of the step."""
    size: tl.constexpr = cell.shape[0] * cell.shape[1]
    total = tl.zeros(cell.shape, tl.float32)
    for i in range(SLOTS):
        weight = tl.zeros_like(theta)
        for n in tl.static_range(POWERS):
            power = tl.load(dense + (POWERS - 1 - n) * SLOTS + i)
            weight = weight * theta + (POWERS - n) * power
        total += weight[:, None] * tl.load(stages + i * size + cell)
    return total
