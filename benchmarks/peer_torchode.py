"""torchode: a step size per row.

Not scripted: with torch 2.13, `torch.jit.script` of its solvers ends in an internal
assertion. `BacksolveAdjoint` carries a parameter gradient per row through every stage
and is slower by a factor that grows with the rows, hence only small cases.
"""

import torch
import torchode
from contest import Case, Contestant, Run
from torch import Tensor, nn
from torch.nn import functional as F

from skode._nn.fields import MLPField


class RowTimes(nn.Module):
    """The field f(t, y) of a time per row; also of one row alone, for vmap."""

    def __init__(self, field: MLPField) -> None:
        super().__init__()
        self.field = field

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        field, t = self.field, t.unsqueeze(-1)
        layers = list(zip(field.weights, field.biases, field.shifts, strict=True))
        for weight, bias, shift in layers[:-1]:
            y = torch.tanh(torch.addcmul(F.linear(y, weight, bias), t, shift))
        weight, bias, shift = layers[-1]
        return torch.addcmul(F.linear(y, weight, bias), t, shift)


def _parts(case: Case):
    term = torchode.ODETerm(RowTimes(case.field), with_stats=False)
    controller = torchode.IntegralController(atol=case.tol, rtol=case.tol, term=term)
    return term, torchode.Dopri5(term=term), controller


def _last(case: Case, solver: nn.Module):
    solver = solver.to(case.y0.device)
    ends = case.span.expand(len(case.y0), 2).contiguous()

    def last():
        problem = torchode.InitialValueProblem(case.y0, ends[:, 0], ends[:, 1])
        return solver.solve(problem).ys[:, -1]

    return last


def _autodiff(case: Case):
    # As everybody else: step sizes carry no gradient.
    _, *parts = _parts(case)
    solver = torchode.AutoDiffAdjoint(*parts, backprop_through_step_size_control=False)
    return _last(case, solver)


def forward(case: Case) -> Run:
    return case.forward(_autodiff(case))


def gradient(case: Case) -> Run:
    return case.gradient(_autodiff(case))


def backsolve(case: Case) -> Run:
    return case.gradient(_last(case, torchode.BacksolveAdjoint(*_parts(case))))


FORWARD = [Contestant("torchode", forward)]
GRADIENT = [
    Contestant("torchode", gradient),
    Contestant("torchode backsolve", backsolve, most_rows=32),
]
