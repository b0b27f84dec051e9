"""The examples run, each in a process of its own, and draw their picture.

`make quickstart` runs the quickstart.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("plot_*.py"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "example",
    [path for path in EXAMPLES if path.stem != "plot_quickstart"],
    ids=lambda path: path.stem,
)
def test_the_example_draws_its_picture(example, tmp_path):
    picture = tmp_path / "picture.png"
    command = [sys.executable, "-W", "error", str(example), str(picture)]
    here = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, env=here, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert min(imread(picture).shape[:2]) > 300
