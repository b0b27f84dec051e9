"""The published latent ODE, as a competent user of torchdiffeq writes it by hand.

Chen et al. (2018), section 5, and Rubanova et al. (2019), after the code that came with
them: every batch is laid on the union of its observation times; a recognition network
runs backwards over these, a GRU with masks and gaps, or an ODE-RNN whose state moves by
Euler steps between each pair of times; z0 at the start of the series is sampled once;
dopri5 (rtol 1e-3, atol 1e-4, as Rubanova et al.) goes through all times of the union;
noise is a constant; the KL term warms up (here within half of the budget); Adamax at
1e-2, its rate falling by 0.999 at each step to a tenth. Sizes are the toy's of Rubanova
et al.: 10 latent dimensions, 20 in the recognition network, 100 units. The evidence
bound is Chen et al.'s.

What we add, to the peer's good: the weights of the best validation RMSE are kept, a
tenth of the training series set aside for it.

Shapes: B series, T times of the union, D channels, L latent, R recognition, S samples.
"""

import copy
import time
from itertools import pairwise

import numpy as np
import torch
from series_view import CONTEXT, Fitted, mixture
from torch import nn
from torchdiffeq import odeint

LATENT, RECOGNITION, UNITS = 10, 20, 100
BATCH = 50
RATE = 1e-2
SAMPLES = 40
NOISE = {"spirals": 0.3, "periodic": 0.01}
"""Of an observation, in the units of the task: the simulation's, as published."""
OTHER_NOISE = 0.1
"""Elsewhere, in standard deviations of the training values; published: 0.01 of data
between 0 and 1."""


def mlp(*widths):
    layers = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class Field(nn.Module):
    """dz/dt; it does not depend on t."""

    def __init__(self, size):
        super().__init__()
        self.net = mlp(size, UNITS, UNITS, size)

    def forward(self, t, z):
        return self.net(z)


class LatentODE(nn.Module):
    def __init__(self, channels, noise, encoder):
        super().__init__()
        self.encoder = encoder
        self.register_buffer("noise", torch.as_tensor(noise).float())  # (D,)
        gap = 1 if encoder == "rnn" else 0
        self.cell = nn.GRUCell(2 * channels + gap, RECOGNITION)
        self.between = Field(RECOGNITION)
        self.to_z0 = mlp(RECOGNITION, UNITS, 2 * LATENT)
        self.field = Field(LATENT)
        self.decoder = nn.Linear(LATENT, channels)

    def recognise(self, t, x, seen):
        """Return mean and log-variance of z0: t (T,), x and seen (B, T, D)."""
        h = x.new_zeros(len(x), RECOGNITION)
        span = float(t[-1] - t[0]) or 1.0
        any_seen = seen.any(dim=2)  # (B, T)
        since = x.new_zeros(len(x), 1)
        for k in reversed(range(len(t))):
            gap = float(t[k + 1] - t[k]) if k + 1 < len(t) else 0.0
            if self.encoder == "ode_rnn" and gap:
                # One Euler step where it is a fiftieth of the span or less, more of
                # them elsewhere: the published rule.
                count = max(int(np.ceil(50 * gap / span - 1e-6)), 1)
                for _ in range(count):
                    h = h - gap / count * self.between(None, h)
            since = since + gap
            rows = any_seen[:, k].nonzero()[:, 0]
            if not len(rows):
                continue
            step = [x[rows, k], seen[rows, k].float()]
            if self.encoder == "rnn":
                step.append(since[rows])
            h = h.index_copy(0, rows, self.cell(torch.cat(step, dim=1), h[rows]))
            since = since.index_fill(0, rows, 0.0)
        if self.encoder == "ode_rnn" and t[0] > 0:
            h = h - float(t[0]) * self.between(None, h)
        return self.to_z0(h).chunk(2, dim=1)

    def paths(self, z0, t):
        """Return decoded paths: (..., L) and t (T,) -> (..., T, D)."""
        start = torch.cat([t.new_zeros(1), t])
        # Times of the union that coincide with the start are the start.
        later = start > 0
        knots = torch.cat([start[:1], start[later]])
        z = odeint(self.field, z0, knots, rtol=1e-3, atol=1e-4, method="dopri5")
        at = later[1:].cumsum(0)
        return self.decoder(torch.movedim(z, 0, -2)[..., at, :])


def union(series, channels, start=None):
    """Lay series on the union of their times: t (T,), x and seen (B, T, D)."""
    begins = [s.t[0] for s in series] if start is None else start
    local = [np.round(s.t - b, 6) for s, b in zip(series, begins, strict=True)]
    t = np.unique(np.concatenate(local))
    x = np.full((len(series), len(t), channels), np.nan)
    for k, s in enumerate(series):
        x[k, np.searchsorted(t, local[k])] = s.x
    x = torch.tensor(x).float()
    return torch.tensor(t).float(), x.nan_to_num(), ~x.isnan()


def origin(view, series):
    """Return time 0 of a series: its panel's where it starts as one, else its own."""
    return series.t[0] if view.alone or view.task.name == "pbc" else 0.0


def levelled(view, series):
    """Let a window of a single record start from its last known value."""
    if not view.alone:
        return series, [np.zeros(view.channels)] * len(series)
    shifts = [s.x[:CONTEXT][-1] for s in series]
    pairs = zip(series, shifts, strict=True)
    return [type(s)(s.t, s.x - shift) for s, shift in pairs], shifts


def pasts(view, series):
    """Return what recognition sees: the half of the time that tests know as well.

    Where training series are no longer than that, they are seen whole, as published.
    """
    if view.alone:
        return [s[:CONTEXT] for s in series]
    if not view.reaches():
        return series
    if view.task.name == "pbc":
        return [s[: -(-len(s) // 2)] for s in series]
    end = max(s.t[-1] for s in view.history)
    return [s[: max(np.searchsorted(s.t, end, "right"), 1)] for s in series]


def elbo(net, known, whole, weight):
    """Return minus the evidence lower bound per series, the KL term weighted."""
    mean, log_var = net.recognise(*known)
    z0 = mean + torch.randn_like(mean) * torch.exp(0.5 * log_var)
    t, x, seen = whole
    off = (x - net.paths(z0, t)) / net.noise
    fit = (0.5 * off.square() * seen).sum(dim=(1, 2))
    divergence = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(dim=1)
    return (fit + weight * divergence).mean()


def error(net, known, whole):
    """Return the RMSE of the mean latent start."""
    with torch.no_grad():
        t, x, seen = whole
        found = net.paths(net.recognise(*known)[0], t)
        return float(((found - x).square() * seen).sum() / seen.sum()) ** 0.5


def fit_published(view, budget, seed, encoder):
    started = time.process_time()
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    kind = view.task.name.split("-")[0]
    noise = NOISE[kind] / view.spread if kind in NOISE else OTHER_NOISE
    net = LatentODE(view.channels, noise * np.ones(view.channels), encoder)
    series = view.windows(rng, 200)
    series, _ = levelled(view, series)
    order = np.arange(len(series)) if view.alone else rng.permutation(len(series))
    held = max(len(series) // 10, 1)
    check = [series[k] for k in order[-held:]]
    series = [series[k] for k in order[:-held]]

    def batch(chosen):
        starts = [origin(view, s) for s in chosen]
        known = union(pasts(view, chosen), view.channels, starts)
        return known, union(chosen, view.channels, starts)

    checked = batch(check[:BATCH])
    optimiser = torch.optim.Adamax(net.parameters(), lr=RATE)
    best, kept, kept_at, step, next_check = np.inf, None, 0.0, 0, 0.0
    while (spent := (time.process_time() - started) / budget) < 1 or kept is None:
        if spent >= next_check:
            found = error(net, *checked)
            next_check += 0.04
            if found < best:
                best, kept, kept_at = found, copy.deepcopy(net.state_dict()), spent
            elif kept is None:
                raise FloatingPointError(f"validation RMSE is {found}")
        chosen = rng.choice(len(series), size=min(BATCH, len(series)), replace=False)
        known, whole = batch([series[k] for k in chosen])
        # Published: 50 epochs without the KL term, hundreds until its weight is 1;
        # in a budget's terms:
        loss = elbo(net, known, whole, min(max(2 * spent - 0.2, 0.0), 1.0))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        for group in optimiser.param_groups:
            group["lr"] = max(group["lr"] * 0.999, RATE / 10)
        step += 1
    if error(net, *checked) > best:
        net.load_state_dict(kept)
    note = f"{step} steps, best at {kept_at:.0%} of the budget"

    def predict():
        torch.manual_seed(seed)
        histories, shifts = levelled(view, view.recent())
        starts = [origin(view, s) for s in histories]
        known = union(histories, view.channels, starts)
        local = [np.round(a - b, 6) for a, b in zip(view.asked, starts, strict=True)]
        t = np.unique(np.concatenate(local))
        with torch.no_grad():
            mean, log_var = net.recognise(*known)
            draws = torch.randn(SAMPLES, *mean.shape)
            z0 = mean + draws * torch.exp(0.5 * log_var)
            paths = torch.stack([net.paths(z, torch.tensor(t).float()) for z in z0])
        paths = paths.numpy()  # (S, B, T, D)
        pieces = [
            np.moveaxis(paths[:, k, np.searchsorted(t, asked)], 0, 1) + shifts[k]
            for k, asked in enumerate(local)
        ]
        means = np.moveaxis(view.gather(pieces), 1, 0)
        return mixture(means, np.broadcast_to(net.noise.numpy(), means.shape), seed)

    return Fitted(predict, note)
