"""Time `skode.odeint` and `skode.odeint_adjoint` against torchdiffeq's.

    python benchmarks/odeint.py [--quick] [--threads 1]

Prints a markdown table. The field is a user's own module, a tanh net of two hidden
layers of width H on a state of B rows and D columns, which both take as one state with
one step size; from t = 0 to 1 with `dopri5`, rtol = atol, float32. A hard field is a
mild one with its parameters times four. "t" is the number of requested times. All take
turns in one run; medians.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
import torchdiffeq
from torch import Tensor, nn

import skode

SIZES = ((32, 8, 32), (256, 16, 64), (1024, 32, 128))
ROUNDS, BUDGET = 21, 12.0  # at most this many rounds, or seconds, per case
NAMES = ("odeint", "odeint", "odeint_adjoint")
TITLES = ("odeint, forward", "odeint, with gradient", "odeint_adjoint, with gradient")


class Field(nn.Module):
    """A net that knows nothing of either package."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(dim, width),
            nn.Tanh(),
            nn.Linear(width, width),
            nn.Tanh(),
            nn.Linear(width, dim),
        )
        self.calls = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return self.net(y)


def contestant(
    package, name: str, field: Field, y0: Tensor, t: Tensor, tol: float, train: bool
) -> Callable[[], None]:
    """Return what solves, and takes the gradient if it trains."""
    function = getattr(package, name)

    def run() -> None:
        with torch.set_grad_enabled(train):
            y = function(field, y0, t, rtol=tol, atol=tol)
        if train:
            loss = y.square().sum()
            torch.autograd.grad(loss, (y0, *field.parameters()))

    return run


def measure(contestants: list[Callable[[], None]]) -> list[float]:
    """Return median milliseconds; all take turns, and the first round warms up."""
    taken: list[list[float]] = [[] for _ in contestants]
    end = time.perf_counter() + BUDGET
    for _ in range(ROUNDS + 1):
        for run, times in zip(contestants, taken, strict=True):
            begin = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - begin))
        if time.perf_counter() > end:
            break
    return [median(times[1:] or times) for times in taken]


def row(size: tuple[int, int, int], tol: float, factor: float, count: int) -> str:
    """Return one line of the table."""
    torch.manual_seed(0)
    batch, dim, width = size
    field = Field(dim, width)
    with torch.no_grad():
        for param in field.parameters():
            param.mul_(factor)
    y0 = torch.randn(batch, dim).requires_grad_()
    t = torch.linspace(0.0, 1.0, count)
    runs = [
        contestant(package, name, field, y0, t, tol, train)
        for name, train in zip(NAMES, (False, True, True), strict=True)
        for package in (skode, torchdiffeq)
    ]
    calls = []
    for run in runs:
        field.calls = 0
        run()
        calls.append(field.calls)
    times = measure(runs)
    cells = [
        f"{times[i]:.3g} | {times[i + 1]:.3g} ({times[i + 1] / times[i]:.2f}) "
        f"| {calls[i]} / {calls[i + 1]}"
        for i in (0, 2, 4)
    ]
    label = "mild" if factor == 1.0 else "hard"
    return f"| {size} {tol:.0e} {label}, {count} t | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="the two small sizes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(
        f"Milliseconds, median; torchdiffeq's in brackets as a multiple of ours; "
        f"evaluations, ours / torchdiffeq's. torch {torch.__version__}, torchdiffeq "
        f"{torchdiffeq.__version__}, {args.threads} thread(s).\n"
    )
    heads = " | ".join(f"{title}: skode | torchdiffeq | calls" for title in TITLES)
    print(f"| (B, D, H), tol | {heads} |")
    print("|---" * 10 + "|")
    for size in SIZES[:2] if args.quick else SIZES:
        for tol in (1e-3, 1e-5):
            print(row(size, tol, 1.0, 2), flush=True)
        print(row(size, 1e-5, 1.0, 20), flush=True)
        print(row(size, 1e-5, 4.0, 2), flush=True)


if __name__ == "__main__":
    main()
