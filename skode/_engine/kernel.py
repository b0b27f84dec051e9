"""A vector field bound to one solve, with its derivatives. A rows, D state, n slots.

A kernel evaluates a field without autograd, and pulls cotangents back through
evaluations that it was asked to remember. A step begins by announcing the times of its
stages, one numbered slot each: what depends on time alone is computed for all of them
at once, and so is the parameter gradient at the end. A field with derivatives of its
own (`HasKernel`) brings its kernel; autograd serves all others.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

Field = Callable[[Tensor, Tensor], Tensor]
"""f(t, y) with t: (B,), y: (B, D) -> (B, D)."""


class Evaluator(Protocol):
    """A field, over preallocated memory."""

    def begin(self, times: Tensor) -> None:
        """Announce the times (n, A) of the evaluations in slots 0 .. n-1."""

    def evaluate(self, slot: int, y: Tensor, out: Tensor) -> None:
        """Write f(t, y) to `out` (A, D) and remember nothing."""


class Kernel(Evaluator, Protocol):
    """A field and its vector-Jacobian products."""

    bounded: bool
    """Whether derivatives are finite wherever values are: 0 times them is 0."""

    def begin_linear(self, times: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Begin; return memory (n, A, D) for the states and cotangents of the slots.

        They are read by `linearize` and `pull`, and by `accumulate`: until then they
        must not change.
        """

    def linearize(self, slot: int, out: Tensor) -> None:
        """Write f(t, state of the slot) to `out` and remember the evaluation."""

    def linearize_all(self) -> None:
        """Remember the evaluations of all slots, whose states are all known."""

    def pull(self, slot: int, out: Tensor) -> None:
        """Write (cotangent of the slot) . df/dy to `out` (A, D)."""

    def pull_time(self, slot: int) -> Tensor:
        """Return (cotangent of the slot) . df/dt, (A,), after `pull`."""

    def accumulate(self, slots: int) -> None:
        """Add the parameter gradient of the first `slots` slots to the sum."""

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Return the accumulated gradient, as the parameters are, and forget it."""


@runtime_checkable
class HasKernel(Protocol):
    """A field that differentiates itself."""

    def own_kernel(self, params: Sequence[Tensor]) -> Kernel | None:
        """Bind to one solve; None where `params` are not the field's own."""


class Evaluation(NamedTuple):
    """An evaluation with autograd's history, which leads to t (A,) and y (A, D)."""

    t: Tensor
    y: Tensor
    dy: Tensor


class AutogradKernel:
    """The kernel of any callable field, by autograd."""

    bounded = False

    def __init__(self, field: Field, params: Sequence[Tensor]) -> None:
        self._field = field
        self._params = tuple(params)
        self._times: tuple[Tensor, ...] = ()
        self._states: Tensor | None = None
        self._cotangents: Tensor | None = None
        self._memory: dict[int, Evaluation] = {}
        self._pulled: dict[int, tuple[Tensor | None, ...]] = {}
        self._sums: list[Tensor | None] = [None] * len(self._params)

    def begin(self, times: Tensor) -> None:
        self._times = times.unbind()

    def evaluate(self, slot: int, y: Tensor, out: Tensor) -> None:
        with torch.no_grad():
            out.copy_(checked(self._field(self._times[slot], y), y))

    def begin_linear(self, times: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        self.begin(times)
        self._states = times.new_empty(*times.shape, dim)
        self._cotangents = torch.empty_like(self._states)
        return self._states, self._cotangents

    def linearize(self, slot: int, out: Tensor) -> None:
        out.copy_(self._linearize(slot))

    def linearize_all(self) -> None:
        for slot in range(len(self._times)):
            self._linearize(slot)

    def _linearize(self, slot: int) -> Tensor:
        assert self._states is not None, "linearize follows begin_linear"
        evaluation = self.remembered(slot, self._states[slot])
        self.remember(slot, evaluation)
        return evaluation.dy.detach()

    def remembered(self, slot: int, y: Tensor) -> Evaluation:
        """Return f(t of the slot, y) with its history."""
        with torch.enable_grad():
            t = self._times[slot].detach().clone().requires_grad_()
            y = y.detach().clone().requires_grad_()
            return Evaluation(t, y, checked(self._field(t, y), y))

    def remember(self, slot: int, evaluation: Evaluation) -> None:
        """Take an evaluation from elsewhere for the slot's own."""
        self._memory[slot] = evaluation

    def pull(self, slot: int, out: Tensor) -> None:
        assert self._cotangents is not None, "pull follows linearize"
        t, y, dy = self._memory.pop(slot)
        trained = [param for param in self._params if param.requires_grad]
        if not dy.requires_grad:  # a field that ignores t, y and the parameters
            self._pulled[slot] = (torch.zeros_like(t), *(None for _ in self._params))
            out.zero_()
            return
        grads = torch.autograd.grad(
            dy,
            (y, t, *trained),
            self._cotangents[slot].clone(),
            # What the field computed before the solve serves all stages.
            retain_graph=True,
            allow_unused=True,
        )
        found = iter(grads[2:])
        self._pulled[slot] = (
            torch.zeros_like(t) if grads[1] is None else grads[1],
            *(next(found) if param.requires_grad else None for param in self._params),
        )
        if grads[0] is None:
            out.zero_()
        else:
            out.copy_(grads[0])

    def pull_time(self, slot: int) -> Tensor:
        gradient = self._pulled[slot][0]
        assert gradient is not None, "zero where the field ignores time"
        return gradient

    def accumulate(self, slots: int) -> None:
        for slot in range(slots):
            for i, gradient in enumerate(self._pulled[slot][1:]):
                if gradient is not None:
                    total = self._sums[i]
                    self._sums[i] = gradient if total is None else total + gradient
        self._pulled.clear()

    def gradients(self) -> tuple[Tensor | None, ...]:
        sums, self._sums = self._sums, [None] * len(self._params)
        return tuple(sums)


def bind(field: Field, params: Sequence[Tensor]) -> Kernel:
    """Return the field's own kernel, or autograd's."""
    if isinstance(field, HasKernel):
        kernel = field.own_kernel(params)
        if kernel is not None:
            return kernel
    return AutogradKernel(field, params)


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
