"""Launching the kernels: tensors and a method in, grids and constants out.

B rows, D state, P parameters.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from skode._engine.control import PIController
from skode._engine.lanes import Chunk, Lanes
from skode._engine.layers import Layers
from skode._engine.solution import Tolerance
from skode._engine.tableau import Tableau, coefficients
from skode._engine.tiles import backward, forward

_WIDEST_STATE = 128
"""A tile of states is held in registers; hidden layers may be as wide as they like."""

_NARROWEST = 16
"""Of a product on a tensor core, in every direction."""

_TALLEST = 64
"""Rows of a tile."""

_PROGRAMS_EACH = 2
"""Programs per multiprocessor: while one waits for memory the other computes."""


def fits(layers: Layers) -> bool:
    """Return whether a tile of states fits on chip."""
    return layers.widths[0] <= _WIDEST_STATE


@dataclass(frozen=True, slots=True)
class Launcher:
    """The kernels for one perceptron, method and tolerance."""

    layers: Layers
    tableau: Tableau
    controller: PIController
    """Its tensor is on the host: kernels take numbers."""
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
        tallest = _TALLEST if _padded(layers.widths[0]) <= 64 else _TALLEST // 2
        tile = _NARROWEST
        while tile < tallest and tile * _processors(flat.device) < rows:
            tile *= 2
        host = torch.empty(1, layers.widths[0], dtype=flat.dtype)
        constant = coefficients(
            tableau, flat.dtype, flat.dtype, host.device
        ).error_constant
        controller = PIController.of(tolerance, host, tableau.order, constant)
        return cls(layers, tableau, controller, flat, tile)

    def start(self, lanes: Lanes) -> None:
        """Write the slope at the start, and the clock."""
        controller = self.controller
        batch, times = lanes.times.shape
        programs, width = self._programs(batch), sum(self._padded()[:-1])
        with torch.cuda.device_of(self.flat):
            forward.start[(programs,)](
                self.flat,
                lanes.times,
                lanes.y,
                lanes.clock,
                lanes.slope,
                self.flat.new_empty(programs * self.tile * width),
                batch,
                times,
                controller.norm.rtol,
                float(controller.norm.atol),
                controller.safety
                / controller.error_constant ** (1.0 / controller.order),
                ORDER=self.tableau.order,
                WIDTH=width,
                **self._constants(),
            )

    def advance(self, lanes: Lanes, chunk: Chunk | None, attempts: int) -> Tensor:
        """Make some attempts; return whether a row has yet a way to go, as a tensor."""
        batch, times = lanes.times.shape
        controller, padded = self.controller, self._padded()
        programs, width = self._programs(batch), sum(padded[:-1])
        columns = (self.tableau.stages + 1) * padded[0] + width
        alive = lanes.counts.new_empty(-(-batch // self.tile))
        nothing = lanes.clock
        with torch.cuda.device_of(self.flat):
            forward.advance[(programs,)](
                self.flat,
                *_weights(
                    self.tableau, self.flat.dtype, lanes.clock.dtype, alive.device
                ),
                lanes.times,
                lanes.clock,
                lanes.counts,
                lanes.y,
                lanes.slope,
                lanes.y if lanes.inside is None else lanes.inside,
                *((nothing,) * 4 if chunk is None else chunk.tensors()),
                alive,
                self.flat.new_empty(programs * self.tile * columns),
                batch,
                times,
                attempts,
                0 if chunk is None else len(chunk.y),
                controller.norm.rtol,
                float(controller.norm.atol),
                controller.noise,
                STAGES=self.tableau.stages,
                POWERS=len(self.tableau.dense[0]),
                ORDER=self.tableau.order,
                EPS=torch.finfo(lanes.clock.dtype).eps,
                TAPED=chunk is not None,
                INSIDE=lanes.inside is not None,
                WIDTH=width,
                **self._constants(),
            )
        return alive

    def sums(self, rows: int) -> Tensor:
        """Return memory (programs, P) for the parameter gradient, of zeros."""
        return self.flat.new_zeros(self._programs(rows), self.flat.numel())

    def replay(
        self,
        times: Tensor,
        chunk: Chunk,
        cotangent: Tensor,
        grad: Tensor,
        grad_times: Tensor | None,
        sums: Tensor,
    ) -> None:
        """Pull cotangents (B, D) back through the steps of a chunk, in place.

        Parameters
        ----------
        times : Tensor of shape (B, T)
        grad : Tensor of shape (B, T, D)
            Cotangent of the requested states, contiguous.
        grad_times : Tensor of shape (B, T) or None
            Added to.
        sums : Tensor of shape (programs, P)
            Added to.
        """
        batch, count = times.shape
        padded, stages = self._padded(), self.tableau.stages
        programs, width = len(sums), sum(padded[:-1])
        powers = len(self.tableau.dense[0])
        columns = 2 * (stages + 1) * (width + padded[0]) + (powers + 1) * padded[0]
        with torch.cuda.device_of(self.flat):
            backward.replay[(programs,)](
                self.flat,
                *_weights(self.tableau, self.flat.dtype, times.dtype, times.device),
                times,
                *chunk.tensors(),
                cotangent,
                grad,
                times if grad_times is None else grad_times,
                sums,
                self.flat.new_empty(programs * self.tile * columns),
                batch,
                count,
                len(chunk.y),
                self.flat.numel(),
                STAGES=stages,
                POWERS=powers,
                INSIDE=chunk.due.shape[1] > 0,
                TIMED=grad_times is not None,
                WIDTH=width,
                **self._constants(),
            )

    def _programs(self, rows: int) -> int:
        """Return how many programs share the tiles, each with memory of its own."""
        tiles = -(-rows // self.tile)
        return min(tiles, _PROGRAMS_EACH * _processors(self.flat.device))

    def _padded(self) -> tuple[int, ...]:
        return tuple(map(_padded, self.layers.widths))

    def _constants(self) -> dict[str, Any]:
        """Return what every kernel is compiled for."""
        padded = self._padded()
        return {
            "WIDTHS": self.layers.widths,
            "PADDED": padded,
            "PLACES": (0, *accumulate(padded[:-1])),
            "OFFSETS": self.layers.offsets(),
            "ACTIVATION": self.layers.activation,
            "PRECISION": _precision(),
            "TILE": self.tile,
            "DEPTH": 2,
            "num_warps": 4 if self.tile <= 32 else 8,
            "enable_fp_fusion": True,
        }


def _padded(width: int) -> int:
    """Return the power of two that a width is padded to."""
    return max(_NARROWEST, 1 << (width - 1).bit_length())


def _precision() -> str:
    """Return how to multiply float32: exactly, unless PyTorch was told otherwise."""
    switch = torch.backends.cuda.matmul
    # PyTorch 2.9 gave the switch a second name, and refuses the first one to those who
    # have used the second.
    chosen = getattr(switch, "fp32_precision", None)
    allowed = switch.allow_tf32 if chosen is None else chosen == "tf32"
    return "tf32" if allowed else "ieee"


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=64)
def _weights(
    tableau: Tableau, dtype: torch.dtype, time_dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the table of `forward.advance`, and the nodes."""
    coef = coefficients(tableau, dtype, time_dtype, device)
    # Nothing that is inside a step makes use of its end: a last column of zeros.
    made = torch.cat((coef.a_square, coef.b[None]))
    made = torch.cat((made, torch.zeros_like(made[:, :1])), dim=1)
    return torch.cat((made, coef.b_err[None], coef.dense)), coef.c[:, 0].contiguous()
