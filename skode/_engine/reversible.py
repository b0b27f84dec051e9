"""Exact gradient of the discrete solution, in memory that hardly grows with the steps.

The solve steps a pair of states by the scheme of `pair`, which can be walked back: the
backward pass begins with the last pair and finds the pair before each step from the one
behind it, to rounding. With s = h b_i summed over the stages, one step and the
cotangents (u, w) of (y1, z1), from the end to the start:

    y1 = lambda y + (1 - lambda) z + sum h b_i k_i      k_i: a step h from z at t
    z1 = z + sum h b_i m_i                              m_i: a step -h from y1 at t + h

    z = z1 - sum h b_i m_i          u <- u + (w pulled through the m_i)
    y = (y1 - (1 - lambda) z - sum h b_i k_i) / lambda
                                    w <- w + (1 - lambda) u + (u pulled through the k_i)
                                    u <- lambda u

Requested times read y + sum h b_i(theta) k_i - theta (1 - lambda) (y - z), with k_S =
m_0. Steps are fixed fractions of the time span, and so is lambda: as in `checkpoint`,
step sizes carry no gradient of their own.

What is kept: the last pair, and for a row and a step that a controller chose two bytes
(see `trail`); of even steps nothing. B rows, A of them in a step, D state, S stages.
"""

from typing import Any

import torch
from torch import Tensor

from skode._engine.checkpoint import (
    Inside,
    add_ends,
    add_idle_times,
    or_one,
    require_first_order,
)
from skode._engine.control import PIController
from skode._engine.dense import Requests
from skode._engine.kernel import Kernel
from skode._engine.pair import coupling, parting_rate
from skode._engine.pair_loop import Walked, integrate_pair, march_pair
from skode._engine.plan import Plan
from skode._engine.solution import Statistics
from skode._engine.step import Workspace, linearize_stages, stage_times
from skode._engine.tableau import Coefficients
from skode._engine.trail import Stride, Trail

_WORTH_GATHERING = 2048
"""Numbers of state; fewer cost less to walk back by a step of 0 than to sort out."""


class Reversible(torch.autograd.Function):
    """Solve; keep the last pair and the lengths of the steps; walk them back."""

    @staticmethod
    def forward(
        ctx: Any, plan: Plan, y0: Tensor, times: Tensor, *params: Tensor
    ) -> tuple[Tensor, ...]:
        ys, walked = walk(plan, y0, times)
        ctx.plan, ctx.trail = plan, walked.trail
        columns = walked.stats.columns()
        ctx.save_for_backward(y0, walked.y, walked.z, columns[0], times, *params)
        ctx.mark_non_differentiable(*columns)
        return ys, *columns

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        require_first_order("reversible")
        y0, y, z, status, times, *_params = ctx.saved_tensors
        needs_times = ctx.needs_input_grad[2]
        with torch.no_grad():
            requests, sound = Requests(times), status == 0
            if bool(sound.all()):  # host sync, once per solve
                sound = None
            else:
                _refuse_lost(requests, grad, ~sound)
            reverse = _Reverse(ctx.plan, requests, grad, needs_times)
            grad_y0 = reverse.run(y, z, ctx.trail, sound)
            grad_times = reverse.times(y0, y) if needs_times else None
        return None, grad_y0, grad_times, *reverse.kernel.gradients()


def reversible(plan: Plan, y0: Tensor, times: Tensor) -> tuple[Tensor, Statistics]:
    """Solve by the same scheme without autograd; return ys (B, T, D)."""
    ys, walked = walk(plan, y0, times)
    return ys, walked.stats


def walk(plan: Plan, y0: Tensor, times: Tensor) -> tuple[Tensor, Walked]:
    """Solve without autograd; return the states at all times (B, T, D), and the way."""
    requests, dense = plan.requests(y0, times)
    coef = plan.coefficients(y0, times)
    kernel, tolerance = plan.untrained_kernel(), plan.tolerance
    ends = times[:, 0], times[:, -1]
    if plan.tableau.adaptive:
        control = PIController.of(tolerance, y0, coef.order, coef.error_constant)
        walked = integrate_pair(kernel, coef, control, y0, *ends, tolerance, dense)
    else:
        walked = march_pair(kernel, coef, y0, *ends, tolerance, dense)
    inside = None if dense is None else dense.ys
    return requests.fill(y0, walked.stats.shown(walked.y), inside), walked


def _refuse_lost(requests: Requests, grad: Tensor, lost: Tensor) -> None:
    """Raise where the loss looks at what rows (B,) that failed had reached.

    Next to a pole, or where the two states have parted, no digit of the states before
    can be found from those behind.
    """
    used = (grad != 0).any(dim=2) & ~requests.at_start
    rows = torch.nonzero(lost & used.any(dim=1))[:, 0].tolist()
    if rows:
        raise RuntimeError(
            f"gradient='reversible' cannot walk back rows that failed, and the loss "
            f"uses their states: rows {rows[:10]}. Leave rows out whose status is not "
            f"0, call require_success, or take gradient='checkpoint'."
        )


class _Reverse:
    """One way back."""

    def __init__(
        self, plan: Plan, requests: Requests, grad: Tensor, timed: bool
    ) -> None:
        self._plan, self._requests, self._grad = plan, requests, grad
        self._timed = timed
        self._grad_t = torch.zeros_like(requests.times)
        self.kernel: Kernel = plan.kernel()

    def run(self, y: Tensor, z: Tensor, trail: Trail, sound: Tensor | None) -> Tensor:
        """Return dL/dy0; leave dL/dtheta in the kernel, dL/dt in the fields.

        `sound` (B,) tells which rows have a way back; None: all.
        """
        requests, grad = self._requests, self._grad
        self._coef = self._plan.coefficients(y, requests.times)
        self._half = _Half(self.kernel, self._coef, y, self._timed)
        u = requests.sum_at_end(grad)
        whole = torch.stack((y, z, u, torch.zeros_like(u)))
        part, rows = whole, None
        for stride in trail.backwards():
            if stride.rows is not rows:
                if rows is not None:
                    whole.index_copy_(1, rows, part)
                rows = stride.rows
                part = whole if rows is None else whole.index_select(1, rows)
            self._stride(stride, part, sound)
        if rows is not None:
            whole.index_copy_(1, rows, part)
        return whole[2] + whole[3] + requests.sum_at_start(grad)

    def times(self, y0: Tensor, y1: Tensor) -> Tensor:
        """Return dL/d times, (B, T), after `run`."""
        add_idle_times(self._requests, self.kernel, self._grad, y0, y1, self._grad_t)
        return self._grad_t

    def _stride(self, stride: Stride, part: Tensor, sound: Tensor | None) -> None:
        """Walk the rows that moved back; leave the others, or have them step by 0."""
        moved = stride.moved
        if sound is not None:
            sound = sound if stride.rows is None else sound[stride.rows]
            moved = sound if moved is None else moved & sound
        if moved is not None:
            waiting = len(moved) - int(torch.count_nonzero(moved))  # host sync
            if waiting == len(moved):
                return
            # 0 times a slope that is not finite would not be 0.
            few = waiting * part.shape[2] < _WORTH_GATHERING
            if waiting and not (few and self.kernel.bounded and sound is None):
                keep = torch.nonzero(moved)[:, 0]
                gathered = part.index_select(1, keep)
                self._step(stride.only(keep), gathered)
                part.index_copy_(1, keep, gathered)
                return
        self._step(stride, part)

    def _step(self, stride: Stride, part: Tensor) -> None:
        """Walk (y, z, u, w), each (A, D), back by one step, in place."""
        coef, half = self._coef, self._half
        y, z, u, w = part.unbind()
        h, share, dtype = stride.h, stride.share, part.dtype
        damped, rest = coupling(share, dtype)
        inside = extra = None
        if stride.events is not None:
            times, grad = self._requests.times, self._grad
            inside = Inside.of(stride.events, times, grad, stride.t, h)
            zeros = part.new_zeros(coef.stages + 1, *y.shape)
            extra = inside.cotangents(coef, zeros)

        z += half.retrace(stride.t1, -h, y)
        end = half.first_slope.clone() if inside is not None and self._timed else None
        u += half.pull(-w, None if extra is None else extra[-1:])
        if self._timed:
            grad_t, grad_h = half.time_gradient()
            grad_h = grad_t - grad_h  # the half begins at t + h, and goes by -h

        increment = half.retrace(stride.t, h, z)
        y.sub_(increment).addcmul_(rest, z, value=-1.0).div_(damped)
        w += half.pull(u, None if extra is None else extra[:-1]).addcmul_(rest, u)
        u *= damped
        if inside is not None:
            self._requested(inside, rest, u, w)
        if self._timed:
            first_t, first_h = half.time_gradient()
            grad_t, grad_h = grad_t + first_t, grad_h + first_h
            if inside is not None:
                assert end is not None, "kept above"
                k = torch.cat((half.k, end[None]))
                k -= parting_rate(h, share, y - z)
                rate = inside.rate(coef, k)
                inside.add_times(rate, self._grad_t, grad_t, grad_h)
            add_ends(self._grad_t, stride.rows, stride.left, share, grad_t, grad_h)

    def _requested(self, inside: Inside, rest: Tensor, u: Tensor, w: Tensor) -> None:
        """Add what requested times owe to y and z themselves."""
        grad, position = inside.grad, inside.position
        to_z = grad * (inside.theta.to(grad.dtype)[:, None] * rest[position])
        u.index_add_(0, position, grad - to_z)
        w.index_add_(0, position, to_z)


class _Half:
    """One of the two Runge-Kutta steps of a pair, with its derivative."""

    def __init__(
        self, kernel: Kernel, coef: Coefficients, y: Tensor, timed: bool
    ) -> None:
        self._kernel, self._coef, self._timed = kernel, coef, timed
        self._work, self._pulls = Workspace(coef, y), Workspace(coef, y)

    @property
    def k(self) -> Tensor:
        """(S, A, D) stages."""
        return self._work.k[:-1]

    @property
    def first_slope(self) -> Tensor:
        """(A, D) the first of them."""
        return self._work.slopes[0]

    def retrace(self, t: Tensor, h: Tensor, y: Tensor) -> Tensor:
        """Return Psi_h(t, y), (A, D), until the next call; remember its stages."""
        coef, work, rows = self._coef, self._work, y.shape[0]
        if rows != work.rows:
            work.resize(rows)
            self._pulls.resize(rows)
        times = stage_times(coef, t, h, y.dtype)[: coef.stages]
        states, self._cotangents = self._kernel.begin_linear(times, y.shape[1])
        self._h = h
        self._size = h.to(y.dtype)[:, None]
        linearize_stages(self._kernel, coef, self._size, y, work, states)
        torch.mv(work.earlier[coef.stages], coef.b, out=work.flat_state)
        return work.state.mul_(self._size)

    def pull(self, cotangent: Tensor, extra: Tensor | None) -> Tensor:
        """Return the cotangent of y (A, D), given that of Psi_h(t, y).

        `extra`: further cotangents of the first stages. The result is valid until the
        next call.
        """
        coef, work, pulls, kernel = self._coef, self._work, self._pulls, self._kernel
        last = coef.stages
        slots = self._cotangents.unbind()
        # The slot behind the stages holds the cotangent of the end: see `checkpoint`.
        pulls.slopes[last].copy_(cotangent)
        for i in reversed(range(last)):
            torch.mv(pulls.later[i], coef.a_next[i], out=work.flat_state)
            v = torch.mul(work.state, self._size, out=slots[i])
            if extra is not None and i < len(extra):
                v += extra[i]
            kernel.pull(i, pulls.slopes[i])
        if self._timed:
            self._time_gradient()
        kernel.accumulate(last)
        return pulls.k[:-1].sum(dim=0)

    def _time_gradient(self) -> None:
        coef, dtype, stages = self._coef, self._h.dtype, self._coef.stages
        moved = torch.stack([self._kernel.pull_time(i) for i in range(stages)])
        moved = moved.to(dtype)
        by_length = (self.k * self._cotangents).sum(dim=(0, 2)).to(dtype)
        grad_h = (coef.c[:stages] * moved).sum(dim=0) + by_length / or_one(self._h)
        self._times = moved.sum(dim=0), grad_h

    def time_gradient(self) -> tuple[Tensor, Tensor]:
        """Return dL/dt and dL/dh, (A,), after `pull`."""
        return self._times
