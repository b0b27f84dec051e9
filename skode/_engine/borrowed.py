"""Methods that torchdiffeq has and we do not write, behind our own door.

torchdiffeq steps a whole batch together. To keep rows independent, methods whose
steps or iterations look at the state are run one row at a time; those on a fixed,
explicit grid, one group of rows with equal times at a time. B rows, T times, D state.
"""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchdiffeq import odeint

from skode._engine.kernel import Field, checked
from skode._engine.solution import Statistics, Status, Tolerance


@dataclass(frozen=True, slots=True)
class Borrowed:
    """A method of torchdiffeq."""

    method: str
    options: tuple[tuple[str, object], ...] = ()
    fixed_step: bool = False
    alone: bool = True
    """Whether rows must be solved one at a time to be independent."""
    differentiable: bool = True
    """Whether autograd can pass through it; if not, only the adjoint can."""


def _scipy(name: str) -> Borrowed:
    return Borrowed("scipy_solver", (("solver", name),), differentiable=False)


_CUBIC = (("interp", "cubic"),)
BORROWED = {
    "fehlberg2": Borrowed("fehlberg2"),
    "heun3": Borrowed("heun3", _CUBIC, fixed_step=True, alone=False),
    # torchdiffeq's own order, 11, is unstable unless steps are below a thousandth of
    # the field's time scale; order 4 allows a few tenths.
    "explicit_adams": Borrowed(
        "explicit_adams", (*_CUBIC, ("max_order", 5)), fixed_step=True, alone=False
    ),
    "implicit_adams": Borrowed("implicit_adams", _CUBIC, fixed_step=True),
    "fixed_adams": Borrowed("fixed_adams", _CUBIC, fixed_step=True),
    "scipy_solver": _scipy("LSODA"),
    **{
        name: _scipy(name)
        for name in ("RK23", "RK45", "DOP853", "Radau", "BDF", "LSODA")
    },
}

_EVALUATIONS_PER_STEP = 50
"""More than any of these methods spends on one attempt at one step (Radau on a small
state, its numerical Jacobian included), so that `max_steps` ends them all."""


class _TooManyEvaluations(Exception):
    pass


@dataclass(slots=True)
class _Counted:
    """A field of (B, D) rows as torchdiffeq wants it: one scalar time."""

    field: Field
    limit: int
    nfe: int = 0
    t: float = 0.0

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        self.nfe += 1
        if self.nfe > self.limit:
            self.t = float(t.detach())
            raise _TooManyEvaluations
        return checked(self.field(t.to(y.dtype).expand(len(y)), y), y)


_FILTERS = threading.RLock()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what SciPy says of an argument that torchdiffeq always passes.

    Filters belong to the process: one thread at a time may change them.
    """
    with _FILTERS, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*have no effect.*min_step")
        yield


@dataclass(frozen=True, slots=True)
class Loan:
    """A borrowed solve."""

    field: Field
    borrowed: Borrowed
    tolerance: Tolerance

    def run(self, y0: Tensor, times: Tensor) -> tuple[Tensor, Statistics]:
        """Solve groups of rows; return states (B, T, D) with autograd's history."""
        batch = len(times)
        parts, order = [], []
        status = torch.zeros(batch, dtype=torch.int8, device=y0.device)
        reached = times.detach()[:, -1].clone()
        nfe = torch.zeros(batch, dtype=torch.int64, device=y0.device)
        for rows in self._groups(times):
            ys, code, t, spent = self._group(y0[rows], times[rows[0]])
            parts.append(ys)
            order.append(rows)
            nfe[rows] = spent
            if code != Status.SUCCESS:
                status[rows], reached[rows] = int(code), t
        back = torch.argsort(torch.cat(order))
        ys = torch.cat(parts)[back]
        # torchdiffeq does not tell its steps: what it spent is in `nfe`.
        unknown = torch.zeros_like(nfe)
        stats = Statistics(status, reached, unknown, unknown, nfe)
        return ys, self._lost(stats, ys)

    def _lost(self, stats: Statistics, ys: Tensor) -> Statistics:
        bad = ~torch.isfinite(ys.detach()).all(dim=(1, 2))
        bad &= stats.status == Status.SUCCESS
        return replace(stats, status=stats.status.masked_fill(bad, Status.NON_FINITE))

    def _groups(self, times: Tensor) -> Iterator[Tensor]:
        """Yield the rows that are solved together."""
        if self.borrowed.alone:
            yield from torch.arange(len(times), device=times.device)[:, None]
            return
        _, group = torch.unique(times.detach(), dim=0, return_inverse=True)
        for i in range(int(group.max()) + 1):
            yield torch.nonzero(group == i)[:, 0]

    def _group(self, y0: Tensor, times: Tensor) -> tuple[Tensor, Status, float, int]:
        """Solve rows (G, D) with the same times (T,)."""
        fixed = times.detach()
        new = torch.ones_like(fixed, dtype=torch.bool)
        new[1:] = fixed[1:] != fixed[:-1]
        index = torch.cumsum(new, dim=0) - 1
        distinct = times[new]
        if len(distinct) == 1:
            return y0[:, None].expand(-1, len(times), -1), Status.SUCCESS, 0.0, 0
        limit = self.tolerance.max_steps * _EVALUATIONS_PER_STEP
        counted = _Counted(self.field, limit)
        code, t, ys = self._call(counted, y0, distinct)
        if ys is None:
            lost = torch.full_like(y0, torch.nan)[:, None]
            ys = torch.where((index == 0)[None, :, None], y0[:, None], lost)
            return ys, code, t, counted.nfe
        # LSODA loses the start of a row whose first step fails.
        ys = torch.cat((y0[None], ys[1:]))
        return ys.transpose(0, 1)[:, index], code, t, counted.nfe

    def _call(
        self, counted: _Counted, y0: Tensor, times: Tensor
    ) -> tuple[Status, float, Tensor | None]:
        """Call torchdiffeq; turn its assertions into a status."""
        tolerance = self.tolerance
        start, span = float(times[0].detach()), float((times[-1] - times[0]).detach())
        options = dict(self.borrowed.options)
        if self.borrowed.fixed_step:
            assert tolerance.step_size is not None, "checked at the door"
            steps = max(1, round_up(abs(span) / tolerance.step_size))
            if steps > tolerance.max_steps:
                return Status.MAX_STEPS, start, None
            options["step_size"] = abs(span) / steps
        elif self.borrowed.differentiable:
            options["max_num_steps"] = tolerance.max_steps
        arguments = {
            "rtol": tolerance.rtol,
            "atol": tolerance.atol,
            "method": self.borrowed.method,
            "options": options,
        }
        try:
            with _quiet():
                ys = odeint(counted, y0, times, **arguments)
        except _TooManyEvaluations:
            return Status.MAX_STEPS, counted.t, None
        except AssertionError as error:
            return _status_of(error), start, None
        except ValueError as error:
            if "must not contain infs or NaNs" not in str(error):
                raise
            # The Jacobian of SciPy's implicit methods.
            return Status.NON_FINITE, start, None
        if len(ys) < len(times):  # SciPy gave up in between
            return Status.STEP_UNDERFLOW, float(times[len(ys)].detach()), None
        return Status.SUCCESS, float(times[-1].detach()), ys


def round_up(quotient: float) -> int:
    """Return the ceiling, forgiving a quotient that exceeds an integer by rounding."""
    return int(-(-quotient * (1 - 1e-6) // 1))


def _status_of(error: AssertionError) -> Status:
    text = str(error)
    if "underflow" in text:
        return Status.STEP_UNDERFLOW
    if "max_num_steps" in text:
        return Status.MAX_STEPS
    if "non-finite" in text:
        return Status.NON_FINITE
    raise error
