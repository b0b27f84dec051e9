"""Encoder -> solve -> head. B rows, F features, D state, T times, O outputs."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from skode._engine.solution import Solution
from skode._nn.fields import MLPField
from skode._nn.integration import Integration

__all__ = ["ODENet", "build"]

FieldFactory = Callable[[int], nn.Module]
"""Called with the width of the state; returns a module f(t, y)."""


class ZeroAugment(nn.Module):
    """Append zeros to the features (Dupont, Doucet & Teh 2019, arXiv:1904.01681)."""

    def __init__(self, n_features: int, width: int) -> None:
        super().__init__()
        self._extra = width - n_features

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, D)."""
        return F.pad(x, (0, self._extra))


class ODENet(nn.Module):
    """A residual network of continuous depth, from t = 0 to t = 1.

    Parameters
    ----------
    encoder : Module
        (B, F) -> (B, D).
    field : Module
        f(t, y) with t (B,) and y (B, D).
    head : Module
        (B, D) -> (B, O).
    """

    def __init__(self, encoder: nn.Module, field: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.field = field
        self.head = head

    def forward(self, x: Tensor, how: Integration) -> Tensor:
        """Return outputs (B, O)."""
        outputs: Tensor = self.head(self.final_state(x, how))
        return outputs

    def final_state(self, x: Tensor, how: Integration) -> Tensor:
        """Return the state at t = 1, (B, D)."""
        return self.trajectory(x, x.new_tensor([0.0, 1.0]), how)[:, -1]

    def trajectory(self, x: Tensor, times: Tensor, how: Integration) -> Tensor:
        """Return the states at `times` (T,), the first of which is 0: (B, T, D)."""
        return self._solve(x, times, how).ys

    def evaluations(self, x: Tensor, how: Integration) -> Tensor:
        """Return the evaluations of the field that each row takes, (B,)."""
        return self._solve(x, x.new_tensor([0.0, 1.0]), how).stats.nfe

    def _solve(self, x: Tensor, times: Tensor, how: Integration) -> Solution:
        params = tuple(self.field.parameters())
        return how.solve(self.field, self.encoder(x), times, params)


def build(
    n_features: int,
    n_outputs: int,
    *,
    encoder: str,
    width: int,
    hidden: tuple[int, ...],
    activation: str,
    field: FieldFactory | None,
) -> ODENet:
    """Return an untrained net; draws from torch's global generator.

    Raises
    ------
    TypeError
        If `field` does not return a module.
    ValueError
        If zero augmentation has no room for the features.
    """
    enter: nn.Module
    if encoder == "linear":
        enter = nn.Linear(n_features, width)
    elif width < n_features:
        raise ValueError(
            f"encoder='augment' appends zeros to the {n_features} features, so "
            f"state_size must be at least {n_features}, got {width}."
        )
    else:
        enter = ZeroAugment(n_features, width)
    inner = _field(field, width, hidden, activation)
    return ODENet(enter, inner, nn.Linear(width, n_outputs))


def _field(
    factory: FieldFactory | None, width: int, hidden: tuple[int, ...], activation: str
) -> nn.Module:
    if factory is None:
        return MLPField(width, hidden, activation)
    # A module is callable too, but not with a width.
    made = factory if isinstance(factory, nn.Module) else factory(width)
    if made is factory or not isinstance(made, nn.Module):
        raise TypeError(
            "field must be a callable that takes the width of the state and returns a "
            "torch.nn.Module with forward(t, y), such as the class of your module, "
            f"got {made!r:.100}."
        )
    return made
