"""Solves in torchdiffeq itself, whose assertions become our error."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torchdiffeq
from torch import Tensor

from skode._engine.solution import Status
from skode._engine.solve import OWN
from skode._odeint.call import Call
from skode._odeint.failure import BACKWARDS, gave_up, require_all
from skode._odeint.layout import Field, State
from skode.exceptions import SolverError


def by_torchdiffeq(call: Call, func: Field, y0: State, t: Tensor, event_fn: Any) -> Any:
    """Return what torchdiffeq's `odeint` does."""
    call.require_theirs()
    with advice(call.method):
        ys = torchdiffeq.odeint(func, y0, t, event_fn=event_fn, **call.arguments)
    return ys if event_fn is not None else require_all(ys, t)


def guarded(
    run: Callable[[State, Tensor], State],
    y0: State,
    t: Tensor,
    params: Sequence[Tensor],
) -> State:
    """Return ``run(y0, t)``, whose gradient reaches `params`, with errors of ours."""
    apply: Callable[..., tuple[Tensor, ...]] = _Guarded.apply
    if isinstance(y0, Tensor):
        (ys,) = apply(lambda states, t: (run(states[0], t),), 1, y0, t, *params)
        return ys
    return apply(run, len(y0), *y0, t, *params)


class _Guarded(torch.autograd.Function):
    """torchdiffeq's adjoint, kept apart so that its failures backwards can be told."""

    @staticmethod
    def forward(ctx: Any, run: Any, count: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        states, t, params = inputs[:count], inputs[count], inputs[count + 1 :]
        with torch.enable_grad():
            apart = [x.detach().requires_grad_(x.requires_grad) for x in (*states, t)]
            ctx.ys = run(tuple(apart[:-1]), apart[-1])
        ctx.inputs = (*apart, *params)
        return tuple(y.detach() for y in ctx.ys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [x for x in ctx.inputs if x.requires_grad]
        try:
            with advice():
                found = iter(
                    torch.autograd.grad(
                        ctx.ys, wanted, grads, retain_graph=True, allow_unused=True
                    )
                )
        except SolverError as error:
            raise SolverError(
                error.reason, remedy=BACKWARDS, status=error.status
            ) from error
        some = (next(found) if x.requires_grad else None for x in ctx.inputs)
        return None, None, *some


@contextmanager
def advice(*methods: str) -> Iterator[None]:
    """Turn torchdiffeq's assertions about a solve into our error."""
    try:
        yield
    except AssertionError as error:
        for sign, status in (
            ("underflow", Status.STEP_UNDERFLOW),
            ("max_num_steps", Status.MAX_STEPS),
            ("non-finite", Status.NON_FINITE),
        ):
            if sign in str(error):
                raise gave_up(status) from error
        raise
    except ValueError as error:
        if "Invalid method" in str(error):
            raise ValueError(
                f"There is no method {' or '.join(map(repr, methods))}. skode's own: "
                f"{', '.join(OWN)}. Of torchdiffeq it says: {error}"
            ) from None
        if "must not contain infs or NaNs" in str(error):  # SciPy's Jacobian
            raise gave_up(Status.NON_FINITE) from error
        raise
