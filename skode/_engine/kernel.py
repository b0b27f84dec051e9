"""A vector field bound to one solve, with its derivatives. B rows, D state.

A kernel evaluates a field without autograd, and pulls cotangents back through
evaluations that it was asked to remember. Memories are kept in numbered slots, one
per stage of a step, so that the parameter gradient of all stages can be formed in
one product. A field with derivatives of its own (`HasKernel`) brings its kernel;
autograd serves all others.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

Field = Callable[[Tensor, Tensor], Tensor]
"""f(t, y) with t: (B,), y: (B, D) -> (B, D)."""


class Kernel(Protocol):
    """A field and its vector-Jacobian products over preallocated memory."""

    def evaluate(self, slot: int, t: Tensor, y: Tensor, out: Tensor) -> None:
        """Write f(t, y) to `out` and remember nothing, whatever the slot."""

    def linearize(self, slot: int, t: Tensor, y: Tensor, out: Tensor) -> None:
        """Write f(t, y) to `out` and remember the evaluation in `slot`."""

    def pull(self, slot: int, cotangent: Tensor, out: Tensor) -> None:
        """Write cotangent . df/dy to `out` (B, D); remember the cotangent."""

    def pull_time(self, slot: int) -> Tensor:
        """Return cotangent . df/dt, (B,), for the cotangent last pulled."""

    def accumulate(self, slots: int) -> None:
        """Add the parameter gradient of the first `slots` slots to the sum."""

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Return the accumulated gradient, aligned with the parameters."""


@runtime_checkable
class HasKernel(Protocol):
    """A field that differentiates itself."""

    def kernel(self, params: Sequence[Tensor], slots: int) -> Kernel | None:
        """Bind to one solve; None where `params` are not the field's own."""


class AutogradKernel:
    """The kernel of any callable field, by autograd."""

    def __init__(self, field: Field, params: Sequence[Tensor], slots: int) -> None:
        self._field = field
        self._params = tuple(params)
        self._memory: list[tuple[Tensor, Tensor, Tensor]] = [()] * slots  # type: ignore[list-item]
        self._pulled: list[tuple[Tensor | None, ...]] = [()] * slots
        self._sums: list[Tensor | None] = [None] * len(self._params)

    def evaluate(self, slot: int, t: Tensor, y: Tensor, out: Tensor) -> None:
        with torch.no_grad():
            out.copy_(checked(self._field(t, y), y))

    def linearize(self, slot: int, t: Tensor, y: Tensor, out: Tensor) -> None:
        with torch.enable_grad():
            t = t.detach().clone().requires_grad_()
            y = y.detach().clone().requires_grad_()
            dy = checked(self._field(t, y), y)
        self._memory[slot] = (t, y, dy)
        out.copy_(dy.detach())

    def pull(self, slot: int, cotangent: Tensor, out: Tensor) -> None:
        t, y, dy = self._memory[slot]
        if not dy.requires_grad:  # a field that ignores t, y and the parameters
            self._pulled[slot] = (None,) * (1 + len(self._params))
            out.zero_()
            return
        trained = [param for param in self._params if param.requires_grad]
        grads = torch.autograd.grad(
            dy, (y, t, *trained), cotangent.detach().clone(), allow_unused=True
        )
        found = iter(grads[2:])
        self._pulled[slot] = (
            grads[1],
            *(next(found) if param.requires_grad else None for param in self._params),
        )
        if grads[0] is None:
            out.zero_()
        else:
            out.copy_(grads[0])

    def pull_time(self, slot: int) -> Tensor:
        gradient = self._pulled[slot][0]
        t = self._memory[slot][0]
        return torch.zeros_like(t) if gradient is None else gradient

    def accumulate(self, slots: int) -> None:
        for pulled in self._pulled[:slots]:
            for i, gradient in enumerate(pulled[1:]):
                if gradient is not None:
                    total = self._sums[i]
                    self._sums[i] = gradient if total is None else total + gradient

    def gradients(self) -> tuple[Tensor | None, ...]:
        return tuple(self._sums)


def bind(field: Field, params: Sequence[Tensor], slots: int) -> Kernel:
    """Return the field's own kernel, or autograd's."""
    if isinstance(field, HasKernel):
        kernel = field.kernel(params, slots)
        if kernel is not None:
            return kernel
    return AutogradKernel(field, params, slots)


def checked(dy: Tensor, y: Tensor) -> Tensor:
    """Return `dy`, or say how it differs from a derivative of `y`."""
    if not isinstance(dy, Tensor):
        raise TypeError(f"The field must return a tensor, not {type(dy).__name__}.")
    if dy.shape != y.shape:
        raise ValueError(
            f"The field must return one derivative per entry of y: y has shape "
            f"{tuple(y.shape)}, f(t, y) has shape {tuple(dy.shape)}."
        )
    if dy.dtype != y.dtype:
        raise TypeError(
            f"The field must keep the dtype of y: y is {y.dtype}, f(t, y) is "
            f"{dy.dtype}. Convert the parameters with field.to({y.dtype})."
        )
    return dy
