"""Exact gradient of the discrete solution, from the states of its steps alone.

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
carry no gradient of their own. B rows, A of them in a group, D state, E events.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from skode._engine.dense import Requests, powers, slopes_of_powers
from skode._engine.kernel import Kernel
from skode._engine.plan import Plan
from skode._engine.step import Workspace, end_of_step, fill_stages, stage_times
from skode._engine.tableau import Coefficients
from skode._engine.tape import Group, Tape


class Checkpoint(torch.autograd.Function):
    """Solve; keep (t, h, y) of each step; replay one step at a time backwards."""

    @staticmethod
    def forward(
        ctx: Any, plan: Plan, y0: Tensor, times: Tensor, *params: Tensor
    ) -> tuple[Tensor, ...]:
        ys, stats, requests, tape = plan.forward(y0, times, record=True)
        ctx.plan, ctx.requests, ctx.tape = plan, requests, tape
        ctx.save_for_backward(y0, ys[:, -1].clone(), *params)
        extras = (
            stats.status,
            stats.t,
            stats.n_accepted,
            stats.n_rejected,
            stats.nfe,
        )
        ctx.mark_non_differentiable(*extras)
        return ys, *extras

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        y0, y1, *_params = ctx.saved_tensors
        needs_times = ctx.needs_input_grad[2]
        reverse = _Reverse(ctx.plan, ctx.tape, ctx.requests, grad, needs_times)
        grad_y0 = reverse.run(y0)
        grad_times = reverse.times(y0, y1) if needs_times else None
        return None, grad_y0, grad_times, *reverse.kernel.gradients()


class _Reverse:
    """One backward pass over a tape."""

    def __init__(
        self, plan: Plan, tape: Tape, requests: Requests, grad: Tensor, timed: bool
    ) -> None:
        self._plan, self._tape, self._requests = plan, tape, requests
        self._grad = grad
        self._timed = timed
        self.kernel: Kernel = plan.kernel(plan.tableau.stages + 1)

    def run(self, y0: Tensor) -> Tensor:
        """Return dL/dy0; leave dL/dtheta in the kernel, dL/dt in the fields."""
        requests, grad, order = self._requests, self._grad, self._tape.order
        times = requests.times
        coef = self._plan.coefficients(y0, times)
        u = _masked_sum(grad, requests.at_end).index_select(0, order)
        self._grad_t = torch.zeros_like(times)
        if self._tape.groups:
            self._coef = coef
            self._work = Workspace(coef, u[: len(self._tape.groups[0].t)])
            self._pulls = Workspace(coef, u[: len(self._tape.groups[0].t)])
            self._later = self._pulls.later()
            for group in reversed(self._tape.groups):
                self._step(group, u)
        grad_y0 = torch.empty_like(u)
        grad_y0[order] = u
        return grad_y0.add_(_masked_sum(grad, requests.at_start))

    def times(self, y0: Tensor, y1: Tensor) -> Tensor:
        """Return dL/d times, (B, T), after `run`."""
        times = self._requests.times
        for column, idle, y in zip(
            (0, -1), self._requests.idle(), (y0, y1), strict=True
        ):
            if bool(idle.any()):
                slope = torch.empty_like(y)
                self.kernel.evaluate(0, times[:, column].to(y.dtype), y, slope)
                moved = torch.einsum("btd,bd->bt", self._grad, slope) * idle
                self._grad_t += moved
                self._grad_t[:, column] -= moved.sum(dim=1)
        return self._grad_t

    def _step(self, group: Group, u_all: Tensor) -> None:
        """Pull the cotangents of the first A rows back through one step."""
        coef, work, pulls, kernel = self._coef, self._work, self._pulls, self.kernel
        rows, dtype = group.t.shape[0], u_all.dtype
        if rows != work.rows:
            work.resize(rows)
            pulls.resize(rows)
            self._later = pulls.later()
        u = u_all[:rows]
        h = group.h.to(dtype)[:, None]
        times = stage_times(coef, group.t, group.h, dtype)
        kernel.linearize(0, times[0], group.y, work.slopes[0])
        fill_stages(kernel.linearize, coef, times, h, group.y, work)

        last = coef.stages
        inside = None if group.position is None else self._inside(group)
        extra = None
        if inside is not None:
            extra = inside.cotangents(coef, torch.zeros_like(work.k))
            y_next = end_of_step(coef, h, group.y, work)
            kernel.linearize(last, times[last], y_next, work.slopes[last])
            kernel.pull(last, extra[last], pulls.slopes[last])
            u += pulls.slopes[last]
        cotangents: list[Tensor] = []
        # The slot behind the stages holds u, so that v_i is one product of a_next.
        pulls.slopes[last].copy_(u)
        for i in reversed(range(last)):
            v = torch.mv(self._later[i], coef.a_next[i]).view_as(u).mul_(h)
            if extra is not None:
                v += extra[i]
            kernel.pull(i, v, pulls.slopes[i])
            if self._timed:
                cotangents.insert(0, v)
        used = last if extra is None else last + 1
        kernel.accumulate(used)
        torch.sum(pulls.k, dim=0, out=u)
        if inside is not None:
            u.index_add_(0, inside.position, inside.grad)
        if self._timed:
            if extra is not None:
                cotangents.append(extra[last])
            self._time_gradient(group, torch.stack(cotangents), inside)

    def _inside(self, group: Group) -> "_Inside":
        assert group.position is not None and group.index is not None
        rows = self._tape.order[group.position]
        t, h = group.t[group.position], group.h[group.position]
        theta = (self._requests.times[rows, group.index] - t) / h
        grad = self._grad[rows, group.index]
        return _Inside(rows, group.index, group.position, h, theta, grad)

    def _time_gradient(
        self, group: Group, cotangents: Tensor, inside: "_Inside | None"
    ) -> None:
        """Add dL/dt and dL/dh of the step to the first, last and inside times.

        `cotangents` are the v_i, (S, A, D), or (S + 1, A, D) with times inside.
        """
        coef, k, dtype = self._coef, self._work.k, group.t.dtype
        used = len(cotangents)
        moved = torch.stack([self.kernel.pull_time(i) for i in range(used)]).to(dtype)
        grad_t = moved.sum(dim=0)
        grad_h = (coef.c[:used] * moved).sum(dim=0)
        grad_h += (k[:used] * cotangents).sum(dim=(0, 2)).to(dtype) / group.h
        if inside is not None:
            rate = inside.rate(coef, k).to(dtype)
            self._grad_t.index_put_((inside.rows, inside.index), rate, accumulate=True)
            grad_t.index_add_(0, inside.position, -rate)
            grad_h.index_add_(0, inside.position, -rate * inside.theta)
        rows = self._tape.order[: len(group.t)]
        t0, t1 = self._requests.times[rows, 0], self._requests.times[rows, -1]
        before, share = (group.t - t0) / (t1 - t0), group.h / (t1 - t0)
        self._grad_t[rows, 0] += (1 - before) * grad_t - share * grad_h
        self._grad_t[rows, -1] += before * grad_t + share * grad_h


def _masked_sum(grad: Tensor, mask: Tensor) -> Tensor:
    """Sum grad (B, T, D) over the times of a mask (B, T)."""
    return torch.bmm(mask.to(grad.dtype).unsqueeze(1), grad).squeeze(1)


@dataclass(frozen=True, slots=True)
class _Inside:
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

    def cotangents(self, coef: Coefficients, zeros: Tensor) -> Tensor:
        """Return h b_i(theta) grad summed into (S + 1, A, D)."""
        dtype = self.grad.dtype
        weights = powers(self.theta.to(dtype), len(coef.dense)) @ coef.dense
        weights = weights * self.h.to(dtype)[:, None]
        added = torch.einsum("es,ed->sed", weights, self.grad)
        return zeros.index_add_(1, self.position, added)

    def rate(self, coef: Coefficients, k: Tensor) -> Tensor:
        """Return grad . dy/dt of the dense output, (E,)."""
        theta = self.theta.to(self.grad.dtype)
        weights = slopes_of_powers(theta, len(coef.dense)) @ coef.dense
        slope = torch.einsum("es,sed->ed", weights, k[:, self.position])
        return (slope * self.grad).sum(dim=-1)
