"""What a flow is trained on: its likelihood on a coarse grid, or flow matching.

B rows, D state, C context, P probes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skode._engine.grid import Grid
from skode._nn.divergence import rademacher
from skode._nn.flow import Flow, log_normal
from skode._nn.flow_field import Dynamics

_FIRST_STEPS, _MOST_STEPS = 3, 32
_GROWTH = 1.2
_WATCH_EVERY, _WATCHED_ROWS = 20, 256
_EASY = 1 / 6
"""Steps are taken back where the error is below that share of the tolerance."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows that count together."""

    x: Tensor
    """(B, D)."""
    context: Tensor | None
    """(B, C)."""
    weight: Tensor
    """(B,)."""

    def some(self, rows: int) -> "Batch":
        """Return so many of them, or fewer, from all over: they may be in order."""
        every = slice(None, None, max(1, -(-len(self.x) // rows)))
        context = None if self.context is None else self.context[every]
        return Batch(self.x[every], context, self.weight[every])

    def mean(self, values: Tensor) -> Tensor:
        """Return the weighted mean of values (B,)."""
        return (values * self.weight).sum() / self.weight.sum()


@dataclass(frozen=True, slots=True)
class Table:
    """A training table of n rows, from which batches are drawn.

    Parameters
    ----------
    copies : Tensor of shape (K, n, D)
        The table, drawn K times where its values stand for intervals.
    context : Tensor of shape (n, C) or None
        What does not move.
    weight : Tensor of shape (n,)
        How much each row counts.
    noise : float
        Standard deviation of what is added to each batch.
    context_noise : float
        That of what is added to its contexts.
    generator : torch.Generator
        Chooses the copy, and draws the noise.
    """

    copies: Tensor
    context: Tensor | None
    weight: Tensor
    noise: float
    context_noise: float
    generator: torch.Generator

    def __len__(self) -> int:
        """Return n."""
        return self.copies.shape[1]

    def batch(self, rows: Tensor) -> Batch:
        """Return the rows of these indices."""
        copy = int(torch.randint(len(self.copies), (1,), generator=self.generator))
        x = self._noisy(self.copies[copy].index_select(0, rows), self.noise)
        context = self.context
        if context is not None:
            context = self._noisy(context.index_select(0, rows), self.context_noise)
        return Batch(x, context, self.weight.index_select(0, rows))

    def _noisy(self, x: Tensor, std: float) -> Tensor:
        """Add noise to x (B, D), in place."""
        if std == 0:
            return x
        noise = torch.randn(x.shape, generator=self.generator, dtype=x.dtype)
        return x.add_(noise.to(x.device), alpha=std)


@dataclass(frozen=True, slots=True)
class Penalties:
    """Weights of what is added to the negative log-likelihood, per row."""

    kinetic: float
    """Of the integral of |f|^2 (Finlay et al. 2020, arXiv:2002.02798)."""
    jacobian: float
    """Of that of the squared Frobenius norm of df/dy (ibid.), by one probe."""
    error: float
    """Of the squared embedded errors of the steps."""


class Likelihood:
    """Negative log-likelihood on a coarse grid whose error is watched.

    Parameters
    ----------
    flow : Flow
        To be trained.
    penalties : Penalties
        To be added.
    probes : int
        Random tangents that estimate the trace, drawn anew for each batch; 0: exact.
    tolerance : float
        Mean absolute difference, in nats, between the grid's log-densities and those
        of one twice as fine, beyond which the grid gets finer.
    generator : torch.Generator
        Draws the probes and moves the knots.
    compile : bool
        Whether to march in compiled code where there is any.
    """

    def __init__(
        self,
        flow: Flow,
        penalties: Penalties,
        probes: int,
        tolerance: float,
        generator: torch.Generator,
        compile: bool,
    ) -> None:
        self._flow, self._penalties, self._probes = flow, penalties, probes
        self._tolerance, self._generator = tolerance, generator
        self._compile = compile
        self._kept: Grid | None = None
        self._batches = 0
        self.steps = _FIRST_STEPS

    def __call__(self, batch: Batch) -> Tensor:
        """Return the mean loss of a batch; look after the grid from time to time."""
        if self._batches % _WATCH_EVERY == 0:
            # The field that a fit finds, of an earlier stage say, may be far from easy.
            while self.watch(batch) and self._batches == 0:
                pass
        self._batches += 1
        x, context = batch.x, batch.context
        dynamics = self._dynamics(x, penalised=True)
        grid = self._grid(dynamics)
        end, error = grid.march(dynamics.start(x, context), self._moved_knots())
        z, traces, extra = dynamics.split(end)
        loss = -log_normal(z) - traces.mean(dim=1) + self._penalties.error * error
        for weight, column in zip(self._extra_weights(), extra, strict=True):
            # Gathered from t = 1 to 0, they have the other sign.
            loss = loss - weight * column
        return batch.mean(loss)

    def log_densities(
        self, x: Tensor, context: Tensor | None, steps: int | None = None
    ) -> Tensor:
        """Return log-densities on the grid, (B,), of so many even steps."""
        with torch.no_grad():
            dynamics = self._dynamics(x, penalised=False)
            grid = Grid(dynamics, (), x.shape[1], compile=self._compile)
            knots = _even(steps or self.steps)
            z, traces, _ = dynamics.split(
                grid.march(dynamics.start(x, context), knots)[0]
            )
            return log_normal(z) + traces.mean(dim=1)

    def watch(self, batch: Batch) -> bool:
        """Make the grid finer, or coarser, as its error on some rows asks for.

        Returns
        -------
        grown : bool
            Whether it is finer now.
        """
        batch = batch.some(_WATCHED_ROWS)
        state = self._generator.get_state()  # the same probes for both
        coarse = self.log_densities(batch.x, batch.context)
        self._generator.set_state(state)
        fine = self.log_densities(batch.x, batch.context, 2 * self.steps)
        error = float(batch.mean((coarse - fine).abs()))
        if not error <= self._tolerance and self.steps < _MOST_STEPS:
            self.steps = min(_MOST_STEPS, math.ceil(_GROWTH * self.steps))
            return True
        if error < _EASY * self._tolerance and self.steps > 1:
            self.steps -= 1
        return False

    def _dynamics(self, x: Tensor, *, penalised: bool) -> Dynamics:
        probes = tangent = None
        if self._probes:
            probes = rademacher(self._probes, x.shape[1], self._generator, x)
        if penalised and self._penalties.jacobian:
            tangent = rademacher(1, x.shape[1], self._generator, x)
        energy = penalised and self._penalties.kinetic > 0
        return Dynamics(self._flow.field, energy, probes, tangent)

    def _grid(self, dynamics: Dynamics) -> Grid:
        """Return the grid of these dynamics; the last one's, if nothing is random."""
        random = dynamics.probes is not None or dynamics.tangent is not None
        if self._kept is None or random:
            field = self._flow.field
            first = field.dim + field.context + dynamics.traces
            self._kept = Grid(dynamics, dynamics.params, first, compile=self._compile)
        return self._kept

    def _extra_weights(self) -> list[float]:
        weights = (self._penalties.kinetic, self._penalties.jacobian)
        return [weight for weight in weights if weight > 0]

    def _moved_knots(self) -> Sequence[float]:
        """Return knots with the inner ones moved by up to a quarter of a step."""
        knots = _even(self.steps)
        moves = torch.rand(self.steps + 1, generator=self._generator).tolist()
        for i in range(1, self.steps):
            knots[i] += 0.5 * (moves[i] - 0.5) / self.steps
        return knots


def _even(steps: int) -> list[float]:
    """Return the knots of even steps from t = 1 to t = 0."""
    return [1 - i / steps for i in range(steps)] + [0.0]


class FlowMatching:
    """Squared distance of the field from straight lines: no solve, no trace.

    The field is asked for the velocity x - z along the straight line from a point z of
    the base, drawn anew, to x, at a random time; what it learns, the mean velocity
    there, carries the base to the data (Lipman et al. 2023, arXiv:2210.02747).

    Parameters
    ----------
    flow : Flow
        To be trained.
    generator : torch.Generator
        Draws points of the base, and times.
    """

    def __init__(self, flow: Flow, generator: torch.Generator) -> None:
        self._flow, self._generator = flow, generator

    def __call__(self, batch: Batch) -> Tensor:
        """Return the mean loss of a batch."""
        x, context = batch.x, batch.context
        z = torch.randn(x.shape, generator=self._generator, dtype=x.dtype)
        t = torch.rand(len(x), generator=self._generator, dtype=x.dtype)
        z, t = z.to(x.device), t.to(x.device)
        y = torch.lerp(z, x, t[:, None])
        state = y if context is None else torch.cat([y, context], dim=1)
        off: Tensor = self._flow.field(t, state) - (x - z)
        return batch.mean(off.square().sum(dim=1))


def probes_of(probes: int, dim: int, seed: int, like: Tensor) -> Tensor:
    """Return the tangents of a seed, (P, D): those of every solve for densities."""
    return rademacher(probes, dim, torch.Generator().manual_seed(seed), like)
