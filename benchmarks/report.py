"""What the reports of `density.py` and `series.py` have in common."""

import platform
import shlex
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def heading(script, packages, budget, left_out):
    """Say how, where and when numbers were made.

    `packages` are named with their versions where they are installed, `budget` says
    what the run was held to, and `left_out` why methods were not run.
    """
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if "model name" in line]
    known = []
    for name in packages:
        try:
            known.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    gone = "".join(f"\nLeft out: {name} ({why}).\n" for name, why in left_out.items())
    return (
        f"`python benchmarks/{script} {shlex.join(sys.argv[1:])}`\n\n"
        f"{date.today()}; {models[0] if models else platform.machine()}, one thread; "
        f"Python {platform.python_version()}, {', '.join(known)}; "
        f"{budget}.\n"
        f"{gone}"
    )


def markdown(header, rows):
    """Return a markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
