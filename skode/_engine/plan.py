"""What one solve needs beside its tensors, and the forward solve itself."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from skode._engine.control import PIController
from skode._engine.dense import DenseOutput, Requests
from skode._engine.kernel import Evaluator, Field, Kernel, bind
from skode._engine.loop import integrate, march
from skode._engine.observer import Observer
from skode._engine.solution import Statistics, Tolerance
from skode._engine.tableau import Coefficients, Tableau, coefficients
from skode._engine.tape import Recorder, Tape


@dataclass(frozen=True, slots=True)
class Plan:
    """A field, a method and its tolerance; all strings parsed."""

    field: Field
    tableau: Tableau
    tolerance: Tolerance
    params: tuple[Tensor, ...]

    def coefficients(self, y: Tensor, t: Tensor) -> Coefficients:
        """Return the tableau in the dtypes and on the device of the solve."""
        return coefficients(self.tableau, y.dtype, t.dtype, y.device)

    def kernel(self) -> Kernel:
        """Bind the field for one pass."""
        return bind(self.field, self.params)

    def untrained_kernel(self) -> Kernel:
        """Bind the field for a pass that asks for no parameter's gradient."""
        return bind(self.field, ())

    def run(
        self,
        kernel: Evaluator,
        y: Tensor,
        t0: Tensor,
        t1: Tensor,
        observers: Sequence[Observer],
    ) -> tuple[Tensor, Statistics]:
        """Step from t0 to t1, adaptively or evenly."""
        coef = self.coefficients(y, t0)
        if not self.tableau.adaptive:
            return march(kernel, coef, y, t0, t1, self.tolerance, observers)
        controller = PIController.of(self.tolerance, y, coef.order, coef.error_constant)
        return integrate(kernel, coef, controller, y, t0, t1, self.tolerance, observers)

    def forward(self, y0: Tensor, times: Tensor) -> tuple[Tensor, Statistics]:
        """Solve without autograd; return states at all times (B, T, D)."""
        requests, dense = self.requests(y0, times)
        observers = () if dense is None else (dense,)
        ys, stats, _ = self._solve(
            self.untrained_kernel(), y0, requests, dense, observers
        )
        return ys, stats

    def record(
        self, y0: Tensor, times: Tensor
    ) -> tuple[Tensor, Statistics, Requests, Tape]:
        """Solve without autograd, and record the steps."""
        requests, dense = self.requests(y0, times)
        kernel = self.untrained_kernel()
        recorder = Recorder(dense, kernel.bounded)
        observers: list[Observer] = [recorder]
        if isinstance(kernel, Observer):  # one that keeps something of its own
            observers.append(kernel)
        ys, stats, y1 = self._solve(kernel, y0, requests, dense, observers)
        return ys, stats, requests, recorder.tape(stats.status, y1)

    def requests(
        self, y0: Tensor, times: Tensor
    ) -> tuple[Requests, DenseOutput | None]:
        """Return what is requested, and what writes the times inside, if any are."""
        requests = Requests(times)
        if not requests.any_inside:
            return requests, None
        return requests, DenseOutput(requests, y0, self.coefficients(y0, times))

    def _solve(
        self,
        kernel: Evaluator,
        y0: Tensor,
        requests: Requests,
        dense: DenseOutput | None,
        observers: Sequence[Observer],
    ) -> tuple[Tensor, Statistics, Tensor]:
        """Return states at all times, statistics, and the last state reached."""
        times = requests.times
        y1, stats = self.run(kernel, y0, times[:, 0], times[:, -1], observers)
        inside = None if dense is None else dense.ys
        ys = requests.fill(y0, stats.shown(y1), inside)
        return ys, stats, y1
