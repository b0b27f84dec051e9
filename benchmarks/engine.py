"""Time a solve and its gradient against torchdiffeq and against bare arithmetic.

    python benchmarks/engine.py [--quick] [--threads 1] [--device cpu]

Prints markdown tables. The field is `MLPField` with two hidden layers of width H, B
rows of D states from t = 0 to 1, `dopri5`, rtol = atol, float32; a hard field is a
mild one with its parameters times four. Everybody integrates the same field and takes
turns in one run, so that a busy machine slows all alike.

"bare" is the arithmetic without a solver, in preallocated memory: as many evaluations
as ours per row, and for the gradient one linearisation and one pull per stage of an
accepted step and one parameter product per step.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn
from torchdiffeq import odeint, odeint_adjoint

from skode._engine.solve import solve
from skode._nn.fields import MLPField

SIZES = ((32, 8, 32), (256, 16, 64), (1024, 32, 128), (8192, 32, 128))
GRADIENTS = ("checkpoint", "adjoint", "backprop")
STAGES = 6  # of dopri5
ROUNDS, BUDGET = 15, 8.0  # at most this many rounds, or seconds, per case


class Peer(nn.Module):
    """The same field for torchdiffeq, which passes one scalar time."""

    def __init__(self, field: MLPField) -> None:
        super().__init__()
        self.field = field
        self.calls = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return self.field(t.expand(len(y)), y)


@dataclass(frozen=True)
class Case:
    field: MLPField
    y0: Tensor
    tol: float

    @property
    def params(self) -> tuple[Tensor, ...]:
        return tuple(self.field.parameters())

    def ours(self, gradient: str = "auto"):
        return solve(
            self.field,
            self.y0,
            self.y0.new_tensor([0.0, 1.0]),
            params=self.params,
            rtol=self.tol,
            atol=self.tol,
            gradient=gradient,
        )

    def theirs(self, peer: Peer, function: Callable) -> Tensor:
        t = self.y0.new_tensor([0.0, 1.0])
        tols = {"rtol": self.tol, "atol": self.tol}
        return function(peer, self.y0, t, method="dopri5", **tols)[-1]

    def gradient(self, last: Callable[[], Tensor]) -> None:
        torch.autograd.grad(last().square().sum(), (self.y0, *self.params))

    def contestants(self) -> tuple[dict, dict, str]:
        """Return what to time forwards, with the gradient, and a description."""
        peer = Peer(self.field)
        with torch.no_grad():
            stats = self.ours().stats
            self.theirs(peer, odeint)
        n, steps = (
            round(x.double().mean().item()) for x in (stats.nfe, stats.n_accepted)
        )
        forward = {
            "ours": torch.no_grad()(self.ours),
            "odeint": torch.no_grad()(partial(self.theirs, peer, odeint)),
            "bare": partial(bare, self.field, self.y0, n, 0),
        }
        gradient = {
            **{
                name: partial(self.gradient, lambda name=name: self.ours(name).y1)
                for name in GRADIENTS
            },
            "odeint": partial(self.gradient, partial(self.theirs, peer, odeint)),
            "odeint_adjoint": partial(
                self.gradient, partial(self.theirs, peer, odeint_adjoint)
            ),
            "bare": partial(bare, self.field, self.y0, n, steps),
        }
        return forward, gradient, f"{n} / {peer.calls}"


@torch.no_grad()
def bare(field: MLPField, y: Tensor, n: int, steps: int) -> None:
    """Do the arithmetic of n evaluations and of the gradient of some steps."""
    kernel = field.kernel(tuple(field.parameters()))
    times, out = y.new_zeros(STAGES, len(y)), torch.empty_like(y)
    for first in range(0, n, STAGES):
        kernel.begin(times)
        for slot in range(min(STAGES, n - first)):
            kernel.evaluate(slot, y, out)
    for _ in range(steps):
        states, cotangents = kernel.begin_linear(times, y.shape[1])
        for slot in range(STAGES):
            states[slot].copy_(y)
            kernel.linearize(slot, out)
        for slot in range(STAGES):
            cotangents[slot].copy_(y)
            kernel.pull(slot, out)
        kernel.accumulate(STAGES)


def measure(contestants: dict[str, Callable], device: str) -> dict[str, float]:
    """Return median milliseconds; all take turns, and the first round warms up."""
    taken = {name: [] for name in contestants}
    end = time.perf_counter() + BUDGET
    for _ in range(ROUNDS + 1):
        for name, run in contestants.items():
            begin = time.perf_counter()
            run()
            if device != "cpu":
                torch.cuda.synchronize()
            taken[name].append(1e3 * (time.perf_counter() - begin))
        if time.perf_counter() > end:
            break
    return {name: median(times[1:] or times) for name, times in taken.items()}


def make_case(size: tuple[int, int, int], tol: float, factor: float, device: str):
    torch.manual_seed(0)
    batch, dim, hidden = size
    field = MLPField(dim, (hidden, hidden)).to(device)
    with torch.no_grad():
        for param in field.parameters():
            param.mul_(factor)
    return Case(field, torch.randn(batch, dim, device=device).requires_grad_(), tol)


def row(times: dict[str, float], own: str) -> str:
    """Return milliseconds, and in brackets how many times those of `own`."""
    base = times[own]
    return " | ".join(
        f"{ms:.3g}" if name == own else f"{ms:.3g} ({ms / base:.2f})"
        for name, ms in times.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="the two small sizes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    begin = time.perf_counter()
    print(
        f"Milliseconds, median (times ours), torch {torch.__version__}, "
        f"{args.device}, {args.threads} thread(s). Evaluations: ours (mean over rows)"
        " / torchdiffeq.\n"
    )
    tables = {"forward": [], "forward and gradient": []}
    for size in SIZES[:2] if args.quick else SIZES:
        for tol in (1e-3, 1e-5):
            for label, factor in (("mild", 1.0), ("hard", 4.0)):
                case = make_case(size, tol, factor, args.device)
                *both, nfe = case.contestants()
                for (title, rows), group, own in zip(
                    tables.items(), both, ("ours", "checkpoint"), strict=True
                ):
                    times = measure(group, args.device)
                    if not rows:
                        names = " | ".join(times)
                        rows += [
                            f"| {title}: (B, D, H), tol | evaluations | {names} |",
                            "|---" * (2 + len(times)) + "|",
                        ]
                    name = f"{size} {tol:.0e} {label}"
                    rows.append(f"| {name} | {nfe} | {row(times, own)} |")
    print("\n\n".join("\n".join(rows) for rows in tables.values()))
    print(f"\nMeasured in {time.perf_counter() - begin:.0f} s.")


if __name__ == "__main__":
    main()
