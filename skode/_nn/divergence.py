"""The trace of df/dy of a perceptron. A rows, D state, H hidden, P tangents.

With slopes d_l of the hidden layers, df/dy = W_L diag(d_{L-1}) ... diag(d_1) W_1. For
one hidden layer its trace is d_1 . diag(W_1 W_2), and for two it is d_2^T M d_1 with
M = W_2 o (W_1 W_3)^T: a matrix that is formed once for all rows, so that the exact
trace costs one more layer, whatever D is. Deeper perceptrons push tangents through:
those of all axes give the exact trace in D passes at once (forward mode), a few random
ones an estimate (Hutchinson 1989, doi:10.1080/03610918908812806).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

CLOSED_FORM = (0, 1, 2)
"""Numbers of hidden layers with a trace in closed form."""


def closed_form(weights: Sequence[Tensor], slopes: Sequence[Tensor]) -> Tensor:
    """Return the trace (A,), or () if no row differs from another.

    Parameters
    ----------
    weights : sequence of Tensor
        Two or three matrices (out, in), or one (D, D) of a linear field; the first may
        have more inputs than D, which the field does not move.
    slopes : sequence of Tensor of shape (A, H)
        Of the hidden layers.
    """
    m = trace_weights(weights)
    if not slopes:
        return m[0, 0]
    if len(slopes) == 1:
        return slopes[0] @ m[0]
    return ((slopes[0] @ m.T) * slopes[1]).sum(dim=1)


def trace_weights(weights: Sequence[Tensor]) -> Tensor:
    """Return M of the trace d_2^T M d_1: see `skode._engine.layers.Quadratures`.

    (H_2, H_1), where a layer that is not there counts as one of width 1.
    """
    first, last = weights[0][:, : weights[-1].shape[0]], weights[-1]
    if len(weights) == 1:
        return torch.trace(first)[None, None]
    if len(weights) == 2:
        return (first * last.T).sum(dim=1)[None]  # diag(W_1 W_2)
    return weights[1] * (first @ last).T


def pushed(
    weights: Sequence[Tensor], slopes: Sequence[Tensor], tangents: Tensor
) -> Tensor:
    """Return df/dy v of every tangent v, (A, P, D), or (P, D) if no row differs.

    Parameters
    ----------
    weights, slopes
        As for `closed_form`, of any number.
    tangents : Tensor of shape (P, D)
        The same for all rows.
    """
    dim = weights[-1].shape[0]
    moved = tangents @ weights[0][:, :dim].T  # (P, H), and (A, P, H) from here on
    for slope, weight in zip(slopes, weights[1:], strict=True):
        moved = (slope[:, None] * moved) @ weight.T
    return moved


def along(
    weights: Sequence[Tensor], slopes: Sequence[Tensor], tangents: Tensor
) -> Tensor:
    """Return v . df/dy v of every tangent v, (A, P), or (P,) if no row differs."""
    return (pushed(weights, slopes, tangents) * tangents).sum(dim=-1)


def axes(dim: int, like: Tensor) -> Tensor:
    """Return the tangents whose sum of `along` is the exact trace."""
    return torch.eye(dim, dtype=like.dtype, device=like.device)


def rademacher(
    probes: int, dim: int, generator: torch.Generator, like: Tensor
) -> Tensor:
    """Return tangents of random signs, (P, D): `along` them estimates the trace."""
    signs = torch.randint(0, 2, (probes, dim), generator=generator)
    return (2 * signs - 1).to(like)
