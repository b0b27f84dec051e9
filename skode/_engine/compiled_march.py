"""A march on a grid in compiled code; the twin to compare with is `grid`.

B rows, D state, N steps, S stages.
"""

import ctypes
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from skode._engine.build import BuildError, library
from skode._engine.kernel import Field
from skode._engine.layers import Layers
from skode._engine.packing import (
    GRADIENTS,
    METHOD,
    MOST_STAGES,
    NETWORK,
    REAL,
    UNWANTED,
    Gradients,
    Packed,
    address_of,
    method,
    multiplications,
    network,
    threads,
)
from skode._engine.tableau import Tableau

_AT_ONCE = 2**32
"""Multiplications of one call, a tenth of a second of a core's."""

_MARCH = struct.Struct(f"{NETWORK} {METHOD} 5q 5P")
_COTANGENTS = struct.Struct(f"3P {GRADIENTS}")


@dataclass(frozen=True, slots=True)
class CompiledMarch:
    """Steps of one method along knots that all rows share, and the code for them."""

    layers: Layers
    tableau: Tableau
    knots: tuple[float, ...]
    controlled: int
    """How many columns of the state the error is measured in, from the first on."""
    library: ctypes.CDLL

    @classmethod
    def of(
        cls,
        field: Field,
        params: Sequence[Tensor],
        tableau: Tableau,
        knots: tuple[float, ...],
        controlled: int,
        y: Tensor,
    ) -> "CompiledMarch | None":
        """Return what marches from y (B, D), compiled if need be, or None."""
        own_layers = getattr(field, "own_layers", None)
        if own_layers is None or y.device.type != "cpu" or y.dtype not in REAL:
            return None
        layers: Layers | None = own_layers(params)
        if layers is None or layers.quadratures is None:
            return None  # only flows are marched
        if not layers.fits(y) or tableau.stages > MOST_STAGES:
            return None
        try:
            made = library(REAL[y.dtype], layers.activation, "flow")
        except BuildError:
            return None
        return cls(layers, tableau, knots, controlled, made)

    def run(self, y: Tensor, params: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return states (B, D) at the last knot, and squared errors (B,)."""
        wanted = any(x.requires_grad for x in (y, *params))
        if not (wanted and torch.is_grad_enabled()):
            y1, error, _ = self.forward(y.detach(), record=False)
            return y1, error
        flow: Any = self.layers.quadratures
        # Its history leads its gradient to the weights, if they want one.
        trace = flow.trace if flow is not None and params else None
        apply: Any = _Marched.apply
        y1, error = apply(self, y, trace, *params)
        return y1, error

    def forward(self, y: Tensor, record: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return states, squared errors, and the tape that `backward` reads."""
        y = y.resolve_neg().contiguous()
        y1, error = y.new_empty(y.shape), y.new_empty(len(y))
        tape = None
        if record:
            tile = self.library.skode_tile()
            rows, steps = -(-len(y) // tile) * tile, len(self.knots) - 1
            tape = y.new_empty(rows, 2 * steps * y.shape[1])
        for part in self._parts(len(y)):
            spec = self._packed(y[part], y1[part], error[part], _of(tape, part))
            _check(self.library.skode_march(_MARCH.pack(*spec.members)))
        return y1, error, tape

    def backward(
        self, grad: Tensor, grad_error: Tensor, tape: Tensor, trained: bool
    ) -> tuple[Tensor, Gradients]:
        """Pull cotangents (B, D), (B,) back to y and to the parameters."""
        grad = grad.resolve_neg().contiguous()
        grad_error = grad_error.resolve_neg().contiguous()
        grad_y = torch.empty_like(grad)
        grads = Gradients.zeros(self.layers, grad) if trained else UNWANTED
        for part in self._parts(len(grad)):
            spec = self._packed(grad[part], None, None, tape[part])
            cotangents = _COTANGENTS.pack(
                grad[part].data_ptr(),
                grad_error[part].data_ptr(),
                grad_y[part].data_ptr(),
                *grads.packed.members,
            )
            packed = _MARCH.pack(*spec.members)
            _check(self.library.skode_march_back(packed, cotangents))
        return grad_y, grads

    def _parts(self, rows: int) -> Iterator[slice]:
        """Yield rows for one call each; between two calls Python sees to interrupts."""
        steps = (len(self.knots) - 1) * self.tableau.stages
        tile, work = self.library.skode_tile(), steps * multiplications(self.layers)
        at_once = max(1, _AT_ONCE // (work * tile)) * tile
        for first in range(0, rows, at_once):
            yield slice(first, first + at_once)

    def _packed(
        self, y: Tensor, y1: Tensor | None, error: Tensor | None, tape: Tensor | None
    ) -> Packed:
        net, steps = network(self.layers), method(self.tableau, y.device)
        knots = array("d", self.knots)
        members = (
            *net.members,
            *steps.members,
            *y.shape,
            len(knots) - 1,
            self.controlled,
            threads(self.layers, len(y), self.library.skode_tile()),
            address_of(knots),
            *(0 if x is None else x.data_ptr() for x in (y, y1, error, tape)),
        )
        return Packed(members, (net, steps, knots))


def _of(tape: Tensor | None, part: slice) -> Tensor | None:
    return None if tape is None else tape[part]


class _Marched(torch.autograd.Function):
    """A march whose gradient computes its stages again, in compiled code."""

    @staticmethod
    def forward(
        ctx: Any, march: CompiledMarch, y: Tensor, trace: Tensor | None, *params: Tensor
    ) -> tuple[Tensor, Tensor]:
        y1, error, tape = march.forward(y, record=True)
        ctx.march = march
        # The layers are the march's; saved, they are known not to have changed.
        ctx.save_for_backward(tape, *params)
        return y1, error

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor, grad_error: Tensor
    ) -> tuple[Tensor | None, ...]:
        tape, *params = ctx.saved_tensors
        trained = any(ctx.needs_input_grad[3:])
        grad_y, grads = ctx.march.backward(grad, grad_error, tape, trained)
        own = grads.params or (None,) * len(params)
        return None, grad_y, grads.trace, *own


def _check(progress: int) -> None:
    if progress:
        raise MemoryError("There is no memory for the march: pass fewer rows at once.")
