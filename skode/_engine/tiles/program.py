"""A whole solve, and its gradient, by the kernels of this package.

B rows, T times, D state.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skode._engine.dense import Requests
from skode._engine.lanes import Chunk, Lanes, drive
from skode._engine.layers import Layers
from skode._engine.plan import Plan
from skode._engine.solution import Statistics
from skode._engine.tiles.launch import Launcher, fits

_ROOM = 2**24
"""Numbers of state in one chunk of a tape."""

_FEW, _MANY = 4, 32
"""Steps of one chunk."""


@dataclass(frozen=True, slots=True)
class TileProgram:
    """A solve whose steps are taken on chip."""

    plan: Plan
    launcher: Launcher

    @classmethod
    def of(cls, plan: Plan, layers: Layers, rows: int) -> "TileProgram | None":
        """Return the program for a plan, or None if it does not fit on chip."""
        if not fits(layers):
            return None
        return cls(plan, Launcher.of(layers, plan.tableau, plan.tolerance, rows))

    def forward(self, y0: Tensor, times: Tensor) -> tuple[Tensor, Statistics]:
        """Solve; return states (B, T, D). The host waits for nothing."""
        requests = Requests(times)
        lanes = Lanes.at(y0, requests)
        most = self.plan.tolerance.max_steps
        self.launcher.start(lanes)
        self.launcher.advance(lanes, None, most)
        return self._finish(lanes, requests, y0)

    def record(
        self, y0: Tensor, times: Tensor
    ) -> tuple[Tensor, Statistics, list[Chunk]]:
        """Solve, and record the steps."""
        requests = Requests(times)
        lanes = Lanes.at(y0, requests)
        slots = min(max(_ROOM // y0.numel(), _FEW), _MANY)
        chunks: list[Chunk] = []

        def launch(attempts: int) -> Tensor:
            chunks.append(Chunk.like(lanes, attempts))
            return self.launcher.advance(lanes, chunks[-1], attempts)

        self.launcher.start(lanes)
        busy = drive(launch, slots, self.plan.tolerance.max_steps)
        ys, stats = self._finish(lanes, requests, y0)
        return ys, stats, chunks[:busy]

    def pull(
        self, times: Tensor, chunks: Sequence[Chunk], grad: Tensor, timed: bool
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Return dL/dy0 (B, D), dL/dtimes (B, T) and those of the parameters.

        `grad` (B, T, D) is that of the requested states. Times that repeat the first
        or the last one are left to the caller.
        """
        requests = Requests(times.contiguous())
        u = requests.sum_at_end(grad).contiguous()
        grad_times = torch.zeros_like(requests.times)
        sums = self.launcher.sums(len(u))
        for chunk in reversed(chunks):
            self.launcher.replay(
                requests.times,
                chunk,
                u,
                grad.contiguous(),
                grad_times if timed else None,
                sums,
            )
        u = u + requests.sum_at_start(grad)
        return u, grad_times, self.launcher.layers.split(sums.sum(dim=0))

    def _finish(
        self, lanes: Lanes, requests: Requests, y0: Tensor
    ) -> tuple[Tensor, Statistics]:
        y1, stats = lanes.finish(self.plan.tableau.stages)
        return requests.fill(y0, stats.shown(y1), lanes.inside), stats
