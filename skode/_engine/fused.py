"""Solves that leave PyTorch: which ones, and their place in autograd.

On a CUDA device a perceptron that gives its layers as data is solved by kernels that
hold the whole step (`tiles`); other fields, wide states, float64, or a machine without
Triton by attempts that are recorded and replayed (`graphs`). All other solves, fixed
steps and those on a CPU among them, run the loop. B rows, T times, D state.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from skode._engine.checkpoint import add_idle_times, require_first_order
from skode._engine.dense import Requests
from skode._engine.graphs import GraphProgram
from skode._engine.lanes import Chunk
from skode._engine.layers import HasLayers
from skode._engine.plan import Plan
from skode._engine.solution import Statistics

_AMPERE = (8, 0)
"""The oldest generation that Triton's products of float32 were built for."""


class Program(Protocol):
    """A whole solve, and its gradient."""

    def forward(self, y0: Tensor, times: Tensor) -> tuple[Tensor, Statistics]:
        """Solve; return states (B, T, D) and statistics."""

    def record(
        self, y0: Tensor, times: Tensor
    ) -> tuple[Tensor, Statistics, list[Chunk]]:
        """Solve, and record the steps."""

    def pull(
        self, times: Tensor, chunks: Sequence[Chunk], grad: Tensor, timed: bool
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        """Return dL/dy0 (B, D), dL/dtimes (B, T) and those of the parameters.

        `grad` (B, T, D) is that of the requested states. Times that repeat the first
        or the last one are left to the caller.
        """


def fused(plan: Plan, y0: Tensor, times: Tensor) -> "Fused | str":
    """Return what solves from y0 (B, D) over times (B, T), or why nothing does."""
    program = _program(plan, y0, times)
    if program is None:
        return f"{plan.tableau.name} takes fixed steps, which run the loop on a GPU"
    return Fused(program, plan)


def _program(plan: Plan, y0: Tensor, times: Tensor) -> Program | None:
    if not plan.tableau.adaptive:
        return None
    if has_kernels(y0.device):
        program = _on_chip(plan, y0, times)
        if program is not None:
            return program
    return GraphProgram.of(plan, y0, times) if y0.device.type == "cuda" else None


def _on_chip(plan: Plan, y0: Tensor, times: Tensor) -> Program | None:
    """Return the kernels for a solve that suits them."""
    known = y0.dtype == torch.float32 and times.dtype in (torch.float32, torch.float64)
    if not (known and isinstance(plan.field, HasLayers)):
        return None
    if plan.tolerance.first_step is not None or plan.tolerance.parts:
        return None
    layers = plan.field.own_layers(plan.params)
    if layers is None or not layers.plain or not layers.fits(y0):
        return None
    # Triton comes with PyTorch's CUDA builds alone, and takes its time to import.
    from skode._engine.tiles.program import TileProgram

    return TileProgram.of(plan, layers, len(y0))


@cache
def has_kernels(device: torch.device) -> bool:
    """Return whether kernels can be built for a device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    if find_spec("triton") is None:
        warnings.warn(
            "Triton is not installed: solves on the GPU run one operation at a time. "
            "`pip install triton` makes those of MLPField several times faster.",
            stacklevel=2,
        )
        return False
    return torch.cuda.get_device_capability(device) >= _AMPERE


class _Replayed(torch.autograd.Function):
    """Solve by a program; keep (t, h, y) of each step; have the program replay them."""

    @staticmethod
    def forward(
        ctx: Any,
        program: Program,
        plan: Plan,
        y0: Tensor,
        times: Tensor,
        *params: Tensor,
    ) -> tuple[Tensor, ...]:
        ys, stats, chunks = program.record(y0, times)
        ctx.program, ctx.plan, ctx.chunks = program, plan, len(chunks)
        tape = [tensor for chunk in chunks for tensor in chunk.tensors()]
        ctx.save_for_backward(y0, ys[:, -1].clone(), times, *tape, *params)
        columns = stats.columns()
        ctx.mark_non_differentiable(*columns)
        return ys, *columns

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        require_first_order("checkpoint")
        y0, y1, times, *rest = ctx.saved_tensors
        chunks = [Chunk(*rest[4 * i : 4 * i + 4]) for i in range(ctx.chunks)]
        params, timed = rest[4 * ctx.chunks :], ctx.needs_input_grad[3]
        with torch.no_grad():
            pulled = ctx.program.pull(times, chunks, grad, timed)
            grad_y0, grad_times, grads = pulled
            if timed:
                kernel = ctx.plan.untrained_kernel()
                add_idle_times(Requests(times), kernel, grad, y0, y1, grad_times)
        trained = grads if params else ()
        return None, None, grad_y0, grad_times if timed else None, *trained


@dataclass(frozen=True, slots=True)
class Fused:
    """A solve, and the program that runs it."""

    program: Program
    plan: Plan

    def forward(self, y0: Tensor, times: Tensor) -> tuple[Tensor, Statistics]:
        """Solve without a gradient; return states (B, T, D)."""
        return self.program.forward(y0, times)

    def traced(self, y0: Tensor, times: Tensor) -> tuple[Tensor, Statistics]:
        """Solve with a gradient for y0, the times and the parameters of the plan."""
        program, params = self.program, self.plan.params
        ys, *columns = _Replayed.apply(program, self.plan, y0, times, *params)  # type: ignore[no-untyped-call]
        return ys, Statistics(*columns)
