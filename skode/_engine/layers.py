"""A perceptron that a field gives as data, for kernels that contain it.

B rows, D state, C context, H hidden; layer l computes W_l x + b_l + t u_l, and is
followed by an activation unless it is the last.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Quadratures:
    """What a flow gathers beside y: its state is (y, c, l), or (y, c, l, e).

    The context c stands still, l' is the trace of df/dy, and e' = |f|^2.
    """

    trace: Tensor
    """M of tr df/dy = d_2^T M d_1, with the slopes of two hidden layers: (H_2, H_1).

    With one, d_2 is 1 and M is (1, H_1); with none, d_1 is 1 too and M is (1, 1). Its
    history leads its gradient to the weights.
    """
    energy: bool
    """Whether there is an e."""


@dataclass(frozen=True, slots=True)
class Layers:
    """Weights (out, in), biases and shifts (out,) of every layer."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    shifts: tuple[Tensor, ...]
    activation: str
    quadratures: Quadratures | None = None

    @property
    def params(self) -> tuple[Tensor, ...]:
        """All of them, weights first, then biases, then shifts."""
        return (*self.weights, *self.biases, *self.shifts)

    @property
    def widths(self) -> tuple[int, ...]:
        """Of what the first layer reads, of every hidden layer, and of dy/dt."""
        first = self.weights[0].shape[1]
        return (first, *(weight.shape[0] for weight in self.weights))

    @property
    def plain(self) -> bool:
        """Whether all of the state moves, and nothing is gathered beside it."""
        return self.quadratures is None and self.widths[0] == self.widths[-1]

    def fits(self, y: Tensor) -> bool:
        """Return whether they fit each other, and states like y (B, D).

        What the first layer reads beyond dy/dt is the context, which stands still.
        """
        widths, dtype, device = self.widths, y.dtype, y.device
        params, flow = self.params, self.quadratures
        shapes = [
            *zip(widths[1:], widths, strict=False),
            *((width,) for width in (*widths[1:], *widths[1:])),
        ]
        state, suits = widths[0], widths[0] >= widths[-1]
        if flow is not None:
            state, suits = state + 1 + flow.energy, suits and len(widths) <= 4
            below, above = (*widths[1:-1], 1, 1)[:2]
            params, shapes = (*params, flow.trace), [*shapes, (above, below)]
        return (
            suits
            and state == y.shape[1]
            and all(
                param.shape == shape
                and param.dtype == dtype
                and param.device == device
                and param.layout == torch.strided
                for param, shape in zip(params, shapes, strict=True)
            )
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
