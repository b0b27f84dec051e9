"""What a latent ODE is trained on: bounds, event times, and pieces of series."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch.distributions import Normal

from skode._nn import latent_training as room
from skode._nn.baseline import Baseline
from skode._nn.integration import Integration
from skode._nn.latent_training import (
    BOUNDS,
    Cutter,
    LatentObjective,
    Piece,
    Plan,
    ahead,
    beyond,
    calibrate,
    evaluate,
    halves,
    thinned,
)
from skode._series.batch import Batch
from tests.nn.test_latent import latent_ode, ragged_batch, rows_of
from tests.problems import normal

EXACTLY = Integration("dopri5", 1e-9, 1e-9, None, 1000, "checkpoint", False)
GRID = Integration("rk4", 1e-3, 1e-3, 0.25, 1000, "checkpoint", False)


def seed(number=0):
    return torch.Generator().manual_seed(number)


def piece_of(lengths=(7, 3, 1, 5), context=(3, 3, 1, 1), **kinds):
    batch = ragged_batch(lengths, **kinds)
    nothing = torch.zeros_like(batch.present, dtype=torch.long)
    return Piece(batch, torch.tensor(lengths), torch.tensor(context), nothing)


def objective(model, bound="elbo", samples=2, consistency=0.0, how=GRID):
    plan = Plan(bound, samples, consistency, steps=10, pieces=4)
    return LatentObjective(
        model, Cutter(ragged_batch(), math.inf, 99, seed()), how, plan
    )


def loss_at(model, piece, generator=None, **params):
    """Return the loss with draws that are the same at every call."""
    made = objective(model, **params)
    made._cutter.generator.manual_seed(3 if generator is None else generator)
    return made.loss(piece)


# --------------------------------------------------------------------- gradients


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("encoder", ["gru", "ode_rnn"])
@pytest.mark.parametrize(
    ("parts", "baseline"),
    [
        ({}, Baseline("linear", (0.6,))),
        ({"events": False, "persistent": False}, Baseline()),
        ({"varying_noise": False, "n_covariates": 0}, Baseline()),
    ],
    ids=["all", "plain", "constant"],
)
def test_gradients_are_finite_differences(parts, baseline, encoder, bound):
    model = latent_ode(baseline, encoder=encoder, **parts)
    piece = piece_of(covariates=model.shape.n_covariates)
    how = {"bound": bound, "consistency": 0.4}
    loss_at(model, piece, **how).backward()
    for i, (name, param) in enumerate(model.named_parameters()):
        if not param.requires_grad:
            continue
        way = normal(*param.shape, seed=500 + i)
        values = []
        for step in (1e-5, -1e-5):
            param.data += step * way
            with torch.no_grad():
                values.append(loss_at(model, piece, **how).item())
            param.data -= step * way
        slope = (param.grad * way).sum().item()
        wanted = (values[0] - values[1]) / 2e-5
        assert slope == pytest.approx(wanted, rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("gradient", ["checkpoint", "backprop"])
def test_adaptive_steps_have_the_same_gradients(gradient):
    how = replace(EXACTLY, gradient=gradient)
    pairs = []
    for way in (how, replace(GRID, step_size=0.01)):
        model = latent_ode()
        loss_at(model, piece_of(), how=way).backward()
        pairs.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------ bounds


def parts_of(model, piece, samples, generator=3, forecast=False):
    """Return posterior, z0 and log p(x | z0) of the draws that `loss_at` makes.

    With `forecast`, of each row given the context alone.
    """
    batch = piece.batch
    known_by = batch.mask
    if forecast:
        step = torch.arange(batch.mask.shape[1])
        known_by = known_by & (step < piece.context[:, None])[:, :, None]
    posterior = model.posterior(batch, piece.context, GRID)
    noise = torch.randn(
        len(batch.times), samples, 3, generator=seed(generator), dtype=torch.float64
    )
    z0 = posterior.draw(noise)
    states = model.states(z0, batch.times, GRID)
    nothing = torch.zeros_like(batch.values)[:, None]
    emission = model.emit(states, batch.covariates)
    density = model.log_density(batch, nothing, emission, known_by)
    return posterior, z0, density.sum(dim=3)


def observed(piece):
    return piece.batch.mask.sum().item()


def log_ratio(posterior, z0):
    """Return log p(z0) - log q(z0), (B, K)."""
    q = Normal(posterior.mean[:, None], posterior.log_std.exp()[:, None])
    return (Normal(0.0, 1.0).log_prob(z0) - q.log_prob(z0)).sum(dim=2)


def test_the_elbo_is_that_of_the_paper():
    model, piece = latent_ode(events=False), piece_of()
    posterior, _, by_row = parts_of(model, piece, samples=5)
    wanted = by_row.sum(dim=2).mean(dim=1) - posterior.divergence()
    ours = loss_at(model, piece, samples=5)
    torch.testing.assert_close(ours, -wanted.sum() / observed(piece))


@pytest.mark.parametrize("samples", [1, 7])
def test_the_importance_weighted_bound_is_that_of_the_paper(samples):
    model, piece = latent_ode(events=False), piece_of()
    posterior, z0, by_row = parts_of(model, piece, samples)
    weight = by_row.sum(dim=2) + log_ratio(posterior, z0)
    wanted = (torch.logsumexp(weight, dim=1) - math.log(samples)).sum()
    ours = loss_at(model, piece, bound="iwae", samples=samples)
    torch.testing.assert_close(ours, -wanted / observed(piece))


def test_bounds_are_ordered():
    # One weighted draw is the ELBO with its divergence drawn; more come closer to the
    # log-density from below.
    model, piece = latent_ode(events=False, scale=0.3), piece_of((4, 3), (2, 3))

    def bound(name, samples, repeats):
        with torch.no_grad():
            found = [
                loss_at(model, piece, generator=i, bound=name, samples=samples).item()
                for i in range(repeats)
            ]
        return -np.mean(found), np.std(found) / np.sqrt(repeats)

    elbo, off = bound("elbo", 100, 30)
    one, off_one = bound("iwae", 1, 600)
    assert abs(one - elbo) < 4 * np.hypot(off, off_one)
    some, _ = bound("iwae", 10, 60)
    many, _ = bound("iwae", 1000, 5)
    assert elbo + 0.005 < some < many


def test_the_weighted_bound_comes_to_the_log_density():
    # With emissions linear in z0 and nothing moving, the density is a known normal.
    model = latent_ode(
        events=False, decoder=(), varying_noise=False, persistent=False, n_covariates=0
    )
    for param in model.field.parameters():
        param.data.zero_()
    piece = piece_of((4,), (2,), covariates=0)
    there = piece.batch.mask[0].flatten()
    loading = model.decoder[-1].weight.detach().repeat(4, 1)[there]
    noise = (2 * model.log_noise.detach()).exp().repeat(4)[there]
    exact = torch.distributions.MultivariateNormal(
        model.decoder[-1].bias.detach().repeat(4)[there],
        loading @ loading.T + torch.diag(noise),
    ).log_prob(piece.batch.values[0].flatten()[there])
    with torch.no_grad():
        ours = loss_at(model, piece, bound="iwae", samples=100_000)
        lower = loss_at(model, piece, bound="elbo", samples=100_000)
    assert -ours.item() * observed(piece) == pytest.approx(exact.item(), abs=0.05)
    assert -lower.item() * observed(piece) < exact.item() - 0.05


def test_beyond_the_context_rows_are_scored_as_mixtures():
    model, piece = latent_ode(events=False), piece_of()
    posterior, _, by_row = parts_of(model, piece, samples=5, forecast=True)
    wanted = -posterior.divergence().sum()
    for row, (count, known) in enumerate(
        zip(piece.rows.tolist(), piece.context.tolist(), strict=True)
    ):
        wanted += by_row[row, :, :known].sum(dim=1).mean()
        mixed = torch.logsumexp(by_row[row, :, known:count], dim=0) - math.log(5)
        wanted += mixed.sum()
    ours = loss_at(model, piece, bound="predictive", samples=5)
    torch.testing.assert_close(ours, -wanted / observed(piece))


@pytest.mark.parametrize("bound", BOUNDS)
def test_padding_costs_nothing(bound):
    model, piece = latent_ode(), piece_of()
    longer = replace(
        piece.batch,
        **{
            name: torch.cat((part, part[:, -1:] * keep), dim=1)
            for name, keep in (
                ("times", 1),
                ("values", 0),
                ("mask", False),
                ("present", False),
                ("covariates", 1),
            )
            for part in [getattr(piece.batch, name)]
        },
    )
    left_out = torch.nn.functional.pad(piece.left_out, (0, 1))
    torch.testing.assert_close(
        loss_at(model, replace(piece, batch=longer, left_out=left_out), bound=bound),
        loss_at(model, piece, bound=bound),
    )


def test_consistency_costs_what_later_observations_find_unlikely():
    model, piece = latent_ode(), piece_of()
    plain, dear = (loss_at(model, piece, consistency=c) for c in (0.0, 1.0))
    assert not torch.isclose(plain, dear)
    # A posterior that is sure of another state everywhere finds any path unlikely.
    last = model.recognition.head[-1]
    last.weight.data.zero_()
    last.bias.data[:] = torch.tensor([9.0, 9, 9, -3, -3, -3])
    still = latent_ode()
    still.load_state_dict(model.state_dict())
    for param in still.field.parameters():
        param.data.zero_()
    moved, kept = (
        loss_at(m, piece, consistency=1.0) - loss_at(m, piece) for m in (model, still)
    )
    assert moved > kept + 1


# ------------------------------------------------------------------- event times


def test_the_likelihood_of_times_is_that_of_a_poisson_process():
    model = latent_ode(latent=1)
    model.log_intensity.weight.data.fill_(0.8)
    model.log_intensity.bias.data.fill_(0.5)
    batch = ragged_batch((9, 4), seed=5)
    batch = replace(batch, times=0.5 * batch.times)

    def path(t, phase):
        return torch.sin(2 * t + phase)

    nodes = room._with_nodes(batch.times)
    phases = torch.tensor([0.0, 1.0]).double()
    states = path(nodes[:, None], phases[None, :, None])[..., None]
    found = room._log_likelihood_of_times(
        model, states, batch, torch.zeros_like(batch.present, dtype=torch.long)
    )
    assert found.shape == (2, 2, 9) and not found[:, :, 0].any()
    for row, count in enumerate((9, 4)):
        assert not found[row, :, count:].any()
        times = batch.times[row].tolist()
        for sample, phase in enumerate(phases.tolist()):

            def rate(t, phase=phase):
                return np.exp(0.5 + 0.8 * np.sin(2 * t + phase))

            for i in range(1, count):
                expected = quad(rate, times[i - 1], times[i])[0]
                wanted = np.log(rate(times[i])) - expected
                assert found[row, sample, i].item() == pytest.approx(wanted, abs=1e-6)


def test_nodes_keep_the_rows_in_their_places():
    times = ragged_batch().times
    nodes = room._with_nodes(times)
    assert torch.equal(nodes[:, ::4], times)
    assert (torch.diff(nodes, dim=1) >= -1e-12).all()


# ------------------------------------------------------------------------ pieces


def panel():
    """Return three series, of 40, 9 and 1 rows, whose values say which row it is."""
    batch = ragged_batch((40, 9, 1), channels=1, covariates=1)
    number = torch.arange(40).double().expand(3, -1)[:, :, None]
    series = torch.arange(3).double()[:, None, None].expand(-1, 40, 1)
    return Batch(batch.times, number, batch.present[..., None], batch.present, series)


@pytest.mark.parametrize("window", [math.inf, 3.0, 0.01])
@pytest.mark.parametrize("reach", [0.15, 0.6, 1.0])
@pytest.mark.parametrize("most_rows", [99, 12])
def test_pieces_are_rows_of_their_series(window, reach, most_rows):
    series = panel()
    cutter = Cutter(series, window, most_rows, seed())
    which = torch.tensor([2, 0, 1, 0])
    for _ in range(20):
        piece = cutter.cut(which, reach)
        batch = piece.batch
        assert (piece.context >= 1).all() and (piece.context <= piece.rows).all()
        assert (piece.rows <= most_rows).all()
        assert torch.equal(batch.present.sum(dim=1), piece.rows)
        assert not batch.mask[~batch.present].any()
        for row, count in enumerate(piece.rows.tolist()):
            places = batch.values[row, :count, 0].long()
            assert (torch.diff(places) > 0).all()
            assert (batch.covariates[row, :count, 0] == which[row]).all()
            times = series.times[which[row]][places]
            torch.testing.assert_close(batch.times[row, :count], times - times[0])
            assert times[-1] - times[0] <= window or count <= 2


def test_pieces_grow_and_cover_the_series():
    cutter = Cutter(panel(), math.inf, 99, seed())
    lengths, contexts, firsts = [], [], []
    for _ in range(200):
        piece = cutter.cut(torch.tensor([0]), 1.0)
        lengths.append(piece.rows.item())
        contexts.append(piece.context.item())
        firsts.append(piece.batch.values[0, 0, 0].item())
    assert max(lengths) == 40 and min(contexts) < 12 and max(contexts) > 30
    assert 0.4 < np.mean(np.array(firsts) == 0) < 0.8 and max(firsts) > 15
    short = [cutter.cut(torch.tensor([0]), 0.15).rows.item() for _ in range(20)]
    assert max(short) <= 6


@pytest.mark.parametrize(("count", "most"), [(3, 10), (10, 10), (1000, 10)])
def test_thinning_keeps_what_is_near(count, most):
    found = thinned(count, most, seed())
    assert len(found) == min(count, most) and (torch.diff(found) > 0).all()
    assert found[: most // 2].tolist() == list(range(min(count, most // 2)))
    assert found[-1] < count


def test_halves_are_cut_at_thirds():
    first, second = halves(panel(), math.inf)
    assert first.rows.tolist() == second.rows.tolist() == [40, 9, 1]
    assert first.context.tolist() == [13, 3, 1]
    assert second.context.tolist() == [26, 6, 1]
    assert torch.equal(first.batch.values[0, :, 0], torch.arange(40).double())
    short, _ = halves(panel(), 1.0)
    for row, count in enumerate(short.rows.tolist()):
        assert short.batch.times[row, count - 1] <= 1.0


def test_ends_are_held_out():
    series = panel()
    training, (piece,) = ahead(series, horizon=2.0, share=0.1, context=3.0)
    kept = training.present.sum(dim=1)
    ends = series.times[:, -1]
    for row, count in enumerate(kept.tolist()):
        assert count >= 1
        if count > 1:
            assert series.times[row, count - 1] <= ends[row] - 2.0
        known, rows = piece.context[row].item(), piece.rows[row].item()
        places = piece.batch.values[row, :rows, 0].long().tolist()
        # The context are the last training rows; what follows is not trained on.
        assert places[known - 1] == count - 1
        assert places[-1] == series.present[row].sum() - 1
        begin = series.times[row, places[0]]
        assert begin >= series.times[row, count - 1] - 3.0
    assert not training.mask[~training.present].any()


def test_held_out_pieces_are_scored_as_forecasts():
    model, piece, noise = latent_ode(), piece_of(), normal(6, 3, seed=9)
    with torch.no_grad():
        total, count = evaluate(model, piece, noise, EXACTLY)
    wanted, seen = 0.0, 0
    for row, (rows, known) in enumerate(
        zip(piece.rows.tolist(), piece.context.tolist(), strict=True)
    ):
        if rows == known:
            continue
        context = rows_of(piece.batch, slice(row, row + 1), slice(known))
        later = rows_of(piece.batch, slice(row, row + 1), slice(known, rows))
        found = model.forecast(context, later, noise, EXACTLY)
        wanted += (found.log_density(later.values) * later.mask).sum().item()
        seen += later.mask.sum().item()
    assert count == seen > 0
    assert total == pytest.approx(wanted)


@pytest.mark.parametrize(("least", "expected"), [(0.0, 0.6), (1.0, 1.0)])
def test_forecasts_are_as_wide_as_held_out_pieces_say(least, expected):
    # Values from a distribution 0.6 times as wide as the model's own forecasts.
    model = latent_ode(persistent=False)
    piece = piece_of((40,) * 30, (2,) * 30)
    noise = normal(1, model.noise_width, seed=5)  # a single normal
    with torch.no_grad():
        mixture, _ = beyond(model, piece, noise, EXACTLY)
        mean, std = mixture.mean(), mixture.std()
        values = mean + 0.6 * std * normal(*mean.shape, seed=6)
        known = torch.arange(40)[:, None] < 2
        values = torch.where(known, piece.batch.values, values) * piece.batch.mask
        made = replace(piece, batch=replace(piece.batch, values=values))
        model.width.fill_(3.0)  # what was there before does not count
        calibrate(model, [made], noise, EXACTLY, least)
    assert model.width.item() == pytest.approx(expected, rel=0.12)


# ------------------------------------------------------------------- the training


def test_pieces_grow_over_the_training():
    made = objective(latent_ode(), samples=1)
    reaches, cut = [], made._cutter.cut

    class Spy:
        series, generator = made._cutter.series, made._cutter.generator

        def cut(self, which, reach):
            reaches.append(reach)
            return cut(which, reach)

    made._cutter = Spy()
    for _ in range(10):
        assert torch.isfinite(made(torch.arange(4)))
    assert reaches == sorted(reaches) and reaches[0] < 0.2 and reaches[-1] == 1.0


@pytest.mark.parametrize("pieces", [2, 9])
def test_every_series_has_its_turn(pieces):
    plan = Plan("elbo", 1, 0.0, steps=10, pieces=pieces)
    cutter = Cutter(ragged_batch(), math.inf, 99, seed())
    made = LatentObjective(latent_ode(), cutter, GRID, plan)
    found = torch.cat([made._series(torch.arange(pieces)) for _ in range(20)])
    assert set(found.tolist()) == {0, 1, 2, 3}


# ----------------------------------------------------------------- long records


def long_record(n_rows=500, begin=0.0, dtype=torch.float64):
    """Return a record with a row each 0.01, in float64 times."""
    times = begin + 0.01 * torch.arange(n_rows).double()[None]
    values = torch.zeros(1, n_rows, 1, dtype=dtype)
    present = torch.ones(1, n_rows, dtype=torch.bool)
    return Batch(times, values, present[..., None], present, values[..., :0])


def test_rows_that_a_piece_leaves_out_have_happened():
    model = latent_ode(latent=1)
    model.log_intensity.weight.data.zero_()
    model.log_intensity.bias.data.fill_(math.log(80.0))
    cutter = Cutter(long_record(), math.inf, 50, seed())
    for _ in range(5):
        piece = cutter.cut(torch.tensor([0]), 1.0)
        times = piece.batch.times
        assert times.shape[1] < 52
        gaps = torch.diff(times)
        wanted = 0.01 * (piece.left_out[:, 1:] + 1).double()
        torch.testing.assert_close(wanted, gaps)
        states = torch.zeros(1, 1, 4 * times.shape[1] - 3, 1).double()
        found = room._log_likelihood_of_times(
            model, states, piece.batch, piece.left_out
        )
        span = times[0, -1].item()
        wanted = span / 0.01 * math.log(80.0) - 80.0 * span
        assert found.sum().item() == pytest.approx(wanted, rel=1e-9)


def test_pieces_far_into_a_record_keep_their_gaps():
    series = long_record(begin=1e6, dtype=torch.float32)
    piece = Cutter(series, 0.5, 99, seed()).cut(torch.tensor([0]), 1.0)
    assert piece.batch.times.dtype == torch.float32
    gaps = torch.diff(piece.batch.times)
    torch.testing.assert_close(gaps, torch.full_like(gaps, 0.01), rtol=1e-4, atol=0)
    training, (piece,) = ahead(series, horizon=0.5, share=0.05, context=0.7)
    assert training.times.dtype == torch.float64
    assert piece.batch.times.shape == (1, int(piece.rows))
    gaps = torch.diff(piece.batch.times)
    torch.testing.assert_close(gaps, torch.full_like(gaps, 0.01), rtol=1e-4, atol=0)


def test_many_watched_series_are_not_in_memory_together(monkeypatch):
    model, piece = latent_ode(), piece_of()
    noise = normal(3, model.noise_width, seed=0)
    model.requires_grad_(False)
    whole, count = evaluate(model, piece, noise, EXACTLY)
    sizes = []

    def forecast(context, queries, noise, how):
        sizes.append(len(queries.times))
        return type(model).forecast(model, context, queries, noise, how)

    monkeypatch.setattr(model, "forecast", forecast)
    monkeypatch.setattr(room, "_AT_ONCE", 2 * 3 * 2 * 7)
    parts, again = evaluate(model, piece, noise, EXACTLY)
    assert sizes == [2, 2] and again == count > 0
    assert parts == pytest.approx(whole, rel=1e-9)
