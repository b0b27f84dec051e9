"""ODEs with closed solutions, and SciPy's answer for those without. B rows, D state."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """An initial value problem whose solution is known."""

    name: str
    field: Callable[[Tensor, Tensor], Tensor]
    """f(t, y) with t: (B,), y: (B, D) -> (B, D)."""
    exact: Callable[[Tensor, Tensor], Tensor]
    """(y0: (B, D), times: (B, T)) -> (B, T, D)."""
    start: tuple[tuple[float, ...], ...]
    span: tuple[float, float]

    def y0(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return the start, (B, D)."""
        return torch.tensor(self.start, dtype=dtype)

    def times(self, count: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return evenly spaced times over the span, the same for all rows, (B, T)."""
        times = torch.linspace(*self.span, count, dtype=dtype)
        return times.repeat(len(self.start), 1)

    def error(self, ys: Tensor, times: Tensor | None = None) -> float:
        """Return the largest error of `ys` (B, T, D) at `times`."""
        times = self.times(ys.shape[1]) if times is None else times
        wanted = self.exact(self.y0(), times.double())
        return float((ys.detach() - wanted).abs().max())


def _decay(t: Tensor, y: Tensor) -> Tensor:
    return -y


def _decayed(y0: Tensor, times: Tensor) -> Tensor:
    return y0[:, None] * torch.exp(times[:, :1] - times)[:, :, None]


DECAY = Problem("decay", _decay, _decayed, ((1.0,), (-2.0,)), (0.0, 1.5))


def _cubic(t: Tensor, y: Tensor) -> Tensor:
    return -(y**3) * torch.cos(t)[:, None] / 2


def _cubic_solved(y0: Tensor, times: Tensor) -> Tensor:
    grown = torch.sin(times) - torch.sin(times[:, :1])
    return y0[:, None] / torch.sqrt(1 + y0[:, None] ** 2 * grown[:, :, None])


# Nonlinear and not autonomous: y = (1 + sin t)^-1/2 from y(0) = 1.
CUBIC = Problem("cubic", _cubic, _cubic_solved, ((1.0,), (0.7,)), (0.0, 2.0))

_A = ((-0.5, 1.0), (-1.0, -0.3))


@dataclass(frozen=True)
class Linear:
    """y' = A y, for any A."""

    matrix: Tensor

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return y @ self.matrix.T

    def exact(self, y0: Tensor, times: Tensor) -> Tensor:
        """Return exp(A (t - t0)) y0, as autograd understands it."""
        since = (times - times[:, :1])[:, :, None, None]
        return torch.einsum("btij,bj->bti", torch.matrix_exp(self.matrix * since), y0)


def linear(dtype: torch.dtype = torch.float64) -> Linear:
    """Return the field of LINEAR with a matrix of its own."""
    return Linear(torch.tensor(_A, dtype=dtype))


def _rotate(t: Tensor, y: Tensor) -> Tensor:
    return linear(y.dtype)(t, y)


def _rotated(y0: Tensor, times: Tensor) -> Tensor:
    return linear(y0.dtype).exact(y0, times)


LINEAR = Problem(
    "linear", _rotate, _rotated, ((1.0, 0.0), (-0.5, 2.0), (0.3, 0.4)), (0.0, 2.0)
)


@dataclass(frozen=True)
class Perceptron:
    """y' = tanh(W y + v t + b) U: what a neural field is like, without a solution."""

    weight: Tensor
    drive: Tensor
    bias: Tensor
    out: Tensor

    @property
    def params(self) -> tuple[Tensor, ...]:
        """The tensors to train."""
        return self.weight, self.drive, self.bias, self.out

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y @ self.weight + t[:, None] * self.drive + self.bias) @ (
            self.out
        )


def perceptron(
    dim: int = 3,
    width: int = 8,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Perceptron:
    """Return a random field; the larger `scale`, the more often steps are refused."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return Perceptron(
        scale * draw(dim, width), scale * draw(width), draw(width), draw(width, dim)
    )


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return normal numbers that depend on nothing but the seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def scipy_reference(
    field: Callable[[Tensor, Tensor], Tensor], y0: Tensor, times: Tensor
) -> Tensor:
    """Solve each row by SciPy's DOP853 at 1e-12, in float64; return (B, T, D).

    `field` must take float64.
    """
    rows = []
    for start, row in zip(y0.detach().double(), times.detach().double(), strict=True):
        states = [start.numpy()]
        for t0, t1 in zip(row[:-1].tolist(), row[1:].tolist(), strict=True):
            states.append(_scipy_move(field, states[-1], t0, t1))
        rows.append(np.stack(states))
    return torch.from_numpy(np.stack(rows))


def _scipy_move(field, y: np.ndarray, t0: float, t1: float) -> np.ndarray:
    if t0 == t1:
        return y

    def slope(t: float, y: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            t = torch.tensor([t], dtype=torch.float64)
            return field(t, torch.from_numpy(y)[None])[0].numpy()

    solved = solve_ivp(slope, (t0, t1), y, method="DOP853", rtol=1e-12, atol=1e-12)
    assert solved.success
    return solved.y[:, -1]
