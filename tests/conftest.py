"""One thread, no windows."""

import os

import pytest
import torch

os.environ["MPLBACKEND"] = "Agg"
torch.set_num_threads(1)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
