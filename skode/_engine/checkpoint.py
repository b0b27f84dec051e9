"""Exact gradient of the discrete solution, from the states of its steps.

One step maps (t, h, y) to y1 = y + h sum_i b_i k_i with k_i = f(t_i, Y_i),
t_i = t + c_i h and Y_i = y + h sum_{j<i} a_ij k_j. Given the cotangent u of y1, run
from the last stage to the first:

    v_i = h (b_i u + sum_{j>i} a_ji l_j)      cotangent of k_i
    l_i = v_i . df/dy(t_i, Y_i)               cotangent of Y_i
    u  <- u + sum_i l_i                       cotangent of y
    dL/dtheta += sum_i v_i . df/dtheta        one product for all stages
    dL/dt  = sum_i v_i . df/dt
    dL/dh  = sum_i (k_i . v_i) / h + c_i v_i . df/dt

A requested time inside the step reads y + h sum_i b_i(theta) k_i, where k_S =
f(t + h, y1): it adds to the v_i, and l_S to u. Steps are fixed fractions of the time
span, as differentiable as the span itself: step sizes are chosen by the tolerance and
carry no gradient of their own. B rows, A of them in a step, D state, E events.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skode._engine.backprop import backprop
from skode._engine.dense import Events, Requests, powers, slopes_of_powers
from skode._engine.kernel import Evaluator, Kernel
from skode._engine.plan import Plan
from skode._engine.step import (
    Workspace,
    end_of_step,
    linearize_known,
    linearize_stages,
    stage_times,
)
from skode._engine.tableau import Coefficients
from skode._engine.tape import Taken, Tape, flat, unflat


class Checkpoint(torch.autograd.Function):
    """Solve; keep (t, h, y) of each step; replay one step at a time backwards."""

    @staticmethod
    def forward(
        ctx: Any, plan: Plan, y0: Tensor, times: Tensor, *params: Tensor
    ) -> tuple[Tensor, ...]:
        ys, stats, _, tape = plan.record(y0, times)
        ctx.plan, ctx.steps = plan, len(tape)
        ctx.save_for_backward(y0, ys[:, -1].clone(), times, *flat(tape), *params)
        columns = stats.columns()
        ctx.mark_non_differentiable(*columns)
        return ys, *columns

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        y0, y1, times, *rest = ctx.saved_tensors
        if torch.is_grad_enabled():
            inputs = (y0, times, *rest[len(rest) - len(ctx.plan.params) :])
            return None, *by_autograd(ctx.plan, inputs, grad)
        tape, needs_times = unflat(rest, ctx.steps), ctx.needs_input_grad[2]
        with torch.no_grad():
            reverse = _Reverse(ctx.plan, tape, Requests(times), grad, needs_times)
            grad_y0 = reverse.run(y0)
            grad_times = reverse.times(y0, y1) if needs_times else None
        return None, grad_y0, grad_times, *reverse.kernel.gradients()


def replayed(
    plan: Plan, tape: Tape, requests: Requests, grad: Tensor, timed: bool
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """Return dL/dy0 (B, D), dL/dtimes (B, T) and those of the parameters.

    `grad` (B, T, D) is that of the requested states. Times that repeat the first or the
    last one are left to `add_idle_times`.
    """
    reverse = _Reverse(plan, tape, requests, grad, timed)
    grad_y0 = reverse.run(grad[:, 0])
    return grad_y0, reverse.grad_times, reverse.kernel.gradients()


def require_first_order(name: str) -> None:
    """Refuse to be differentiated again: the second derivative would be incomplete.

    Raises
    ------
    RuntimeError
        If autograd records the backward pass.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"gradient={name!r} has no second derivative: solve with "
            "gradient='checkpoint' or 'backprop' where create_graph=True is needed."
        )


def by_autograd(
    plan: Plan, inputs: tuple[Tensor, ...], grad: Tensor
) -> Iterator[Tensor | None]:
    """Yield a gradient that can be differentiated again: autograd's own."""
    ys, _ = backprop(plan, inputs[0], inputs[1])
    wanted = [x for x in inputs if x.requires_grad]
    grads = torch.autograd.grad(ys, wanted, grad, create_graph=True, allow_unused=True)
    found = iter(grads)
    for x in inputs:
        yield next(found) if x.requires_grad else None


class _Reverse:
    """One backward pass over a tape."""

    def __init__(
        self, plan: Plan, tape: Tape, requests: Requests, grad: Tensor, timed: bool
    ) -> None:
        self._plan, self._tape, self._requests = plan, tape, requests
        self._grad, self._timed = grad, timed
        self.kernel: Kernel = plan.kernel()

    def run(self, like: Tensor) -> Tensor:
        """Return dL/dy0; leave dL/dtheta in the kernel, dL/dt in `grad_times`."""
        requests, grad = self._requests, self._grad
        u = requests.sum_at_end(grad)
        self.grad_times = torch.zeros_like(requests.times)
        if self._tape:
            self._coef = self._plan.coefficients(like, requests.times)
            self._work = Workspace(self._coef, u)
            self._pulls = Workspace(self._coef, u)
            for taken in reversed(self._tape):
                if taken.rows is None:
                    self._step(taken, u)
                else:
                    part = u.index_select(0, taken.rows)
                    self._step(taken, part)
                    u.index_copy_(0, taken.rows, part)
        return u.add_(requests.sum_at_start(grad))

    def times(self, y0: Tensor, y1: Tensor) -> Tensor:
        """Return dL/d times, (B, T), after `run`."""
        add_idle_times(self._requests, self.kernel, self._grad, y0, y1, self.grad_times)
        return self.grad_times

    def _step(self, taken: Taken, u: Tensor) -> None:
        """Pull the cotangents u (A, D) of its rows back through one step, in place."""
        coef, work, pulls, kernel = self._coef, self._work, self._pulls, self.kernel
        rows, dtype = u.shape[0], u.dtype
        if rows != work.rows:
            work.resize(rows)
            pulls.resize(rows)
        last = coef.stages
        inside = None if taken.events is None else self._inside(taken, taken.events)
        used = last if inside is None else last + 1
        h = taken.h.to(dtype)[:, None]
        cotangents = self._linearize(taken, h, used)

        slots, extra = cotangents.unbind(), None
        if inside is not None:
            extra = inside.cotangents(coef, torch.zeros_like(work.k))
            slots[last].copy_(extra[last])
            kernel.pull(last, pulls.slopes[last])
            u += pulls.slopes[last]
        # The slot behind the stages holds u, so that v_i is one product of a_next.
        pulls.slopes[last].copy_(u)
        for i in reversed(range(last)):
            torch.mv(pulls.later[i], coef.a_next[i], out=work.flat_state)
            v = torch.mul(work.state, h, out=slots[i])
            if extra is not None:
                v += extra[i]
            kernel.pull(i, pulls.slopes[i])
        torch.sum(pulls.k, dim=0, out=u)
        if inside is not None:
            u.index_add_(0, inside.position, inside.grad)
        if self._timed:
            self._time_gradient(taken, cotangents, inside)
        kernel.accumulate(used)

    def _linearize(self, taken: Taken, h: Tensor, used: int) -> Tensor:
        """Have the kernel remember the first stages; return the cotangents' memory."""
        coef, work, kernel, y = self._coef, self._work, self.kernel, taken.y
        times = stage_times(coef, taken.t, taken.h, y.dtype)[:used]
        states, cotangents = kernel.begin_linear(times, y.shape[1])
        if taken.k is not None and used == coef.stages:
            linearize_known(kernel, coef, h, y, taken.k, states)
        else:
            linearize_stages(kernel, coef, h, y, work, states)
            if used > coef.stages:
                states[-1].copy_(end_of_step(coef, h, y, work))
                kernel.linearize(coef.stages, work.slopes[-1])
        return cotangents

    def _inside(self, taken: Taken, events: Events) -> "Inside":
        return Inside.of(events, self._requests.times, self._grad, taken.t, taken.h)

    def _time_gradient(
        self, taken: Taken, cotangents: Tensor, inside: "Inside | None"
    ) -> None:
        """Add dL/dt and dL/dh of the step to the first, last and inside times.

        `cotangents` are the v_i, (S, A, D), or (S + 1, A, D) with times inside.
        """
        coef, dtype = self._coef, taken.t.dtype
        k = self._work.k if taken.k is None else taken.k
        used = len(cotangents)
        moved = torch.stack([self.kernel.pull_time(i) for i in range(used)]).to(dtype)
        grad_t = moved.sum(dim=0)
        grad_h = (coef.c[:used] * moved).sum(dim=0)
        grad_h += (k[:used] * cotangents).sum(dim=(0, 2)).to(dtype) / or_one(taken.h)
        if inside is not None:
            inside.add_times(inside.rate(coef, k), self.grad_times, grad_t, grad_h)
        ends = self._requests.times[:, [0, -1]]
        if taken.rows is not None:
            ends = ends[taken.rows]
        span = or_one(ends[:, 1] - ends[:, 0])
        left, share = 1 - (taken.t - ends[:, 0]) / span, taken.h / span
        add_ends(self.grad_times, taken.rows, left, share, grad_t, grad_h)


def add_ends(
    grads: Tensor,
    rows: Tensor | None,
    left: Tensor,
    share: Tensor,
    grad_t: Tensor,
    grad_h: Tensor,
) -> None:
    """Add dL/dt and dL/dh (A,) of a step to those of the ends, in grads (B, T).

    The step is `share` of the row's span; from its start on, `left` of it are left.
    """
    where = slice(None) if rows is None else rows
    grads[where, 0] += left * grad_t - share * grad_h
    grads[where, -1] += (1 - left) * grad_t + share * grad_h


def add_idle_times(
    requests: Requests,
    kernel: Evaluator,
    grad: Tensor,
    y0: Tensor,
    y1: Tensor,
    grads: Tensor,
) -> None:
    """Add to grads (B, T) those of times that repeat the first or the last one.

    `grad` (B, T, D) is the cotangent of the requested states.
    """
    times = requests.times
    for column, idle, y in zip((0, -1), requests.idle(), (y0, y1), strict=True):
        if bool(idle.any()):
            slope = torch.empty_like(y)
            kernel.begin(times[:, column].to(y.dtype)[None])
            kernel.evaluate(0, y, slope)
            # A row that failed has no slope; a loss that does not look at it, 0.
            product = torch.where(grad == 0, 0.0, grad * slope[:, None])
            moved = torch.where(idle, product.sum(dim=2), 0.0)
            grads += moved
            grads[:, column] -= moved.sum(dim=1)


def or_one(length: Tensor) -> Tensor:
    """Return a divisor of what is 0 where the length is."""
    return torch.where(length == 0, 1.0, length)


@dataclass(frozen=True, slots=True)
class Inside:
    """Requested times inside one group of steps: E of them."""

    rows: Tensor
    """(E,) rows of the batch."""
    index: Tensor
    """(E,) which of the row's requested times."""
    position: Tensor
    """(E,) place of the row among the A."""
    h: Tensor
    """(E,)."""
    theta: Tensor
    """(E,) share of the step."""
    grad: Tensor
    """(E, D) cotangent of the requested state."""

    @classmethod
    def of(
        cls, events: Events, times: Tensor, grad: Tensor, t: Tensor, h: Tensor
    ) -> "Inside":
        """Find the events in times (B, T), grad (B, T, D) and steps t, h (A,)."""
        at, h = (events.row, events.index), h[events.position]
        theta = (times[at] - t[events.position]) / h
        return cls(events.row, events.index, events.position, h, theta, grad[at])

    def cotangents(self, coef: Coefficients, zeros: Tensor) -> Tensor:
        """Return h b_i(theta) grad summed into (S + 1, A, D)."""
        dtype = self.grad.dtype
        weights = powers(self.theta.to(dtype), len(coef.dense)) @ coef.dense
        weights = weights * self.h.to(dtype)[:, None]
        added = torch.einsum("es,ed->sed", weights, self.grad)
        return zeros.index_add_(1, self.position, added)

    def add_times(
        self, rate: Tensor, grads: Tensor, grad_t: Tensor, grad_h: Tensor
    ) -> None:
        """Add what moving these times does, given `rate` (E,), in place.

        To their own gradients, in grads (B, T), and to dL/dt and dL/dh (A,) of the
        step, since theta = (time - t) / h.
        """
        rate = rate.to(grads.dtype)
        grads.index_put_((self.rows, self.index), rate, accumulate=True)
        grad_t.index_add_(0, self.position, -rate)
        grad_h.index_add_(0, self.position, -rate * self.theta)

    def rate(self, coef: Coefficients, k: Tensor) -> Tensor:
        """Return grad . dy/dt of the dense output, (E,)."""
        theta = self.theta.to(self.grad.dtype)
        weights = slopes_of_powers(theta, len(coef.dense)) @ coef.dense
        slope = torch.einsum("es,sed->ed", weights, k[:, self.position])
        return (slope * self.grad).sum(dim=-1)
