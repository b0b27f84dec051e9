"""Recognition networks: what a series' own observations say of its latent state.

B series, T rows, C channels, P covariates, W width, D latent state.
"""

import torch
from torch import Tensor, nn

from skode._nn.fields import MLPField
from skode._nn.gru import Packing, last_state
from skode._nn.integration import Integration
from skode._series.batch import Batch

__all__ = ["GRUReader", "ODERNNReader", "Posterior", "Recognition"]

_SMALLEST, _LARGEST = -8.0, 3.0  # of a log standard deviation
_GAP = 5.0
"""Gaps are a small part of the span, and are enlarged to be read as easily."""


class Posterior:
    """Independent normals over the latent state at the first row of each series."""

    def __init__(self, mean: Tensor, log_std: Tensor) -> None:
        self.mean, self.log_std = mean, log_std

    def draw(self, noise: Tensor) -> Tensor:
        """Return states (B, K, D) of standard normal noise (K, D) or (B, K, D)."""
        return self.mean[:, None] + self.log_std.exp()[:, None] * noise

    def divergence(self) -> Tensor:
        """Return the Kullback-Leibler divergence to the standard normal, (B,)."""
        variance = (2 * self.log_std).exp()
        return 0.5 * (variance + self.mean**2 - 1 - 2 * self.log_std).sum(dim=1)

    def cross_entropy(self, z: Tensor) -> Tensor:
        """Return -log q of states (B, K, D), up to a constant: (B, K)."""
        standard = (z - self.mean[:, None]) / self.log_std.exp()[:, None]
        return (0.5 * standard**2 + self.log_std[:, None]).sum(dim=2)


class Recognition(nn.Module):
    """Observations, read backwards in time -> q(z0) (Chen et al. 2018, section 5).

    Parameters
    ----------
    reader : Module
        (B, T, F) inputs, (B, T) gaps and (B,) lengths to (B, W): what is known after
        so many rows.
    latent : int
        Width D of the latent state.
    """

    def __init__(self, reader: nn.Module, latent: int) -> None:
        super().__init__()
        self.reader = reader
        width: int = reader.width  # type: ignore[assignment]
        last = nn.Linear(width, 2 * latent)
        self.head = nn.Sequential(nn.Linear(width, width), nn.Tanh(), last)
        self.latent = latent
        with torch.no_grad():  # begin close to the prior, a little narrower
            last.weight.mul_(0.3)
            last.bias.zero_()
            last.bias[latent:].sub_(1.0)

    def forward(self, batch: Batch, length: Tensor, how: Integration) -> Posterior:
        """Return q(z0) given the first `length` (B,) rows of each series.

        Times count from the first row. Of a series without rows, it is the prior.
        """
        inputs, gaps = backwards(batch, length)
        known = self.reader(inputs, gaps, length, how)
        mean, log_std = self.head(known).chunk(2, dim=1)
        some = (length > 0)[:, None]
        return Posterior(mean * some, log_std.clamp(_SMALLEST, _LARGEST) * some)


def n_inputs(n_channels: int, n_covariates: int) -> int:
    """Return how many numbers a reader gets of each row."""
    return 2 * n_channels + n_covariates + 3


def backwards(batch: Batch, length: Tensor) -> tuple[Tensor, Tensor]:
    """Return inputs (B, T, F) and gaps (B, T) of the first rows, the last row first."""
    longest = max(1, int(length.max()))
    place = torch.arange(longest, device=length.device)
    back = (length[:, None] - 1 - place).clamp_min(0)

    def turned(x: Tensor) -> Tensor:
        return x.gather(1, back[:, :, None].expand(-1, -1, x.shape[2]))

    mask = turned(batch.mask).to(batch.values.dtype)
    times = batch.times.gather(1, back)
    gaps = torch.zeros_like(times)
    gaps[:, 1:] = times[:, :-1] - times[:, 1:]
    clock = torch.stack((times, _GAP * gaps, times[:, :1] - times), dim=2)
    values = turned(batch.values) * mask
    return torch.cat((values, mask, clock, turned(batch.covariates)), dim=2), gaps


class GRUReader(nn.Module):
    """A gated recurrent unit that is told the gaps."""

    def __init__(self, n_inputs: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.gru = nn.GRU(n_inputs, width, batch_first=True)

    def forward(
        self, inputs: Tensor, gaps: Tensor, length: Tensor, how: Integration
    ) -> Tensor:
        """Return what is known after the first `length` (B,) rows, (B, W)."""
        return last_state(self.gru, inputs, length)


class ODERNNReader(nn.Module):
    """A state that an ODE carries across gaps (Rubanova et al. 2019, eq. 4 and 5)."""

    def __init__(self, n_inputs: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.cell = nn.GRUCell(n_inputs, width)
        self.field = MLPField(width, (width,))

    def forward(
        self, inputs: Tensor, gaps: Tensor, length: Tensor, how: Integration
    ) -> Tensor:
        """Return what is known after the first `length` (B,) rows, (B, W)."""
        params = tuple(self.field.parameters())
        packing = Packing.of(length, inputs.shape[1])
        inputs, gaps = inputs[packing.order], gaps[packing.order]
        hidden = inputs.new_zeros(len(inputs), self.width)
        ended = []
        for step, size in enumerate(packing.sizes):
            ended.append(hidden[size:])
            hidden, gap = hidden[:size], gaps[:size, step]
            if bool((gap > 0).any()):
                times = torch.stack((torch.zeros_like(gap), gap), dim=1)
                hidden = how.solve(self.field, hidden, times, params).y1
            hidden = self.cell(inputs[:size, step], hidden)
        return torch.cat((hidden, *reversed(ended)))[packing.order.argsort()]
