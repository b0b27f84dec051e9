"""Triton kernels that carry tiles of rows through whole steps on chip."""
