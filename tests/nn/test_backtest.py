"""Which window forecasts a record best."""

import pytest
import torch

from skode._nn import backtest as room
from skode._nn.backtest import Window, choose
from skode._nn.baseline import Baseline
from tests.nn.test_latent import ragged_batch


def record():
    """Return two series of different lengths, with a trend."""
    batch = ragged_batch((120, 70), channels=2, covariates=0, seed=1)
    batch.values.add_(batch.times[:, :, None] * batch.mask)
    return batch


@pytest.mark.parametrize("trend", ["none", "level", "linear"])
def test_errors_are_those_of_forecasts_from_all_rows_of_the_record(trend):
    batch, span = record(), float(record().times.max())
    window = Window(Baseline(trend, (span / 9,)), 0.25 * span)
    horizon, total, count = 0.1 * span, 0.0, 0
    begin, end = batch.times[:, :1], batch.times[:, -1:]
    for origin in range(1, 7):
        earliest = torch.minimum((begin + end) / 2, (end - horizon + begin) / 2)
        now = earliest + (end - horizon - earliest) * origin / 6
        known = (batch.times <= now) & (batch.times > now - window.context)
        later = (batch.times > now) & (batch.times <= now + horizon)
        seen = batch.mask & known[:, :, None]
        found = window.baseline.fit(batch.times - now, batch.values, seen)
        error = batch.values - window.baseline.at(batch.times - now, found.mean)
        asked = batch.mask & later[:, :, None] & seen.any(dim=1, keepdim=True)
        total += (error**2)[asked].sum().item()
        count += int(asked.sum())
    found = room._error(batch, window, horizon)
    assert found == pytest.approx(total / count, rel=1e-9)


def test_a_line_is_chosen_where_there_is_one():
    batch, span = record(), float(record().times.max())
    trends = ("none", "level", "linear")
    found = choose(batch, 0.2 * span, [0.5 * span], trends, [()])
    assert found.baseline.trend == "linear"
    batch.values.sub_(batch.times[:, :, None] * batch.mask)
    found = choose(batch, 0.2 * span, [0.5 * span], trends, [()])
    assert found.baseline.trend != "linear"


def test_where_nothing_is_asked_there_is_no_error():
    batch = ragged_batch((5, 3), seed=2)
    assert room._error(batch, Window(Baseline("level"), 1e-9), 1e-12) == 0.0
