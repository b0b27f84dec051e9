"""One step of the reversible scheme, which carries two states. A rows, D state.

For a Runge-Kutta method with increment Psi_h(t, y) = h sum_i b_i k_i, McCallum & Foster
(2024), arXiv:2410.11648, step a pair that begins with z = y by

    y1 = lambda y + (1 - lambda) z + Psi_h(t, z)
    z1 = z - Psi_-h(t + h, y1)

and back, in exact arithmetic without an error, by

    z = z1 + Psi_-h(t + h, y1)
    y = (y1 - (1 - lambda) z - Psi_h(t, z)) / lambda.

The pair is as accurate as the method, whatever lambda. The linear map of a step has
determinant lambda: what parts the two states is damped by lambda forwards, and rounding
grows by 1 / lambda backwards. The authors keep lambda constant, so that rounding grows
without bound in the number of steps, as lambda^-n. Here

    lambda = exp(-d |h| / |t1 - t0|),    d = 8 in float32, 12 in float64,

so that over a whole solve the damping and the growth are those of exp(d), however many
the steps, and a step of length 0 is the identity. Rounding then reaches 4e-4 of the
state in float32 and 4e-11 in float64; a larger d would be more stable, and less exact.
"""

import torch
from torch import Tensor

from skode._engine.kernel import Evaluator
from skode._engine.step import Workspace, fill_stages, stage_times
from skode._engine.tableau import Coefficients

_DAMPING = {torch.float32: 8.0, torch.float64: 12.0}


def coupling(share: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return lambda and 1 - lambda, (A, 1), of steps that are `share` of the span."""
    rate = share.to(dtype)[:, None] * -_DAMPING[dtype]
    return torch.exp(rate), torch.expm1(rate).neg_()


class PairStep:
    """Steps pairs of states, in memory that it keeps for up to B rows."""

    def __init__(self, kernel: Evaluator, coef: Coefficients, y: Tensor) -> None:
        self._kernel, self._coef = kernel, coef
        self._there, self._back = Workspace(coef, y), Workspace(coef, y)

    @property
    def k(self) -> Tensor:
        """(S + 1, A, D) stages from z, the last of them f(t + h, y1)."""
        return self._there.k

    def resize(self, rows: int) -> None:
        """Step so many rows from now on."""
        self._there.resize(rows)
        self._back.resize(rows)

    def step(
        self, t: Tensor, t1: Tensor, h: Tensor, share: Tensor, y: Tensor, z: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the pair (A, D) at t1 = t + h, all (A,)."""
        kernel, coef, there, back = self._kernel, self._coef, self._there, self._back
        damped, rest = coupling(share, y.dtype)
        size = h.to(y.dtype)[:, None]
        kernel.begin(stage_times(coef, t, h, y.dtype))
        kernel.evaluate(0, z, there.slopes[0])
        fill_stages(kernel, coef, size, z, there)
        y1 = torch.addcmul(damped * y, rest, z)
        y1.addcmul_(size, _slope(coef, there))
        kernel.begin(stage_times(coef, t1, -h, y.dtype))
        kernel.evaluate(0, y1, back.slopes[0])
        there.slopes[-1].copy_(back.slopes[0])
        fill_stages(kernel, coef, -size, y1, back)
        return y1, torch.addcmul(z, size, _slope(coef, back))

    def error(self, h: Tensor) -> Tensor:
        """Return the estimate (A, D) of the local error of the last step.

        The embedded method's last stage is read at y1 rather than at z + Psi_h(t, z):
        they differ by less than the method's own error, and it costs nothing.
        """
        work = self._there
        torch.mv(work.table, self._coef.b_err, out=work.flat_state)
        return work.state.mul_(h.to(work.state.dtype)[:, None])

    def slopes(self, h: Tensor, share: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """Return stages (S + 1, A, D) with which dense output leads from y to y1.

        y + h sum_i b_i(theta) k_i ends in y + Psi_h(t, z), which y1 is not: it lacks
        -(1 - lambda) (y - z). Spread evenly over the step, that is one slope more; and
        the weights of every dense output sum to theta.
        """
        return self.k - parting_rate(h, share, y - z)


def parting_rate(h: Tensor, share: Tensor, parted: Tensor) -> Tensor:
    """Return (1 - lambda) (y - z) / h, (A, D)."""
    return parted * (coupling(share, parted.dtype)[1] / h.to(parted.dtype)[:, None])


def _slope(coef: Coefficients, work: Workspace) -> Tensor:
    """Return sum_i b_i k_i, (A, D), until the workspace is used again."""
    torch.mv(work.earlier[coef.stages], coef.b, out=work.flat_state)
    return work.state
