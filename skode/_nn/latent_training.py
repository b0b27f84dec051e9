"""What a latent ODE is trained on: pieces of series, cut anew each time.

A piece is a stretch of a series, cut into a context and what follows. Short pieces come
first and grow: over many turns of a solution, gradients say little until the first turn
is right. B pieces, K samples of the latent path, T rows, C channels.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from skode._nn.integration import Integration
from skode._nn.latent import LatentODE, chosen, first
from skode._nn.predictive import Mixture
from skode._nn.recognition import Posterior
from skode._series.batch import Batch

__all__ = ["BOUNDS", "Cutter", "LatentObjective", "Piece", "Plan", "evaluate"]

_SHORTEST = 0.15
"""Share of its rows that a piece shows at the beginning of a training."""
_GROWN = 0.5
"""Share of the training after which pieces have their whole length."""
_WARM = 0.2
"""Share of the training over which the divergence from the prior comes to count."""
_WHITE = 0.35
"""Share of the training during which residuals are white noise: before the path is
roughly right, whatever it misses persists, and the residual would take its place."""
_LEAST_CONTEXT, _MOST_CONTEXT = 0.15, 0.95
_AT_ONCE = 400_000
"""Rows times paths that are in memory together where series are watched."""
_WIDTH_STEP, _NARROWER, _WIDER = 1.05, 12, 30
"""Forecasts are made 0.56 to 4.3 times as wide, in steps of a twentieth."""
_GAUSS = ((-math.sqrt(0.6), 5 / 18), (0.0, 8 / 18), (math.sqrt(0.6), 5 / 18))
"""Nodes on [-1, 1] and weights, summing to 1, of Gauss and Legendre's third rule."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Stretches of series; times count from their first rows."""

    batch: Batch
    rows: Tensor
    """(B,) how many rows there are."""
    context: Tensor
    """(B,) how many of these are known."""
    left_out: Tensor
    """(B, T) rows of the series between the one before and this one."""

    @property
    def known(self) -> Tensor:
        """(B, T) whether a row is of the context."""
        step = torch.arange(self.batch.times.shape[1], device=self.rows.device)
        return step < self.context[:, None]

    @property
    def asked(self) -> Tensor:
        """(B, T, C) values that follow the context."""
        return self.batch.mask & ~self.known[:, :, None]


@dataclass(frozen=True, slots=True)
class Cutter:
    """Cuts pieces of series.

    Parameters
    ----------
    series : Batch of (N, T)
        All training series. Times may be in float64 where values are not: pieces, which
        count from their own first rows, are in the values' dtype.
    window : float
        Longest time that a piece spans.
    most_rows : int
        Longer pieces are thinned to so many rows.
    generator : torch.Generator
        Chooses, on the CPU.
    """

    series: Batch
    window: float
    most_rows: int
    generator: torch.Generator

    def cut(self, which: Tensor, reach: float) -> Piece:
        """Return a piece of each series in `which` (B,), of `reach` of its rows."""
        times, present = self.series.times[which], self.series.present[which]
        count = present.sum(dim=1)
        start = self._start(times, count, reach)
        end = torch.searchsorted(
            times.contiguous(),
            times.gather(1, start[:, None]) + self.window,
            right=True,
        )[:, 0].minimum(count)
        longest = (reach * (end - start)).ceil().long().clamp_min(2)
        rows = longest.minimum(end - start)
        share = _LEAST_CONTEXT + (_MOST_CONTEXT - _LEAST_CONTEXT) * self._uniform(which)
        context = (1 + (share * (rows - 1)).long()).minimum(rows)
        index, context, rows = self._index(start, rows, context)
        return _piece(self.series, which, index, rows, context)

    def _uniform(self, which: Tensor) -> Tensor:
        return torch.rand(len(which), generator=self.generator).to(which.device)

    def _start(self, times: Tensor, count: Tensor, reach: float) -> Tensor:
        """Return first rows: of a whole series, half of the time its first."""
        at_first = self._uniform(count) < 0.5 * (reach == 1.0)
        end = times.gather(1, (count - 1)[:, None])
        last_start = torch.searchsorted(times.contiguous(), end - self.window)[:, 0]
        room = torch.maximum(last_start, ((1 - reach) * count).long())
        room = torch.where(at_first, last_start, torch.maximum(room, count // 2))
        start = (self._uniform(count) * (room + 1)).long()
        return start.minimum((count - 2).clamp_min(0))

    def _index(
        self, start: Tensor, rows: Tensor, context: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return rows of the series (B, T), and the counts after thinning."""
        if int(rows.max()) <= self.most_rows:
            return stretch(start, rows), context, rows
        chosen_rows, contexts = [], []
        for begin, total, known in zip(
            start.tolist(), rows.tolist(), context.tolist(), strict=True
        ):
            before = thinned(known, self.most_rows * 2 // 3, self.generator).flip(0)
            after = thinned(total - known, self.most_rows // 3, self.generator)
            chosen_rows.append(begin + torch.cat((known - 1 - before, known + after)))
            contexts.append(len(before))
        longest = max(map(len, chosen_rows))
        index = torch.stack(
            [torch.cat((x, x[-1:].expand(longest - len(x)))) for x in chosen_rows]
        )
        counts = torch.tensor([len(x) for x in chosen_rows])
        device = start.device
        return index.to(device), torch.tensor(contexts).to(device), counts.to(device)


def thinned(count: int, most: int, generator: torch.Generator) -> Tensor:
    """Return distances 0 <= d < count, increasing: near ones all, and some far ones."""
    if count <= most:
        return torch.arange(count)
    near = most // 2
    far = near + torch.randperm(count - near, generator=generator)[: most - near]
    return torch.cat((torch.arange(near), far.sort().values))


def stretch(start: Tensor, rows: Tensor) -> Tensor:
    """Return the places of `rows` (B,) rows from `start` on; the last one is repeated.

    (B, T) for the longest of them.
    """
    step = torch.arange(int(rows.max()), device=rows.device)
    return start[:, None] + step.minimum((rows - 1)[:, None])


def _piece(
    series: Batch, which: Tensor, index: Tensor, rows: Tensor, context: Tensor
) -> Piece:
    batch = chosen(series.take(which), index)
    step = torch.arange(index.shape[1], device=rows.device)
    present = step < rows[:, None]
    batch = replace(
        batch,
        times=(batch.times - batch.times[:, :1]).to(batch.values.dtype),
        mask=batch.mask & present[:, :, None],
        present=present,
    )
    left_out = (torch.diff(index, dim=1, prepend=index[:, :1] - 1) - 1).clamp_min(0)
    return Piece(batch, rows, context, left_out)


@dataclass(frozen=True, slots=True)
class Plan:
    """How a latent ODE is trained.

    Parameters
    ----------
    bound : {"predictive", "elbo", "iwae"}
        Of what the loss is minus the value, per observed number.
    samples : int
        K.
    consistency : float
        Weight of how far a path is from what its later observations alone say of it.
    steps : int
        How many batches the training has.
    pieces : int
        How many pieces an epoch has.
    """

    bound: str
    samples: int
    consistency: float
    steps: int
    pieces: int


class LatentObjective:
    """The loss of a batch of pieces; its calls tell how far the training has come."""

    def __init__(
        self,
        model: LatentODE,
        cutter: Cutter,
        how: Integration,
        plan: Plan,
    ) -> None:
        self._model, self._cutter = model, cutter
        self._how, self._plan = how, plan
        self.calls = 0

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the loss of one piece for each of these rows."""
        progress = self.calls / self._plan.steps
        self.calls += 1
        reach = min(1.0, _SHORTEST + (1 - _SHORTEST) * progress / _GROWN)
        piece = self._cutter.cut(self._series(rows), reach)
        warmth = min(1.0, progress / _WARM)
        return self.loss(piece, warmth, white=progress < _WHITE)

    def _series(self, rows: Tensor) -> Tensor:
        """Return which series rows of the loop stand for: each in turn, or drawn."""
        count = len(self._cutter.series.times)
        if count <= self._plan.pieces:
            return rows % count
        drawn = torch.randint(count, rows.shape, generator=self._cutter.generator)
        return drawn.to(rows.device)

    def loss(self, piece: Piece, warmth: float = 1.0, white: bool = False) -> Tensor:
        """Return the loss of a piece, with normal draws of the cutter's generator."""
        model, plan, how = self._model, self._plan, self._how
        noise = torch.randn(
            len(piece.rows),
            plan.samples,
            model.noise_width,
            generator=self._cutter.generator,
            dtype=piece.batch.values.dtype,
        ).to(piece.batch.values.device)
        noise, base_noise = model.parted(noise)
        split = model.split(piece.batch, piece.context, base_noise)
        batch = split.left
        posterior = model.posterior(batch, piece.context, how)
        z0 = posterior.draw(noise)
        nodes = _with_nodes(batch.times) if model.shape.events else batch.times
        states = model.states(z0, nodes, how)
        rates = None
        if model.shape.events:
            rates = _log_likelihood_of_times(model, states, batch, piece.left_out)
            states = states[:, :, :: len(_GAUSS) + 1]
        emission = model.emit(states, batch.covariates)
        density = model.log_density(
            piece.batch, split.drawn, emission, _KNOWN_BY[plan.bound](piece), white
        )
        by_row = density.sum(dim=3)  # (B, K, T)
        if rates is not None:
            by_row = by_row + rates
        bound = _BOUNDS[plan.bound](by_row, piece, posterior, z0, warmth)
        total = bound.sum()
        if plan.consistency:
            total = total - plan.consistency * warmth * self._inconsistency(
                batch, piece.rows, states, how
            )
        return -total / batch.mask.sum().clamp_min(1)

    def _inconsistency(
        self, batch: Batch, rows: Tensor, states: Tensor, how: Integration
    ) -> Tensor:
        """Return how unlikely the paths are by what is observed from a row on.

        A path that leaves the states which observations speak of has no future to be
        learned from others. The row is drawn.
        """
        share = torch.rand(len(rows), generator=self._cutter.generator).to(rows.device)
        begin = (1 + (share * (rows - 1).clamp_min(0)).long()).minimum(
            (rows - 1).clamp_min(0)
        )
        step = torch.arange(batch.times.shape[1], device=rows.device)
        index = torch.minimum(begin[:, None] + step, (rows - 1).clamp_min(0)[:, None])
        later = chosen(batch, index)
        left = rows - begin
        later = replace(later, times=later.times - later.times[:, :1])
        there = self._model.posterior(later, left, how)
        place = begin[:, None, None, None].expand(
            -1, states.shape[1], 1, states.shape[3]
        )
        path = states.gather(2, place)[:, :, 0]
        return there.cross_entropy(path).mean(dim=1).sum()


def _predictive(
    by_row: Tensor, piece: Piece, posterior: Posterior, z0: Tensor, warmth: float
) -> Tensor:
    """ELBO of the context, and the mixture's log-density of each row beyond, (B,)."""
    known = piece.known
    inside = (by_row.mean(dim=1) * known).sum(dim=1)
    mixed = torch.logsumexp(by_row, dim=1) - math.log(by_row.shape[1])
    return inside + (mixed * ~known).sum(dim=1) - warmth * posterior.divergence()


def _elbo(
    by_row: Tensor, piece: Piece, posterior: Posterior, z0: Tensor, warmth: float
) -> Tensor:
    """Evidence lower bound of the piece, (B,) (Kingma & Welling 2014, eq. 3)."""
    return by_row.sum(dim=2).mean(dim=1) - warmth * posterior.divergence()


def _iwae(
    by_row: Tensor, piece: Piece, posterior: Posterior, z0: Tensor, warmth: float
) -> Tensor:
    """Importance-weighted bound, (B,) (Burda, Grosse & Salakhutdinov 2016, eq. 8)."""
    prior = -0.5 * z0.square().sum(dim=2)
    weight = by_row.sum(dim=2) + warmth * (prior + posterior.cross_entropy(z0))
    return torch.logsumexp(weight, dim=1) - math.log(z0.shape[1])


def _all_known(piece: Piece) -> Tensor:
    return piece.batch.mask


def _context_known(piece: Piece) -> Tensor:
    return piece.batch.mask & piece.known[:, :, None]


_KNOWN_BY = {
    "predictive": _context_known,
    "elbo": _all_known,
    "iwae": _all_known,
}
"""Bounds of a joint density take each row given all before; a forecast knows of its
context alone, and is trained to be as uncertain as that leaves it."""
_BOUNDS = {"predictive": _predictive, "elbo": _elbo, "iwae": _iwae}
BOUNDS = tuple(_BOUNDS)


def _with_nodes(times: Tensor) -> Tensor:
    """Return times (B, 4 T - 3): after each row but the last, the gap's nodes."""
    middle = (times[:, 1:] + times[:, :-1]) / 2
    half = (times[:, 1:] - times[:, :-1]) / 2
    nodes = [middle + node * half for node, _ in _GAUSS]
    between = torch.stack((times[:, :-1], *nodes), dim=2).flatten(1)
    return torch.cat((between, times[:, -1:]), dim=1)


def _log_likelihood_of_times(
    model: LatentODE, states: Tensor, batch: Batch, left_out: Tensor
) -> Tensor:
    """Return the Poisson process's log-likelihood (Chen et al. 2018, section 5.1).

    Of each row, given that the row before is one: log rate at the row, less the rate's
    integral since the row before; (B, K, T), 0 for the first row. Rows that were left
    out of a gap, `left_out` (B, T), have happened too: each counts with the gap's mean
    log rate.
    """
    log_rate = model.log_rate(states)
    every = len(_GAUSS) + 1
    gaps = torch.diff(batch.times, dim=1)[:, None]
    events = batch.present[:, None, 1:]
    missed = left_out[:, None, 1:]
    between = torch.zeros_like(log_rate[:, :, every::every])
    for node, (_, weight) in enumerate(_GAUSS):
        there = log_rate[:, :, 1 + node :: every]
        between = between + weight * (missed * there - there.exp() * gaps)
    at_rows = (log_rate[:, :, every::every] + between) * events
    return torch.nn.functional.pad(at_rows, (1, 0))


def halves(series: Batch, window: float) -> list[Piece]:
    """Return the first rows of each series up to a window, cut at thirds."""
    count = series.present.sum(dim=1)
    end = torch.searchsorted(
        series.times.contiguous(), series.times[:, :1] + window, right=True
    )[:, 0].minimum(count)
    index = stretch(torch.zeros_like(end), end)
    which = torch.arange(len(count), device=count.device)
    contexts = [(end * k // 3).clamp_min(1).minimum(end) for k in (1, 2)]
    return [_piece(series, which, index, end, context) for context in contexts]


def ahead(
    series: Batch, horizon: float, share: float, context: float
) -> tuple[Batch, list[Piece]]:
    """Return the series without their ends, and these as pieces to forecast.

    Parameters
    ----------
    series : Batch of (N, T)
        Long records.
    horizon : float
        Time that an end spans.
    share : float
        Share of the rows that an end has at least.
    context : float
        Time before an end from which it is forecast.
    """
    count = series.present.sum(dim=1)
    times = series.times.contiguous()
    end = times.gather(1, (count - 1)[:, None])
    kept = torch.searchsorted(times, end - horizon, right=True)[:, 0]
    kept = kept.minimum(((1 - share) * count).long()).clamp_min(1)
    now = times.gather(1, (kept - 1)[:, None])
    begin = torch.searchsorted(times, now - context)[:, 0]
    rows = count - begin
    which = torch.arange(len(count), device=count.device)
    piece = _piece(series, which, stretch(begin, rows), rows, kept - begin)
    return first(series, kept), [piece]


def evaluate(
    model: LatentODE, piece: Piece, noise: Tensor, how: Integration
) -> tuple[float, int]:
    """Return the sum of log-densities of what follows contexts, and of how many."""
    mixture, asked = beyond(model, piece, noise, how)
    density = mixture.log_density(piece.batch.values) * asked
    return float(density.sum()), int(asked.sum())


def calibrate(
    model: LatentODE, pieces: list[Piece], noise: Tensor, how: Integration, least: float
) -> None:
    """Widen forecasts to what held-out pieces find likeliest; `least`: at least so.

    A path that is learned from some series is too sure of itself in others.
    """
    model.width = torch.ones_like(model.width)
    found = [(piece, *beyond(model, piece, noise, how)) for piece in pieces]
    best = -math.inf
    for step in range(-_NARROWER, _WIDER + 1):
        width = _WIDTH_STEP**step
        if width < least:
            continue
        density = sum(
            float((mixture.widened(width).log_density(p.batch.values) * asked).sum())
            for p, mixture, asked in found
        )
        if density > best:
            best, model.width = density, torch.full_like(model.width, width)


def beyond(
    model: LatentODE, piece: Piece, noise: Tensor, how: Integration
) -> tuple[Mixture, Tensor]:
    """Return forecasts of a piece from its context, and what follows it (B, T, C)."""
    context = first(piece.batch, piece.context)
    n_series, n_rows = piece.batch.times.shape
    at_once = max(1, _AT_ONCE // (2 * n_rows * len(noise)))
    parts = [slice(k, k + at_once) for k in range(0, n_series, at_once)]
    found = [
        model.forecast(context.take(some), piece.batch.take(some), noise, how)
        for some in parts
    ]
    means = torch.cat([part.means for part in found])
    stds = torch.cat([part.stds for part in found])
    return Mixture(means, stds), piece.asked
