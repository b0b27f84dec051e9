"""Panels of irregular series, forecasters small enough for a moment, and an oracle."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.linalg import expm

from skode import LatentODEForecaster

QUICK_FORECASTER = {
    "hidden_layer_sizes": (8,),
    "latent_dim": 3,
    "encoder_size": 8,
    "decoder_layer_sizes": (),
    "n_paths": 16,
    "max_iter": 3,
    "random_state": 0,
}


def forecaster(**params):
    """Return a small forecaster."""
    return LatentODEForecaster(**{**QUICK_FORECASTER, **params})


def waves(n_series=6, n_rows=12, seed=0):
    """Return a frame of turning pairs, a and b, at times of their own, some missing.

    Columns who and t say when and of which series.
    """
    rng = np.random.default_rng(seed)
    parts = []
    for number in range(n_series):
        times = np.sort(rng.uniform(0, 6, n_rows))
        angle = times + rng.uniform(0, 2 * np.pi)
        noise = 0.1 * rng.standard_normal((2, n_rows))
        a, b = 3 * np.sin(angle) + noise[0], 0.2 * np.cos(angle) + noise[1] + 40
        b[rng.random(n_rows) < 0.2] = np.nan
        parts.append(pd.DataFrame({"who": f"s{number}", "t": times, "a": a, "b": b}))
    return pd.concat(parts, ignore_index=True)


def record(n_rows=80, seed=0, **kinds):
    """Return a frame of one series with stamps, two channels, NaN here and there."""
    rng = np.random.default_rng(seed)
    days = np.sort(rng.uniform(0, 40, n_rows))
    frame = pd.DataFrame({"a": np.sin(days), "b": 5 + 0.1 * days}, **kinds)
    frame += 0.05 * rng.standard_normal(frame.shape)
    frame.index = pd.Timestamp("2024-03-01") + pd.to_timedelta(days, unit="D")
    frame.index.name = "when"
    return frame.mask(rng.random(frame.shape) < 0.1)


@dataclass(frozen=True)
class LinearGaussian:
    """dx = A x dt + sqrt(q) dw from x(0) ~ N(0, I), seen as y = H x + noise."""

    dynamics: np.ndarray
    loading: np.ndarray
    noise: float
    diffusion: float

    def step(self, gap):
        """Return transition and covariance over a gap (Van Loan 1978, eq. 2.2)."""
        size = len(self.dynamics)
        block = np.zeros((2 * size, 2 * size))
        block[:size, :size] = -self.dynamics
        block[:size, size:] = self.diffusion * np.eye(size)
        block[size:, size:] = self.dynamics.T
        block = expm(block * gap)
        onward = block[size:, size:].T
        return onward, onward @ block[:size, size:]

    def simulate(self, times, rng):
        """Return observations (T, C) at increasing times from 0 on."""
        x, before, seen = rng.standard_normal(len(self.dynamics)), 0.0, []
        for time in times:
            onward, spread = self.step(time - before)
            x = onward @ x
            if self.diffusion:
                x = x + np.linalg.cholesky(spread + 1e-12 * np.eye(len(x))) @ (
                    rng.standard_normal(len(x))
                )
            noise = self.noise * rng.standard_normal(len(self.loading))
            seen.append(self.loading @ x + noise)
            before = time
        return np.array(seen)

    def smooth(self, times, values):
        """Return mean and std (T, C) of observations at increasing times.

        Of each row given all `values` (T, C), NaN where not observed: Kalman's filter
        and the smoother of Rauch, Tung & Striebel.
        """
        size, before = len(self.dynamics), 0.0
        mean, cov, steps = np.zeros(size), np.eye(size), []
        for time, value in zip(times, values, strict=True):
            onward, spread = self.step(time - before)
            ahead_mean, ahead_cov = onward @ mean, onward @ cov @ onward.T + spread
            mean, cov = ahead_mean, ahead_cov
            there = ~np.isnan(value)
            if there.any():
                seen = self.loading[there]
                total = seen @ cov @ seen.T + self.noise**2 * np.eye(len(seen))
                gain = np.linalg.solve(total, seen @ cov).T
                mean = mean + gain @ (value[there] - seen @ mean)
                cov = cov - gain @ total @ gain.T
            steps.append((onward, ahead_mean, ahead_cov, mean, cov))
            before = time
        found = [(mean, cov)]
        for earlier, later in zip(steps[-2::-1], steps[:0:-1], strict=True):
            onward, ahead_mean, ahead_cov = later[:3]
            here_mean, here_cov = earlier[3:]
            gain = here_cov @ onward.T @ np.linalg.pinv(ahead_cov)
            mean = here_mean + gain @ (mean - ahead_mean)
            cov = here_cov + gain @ (cov - ahead_cov) @ gain.T
            found.append((mean, cov))
        means = np.array([self.loading @ m for m, _ in reversed(found)])
        variances = [np.diag(self.loading @ c @ self.loading.T) for _, c in found]
        return means, np.sqrt(np.array(variances[::-1]) + self.noise**2)


def spiral(diffusion=0.0, noise=0.2):
    """Return a rotation with decay, of which two channels are seen."""
    return LinearGaussian(
        np.array([[-0.1, 1.0], [-1.0, -0.1]]),
        np.array([[1.0, 0.3], [-0.2, 0.8]]),
        noise,
        diffusion,
    )


def simulated(problem, n_series, n_rows=30, end=6.0, missing=0.2, seed=0):
    """Return times (N, T) from 0 on, and observations (N, T, C) with NaN."""
    rng = np.random.default_rng(seed)
    times = np.sort(rng.uniform(0, end, (n_series, n_rows)), axis=1)
    times[:, 0] = 0
    values = np.array([problem.simulate(row, rng) for row in times])
    values[rng.random(values.shape) < missing] = np.nan
    return times, values
