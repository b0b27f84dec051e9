"""The arithmetic of a solve without a solver: a yardstick, in PyTorch.

So many evaluations of an `MLPField` and vector-Jacobian products as a solve takes, in
preallocated memory, and nothing else: no step is combined, no error estimated, nothing
decided. It shares no code with the field's kernel, so that a faster kernel shows.

B rows, D state, H hidden, S stages of a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from contest import Case, Run
from torch import Tensor

from skode._nn.fields import MLPField

STAGES = 6
"""Of dopri5, that a step evaluates: the seventh is the first of the next step."""


@dataclass(frozen=True)
class Work:
    """What a solve takes: evaluations per row, and accepted steps."""

    evaluations: int
    steps: int

    def once(self) -> "tuple[int, int]":
        """Return evaluations that are not pulled back through, and steps that are."""
        return self.evaluations - STAGES * self.steps, self.steps

    def replayed(self) -> "tuple[int, int]":
        """Return the same where a gradient evaluates its steps again."""
        return self.evaluations, self.steps


class Arithmetic:
    """Memory of one step, and the operations on it."""

    def __init__(self, field: MLPField, y0: Tensor) -> None:
        params = [param.detach() for param in field.parameters()]
        depth = len(params) // 3
        self.weights = params[:depth]
        self.layers = [
            (weight.T, params[depth + i], params[2 * depth + i])
            for i, weight in enumerate(self.weights)
        ]
        widths = [weight.shape[1] for weight in self.weights] + [y0.shape[1]]
        rows = len(y0)
        self.times = y0.new_full((rows, 1), 0.5)
        # Inputs of every layer, and cotangents of every layer's outputs.
        self.x = [y0.new_zeros(STAGES, rows, width) for width in widths]
        self.delta = [y0.new_zeros(STAGES, rows, width) for width in widths]
        self.x[0].copy_(y0.detach().expand_as(self.x[0]))
        self.delta[-1].copy_(self.x[0])
        self.ones_and_times = y0.new_full((2, STAGES * rows), 0.5)
        self.ones_and_times[0] = 1.0
        self.sums = [
            (torch.zeros_like(weight), weight.new_zeros(2, len(weight)))
            for weight in self.weights
        ]
        self.slots = [
            (tuple(x[i] for x in self.x), tuple(delta[i] for delta in self.delta))
            for i in range(STAGES)
        ]
        self.matrices = [
            (x.flatten(0, 1), delta.flatten(0, 1).T, delta.flatten(0, 1))
            for x, delta in zip(self.x[:-1], self.delta[1:], strict=True)
        ]

    def evaluate(self, slot: int) -> Tensor:
        """Return f of the slot's state, (B, D)."""
        x = self.slots[slot][0]
        last = len(self.layers) - 1
        for i, (weight, bias, shift) in enumerate(self.layers):
            torch.addcmul(bias, self.times, shift, out=x[i + 1])
            x[i + 1].addmm_(x[i], weight)
            if i < last:
                x[i + 1].tanh_()
        return x[-1]

    def pull(self, slot: int) -> Tensor:
        """Return (cotangent of the slot) . df/dy, (B, D), after `evaluate`."""
        x, delta = self.slots[slot]
        for i in reversed(range(len(self.weights))):
            torch.mm(delta[i + 1], self.weights[i], out=delta[i])
            if i:
                torch.ops.aten.tanh_backward.grad_input(
                    delta[i], x[i], grad_input=delta[i]
                )
        return delta[0]

    def accumulate(self) -> None:
        """Add the parameter gradient of all slots to the sums."""
        for (weight, bias_and_shift), (x, transposed, delta) in zip(
            self.sums, self.matrices, strict=True
        ):
            weight.addmm_(transposed, x)
            bias_and_shift.addmm_(self.ones_and_times, delta)


@torch.no_grad()
def do(arithmetic: Arithmetic, evaluations: int, steps: int) -> Sequence[Tensor]:
    """Evaluate, and pull back through steps that are evaluated, too."""
    for i in range(evaluations):
        arithmetic.evaluate(i % STAGES)
    for _ in range(steps):
        for slot in range(STAGES):
            arithmetic.evaluate(slot)
        for slot in range(STAGES):
            arithmetic.pull(slot)
        arithmetic.accumulate()
    return ()


def prepare(case: Case, counts: tuple[int, int]) -> Run:
    """Return the run of so many evaluations and steps."""
    arithmetic = Arithmetic(case.field, case.y0)
    _require_right(arithmetic, case)
    return lambda: do(arithmetic, *counts)


def _require_right(arithmetic: Arithmetic, case: Case) -> None:
    """Compare one step with autograd: a wrong yardstick measures nothing."""
    do(arithmetic, 0, 1)
    expected = case.field(arithmetic.times[:, 0], case.y0)
    loss = STAGES * (expected * case.y0.detach()).sum()
    grads = torch.autograd.grad(loss, case.params)
    torch.testing.assert_close(arithmetic.evaluate(0), expected)
    depth = len(arithmetic.weights)
    for i, (weight, bias_and_shift) in enumerate(arithmetic.sums):
        for part, total in enumerate((weight, *bias_and_shift)):
            off = torch.linalg.vector_norm(total - grads[part * depth + i])
            assert off < 1e-4 * torch.linalg.vector_norm(total), f"off by {off:g}"
