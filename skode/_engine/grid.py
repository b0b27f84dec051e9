"""Steps on a coarse grid that all rows share, with their errors as an output.

Where a field is being trained, a few large steps are enough while its solutions stay
easy. Whether they are, the embedded error estimates say; as an output that can be
differentiated, they can be part of the loss, which keeps them easy (Pal, Ma, Shah &
Rackauckas 2021, arXiv:2105.03918). B rows, D state, S stages, N steps.

All evaluations of a march are slots of one kernel: N steps have S N + 1, since the last
evaluation of a step is the first of the next.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from skode._engine.compiled_march import CompiledMarch
from skode._engine.kernel import Field, Kernel, bind
from skode._engine.tableau import TABLEAUX, Tableau


class Grid:
    """A field to march along shared knots, again and again; it keeps its memory.

    Parameters
    ----------
    field : callable
        ``f(t, y)`` as for `solve`. Values of its parameters may change between marches.
    params : sequence of Tensor
        What it depends on and wants a gradient.
    controlled : int
        How many columns of the state the error is measured in, from the first on.
    method : str, default="bosh3"
        One of our own with an error estimate.
    compile : bool, default=False
        Whether compiled code serves where there is any: on a CPU with a C++ compiler,
        for a field that is a flow known as data.
    """

    def __init__(
        self,
        field: Field,
        params: Sequence[Tensor],
        controlled: int,
        method: str = "bosh3",
        compile: bool = False,
    ) -> None:
        self.tableau: Tableau = TABLEAUX[method]
        if not self.tableau.adaptive:
            raise ValueError(f"method={method!r} has no error estimate.")
        self.params = tuple(params)
        self.controlled = controlled
        self._field, self._compile = field, compile
        self.kernel: Kernel = bind(field, self.params)
        self._slopes = torch.empty(0)
        self.marches = 0

    def march(self, y: Tensor, knots: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Return the state at the last knot, and how far the steps were off.

        A march is differentiated before the next one, which writes over its memory.

        Parameters
        ----------
        y : Tensor of shape (B, D)
            States at the first knot.
        knots : sequence of float
            Monotone, at least two.

        Returns
        -------
        y1 : Tensor of shape (B, D)
            States at the last knot.
        error : Tensor of shape (B,)
            Sum over the steps of the squared norm of their embedded error.
        """
        if self._compile:
            fast = CompiledMarch.of(
                self._field, self.params, self.tableau, tuple(knots), self.controlled, y
            )
            if fast is not None:
                return fast.run(y, self.params)
        run: Any = _March.apply
        y1, error = run(self, tuple(knots), y, *self.params)
        return y1, error

    def slopes(self, slots: int, y: Tensor) -> Tensor:
        """Return memory (slots, B, D); what an earlier march left there is lost."""
        if self._slopes.shape != (slots, *y.shape) or self._slopes.dtype != y.dtype:
            self._slopes = y.new_empty(slots, *y.shape)
        return self._slopes


class _March(torch.autograd.Function):
    """With step h from y: k_i = f(t + c_i h, y + h sum_j a_ij k_j), k_S = f(t + h, y1).

    y1 = y + h sum_i b_i k_i and e = h sum_i (b_i - b*_i) k_i. Given the cotangents u of
    y1 and w of |e|^2, k_i has the cotangent v_i = h (b_i u + sum_{j>i} a_ji l_j +
    (b_i - b*_i) 2 w e) with l_j = v_j . df/dy, and y has u + sum_i l_i. l_S belongs to
    y1; v_S gathers what the next step makes of its first stage.
    """

    @staticmethod
    def forward(
        ctx: Any, grid: Grid, knots: tuple[float, ...], y: Tensor, *params: Tensor
    ) -> tuple[Tensor, Tensor]:
        tab, kernel, m = grid.tableau, grid.kernel, grid.controlled
        n, s = len(knots) - 1, tab.stages
        grid.marches += 1
        times = [
            knots[i] + c * (knots[i + 1] - knots[i]) for i in range(n) for c in tab.c
        ]
        column = torch.tensor([*times, knots[-1]], dtype=y.dtype, device=y.device)
        states, cotangents = kernel.begin_linear(
            column[:, None].repeat(1, len(y)), y.shape[1]
        )
        k = grid.slopes(n * s + 1, y)
        error = y.new_zeros(len(y))
        errors = []
        states[0].copy_(y)
        kernel.linearize(0, k[0])
        for i in range(n):
            h, first = knots[i + 1] - knots[i], i * s
            for j in range(1, s + 1):
                weights = tab.b if j == s else tab.a[j]
                _combine(states[first], h, weights, k[first:], states[first + j])
                kernel.linearize(first + j, k[first + j])
            e = torch.zeros_like(k[0, :, :m])
            for j, weight in enumerate(tab.b_err):
                if weight:
                    e.add_(k[first + j, :, :m], alpha=h * weight)
            errors.append(e)
            error += e.square().sum(dim=1)
        ctx.grid, ctx.knots, ctx.errors = grid, knots, errors
        ctx.cotangents, ctx.march = cotangents, grid.marches
        return states[-1].clone(), error

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor, grad_error: Tensor
    ) -> tuple[Tensor | None, ...]:
        grid, knots, v = ctx.grid, ctx.knots, ctx.cotangents
        assert ctx.march == grid.marches, "differentiate a march before the next one"
        tab, kernel, m = grid.tableau, grid.kernel, grid.controlled
        s = tab.stages
        u, pulled = grad.clone(), grad.new_empty(s + 1, *grad.shape)
        v[-1].zero_()
        for i in reversed(range(len(knots) - 1)):
            h, first = knots[i + 1] - knots[i], i * s
            e = ctx.errors[i] * (2 * grad_error[:, None])
            v[first + s, :, :m].add_(e, alpha=h * tab.b_err[s])
            kernel.pull(first + s, pulled[s])
            u += pulled[s]
            for j in reversed(range(s)):
                slot = v[first + j]
                torch.mul(u, h * tab.b[j], out=slot)
                if tab.b_err[j]:
                    slot[:, :m].add_(e, alpha=h * tab.b_err[j])
                for later in range(j + 1, s):
                    weight = tab.a[later][j]
                    if weight:
                        slot.add_(pulled[later], alpha=h * weight)
                if j > 0:
                    kernel.pull(first + j, pulled[j])
            for j in range(1, s):
                u += pulled[j]
        kernel.pull(0, pulled[0])
        u += pulled[0]
        kernel.accumulate(len(v))
        return None, None, u, *kernel.gradients()


def _combine(
    y: Tensor, h: float, weights: Sequence[float], k: Tensor, out: Tensor
) -> None:
    """Write y + h sum_i weights_i k_i to `out`."""
    start = y
    for i, weight in enumerate(weights):
        if weight:
            torch.add(start, k[i], alpha=h * weight, out=out)
            start = out
