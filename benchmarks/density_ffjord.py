"""FFJORD (arXiv:1810.01367) as a competent user of torchdiffeq writes it by hand.

One flow from the data (t = 0) to a standard normal (t = 1) along a tanh MLP of
ConcatSquash layers; dopri5 at rtol = atol = 1e-5, the paper's; the trace exactly or,
while it trains on many columns, by Hutchinson's estimator with one Gaussian probe that
is fixed for a solve.

Shapes: B rows, D columns.
"""

import math
from itertools import pairwise

import torch
from torch import nn
from torchdiffeq import odeint, odeint_adjoint


class ConcatSquash(nn.Module):
    """A linear layer that time gates and shifts."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.linear = nn.Linear(n_in, n_out)
        self.gate = nn.Linear(1, n_out)
        self.shift = nn.Linear(1, n_out, bias=False)

    def forward(self, t, x):
        t = t.reshape(1, 1)
        return self.linear(x) * torch.sigmoid(self.gate(t)) + self.shift(t)


class Dynamics(nn.Module):
    """The field, and the derivative of the log-density beside it."""

    def __init__(self, features, hidden):
        super().__init__()
        widths = (features, *hidden, features)
        self.layers = nn.ModuleList(ConcatSquash(a, b) for a, b in pairwise(widths))
        self.probe = None  # (B, D), or None: the exact trace

    def velocity(self, t, x):
        *inner, last = self.layers
        for layer in inner:
            x = torch.tanh(layer(t, x))
        return last(t, x)

    def forward(self, t, states):
        x = states[0]
        with torch.enable_grad():
            x = x.requires_grad_(True)
            dx = self.velocity(t, x)
            trace = self.trace(dx, x, keep=self.training)
        # A solve for scores alone keeps no graph.
        return (dx, trace) if self.training else (dx.detach(), trace.detach())

    def trace(self, dx, x, keep):
        if self.probe is not None:
            (vjp,) = torch.autograd.grad(dx, x, self.probe, create_graph=keep)
            return (vjp * self.probe).sum(dim=1)
        columns = [
            torch.autograd.grad(
                dx[:, i].sum(), x, create_graph=keep, retain_graph=True
            )[0][:, i]
            for i in range(x.shape[1])
        ]
        return torch.stack(columns).sum(dim=0)


class FFJORD(nn.Module):
    """A continuous flow with a log-density and samples."""

    def __init__(self, features, hidden, exact_up_to, tol=1e-5):
        super().__init__()
        self.features, self.tol = features, tol
        self.estimated = features > exact_up_to  # the trace, while training
        self.dynamics = Dynamics(features, hidden)
        self.register_buffer("times", torch.tensor([0.0, 1.0]))

    def log_density(self, x):
        """Return the log-density of each row: (B, D) -> (B,)."""
        estimated = self.training and self.estimated
        self.dynamics.probe = torch.randn_like(x) if estimated else None
        solve = odeint_adjoint if torch.is_grad_enabled() else odeint
        z, trace = solve(
            self.dynamics,
            (x, torch.zeros_like(x[:, 0])),
            self.times,
            rtol=self.tol,
            atol=self.tol,
            method="dopri5",
        )
        z, trace = z[-1], trace[-1]
        return trace - 0.5 * (z.square() + math.log(2 * math.pi)).sum(dim=1)

    def sample(self, n):
        """Return n rows drawn from the density."""
        z = torch.randn(n, self.features)
        back = self.times.flip(0)
        return odeint(self.dynamics.velocity, z, back, rtol=self.tol, atol=self.tol)[-1]
