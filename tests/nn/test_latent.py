"""The latent ODE: its parts together, on series of any kind."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from skode._nn.baseline import Baseline
from skode._nn.integration import Integration
from skode._nn.latent import (
    MOST_READ,
    LatentODE,
    Shape,
    chosen,
    first,
    interleaved,
    readable,
)
from skode._series.batch import Batch
from tests.problems import normal, scipy_reference

EXACTLY = Integration("dopri5", 1e-9, 1e-9, None, 1000, "checkpoint", False)
PARTS = ("times", "values", "mask", "present", "covariates")
SMALL = Shape(2, 1, 3, (5,), "tanh", "gru", 6, (4,), True, True, True)


def latent_ode(baseline=None, scale=0.5, **shape):
    """Return a small model in float64 that has something to say."""
    model = LatentODE(replace(SMALL, **shape), baseline or Baseline()).double()
    for i, (name, param) in enumerate(model.named_parameters()):
        if param.requires_grad:
            param.data = scale * normal(*param.shape, seed=200 + i)
        if name == "log_noise":
            param.data -= 1
    return model


def ragged_batch(lengths=(7, 3, 1, 5), channels=2, covariates=1, seed=0):
    """Return series of different lengths as `pad` makes them."""
    rows, longest = len(lengths), max(1, *lengths)
    count = torch.tensor(lengths)[:, None]
    present = torch.arange(longest) < count
    gaps = 0.3 * normal(rows, longest, seed=seed).abs() * present
    gaps[:, 0] = 0
    mask = (normal(rows, longest, channels, seed=seed + 1) > -0.5) & present[..., None]
    return Batch(
        gaps.cumsum(dim=1),
        normal(rows, longest, channels, seed=seed + 2) * mask,
        mask,
        present,
        normal(rows, longest, covariates, seed=seed + 3),
    )


def asking(times, covariates=1, channels=2, seed=10):
    """Return queries at times (B, Q)."""
    rows, count = times.shape
    nothing = torch.zeros(rows, count, channels).double()
    return Batch(
        times,
        nothing,
        nothing.bool(),
        torch.ones(rows, count).bool(),
        normal(rows, count, covariates, seed=seed),
    )


def some_queries(rows=4):
    times = torch.tensor([-0.7, -0.1, 0.0, 0.2, 0.6, 0.6, 3.0]).double()
    return asking(times.expand(rows, -1))


def rows_of(batch, rows, columns=slice(None)):
    return Batch(*(getattr(batch, name)[rows][:, columns] for name in PARTS))


# ------------------------------------------------------------------- the path


def test_states_are_the_solution_at_each_rows_own_times():
    model = latent_ode()
    times = torch.tensor([[-1.5, -0.2, 0.0, 0.0, 0.4, 2.0], [0.0, 0.1, 0.1, 0.5, 3, 3]])
    times, z0 = times.double(), normal(2, 4, 3, seed=1)
    states = model.states(z0, times, EXACTLY)
    for row in range(2):
        for sample in range(4):
            start = z0[row, sample][None]
            for t, state in zip(times[row], states[row, sample], strict=True):
                span = torch.stack((torch.zeros_like(t), t))[None]
                wanted = scipy_reference(model.field, start, span)[0, -1]
                torch.testing.assert_close(state, wanted, rtol=1e-6, atol=1e-7)


def test_no_moment_is_special():
    field = LatentODE(SMALL, Baseline()).field
    y = normal(3, 3, seed=2, dtype=torch.float32)
    assert torch.equal(field(torch.zeros(3), y), field(torch.full((3,), 1e6), y))


@pytest.mark.parametrize("varying", [False, True])
def test_covariates_reach_the_decoder_and_nothing_before(varying):
    model, states = latent_ode(varying_noise=varying), normal(2, 3, 4, 3, seed=3)
    one, other = normal(2, 4, 1, seed=4), normal(2, 4, 1, seed=5)
    found = [model.emit(states, c) for c in (one, other)]
    assert not torch.isclose(found[0].mean, found[1].mean).any()
    assert (found[0].log_scale == found[1].log_scale).all() != varying


# ----------------------------------------------------------------- forecasting


@pytest.mark.parametrize("baseline", [Baseline(), Baseline("linear", (0.5,))])
@pytest.mark.parametrize("encoder", ["gru", "ode_rnn"])
def test_a_series_alone_is_forecast_as_among_others(baseline, encoder):
    model, context = latent_ode(baseline, encoder=encoder), ragged_batch((7, 3, 0, 5))
    queries, noise = some_queries(), normal(5, model.noise_width, seed=6)
    among = model.forecast(context, queries, noise, EXACTLY)
    rates = model.intensity(context, queries, noise, EXACTLY)
    for row, count in enumerate((7, 3, 0, 5)):
        alone = rows_of(context, slice(row, row + 1), slice(max(1, count)))
        one = rows_of(queries, slice(row, row + 1))
        found = model.forecast(alone, one, noise, EXACTLY)
        torch.testing.assert_close(found.means[0], among.means[row])
        torch.testing.assert_close(found.stds[0], among.stds[row])
        rate = model.intensity(alone, one, noise, EXACTLY)
        torch.testing.assert_close(rate[0], rates[row])


def test_more_queries_change_no_other_answer():
    model, context, queries = latent_ode(), ragged_batch(), some_queries()
    noise = normal(5, model.noise_width, seed=6)
    every = model.forecast(context, queries, noise, EXACTLY)
    some = model.forecast(
        context, rows_of(queries, slice(None), [1, 4, 6]), noise, EXACTLY
    )
    torch.testing.assert_close(some.means, every.means[:, :, [1, 4, 6]])
    torch.testing.assert_close(some.stds, every.stds[:, :, [1, 4, 6]])


def permuted(model, order):
    """Return the model with its channels in another order."""
    twin = latent_ode(model.baseline)
    twin.load_state_dict(model.state_dict())
    inputs = torch.arange(2 * 2 + 1 + 3)
    inputs[:2], inputs[2:4] = order, 2 + order
    weight = twin.recognition.reader.gru.weight_ih_l0
    weight.data = weight.data[:, inputs]
    outputs = torch.cat((order, 2 + order))
    last = twin.decoder[-1]
    last.weight.data, last.bias.data = last.weight[outputs], last.bias[outputs]
    for param in (twin.log_noise, twin.residual.share, twin.residual.log_time):
        param.data = param.data[order]
    return twin


@pytest.mark.parametrize("baseline", [Baseline(), Baseline("linear", (0.5,))])
def test_channels_in_another_order_are_forecast_in_that_order(baseline):
    model, context, queries = latent_ode(baseline), ragged_batch(), some_queries()
    order, noise = torch.tensor([1, 0]), normal(5, model.noise_width, seed=6)
    turned = replace(
        context, values=context.values[..., order], mask=context.mask[..., order]
    )
    plain = model.forecast(context, queries, noise, EXACTLY)
    z, base = noise.split((3, noise.shape[1] - 3), dim=1)
    noise = torch.cat((z, base.unflatten(1, (2, -1))[:, order].flatten(1)), dim=1)
    other = permuted(model, order).forecast(turned, queries, noise, EXACTLY)
    torch.testing.assert_close(other.means, plain.means[..., order])
    torch.testing.assert_close(other.stds, plain.stds[..., order])


def test_what_is_forecast_is_conditioned_on_the_residuals_seen():
    # Without motion or doubt, forecasts are the residual process around a constant.
    model = sure(latent_ode(n_covariates=0, varying_noise=False))
    context = ragged_batch((7,), covariates=0)
    times = context.times[:, 2:5]
    found = model.forecast(
        context, asking(times, covariates=0), torch.zeros(1, 3).double(), EXACTLY
    )
    emission = constant_emission(model)
    for channel in range(2):
        mean, cov = conditional(model, context, times[0], channel)
        centre, scale = emission.mean[channel], emission.log_scale[channel].exp()
        torch.testing.assert_close(
            found.means[0, 0, :, channel], centre + scale * torch.tensor(mean)
        )
        spread = scale * torch.tensor(np.diag(cov)).sqrt()
        torch.testing.assert_close(found.stds[0, 0, :, channel], spread)


def sure(model):
    """Return the model without motion, and without doubt of where it stands."""
    for param in model.field.parameters():
        param.data.zero_()
    last = model.recognition.head[-1]
    last.weight.data.zero_()
    last.bias.data[3:] = -50.0
    return model


def constant_emission(model):
    """Return what a model that is sure decodes: mean and log-scale, (C,)."""
    z0 = model.recognition.head[-1].bias[:3].expand(1, 1, 1, 3)
    emission = model.emit(z0, torch.zeros(1, 1, 0).double())
    return replace(
        emission, mean=emission.mean[0, 0, 0], log_scale=emission.log_scale[0, 0, 0]
    )


def conditional(model, context, times, channel):
    """Return mean and covariance of residuals at times, by dense algebra."""
    seen = context.mask[0, :, channel].numpy()
    emission = constant_emission(model)
    scale = emission.log_scale[channel].exp()
    error = ((context.values[0, :, channel] - emission.mean[channel]) / scale).detach()
    stamps = np.concatenate([context.times[0].numpy()[seen], times.numpy()])
    share = model.residual.persisting()[channel].item()
    tau = model.residual.log_time[channel].exp().item()
    cov = share * np.exp(-np.abs(stamps[:, None] - stamps) / tau)
    cov += (1 - share) * np.eye(len(stamps))
    n = seen.sum()
    gain = cov[n:, :n] @ np.linalg.inv(cov[:n, :n])
    return gain @ error.numpy()[seen], cov[n:, n:] - gain @ cov[:n, n:]


def test_paths_are_drawn_jointly_from_what_is_conditional_on_the_context():
    model = sure(latent_ode(n_covariates=0, varying_noise=False))
    context = ragged_batch((7,), covariates=0)
    times = context.times[:, 2:5] + 0.02
    drawn = model.paths(
        context,
        asking(times, covariates=0),
        40_000,
        torch.Generator().manual_seed(0),
        normal(4, model.noise_width, seed=1),
        EXACTLY,
    )
    emission = constant_emission(model)
    for channel in range(2):
        mean, cov = conditional(model, context, times[0], channel)
        centre, scale = emission.mean[channel], emission.log_scale[channel].exp()
        paths = ((drawn[0, :, :, channel] - centre) / scale).detach().numpy()
        np.testing.assert_allclose(paths.mean(axis=0), mean, atol=0.025)
        np.testing.assert_allclose(np.cov(paths.T), cov, atol=0.03)


def test_paths_have_the_moments_of_the_forecast():
    model, context, queries = latent_ode(), ragged_batch(), some_queries()
    generator = torch.Generator().manual_seed(0)
    how = replace(EXACTLY, rtol=1e-4, atol=1e-4)
    model.width.fill_(1.7)
    noise = normal(8000, model.noise_width, seed=7)
    paths = model.paths(context, queries, 8000, generator, noise, how)
    forecast = model.forecast(context, queries, noise, how)
    mean, std = forecast.mean(), forecast.std()
    assert (((paths.mean(dim=1) - mean) / std).abs() < 0.07).all()
    assert ((paths.std(dim=1) / std - 1).abs() < 0.07).all()


def test_the_baseline_is_taken_off_and_put_back():
    model = sure(latent_ode(Baseline("linear"), n_covariates=0, persistent=False))
    for param in model.decoder.parameters():
        param.data.zero_()
    times = torch.linspace(0, 1, 30).double()[None]
    line = torch.stack((5 + 2 * times, -times), dim=2)
    there = torch.ones(1, 30, 2).bool()
    context = Batch(times, line, there, there[..., 0], line[..., :0])
    later = torch.tensor([[-1.0, 0.5, 2.0]]).double()
    found = model.forecast(
        context,
        asking(later, covariates=0),
        normal(2, model.noise_width, seed=1),
        EXACTLY,
    )
    wanted = torch.stack((5 + 2 * later, -later), dim=2)
    torch.testing.assert_close(found.mean(), wanted, rtol=0.02, atol=0.02)


# ------------------------------------------------------------- rows of a batch


def test_interleaving_keeps_the_order_of_time_and_says_where_queries_went():
    context, queries = ragged_batch((4, 2, 0)), some_queries(3)
    batch, place = interleaved(context, queries)
    assert (torch.diff(batch.times, dim=1) >= 0).all()
    torch.testing.assert_close(batch.times.gather(1, place), queries.times)
    assert torch.equal(batch.mask.sum(dim=(1, 2)), context.mask.sum(dim=(1, 2)))
    at_queries = batch.mask.any(dim=2).gather(1, place)
    assert not at_queries.any()
    wide = place[:, :, None]
    torch.testing.assert_close(batch.covariates.gather(1, wide), queries.covariates)


def test_long_contexts_are_read_at_their_ends_and_evenly_between():
    long = ragged_batch((5 * MOST_READ, 3, 0, MOST_READ))
    length = long.present.sum(dim=1)
    batch, kept = readable(long, length)
    assert kept.tolist() == [MOST_READ, 3, 0, MOST_READ]
    assert batch.times.shape[1] == MOST_READ
    assert batch.times[0, 0] == long.times[0, 0]
    near = MOST_READ // 2
    assert torch.equal(batch.times[0, -near:], long.times[0, -near:])
    assert (torch.diff(batch.times[0]) >= 0).all()
    assert len(batch.times[0].unique()) == MOST_READ
    for row, count in ((1, 3), (3, MOST_READ)):
        for name in PARTS:
            ours = getattr(batch, name)[row, :count]
            assert torch.equal(ours, getattr(long, name)[row, :count])


def test_the_first_rows_alone_are_observed():
    batch = first(ragged_batch(), torch.tensor([2, 5, 0, 3]))
    assert batch.present.sum(dim=1).tolist() == [2, 3, 0, 3]
    assert not batch.mask[~batch.present].any()


def test_rows_are_chosen_of_every_part():
    batch = ragged_batch()
    rows = torch.tensor([[0, 2], [1, 1], [0, 0], [4, 3]])
    found = chosen(batch, rows)
    for name in PARTS:
        whole, part = getattr(batch, name), getattr(found, name)
        for series in range(4):
            assert torch.equal(part[series], whole[series][rows[series]])


def test_densities_given_the_path_are_those_of_normals():
    model, batch = latent_ode(persistent=False), ragged_batch()
    states = normal(4, 3, 7, 3, seed=8)
    emission = model.emit(states, batch.covariates)
    theirs = torch.distributions.Normal(emission.mean, emission.log_scale.exp())
    wanted = theirs.log_prob(batch.values[:, None]) * batch.mask[:, None]
    nothing = torch.zeros(4, 1, 7, 2).double()
    torch.testing.assert_close(
        model.log_density(batch, nothing, emission, batch.mask), wanted
    )
    persistent = latent_ode()
    white = persistent.log_density(batch, nothing, emission, batch.mask, white=True)
    torch.testing.assert_close(white, wanted)
    ours = persistent.log_density(batch, nothing, emission, batch.mask)
    assert not F.mse_loss(ours, wanted) < 1e-3 and torch.isfinite(ours).all()


def test_paths_that_are_not_stretched_need_no_forecast(monkeypatch):
    model, context = latent_ode(), ragged_batch()
    noise = normal(3, model.noise_width, seed=0)
    asked = []

    def forecast(*args):
        asked.append(args)
        return type(model).forecast(model, *args)

    monkeypatch.setattr(model, "forecast", forecast)

    def paths(width):
        model.width = torch.full_like(model.width, width)
        draws = torch.Generator().manual_seed(0)
        with torch.no_grad():
            return model.paths(context, context, 4, draws, noise, EXACTLY)

    plain = paths(1.0)
    assert not asked
    wide = paths(2.0)
    with torch.no_grad():
        mean = model.forecast(context, context, noise, EXACTLY).mean()[:, None]
    torch.testing.assert_close(wide - 2 * plain, -mean.expand_as(wide))
