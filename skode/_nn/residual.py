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
from torch.nn import functional as F

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

    def log_density(
        self, times: Tensor, mask: Tensor, residual: Tensor, known_by: Tensor
    ) -> Tensor:
        """Return log-densities given known rows before, (B, K, T, C), 0 where masked.

        Of residuals in units of the scale, without the constant of the normal.
        `known_by` (B, T, C) says which of them later rows know of.
        """
        if not self.persistent:
            return -0.5 * residual**2 * mask[:, None]
        known = self.filter(times, known_by, residual)
        variance = known.variance + self.white()
        error = (residual - known.mean) ** 2 / variance[:, None]
        return -0.5 * (error + variance.log()[:, None]) * mask[:, None]

    def filter(self, times: Tensor, mask: Tensor, residual: Tensor) -> Filtered:
        """Go forwards in time over what was observed."""
        return ou_filter(
            self._decay(times), mask, residual, self.persisting(), self.white()
        )

    def _decay(self, times: Tensor) -> Tensor:
        """Return u's correlation with the row before, (B, T, C)."""
        gaps = torch.diff(times, dim=1, prepend=times[:, :1])
        return torch.exp(-gaps[:, :, None] / self.log_time.exp())

    def smooth(
        self, times: Tensor, mask: Tensor, residual: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return mean (B, K, T, C) and variance (B, T, C) of u given all rows."""
        if not self.persistent:
            nothing = torch.zeros_like(residual)
            return nothing, nothing[:, 0]
        known = self.filter(times, mask, residual)
        # What the row after teaches comes back by `gain`.
        gain = known.decay[:, 1:] * known.updated_variance[:, :-1]
        gain = F.pad(gain / known.variance[:, 1:], (0, 0, 0, 1))
        after = F.pad(known.mean[:, :, 1:], (0, 0, 0, 1))
        mean = scan_back(gain[:, None], known.updated_mean - gain[:, None] * after)
        after = F.pad(known.variance[:, 1:], (0, 0, 0, 1))
        variance = scan_back(
            (gain**2)[:, None], (known.updated_variance - gain**2 * after)[:, None]
        )
        return mean, variance[:, 0].clamp_min(0)

    def draw(self, times: Tensor, noise: Tensor) -> Tensor:
        """Return u (B, K, T, C) of standard normal noise, before any observation."""
        if not self.persistent:
            return torch.zeros_like(noise)
        share, decay = self.persisting(), self._decay(times)[:, None]
        spread = (share * (1 - decay**2)).sqrt()
        spread = torch.cat(
            (share.sqrt().expand_as(spread[:, :, :1]), spread[:, :, 1:]), 2
        )
        return scan(decay, spread * noise)


def ou_filter(
    decay: Tensor, mask: Tensor, residual: Tensor, variance: Tensor, white: Tensor
) -> Filtered:
    """Go forwards in time over what was observed.

    Parameters
    ----------
    decay : Tensor of shape (B, T, C) or (B, T, 1)
        u's correlation with the row before.
    mask : Tensor of shape (B, T, C)
        What was observed.
    residual : Tensor of shape (B, K, T, C)
        u and white noise.
    variance, white : Tensor of shape (C,)
        Their variances.
    """
    decay = decay.expand(mask.shape)
    fresh = variance * (1 - decay**2)
    ahead = _variances(decay**2, fresh, variance, white, mask)
    gain = ahead / (ahead + white) * mask
    # m[i + 1] = phi[i + 1] (m[i] + gain[i] (r[i] - m[i]))
    onward = F.pad(decay[:, 1:] * (1 - gain[:, :-1]), (0, 0, 1, 0))[:, None]
    brought = decay[:, None, 1:] * gain[:, None, :-1] * residual[:, :, :-1]
    mean = scan(onward, F.pad(brought, (0, 0, 1, 0)))
    updated = mean + gain[:, None] * (residual - mean)
    return Filtered(mean, ahead, updated, ahead * (1 - gain), decay)


def scan(a: Tensor, b: Tensor) -> Tensor:
    """Return x[t] = a[t] x[t - 1] + b[t] along the rows, from x[-1] = 0.

    By doubling: log2 T operations instead of T (Sarkka & Garcia-Fernandez 2021,
    arXiv:1905.13002). a is (B, 1, T, C), b (B, K, T, C).
    """
    shift = 1
    while shift < b.shape[2]:
        late, early = slice(shift, None), slice(None, -shift)
        b = torch.cat(
            (b[:, :, :shift], a[:, :, late] * b[:, :, early] + b[:, :, late]), 2
        )
        a = torch.cat((a[:, :, :shift], a[:, :, late] * a[:, :, early]), 2)
        shift *= 2
    return b


def scan_back(a: Tensor, b: Tensor) -> Tensor:
    """Return x[t] = a[t] x[t + 1] + b[t], from x[T] = 0."""
    return scan(a.flip(2), b.flip(2)).flip(2)


def _variances(
    onward: Tensor, fresh: Tensor, first: Tensor, white: Tensor, mask: Tensor
) -> Tensor:
    """Return the variance of u at each row given the rows before, (B, T, C).

    From P at a row, the next one's is onward P w / (P + w) + fresh if it is observed,
    with white noise of variance w, and onward P + fresh if not: a ratio of linear
    functions of P, and so is what several rows make of it. These are composed as 2 x 2
    matrices of positive numbers, by doubling as in `scan`.
    """
    step, new = onward[:, 1:], fresh[:, 1:]
    seen = mask[:, :-1].to(onward.dtype)
    w = white.expand_as(step)
    # [[p, q], [r, s]] stands for P -> (p P + q) / (r P + s).
    p, q, r, s = step * w + seen * new, new * w, seen * torch.ones_like(w), w
    shift = 1
    while shift < p.shape[1]:
        late, early = slice(shift, None), slice(None, -shift)
        a, b, c, d = (x[:, late] for x in (p, q, r, s))
        e, f, g, h = (x[:, early] for x in (p, q, r, s))
        made = a * e + b * g, a * f + b * h, c * e + d * g, c * f + d * h
        size = made[2] + made[3]  # only ratios count; this keeps them within range
        p, q, r, s = (
            torch.cat((x[:, :shift], y / size), 1)
            for x, y in zip((p, q, r, s), made, strict=True)
        )
        shift *= 2
    later = (p * first + q) / (r * first + s)
    return torch.cat((first.expand_as(onward[:, :1]), later), 1)
