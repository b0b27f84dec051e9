"""What recognition networks make of a series' own observations."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from skode._nn.integration import Integration
from skode._nn.recognition import (
    GRUReader,
    ODERNNReader,
    Posterior,
    Recognition,
    backwards,
    n_inputs,
)
from skode._series.batch import Batch
from tests.problems import Linear, linear, normal

EXACTLY = Integration("dopri5", 1e-9, 1e-9, None, 1000, "checkpoint", False)
POSTERIOR = Posterior(normal(3, 4, seed=0), 0.5 * normal(3, 4, seed=1))
READERS = [GRUReader, ODERNNReader]


def batch_of(rows, length, channels=2, covariates=1, seed=0):
    """Return series that are all there, observed here and there."""
    times = normal(rows, length, seed=seed).abs().cumsum(dim=1)
    mask = normal(rows, length, channels, seed=seed + 1) > -0.5
    return Batch(
        times - times[:, :1],
        normal(rows, length, channels, seed=seed + 2) * mask,
        mask,
        torch.ones(rows, length).bool(),
        normal(rows, length, covariates, seed=seed + 3),
    )


def recognition(reader, channels=2, covariates=1):
    net = Recognition(reader(n_inputs(channels, covariates), 6), 4).double()
    for i, param in enumerate(net.parameters()):
        param.data = 0.5 * normal(*param.shape, seed=100 + i)
    return net


def test_the_divergence_is_torchs():
    theirs = Normal(POSTERIOR.mean, POSTERIOR.log_std.exp())
    standard = Normal(torch.zeros(3, 4).double(), 1.0)
    wanted = kl_divergence(theirs, standard).sum(dim=1)
    torch.testing.assert_close(POSTERIOR.divergence(), wanted)


def test_the_cross_entropy_is_minus_the_log_density_up_to_a_constant():
    z = normal(3, 5, 4, seed=2)
    theirs = Normal(POSTERIOR.mean[:, None], POSTERIOR.log_std.exp()[:, None])
    wanted = -theirs.log_prob(z).sum(dim=2) - 2 * torch.log(
        torch.tensor(2 * torch.pi).double()
    )
    torch.testing.assert_close(POSTERIOR.cross_entropy(z), wanted)


@pytest.mark.parametrize("shape", [(7, 4), (3, 7, 4)])
def test_draws_are_of_the_posterior(shape):
    noise = normal(*shape, seed=3)
    drawn = POSTERIOR.draw(noise)
    assert drawn.shape == (3, 7, 4)
    back = (drawn - POSTERIOR.mean[:, None]) / POSTERIOR.log_std.exp()[:, None]
    torch.testing.assert_close(back, noise.expand(3, 7, 4))


def test_rows_are_read_backwards():
    batch = batch_of(2, 4)
    inputs, gaps = backwards(batch, torch.tensor([4, 2]))
    assert inputs.shape == (2, 4, n_inputs(2, 1))
    torch.testing.assert_close(inputs[0, :, :2], batch.values[0].flip(0))
    torch.testing.assert_close(inputs[1, :2, :2], batch.values[1, :2].flip(0))
    torch.testing.assert_close(inputs[0, :, 2:4].bool(), batch.mask[0].flip(0))
    torch.testing.assert_close(gaps[0, 1:], torch.diff(batch.times[0]).flip(0))
    assert gaps[1, 1] == batch.times[1, 1] - batch.times[1, 0] and gaps[1, 0] == 0


@pytest.mark.parametrize("reader", READERS)
def test_what_comes_after_the_context_is_not_read(reader):
    net, batch, length = recognition(reader), batch_of(3, 6), torch.tensor([6, 3, 1])
    among = net(batch, length, EXACTLY)
    for row, count in enumerate(length.tolist()):
        cut = Batch(
            *(
                getattr(batch, name)[row : row + 1, :count]
                for name in ("times", "values", "mask", "present", "covariates")
            )
        )
        alone = net(cut, torch.tensor([count]), EXACTLY)
        torch.testing.assert_close(alone.mean[0], among.mean[row])
        torch.testing.assert_close(alone.log_std[0], among.log_std[row])


def test_a_gru_reads_as_torchs():
    net, theirs = GRUReader(5, 6).double(), torch.nn.GRU(5, 6, batch_first=True)
    theirs = theirs.double()
    theirs.load_state_dict(net.gru.state_dict())
    inputs = normal(3, 4, 5, seed=8)
    length = torch.tensor([4, 1, 3])
    found = net(inputs, torch.zeros(3, 4).double(), length, EXACTLY)
    wanted = theirs(inputs)[0][torch.arange(3), length - 1]
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("reader", READERS)
def test_nothing_observed_is_the_prior(reader):
    net, batch = recognition(reader), batch_of(2, 3)
    found = net(batch, torch.tensor([0, 2]), EXACTLY)
    assert not found.mean[0].any() and not found.log_std[0].any()
    assert found.mean[1].all()
    assert net(batch, torch.tensor([0, 0]), EXACTLY).divergence().tolist() == [0, 0]


def test_an_ode_rnn_without_motion_is_a_gru():
    still, plain = ODERNNReader(5, 6).double(), GRUReader(5, 6).double()
    for param in still.field.parameters():
        param.data.zero_()
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        getattr(plain.gru, f"{name}_l0").data = getattr(still.cell, name).data
    inputs, gaps = normal(2, 4, 5, seed=4), normal(2, 4, seed=5).abs()
    length = torch.tensor([2, 4])
    torch.testing.assert_close(
        still(inputs, gaps, length, EXACTLY), plain(inputs, gaps, length, EXACTLY)
    )


def test_an_ode_rnn_moves_by_its_field_between_rows():
    net = ODERNNReader(5, 2).double()
    net.field = _Field(linear())
    inputs, gaps = normal(2, 4, 5, seed=6), normal(2, 4, seed=7).abs()
    gaps[1, 2] = 0.0
    hidden, wanted = torch.zeros(2, 2).double(), []
    for row in range(4):
        matrices = torch.matrix_exp(linear().matrix * gaps[:, row, None, None])
        hidden = net.cell(inputs[:, row], torch.einsum("bij,bj->bi", matrices, hidden))
        wanted.append(hidden)
    for count in range(1, 5):
        # The other series, which is longer or shorter, has no part in it.
        for length in (torch.tensor([count, 2]), torch.tensor([3, count])):
            found = net(inputs, gaps, length, EXACTLY)
            expected = torch.stack([wanted[n - 1][i] for i, n in enumerate(length)])
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


class _Field(torch.nn.Module):
    def __init__(self, field: Linear):
        super().__init__()
        self.field = field

    def forward(self, t, y):
        return self.field(t, y)
