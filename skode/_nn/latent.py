"""The latent ODE: recognition -> solve -> decoder (Chen et al. 2018, section 5).

B series, K samples of the latent path, T rows, Q queries, C channels, P covariates,
D latent state. Times are in units of a context's span, values standardised.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from skode._nn.baseline import PERSISTENCE, Baseline, Regression
from skode._nn.fields import MLPField
from skode._nn.integration import Integration
from skode._nn.predictive import Mixture
from skode._nn.recognition import (
    GRUReader,
    ODERNNReader,
    Posterior,
    Recognition,
    n_inputs,
)
from skode._nn.residual import Residual
from skode._series.batch import Batch

__all__ = ["Emission", "LatentODE", "Shape"]

_SMALLEST, _LARGEST = -6.0, 4.0  # of the logarithm of the scale
_LARGEST_RATE = 30.0
"""Of the logarithm: far from all observations, states may be of any size."""
_LOG_TWO_PI = math.log(2 * math.pi)
MOST_READ = 128
"""Rows of a context that a recognition network reads."""
READERS = {"gru": GRUReader, "ode_rnn": ODERNNReader}


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides the number of weights."""

    n_channels: int
    n_covariates: int
    latent: int
    hidden: tuple[int, ...]
    activation: str
    encoder: str
    encoder_width: int
    decoder: tuple[int, ...]
    varying_noise: bool
    persistent: bool
    events: bool


@dataclass(frozen=True, slots=True)
class Emission:
    """What is observed, given the latent path."""

    mean: Tensor
    """(B, K, T, C)."""
    log_scale: Tensor
    """(B, K, T, C)."""


class LatentODE(nn.Module):
    """A vector field, what reads z0 off observations, and what decodes z(t).

    Parameters
    ----------
    shape : Shape
        Widths and parts.
    baseline : Baseline
        What is taken from the values before, and given back after.
    """

    width: Tensor
    """By what predictive distributions are widened around their means."""
    muted: Tensor
    """Whether forecasts are those of the baseline alone."""

    def __init__(self, shape: Shape, baseline: Baseline) -> None:
        super().__init__()
        self.shape, self.baseline = shape, baseline
        width = n_inputs(shape.n_channels, shape.n_covariates)
        reader = READERS[shape.encoder](width, shape.encoder_width)
        self.recognition = Recognition(reader, shape.latent)
        self.field = autonomous(
            MLPField(shape.latent, shape.hidden, activation=shape.activation)
        )
        n_noises = shape.n_channels if shape.varying_noise else 0
        widths = (shape.latent + shape.n_covariates, *shape.decoder)
        last = nn.Linear(widths[-1], shape.n_channels + n_noises)
        self.decoder = nn.Sequential(*hidden_layers(widths), last)
        self.log_noise = nn.Parameter(torch.full((shape.n_channels,), -1.0))
        with torch.no_grad():  # begin with a scale that does not vary
            last.weight[shape.n_channels :].mul_(0.1)
            last.bias.zero_()
            if not baseline.empty:  # and with what the baseline says
                last.weight[: shape.n_channels].mul_(0.1)
        self.residual = Residual(shape.n_channels, shape.persistent)
        self.register_buffer("muted", torch.zeros((), dtype=torch.bool))
        self.register_buffer("width", torch.ones(()))
        self.log_intensity = nn.Linear(shape.latent, 1) if shape.events else None

    def posterior(self, batch: Batch, length: Tensor, how: Integration) -> Posterior:
        """Return q(z0) given the first `length` (B,) rows."""
        found: Posterior = self.recognition(batch, length, how)
        return found

    def states(self, z0: Tensor, times: Tensor, how: Integration) -> Tensor:
        """Return z (B, K, T, D) at times (B, T), from z0 (B, K, D) at time 0.

        Times before 0 come before all others; those are solved for backwards.
        """
        rows, samples, latent = z0.shape
        start = z0.reshape(rows * samples, latent)
        ahead = self._solve(start, times.clamp_min(0), samples, how)
        if bool((times < 0).any()):
            back = self._solve(start, times.clamp_max(0).flip(1), samples, how).flip(1)
            past = (times < 0).repeat_interleave(samples, dim=0)[:, :, None]
            ahead = torch.where(past, back, ahead)
        return ahead.view(rows, samples, -1, latent)

    def _solve(
        self, start: Tensor, times: Tensor, samples: int, how: Integration
    ) -> Tensor:
        begin = torch.zeros_like(times[:, :1])
        asked = torch.cat((begin, times), dim=1).repeat_interleave(samples, dim=0)
        params = tuple(self.field.parameters())
        return how.solve(self.field, start, asked, params).ys[:, 1:]

    def emit(self, states: Tensor, covariates: Tensor) -> Emission:
        """Return what states (B, K, T, D) and covariates (B, T, P) decode to."""
        if self.shape.n_covariates:
            beside = covariates[:, None].expand(-1, states.shape[1], -1, -1)
            states = torch.cat((states, beside), dim=3)
        if self.shape.varying_noise:
            mean, more = self.decoder(states).chunk(2, dim=3)
            log_scale = self.log_noise + more
        else:
            mean = self.decoder(states)
            log_scale = self.log_noise.expand_as(mean)
        return Emission(mean, log_scale.clamp(_SMALLEST, _LARGEST))

    def log_rate(self, states: Tensor) -> Tensor:
        """Return the logarithm of the intensity of observations, (B, K, T)."""
        assert self.log_intensity is not None, "a model of event times has one"
        rate: Tensor = self.log_intensity(states)[..., 0]
        return rate.clamp(-_LARGEST_RATE, _LARGEST_RATE)

    def log_density(
        self,
        batch: Batch,
        base: Tensor,
        emission: Emission,
        known_by: Tensor,
        white: bool = False,
    ) -> Tensor:
        """Return log-densities given the path and known rows before, (B, K, T, C).

        `known_by` (B, T, C) says which values later rows know of. With `white`, as if
        no residual persisted.
        """
        residual = self.error(batch, base, emission)
        if white:
            inner = -0.5 * residual**2
        else:
            inner = self.residual.log_density(
                batch.times, batch.mask, residual, known_by
            )
        outer = emission.log_scale + 0.5 * _LOG_TWO_PI
        return inner - outer * batch.mask[:, None]

    def error(self, batch: Batch, base: Tensor, emission: Emission) -> Tensor:
        """Return what the path leaves unexplained, in units of the scale, (B, K, T, C).

        `base` (B, K, T, C) are draws of trend and seasons.
        """
        left = batch.values[:, None] - base - emission.mean
        return left / emission.log_scale.exp() * batch.mask[:, None]

    def split(self, batch: Batch, length: Tensor, noise: Tensor) -> "Split":
        """Return trend and seasons of the first `length` (B,) rows, and what is left.

        Of normal noise (B, K, C, R), K draws of them.
        """
        if self.baseline.empty:
            nothing = torch.zeros_like(batch.values)
            return Split(batch, None, nothing[:, None])
        context = first(batch, length)
        found = self.baseline.fit(context.times, context.values, context.mask)
        base = self.baseline.at(batch.times, found.mean)
        left = torch.where(batch.mask, batch.values - base, 0.0)
        drawn = self.baseline.at(batch.times, found.draw(noise))
        return Split(replace(batch, values=left), found, drawn)

    def forecast(
        self, context: Batch, queries: Batch, noise: Tensor, how: Integration
    ) -> Mixture:
        """Return the predictive distribution of each value, apart.

        Parameters
        ----------
        context : Batch of (B, T)
            What is known; times count from its first rows.
        queries : Batch of (B, Q)
            When, and with which covariates; times count from the same.
        noise : Tensor of shape (K, `noise_width`)
            Standard normal; the samples of all series.
        """
        joined = self._joined(context, queries, noise, how)
        mean, variance = self.residual.smooth(
            joined.batch.times, joined.batch.mask, joined.error
        )
        scale = joined.emission.log_scale.exp()
        centre = joined.emission.mean + scale * mean
        spread = scale * (variance + self.residual.white()).sqrt()[:, None]
        mixture = Mixture(joined.answers(centre + joined.base), joined.answers(spread))
        return mixture.widened(self.width)

    def paths(
        self,
        context: Batch,
        queries: Batch,
        n_paths: int,
        generator: torch.Generator,
        noise: Tensor,
        how: Integration,
    ) -> Tensor:
        """Return observations drawn jointly over the queries, (B, K, Q, C).

        What persists is drawn as before any observation, and corrected by what those
        there are say of the draw (Wilson et al. 2021, JMLR 22(105), eq. 11). They
        spread around the mean of `forecast` with this `noise`.
        """
        like = context.values

        def normal(*shape: int) -> Tensor:
            drawn = torch.randn(*shape, generator=generator, dtype=like.dtype)
            return drawn.to(like.device)

        own = normal(len(like), n_paths, self.noise_width)
        joined = self._joined(context, queries, own, how)
        times, mask, shape = joined.batch.times, joined.batch.mask, joined.error.shape
        u = self.residual.draw(times, normal(*shape))
        white = normal(*shape) * self.residual.white().sqrt()
        missed = (joined.error - u - white) * mask[:, None]
        u = u + self.residual.smooth(times, mask, missed)[0]
        scale = joined.emission.log_scale.exp()
        drawn = joined.emission.mean + scale * (u + white) + joined.base
        drawn = joined.answers(drawn)
        if self.width == 1:  # there is no need to know around what to stretch
            return drawn
        mean = self.forecast(context, queries, noise, how).mean()[:, None]
        return mean + self.width * (drawn - mean)

    def intensity(
        self, context: Batch, queries: Batch, noise: Tensor, how: Integration
    ) -> Tensor:
        """Return the expected number of observations per unit of time, (B, Q)."""
        joined = self._joined(context, queries, noise, how)
        return joined.answers(self.log_rate(joined.states).exp()).mean(dim=1)

    def _joined(
        self, context: Batch, queries: Batch, noise: Tensor, how: Integration
    ) -> "_Joined":
        length = context.present.sum(dim=1)
        batch, place = interleaved(context, queries)
        z_noise, base_noise = self.parted(noise)
        # Queries stand among the context's rows, and are not observed.
        every = torch.full_like(length, batch.times.shape[1])
        split = self.split(batch, every, base_noise)
        if self.muted:  # nobody asks where the path goes
            known = context.mask.sum(dim=1) > self.baseline.n_terms
            states, emission = split.drawn[..., :0], muted(split, known)
        else:
            z0 = self._posterior_of_all(context, split, how).draw(z_noise)
            states = self.states(z0, batch.times, how)
            emission = self.emit(states, batch.covariates)
        error = self.error(batch, split.drawn, emission)
        return _Joined(batch, place, split.drawn, states, emission, error)

    def _posterior_of_all(
        self, context: Batch, split: "Split", how: Integration
    ) -> Posterior:
        """Return q(z0) given a context without the trend and seasons in `split`."""
        length = context.present.sum(dim=1)
        if split.regression is not None:
            base = self.baseline.at(context.times, split.regression.mean)
            context = replace(context, values=(context.values - base) * context.mask)
        return self.posterior(*readable(context, length), how)

    @property
    def noise_width(self) -> int:
        """How many normal numbers a draw of the path and of the baseline takes."""
        return self.shape.latent + self.baseline.n_terms * self.shape.n_channels

    def parted(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return (..., D) and (1 or B, K, C, R) of noise (K, N) or (B, K, N)."""
        z, base = noise.split(
            (self.shape.latent, noise.shape[-1] - self.shape.latent), -1
        )
        shape = (self.shape.n_channels, self.baseline.n_terms)
        base = base.unflatten(-1, shape) if base.shape[-1] else base[..., None]
        return z, base if base.ndim == 4 else base[None]

    def mute(self) -> None:
        """Forecast trend and seasons alone, with the errors that their fit assumes."""
        self.muted = torch.ones_like(self.muted)
        if not self.residual.persistent:
            return
        with torch.no_grad():
            share = self.baseline.share
            self.residual.share.fill_(math.log(share / (1 - share)))
            self.residual.log_time.fill_(math.log(PERSISTENCE))


def muted(split: "Split", known: Tensor) -> Emission:
    """Return the emission of a path that says nothing, of the regression's scale.

    No more values than coefficients leave no errors to measure. Where a scale is not
    `known` (B, C), it is that of all training values, 1.
    """
    assert split.regression is not None, "without a path there is a baseline"
    scale = torch.where(known, split.regression.scale, 1.0)
    log_scale = scale.log().to(split.drawn.dtype)[:, None, None]
    return Emission(torch.zeros_like(split.drawn), log_scale.expand_as(split.drawn))


@dataclass(frozen=True, slots=True)
class Split:
    """Series without trend and seasons."""

    left: Batch
    """What a recognition network reads."""
    regression: Regression | None
    drawn: Tensor
    """(B, K, T, C) draws of trend and seasons; one of zeros where there are none."""


@dataclass(frozen=True, slots=True)
class _Joined:
    """Context and queries as one series of T + Q rows, and what the model says."""

    batch: Batch
    place: Tensor
    """(B, Q) where the queries stand."""
    base: Tensor
    """(B, K, T + Q, C), or (B, 1, T + Q, C) where there is none."""
    states: Tensor
    """(B, K, T + Q, D); of width 0 where there is no path."""
    emission: Emission
    error: Tensor
    """(B, K, T + Q, C) in units of the scale; 0 where not observed."""

    def answers(self, x: Tensor) -> Tensor:
        """Return the queries' part of (B, K, T + Q, ...)."""
        place = self.place[(slice(None), None, slice(None)) + (None,) * (x.ndim - 3)]
        return x.gather(2, place.expand(-1, x.shape[1], -1, *x.shape[3:]))


def interleaved(context: Batch, queries: Batch) -> tuple[Batch, Tensor]:
    """Return both as one batch in the order of time, and where the queries stand.

    Padding of a context stands where its last row does, and is not observed.
    """
    times = torch.cat((context.times, queries.times), dim=1)
    n_known = context.times.shape[1]
    nothing = torch.zeros_like(queries.times)[:, :, None]
    n_channels = context.values.shape[2]
    values = torch.cat((context.values, nothing.expand(-1, -1, n_channels)), dim=1)
    mask = torch.cat((context.mask, nothing.expand(-1, -1, n_channels).bool()), dim=1)
    covariates = torch.cat((context.covariates, queries.covariates), dim=1)
    present = torch.cat((context.present, queries.present), dim=1)
    order = times.argsort(dim=1, stable=True)
    place = order.argsort(dim=1)[:, n_known:]
    return chosen(Batch(times, values, mask, present, covariates), order), place


def chosen(batch: Batch, rows: Tensor) -> Batch:
    """Return rows (B, N) of each series."""

    def wide(x: Tensor) -> Tensor:
        return x.gather(1, rows[:, :, None].expand(-1, -1, x.shape[2]))

    return Batch(
        batch.times.gather(1, rows),
        wide(batch.values),
        wide(batch.mask),
        batch.present.gather(1, rows),
        wide(batch.covariates),
    )


def readable(batch: Batch, length: Tensor) -> tuple[Batch, Tensor]:
    """Return at most `MOST_READ` rows of each context, and how many.

    The first, the last ones, and rows evenly between: what a recognition network would
    have to carry through thousands of rows, it loses on the way.
    """
    if int(length.max()) <= MOST_READ:
        return batch, length
    near = MOST_READ // 2
    far = MOST_READ - near
    step = torch.arange(MOST_READ, device=length.device)
    older = (length - near)[:, None]
    spread = torch.where(step < far, step * older // far, older + step - far)
    rows = torch.where((length > MOST_READ)[:, None], spread, step)
    kept = length.clamp_max(MOST_READ)
    return chosen(batch, rows.minimum((length - 1).clamp_min(0)[:, None])), kept


def first(batch: Batch, length: Tensor) -> Batch:
    """Return the batch with all but the first `length` (B,) rows not observed."""
    place = torch.arange(batch.times.shape[1], device=length.device)
    present = batch.present & (place < length[:, None])
    return replace(batch, mask=batch.mask & present[:, :, None], present=present)


def autonomous(field: MLPField) -> MLPField:
    """Return the field with shifts by time fixed at zero: no moment is special."""
    for shift in field.shifts:
        shift.data.zero_()
        shift.requires_grad_(False)
    for bias in field.biases:
        bias.data.zero_()
    field.weights[-1].data.mul_(0.5)
    return field


def hidden_layers(widths: tuple[int, ...]) -> list[nn.Module]:
    """Return layers with tanh behind each."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    return layers
