"""Recurrent peers of `series.py`: a GRU over observations, with gaps as inputs.

`direct` reads a past and says the normal of every later time from how far ahead it is;
`rollout` says the next observation only, and forecasts by feeding samples to itself.

Shapes: B series, T observations (padded at the end), D channels, K pairs per series.
"""

import copy
import math
import time

import numpy as np
import torch
from series_view import CONTEXT, Fitted, gaussian, mixture
from torch import nn

HIDDEN = 64
BATCH = 64
PAIRS = 24
PATHS = 50
RATE = 4e-3
PATIENCE = 0.3
"""Share of the budget without a better validation loss after which training ends."""


def pad(series, channels):
    """Return times (B, T), values (B, T, D), and lengths (B,)."""
    lengths = torch.tensor([len(s) for s in series])
    t = np.zeros((len(series), int(lengths.max())))
    x = np.full((*t.shape, channels), np.nan)
    for k, s in enumerate(series):
        t[k, : len(s)], t[k, len(s) :], x[k, : len(s)] = (
            s.t - s.t[0],
            s.t[-1] - s.t[0],
            s.x,
        )
    return torch.tensor(t).float(), torch.tensor(x).float(), lengths


def carried(x):
    """Return values with gaps filled by the last observation, 0 before the first."""
    seen = ~x.isnan()
    at = torch.arange(x.shape[1])[None, :, None] * seen
    at = at.cummax(dim=1).values
    return x.nan_to_num().gather(1, at)


class Recurrent(nn.Module):
    """Inputs of one step: carried values, masks, the gap before it, the time so far."""

    def __init__(self, channels, gap, waves, dated):
        super().__init__()
        self.gap, self.dated = gap, dated
        self.register_buffer("waves", waves)
        inner = HIDDEN + 2 + 2 * len(waves) + channels + (2 if dated else 0)
        self.cell = nn.GRU(2 * channels + 2 + 2 * dated, HIDDEN, batch_first=True)
        self.head = nn.Sequential(
            nn.Linear(inner, 2 * HIDDEN),
            nn.SiLU(),
            nn.Linear(2 * HIDDEN, HIDDEN),
            nn.SiLU(),
            nn.Linear(HIDDEN, 3 * channels),
        )

    def season(self, t):
        if not self.dated:
            return []
        return [torch.sin(2 * math.pi * t), torch.cos(2 * math.pi * t)]

    def inputs(self, filled, seen, before, t):
        """Return (..., features); `before` and `t` are (..., 1)."""
        gap = torch.log1p(before / self.gap)
        return torch.cat([filled, seen, gap, t, *self.season(t)], dim=-1)

    def read(self, t, x):
        """Return the state after each observation, and the values carried to it."""
        filled = carried(x)
        before = torch.diff(t, dim=1, prepend=t[:, :1])[..., None]
        steps = self.inputs(filled, (~x.isnan()).float(), before, t[..., None])
        return self.cell(steps)[0], filled

    def say(self, state, last, lead, t):
        """Return mean and standard deviation (..., D); lead and t are (..., 1)."""
        phase = lead * self.waves
        known = [state, last, lead, torch.log1p(lead / self.gap)]
        known += [phase.sin(), phase.cos(), *self.season(t)]
        move, gate, log_std = self.head(torch.cat(known, dim=-1)).chunk(3, dim=-1)
        mean = torch.sigmoid(gate) * last + move
        return mean, torch.exp(log_std.clamp(-5, 3))


def nats(mean, std, y):
    """Return the mean negative log-density of what was observed of y."""
    seen = ~y.isnan()
    z = (y.nan_to_num() - mean) / std
    loss = 0.5 * z.square() + std.log() + 0.5 * math.log(2 * math.pi)
    return (loss * seen).sum() / seen.sum().clamp(min=1)


def direct_loss(net, t, x, lengths, rng, view):
    """Ask from random pasts for random later observations."""
    states, filled = net.read(t, x)
    now, later = [], []
    for k in range(len(t)):
        n = int(lengths[k])
        ends = t[k, :n].numpy()
        if view.alone:
            cut = rng.integers(n // 8, n - 1, size=PAIRS)
        else:
            share = np.where(
                rng.random(PAIRS) < 0.5, 0.5, rng.uniform(0.2, 0.9, size=PAIRS)
            )
            cut = np.searchsorted(ends, share * ends[-1], "right") - 1
            cut = np.clip(cut, 0, n - 2)
        now.append(cut)
        later.append(rng.integers(cut + 1, n))
    now, later = torch.as_tensor(np.array(now)), torch.as_tensor(np.array(later))
    row = torch.arange(len(t))[:, None]
    at = t[row, later][..., None]
    lead = at - t[row, now][..., None]
    return nats(*net.say(states[row, now], filled[row, now], lead, at), x[row, later])


def rollout_loss(net, t, x, lengths, rng, view):
    """Ask after each observation for the next."""
    states, filled = net.read(t, x)
    at = t[:, 1:, None]
    lead = at - t[:, :-1, None]
    return nats(*net.say(states[:, :-1], filled[:, :-1], lead, at), x[:, 1:])


def relative(series, alone):
    """Let a window of a single record start from its last known value."""
    if not alone:
        return series, [0.0] * len(series)
    shifts = [s.x[:CONTEXT][-1] for s in series]
    pairs = zip(series, shifts, strict=True)
    return [type(s)(s.t, s.x - shift) for s, shift in pairs], shifts


def train(view, budget, seed, loss):
    """Return the net of the best validation loss, and how many steps it took.

    Adam, its rate on a cosine over the budget; a tenth of the series validates.
    """
    started = time.process_time()
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    series = [s for s in view.windows(rng, 400) if len(s) > 1]
    series, _ = relative(series, view.alone)
    order = np.arange(len(series)) if view.alone else rng.permutation(len(series))
    check = [series[k] for k in order[-max(len(series) // 10, 1) :]]
    series = [series[k] for k in order[: -max(len(series) // 10, 1)]]
    gap = float(np.mean([np.diff(s.t).mean() for s in series]))
    span = max(s.t[-1] - s.t[0] for s in series)
    waves = torch.tensor(np.geomspace(1.0, 40.0, 6) / span).float()
    net = Recurrent(view.channels, gap, waves, view.dated)
    optimiser = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=1e-3)
    checked = pad(check, view.channels)
    best, kept, kept_at, step = np.inf, copy.deepcopy(net.state_dict()), 0.0, 0
    while (spent := (time.process_time() - started) / budget) < 1:
        if step % 20 == 0:
            with torch.no_grad():
                fixed = np.random.default_rng(0)
                found = np.mean([loss(net, *checked, fixed, view) for _ in range(3)])
            if found < best:
                best, kept, kept_at = found, copy.deepcopy(net.state_dict()), spent
            elif spent - kept_at > PATIENCE:
                break
        for group in optimiser.param_groups:
            group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * spent))
        chosen = rng.choice(len(series), size=min(BATCH, len(series)), replace=False)
        value = loss(net, *pad([series[k] for k in chosen], view.channels), rng, view)
        optimiser.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        step += 1
    net.load_state_dict(kept)
    return net.eval(), f"{step} steps, best at {kept_at:.0%} of the budget"


def state_after(net, view):
    """Return the state (B, H) and the carried values (B, D) at the histories' ends."""
    series, shifts = relative(view.recent(), view.alone)
    t, x, lengths = pad(series, view.channels)
    with torch.no_grad():
        states, filled = net.read(t, x)
    row = torch.arange(len(t))
    return states[row, lengths - 1], filled[row, lengths - 1], shifts


def fit_direct(view, budget, seed):
    net, note = train(view, budget, seed, direct_loss)

    def predict():
        states, last, shifts = state_after(net, view)
        means, stds = [], []
        for k, (known, times) in enumerate(zip(view.recent(), view.asked, strict=True)):
            lead = torch.tensor(times - known.t[-1]).float()[:, None]
            at = torch.tensor(times - known.t[0]).float()[:, None]
            many = len(times)
            with torch.no_grad():
                mean, std = net.say(
                    states[k].expand(many, -1),
                    last[k].expand(many, -1),
                    lead.clamp(0),
                    at,
                )
            mean = np.where(lead > 0, mean.numpy().astype(float), np.nan)
            means.append(mean + shifts[k])
            stds.append(std.numpy().astype(float))
        return gaussian(view.gather(means), view.gather(stds))

    return Fitted(predict, note)


def fit_rollout(view, budget, seed):
    net, note = train(view, budget, seed, rollout_loss)

    # Paths that leave what was ever seen by half of its range would feed on themselves.
    windows, _ = relative(view.windows(np.random.default_rng(seed), 400), view.alone)
    seen = np.concatenate([s.x for s in windows])
    low, high = np.nanmin(seen, axis=0), np.nanmax(seen, axis=0)
    low, high = low - (high - low) / 2, high + (high - low) / 2
    low, high = torch.tensor(low).float(), torch.tensor(high).float()

    def one(state, last, known, times):
        """Return means and deviations (S, n, D) along sampled paths."""
        means = np.full((PATHS, len(times), view.channels), np.nan)
        stds = np.ones_like(means)
        h = state.expand(1, PATHS, -1).contiguous()
        x = last.expand(PATHS, -1)
        now = known.t[-1]
        for k in np.argsort(times):
            if times[k] <= known.t[-1]:
                continue
            lead = torch.full((PATHS, 1), float(times[k] - now))
            at = torch.full((PATHS, 1), float(times[k] - known.t[0]))
            if lead[0] > 0 or now == known.t[-1]:
                mean, std = net.say(h[0], x, lead, at)
                x = (mean + std * torch.randn_like(mean)).clamp(low, high)
                step = net.inputs(x, torch.ones_like(x), lead, at)
                h = net.cell(step[:, None], h)[1]
            means[:, k], stds[:, k] = mean.numpy(), std.numpy()
            now = times[k]
        return means, stds

    def predict():
        torch.manual_seed(seed)
        states, last, shifts = state_after(net, view)
        pairs = zip(view.recent(), view.asked, strict=True)
        with torch.no_grad():
            found = [one(states[k], last[k], *pair) for k, pair in enumerate(pairs)]
        means = [
            np.moveaxis(m, 0, 1) + shift
            for (m, _), shift in zip(found, shifts, strict=True)
        ]
        means = np.moveaxis(view.gather(means), 1, 0)
        stds = np.moveaxis(view.gather([np.moveaxis(s, 0, 1) for _, s in found]), 1, 0)
        return mixture(means, stds, seed)

    return Fitted(predict, note)
