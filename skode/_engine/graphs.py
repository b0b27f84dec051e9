"""Solves on a GPU whose attempts are recorded once and replayed: any field.

An attempt of `masked` asks the host for nothing and writes over fixed memory, so that
after a few attempts, which many solves end with, it is recorded as a CUDA graph. What
is recorded belongs to one solve: the next one may have other parameters, or a field
that has changed its mind. B rows, T times, D state.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skode._engine import masked
from skode._engine.checkpoint import replayed
from skode._engine.dense import Requests
from skode._engine.lanes import Chunk, Lanes, drive, tape_of
from skode._engine.plan import Plan
from skode._engine.solution import Statistics

_WATCHED = 4
"""Attempts made one by one; recording costs about as much as three."""

_AT_ONCE = 8
"""Attempts per reading of what is left, once they are replayed."""

_MOST_REQUESTED = 2**22
"""Numbers of requested states: each attempt looks at all of them."""


@dataclass(frozen=True, slots=True)
class GraphProgram:
    """A solve by attempts of all rows that need no host."""

    plan: Plan

    @classmethod
    def of(cls, plan: Plan, y0: Tensor, times: Tensor) -> "GraphProgram | None":
        """Return the program for a plan, or None if too many times are requested."""
        many = times.shape[1] * y0.numel() > _MOST_REQUESTED
        return None if many else cls(plan)

    def forward(self, y0: Tensor, times: Tensor) -> tuple[Tensor, Statistics]:
        """Solve; return states (B, T, D)."""
        ys, stats, _ = self._solve(y0, times, taped=False)
        return ys, stats

    def record(
        self, y0: Tensor, times: Tensor
    ) -> tuple[Tensor, Statistics, list[Chunk]]:
        """Solve, and record the steps."""
        return self._solve(y0, times, taped=True)

    def pull(
        self, times: Tensor, chunks: Sequence[Chunk], grad: Tensor, timed: bool
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        """Return dL/dy0 (B, D), dL/dtimes (B, T) and those of the parameters."""
        return replayed(self.plan, tape_of(chunks), Requests(times), grad, timed)

    def _solve(
        self, y0: Tensor, times: Tensor, taped: bool
    ) -> tuple[Tensor, Statistics, list[Chunk]]:
        plan, requests = self.plan, Requests(times)
        lanes = Lanes.at(y0, requests)
        coef = plan.coefficients(y0, times)
        means = masked.Means.of(plan.untrained_kernel(), coef, plan.tolerance, y0)
        masked.start(means, lanes)
        chunk = Chunk.like(lanes, _AT_ONCE) if taped else None
        chunks: list[Chunk] = []

        def once() -> None:
            masked.attempt(means, lanes, chunk)

        def launcher(attempt: Callable[[], None]) -> Callable[[int], Tensor]:
            def launch(attempts: int) -> Tensor:
                if chunk is not None:
                    chunk.used.zero_()
                for _ in range(attempts):
                    attempt()
                if chunk is not None:
                    chunks.append(chunk.copy(attempts))
                return lanes.clock[2] > 0

            return launch

        most = plan.tolerance.max_steps
        busy = drive(launcher(once), 1, min(_WATCHED, most), ahead=0)
        if most > _WATCHED and bool((lanes.clock[2] > 0).any()):  # host sync
            attempt = recorded(once, y0.device)
            size, ahead = (1, 0) if attempt is once else (_AT_ONCE, 1)
            busy += drive(launcher(attempt), size, most - _WATCHED, ahead)
        y1, stats = lanes.finish(coef.stages)
        return requests.fill(y0, stats.shown(y1), lanes.inside), stats, chunks[:busy]


def recorded(attempt: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Return what replays an attempt, or the attempt where it cannot be recorded.

    Recording executes nothing. The attempt must have been made before, so that all
    libraries are set up.
    """
    if device.type != "cuda":
        return attempt
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    # `torch.cuda.graph` would collect garbage and empty the allocator's cache, too.
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                attempt()
            finally:
                graph.capture_end()
        torch.cuda.current_stream(device).wait_stream(stream)
    except RuntimeError as error:
        torch.cuda.synchronize(device)
        reason = str(error).partition("\n")[0]
        warnings.warn(
            f"The field cannot be recorded as a CUDA graph ({reason}), so its solves "
            "run one operation at a time. Fields that never ask for a value on the "
            "host (.item(), bool(tensor), nonzero) can.",
            stacklevel=2,
        )
        return attempt
    replay: Callable[[], None] = graph.replay
    return replay
