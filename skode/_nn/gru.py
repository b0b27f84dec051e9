"""A gated recurrent unit that is quick to differentiate on the CPU.

PyTorch's own takes a dozen small operations forwards and twenty backwards for each row,
and reads padding as if it were data. Here it is five and three, of the series that have
a row there at all.

B series, T rows at most, N rows in all, F inputs, W width. Rows stand packed: all first
rows, then all second ones, ..., and among those the longest series first.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["Packing", "last_state"]

_STRETCH = 1024
"""Rows whose gates and cotangents stay in a core's cache while they are worked on."""
_REAL = (torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the rows of series of different lengths stand when packed.

    States stand likewise, behind one for each series that comes before its first row.
    """

    order: Tensor
    """(B,) series, the longest first."""
    sizes: tuple[int, ...]
    """Series that have a first row, a second one, ...: never more than before."""
    rows: Tensor
    """(N,) of each packed row among the B * T padded ones."""
    before: Tensor
    """(N,) of the state before each packed row among the B + N states."""
    last: Tensor
    """(B,) of the last state of each series among the B + N states."""

    @classmethod
    def of(cls, length: Tensor, n_rows: int) -> "Packing":
        """Pack the first `length` (B,) rows of series that are padded to `n_rows`."""
        ordered, order = length.sort(descending=True, stable=True)
        there = ordered > torch.arange(n_rows, device=length.device)[:, None]  # (T, B)
        size = there.sum(dim=1)
        start = size.new_zeros(n_rows + 1)
        torch.sub(size.cumsum(0) + len(length), size, out=start[1:])
        last = torch.empty_like(order)
        last[order] = start[ordered] + torch.arange(len(length), device=length.device)
        step, place = there.nonzero(as_tuple=True)
        return cls(
            order=order,
            sizes=tuple(n for n in size.tolist() if n),
            rows=order[place] * n_rows + step,
            before=start[step] + place,
            last=last,
        )

    def stretches(self) -> list[tuple[slice, tuple[int, ...]]]:
        """Return places of about `_STRETCH` packed rows, and the sizes therein."""
        found, begin, first, end = [], 0, 0, 0
        for i, size in enumerate(self.sizes):
            end += size
            if end - begin >= _STRETCH or i == len(self.sizes) - 1:
                found.append((slice(begin, end), self.sizes[first : i + 1]))
                begin, first = end, i + 1
        return found


def last_state(gru: nn.GRU, inputs: Tensor, length: Tensor) -> Tensor:
    """Return the state (B, W) after the first `length` (B,) rows of (B, T, F) inputs.

    It is zero where there are none. The unit has one layer and one direction, and takes
    batches first. On the CPU its gradient cannot be differentiated again.
    """
    if inputs.device.type != "cpu" or inputs.dtype not in _REAL:
        return _padded(gru, inputs, length)
    packing = Packing.of(length, inputs.shape[1])
    packed = inputs.reshape(-1, inputs.shape[2]).index_select(0, packing.rows)
    run: Any = _Packed.apply
    state: Tensor = run(
        packing,
        packed,
        gru.weight_ih_l0,
        gru.weight_hh_l0,
        gru.bias_ih_l0,
        gru.bias_hh_l0,
    )
    return state


def _padded(gru: nn.GRU, inputs: Tensor, length: Tensor) -> Tensor:
    """Return the same by PyTorch's own, which reads the padding too."""
    known: Tensor = gru(inputs)[0]
    last = (length - 1).clamp_min(0)[:, None, None].expand(-1, 1, known.shape[2])
    state = known.gather(1, last)[:, 0]
    return torch.where((length > 0)[:, None], state, torch.zeros_like(state))


class _Packed(torch.autograd.Function):
    """From h, with r, z = sigmoid(a_r, a_z) and n = tanh(a_n): h' = n + z (h - n).

    a_r = U_r x + b_r + V_r h + c_r, a_z likewise, and a_n = U_n x + b_n + r m where
    m = V_n h + c_n (`torch.nn.GRU`; U, b are its ..._ih, V, c its ..._hh). Four blocks
    [r | z | m | n] of W columns hold a row's a_r, a_z, m, a_n and then its gates: their
    first three take the product with V in one piece. U x, b and c do not depend on h
    and come first, of many rows at once: m has no U, and a column of ones beside x
    makes b and c part of U.

    Given the cotangent u of h', with s' = s (1 - s) for a sigmoid and 1 - n^2 for tanh,

        a_n: u d_n,  d_n = (1 - z) (1 - n^2)      m:   u d_n r
        a_r: u d_n m r (1 - r)                    a_z: u (h - n) z (1 - z)

    so that all four are u times what is known without u: of many rows at once, too.
    Then h has u z + [a_r | a_z | m] V. Weights gather their gradients from many rows in
    one product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        packing: Packing,
        x: Tensor,
        weight_x: Tensor,
        weight_h: Tensor,
        bias_x: Tensor,
        bias_h: Tensor,
    ) -> Tensor:
        width, n_series = weight_h.shape[1], len(packing.order)
        blocks = _blocks(torch.cat((weight_x, bias_x[:, None]), dim=1))
        blocks[: 3 * width, -1] += bias_h
        across = weight_h.t().contiguous()  # a third quicker than a view of it
        x = torch.cat((x, torch.ones_like(x[:, :1])), dim=1)
        gates = x.new_empty(len(x), 4 * width)
        states = x.new_empty(n_series + len(x), width)
        h = states[:n_series].zero_()
        for rows, sizes in packing.stretches():
            stretch = torch.mm(x[rows], blocks.t(), out=gates[rows])
            for size, products, both, r, z, m, n, new in zip(
                sizes,
                stretch[:, : 3 * width].split(sizes),
                stretch[:, : 2 * width].split(sizes),
                *(gate.split(sizes) for gate in stretch.chunk(4, dim=1)),
                states[n_series:][rows].split(sizes),
                strict=True,
            ):
                if len(h) > size:
                    h = h[:size]
                products.addmm_(h, across)
                both.sigmoid_()
                n.addcmul_(r, m).tanh_()
                h = torch.lerp(n, h, z, out=new)
        ctx.packing = packing
        ctx.save_for_backward(x, blocks, weight_h, gates, states)
        return states.index_select(0, packing.last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, blocks, weight_h, gates, states = ctx.saved_tensors
        packing: Packing = ctx.packing
        width = weight_h.shape[1]
        u = grad.index_select(0, packing.order)  # row by row back, in place
        v = u[:0]
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[1] else None
        grad_blocks = blocks.new_zeros(blocks.shape[::-1])
        grad_across = weight_h.new_zeros(weight_h.shape[::-1])
        stretches = packing.stretches()
        longest = max((sum(sizes) for _, sizes in stretches), default=0)
        memory = gates.new_empty(longest, 4 * width)
        for rows, sizes in reversed(stretches):
            before = states.index_select(0, packing.before[rows])
            cotangents = memory[: len(before)]
            _factors(gates[rows], before, cotangents)
            products = cotangents[:, : 3 * width]
            for size, four, three, z in zip(
                sizes[::-1],
                cotangents.view(-1, 4, width).split(sizes)[::-1],
                products.split(sizes)[::-1],
                gates[rows, width : 2 * width].split(sizes)[::-1],
                strict=True,
            ):
                if len(v) < size:  # further back, more series have a row
                    v = u[:size]
                four.mul_(v[:, None])
                v.mul_(z).addmm_(three, weight_h)
            grad_blocks.addmm_(x[rows].t(), cotangents)
            grad_across.addmm_(before.t(), products)
            if grad_x is not None:
                torch.mm(cotangents, blocks, out=grad_x[rows])
        in_three = torch.cat(
            (grad_blocks[:, : 2 * width], grad_blocks[:, 3 * width :]), dim=1
        )
        return (
            None,
            None if grad_x is None else grad_x[:, :-1],
            in_three[:-1].t(),
            grad_across.t(),
            in_three[-1],
            grad_blocks[-1, : 3 * width],
        )


def _blocks(three: Tensor) -> Tensor:
    """Return [r | z | 0 | n] of [r | z | n], along the first dimension."""
    width = len(three) // 3
    return torch.cat(
        (three[: 2 * width], torch.zeros_like(three[:width]), three[2 * width :])
    )


def _factors(gates: Tensor, before: Tensor, out: Tensor) -> None:
    """Write what times u is the cotangent of [a_r | a_z | m | a_n] to `out`."""
    r, z, m, n = gates.chunk(4, dim=1)
    d_r, d_z, d_m, d_n = out.chunk(4, dim=1)
    both, d_both = (x[:, : 2 * r.shape[1]] for x in (gates, out))
    torch.sub(1, z, out=d_n)
    torch.ops.aten.tanh_backward.grad_input(d_n, n, grad_input=d_n)
    torch.mul(d_n, r, out=d_m)
    torch.mul(d_n, m, out=d_r)
    torch.sub(before, n, out=d_z)
    torch.ops.aten.sigmoid_backward.grad_input(d_both, both, grad_input=d_both)
