"""Vector fields f(t, y). B rows, D state, H hidden, S slots of a kernel.

`MLPField` differentiates itself: its kernel evaluates the field and pulls cotangents
back in preallocated memory, without autograd, and forms the parameter gradient of all
stages of a step in one matrix product per layer.
"""

import math
from collections.abc import Callable, Sequence
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
        activate = _FORWARD[self.activation]
        layers = list(zip(self.weights, self.biases, self.shifts, strict=True))
        for weight, bias, shift in layers[:-1]:
            y = activate(F.linear(y, weight, bias) + time * shift)
        weight, bias, shift = layers[-1]
        return F.linear(y, weight, bias) + time * shift

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
        self._transposed = [weight.T for weight in self._weights]
        self._biases = [bias.detach() for bias in field.biases]
        self._shifts = [shift.detach() for shift in field.shifts]
        self._activation = field.activation
        self._slots = slots
        self._scratch: list[Tensor] = []
        self._memory: _Memory | None = None
        self._sums: list[list[Tensor]] | None = None

    def evaluate(self, slot: int, t: Tensor, y: Tensor, out: Tensor) -> None:
        """Write f(t, y) to `out` and remember nothing."""
        if not self._scratch or len(self._scratch[0]) < len(y):
            self._scratch = [y.new_empty(len(y), len(b)) for b in self._biases[:-1]]
        rows, time = len(y), t[:, None]
        activate = _IN_PLACE[self._activation]
        for i, hidden in enumerate(self._scratch):
            hidden = hidden[:rows]
            self._affine(i, time, y, hidden)
            activate(hidden)
            y = hidden
        self._affine(len(self._biases) - 1, time, y, out)

    def linearize(self, slot: int, t: Tensor, y: Tensor, out: Tensor) -> None:
        """Write f(t, y) to `out` and remember the inputs of every layer."""
        memory = self._remembered(y)
        memory.times[slot].copy_(t)
        memory.inputs[0][slot].copy_(y)
        time = t[:, None]
        last = len(self._biases) - 1
        remember = _REMEMBER[self._activation]
        for i in range(last):
            self._affine(i, time, memory.inputs[i][slot], memory.slopes[i][slot])
            # The slope's memory holds the pre-activation until it is known.
            remember(memory.slopes[i][slot], memory.inputs[i + 1][slot])
        self._affine(last, time, memory.inputs[last][slot], out)

    def pull(self, slot: int, cotangent: Tensor, out: Tensor) -> None:
        """Write cotangent . df/dy to `out`; remember every layer's cotangent."""
        memory = self._memory
        assert memory is not None, "pull follows linearize"
        last = len(self._biases) - 1
        pull = _PULL[self._activation]
        memory.deltas[last][slot].copy_(cotangent)
        for i in range(last, 0, -1):
            delta = memory.deltas[i - 1][slot]
            torch.mm(memory.deltas[i][slot], self._weights[i], out=delta)
            pull(delta, memory.inputs[i][slot], memory.slopes[i - 1][slot])
        torch.mm(memory.deltas[0][slot], self._weights[0], out=out)

    def pull_time(self, slot: int) -> Tensor:
        """Return cotangent . df/dt, (B,)."""
        assert self._memory is not None, "pull_time follows pull"
        parts = [
            torch.mv(delta[slot], shift)
            for delta, shift in zip(self._memory.deltas, self._shifts, strict=True)
        ]
        return torch.stack(parts).sum(dim=0)

    def accumulate(self, slots: int) -> None:
        """Add the parameter gradient: one product per layer for all slots."""
        memory = self._memory
        assert memory is not None, "accumulate follows pull"
        if self._sums is None:
            self._sums = [
                [torch.zeros_like(x) for x in group]
                for group in (self._weights, self._biases, self._shifts)
            ]
        rows = slots * memory.rows
        one_and_time = memory.one_and_time.view(2, -1)[:, :rows]
        for i, (inputs, deltas) in enumerate(
            zip(memory.inputs, memory.deltas, strict=True)
        ):
            delta = deltas.view(-1, deltas.shape[-1])[:rows]
            self._sums[0][i].addmm_(delta.T, inputs.view(-1, inputs.shape[-1])[:rows])
            both = one_and_time @ delta
            self._sums[1][i] += both[0]
            self._sums[2][i] += both[1]

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Return weights', biases' and shifts' gradients, as `parameters` orders."""
        if self._sums is None:
            return (None,) * (3 * len(self._weights))
        return tuple(gradient for group in self._sums for gradient in group)

    def _affine(self, layer: int, time: Tensor, x: Tensor, out: Tensor) -> None:
        torch.addcmul(self._biases[layer], time, self._shifts[layer], out=out)
        out.addmm_(x, self._transposed[layer])

    def _remembered(self, y: Tensor) -> "_Memory":
        memory = self._memory
        if memory is None or memory.capacity < len(y):
            widths = [weight.shape[1] for weight in self._weights]
            self._memory = memory = _Memory(self._slots, y, widths)
        if memory.rows != len(y):
            memory.resize(len(y))
        return memory


class _Memory:
    """What the slots of a kernel hold, for up to a capacity of rows.

    Slots of fewer rows lie densely, so that all slots are one matrix.
    """

    def __init__(self, slots: int, y: Tensor, widths: Sequence[int]) -> None:
        self._slots, self.capacity = slots, len(y)
        self._widths = tuple(widths)
        outputs = (*self._widths[1:], y.shape[1])
        self._flat = [
            [y.new_empty(slots * len(y) * width) for width in group]
            for group in (self._widths, outputs, self._widths[1:])
        ]
        self._flat_times = y.new_ones(2, slots * len(y))
        self.resize(len(y))

    def resize(self, rows: int) -> None:
        """View the memory as that of `rows` rows; contents are lost."""
        self.rows = rows
        count = self._slots * rows
        self.inputs, self.deltas, self.slopes = (
            [
                flat[: count * (len(flat) // (self._slots * self.capacity))].view(
                    self._slots, rows, -1
                )
                for flat in group
            ]
            for group in self._flat
        )
        self.one_and_time = self._flat_times[:, :count].view(2, self._slots, rows)
        self.times = self.one_and_time[1]


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
    torch.tanh(x, out=out)  # its slope is known from its value


def _relu_keep(x: Tensor, out: Tensor) -> None:
    torch.clamp_min(x, 0.0, out=out)


def _tanh_pull(delta: Tensor, value: Tensor, slope: Tensor) -> None:
    torch.ops.aten.tanh_backward.grad_input(delta, value, grad_input=delta)


def _relu_pull(delta: Tensor, value: Tensor, slope: Tensor) -> None:
    delta.mul_(value > 0)


def _slope_pull(delta: Tensor, value: Tensor, slope: Tensor) -> None:
    delta.mul_(slope)


_FORWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "silu": F.silu,
    "relu": F.relu,
}
_IN_PLACE = {
    "tanh": torch.tanh_,
    "softplus": lambda x: x.copy_(F.softplus(x)),
    "silu": lambda x: F.silu(x, inplace=True),
    "relu": torch.relu_,
}
_REMEMBER = {
    "tanh": _tanh_keep,
    "softplus": _softplus_slope,
    "silu": _silu_slope,
    "relu": _relu_keep,
}
_PULL = {
    "tanh": _tanh_pull,
    "softplus": _slope_pull,
    "silu": _slope_pull,
    "relu": _relu_pull,
}
