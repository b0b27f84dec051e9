"""The border between scikit-learn's world and torch's: arrays, seeds, devices.

The only place that knows both sides, and the only one that uses scikit-learn's
private names.
"""

import copy
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral, Real

import numpy as np
import torch
from sklearn.base import BaseEstimator, _fit_context
from sklearn.utils import check_random_state, column_or_1d
from sklearn.utils._optional_dependencies import check_matplotlib_support
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.extmath import softmax
from sklearn.utils.validation import _check_sample_weight
from torch import Tensor, nn

from skode.exceptions import SolverError

__all__ = [
    "FLOATS",
    "PortableEstimator",
    "apply",
    "at_least",
    "check_matplotlib_support",
    "check_weights",
    "choice",
    "fit_context",
    "flat_if_one",
    "inside",
    "log_softmax",
    "positive",
    "resolve_device",
    "seeded",
    "softmax",
    "to_array",
    "to_tensor",
    "torch_dtype",
    "undisturbed",
    "weighted_moments",
]

FLOATS = (np.float64, np.float32)
_ROWS_AT_ONCE = 8192
fit_context = _fit_context


class PortableEstimator(BaseEstimator):
    """An estimator whose modules are pickled on the CPU, wherever they were fitted."""

    def __getstate__(self):
        """Return a copy of the state with every module on the CPU."""
        state = dict(super().__getstate__())
        # The optimiser's memory serves partial_fit within a session only.
        state.pop("_optimizer", None)
        for name, value in state.items():
            if isinstance(value, nn.Module):
                home = next((p.device for p in value.parameters()), None)
                if home is not None and home.type != "cpu":
                    state[name] = _copied_to_cpu(value)
        return state


def _copied_to_cpu(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).cpu()


def resolve_device(device: str) -> torch.device:
    """Return the device to compute on.

    Raises
    ------
    ValueError
        If torch does not know it or cannot reach it.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # A tensor shows whether the device is there, and which one a bare "cuda" is.
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device={device!r} is not to be had here ({error}). Use device='auto' or "
            "'cpu'."
        ) from error


class _GlobalGenerators:
    """torch's global generators, lent to fits and put back after the last of them.

    Fits may run in several threads, and share these. Were each to restore what it
    found, the last would restore what another had left behind.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._borrowers = 0
        self._found: dict[torch.Generator, Tensor] = {}

    def borrow(self, device: torch.device, seed: int) -> None:
        """Seed the CPU's and the device's; remember what the first borrower found."""
        generators = {torch.default_generator}
        if device.type == "cuda":
            generators.add(torch.cuda.default_generators[device.index])
        with self.lock:
            self._borrowers += 1
            for generator in generators:
                self._found.setdefault(generator, generator.get_state())
                generator.manual_seed(seed)

    def give_back(self) -> None:
        """Restore all of them if nobody borrows them any longer."""
        with self.lock:
            self._borrowers -= 1
            if self._borrowers == 0:
                for generator, state in self._found.items():
                    generator.set_state(state)
                self._found.clear()


_GLOBAL = _GlobalGenerators()


@contextmanager
def seeded(random_state, device: torch.device) -> Iterator[torch.Generator]:
    """Seed torch inside the block and restore it after; yield a generator.

    The generator is the block's own. Global draws inside the block are decided by the
    seed as long as no other thread draws; see `undisturbed`. NumPy's global state is
    never drawn from, so `None` takes fresh entropy.
    """
    if random_state is None:
        seed = int(np.random.SeedSequence().generate_state(1)[0])
    else:
        seed = int(check_random_state(random_state).randint(np.iinfo(np.int32).max))
    _GLOBAL.borrow(device, seed)
    try:
        yield torch.Generator().manual_seed(seed)
    finally:
        _GLOBAL.give_back()


@contextmanager
def undisturbed(generator: torch.Generator) -> Iterator[None]:
    """Seed the CPU's global generator as `generator` was, and keep other fits from it.

    For the initial weights, which torch draws from there: a fit in another thread is
    neither seeded nor builds a net inside the block.
    """
    with _GLOBAL.lock:
        torch.default_generator.manual_seed(generator.initial_seed())
        yield


def to_tensor(
    array: np.ndarray, device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """Return a tensor of `dtype`, or the array's; never shares its memory."""
    return torch.tensor(np.ascontiguousarray(array), dtype=dtype, device=device)


def to_array(tensor: Tensor) -> np.ndarray:
    """Return a NumPy array of the tensor's dtype."""
    return tensor.detach().cpu().numpy()


def apply(
    function: Callable[[Tensor], Tensor], X: np.ndarray, like: nn.Module
) -> np.ndarray:
    """Map rows of X through a function of tensors, a few thousand at a time.

    X comes in, and results go out, in the dtype and on the device of `like`. Rows do
    not depend on each other, so neither do the results on the chunks.
    """
    example = next(like.parameters())
    dtype = torch.float64 if example.dtype == torch.float64 else torch.float32
    parts = []
    with torch.no_grad():
        for start in range(0, len(X), _ROWS_AT_ONCE):
            rows = X[start : start + _ROWS_AT_ONCE]
            try:
                result = function(to_tensor(rows, example.device, dtype))
            except SolverError as error:  # knows its few thousand only
                error.rows = tuple(start + row for row in error.rows)
                raise
            parts.append(to_array(result))
    return np.concatenate(parts)


def weighted_moments(
    values: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return weighted mean and standard deviation by column; constant columns get 1.

    Weights count rows: a row of weight two is two rows. Columns whose variance
    overflows get moments that are not finite.
    """
    # Relative to a row that counts, a constant column is exactly 0, however many rows
    # are summed; in one order of memory, frames and arrays give the same bits.
    origin = values[np.argmax(weight > 0)].astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # the caller looks for infinity
        centred = np.subtract(values, origin, order="C")
        offset = np.average(centred, axis=0, weights=weight)
        squares = (centred - offset) ** 2
        std = np.sqrt(np.average(squares, axis=0, weights=weight))
    mean = origin + offset
    # A column that should be constant may have a spread of rounding alone.
    constant = std <= 10 * np.finfo(values.dtype).eps * np.abs(mean)
    return mean, np.where(constant | (std == 0), 1.0, std)


def at_least(smallest: int) -> Interval:
    """Return the constraint of an integer."""
    return Interval(Integral, smallest, None, closed="left")


def positive(closed: str = "neither") -> Interval:
    """Return the constraint of a number above 0, or from 0 with closed="left"."""
    return Interval(Real, 0, None, closed=closed)


def inside(low: float, high: float, closed: str = "neither") -> Interval:
    """Return the constraint of a number between two others."""
    return Interval(Real, low, high, closed=closed)


def choice(names: Iterable[str]) -> StrOptions:
    """Return the constraint of a name."""
    return StrOptions(set(names))


def check_weights(sample_weight, X: np.ndarray) -> np.ndarray:
    """Return finite weights >= 0 of the rows of X, in float64.

    Raises
    ------
    ValueError
        If a weight is negative, or all are 0.
    """
    return _check_sample_weight(
        sample_weight, X, dtype=np.float64, ensure_non_negative=True
    )


def torch_dtype(dtype: str, X: np.ndarray) -> torch.dtype:
    """Return the dtype to compute in; "auto" follows X."""
    name = X.dtype.name if dtype == "auto" else dtype
    return {"float32": torch.float32, "float64": torch.float64}[name]


def flat_if_one(y: np.ndarray) -> np.ndarray:
    """Return a single column of targets as a vector, with scikit-learn's warning."""
    if y.ndim == 2 and y.shape[1] == 1:
        return column_or_1d(y, warn=True)
    return y


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return logarithms of the probabilities of logits, (n_samples, n_classes)."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
