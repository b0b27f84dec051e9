"""The residual process, against dense algebra of normal distributions."""

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from skode._nn.residual import Residual, scan, scan_back
from tests.problems import normal

TIMES = torch.tensor([[0.0, 0.1, 0.1, 0.4, 1.5, 1.6], [0.0, 0.5, 0.6, 2.0, 2.0, 2.0]])
TIMES = TIMES.double()
MASK = torch.tensor(
    [
        [[1, 1], [1, 0], [0, 1], [1, 1], [0, 0], [1, 1]],
        [[1, 0], [0, 1], [1, 1], [1, 0], [0, 0], [0, 0]],
    ]
).bool()
SEEN = normal(2, 3, 6, 2, seed=0) * MASK[:, None]  # (B, K, T, C)


def residual(persistent=True):
    """Return a process whose channels differ."""
    process = Residual(2, persistent).double()
    if persistent:
        process.share.data = torch.tensor([0.7, -1.0]).double()
        process.log_time.data = torch.tensor([-0.5, 0.8]).double()
    return process


def covariance(process, row, channel):
    """Return the covariance (T, T) of what persists."""
    times = TIMES[row].numpy()
    share = process.persisting()[channel].item()
    tau = process.log_time[channel].exp().item()
    return share * np.exp(-np.abs(times[:, None] - times) / tau)


def each_channel():
    return [(row, channel) for row in range(2) for channel in range(2)]


@pytest.mark.parametrize(("row", "channel"), each_channel())
def test_densities_are_those_of_the_joint_normal(row, channel):
    process = residual()
    there = MASK[row, :, channel].numpy()
    cov = covariance(process, row, channel)
    cov = cov + process.white()[channel].item() * np.eye(6)
    ours = (
        process.log_density(TIMES, MASK, SEEN, MASK)[row, :, :, channel]
        .detach()
        .numpy()
    )
    assert (ours[:, ~there] == 0).all()
    seen = SEEN[row, :, :, channel].numpy()
    for count in range(1, there.sum() + 1):
        first = np.flatnonzero(there)[:count]
        wanted = multivariate_normal(cov=cov[np.ix_(first, first)])
        density = ours[:, first].sum(axis=1) - 0.5 * np.log(2 * np.pi) * count
        np.testing.assert_allclose(density, wanted.logpdf(seen[:, first]), rtol=1e-9)


@pytest.mark.parametrize(("row", "channel"), each_channel())
def test_smoothing_is_conditioning_the_joint_normal(row, channel):
    process = residual()
    there = MASK[row, :, channel].numpy()
    cov = covariance(process, row, channel)
    seen = cov[np.ix_(there, there)] + process.white()[channel].item() * np.eye(
        there.sum()
    )
    gain = np.linalg.solve(seen, cov[there]).T
    mean, variance = process.smooth(TIMES, MASK, SEEN)
    wanted = SEEN[row, :, :, channel].numpy()[:, there] @ gain.T
    np.testing.assert_allclose(
        mean[row, :, :, channel].detach().numpy(), wanted, atol=1e-10
    )
    np.testing.assert_allclose(
        variance[row, :, channel].detach().numpy(),
        np.diag(cov - gain @ cov[there]),
        atol=1e-10,
    )


@pytest.mark.parametrize(("row", "channel"), each_channel())
def test_the_filter_knows_the_rows_before(row, channel):
    process = residual()
    known = process.filter(TIMES, MASK, SEEN)
    cov = covariance(process, row, channel)
    noise = process.white()[channel].item()
    for now in range(6):
        there = MASK[row, :, channel].numpy() & (np.arange(6) < now)
        seen = cov[np.ix_(there, there)] + noise * np.eye(there.sum())
        gain = np.linalg.solve(seen, cov[there, now])
        wanted = SEEN[row, :, :, channel].numpy()[:, there] @ gain
        mean = known.mean[row, :, now, channel].detach().numpy()
        np.testing.assert_allclose(mean, wanted, atol=1e-10)
        left = cov[now, now] - gain @ cov[there, now]
        assert known.variance[row, now, channel].item() == pytest.approx(left)


def test_draws_have_the_covariance_of_the_process():
    process = residual()
    basis = torch.eye(6).double()[None, :, :, None].expand(2, -1, -1, 2)
    drawn = process.draw(TIMES, basis).detach().numpy()  # a draw is linear in noise
    for row, channel in each_channel():
        root = drawn[row, :, :, channel]
        np.testing.assert_allclose(
            root.T @ root, covariance(process, row, channel), atol=1e-12
        )


def test_what_later_rows_do_not_know_of_changes_nothing_but_its_own_density():
    process, early = residual(), torch.arange(6) < 3
    known = MASK & early[:, None]
    ours = process.log_density(TIMES, MASK, SEEN, known)
    whole = process.log_density(TIMES, MASK, SEEN, MASK)
    assert torch.equal(ours[:, :, :3], whole[:, :, :3])
    assert not torch.equal(ours[:, :, 4:], whole[:, :, 4:])
    others = torch.where(early[:, None], SEEN, 2 * SEEN)
    others[:, :, 5] = SEEN[:, :, 5]
    again = process.log_density(TIMES, MASK, others, known)
    torch.testing.assert_close(again[:, :, 5], ours[:, :, 5])


def test_a_residual_that_does_not_persist_is_white():
    process = residual(persistent=False)
    density = process.log_density(TIMES, MASK, SEEN, MASK)
    assert torch.equal(density, -0.5 * SEEN**2 * MASK[:, None])
    mean, variance = process.smooth(TIMES, MASK, SEEN)
    assert not mean.any() and not variance.any() and process.white() == 1
    assert not process.draw(TIMES, SEEN).any()


def test_padding_and_neighbours_change_nothing():
    process = residual()
    alone = process.smooth(TIMES[1:, :4], MASK[1:, :4], SEEN[1:, :, :4])
    among = process.smooth(TIMES, MASK, SEEN)
    for one, other in zip(alone, among, strict=True):
        along = one.ndim - 2
        torch.testing.assert_close(one[0], other[1].narrow(along - 1, 0, 4))


@pytest.mark.parametrize("what", ["log_density", "smooth"])
def test_gradients(what):
    process = residual()
    generators = torch.linspace(-1, 1, SEEN.numel(), dtype=torch.float64).view_as(SEEN)

    def value(share, log_time, seen, gaps):
        process.share, process.log_time = share, log_time
        times = torch.cumsum(gaps, dim=1)
        seen = seen * MASK[:, None]
        if what == "log_density":
            return (process.log_density(times, MASK, seen, MASK) * generators).sum()
        found = process.smooth(times, MASK, seen)
        return (found[0] * generators).sum() + found[1].square().sum()

    share, log_time = process.share.detach(), process.log_time.detach()
    gaps = torch.diff(TIMES, dim=1, prepend=TIMES[:, :1]) + 0.05
    inputs = [x.clone().requires_grad_() for x in (share, log_time, SEEN, gaps)]
    del process.share, process.log_time
    assert torch.autograd.gradcheck(value, inputs)


def test_scans_are_loops():
    a, b = normal(2, 1, 7, 2, seed=1), normal(2, 3, 7, 2, seed=2)
    x, forth = torch.zeros(2, 3, 2).double(), []
    for t in range(7):
        x = a[:, :, t] * x + b[:, :, t]
        forth.append(x)
    torch.testing.assert_close(scan(a, b), torch.stack(forth, dim=2))
    x, back = torch.zeros(2, 3, 2).double(), []
    for t in reversed(range(7)):
        x = a[:, :, t] * x + b[:, :, t]
        back.append(x)
    torch.testing.assert_close(scan_back(a, b), torch.stack(back[::-1], dim=2))


def test_ten_thousand_rows_stay_accurate():
    process = residual()
    times = torch.linspace(0, 30, 10_000).double()[None]
    mask = torch.ones(1, 10_000, 2).bool()
    seen = normal(1, 1, 10_000, 2, seed=3)
    known = process.filter(times, mask, seen)
    mean = torch.zeros(2).double()
    variance, white = process.persisting(), process.white()
    decay = torch.exp(-torch.diff(times[0])[:, None] / process.log_time.exp())
    for row in range(9_999):
        gain = variance / (variance + white)
        mean = decay[row] * (mean + gain * (seen[0, 0, row] - mean))
        left = variance * (1 - gain)
        variance = decay[row] ** 2 * left + process.persisting() * (1 - decay[row] ** 2)
    torch.testing.assert_close(known.mean[0, 0, -1], mean, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(known.variance[0, -1], variance, rtol=1e-8, atol=1e-12)
