"""The gradient of the computed solution, and all that it has to reach.

Our engine passes it step by step where it knows every tensor that the field's gradient
reaches, and by autograd through every operation where it does not. N numbers of state,
T times.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from skode._engine.solve import solve
from skode._odeint.call import Call, Step
from skode._odeint.failure import require_success
from skode._odeint.kept import KeptField, Reached
from skode._odeint.layout import Layout

RowField = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Discrete:
    """A solve by our engine, whose gradient is that of the computed solution."""

    layout: Layout
    t: Tensor
    call: Call
    step: Step

    def solve(self) -> Tensor:
        """Return the states (1, T, N)."""
        field, row, func = self.layout.field, self.layout.row, self.layout.func
        if not torch.is_grad_enabled():
            return self._solve(field, row, "checkpoint")
        params: tuple[Tensor, ...] = ()
        if isinstance(func, nn.Module):
            params = tuple(param for param in func.parameters() if param.requires_grad)
        visible = any(x.requires_grad for x in (row, self.t, *params))
        # A hook is to see a parameter's gradient once, and whole.
        hooked = any(param._backward_hooks for param in params)
        if visible and (hooked or not isinstance(func, nn.Module)):
            return self._solve(field, row, "backprop")
        try:
            if visible:
                kept = KeptField(self.layout, params)
                return self._solve(kept, row, "checkpoint", params)
            return self._solve(self._watched, row, "checkpoint")
        except Reached:
            # What needs a gradient is out of our sight, and not of autograd's, which
            # looks where the state needs one.
            if not row.requires_grad:
                row = row.detach().requires_grad_()
            return self._solve(field, row, "backprop")

    def _watched(self, t: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            slope = self.layout.field(t, y)
        if slope.requires_grad:
            raise Reached
        return slope

    def _solve(
        self,
        field: RowField,
        row: Tensor,
        gradient: str,
        params: tuple[Tensor, ...] = (),
    ) -> Tensor:
        solution = solve(
            field,
            row,
            self.t,
            params=params,
            method=self.call.method,
            rtol=float(self.call.rtol),
            atol=float(self.call.atol),
            gradient=gradient,
            parts=self.layout.parts,
            max_steps=self.step.max_steps,
            first_step=self.step.first_step,
        )
        return require_success(solution)
