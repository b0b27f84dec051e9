"""torchdiffeq: one step size for the whole batch."""

from collections.abc import Callable
from functools import partial

import torch
from contest import Case, Contestant, Run
from torch import Tensor, nn
from torch.nn import functional as F
from torchdiffeq import odeint, odeint_adjoint

from skode._nn.fields import MLPField


class SharedTime(nn.Module):
    """The field f(t, y) of one time for all rows, which then enters by the biases."""

    def __init__(self, field: MLPField) -> None:
        super().__init__()
        self.field = field
        self.calls = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        field = self.field
        layers = list(zip(field.weights, field.biases, field.shifts, strict=True))
        for weight, bias, shift in layers[:-1]:
            y = torch.tanh(F.linear(y, weight, torch.addcmul(bias, t, shift)))
        weight, bias, shift = layers[-1]
        return F.linear(y, weight, torch.addcmul(bias, t, shift))


def last_state(case: Case, function: Callable, **options) -> Callable[[], Tensor]:
    field = SharedTime(case.field)
    tols = {"rtol": case.tol, "atol": case.tol}

    def last():
        ys = function(field, case.y0, case.span, method="dopri5", **tols, **options)
        return ys[-1]

    return last


def forward(case: Case) -> Run:
    return case.forward(last_state(case, odeint))


def gradient(case: Case, function: Callable = odeint, **options) -> Run:
    return case.gradient(last_state(case, function, **options))


def evaluations(case: Case) -> int:
    """Return how often one solve evaluates the field."""
    field = SharedTime(case.field)
    tols = {"rtol": case.tol, "atol": case.tol}
    with torch.no_grad():
        odeint(field, case.y0, case.span, method="dopri5", **tols)
    return field.calls


_seminorm = partial(
    gradient, function=odeint_adjoint, adjoint_options={"norm": "seminorm"}
)
FORWARD = [Contestant("odeint", forward)]
GRADIENT = [
    Contestant("odeint", gradient),
    Contestant("odeint_adjoint", partial(gradient, function=odeint_adjoint)),
    Contestant("odeint_adjoint seminorm", _seminorm),
]
