"""Losses of supervised nets: outputs and targets to one number per row.

B rows, K targets, O outputs.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]
"""(B, O), (B, K) -> (B,)."""


def cross_entropy(outputs: Tensor, codes: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Return the sum over targets of -log p(class); `sizes` are the class counts."""
    total = outputs.new_zeros(len(outputs))
    for logits, code in zip(outputs.split(sizes, dim=1), codes.T, strict=True):
        total = total + F.cross_entropy(logits, code, reduction="none")
    return total


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return half the squared error."""
    return 0.5 * (outputs - targets).square().mean(dim=1)


def absolute_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the absolute error."""
    return (outputs - targets).abs().mean(dim=1)


def huber(outputs: Tensor, targets: Tensor, delta: float) -> Tensor:
    """Return Huber's loss: quadratic up to `delta`, linear beyond."""
    return F.huber_loss(outputs, targets, reduction="none", delta=delta).mean(dim=1)


def pinball(outputs: Tensor, targets: Tensor, quantile: float) -> Tensor:
    """Return the loss that the conditional quantile minimises."""
    error = targets - outputs
    return torch.maximum(quantile * error, (quantile - 1) * error).mean(dim=1)


def gaussian(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return -log N(target; mean, variance) without its constant.

    Half of the outputs are means, the others logarithms of variances.
    """
    mean, log_variance = mean_and_log_variance(outputs)
    error = (targets - mean).square() * torch.exp(-log_variance)
    return 0.5 * (log_variance + error).mean(dim=1)


def mean_and_log_variance(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Split the outputs of a Gaussian head; variances stay within e^-12 .. e^12."""
    mean, raw = outputs.chunk(2, dim=1)
    return mean, 12.0 * torch.tanh(raw / 12.0)


def classification_loss(sizes: tuple[int, ...]) -> Loss:
    """Return the loss of targets with these numbers of classes."""
    return partial(cross_entropy, sizes=sizes)


def regression_loss(name: str, *, delta: float, quantile: float) -> Loss:
    """Return the loss of that name."""
    losses: dict[str, Loss] = {
        "squared_error": squared_error,
        "absolute_error": absolute_error,
        "huber": partial(huber, delta=delta),
        "quantile": partial(pinball, quantile=quantile),
        "gaussian": gaussian,
    }
    return losses[name]


def weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    """Return the mean of losses (B,) times weights (B,) whose own mean is 1."""
    return (losses * weights).mean()


def mean_and_std(outputs: Tensor) -> Tensor:
    """Return means and standard deviations of a Gaussian head, side by side."""
    mean, log_variance = mean_and_log_variance(outputs)
    return torch.cat((mean, torch.exp(0.5 * log_variance)), dim=1)
