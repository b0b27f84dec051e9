"""Vector fields f(t, y). A rows, D state, H hidden, n slots of a kernel.

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

from skode._engine.layers import Layers

Tensors = tuple[Tensor, ...]
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

    def own_kernel(self, params: Sequence[Tensor]) -> "MLPKernel | None":
        """Return this field's kernel if `params` are its own parameters."""
        layers = self.own_layers(params)
        if layers is None:
            return None
        return MLPKernel(layers.params, self.activation, trained=bool(params))

    def own_layers(self, params: Sequence[Tensor]) -> Layers | None:
        """Return this field as data if `params` are its own parameters, or none.

        None too where data would not be all of it: a forward of its own, hooks, or
        weights that are computed from other parameters.
        """
        hooks = self._forward_hooks or self._forward_pre_hooks
        if type(self).forward is not MLPField.forward or hooks:
            return None
        weights, biases, shifts = map(owned, (self.weights, self.biases, self.shifts))
        if not len(weights) == len(biases) == len(shifts):
            return None
        layers = Layers(weights, biases, shifts, self.activation)
        if params and [*map(id, params)] != [*map(id, layers.params)]:
            return None
        return layers


def owned(layers: nn.ParameterList) -> Tensors:
    """Return the list's parameters; iterating it looks each up by its name, slowly."""
    named = layers._parameters
    return tuple(x for name, x in named.items() if x is not None and name.isdigit())


class MLPKernel:
    """Evaluations and vector-Jacobian products of an `MLPField` for one solve.

    Parameters
    ----------
    trained : bool
        Whether the parameters get a gradient.
    """

    bounded = True

    def __init__(
        self, params: Sequence[Tensor], activation: str, trained: bool
    ) -> None:
        self._trained = trained
        depth = len(params) // 3
        self._weights, self._shifts = params[:depth], params[2 * depth :]
        self._widths = tuple(weight.shape[0] for weight in self._weights)
        self._layers: list[Layer] = [
            (bias, shift, weight.T)
            for weight, bias, shift in zip(
                self._weights, params[depth : 2 * depth], self._shifts, strict=True
            )
        ]
        self._activation = _ACTIVATIONS[activation]
        self._times: tuple[Tensor, ...] = ()
        self._hidden: list[Tensor] = []
        self._rows = -1  # of the hidden layers' memory
        self._memory: _Memory | None = None
        self._sums: list[tuple[Tensor, Tensor]] | None = None

    def begin(self, times: Tensor) -> None:
        """Announce the times (n, A)."""
        check_dtype(times, self._weights[0])
        self._times = times.unsqueeze(2).unbind()

    def evaluate(self, slot: int, y: Tensor, out: Tensor) -> None:
        """Write f(t, y) to `out` and remember nothing."""
        if y.shape[0] != self._rows:
            self._rows = y.shape[0]
            self._hidden = [y.new_empty(self._rows, w) for w in self._widths[:-1]]
        time, activate = self._times[slot], self._activation.in_place
        for layer, hidden in zip(self._layers, self._hidden, strict=False):
            affine(layer, time, y, hidden)
            activate(hidden)
            y = hidden
        affine(self._layers[-1], time, y, out)

    def begin_linear(self, times: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Begin; return where to write states and cotangents."""
        self.begin(times)
        if self._memory is None or self._memory.shape != times.shape:
            widths = (dim, *self._widths)
            self._memory = _Memory(times, widths, self._activation.keeps_slope)
        self._memory.times.copy_(times)
        return self._memory.states, self._memory.cotangents

    def linearize(self, slot: int, out: Tensor) -> None:
        """Write f(t, state) to `out` and remember the inputs of every layer."""
        memory = self._memory
        assert memory is not None, "linearize follows begin_linear"
        x, *values = memory.inputs.by_slot[slot]
        self._through(values, memory.slopes[slot], self._times[slot], x)
        if values:
            x = values[-1]
        affine(self._layers[-1], self._times[slot], x, out)

    def linearize_all(self) -> None:
        """Remember the inputs of every layer, of all slots at once."""
        memory = self._memory
        assert memory is not None, "linearize_all follows begin_linear"
        x, *values = memory.inputs.matrices
        self._through(values, memory.slope_matrices, torch.cat(self._times), x)

    def _through(
        self,
        values: Sequence[Tensor],
        slopes: Sequence[Tensor],
        time: Tensor,
        x: Tensor,
    ) -> None:
        """Fill the hidden layers' values and slopes from the state x."""
        remember = self._activation.remember
        for layer, slope, value in zip(self._layers, slopes, values, strict=False):
            # The slope's memory holds the pre-activation until it is known.
            affine(layer, time, x, slope)
            remember(slope, value)
            x = value

    def pull(self, slot: int, out: Tensor) -> None:
        """Write cotangent . df/dy to `out`; remember every layer's cotangent."""
        memory = self._memory
        assert memory is not None, "pull follows linearize"
        inputs, deltas = memory.inputs.by_slot[slot], memory.deltas.by_slot[slot]
        slopes, pull = memory.slopes[slot], self._activation.pull
        above = deltas[-1]
        for i in range(len(deltas) - 1, 0, -1):
            delta = deltas[i - 1]
            torch.mm(above, self._weights[i], out=delta)
            pull(delta, inputs[i], slopes[i - 1])
            above = delta
        torch.mm(above, self._weights[0], out=out)

    def pull_time(self, slot: int) -> Tensor:
        """Return cotangent . df/dt, (A,)."""
        assert self._memory is not None, "pull_time follows pull"
        deltas = self._memory.deltas.by_slot[slot]
        return by_time(deltas, self._shifts)

    def accumulate(self, slots: int) -> None:
        """Add the parameter gradient: two products per layer for all slots."""
        if not self._trained:
            return
        memory = self._memory
        assert memory is not None, "accumulate follows pull"
        if self._sums is None:
            self._sums = [
                (torch.zeros_like(weight), weight.new_zeros(2, len(weight)))
                for weight in self._weights
            ]
        one_and_time = memory.one_and_time
        inputs, deltas = memory.inputs.matrices, memory.deltas.matrices
        if slots < memory.shape[0]:
            rows = slots * memory.shape[1]
            one_and_time = one_and_time[:, :rows]
            inputs, deltas = [x[:rows] for x in inputs], [x[:rows] for x in deltas]
        for (weight, bias_and_shift), x, delta in zip(
            self._sums, inputs, deltas, strict=True
        ):
            weight.addmm_(delta.T, x)
            bias_and_shift.addmm_(one_and_time, delta)

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Return weights', biases' and shifts' gradients, as `parameters` orders."""
        if not self._trained:
            return ()
        sums, self._sums = self._sums, None
        if sums is None:
            return (None,) * (3 * len(self._weights))
        return (
            *(weight for weight, _ in sums),
            *(both[0] for _, both in sums),
            *(both[1] for _, both in sums),
        )


def check_dtype(times: Tensor, weight: Tensor) -> None:
    """Raise `TypeError` if a solve and the field's parameters differ in dtype."""
    if times.dtype != weight.dtype:
        raise TypeError(
            f"The field must keep the dtype of y: y is {times.dtype}, the field's "
            f"parameters are {weight.dtype}. Convert them with field.to({times.dtype})."
        )


def by_time(deltas: Sequence[Tensor], shifts: Sequence[Tensor]) -> Tensor:
    """Return cotangent . df/dt, (A,), of layers' cotangents and time shifts."""
    parts = [
        torch.mv(delta, shift) for delta, shift in zip(deltas, shifts, strict=True)
    ]
    return torch.stack(parts).sum(dim=0)


Layer = tuple[Tensor, Tensor, Tensor]
"""Bias, shift and transposed weight."""


def affine(layer: Layer, time: Tensor, x: Tensor, out: Tensor) -> None:
    """Write b + t u + x W to `out`, for times (rows, 1)."""
    bias, shift, weight = layer
    torch.addcmul(bias, time, shift, out=out)
    out.addmm_(x, weight)


class _Blocks:
    """For each of some layers, memory (n, A, width), and its views."""

    def __init__(self, times: Tensor, widths: Sequence[int]) -> None:
        self.blocks = [times.new_empty(*times.shape, width) for width in widths]
        self.matrices = [block.flatten(0, 1) for block in self.blocks]
        self.by_slot: list[tuple[Tensor, ...]] = list(
            zip(*(block.unbind() for block in self.blocks), strict=True)
        )


class _Memory:
    """What the slots of a kernel hold: inputs and cotangents of every layer."""

    def __init__(self, times: Tensor, widths: Sequence[int], keeps_slope: bool) -> None:
        self.shape = times.shape
        self.inputs = _Blocks(times, widths[:-1])
        self.deltas = _Blocks(times, widths[1:])
        # An activation whose slope is known from its value is computed in place.
        self.slopes = [inputs[1:] for inputs in self.inputs.by_slot]
        self.slope_matrices = self.inputs.matrices[1:]
        if keeps_slope and len(widths) > 2:
            slopes = _Blocks(times, widths[1:-1])
            self.slopes, self.slope_matrices = slopes.by_slot, slopes.matrices
        self.states, self.cotangents = self.inputs.blocks[0], self.deltas.blocks[-1]
        self.one_and_time = times.new_ones(2, times.numel())
        self.times = self.one_and_time[1].view(times.shape)


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
