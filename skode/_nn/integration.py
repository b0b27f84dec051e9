"""How a fitted net is solved."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from skode._engine.kernel import Field
from skode._engine.solution import Solution, Tolerance
from skode._engine.solve import parse_method, solve


@dataclass(frozen=True, slots=True)
class Integration:
    """How to solve; read at every call, so that a fitted net can be solved anew."""

    method: str
    rtol: float
    atol: float
    step_size: float | None
    max_steps: int
    gradient: str
    compile: bool | str

    def __post_init__(self) -> None:
        """Refuse what the engine would, before a fit that may solve only at its end."""
        Tolerance(self.rtol, self.atol, self.step_size, self.max_steps)
        parse_method(self.method, self.step_size)

    def solve(
        self, field: Field, y0: Tensor, times: Tensor, params: Sequence[Tensor]
    ) -> Solution:
        """Return the solution of every row of y0 (B, D); see `skode._engine.solve`.

        Raises
        ------
        SolverError
            If a row did not reach its last time.
        """
        return solve(
            field,
            y0,
            times,
            params=params,
            method=self.method,
            rtol=self.rtol,
            atol=self.atol,
            step_size=self.step_size,
            max_steps=self.max_steps,
            gradient=self.gradient,
            compile=self.compile,
        ).require_success()
