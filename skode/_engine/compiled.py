"""Whole solves in compiled code. B rows, T times, D state, S stages, P powers.

A field that is a perceptron, known as data, needs no Python between one
evaluation and the next: `cpp/` carries tiles of rows through all their steps, forwards
and, for the gradient of "checkpoint", backwards. The twins to compare with are `loop`
and `checkpoint`.
"""

import ctypes
import struct
import threading
import weakref
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skode._engine.build import BuildError, library
from skode._engine.checkpoint import add_idle_times, by_autograd
from skode._engine.dense import Requests
from skode._engine.layers import Layers
from skode._engine.packing import (
    GRADIENTS,
    METHOD,
    MOST_STAGES,
    NETWORK,
    OUT_OF_MEMORY,
    REAL,
    UNWANTED,
    Gradients,
    address_of,
    method,
    network,
    threads,
)
from skode._engine.plan import Plan
from skode._engine.solution import Statistics

_PATIENCE = 0.2
"""Seconds between two looks at whether the user has interrupted."""

_SPEC = struct.Struct(f"{NETWORK} {METHOD} 4d q 3q 2q 8P 2q")
_COTANGENTS = struct.Struct(f"4P 2q {GRADIENTS}")


@dataclass(frozen=True, slots=True)
class Compiled:
    """A solve, and the code that runs it."""

    plan: Plan
    layers: Layers
    library: ctypes.CDLL

    @classmethod
    def of(cls, plan: Plan, y0: Tensor) -> "Compiled | str":
        """Return what runs the solve, compiled if need be; or what is in the way."""
        own_layers = getattr(plan.field, "own_layers", None)
        if own_layers is None:  # asking for the protocol takes ten times as long
            return "the field is your own, not the perceptron that is made here"
        layers: Layers | None = own_layers(plan.params)
        if layers is None:
            return "params are not the field's own parameters"
        if y0.dtype not in REAL:
            return f"the state is {y0.dtype}, neither float32 nor float64"
        if not layers.fits(y0):
            return "the layers do not fit the state in width, dtype or device"
        if plan.tolerance.first_step is not None or plan.tolerance.parts:
            return "a first step of one's own, or a state in parts, is not compiled"
        if plan.tableau.stages > MOST_STAGES:
            return f"{plan.tableau.name} has more than {MOST_STAGES} stages"
        try:
            source = "solve" if layers.quadratures is None else "flow"
            made = library(REAL[y0.dtype], layers.activation, source)
            return cls(plan, layers, made)
        except BuildError as error:
            return str(error)

    def forward(self, y0: Tensor, times: Tensor) -> tuple[Tensor, Statistics]:
        """Solve without a gradient; return states (B, T, D)."""
        _, ys, stats = _run(self, y0, times, record=False)
        return ys, stats

    def traced(self, y0: Tensor, times: Tensor) -> tuple[Tensor, Statistics]:
        """Solve with a gradient for y0, the times and the parameters of the plan."""
        with torch.no_grad():
            program, ys, stats = _run(self, y0, times, record=True)
        apply: Callable[..., Tensor] = _Replayed.apply
        plan, flow = self.plan, self.layers.quadratures
        # Its history leads its gradient to the weights, if they want one.
        trace = flow.trace if flow is not None and plan.params else None
        return apply(plan, program, [ys], y0, times, trace, *plan.params), stats


class _Replayed(torch.autograd.Function):
    """The states of a solve, whose gradient replays its steps in compiled code."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        program: "_Program",
        box: list[Tensor],
        y0: Tensor,
        times: Tensor,
        trace: Tensor | None,
        *params: Tensor,
    ) -> Tensor:
        # In a box, since what comes in and goes out may not be changed in place.
        ys = box.pop()
        ctx.plan, ctx.program = plan, weakref.ref(program)
        ctx.versions = [param._version for param in params]
        # The program has the parameters; without gradients of times, nobody reads more.
        more = (ys[:, -1].clone(), *params) if ctx.needs_input_grad[4] else ()
        ctx.save_for_backward(_lifeline(program), y0, times, *more)
        return ys

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, y0, times, *more = ctx.saved_tensors
        if torch.is_grad_enabled():
            by_y0, by_times, *by_params = _second_order(ctx, y0, times, grad)
            return None, None, None, by_y0, by_times, None, *by_params
        timed, _, *trained = ctx.needs_input_grad[4:]
        with torch.no_grad():
            pulled = ctx.program().backward(grad, timed, any(trained))
            grad_y0, grad_times, grads = pulled
            if grad_times is not None:
                grad_times = grad_times.to(times.dtype)
                kernel, requests = ctx.plan.untrained_kernel(), Requests(times)
                add_idle_times(requests, kernel, grad, y0, more[0], grad_times)
        own = grads.params or (None,) * len(trained)
        return None, None, None, grad_y0, grad_times, grads.trace, *own


def _second_order(
    ctx: Any, y0: Tensor, times: Tensor, grad: Tensor
) -> Iterator[Tensor | None]:
    """Return a gradient that can be differentiated again."""
    params = ctx.plan.params
    if [param._version for param in params] != ctx.versions:
        raise RuntimeError(
            "The parameters of the field have changed since the solve: take the "
            "gradient with create_graph=True before the optimiser's step."
        )
    return by_autograd(ctx.plan, (y0, times, *params), grad)


class _Held(ctypes.c_char * 1):  # type: ignore[misc]
    """Memory that something else hangs on."""


def _lifeline(program: "_Program") -> Tensor:
    """Return a tensor that holds the program: autograd frees saved tensors in time."""
    held = _Held()
    held.program = program
    return torch.frombuffer(held, dtype=torch.uint8)


class _Program:
    """The steps of one solve, in compiled code."""

    def __init__(self, solve: Compiled, handle: int, times: "_Times") -> None:
        self._library, self._handle = solve.library, handle
        self._layers, self._times = solve.layers, times
        self._turn = threading.Lock()

    def backward(
        self, grad: Tensor, timed: bool, trained: bool
    ) -> tuple[Tensor, Tensor | None, Gradients]:
        """Pull a cotangent (B, T, D) back to y0, to the times and to the parameters.

        Those that are not wanted are None, and none.
        """
        grad = grad.resolve_neg().contiguous()
        grad_y0 = grad.new_empty(grad.shape[0], grad.shape[2])
        grad_t = torch.zeros(grad.shape[:2], dtype=torch.float64) if timed else None
        grads = Gradients.zeros(self._layers, grad) if trained else UNWANTED
        cotangents = _COTANGENTS.pack(
            grad.data_ptr(),
            grad_y0.data_ptr(),
            0 if grad_t is None else grad_t.data_ptr(),
            self._times.address,
            *self._times.strides,
            *grads.packed.members,
        )
        # Two threads may ask for the gradient of one graph.
        with self._turn:
            if self._library.skode_begin_backward(self._handle, cotangents):
                raise MemoryError(_NO_MEMORY)
            self.advance(self._library.skode_backward)
        return grad_y0, grad_t, grads

    def advance(self, run: Callable[[int, float], int]) -> None:
        """Work until all is done; between two calls Python sees to interrupts."""
        while progress := run(self._handle, _PATIENCE):
            if progress == OUT_OF_MEMORY:
                raise MemoryError(_NO_MEMORY)

    def __del__(self) -> None:
        """Free the steps."""
        if handle := self.__dict__.pop("_handle", None):
            self._library.skode_end(handle)


def _run(
    solve: Compiled, y0: Tensor, times: Tensor, record: bool
) -> tuple[_Program, Tensor, Statistics]:
    """Solve; return the steps, if they are to be kept, and states (B, T, D)."""
    layers, tolerance = solve.layers, solve.plan.tolerance
    y0 = y0.resolve_neg().contiguous()
    rows, state = y0.shape
    net, steps = network(layers), method(solve.plan.tableau, y0.device)
    doubles = _Times.of(times)
    ys = y0.new_empty(rows, times.shape[1], state)
    reached = torch.empty(rows, dtype=torch.float64)
    counts = torch.empty(4, rows, dtype=torch.int64)
    spec = _SPEC.pack(
        *net.members,
        *steps.members,
        tolerance.rtol,
        tolerance.atol,
        tolerance.step_size or 0.0,
        torch.finfo(times.dtype).eps,
        min(tolerance.max_steps, 2**62),
        rows,
        times.shape[1],
        state,
        *doubles.strides,
        y0.data_ptr(),
        doubles.address,
        ys.data_ptr(),
        reached.data_ptr(),
        *(counts.data_ptr() + 8 * rows * n for n in range(4)),
        record,
        threads(layers, rows, solve.library.skode_tile()),
    )
    # The solve copies the layers, the method and this structure; not the batch.
    handle = solve.library.skode_begin(spec)
    if not handle:
        raise MemoryError(_NO_MEMORY)
    program = _Program(solve, handle, doubles)
    program.advance(solve.library.skode_forward)
    status, *numbers = counts.unbind()
    stats = Statistics(status.to(torch.int8), reached.to(times.dtype), *numbers)
    return program, ys, stats


_NO_MEMORY = "There is no memory for the steps of the solve: pass fewer rows at once."


@dataclass(frozen=True, slots=True)
class _Times:
    """Times (B, T) as doubles, stored once where all rows share them."""

    held: "array[float] | Tensor"
    address: int
    strides: tuple[int, int]

    @classmethod
    def of(cls, times: Tensor) -> "_Times":
        """Convert times (B, T)."""
        if times.stride(0) == 0:
            shared = array("d", times[0].tolist())
            return cls(shared, address_of(shared), (0, 1))
        doubles = times.double().contiguous()
        return cls(doubles, doubles.data_ptr(), (times.shape[1], 1))
