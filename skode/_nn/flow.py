"""Base distribution <-> solve <-> data. B rows, D state.

The base, a standard normal, is at t = 0 and the data are at t = 1:
log p(x) = log N(z; 0, I) - integral_0^1 tr df/dy dt, where z is x carried back to t = 0
(Chen et al. 2018, arXiv:1806.07366, equation 8).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from skode._engine.solution import Solution
from skode._nn.divergence import CLOSED_FORM
from skode._nn.flow_field import Dynamics, FlowField, Transport
from skode._nn.integration import Integration

_EXACT_UP_TO = 64


class Flow(nn.Module):
    """A continuous normalizing flow with a standard normal base.

    Parameters
    ----------
    field : FlowField
        Carries the base at t = 0 to the data at t = 1.
    """

    def __init__(self, field: FlowField) -> None:
        super().__init__()
        self.field = field

    @property
    def depth(self) -> int:
        """Number of hidden layers."""
        return len(self.field.weights) - 1

    def exact(self, trace: str) -> bool:
        """Return whether the trace is computed exactly, given "auto" or a choice."""
        if trace == "auto":
            return self.depth in CLOSED_FORM or self.field.dim <= _EXACT_UP_TO
        return trace == "exact"

    def log_densities(
        self,
        x: Tensor,
        context: Tensor | None,
        how: Integration,
        probes: Tensor | None = None,
    ) -> Tensor:
        """Return log-densities, (B, 1), or one estimate for each probe, (B, P)."""
        dynamics = Dynamics(self.field, probes=probes)
        z, traces, _ = dynamics.split(_to_base(dynamics, x, context, how).y1)
        # The trace was gathered from t = 1 to 0.
        return log_normal(z)[:, None] + traces

    def to_base(self, x: Tensor, context: Tensor | None, how: Integration) -> Tensor:
        """Return the base's points z, (B, D), of data x."""
        return self.path(x, context, [1.0, 0.0], how)[:, -1]

    def to_data(self, z: Tensor, context: Tensor | None, how: Integration) -> Tensor:
        """Return data x, (B, D), of the base's points z."""
        return self.path(z, context, [0.0, 1.0], how)[:, -1]

    def path(
        self,
        y: Tensor,
        context: Tensor | None,
        times: Sequence[float],
        how: Integration,
    ) -> Tensor:
        """Return states at `times` (T,), (B, T, D), of those at the first of them."""
        start = y if context is None else torch.cat([y, context], dim=1)
        transport = Transport(self.field)
        ys = how.solve(transport, start, y.new_tensor(times), transport.params).ys
        return ys[..., : self.field.dim]

    def evaluations(
        self,
        x: Tensor,
        context: Tensor | None,
        how: Integration,
        probes: Tensor | None = None,
    ) -> Tensor:
        """Return the evaluations of the field that each density takes, (B,)."""
        dynamics = Dynamics(self.field, probes=probes)
        return _to_base(dynamics, x, context, how).stats.nfe


def _to_base(
    dynamics: Dynamics, x: Tensor, context: Tensor | None, how: Integration
) -> Solution:
    """Solve from the data at t = 1 to the base at t = 0."""
    start, times = dynamics.start(x, context), x.new_tensor([1.0, 0.0])
    return how.solve(dynamics, start, times, dynamics.params)


def log_normal(z: Tensor) -> Tensor:
    """Return the log-density of the base, (B,), at z (B, D)."""
    constant = 0.5 * z.shape[1] * math.log(2 * math.pi)
    return -0.5 * z.square().sum(dim=1) - constant
