"""Measure the peak memory of a gradient against the number of steps.

    python benchmarks/memory.py [--quick]

Prints a markdown table of MiB by which the resident set of a fresh process peaks
above what it needed for the same gradient over one step. `MLPField`, (B, D, H) =
(256, 16, 64), fixed-step `rk4`, float32, one thread. "states" is what one state per
step takes: steps * B * D * 4 bytes. "adaptive": `adaptive_heun` in float64, whose
tolerance makes the slowest row take about so many steps.
"""

import argparse
import resource
import subprocess
import sys

import torch

from skode._engine.solve import solve
from skode._nn.fields import MLPField

B, D, H = 256, 16, 64
STEPS = (10, 100, 1_000, 10_000)
GRADIENTS = {
    "checkpoint": 10_000,
    "adjoint": 10_000,
    "reversible": 10_000,
    "reversible, adaptive": 10_000,
    "backprop": 1_000,
}
"""Each with the most steps that it is asked for."""
TOLERANCES = {1: 1.0, 10: 3e-3, 100: 2e-5, 1_000: 2e-7, 10_000: 2e-9}
"""With which `adaptive_heun` takes about so many steps."""


def gradient(name: str, steps: int) -> None:
    """Take the gradient of a solve of so many steps."""
    torch.manual_seed(0)
    name, *adaptive = name.split(", ")
    dtype = torch.float64 if adaptive else torch.float32
    field = MLPField(D, (H, H)).to(dtype)
    params = tuple(field.parameters())
    y0 = torch.randn(B, D, dtype=dtype).requires_grad_()
    solution = solve(
        field,
        y0,
        torch.tensor([0.0, 1.0], dtype=torch.float64),
        params=params,
        method="adaptive_heun" if adaptive else "rk4",
        rtol=TOLERANCES[steps],
        atol=TOLERANCES[steps],
        step_size=1 / steps,
        max_steps=2 * max(steps, 10),
        gradient=name,
    ).require_success()
    taken = int(solution.stats.n_accepted.max())
    assert taken == steps or (adaptive and taken > steps / 2), taken
    torch.autograd.grad(solution.y1.square().sum(), (y0, *params))


def peak() -> float:
    """Return the highest resident set so far, in MiB."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def child(name: str, steps: int) -> None:
    torch.set_num_threads(1)
    gradient(name, 1)
    before = peak()
    gradient(name, steps)
    print(peak() - before)


def growth(name: str, steps: int) -> str:
    """Measure in a process of its own; return MiB, or nothing if that is too much."""
    if steps > GRADIENTS[name]:
        return "-"
    command = [sys.executable, __file__, "--child", name, str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return f"{float(done.stdout):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="up to 1,000 steps")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], int(args.child[1]))
        return
    print(f"| steps | states | {' | '.join(GRADIENTS)} |")
    print("|---" * (2 + len(GRADIENTS)) + "|")
    for steps in STEPS[:3] if args.quick else STEPS:
        states = f"{steps * B * D * 4 / 2**20:.1f}"
        cells = (growth(name, steps) for name in GRADIENTS)
        print(f"| {steps} | {states} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
