"""A perceptron that a field gives as data, for kernels that contain it.

B rows, D state; layer l computes W_l x + b_l + t u_l, and is followed by an activation
unless it is the last.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Layers:
    """Weights (out, in), biases and shifts (out,) of every layer."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    shifts: tuple[Tensor, ...]
    activation: str

    @property
    def params(self) -> tuple[Tensor, ...]:
        """All of them, weights first, then biases, then shifts."""
        return (*self.weights, *self.biases, *self.shifts)

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the state, of every hidden layer, and of the state again."""
        first = self.weights[0].shape[1]
        return (first, *(weight.shape[0] for weight in self.weights))

    def fits(self, y: Tensor) -> bool:
        """Return whether they fit each other, and states like y (B, D)."""
        widths, dtype, device = self.widths, y.dtype, y.device
        if widths[0] != widths[-1] or widths[0] != y.shape[1]:
            return False
        shapes = [
            *zip(widths[1:], widths, strict=False),
            *((width,) for width in (*widths[1:], *widths[1:])),
        ]
        return all(
            param.shape == shape
            and param.dtype == dtype
            and param.device == device
            and param.layout == torch.strided
            for param, shape in zip(self.params, shapes, strict=True)
        )

    def flat(self) -> Tensor:
        """Return all parameters in one vector."""
        return torch.cat([param.detach().reshape(-1) for param in self.params])

    def offsets(self) -> tuple[tuple[int, int, int], ...]:
        """Return where in `flat` the weight, bias and shift of every layer begin."""
        sizes = [param.numel() for param in self.params]
        starts, depth = [0, *accumulate(sizes)], len(self.weights)
        return tuple(
            (starts[i], starts[depth + i], starts[2 * depth + i]) for i in range(depth)
        )

    def split(self, flat: Tensor) -> tuple[Tensor, ...]:
        """Return the parts of a vector like `flat`, shaped as the parameters."""
        parts = flat.split([param.numel() for param in self.params])
        return tuple(
            part.view(param.shape)
            for part, param in zip(parts, self.params, strict=True)
        )


@runtime_checkable
class HasLayers(Protocol):
    """A field that is a perceptron and says so."""

    def own_layers(self, params: Sequence[Tensor]) -> Layers | None:
        """Return its layers; None where `params` are not the field's own."""
