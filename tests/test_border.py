"""Arrays, seeds, devices and pickles at the border."""

import pickle

import numpy as np
import pytest
import torch
from sklearn.preprocessing import StandardScaler
from torch import nn

from skode import _border
from skode._border import (
    PortableEstimator,
    apply,
    check_weights,
    log_softmax,
    resolve_device,
    seeded,
    to_array,
    to_tensor,
    torch_dtype,
    undisturbed,
    weighted_moments,
)


def table(rows=20, dtype=np.float64):
    return np.random.default_rng(0).normal(3.0, 2.0, (rows, 3)).astype(dtype)


# ----------------------------------------------------------------------- seeds


CPU = torch.device("cpu")


def draws(state):
    with seeded(state, CPU) as generator:
        return torch.rand(2).tolist() + torch.rand(2, generator=generator).tolist()


def test_a_seed_decides():
    assert draws(3) == draws(3) != draws(4)
    assert draws(np.random.RandomState(3)) == draws(3)


def test_a_random_state_moves_on():
    state = np.random.RandomState(3)
    assert draws(state) != draws(state)


def test_none_is_fresh_entropy():
    assert draws(None) != draws(None)


@pytest.mark.parametrize("state", [0, None])
def test_global_states_are_left_alone(state):
    before, numpys = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    draws(state)
    with pytest.raises(ZeroDivisionError), seeded(state, CPU):
        torch.rand(1)
        raise ZeroDivisionError
    assert torch.equal(torch.random.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpys)  # noqa: NPY002


def test_blocks_that_overlap_restore_what_the_first_found():
    before = torch.random.get_rng_state()
    one, other = seeded(0, CPU), seeded(1, CPU)
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert not torch.equal(torch.random.get_rng_state(), before)
    other.__exit__(None, None, None)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_block_inside_another_restores_nothing_yet():
    with seeded(0, CPU):
        with seeded(1, CPU):
            torch.rand(1)
        inner = torch.random.get_rng_state()
    assert not torch.equal(torch.random.get_rng_state(), inner)
    assert draws(2) == draws(2)


def test_what_is_drawn_undisturbed_follows_the_seed():
    with seeded(3, CPU) as generator:
        first = torch.rand(2)
        with seeded(4, CPU), undisturbed(generator):
            assert torch.equal(torch.rand(2), first)


def test_many_gpus_are_no_reason_to_warn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert draws(3) == draws(3)


# --------------------------------------------------------------------- moments


def test_moments_are_those_of_scikit_learn():
    X, weight = table(), np.random.default_rng(1).uniform(0, 2, 20)
    scaler = StandardScaler().fit(X, sample_weight=weight)
    shift, scale = weighted_moments(X, weight)
    np.testing.assert_allclose(shift, scaler.mean_, rtol=1e-12)
    np.testing.assert_allclose(scale, scaler.scale_, rtol=1e-12)


def test_weights_count_rows_in_moments():
    X, times = table(), np.arange(20) % 3
    for one, other in zip(
        weighted_moments(X, times),
        weighted_moments(X.repeat(times, axis=0), np.ones(times.sum())),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_moments_do_not_depend_on_the_layout_in_memory():
    X, weight = table(1000), np.ones(1000)
    for one, other in zip(
        weighted_moments(X, weight),
        weighted_moments(np.asfortranarray(X), weight),
        strict=True,
    ):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e6 + 0.1, -1e-8])
def test_a_constant_column_is_not_scaled(dtype, value):
    X = table(1001, dtype)
    X[:, 1] = value
    shift, scale = weighted_moments(X, np.ones(1001))
    assert scale[1] == 1 and np.isclose(shift[1], value) and scale[0] > 1.5


def test_a_narrow_column_is_scaled():
    X = 1.0 + 1e-9 * table()
    assert weighted_moments(X, np.ones(20))[1].max() < 1e-8


# --------------------------------------------------------------------- tensors


def test_tensors_are_copies_of_the_dtype():
    for dtype in (np.float32, np.float64, np.int64):
        X = table(dtype=dtype)
        tensor = to_tensor(X[::-2], CPU)
        kept = tensor.clone()
        X[:] = 0
        assert torch.equal(tensor, kept) and tensor.any()
        assert to_array(tensor).dtype == dtype


def test_tensors_of_another_dtype_are_rounded_once():
    X = table()
    single = to_tensor(X, CPU, torch.float32)
    assert np.array_equal(to_array(single), X.astype(np.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_apply_goes_chunk_by_chunk(dtype, monkeypatch):
    module = nn.Linear(3, 2).to(dtype)
    X, sizes = table(10), []

    def function(x):
        sizes.append(len(x))
        assert x.dtype == dtype and not torch.is_grad_enabled()
        return module(x)

    whole = apply(function, X, module)
    monkeypatch.setattr(_border, "_ROWS_AT_ONCE", 4)
    parts = apply(function, X, module)
    assert sizes == [10, 4, 4, 2]
    np.testing.assert_allclose(parts, whole, rtol=1e-6)
    assert whole.shape == (10, 2)


def test_dtype_follows_the_table_or_the_wish():
    single, double = table(dtype=np.float32), table()
    assert torch_dtype("auto", single) == torch.float32
    assert torch_dtype("auto", double) == torch.float64
    assert torch_dtype("float64", single) == torch.float64
    assert torch_dtype("float32", double) == torch.float32


def test_log_softmax_does_not_overflow():
    logits = np.array([[1e4, 0.0], [0.0, 0.0]])
    np.testing.assert_allclose(
        log_softmax(logits), [[0.0, -1e4], [-np.log(2), -np.log(2)]]
    )


# -------------------------------------------------------------- weights, devices


def test_weights_are_checked():
    X = table()
    assert check_weights(None, X).tolist() == [1.0] * 20
    assert check_weights(2, X).tolist() == [2.0] * 20
    for bad, text in [
        (np.zeros(20), "at least one non-zero"),
        (-np.ones(20), "[Nn]egative"),
        (np.ones(19), "sample_weight.shape"),
        (np.full(20, np.nan), "NaN"),
    ]:
        with pytest.raises(ValueError, match=text):
            check_weights(bad, X)


@pytest.mark.parametrize("device", ["cuda:77", "gpu", "warp drive", ""])
def test_a_device_out_of_reach(device):
    with pytest.raises(ValueError, match=r"is not to be had here .* 'cpu'"):
        resolve_device(device)


def test_devices_in_reach():
    assert resolve_device("cpu").type == "cpu"
    wanted = "cuda" if torch.cuda.is_available() else "cpu"
    assert resolve_device("auto").type == wanted


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_a_gpu_is_named_by_its_number(device):
    assert resolve_device(device) == torch.device("cuda", 0)


# --------------------------------------------------------------------- pickles


class Holder(PortableEstimator):
    pass


def test_the_optimiser_is_not_pickled():
    holder = Holder()
    holder.module_, holder._optimizer = nn.Linear(2, 1), object()
    loaded = pickle.loads(pickle.dumps(holder))
    assert not hasattr(loaded, "_optimizer") and hasattr(holder, "_optimizer")
    assert torch.equal(loaded.module_.weight, holder.module_.weight)


@pytest.mark.gpu
def test_modules_are_pickled_on_the_cpu():
    holder = Holder()
    holder.module_ = nn.Linear(2, 1).cuda()
    loaded = pickle.loads(pickle.dumps(holder))
    assert loaded.module_.weight.device.type == "cpu"
    assert holder.module_.weight.device.type == "cuda"


@pytest.mark.gpu
def test_the_global_state_of_the_gpu_is_left_alone():
    before = torch.cuda.get_rng_state()
    rows = []
    for _ in range(2):
        with seeded(0, resolve_device("cuda")):
            rows.append(torch.rand(3, device="cuda").tolist())
        assert torch.equal(torch.cuda.get_rng_state(), before)
    assert rows[0] == rows[1]
