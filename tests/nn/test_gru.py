"""The packed recurrent unit, and the readers that read no padding."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from skode._nn.gru import Packing, last_state
from skode._nn.integration import Integration
from skode._nn.recognition import GRUReader, ODERNNReader
from tests.problems import normal

RK4 = Integration(
    method="rk4",
    rtol=1e-3,
    atol=1e-6,
    step_size=0.25,
    max_steps=100,
    gradient="checkpoint",
    compile=False,
)
LENGTHS = {
    "ragged": [4, 9, 0, 1, 9, 6],
    "equal": [5, 5, 5],
    "one row": [1, 1, 1],
    "one series": [7],
    "nothing": [0, 0],
    "several stretches": [3, 40, 220, 219, 100, 7, 150, 201, 90, 220, 180, 199],
}
each_length = pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)


def unit(n_inputs=3, width=4, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.GRU(n_inputs, width, batch_first=True).to(dtype)


def series(length, n_inputs=3, seed=1):
    return normal(len(length), max(1, *length), n_inputs, seed=seed)


def by_torch(gru, inputs, length):
    """Return the last state of each series, read alone."""
    states = [
        gru(row[None, :n])[1][0, 0] if n else inputs.new_zeros(gru.hidden_size)
        for row, n in zip(inputs, length.tolist(), strict=True)
    ]
    return torch.stack(states)


def state_and_gradients(of, gru, inputs, length):
    inputs = inputs.detach().requires_grad_()
    state = of(gru, inputs, length)
    pulled = normal(*state.shape, seed=5).to(state.dtype)
    if not length.any():
        return [state]
    return [state, *torch.autograd.grad(state, [inputs, *gru.parameters()], pulled)]


@each_length
def test_states_and_gradients_are_those_of_pytorch(length):
    gru, inputs, length = unit(), series(length), torch.tensor(length)
    ours = state_and_gradients(last_state, gru, inputs, length)
    theirs = state_and_gradients(by_torch, gru, inputs, length)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bound", [0.05, 3.0], ids=["small", "saturated"])
def test_gates_of_any_size_are_differentiated(bound):
    gru, inputs = unit(), series([4, 2])
    with torch.no_grad():
        for param in gru.parameters():
            param.uniform_(-bound, bound, generator=torch.Generator().manual_seed(2))
    length = torch.tensor([4, 2])
    names, params = zip(*gru.named_parameters(), strict=True)

    def state(inputs, *params):
        held = unit()
        for name in names:
            delattr(held, name)
        for name, param in zip(names, params, strict=True):
            setattr(held, name, param)
        return last_state(held, inputs, length)

    assert torch.autograd.gradcheck(state, (inputs.requires_grad_(), *params))


def test_single_precision_stays_single():
    gru, length = unit(dtype=torch.float32), torch.tensor(LENGTHS["ragged"])
    inputs = series(LENGTHS["ragged"]).float()
    ours = state_and_gradients(last_state, gru, inputs, length)
    theirs = state_and_gradients(by_torch, gru, inputs, length)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_inputs_need_not_be_contiguous():
    gru, length = unit(), torch.tensor([3, 5])
    inputs = normal(3, 5, 2, seed=1).permute(2, 1, 0)
    assert not inputs.is_contiguous()
    torch.testing.assert_close(
        last_state(gru, inputs, length), last_state(gru, inputs.contiguous(), length)
    )


def test_what_stands_behind_a_series_is_not_read():
    gru, length = unit(), torch.tensor([2, 5])
    inputs = series([2, 5])
    filled = inputs.clone()
    filled[0, 2:] = torch.nan
    assert torch.equal(last_state(gru, inputs, length), last_state(gru, filled, length))


def test_runs_are_equal_to_the_last_bit_and_may_be_repeated():
    gru, inputs = unit(dtype=torch.float32), series(LENGTHS["several stretches"])
    length = torch.tensor(LENGTHS["several stretches"])
    first = state_and_gradients(last_state, gru, inputs.float(), length)
    again = state_and_gradients(last_state, gru, inputs.float(), length)
    assert all(map(torch.equal, first, again))
    loss = last_state(gru, inputs.float(), length).sum()
    params = list(gru.parameters())
    one = torch.autograd.grad(loss, params, retain_graph=True)
    two = torch.autograd.grad(loss, params)
    assert all(map(torch.equal, one, two))


def test_threads_do_not_disturb_each_other():
    gru, length = unit(), torch.tensor([30, 12, 25])
    rows = [normal(3, 30, 3, seed=seed) for seed in range(8)]

    def run(inputs):
        return state_and_gradients(last_state, gru, inputs, length)

    alone = [run(inputs) for inputs in rows]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, rows))
    for one, other in zip(alone, together, strict=True):
        assert all(map(torch.equal, one, other))


def test_without_gradients_the_state_is_the_same():
    gru, inputs, length = unit(), series([3, 6]), torch.tensor([3, 6])
    with torch.no_grad():
        state = last_state(gru, inputs, length)
    assert not state.requires_grad
    assert torch.equal(state, last_state(gru, inputs, length))


def test_a_second_derivative_is_refused():
    gru, inputs = unit(), series([2, 3]).requires_grad_()
    state = last_state(gru, inputs, torch.tensor([2, 3]))
    (grad,) = torch.autograd.grad(state.square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_other_numbers_are_left_to_pytorch():
    gru, length = unit(dtype=torch.bfloat16), torch.tensor([2, 0, 3])
    inputs = series([2, 0, 3]).bfloat16()
    state = last_state(gru, inputs, length)
    assert state.dtype == torch.bfloat16
    assert not state[1].any()
    torch.testing.assert_close(
        state, by_torch(gru, inputs, length), rtol=0.02, atol=0.02
    )


@pytest.mark.gpu
def test_a_gpu_finds_the_same():
    gru, length = unit(), torch.tensor(LENGTHS["ragged"])
    inputs = series(LENGTHS["ragged"])
    here = state_and_gradients(last_state, gru, inputs, length)
    state = last_state(gru.cuda(), inputs.cuda(), length.cuda())
    pulled = normal(*state.shape, seed=5).cuda()
    there = [state, *torch.autograd.grad(state, list(gru.parameters()), pulled)]
    for mine, other in zip([here[0], *here[2:]], there, strict=True):
        torch.testing.assert_close(mine, other.cpu(), rtol=1e-9, atol=1e-9)


def test_packed_rows_stand_by_step_and_the_longest_first():
    packing = Packing.of(torch.tensor([2, 0, 3, 2]), 5)
    assert packing.order.tolist() == [2, 0, 3, 1]
    assert packing.sizes == (3, 3, 1)
    # Of series 2, 0 and 3, each padded to five rows.
    assert packing.rows.tolist() == [10, 0, 15, 11, 1, 16, 12]
    # Four states come before the first rows.
    assert packing.before.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert packing.last.tolist() == [8, 3, 10, 9]


@pytest.mark.parametrize("reader", [GRUReader, ODERNNReader])
def test_a_reader_finds_of_each_series_what_it_finds_of_it_alone(reader):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        read = reader(3, 4).double()
    length = torch.tensor([4, 0, 2, 6, 1])
    inputs = normal(5, 6, 3, seed=1)
    gaps = normal(5, 6, seed=2).abs()
    gaps[:, 0] = 0
    known = read(inputs, gaps, length, RK4)
    assert not known[1].any()
    for i in (0, 2, 3, 4):
        n = length[i : i + 1]
        alone = read(inputs[i : i + 1, :n], gaps[i : i + 1, :n], n, RK4)
        torch.testing.assert_close(known[i : i + 1], alone, rtol=1e-12, atol=1e-12)
