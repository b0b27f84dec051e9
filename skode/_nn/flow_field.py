"""The vector field of a continuous normalizing flow, and what is integrated beside it.

A rows, D state, C context, H hidden, P probes, n slots of a kernel. The engine's state
is s = (y, c, l, e, j): y moves by f, the context c stands still, l gathers the trace of
df/dy, in as many columns as there are probes; if asked for, e gathers the kinetic
energy |f|^2, and j the squared length of df/dy v for a tangent v.

`FlowField` is the perceptron; `Dynamics` is what the engine solves, or `Transport`
where no density is asked for. Dynamics with an exact trace and one or two hidden layers
differentiate themselves, in preallocated memory.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skode._engine.layers import Layers, Quadratures
from skode._nn.divergence import (
    CLOSED_FORM,
    along,
    axes,
    closed_form,
    pushed,
    trace_weights,
)
from skode._nn.fields import (
    Layer,
    affine,
    by_time,
    check_dtype,
    owned,
)

Tensors = tuple[Tensor, ...]


class FlowField(nn.Module):
    """A multilayer perceptron in y and a context, whose every layer is shifted by time.

    Layer l computes ``W_l x + b_l + t u_l``; the first one sees (y, c). The last one is
    zero at first: training starts at the identity.

    Parameters
    ----------
    dim : int
        Width of the state.
    hidden : sequence of int
        Widths of the hidden layers; empty for a linear field.
    activation : {"tanh", "softplus", "silu", "relu"}, default="tanh"
        Between layers. Smooth ones let the solver take long steps.
    context : int, default=0
        Width of the context.
    """

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int],
        activation: str = "tanh",
        context: int = 0,
    ) -> None:
        super().__init__()
        self.dim, self.context, self.activation = dim, context, activation
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        self.shifts = nn.ParameterList()
        widths = (dim + context, *hidden, dim)
        for i, (fan_in, fan_out) in enumerate(pairwise(widths)):
            # States are about one in every direction. The first layer cuts them into
            # pieces some thirds of that, anywhere the data are: wider ones are slow to
            # learn edges. The last layer moves nothing yet.
            scale, spread = (3.0, 2.0) if i == 0 else (1.0, 0.3)
            if i == len(hidden):
                scale = spread = 0.0
            scale /= math.sqrt(fan_in)
            for params, std in (
                (self.weights, torch.full((fan_out, fan_in), scale)),
                (self.biases, torch.full((fan_out,), spread)),
                (self.shifts, torch.full((fan_out,), spread)),
            ):
                params.append(nn.Parameter(torch.normal(torch.zeros_like(std), std)))

    def layers(self, t: Tensor, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return f (A, D) and the slopes of the hidden layers, of x (A, D + C)."""
        activate = _ACTIVATIONS[self.activation].plain
        time, slopes = t[:, None], []
        triples = list(zip(self.weights, self.biases, self.shifts, strict=True))
        for weight, bias, shift in triples[:-1]:
            x, slope = activate(F.linear(x, weight, bias) + time * shift)
            slopes.append(slope)
        weight, bias, shift = triples[-1]
        return F.linear(x, weight, bias) + time * shift, slopes

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return dy/dt, (A, D), at times (A,) of states and contexts (A, D + C)."""
        return self.layers(t, x)[0]


@dataclass(frozen=True)
class Dynamics:
    """The augmented vector field of one solve; see the module."""

    field: FlowField
    energy: bool = False
    """Whether the last column gathers |f|^2."""
    probes: Tensor | None = None
    """(P, D) to estimate the trace with; None: the exact trace, in one column."""
    tangent: Tensor | None = None
    """(1, D) random signs: |df/dy v|^2 has the mean |df/dy|^2, Frobenius'."""

    @property
    def traces(self) -> int:
        """How many columns gather a trace."""
        return 1 if self.probes is None else len(self.probes)

    @property
    def params(self) -> Tensors:
        """What `own_kernel` wants."""
        return tuple(self.field.parameters())

    def start(self, y: Tensor, context: Tensor | None) -> Tensor:
        """Return the engine's state (B, .), of y (B, D) and a context (B, C)."""
        known = [y] if context is None else [y, context]
        columns = self.traces + self.energy + (self.tangent is not None)
        return torch.cat([*known, y.new_zeros(len(y), columns)], dim=1)

    def split(self, s: Tensor) -> tuple[Tensor, Tensor, Tensors]:
        """Return y (B, D), traces (B, P) and further columns of the engine's state."""
        first = self.field.dim + self.field.context
        last = first + self.traces
        return s[..., : self.field.dim], s[..., first:last], s[..., last:].unbind(-1)

    def __call__(self, t: Tensor, s: Tensor) -> Tensor:
        """Return ds/dt, by operations that autograd knows."""
        field = self.field
        f, slopes = field.layers(t, s[:, : field.dim + field.context])
        columns = [f, s.new_zeros(len(s), field.context), self._traces(f, slopes)]
        if self.energy:
            columns.append(f.square().sum(dim=1, keepdim=True))
        if self.tangent is not None:
            moved = pushed(list(field.weights), slopes, self.tangent)
            squared = moved.square().sum(dim=-1)
            columns.append(squared.expand(len(f), 1))
        return torch.cat(columns, dim=1)

    def _traces(self, f: Tensor, slopes: Sequence[Tensor]) -> Tensor:
        """Return (A, P)."""
        weights = list(self.field.weights)
        if self.probes is not None:
            return along(weights, slopes, self.probes).expand(len(f), -1)
        if len(slopes) in CLOSED_FORM:
            return closed_form(weights, slopes).expand(len(f))[:, None]
        return along(weights, slopes, axes(f.shape[1], f)).sum(dim=1, keepdim=True)

    def own_kernel(self, params: Sequence[Tensor]) -> "FlowKernel | None":
        """Return the kernel of an exact trace in closed form, with hidden layers."""
        mine = self.params
        if params and [*map(id, params)] != [*map(id, mine)]:
            return None
        if not self._plain or len(self.field.weights) not in (2, 3):
            return None
        return FlowKernel(self.field, self.energy, trained=bool(params))

    def own_layers(self, params: Sequence[Tensor]) -> Layers | None:
        """Return the field as data if its trace is exact and in closed form."""
        layers = _owned_layers(self.field, params)
        if layers is None or not self._plain:
            return None
        if len(layers.weights) - 1 not in CLOSED_FORM:
            return None
        beside = Quadratures(trace_weights(layers.weights), self.energy)
        return replace(layers, quadratures=beside)

    @property
    def _plain(self) -> bool:
        return self.probes is None and self.tangent is None


@dataclass(frozen=True)
class Transport:
    """The vector field of (y, c) alone, where no density is asked for."""

    field: FlowField

    @property
    def params(self) -> Tensors:
        """What `own_layers` wants."""
        return tuple(self.field.parameters())

    def __call__(self, t: Tensor, s: Tensor) -> Tensor:
        """Return ds/dt, by operations that autograd knows."""
        f: Tensor = self.field(t, s)
        return torch.cat([f, s.new_zeros(len(s), self.field.context)], dim=1)

    def own_layers(self, params: Sequence[Tensor]) -> Layers | None:
        """Return the field as data."""
        return _owned_layers(self.field, params)


def _owned_layers(field: FlowField, params: Sequence[Tensor]) -> Layers | None:
    """Return the field as data if `params` are its own parameters, or none."""
    weights, biases, shifts = map(owned, (field.weights, field.biases, field.shifts))
    if not len(weights) == len(biases) == len(shifts):
        return None
    layers = Layers(weights, biases, shifts, field.activation)
    if params and [*map(id, params)] != [*map(id, layers.params)]:
        return None
    return layers


class FlowKernel:
    """Evaluations and vector-Jacobian products of `Dynamics` with an exact trace.

    Parameters
    ----------
    field : FlowField
        Of one or two hidden layers. Its parameters may change between passes, each of
        which starts with `begin` or `begin_linear`.
    energy : bool
        Whether |f|^2 is gathered.
    trained : bool
        Whether the parameters get a gradient.
    """

    bounded = True

    def __init__(self, field: FlowField, energy: bool, trained: bool) -> None:
        self._trained, self._energy = trained, energy
        self._dim, self._inputs = field.dim, field.dim + field.context
        self._weights = tuple(weight.detach() for weight in field.weights)
        self._shifts = tuple(shift.detach() for shift in field.shifts)
        self._layers: list[Layer] = [
            (bias.detach(), shift, weight.T)
            for weight, bias, shift in zip(
                self._weights, field.biases, self._shifts, strict=True
            )
        ]
        self._activation = _ACTIVATIONS[field.activation]
        self._times: tuple[Tensor, ...] = ()
        self._scratch: _Memory | None = None
        self._memory: _Memory | None = None
        self._sums: list[Tensor] | None = None
        self._trace_sum = torch.zeros(())

    def begin(self, times: Tensor) -> None:
        """Announce the times (n, A)."""
        check_dtype(times, self._weights[0])
        self._times = times.unsqueeze(2).unbind()
        self._trace = trace_weights(self._weights)

    def evaluate(self, slot: int, y: Tensor, out: Tensor) -> None:
        """Write ds/dt to `out` and remember nothing."""
        memory = self._scratch
        if memory is None or memory.times.shape[1] != len(y):
            memory = self._scratch = self._new_memory(y.new_empty(1, len(y)), 0)
        self._fill(memory.slots[0], self._times[slot], y, out)

    def begin_linear(self, times: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Begin; return where to write states and cotangents."""
        self.begin(times)
        if self._memory is None or self._memory.times.shape != times.shape:
            self._memory = self._new_memory(times, dim)
        self._memory.times.copy_(times)
        return self._memory.states, self._memory.cotangents

    def _new_memory(self, times: Tensor, dim: int) -> "_Memory":
        hidden = tuple(weight.shape[0] for weight in self._weights[:-1])
        return _Memory(times, dim, self._dim, hidden, self._activation.bends)

    def linearize(self, slot: int, out: Tensor) -> None:
        """Write ds/dt at the slot's state to `out` and remember the evaluation."""
        memory = self._memory
        assert memory is not None, "linearize follows begin_linear"
        state, held = memory.states[slot], memory.slots[slot]
        self._fill(held, self._times[slot], state, out)
        if self._energy:
            held.velocity.copy_(out[:, : self._dim])

    def linearize_all(self) -> None:
        """Remember the evaluations of all slots."""
        memory = self._memory
        assert memory is not None, "linearize_all follows begin_linear"
        out = torch.empty_like(memory.states[0])
        for slot in range(len(memory.slots)):
            self.linearize(slot, out)

    def _fill(self, held: "_Slot", time: Tensor, state: Tensor, out: Tensor) -> None:
        """Write ds/dt to `out`, and hidden layers to what the slot holds."""
        x, remember = state[:, : self._inputs], self._activation.remember
        values, slopes, bends = held.values, held.slopes, held.bends
        for layer, value, slope, bend in zip(
            self._layers[:-1], values, slopes, bends, strict=True
        ):
            affine(layer, time, x, value)
            remember(value, slope, bend)
            x = value
        f = out[:, : self._dim]
        affine(self._layers[-1], time, x, f)
        out[:, self._dim : self._inputs] = 0
        trace = out[:, self._inputs]
        if len(slopes) == 1:
            torch.mv(slopes[0], self._trace[0], out=trace)
        else:
            torch.mm(slopes[0], self._trace.T, out=held.product)
            torch.sum(held.product * slopes[1], dim=1, out=trace)
        if self._energy:
            torch.sum(f * f, dim=1, out=out[:, -1])

    def pull(self, slot: int, out: Tensor) -> None:
        """Write cotangent . ds'/ds to `out`; remember every layer's cotangent."""
        memory = self._memory
        assert memory is not None, "pull follows linearize"
        held, cotangent = memory.slots[slot], memory.cotangents[slot]
        g_trace = cotangent[:, self._inputs, None]
        above = held.deltas[-1]
        above.copy_(cotangent[:, : self._dim])
        if self._energy:
            above.addcmul_(cotangent[:, -1:], held.velocity, value=2)
        # Cotangents of the slopes, through the trace.
        if len(held.slopes) == 1:
            bend_by = [g_trace * self._trace]
        else:
            torch.mul(held.slopes[1], g_trace, out=held.g_product)
            bend_by = [held.g_product @ self._trace, held.product * g_trace]
        for i in range(len(held.values) - 1, -1, -1):
            delta = held.deltas[i]
            torch.mm(above, self._weights[i + 1], out=delta)
            self._activation.pull(
                delta, bend_by[i], held.values[i], held.slopes[i], held.bends[i]
            )
            above = delta
        torch.mm(above, self._weights[0], out=out[:, : self._inputs])
        out[:, self._inputs :] = 0

    def pull_time(self, slot: int) -> Tensor:
        """Return cotangent . ds'/dt, (A,)."""
        assert self._memory is not None, "pull_time follows pull"
        deltas = self._memory.slots[slot].deltas
        return by_time(deltas, self._shifts)

    def accumulate(self, slots: int) -> None:
        """Add the parameter gradient: a few products for all slots."""
        if not self._trained:
            return
        memory = self._memory
        assert memory is not None, "accumulate follows pull"
        if self._sums is None:
            self._sums = [torch.zeros_like(weight) for weight in self._weights]
            self._offsets = [weight.new_zeros(2, len(weight)) for weight in self._sums]
            self._trace_sum = torch.zeros_like(self._trace)
        rows = slots * memory.times.shape[1]
        inputs = [memory.states.flatten(0, 1)[:, : self._inputs], *memory.values]
        for i, (x, delta) in enumerate(zip(inputs, memory.deltas, strict=True)):
            self._sums[i].addmm_(delta[:rows].T, x[:rows])
            self._offsets[i].addmm_(memory.one_and_time[:, :rows], delta[:rows])
        slope = memory.slopes[0][:rows]
        if len(memory.slopes) == 1:
            g_trace = memory.cotangents.flatten(0, 1)[:rows, self._inputs]
            self._trace_sum[0].addmv_(slope.T, g_trace)
        else:
            self._trace_sum.addmm_(memory.g_product[:rows].T, slope)

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Return weights', biases' and shifts' gradients, as `parameters` orders."""
        if not self._trained:
            return ()
        sums, self._sums = self._sums, None
        if sums is None:
            return (None,) * (3 * len(self._weights))
        first, last = self._weights[0][:, : self._dim], self._weights[-1]
        into_first = sums[0][:, : self._dim]
        if len(sums) == 2:
            into_first.addcmul_(self._trace_sum.T, last.T)
            sums[-1].addcmul_(first.T, self._trace_sum)
        else:
            product = (first @ last).T
            sums[1].addcmul_(self._trace_sum, product)
            g_product = (self._trace_sum * self._weights[1]).T
            into_first.addmm_(g_product, last.T)
            sums[-1].addmm_(first.T, g_product)
        offsets = self._offsets
        return (*sums, *(both[0] for both in offsets), *(both[1] for both in offsets))


@dataclass(frozen=True, slots=True)
class _Slot:
    """What one slot holds, (A, width) each."""

    values: Tensors
    slopes: Tensors
    bends: Tensors
    """Second derivatives; empty tensors if known from values and slopes."""
    deltas: Tensors
    """Cotangents of every layer's affine part."""
    product: Tensor
    """M d_1, of two hidden layers."""
    g_product: Tensor
    """Its cotangent."""
    velocity: Tensor


class _Memory:
    """Memory of all slots; without states and cotangents if `state` is 0."""

    def __init__(
        self, times: Tensor, state: int, dim: int, hidden: tuple[int, ...], bends: bool
    ) -> None:
        def new(width: int) -> Tensor:
            return times.new_empty(*times.shape, width)

        self.states, self.cotangents = new(state), new(state)
        values, slopes = [new(w) for w in hidden], [new(w) for w in hidden]
        bent = [new(w if bends else 0) for w in hidden]
        deltas = [new(w) for w in (*hidden, dim)]
        product, g_product, velocity = new(hidden[-1]), new(hidden[-1]), new(dim)
        self.slots = [
            _Slot(
                values=tuple(x[i] for x in values),
                slopes=tuple(x[i] for x in slopes),
                bends=tuple(x[i] for x in bent),
                deltas=tuple(x[i] for x in deltas),
                product=product[i],
                g_product=g_product[i],
                velocity=velocity[i],
            )
            for i in range(len(times))
        ]
        self.values = [x.flatten(0, 1) for x in values]
        self.slopes = [x.flatten(0, 1) for x in slopes]
        self.deltas = [x.flatten(0, 1) for x in deltas]
        self.g_product = g_product.flatten(0, 1)
        self.one_and_time = times.new_ones(2, times.numel())
        self.times = self.one_and_time[1].view(times.shape)


def _tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    value = torch.tanh(x)
    return value, 1 - value * value


def _tanh_remember(x: Tensor, slope: Tensor, bend: Tensor) -> None:
    torch.tanh_(x)
    torch.mul(x, x, out=slope)
    torch.sub(1, slope, out=slope)


def _tanh_pull(
    delta: Tensor, by: Tensor, value: Tensor, slope: Tensor, bend: Tensor
) -> None:
    # tanh'' = -2 tanh tanh'
    delta.addcmul_(by, value, value=-2).mul_(slope)


def _softplus(x: Tensor) -> tuple[Tensor, Tensor]:
    return F.softplus(x), torch.sigmoid(x)


def _softplus_remember(x: Tensor, slope: Tensor, bend: Tensor) -> None:
    torch.sigmoid(x, out=slope)
    x.copy_(F.softplus(x))


def _softplus_pull(
    delta: Tensor, by: Tensor, value: Tensor, slope: Tensor, bend: Tensor
) -> None:
    # softplus'' = s (1 - s)
    delta.addcmul_(by, 1 - slope).mul_(slope)


def _silu(x: Tensor) -> tuple[Tensor, Tensor]:
    gate = torch.sigmoid(x)
    return x * gate, gate * (1 + x * (1 - gate))


def _silu_remember(x: Tensor, slope: Tensor, bend: Tensor) -> None:
    gate = torch.sigmoid(x)
    closed = 1 - gate
    torch.addcmul(gate, x * gate, closed, out=slope)
    # s (1 - s) (2 + x (1 - 2 s))
    torch.mul(gate * closed, 2 + x * (closed - gate), out=bend)
    x.mul_(gate)


def _silu_pull(
    delta: Tensor, by: Tensor, value: Tensor, slope: Tensor, bend: Tensor
) -> None:
    delta.mul_(slope).addcmul_(by, bend)


def _relu(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.relu(x), (x > 0).to(x.dtype)


def _relu_remember(x: Tensor, slope: Tensor, bend: Tensor) -> None:
    slope.copy_(x > 0)
    torch.relu_(x)


def _relu_pull(
    delta: Tensor, by: Tensor, value: Tensor, slope: Tensor, bend: Tensor
) -> None:
    delta.mul_(slope)


_Pull = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]


@dataclass(frozen=True, slots=True)
class _Activation:
    """An activation with its first two derivatives."""

    plain: Callable[[Tensor], tuple[Tensor, Tensor]]
    """x -> value and slope, by operations that autograd knows."""
    remember: Callable[[Tensor, Tensor, Tensor], None]
    """(x, slope, bend): turn x into the value; write the others."""
    pull: _Pull
    """(delta, by, value, slope, bend): delta <- delta slope + by bend."""
    bends: bool = False
    """Whether `bend` is kept, not known from value and slope."""


_ACTIVATIONS = {
    "tanh": _Activation(_tanh, _tanh_remember, _tanh_pull),
    "softplus": _Activation(_softplus, _softplus_remember, _softplus_pull),
    "silu": _Activation(_silu, _silu_remember, _silu_pull, bends=True),
    "relu": _Activation(_relu, _relu_remember, _relu_pull),
}
