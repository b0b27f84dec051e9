"""What a latent path leaves unexplained: noise, and what persists for a while.

In units of the decoder's scale, the residual of a channel is u(t) + e: u is a
stationary Ornstein-Uhlenbeck process, itself a linear stochastic ODE, of variance a and
correlation time tau, e white noise of variance 1 - a. Given its own observations it is
a Gaussian, which Kalman's filter and the smoother of Rauch, Tung & Striebel compute
exactly in linear time (Sarkka 2013, Bayesian Filtering and Smoothing, ch. 4 and 8).

B series, K samples of the latent path, T rows in the order of time, C channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

_JITTER = 1e-4
"""Variance that white noise has at least."""


@dataclass(frozen=True, slots=True)
class Filtered:
    """What is known of u and of the residual at each row from the rows before it."""

    mean: Tensor
    """(B, K, T, C) of u."""
    variance: Tensor
    """(B, T, C) of u; the residual's is larger by the white noise's."""
    updated_mean: Tensor
    """(B, K, T, C) of u, given this row too."""
    updated_variance: Tensor
    """(B, T, C)."""
    decay: Tensor
    """(B, T, C) of u's correlation, from the row before."""


class Residual(nn.Module):
    """The residual process of each channel.

    Parameters
    ----------
    n_channels : int
        C.
    persistent : bool
        Whether there is a part that persists; without, the residual is white noise.
    """

    one: Tensor

    def __init__(self, n_channels: int, persistent: bool) -> None:
        super().__init__()
        self.persistent = persistent
        self.register_buffer("one", torch.ones(()), persistent=False)
        if persistent:
            self.share = nn.Parameter(torch.full((n_channels,), -3.0))
            self.log_time = nn.Parameter(torch.full((n_channels,), -1.0))

    def persisting(self) -> Tensor:
        """Return the variance a of each channel's u, (C,)."""
        return torch.sigmoid(self.share) * (1 - _JITTER)

    def white(self) -> Tensor:
        """Return the variance of each channel's white noise, (C,) or a scalar."""
        if not self.persistent:
            return self.one
        return 1 - self.persisting()

    def log_density(self, times: Tensor, mask: Tensor, residual: Tensor) -> Tensor:
        """Return log-densities given the rows before, (B, K, T, C), 0 where masked.

        Of residuals in units of the scale, without the constant of the normal.
        """
        if not self.persistent:
            return -0.5 * residual**2 * mask[:, None]
        known = self.filter(times, mask, residual)
        variance = known.variance + self.white()
        error = (residual - known.mean) ** 2 / variance[:, None]
        return -0.5 * (error + variance.log()[:, None]) * mask[:, None]

    def filter(self, times: Tensor, mask: Tensor, residual: Tensor) -> Filtered:
        """Go forwards in time over what was observed."""
        share = self.persisting()
        gaps = torch.diff(times, dim=1, prepend=times[:, :1])
        decay = torch.exp(-gaps[:, :, None] / self.log_time.exp())
        fresh = share * (1 - decay**2)
        observed = mask.to(residual.dtype)
        mean = torch.zeros_like(residual[:, :, 0])  # (B, K, C)
        variance = share.expand(len(times), -1)  # (B, C)
        means, variances, updated, updated_variances = [], [], [], []
        for row, (phi, new, seen, value) in enumerate(
            zip(
                decay.unbind(1),
                fresh.unbind(1),
                observed.unbind(1),
                residual.unbind(2),
                strict=True,
            )
        ):
            if row:
                mean = phi[:, None] * mean
                variance = phi * phi * variance + new
            means.append(mean)
            variances.append(variance)
            gain = variance / (variance + (1 - share)) * seen
            mean = mean + gain[:, None] * (value - mean)
            variance = variance * (1 - gain)
            updated.append(mean)
            updated_variances.append(variance)
        return Filtered(
            torch.stack(means, dim=2),
            torch.stack(variances, dim=1),
            torch.stack(updated, dim=2),
            torch.stack(updated_variances, dim=1),
            decay,
        )

    def smooth(
        self, times: Tensor, mask: Tensor, residual: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return mean (B, K, T, C) and variance (B, T, C) of u given all rows."""
        if not self.persistent:
            nothing = torch.zeros_like(residual)
            return nothing, nothing[:, 0]
        known = self.filter(times, mask, residual)
        mean, variance = known.updated_mean[:, :, -1], known.updated_variance[:, -1]
        means, variances = [mean], [variance]
        for row in range(times.shape[1] - 2, -1, -1):
            before = known.updated_variance[:, row]
            gain = known.decay[:, row + 1] * before / known.variance[:, row + 1]
            step = mean - known.mean[:, :, row + 1]
            mean = known.updated_mean[:, :, row] + gain[:, None] * step
            variance = before + gain**2 * (variance - known.variance[:, row + 1])
            means.append(mean)
            variances.append(variance)
        return torch.stack(means[::-1], dim=2), torch.stack(variances[::-1], dim=1)

    def draw(self, times: Tensor, noise: Tensor) -> Tensor:
        """Return u (B, K, T, C) of standard normal noise, before any observation."""
        if not self.persistent:
            return torch.zeros_like(noise)
        share = self.persisting()
        gaps = torch.diff(times, dim=1, prepend=times[:, :1])
        decay = torch.exp(-gaps[:, :, None] / self.log_time.exp())
        spread = (share * (1 - decay**2)).sqrt()
        u = share.sqrt() * noise[:, :, 0]
        drawn = [u]
        for row in range(1, times.shape[1]):
            u = decay[:, row, None] * u + spread[:, row, None] * noise[:, :, row]
            drawn.append(u)
        return torch.stack(drawn, dim=2)
