"""Encoder, solve, head."""

import pytest
import torch
from torch import nn

from skode._nn.integration import Integration
from skode._nn.ode_net import ZeroAugment, build
from skode.exceptions import SolverError
from tests.problems import normal
from tests.tables import Still

HOW = Integration("dopri5", 1e-6, 1e-6, None, 1000, "auto", False)


def net(encoder="linear", width=5, hidden=(6,), field=None, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build(
            3,
            2,
            encoder=encoder,
            width=width,
            hidden=hidden,
            activation="tanh",
            field=field,
        ).double()


@pytest.mark.parametrize("encoder", ["linear", "augment"])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_without_a_field_it_is_the_head_of_the_encoder(encoder, method):
    how = Integration(method, 1e-3, 1e-3, 0.3, 1000, "auto", False)
    x = normal(7, 3, seed=0)
    for model in (net(encoder), net(encoder, field=Still)):
        for param in model.field.parameters():
            param.data.zero_()
        assert torch.equal(model(x, how), model.head(model.encoder(x)))


def test_a_linear_field_is_a_matrix_exponential():
    model = net(hidden=())
    for part in (*model.field.biases, *model.field.shifts):
        part.data.zero_()
    x = normal(7, 3, seed=0)
    start = model.encoder(x)
    wanted = start @ torch.matrix_exp(model.field.weights[0]).T
    torch.testing.assert_close(model.final_state(x, HOW), wanted, rtol=1e-5, atol=1e-5)


def test_the_trajectory_begins_at_the_encoder_and_ends_at_the_final_state():
    model, x = net(), normal(7, 3, seed=0)
    times = torch.tensor([0.0, 0.5, 1.0]).double()
    states = model.trajectory(x, times, HOW)
    assert states.shape == (7, 3, 5)
    assert torch.equal(states[:, 0], model.encoder(x))
    torch.testing.assert_close(states[:, -1], model.final_state(x, HOW))
    assert torch.equal(model(x, HOW), model.head(model.final_state(x, HOW)))


def test_evaluations_are_counted():
    model, x = net(), normal(7, 3, seed=0)
    tenth, fifth = (
        model.evaluations(x, Integration("rk4", 1e-3, 1e-3, size, 1000, "auto", False))
        for size in (0.1, 0.2)
    )
    assert (tenth - fifth).tolist() == [20] * 7


def test_everything_is_trained():
    model, x = net(), normal(7, 3, seed=0)
    model(x, HOW).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_augmentation_appends_zeros():
    assert ZeroAugment(2, 4)(torch.ones(1, 2)).tolist() == [[1.0, 1.0, 0.0, 0.0]]
    assert ZeroAugment(2, 2)(torch.ones(1, 2)).tolist() == [[1.0, 1.0]]


def test_augmentation_needs_room():
    with pytest.raises(ValueError, match=r"state_size must be at least 3, got 2"):
        net("augment", width=2)


@pytest.mark.parametrize("product", [lambda t, y: y, None, 3, nn.Linear])
def test_a_factory_returns_a_module(product):
    with pytest.raises(TypeError, match=r"returns a torch\.nn\.Module with forward"):
        net(field=lambda width: product)


def test_a_module_is_no_factory():
    with pytest.raises(
        TypeError, match=r"such as the class of your module, got Linear"
    ):
        net(field=nn.Linear(4, 4))


def test_a_failed_row_raises():
    how = Integration("dopri5", 1e-9, 1e-9, None, 1, "auto", False)
    with pytest.raises(SolverError, match="max_steps=1"):
        net()(normal(7, 3, seed=0), how)
