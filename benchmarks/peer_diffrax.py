"""diffrax, jitted: one step size for the batch ("joint"), or one per row ("vmap").

Weights and tolerances are arguments of the compiled programs, so that all cases of one
size share them. Gradients by checkpoints (`RecursiveCheckpointAdjoint`, diffrax's
default) and by the continuous adjoint (`BacksolveAdjoint`, in the seminorm, which is
the faster one). `throw=False` spares it the check of the result. Per row, backsolving
carries a parameter gradient for each row, hence only small cases.
"""

from collections.abc import Callable
from functools import partial

import diffrax
import jax
import jax.numpy as jnp
from contest import Case, Contestant, Run


def field(t, y, params):
    """Return f(t, y) for y of shape (D,) or (B, D) and one time."""
    depth = len(params) // 3
    weights, biases, shifts = params[:depth], params[depth : 2 * depth], params[-depth:]
    for i, (weight, bias, shift) in enumerate(
        zip(weights, biases, shifts, strict=True)
    ):
        y = y @ weight.T + (bias + t * shift)
        if i < depth - 1:
            y = jnp.tanh(y)
    return y


def _solve(y0, params, tol, backsolve):
    controller = diffrax.PIDController(rtol=tol, atol=tol)
    adjoint = diffrax.RecursiveCheckpointAdjoint()
    if backsolve:
        seminorm = diffrax.adjoint_rms_seminorm
        adjoint = diffrax.BacksolveAdjoint(
            stepsize_controller=diffrax.PIDController(rtol=tol, atol=tol, norm=seminorm)
        )
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Dopri5(),
        t0=0.0,
        t1=1.0,
        dt0=None,
        y0=y0,
        args=params,
        stepsize_controller=controller,
        adjoint=adjoint,
        throw=False,
    )
    return solution.ys[-1]


def _per_row(y0, params, tol, backsolve):
    return jax.vmap(lambda row: _solve(row, params, tol, backsolve))(y0)


def _loss(solver, backsolve, y0, params, tol):
    return (solver(y0, params, tol, backsolve) ** 2).sum()


def _jitted(solver: Callable, backsolve: bool | None) -> Callable:
    if backsolve is None:
        return jax.jit(lambda *case: (solver(*case, False), ()))
    return jax.jit(jax.grad(partial(_loss, solver, backsolve), argnums=(0, 1)))


def _arrays(case: Case):
    params = [jnp.asarray(param.detach().numpy()) for param in case.params]
    return jnp.asarray(case.y0.detach().numpy()), params


def _contestant(name: str, program: Callable, **limits) -> Contestant:
    def prepare(case: Case) -> Run:
        arrays, tol = _arrays(case), jnp.float32(case.tol)

        def run():
            first, rest = jax.block_until_ready(program(*arrays, tol))
            return first, *rest

        return run

    return Contestant(name, prepare, compiled=True, **limits)


FORWARD = [
    _contestant("diffrax joint", _jitted(_solve, None)),
    _contestant("diffrax vmap", _jitted(_per_row, None)),
]
GRADIENT = [
    _contestant("diffrax joint", _jitted(_solve, False)),
    _contestant("diffrax joint backsolve", _jitted(_solve, True)),
    _contestant("diffrax vmap", _jitted(_per_row, False)),
    _contestant("diffrax vmap backsolve", _jitted(_per_row, True), most_rows=32),
]


def fixed_steps(case: Case, steps: int, backsolve: bool) -> Run:
    """Return the gradient over so many equal steps, compiled already."""
    adjoint = diffrax.RecursiveCheckpointAdjoint()
    if backsolve:
        adjoint = diffrax.BacksolveAdjoint()

    def loss(y0, params):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Dopri5(),
            t0=0.0,
            t1=1.0,
            dt0=1 / steps,
            y0=y0,
            args=params,
            stepsize_controller=diffrax.ConstantStepSize(),
            adjoint=adjoint,
            max_steps=steps + 1,  # of float32: the last may be a sliver
            throw=False,
        )
        return (solution.ys[-1] ** 2).sum()

    arrays = _arrays(case)
    program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*arrays).compile()
    return lambda: jax.block_until_ready(program(*arrays))
