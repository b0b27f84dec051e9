"""What compiled code is passed: the structures of `cpp/spec.hpp`, member by member.

They hold addresses of what Python keeps: whoever passes one holds on to `held`.
"""

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from skode._engine.layers import Layers
from skode._engine.tableau import Tableau, coefficients

REAL = {torch.float32: "float", torch.float64: "double"}
"""The types that there is compiled code for."""

MOST_STAGES = 16
OUT_OF_MEMORY = 2

# Formats of `struct`.
NETWORK = "4P q P 3q"
METHOD = "5P 3q d"
GRADIENTS = "4P"

_WORTH_A_THREAD = 2**18
"""Multiplications of one evaluation of its rows; a thread takes 30 us to start."""


class Packed(NamedTuple):
    """The members of a structure, and what they point to."""

    members: tuple[float, ...]
    held: tuple[object, ...]


def network(layers: Layers) -> Packed:
    """Return the layers as C++ reads them."""
    groups = [
        [x.resolve_neg().contiguous() for x in group]
        for group in (layers.weights, layers.biases, layers.shifts)
    ]
    addresses = [addresses_of(group) for group in groups]
    widths, flow = array("q", layers.widths), layers.quadratures
    trace = None if flow is None else flow.trace.detach().contiguous()
    members = (
        *map(address_of, addresses),
        address_of(widths),
        len(layers.weights),
        *((0, 0, 0) if trace is None else (trace.data_ptr(), *trace.shape)),
        flow is not None and flow.energy,
    )
    return Packed(members, (groups, addresses, widths, trace))


def method(tableau: Tableau, device: torch.device) -> Packed:
    """Return a tableau as C++ reads it."""
    coef = coefficients(tableau, torch.float64, torch.float64, device)
    tables = (coef.a_square, coef.b, coef.b_err, coef.c, coef.dense)
    members = (
        *(table.data_ptr() if table.numel() else 0 for table in tables),
        coef.stages,
        coef.order,
        len(coef.dense),
        coef.error_constant,
    )
    return Packed(members, (coef,))


class Gradients(NamedTuple):
    """Where C++ adds the gradient of the layers' parameters, and of M; or nowhere."""

    params: tuple[Tensor, ...]
    """Weights', biases' and shifts'."""
    trace: Tensor | None
    packed: Packed

    @classmethod
    def zeros(cls, layers: Layers, like: Tensor) -> "Gradients":
        """Return memory, in the type of `like`."""
        widths = layers.widths
        inputs, outputs = widths[:-1], widths[1:]
        shapes = list(zip(outputs, inputs, strict=True))
        sizes = [n * m for n, m in shapes] + [*outputs, *outputs]
        parts = like.new_zeros(sum(sizes)).split(sizes)
        depth, flow = len(shapes), layers.quadratures
        weights = (x.view(n) for x, n in zip(parts[:depth], shapes, strict=True))
        params = (*weights, *parts[depth:])
        trace = None if flow is None else like.new_zeros(flow.trace.shape)
        groups = [addresses_of(params[n * depth : (n + 1) * depth]) for n in range(3)]
        at = 0 if trace is None else trace.data_ptr()
        packed = Packed((*map(address_of, groups), at), (groups,))
        return cls(params, trace, packed)


UNWANTED = Gradients((), None, Packed((0, 0, 0, 0), ()))
"""Those of parameters that want none."""


def addresses_of(tensors: Sequence[Tensor]) -> "array[int]":
    """Return where tensors lie."""
    return array("Q", [x.data_ptr() for x in tensors])


def address_of(stored: "array[Any]") -> int:
    """Return where an array lies."""
    return stored.buffer_info()[0]


def multiplications(layers: Layers) -> int:
    """Return how many one evaluation of one row takes."""
    flow = layers.quadratures
    trace = 0 if flow is None else flow.trace.numel()
    return trace + sum(weight.numel() for weight in layers.weights)


def threads(layers: Layers, rows: int, tile: int) -> int:
    """Return how many threads pay: no more than tiles, and than PyTorch would take."""
    work = rows * multiplications(layers)
    most = min(torch.get_num_threads(), -(-rows // tile), work // _WORTH_A_THREAD)
    return max(1, most)
