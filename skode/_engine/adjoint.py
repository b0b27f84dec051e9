"""The continuous adjoint: constant memory in the number of steps.

For L a function of y(t_k), the adjoint a = dL/dy follows, backwards in time,

    da/dt = -a . df/dy,      a jumps by dL/dy_k at t_k        (Chen et al. 2018, eq. 4)
    dL/dtheta = integral of a . df/dtheta dt                   (eq. 5)
    dL/dt_k = dL/dy_k . f(t_k, y_k),   dL/dt_0 = -a(t_0) . f(t_0, y_0)

The parameter gradient feeds back into nothing: it is a quadrature over the accepted
steps, summed over rows at once, and no part of the error-controlled state. The
adjoint is linear in its end value, so each row is solved for a / max_k |dL/dy_k|: the
tolerances then mean the same whatever the loss is divided by. The state is solved
again backwards, from what the forward solve had at every requested time.

The gradient is that of the exact solution up to rtol and atol, not the exact gradient
of the computed one. B rows, A of them stepping, T times, D state, S stages.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from skode._engine.checkpoint import require_first_order
from skode._engine.kernel import Kernel
from skode._engine.observer import Step
from skode._engine.plan import Plan
from skode._engine.solution import Solution, Statistics
from skode._engine.step import stage_times
from skode._engine.tableau import Coefficients
from skode.exceptions import SolverError

Forward = Callable[[Tensor, Tensor], tuple[Tensor, Statistics]]
"""y0 (B, D), times (B, T) -> states (B, T, D) and statistics."""


class Adjoint(torch.autograd.Function):
    """Solve by any means; keep the requested states; solve [y, a] back between them."""

    @staticmethod
    def forward(
        ctx: Any,
        forward: Forward,
        remedy: str | None,
        plan: Plan,
        y0: Tensor,
        times: Tensor,
        *params: Tensor,
    ) -> tuple[Tensor, ...]:
        ys, stats = forward(y0, times)
        ctx.plan, ctx.remedy = plan, remedy
        ctx.save_for_backward(ys, times, *params)
        columns = stats.columns()
        ctx.mark_non_differentiable(*columns)
        return ys, *columns

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        require_first_order("adjoint")
        ys, times, *params = ctx.saved_tensors
        plan: Plan = ctx.plan
        with torch.no_grad():
            backwards = _Backwards(plan, ctx.remedy, ys, times, grad)
            grad_y0 = backwards.run()
            grad_times = backwards.times(grad_y0) if ctx.needs_input_grad[4] else None
            grad_y0 = grad_y0 + grad[:, 0]
            # A quadrature of nothing is 0, where the field leaves a parameter unused.
            grads = [
                torch.zeros_like(param) if found is None else found
                for found, param in zip(
                    backwards.quadrature.gradients(), params, strict=True
                )
            ]
        return None, None, None, grad_y0, grad_times, *grads


class _Augmented:
    """The field of [y, a], made of a field's kernel; nobody differentiates it."""

    def __init__(self, kernel: Kernel, dim: int) -> None:
        self._kernel, self._dim = kernel, dim
        self._states: tuple[Tensor, ...] = ()
        self._cotangents: tuple[Tensor, ...] = ()

    def begin(self, times: Tensor) -> None:
        """Announce the times of the evaluations."""
        states, cotangents = self._kernel.begin_linear(times, self._dim)
        self._states, self._cotangents = states.unbind(), cotangents.unbind()

    def evaluate(self, slot: int, y: Tensor, out: Tensor) -> None:
        """Write [f, -a . df/dy] to `out`."""
        dim = self._dim
        self._states[slot].copy_(y[:, :dim])
        torch.neg(y[:, dim:], out=self._cotangents[slot])
        self._kernel.linearize(slot, out[:, :dim])
        self._kernel.pull(slot, out[:, dim:])


class _Quadrature:
    """Observer that integrates a . df/dtheta over the accepted steps."""

    def __init__(self, kernel: Kernel, coef: Coefficients, scale: Tensor) -> None:
        self._kernel, self._coef, self._scale = kernel, coef, scale

    def observe(self, step: Step) -> None:
        """Add h b_i a_i . df/dtheta of all stages, as one slot of S A rows."""
        coef, stages = self._coef, self._coef.stages
        t, h, y, k = step.t, step.h, step.y, step.k[:stages]
        scale = self._scale if step.rows is None else self._scale[step.rows]
        if step.moved is not None:  # a refused step may have met NaN
            keep = torch.nonzero(step.moved)[:, 0]
            if len(keep) == 0:
                return
            t, h, y, scale = (x.index_select(0, keep) for x in (t, h, y, scale))
            k = k.index_select(1, keep)
        dim = y.shape[1] // 2
        times = stage_times(coef, t, h, y.dtype)[:stages]
        h = h.to(y.dtype)
        k = k.reshape(stages, -1)
        # Backwards in time h is negative, and so is the sign of eq. 5.
        weight = -h
        state = y + h[:, None] * (coef.a_square @ k).view(stages, *y.shape)
        cotangent = state[:, :, dim:] * (coef.b[:, None] * (weight * scale))[:, :, None]
        states, cotangents = self._kernel.begin_linear(times.reshape(1, -1), dim)
        states.view_as(cotangent).copy_(state[:, :, :dim])
        cotangents.view_as(cotangent).copy_(cotangent)
        self._kernel.linearize_all()
        self._kernel.pull(0, torch.empty_like(states[0]))
        self._kernel.accumulate(1)


class _Backwards:
    """One backward pass over the requested times."""

    def __init__(
        self, plan: Plan, remedy: str | None, ys: Tensor, times: Tensor, grad: Tensor
    ) -> None:
        tolerance = replace(plan.tolerance, parts=plan.tolerance.parts * 2)
        self._plan = plan = replace(plan, tolerance=tolerance)
        self._remedy = remedy
        self._ys, self._times, self._grad = ys, times, grad
        self.quadrature = plan.kernel()

    def run(self) -> Tensor:
        """Return a(t0) before the jump there, (B, D)."""
        ys, times, grad = self._ys, self._times, self._grad
        dim = ys.shape[2]
        scale = grad.abs().amax(dim=(1, 2))
        scale = torch.where(scale > 0, scale, 1.0)
        kernel = _Augmented(self._plan.untrained_kernel(), dim)
        coef = self._plan.coefficients(ys, times)
        quadrature = _Quadrature(self.quadrature, coef, scale)
        a = torch.zeros_like(ys[:, 0])
        for i in range(times.shape[1] - 1, 0, -1):
            a = a + grad[:, i] / scale[:, None]
            # Where nothing is asked there is nothing to solve, nor, maybe, a state.
            asked = (a != 0).any(dim=1)
            z = torch.cat((ys[:, i], a), dim=1)
            z = torch.where(asked[:, None], z, 0.0)
            end = torch.where(asked, times[:, i - 1], times[:, i])
            z, stats = self._plan.run(kernel, z, times[:, i], end, [quadrature])
            self._require(Solution(z[:, None], stats, self._plan.tolerance))
            a = z[:, dim:]
        return a * scale[:, None]

    def _require(self, solution: Solution) -> None:
        try:
            solution.require_success()
        except SolverError as error:
            error.remedy = self._remedy or (
                "This happened while solving the adjoint backwards in time, where a "
                "field that contracts forwards expands: gradient='checkpoint' needs "
                f"no such solve. {error.remedy}"
            )
            raise

    def times(self, a: Tensor) -> Tensor:
        """Return dL/d times, (B, T), given a(t0) before the jump there."""
        batch, count, dim = self._ys.shape
        flat = self._ys.reshape(-1, dim)
        slope = torch.empty_like(flat)
        self.quadrature.begin(self._times.reshape(1, -1).to(flat.dtype))
        self.quadrature.evaluate(0, flat, slope)
        slope = slope.view(batch, count, dim)
        cotangent = torch.cat((-a[:, None], self._grad[:, 1:]), dim=1)
        product = torch.where(cotangent != 0, slope * cotangent, 0.0)
        return product.sum(dim=2).to(self._times.dtype)
