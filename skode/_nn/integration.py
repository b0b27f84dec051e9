"""How a fitted net is solved."""

from dataclasses import dataclass

from skode._engine.solution import Tolerance
from skode._engine.solve import parse_method


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
