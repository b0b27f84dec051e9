"""A state of any shape as one row of numbers.

B rows (one, but in the adjoint's quadrature), T times, N numbers of state.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

State = Tensor | tuple[Tensor, ...]
Field = Callable[[Tensor, State], State]
"""func(t, y) with t a scalar tensor."""


class Layout:
    """A state of any shape as one row of numbers."""

    def __init__(self, func: Field, y0: State) -> None:
        self.func = func
        self._alone = isinstance(y0, Tensor)
        states = (y0,) if isinstance(y0, Tensor) else y0
        self._shapes = [y.shape for y in states]
        self._sizes = [y.numel() for y in states]
        self.parts = () if self._alone else tuple(size for size in self._sizes if size)
        self.row = torch.cat([y.reshape(-1) for y in states])[None]
        """(1, N)."""

    def field(self, t: Tensor, y: Tensor) -> Tensor:
        """Return dy/dt (B, N) at times (B,) and states (B, N)."""
        if not y.requires_grad:
            y = y.clone()  # the engine's memory, and func may keep what it is given
        if len(y) == 1:  # nothing to stack, in all but the adjoint's quadrature
            return self._slope(t[0], y)
        rows = zip(t, y.split(1), strict=True)
        return torch.cat([self._slope(time, row) for time, row in rows])

    def _slope(self, t: Tensor, row: Tensor) -> Tensor:
        """Return dy/dt (1, N) at one time () and a state (1, N)."""
        if self._alone:
            y = row.view(self._shapes[0])
            return _like(self.func(t, y), y).reshape(row.shape)
        state = self._shaped(row[0], ())
        slopes = self.func(t, state)
        if not isinstance(slopes, (tuple, list)) or len(slopes) != len(state):
            raise ValueError(
                f"func must return a tuple of {len(state)} derivatives, as y0 is a "
                f"tuple of {len(state)} tensors."
            )
        pairs = zip(slopes, state, strict=True)
        return torch.cat([_like(slope, y).reshape(-1) for slope, y in pairs])[None]

    def unpack(self, ys: Tensor) -> State:
        """Return states of the caller's shapes from (1, T, N)."""
        flat, lead = ys[0], (ys.shape[1],)
        if self._alone:
            return flat.reshape((*lead, *self._shapes[0]))
        return self._shaped(flat, lead)

    def _shaped(self, flat: Tensor, lead: tuple[int, ...]) -> tuple[Tensor, ...]:
        parts = flat.split(self._sizes, dim=-1)
        return tuple(
            part.reshape((*lead, *shape))
            for part, shape in zip(parts, self._shapes, strict=True)
        )


def _like(slope: Any, y: Tensor) -> Tensor:
    """Return a derivative of y in its dtype and shape; numbers broadcast.

    Raises
    ------
    TypeError, ValueError
        If it is none.
    """
    if not isinstance(slope, Tensor):
        raise TypeError(
            f"func must return a tensor, or a tuple of them if y0 is one, not "
            f"{type(slope).__name__}."
        )
    dy: Tensor = slope if slope.dtype == y.dtype else slope.to(y.dtype)
    if dy.shape == y.shape:
        return dy
    if [n for n in dy.shape if n != 1] == [n for n in y.shape if n != 1]:
        return dy.reshape(y.shape)
    if dy.ndim == 0:
        return dy.expand_as(y)
    raise ValueError(
        f"func must return a derivative of y's shape, {tuple(y.shape)}, got "
        f"{tuple(dy.shape)}."
    )
