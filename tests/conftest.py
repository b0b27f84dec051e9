"""One thread, no windows, and kernels wherever they run."""

import os

import pytest
import torch

os.environ["MPLBACKEND"] = "Agg"
# Without a GPU, Triton's kernels run in its interpreter; it asks when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
