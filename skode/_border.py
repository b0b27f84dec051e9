"""The border between scikit-learn's world and torch's: arrays, seeds, devices.

The only place that knows both sides, and the only one that uses scikit-learn's
private names.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral, Real

import numpy as np
import torch
from sklearn.base import BaseEstimator, _fit_context
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.extmath import softmax
from sklearn.utils.validation import _check_sample_weight
from torch import Tensor, nn

__all__ = [
    "FLOATS",
    "PortableEstimator",
    "apply",
    "at_least",
    "check_weights",
    "choice",
    "fit_context",
    "inside",
    "log_softmax",
    "positive",
    "resolve_device",
    "seeded",
    "softmax",
    "to_array",
    "to_tensor",
    "torch_dtype",
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
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device={device!r} is not to be had here ({error}). Use device='auto' or "
            "'cpu'."
        ) from error
    return resolved


@contextmanager
def seeded(random_state) -> Iterator[torch.Generator]:
    """Seed torch inside the block and restore it after; yield a generator.

    NumPy's global state is never drawn from, so `None` takes fresh entropy.
    """
    if random_state is None:
        seed = int(np.random.SeedSequence().generate_state(1)[0])
    else:
        seed = int(check_random_state(random_state).randint(np.iinfo(np.int32).max))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield torch.Generator().manual_seed(seed)


def to_tensor(array: np.ndarray, device: torch.device) -> Tensor:
    """Return a tensor of the array's dtype; never shares its memory."""
    return torch.tensor(np.ascontiguousarray(array), device=device)


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
            rows = torch.tensor(np.ascontiguousarray(X[start : start + _ROWS_AT_ONCE]))
            parts.append(to_array(function(rows.to(example.device, dtype))))
    return np.concatenate(parts)


def weighted_moments(
    values: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return weighted mean and standard deviation by column; constant columns get 1.

    Weights count rows: a row of weight two is two rows.
    """
    # Relative to a row that counts, a constant column is exactly 0, however many rows
    # are summed; in one order of memory, frames and arrays give the same bits.
    origin = values[np.argmax(weight > 0)].astype(np.float64)
    centred = np.subtract(values, origin, order="C")
    offset = np.average(centred, axis=0, weights=weight)
    std = np.sqrt(np.average((centred - offset) ** 2, axis=0, weights=weight))
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


def inside(low: float, high: float) -> Interval:
    """Return the constraint of a number between two others."""
    return Interval(Real, low, high, closed="neither")


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


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return logarithms of the probabilities of logits, (n_samples, n_classes)."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
