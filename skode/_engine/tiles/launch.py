"""Launching the kernels: tensors and a method in, grids and constants out.

B rows, D state, P parameters.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skode._engine.control import PIController
from skode._engine.lanes import Chunk, Lanes
from skode._engine.layers import Layers
from skode._engine.solution import Tolerance
from skode._engine.tableau import Tableau
from skode._engine.tiles import forward

_WIDEST = 128
"""Of the layers, padded: two matrices of this size fill a multiprocessor's memory."""
_NARROWEST = 16
"""Of a product on a tensor core, in every direction."""


def fits(layers: Layers) -> bool:
    """Return whether the perceptron fits on chip."""
    return max(layers.widths) <= _WIDEST


@dataclass(frozen=True, slots=True)
class Launcher:
    """The kernels for one perceptron, method and tolerance."""

    layers: Layers
    tableau: Tableau
    tolerance: Tolerance
    flat: Tensor
    """(P,)"""
    tile: int
    """Rows per program."""

    @classmethod
    def of(
        cls, layers: Layers, tableau: Tableau, tolerance: Tolerance, rows: int
    ) -> "Launcher":
        """Return the kernels for so many rows."""
        flat = layers.flat()
        # As many tiles as multiprocessors, where there are rows for it.
        tile = _NARROWEST
        while tile < 64 and tile * _processors(flat.device) < rows:
            tile *= 2
        return cls(layers, tableau, tolerance, flat, tile)

    def start(self, lanes: Lanes) -> None:
        """Write the slope at the start, and the clock."""
        controller = self._controller(lanes.y)
        batch, times = lanes.times.shape
        factor = (0.1 / controller.error_constant) ** (1.0 / controller.order)
        forward.start[(self._tiles(batch),)](
            self.flat,
            lanes.times,
            lanes.y,
            lanes.clock,
            lanes.slope,
            batch,
            times,
            controller.norm.rtol,
            self._atol(lanes.y),
            START_FACTOR=factor,
            ORDER=self.tableau.order,
            **self._constants(),
        )

    def advance(self, lanes: Lanes, chunk: Chunk | None, attempts: int) -> Tensor:
        """Make some attempts; return whether a row has yet a way to go, as a tensor."""
        batch, times = lanes.times.shape
        tableau, controller = self.tableau, self._controller(lanes.y)
        alive = lanes.counts.new_empty(self._tiles(batch))
        nothing = lanes.clock
        tape = (nothing,) * 4 if chunk is None else chunk.tensors()
        forward.advance[(len(alive),)](
            self.flat,
            lanes.times,
            lanes.clock,
            lanes.counts,
            lanes.y,
            lanes.slope,
            lanes.y if lanes.inside is None else lanes.inside,
            *tape,
            alive,
            batch,
            times,
            attempts,
            0 if chunk is None else len(chunk.y),
            controller.norm.rtol,
            self._atol(lanes.y),
            controller.noise,
            A=tableau.a,
            B=tableau.b,
            C=tableau.c,
            B_ERR=tableau.b_err,
            DENSE=tableau.dense,
            ORDER=tableau.order,
            EPS=torch.finfo(lanes.clock.dtype).eps,
            TAPED=chunk is not None,
            INSIDE=lanes.inside is not None,
            **self._constants(),
        )
        return alive

    def _controller(self, y: Tensor) -> PIController:
        tableau = self.tableau
        return PIController.of(
            self.tolerance, y, tableau.order, tableau.error_constant
        )

    def _atol(self, y: Tensor) -> float:
        """Return atol as `ErrorNorm` scales it."""
        scaled = self.tolerance.atol * float(y.shape[1]) ** 0.5
        return max(scaled, torch.finfo(y.dtype).tiny)

    def _tiles(self, rows: int) -> int:
        return -(-rows // self.tile)

    def _constants(self) -> dict[str, Any]:
        """Return what every kernel is compiled for."""
        widths = self.layers.widths
        return {
            "WIDTHS": widths,
            "PADDED": tuple(_padded(width) for width in widths),
            "OFFSETS": self.layers.offsets(),
            "ACTIVATION": self.layers.activation,
            "PRECISION": _precision(),
            "TILE": self.tile,
            "num_warps": 4 if self.tile <= 32 else 8,
            "enable_fp_fusion": True,
        }


def _padded(width: int) -> int:
    """Return the power of two that a width is padded to."""
    return max(_NARROWEST, 1 << (width - 1).bit_length())


def _precision() -> str:
    """Return how to multiply float32: exactly, unless PyTorch was told otherwise."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
