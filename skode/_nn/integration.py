"""How a fitted net is solved."""

from dataclasses import dataclass


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
