"""One Runge-Kutta step of every row. S stages, B rows, D state.

`fill_stages` and `end_of_step` are what the loop runs: no autograd, nothing allocated
but y1. `differentiable_step` is their plain twin.
"""

from functools import cached_property

import torch
from torch import Tensor

from skode._engine.kernel import Evaluator, Field, Kernel, checked
from skode._engine.tableau import Coefficients

_WORTH_COMPACTING = 512
"""Numbers of state; fewer cost less to carry along than to sort out."""


def worth_compacting(y: Tensor, alive: int) -> bool:
    """Return whether to leave behind the rows of y (A, D) that are no longer alive.

    On a GPU they cost nothing.
    """
    rows, dim = y.shape
    ended = rows - alive
    many = 4 * ended >= rows and ended * dim >= _WORTH_COMPACTING
    return many and y.device.type == "cpu"


def even_steps(span: Tensor, step_size: float) -> Tensor:
    """Return into how many steps, at least one, to divide spans (A,) evenly."""
    # A quotient that exceeds an integer by rounding alone asks for no further step.
    quotient = span.abs() / step_size * (1 - 4 * torch.finfo(span.dtype).eps)
    return torch.ceil(quotient).clamp_(min=1)


class Workspace:
    """Memory for the stages of up to B rows, viewed for the first A of them."""

    def __init__(self, coef: Coefficients, y: Tensor) -> None:
        self._stages = coef.stages + 1
        self._flat = y.new_zeros(self._stages * y.numel())
        self._state = torch.empty_like(y, memory_format=torch.contiguous_format)
        self.resize(y.shape[0])

    def resize(self, rows: int) -> None:
        """View the memory as that of `rows` rows; contents are lost."""
        dim = self._state.shape[1]
        flat = self._flat[: self._stages * rows * dim]
        self.k = flat.view(self._stages, rows, dim)
        """(S + 1, A, D) stage derivatives."""
        self.slopes = self.k.unbind()
        self.state = self._state[:rows]
        """(A, D) argument of a stage."""
        self.flat_state = self.state.view(-1)
        self.table = flat.view(self._stages, rows * dim).T
        """(A D, S + 1) the same numbers as `k`."""
        self.rows = rows
        # Forwards one half of the views below is used, backwards the other.
        self.__dict__.pop("earlier", None)
        self.__dict__.pop("later", None)

    @cached_property
    def earlier(self) -> tuple[Tensor, ...]:
        """All before stage i, (A D, i), for i from 0 to S."""
        return tuple(self.table[:, :i] for i in range(self._stages))

    @cached_property
    def later(self) -> tuple[Tensor, ...]:
        """All behind stage i, (A D, S - i), for i from 0 to S - 1."""
        return tuple(self.table[:, i:] for i in range(1, self._stages))


def fill_stages(
    kernel: Evaluator, coef: Coefficients, h: Tensor, y: Tensor, work: Workspace
) -> None:
    """Evaluate stages 1 .. S-1 given stage 0, the kernel having begun.

    Parameters
    ----------
    h : Tensor of shape (A, 1)
        Signed steps, in the dtype of the state.
    y : Tensor of shape (A, D)
        States before the step; left as they are.
    """
    state, flat, earlier = work.state, work.flat_state, work.earlier
    for i in range(1, coef.stages):
        torch.mv(earlier[i], coef.a[i], out=flat)
        torch.addcmul(y, h, state, out=state)
        kernel.evaluate(i, state, work.slopes[i])


def linearize_stages(
    kernel: Kernel,
    coef: Coefficients,
    h: Tensor,
    y: Tensor,
    work: Workspace,
    states: Tensor,
) -> None:
    """Evaluate stages 0 .. S-1 and have the kernel remember them in its slots."""
    slots, earlier = states.unbind(), work.earlier
    slots[0].copy_(y)
    kernel.linearize(0, work.slopes[0])
    for i in range(1, coef.stages):
        torch.mv(earlier[i], coef.a[i], out=work.flat_state)
        torch.addcmul(y, h, work.state, out=slots[i])
        kernel.linearize(i, work.slopes[i])


def linearize_known(
    kernel: Kernel, coef: Coefficients, h: Tensor, y: Tensor, k: Tensor, states: Tensor
) -> None:
    """Do the same at once, given the stages k (S + 1, A, D)."""
    known = k[: coef.stages].flatten(1)
    torch.mm(coef.a_square, known, out=states.view(known.shape))
    torch.addcmul(y, h, states, out=states)
    kernel.linearize_all()


def end_of_step(coef: Coefficients, h: Tensor, y: Tensor, work: Workspace) -> Tensor:
    """Return y1, given all stages."""
    torch.mv(work.earlier[coef.stages], coef.b, out=work.flat_state)
    return torch.addcmul(y, h, work.state)


def stage_times(coef: Coefficients, t: Tensor, h: Tensor, dtype: torch.dtype) -> Tensor:
    """Return t + c h of each of S + 1 stages, (S + 1, A), in the dtype of the state."""
    return torch.addcmul(t, coef.c, h).to(dtype)


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
