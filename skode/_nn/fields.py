"""Vector fields f(t, y). B rows, D state, H hidden, S slots of a kernel.

`MLPField` differentiates itself: its kernel evaluates the field and pulls cotangents
back in preallocated memory, without autograd, and forms the parameter gradient of all
stages of a step in one matrix product per layer.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS = ("tanh", "softplus", "silu", "relu")


class MLPField(nn.Module):
    """A multilayer perceptron in y whose every layer is shifted by time.

    Layer l computes ``W_l x + b_l + t u_l``: time costs one vector per layer and
    widens no matrix. The last layer is linear.

    Parameters
    ----------
    dim : int
        Width of the state.
    hidden : sequence of int
        Widths of the hidden layers; empty for a linear field.
    activation : {"tanh", "softplus", "silu", "relu"}, default="tanh"
        Between layers. Smooth ones let the solver take long steps.
    """

    def __init__(self, dim: int, hidden: Sequence[int], activation: str = "tanh"):
        super().__init__()
        widths = (dim, *hidden, dim)
        self.activation = activation
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        self.shifts = nn.ParameterList()
        for fan_in, fan_out in pairwise(widths):
            weight = torch.empty(fan_out, fan_in)
            nn.init.xavier_uniform_(weight)
            self.weights.append(nn.Parameter(weight))
            bound = 1 / math.sqrt(fan_in)
            self.biases.append(
                nn.Parameter(torch.empty(fan_out).uniform_(-bound, bound))
            )
            self.shifts.append(
                nn.Parameter(torch.empty(fan_out).uniform_(-bound, bound))
            )

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """Return dy/dt, (B, D), at times (B,) and states (B, D)."""
        time = t[:, None]
        activate = _ACTIVATIONS[self.activation].forward
        layers = list(zip(self.weights, self.biases, self.shifts, strict=True))
        for weight, bias, shift in layers[:-1]:
            y = activate(F.linear(y, weight, bias) + time * shift)
        weight, bias, shift = layers[-1]
        slope: Tensor = F.linear(y, weight, bias) + time * shift
        return slope

    def kernel(self, params: Sequence[Tensor], slots: int) -> "MLPKernel | None":
        """Return this field's kernel if `params` are its own parameters."""
        own = tuple(self.parameters())
        if params and [id(p) for p in params] != [id(p) for p in own]:
            return None
        return MLPKernel(self, slots)


class MLPKernel:
    """Evaluations and vector-Jacobian products of an `MLPField` for one solve."""

    def __init__(self, field: MLPField, slots: int) -> None:
        self._weights = [weight.detach() for weight in field.weights]
        self._biases = [bias.detach() for bias in field.biases]
        self._shifts = [shift.detach() for shift in field.shifts]
        *self._hidden, self._last = zip(
            self._biases,
            self._shifts,
            [weight.T for weight in self._weights],
            strict=True,
        )
        self._activation = _ACTIVATIONS[field.activation]
        self._slots = slots
        self._scratch: list[Tensor] = []
        self._rows = -1  # of the scratch memory in use
        self._in_use: list[Tensor] = []
        self._memory: _Memory | None = None
        self._sums: list[tuple[Tensor, Tensor]] | None = None

    def evaluate(self, slot: int, t: Tensor, y: Tensor, out: Tensor) -> None:
        """Write f(t, y) to `out` and remember nothing."""
        if y.shape[0] != self._rows:
            self._resize(y)
        time = t.unsqueeze(1)
        activate = self._activation.in_place
        for layer, hidden in zip(self._hidden, self._in_use, strict=True):
            _affine(layer, time, y, hidden)
            activate(hidden)
            y = hidden
        _affine(self._last, time, y, out)

    def linearize(self, slot: int, t: Tensor, y: Tensor, out: Tensor) -> None:
        """Write f(t, y) to `out` and remember the inputs of every layer."""
        memory = self._remembered(y)
        memory.times[slot].copy_(t)
        inputs = memory.inputs[slot]
        x = inputs[0].copy_(y)
        time = t.unsqueeze(1)
        remember = self._activation.remember
        for layer, slope, value in zip(
            self._hidden, memory.slopes[slot], inputs[1:], strict=True
        ):
            # The slope's memory holds the pre-activation until it is known.
            _affine(layer, time, x, slope)
            remember(slope, value)
            x = value
        _affine(self._last, time, x, out)

    def pull(self, slot: int, cotangent: Tensor, out: Tensor) -> None:
        """Write cotangent . df/dy to `out`; remember every layer's cotangent."""
        memory = self._memory
        assert memory is not None, "pull follows linearize"
        inputs, deltas = memory.inputs[slot], memory.deltas[slot]
        slopes, pull = memory.slopes[slot], self._activation.pull
        above = deltas[-1].copy_(cotangent)
        for i in range(len(deltas) - 1, 0, -1):
            delta = deltas[i - 1]
            torch.mm(above, self._weights[i], out=delta)
            pull(delta, inputs[i], slopes[i - 1])
            above = delta
        torch.mm(above, self._weights[0], out=out)

    def pull_time(self, slot: int) -> Tensor:
        """Return cotangent . df/dt, (B,)."""
        assert self._memory is not None, "pull_time follows pull"
        parts = [
            torch.mv(delta, shift)
            for delta, shift in zip(
                self._memory.deltas[slot], self._shifts, strict=True
            )
        ]
        return torch.stack(parts).sum(dim=0)

    def accumulate(self, slots: int) -> None:
        """Add the parameter gradient: two products per layer for all slots."""
        memory = self._memory
        assert memory is not None, "accumulate follows pull"
        if self._sums is None:
            self._sums = [
                (torch.zeros_like(weight), weight.new_zeros(2, len(weight)))
                for weight in self._weights
            ]
        inputs, deltas, one_and_time = memory.first(slots)
        for (weight, bias_and_shift), x, delta in zip(
            self._sums, inputs, deltas, strict=True
        ):
            weight.addmm_(delta.T, x)
            bias_and_shift.addmm_(one_and_time, delta)

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Return weights', biases' and shifts' gradients, as `parameters` orders."""
        if self._sums is None:
            return (None,) * (3 * len(self._weights))
        return (
            *(weight for weight, _ in self._sums),
            *(both[0] for _, both in self._sums),
            *(both[1] for _, both in self._sums),
        )

    def _resize(self, y: Tensor) -> None:
        """View the scratch memory as that of the rows of y."""
        rows = y.shape[0]
        if rows > max(self._rows, 0) and not (
            self._scratch and self._scratch[0].shape[0] >= rows
        ):
            self._scratch = [y.new_empty(rows, len(b)) for b in self._biases[:-1]]
        self._in_use = [hidden[:rows] for hidden in self._scratch]
        self._rows = rows

    def _remembered(self, y: Tensor) -> "_Memory":
        memory, rows = self._memory, y.shape[0]
        if memory is None or memory.capacity < rows:
            widths = [weight.shape[1] for weight in self._weights]
            keeps = self._activation.keeps_slope
            self._memory = memory = _Memory(self._slots, y, widths, keeps)
        if memory.rows != rows:
            memory.resize(rows)
        return memory


_Layer = tuple[Tensor, Tensor, Tensor]
"""Bias, shift and transposed weight."""


def _affine(layer: _Layer, time: Tensor, x: Tensor, out: Tensor) -> None:
    bias, shift, weight = layer
    torch.addcmul(bias, time, shift, out=out)
    out.addmm_(x, weight)


class _Memory:
    """What the slots of a kernel hold, for up to a capacity of rows.

    Slots of fewer rows lie densely, so that the first slots are one matrix. Views are
    made once for each number of rows: they cost as much as arithmetic on small ones.
    """

    def __init__(
        self, slots: int, y: Tensor, widths: Sequence[int], keeps_slope: bool
    ) -> None:
        self._slots, self.capacity = slots, y.shape[0]
        self._widths = tuple(widths)
        self._out = (*self._widths[1:], y.shape[1])
        self._keeps_slope = keeps_slope

        def flat(width: int) -> Tensor:
            return y.new_empty(slots * self.capacity * width)

        self._flat_inputs = [flat(width) for width in self._widths]
        self._flat_deltas = [flat(width) for width in self._out]
        # An activation whose slope is known from its value is computed in place.
        self._flat_slopes = (
            [flat(width) for width in self._widths[1:]]
            if keeps_slope
            else self._flat_inputs[1:]
        )
        self._flat_times = y.new_ones(2, slots * self.capacity)
        self.resize(self.capacity)

    def resize(self, rows: int) -> None:
        """View the memory as that of `rows` rows; contents are lost."""
        self.rows = rows
        count = self._slots * rows
        self._inputs = _matrices(self._flat_inputs, self._widths, count)
        self._deltas = _matrices(self._flat_deltas, self._out, count)
        slopes = _matrices(self._flat_slopes, self._widths[1:], count)
        self._one_and_time = self._flat_times[:, :count]
        self.inputs = self._by_slot(self._inputs)
        self.deltas = self._by_slot(self._deltas)
        self.slopes = self._by_slot(slopes)
        self.times = self._one_and_time[1].split(rows)

    def first(self, slots: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Return inputs and deltas of every layer, and [1, t], of the first slots."""
        if slots == self._slots:
            return self._inputs, self._deltas, self._one_and_time
        count = slots * self.rows
        return (
            [x[:count] for x in self._inputs],
            [x[:count] for x in self._deltas],
            self._one_and_time[:, :count],
        )

    def _by_slot(self, layers: list[Tensor]) -> list[tuple[Tensor, ...]]:
        """Turn matrices of all slots into the matrices of each slot."""
        if not layers:
            return [()] * self._slots
        return list(zip(*(x.split(self.rows) for x in layers), strict=True))


def _matrices(flat: list[Tensor], widths: Sequence[int], rows: int) -> list[Tensor]:
    return [
        x[: rows * width].view(rows, width)
        for x, width in zip(flat, widths, strict=True)
    ]


def _silu_slope(x: Tensor, out: Tensor) -> None:
    """Write silu(x) to `out` and its slope over x."""
    gate = torch.sigmoid(x)
    torch.mul(x, gate, out=out)
    # s + x s (1 - s) = s + silu(x) (1 - s)
    torch.addcmul(gate, out, 1 - gate, out=x)


def _softplus_slope(x: Tensor, out: Tensor) -> None:
    out.copy_(F.softplus(x))
    torch.sigmoid(x, out=x)


def _tanh_keep(x: Tensor, out: Tensor) -> None:
    torch.tanh_(x)  # in `out` already; its slope is known from its value


def _relu_keep(x: Tensor, out: Tensor) -> None:
    torch.relu_(x)


def _tanh_pull(delta: Tensor, value: Tensor, slope: Tensor) -> None:
    _tanh_backward(delta, value, grad_input=delta)


def _relu_pull(delta: Tensor, value: Tensor, slope: Tensor) -> None:
    delta.mul_(value > 0)


def _slope_pull(delta: Tensor, value: Tensor, slope: Tensor) -> None:
    delta.mul_(slope)


_tanh_backward = torch.ops.aten.tanh_backward.grad_input


def _silu_in_place(x: Tensor) -> Tensor:
    return F.silu(x, inplace=True)


def _softplus_in_place(x: Tensor) -> Tensor:
    return x.copy_(F.softplus(x))


@dataclass(frozen=True, slots=True)
class _Activation:
    """An activation and its derivative in preallocated memory."""

    forward: Callable[[Tensor], Tensor]
    in_place: Callable[[Tensor], Tensor]
    remember: Callable[[Tensor, Tensor], None]
    """(x, out): write the value to `out`, and the slope over x if it is kept."""
    pull: Callable[[Tensor, Tensor, Tensor], None]
    """(delta, value, slope): multiply delta by the slope."""
    keeps_slope: bool
    """If not, x and `out` of `remember` are the same memory."""


_ACTIVATIONS = {
    "tanh": _Activation(torch.tanh, torch.tanh_, _tanh_keep, _tanh_pull, False),
    "softplus": _Activation(
        F.softplus, _softplus_in_place, _softplus_slope, _slope_pull, True
    ),
    "silu": _Activation(F.silu, _silu_in_place, _silu_slope, _slope_pull, True),
    "relu": _Activation(F.relu, torch.relu_, _relu_keep, _relu_pull, False),
}
