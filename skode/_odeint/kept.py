"""A module whose evaluations are kept for the way back, while its state is small.

torchdiffeq keeps every operation of every evaluation. So do we, for the evaluations of
accepted steps, where the state is small: what it takes to compute them again is then
not arithmetic. Of larger states the engine keeps one for each step. One row of N
numbers, S stages.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from skode._engine.kernel import AutogradKernel, Evaluation
from skode._engine.observer import Step
from skode._odeint.layout import Layout

_MOST_AT_ONCE, _MOST_KEPT = 2**16, 2**21
"""Numbers of stages of one step and of all; as many as the engine keeps of its own."""


class Reached(Exception):
    """An evaluation led to a tensor that needs a gradient and is no parameter."""


class KeptField:
    """The field of one row, of a module with parameters."""

    def __init__(self, layout: Layout, params: Sequence[Tensor]) -> None:
        self._layout, self._params = layout, tuple(params)
        self._taken: list[tuple[Evaluation, ...] | None] = []

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        """Return dy/dt (1, N)."""
        return self._layout.field(t, y)

    def own_kernel(self, params: Sequence[Tensor]) -> "_KeptKernel":
        """Bind to one pass, forwards or back."""
        inner = AutogradKernel(self._layout.field, params)
        return _KeptKernel(inner, self._taken, {id(param) for param in self._params})


class _KeptKernel:
    """Keeps evaluations as the loop moves forwards, and finds them backwards.

    Raises
    ------
    Reached
        From `evaluate`, where the gradient of what is kept would not be all.
    """

    bounded = False

    def __init__(
        self,
        inner: AutogradKernel,
        taken: list[tuple[Evaluation, ...] | None],
        known: set[int],
    ) -> None:
        self._inner, self._taken, self._known = inner, taken, known
        self._first: Evaluation | None = None
        self._evaluated: dict[int, Evaluation] = {}
        self._room = _MOST_KEPT
        # Back from the last step.
        self._ahead = len(taken)
        self._step: tuple[Evaluation, ...] | None = None

    def begin(self, times: Tensor) -> None:
        self._inner.begin(times)

    def evaluate(self, slot: int, y: Tensor, out: Tensor) -> None:
        evaluation = self._inner.remembered(slot, y)
        own = {id(evaluation.t), id(evaluation.y)}
        if not leaves(evaluation.dy) <= self._known | own:
            raise Reached
        out.copy_(evaluation.dy.detach())
        if y.numel() > _MOST_AT_ONCE:
            return
        self._evaluated[slot] = evaluation
        if self._first is None:  # the slope at the start; what follows is a probe
            self._first = evaluation

    def observe(self, step: Step) -> None:
        """Keep the evaluations of a step that was accepted."""
        if step.moved is not None:
            return
        last, size = len(step.k) - 1, step.k.numel()
        if size > min(self._room, _MOST_AT_ONCE) or self._first is None:
            self._taken.append(None)
        else:
            self._room -= size
            stages = (self._evaluated[slot] for slot in range(1, last + 1))
            self._taken.append((self._first, *stages))
        self._first = self._evaluated.get(last)
        self._evaluated = {}

    def begin_linear(self, times: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        self._ahead -= 1
        self._step = self._taken[self._ahead]
        self._slots = len(times)
        return self._inner.begin_linear(times, dim)

    def linearize(self, slot: int, out: Tensor) -> None:
        if self._step is None:
            self._inner.linearize(slot, out)
            return
        self._inner.remember(slot, self._step[slot])
        out.copy_(self._step[slot].dy.detach())

    def linearize_all(self) -> None:
        if self._step is None:
            self._inner.linearize_all()
            return
        for slot in range(self._slots):
            self._inner.remember(slot, self._step[slot])

    def pull(self, slot: int, out: Tensor) -> None:
        self._inner.pull(slot, out)

    def pull_time(self, slot: int) -> Tensor:
        return self._inner.pull_time(slot)

    def accumulate(self, slots: int) -> None:
        self._inner.accumulate(slots)

    def gradients(self) -> tuple[Tensor | None, ...]:
        return self._inner.gradients()


def leaves(value: Tensor) -> set[int]:
    """Return the identities of the leaves of a graph."""
    found: set[int] = set()
    seen: set[Any] = set()
    nodes: list[Any] = [value.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.add(id(variable))
        nodes.extend(parent for parent, _ in node.next_functions)
    return found
