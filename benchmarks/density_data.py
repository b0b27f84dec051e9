"""The data of `density.py`: 2-D toys whose density is known, and tables.

A toy is a sampler and its exact log-density, written by one hand so that they agree;
`check()` tests that each integrates to one, and that its samples follow it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import ive, logsumexp
from sklearn import datasets
from sklearn.model_selection import train_test_split

TOY_ROWS = 10_000
"""Of the training set, and of the test set as well."""

SKLEARN = ("iris", "wine", "diabetes", "breast_cancer", "digits")
UCI = ("yacht", "energy", "concrete", "wine-quality-red", "power-plant")


@dataclass(frozen=True)
class Toy:
    """A density in the plane."""

    sample: Callable[[np.random.Generator, int], np.ndarray]
    log_density: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Split:
    """Rows in the units of the training rows' mean and standard deviation."""

    train: np.ndarray
    test: np.ndarray
    truth: float
    """Mean exact log-density of the test rows; NaN where nobody knows."""


def normal(points, centers, scale):
    """Log-densities of isotropic normals: (..., 2) and (..., 2) -> (...)."""
    square = ((points - centers) ** 2).sum(axis=-1)
    return -0.5 * square / scale**2 - np.log(2 * np.pi * scale**2)


def eight_gaussians():
    angles = np.arange(8) * np.pi / 4
    centers = 4 * np.stack([np.cos(angles), np.sin(angles)], axis=1)

    def sample(rng, n):
        return centers[rng.integers(8, size=n)] + 0.5 * rng.normal(size=(n, 2))

    def log_density(x):
        return logsumexp(normal(x[:, None], centers, 0.5), axis=1) - np.log(8)

    return Toy(sample, log_density)


def checkerboard():
    # The black half of the 16 fields of [-4, 4]^2: an area of 32.
    def black(x):
        fields = np.floor(x / 2).astype(int)
        inside = (np.abs(x) < 4).all(axis=1)
        return inside & (fields.sum(axis=1) % 2 == 0)

    def sample(rng, n):
        x = rng.uniform(-4, 4, size=(n, 2))
        # A row that fell upon white moves to the black field beside it.
        x[~black(x), 0] += 2
        x[:, 0] -= 8 * (x[:, 0] >= 4)
        return x

    def log_density(x):
        return np.where(black(x), -np.log(32), -np.inf)

    return Toy(sample, log_density)


def curves(draw, curve, weight, end, noise, nodes=800):
    """A curve and its mirror image, blurred by normal noise.

    `curve` maps parameters (T,) to points (T, 2), `draw` uniform numbers to parameters,
    `weight` is the density of these on [0, end]; the mirror is the origin. Density
    by Gauss-Legendre quadrature, whose nodes lie closer together than the noise is
    wide.
    """
    at, dt = np.polynomial.legendre.leggauss(nodes)
    at, dt = end * (at + 1) / 2, end * dt / 2
    points = np.concatenate([curve(at), -curve(at)])
    mass = np.tile(dt * weight(at), 2) / 2

    def sample(rng, n):
        sign = rng.choice([-1.0, 1.0], size=(n, 1))
        middle = sign * curve(draw(rng.uniform(size=n)))
        return middle + noise * rng.normal(size=(n, 2))

    def log_density(x):
        return np.concatenate(
            [
                logsumexp(normal(part[:, None], points, noise), axis=1, b=mass)
                for part in np.array_split(x, 1 + len(x) // 1000)
            ]
        )

    return Toy(sample, log_density)


def moons():
    # Half circles, each centred so that they are each other's image in the origin.
    return curves(
        draw=lambda u: np.pi * u,
        curve=lambda t: np.stack([np.cos(t) - 0.5, np.sin(t) - 0.25], axis=1),
        weight=lambda t: np.full_like(t, 1 / np.pi),
        end=np.pi,
        noise=0.1,
    )


def two_spirals():
    # Archimedean, even along the arc but for the innermost turn.
    end = 3 * np.pi
    return curves(
        draw=lambda u: end * np.sqrt(u),
        curve=lambda t: t[:, None] / 3 * np.stack([np.cos(t), np.sin(t)], axis=1),
        weight=lambda t: 2 * t / end**2,
        end=end,
        noise=0.1,
    )


def rings(noise=0.08):
    radii = 3 * np.array([0.25, 0.5, 0.75, 1.0])

    def sample(rng, n):
        angle = rng.uniform(0, 2 * np.pi, size=n)
        on = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        return radii[rng.integers(4, size=n), None] * on + noise * rng.normal(
            size=(n, 2)
        )

    def log_density(x):
        # The integral over the angle is a Bessel function: exp(-z) I0(z) = ive(0, z).
        r = np.hypot(*x.T)[:, None]
        terms = -0.5 * ((r - radii) / noise) ** 2 + np.log(ive(0, r * radii / noise**2))
        return logsumexp(terms, axis=1) - np.log(4 * 2 * np.pi * noise**2)

    return Toy(sample, log_density)


def pinwheel(arms=5, rate=0.25):
    # Normals turned by an angle that grows with the radius. A turn that depends on
    # nothing but the radius keeps areas, so that no Jacobian enters.
    mean, scale = np.array([1.0, 0.0]), np.array([0.3, 0.1])
    starts = 2 * np.pi * np.arange(arms) / arms

    def turn(x, angle):
        c, s = np.cos(angle), np.sin(angle)
        return np.stack([c * x[..., 0] - s * x[..., 1], s * x[..., 0] + c * x[..., 1]])

    def sample(rng, n):
        z = mean + scale * rng.normal(size=(n, 2))
        angle = starts[rng.integers(arms, size=n)] + rate * np.exp(np.hypot(*z.T))
        return turn(z, angle).T

    def log_density(x):
        angle = starts[:, None] + rate * np.exp(np.hypot(*x.T))
        z = np.moveaxis(turn(x, -angle), 0, -1)  # (arms, rows, 2)
        terms = -0.5 * (((z - mean) / scale) ** 2).sum(axis=-1)
        return logsumexp(terms, axis=0) - np.log(arms * 2 * np.pi * scale.prod())

    return Toy(sample, log_density)


TOYS = {
    "8-gaussians": eight_gaussians(),
    "checkerboard": checkerboard(),
    "moons": moons(),
    "pinwheel": pinwheel(),
    "two-spirals": two_spirals(),
    "rings": rings(),
}
DATA = (*TOYS, *SKLEARN, *UCI)


def read_table(name, folder, rng):
    """Return the rows of a table."""
    if name in UCI:
        return np.loadtxt(folder / f"{name}.csv", delimiter=",", skiprows=1)
    rows = getattr(datasets, f"load_{name}")().data
    # Grey values are whole numbers, and some pixels always 0: with uniform noise they
    # have a density, the same noise for every method.
    return rows + rng.uniform(size=rows.shape) if name == "digits" else rows


def make_split(name: str, split: int, folder: Path, seed: int = 0) -> Split:
    """Return training and test rows; a table keeps a fifth for the test."""
    rng = np.random.default_rng([seed, split])
    if name in TOYS:
        rows = TOYS[name].sample(rng, 2 * TOY_ROWS)
        train, test = rows[:TOY_ROWS], rows[TOY_ROWS:]
    else:
        train, test = train_test_split(
            read_table(name, folder, rng), test_size=0.2, random_state=seed + split
        )
    mean, scale = train.mean(axis=0), train.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    truth = np.nan
    if name in TOYS:
        truth = TOYS[name].log_density(test).mean() + np.log(scale).sum()
    return Split((train - mean) / scale, (test - mean) / scale, float(truth))


def check():
    """Raise unless each toy integrates to one and its samples follow its density.

    They do if the mean log-density, and the mean density, of a sample are those that
    the grid says they are: within four standard errors.
    """
    side = np.linspace(-8, 8, 400, endpoint=False) + 0.02
    grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    area = (side[1] - side[0]) ** 2
    for name, toy in TOYS.items():
        log_p = toy.log_density(grid)
        p = np.exp(log_p)
        total = p.sum() * area
        assert abs(total - 1) < 1e-4, (name, total)
        rows = toy.sample(np.random.default_rng(1), 40_000)
        found = toy.log_density(rows)
        assert np.isfinite(found).all(), name
        finite = np.where(p > 0, log_p, 0.0)
        for on_grid, on_rows in ((finite, found), (p, np.exp(found))):
            expected = (p * on_grid).sum() * area
            off = on_rows.mean() - expected
            error = on_rows.std() / np.sqrt(len(rows)) + 1e-9
            assert abs(off) < 4 * error, (name, off, error)
        # Moments could agree by chance where the picture does not: compare the masses
        # of a coarse chess board too.
        edges = np.linspace(-8, 8, 17)
        mass = np.histogram2d(*grid.T, bins=[edges, edges], weights=p * area)[0]
        counts = np.histogram2d(*rows.T, bins=[edges, edges])[0] / len(rows)
        error = np.sqrt(mass * (1 - mass) / len(rows)) + 1e-4
        assert (np.abs(counts - mass) < 5 * error).all(), name
        print(f"{name}: integral {total:.6f}, entropy {-(p * finite).sum() * area:.4f}")
