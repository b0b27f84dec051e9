"""Modules of kernels are collected where Triton is installed."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("triton") else ["skode/_engine/tiles/*.py"]
