"""Batched ODE solvers in which every row steps on its own."""
