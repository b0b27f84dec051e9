"""One Runge-Kutta step of every row. S stages, B rows, D state.

`fill_stages` is what the loop runs: no autograd, nothing allocated but y1.
`differentiable_step` is its plain twin.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from skode._engine.kernel import Field, checked
from skode._engine.tableau import Coefficients

Evaluate = Callable[[int, Tensor, Tensor, Tensor], None]
"""(slot, t, y, out) -> None: writes f(t, y) to out."""


class Workspace:
    """Memory for the stages of up to B rows, viewed for the first A of them."""

    def __init__(self, coef: Coefficients, y: Tensor) -> None:
        self._flat = torch.zeros(
            (coef.stages + 1) * y.numel(), dtype=y.dtype, device=y.device
        )
        self._state = torch.empty_like(y, memory_format=torch.contiguous_format)
        self._stages = coef.stages + 1
        self.resize(len(y))

    def resize(self, rows: int) -> None:
        """View the memory as that of `rows` rows; contents are lost."""
        dim = self._state.shape[1]
        flat = self._flat[: self._stages * rows * dim]
        self.k = flat.view(self._stages, rows, dim)
        """(S + 1, A, D) stage derivatives."""
        self.slopes = tuple(self.k)
        self.state = self._state[:rows]
        """(A, D) argument of a stage."""
        self.flat_state = self.state.view(-1)
        table = flat.view(self._stages, rows * dim)
        self.table = table.T
        """(A D, S + 1) the same numbers as `k`."""
        self.earlier = tuple(self.table[:, :i] for i in range(self._stages + 1))
        """For i stages, (A D, i)."""
        self.rows = rows

    def later(self) -> tuple[Tensor, ...]:
        """View all behind stage i, (A D, S - i), for every i."""
        return tuple(self.table[:, i + 1 :] for i in range(self._stages))


def fill_stages(
    evaluate: Evaluate,
    coef: Coefficients,
    times: Sequence[Tensor],
    h: Tensor,
    y: Tensor,
    work: Workspace,
) -> None:
    """Evaluate stages 1 .. S-1 given stage 0.

    Parameters
    ----------
    evaluate : callable
        ``kernel.evaluate``, or ``kernel.linearize`` to remember the stages.
    times : S + 1 tensors of shape (A,)
        Times of the stages, in the dtype of the state.
    h : Tensor of shape (A, 1)
        Signed steps, in the dtype of the state.
    y : Tensor of shape (A, D)
        States before the step; left as they are.
    """
    state, flat = work.state, work.flat_state
    for i in range(1, coef.stages):
        torch.mv(work.earlier[i], coef.a[i], out=flat)
        torch.addcmul(y, h, state, out=state)
        evaluate(i, times[i], state, work.slopes[i])


def end_of_step(coef: Coefficients, h: Tensor, y: Tensor, work: Workspace) -> Tensor:
    """Return y1, given all stages."""
    torch.mv(work.earlier[coef.stages], coef.b, out=work.flat_state)
    return torch.addcmul(y, h, work.state)


def stage_times(
    coef: Coefficients, t: Tensor, h: Tensor, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Return t + c h, (A,), of each of S + 1 stages, in the dtype of the state."""
    return torch.addcmul(t, coef.c, h).to(dtype).unbind()


def differentiable_step(
    field: Field, coef: Coefficients, t: Tensor, h: Tensor, y: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Return y1 and the S stage derivatives, all known to autograd."""
    times = stage_times(coef, t, h, y.dtype)
    scale = h.to(y.dtype)[:, None]
    k: list[Tensor] = []
    for i in range(coef.stages):
        increment = combine(coef.a[i], k) if k else torch.zeros_like(y)
        state = y + scale * increment
        k.append(checked(field(times[i], state), state))
    return y + scale * combine(coef.b, k), k


def combine(weights: Tensor, k: list[Tensor]) -> Tensor:
    """Return sum_i weights_i k_i."""
    return torch.einsum("s,sad->ad", weights, torch.stack(k))
