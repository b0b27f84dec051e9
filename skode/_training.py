"""Minibatches, optimiser, schedule, early stopping and recovery; for any module.

The learning rate rises over the first epochs, stays, and falls to zero at the end:
over the last third of `max_iter`, or as soon as the best loss has not improved by
`tol` for `n_iter_no_change` epochs.
"""

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from skode.exceptions import DivergenceError, SolverError, SolverWarning

Objective = Callable[[Tensor], Tensor]
"""Indices of rows -> their loss, a scalar."""

_WARM_UP = 5
_DECAY_SHARE = 0.35
_RECOVERIES = 5
_CLIP = 5.0
_NEARLY = 1000.0
"""A fit that ended at `max_iter` has not converged if it gained more than that many
`tol` in its last `n_iter_no_change` epochs."""


@dataclass(frozen=True, slots=True)
class Training:
    """How to train; fields as the estimators' parameters of the same names."""

    max_iter: int
    batch_size: int
    learning_rate: float
    optimizer: str
    alpha: float
    tol: float
    n_iter_no_change: int
    verbose: bool
    averaging: float = 0.0
    """Share that the running average of the weights, which is what a fit ends with,
    keeps of itself at each step; 0: the weights themselves."""
    plateau_from: int = 0
    """First epoch that may be part of a plateau, where the task grows at first."""


@dataclass(slots=True)
class History:
    """What happened."""

    loss: list[float] = field(default_factory=list)
    """Mean training loss of each epoch."""
    scores: list[float] = field(default_factory=list)
    """Validation score of each epoch; empty without validation."""
    converged: bool = False
    interrupted: bool = False

    @property
    def best_score(self) -> float | None:
        """The largest validation score."""
        return max(self.scores, default=None)


def make_optimizer(module: nn.Module, how: Training) -> torch.optim.Optimizer:
    """Return the optimiser; `alpha` decays matrices, never biases."""
    matrices = [p for p in module.parameters() if p.ndim > 1]
    vectors = [p for p in module.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": how.alpha},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if how.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=how.learning_rate, momentum=0.9, nesterov=True
        )
    # Fused: one call for all weights, where a loop costs more than a small net.
    return torch.optim.AdamW(
        groups, lr=how.learning_rate, betas=(0.9, 0.99), fused=True
    )


def train(
    module: nn.Module,
    objective: Objective,
    n_rows: int,
    how: Training,
    generator: torch.Generator,
    validate: Callable[[], float] | None = None,
    history: History | None = None,
) -> History:
    """Train in place; return what happened.

    Parameters
    ----------
    validate : callable or None, default=None
        Called with the module in evaluation mode; returns a score, larger is better.
        The weights of the best one are kept, and training stops when it has not
        improved by `tol` for `n_iter_no_change` epochs.

    Raises
    ------
    DivergenceError
        If lower learning rates did not help against a loss that is not finite, or no
        epoch succeeded. The module then has the weights of its best epoch, or those
        it came with.
    """
    history = History() if history is None else history
    keeper = _Keeper(module)
    schedule = _Schedule(how)
    optimizer = make_optimizer(module, how)
    average = _Average(module, how.averaging)
    bar = tqdm(total=how.max_iter, disable=not how.verbose, unit="epoch")
    failures: list[str] = []
    scale = 1.0
    try:
        for epoch in range(how.max_iter):
            _set_rate(optimizer, how.learning_rate * schedule.factor(epoch) * scale)
            keeper.begin()
            try:
                loss = _epoch(
                    module,
                    objective,
                    n_rows,
                    how.batch_size,
                    optimizer,
                    generator,
                    average,
                )
                score = None
                if validate is not None:
                    module.eval()
                    with average.lent():
                        score = validate()
                        keeper.keep(score)
            except (SolverError, FloatingPointError) as error:
                failures.append(f"Epoch {epoch + 1} diverged: {error}")
                keeper.restore()
                average = _Average(module, how.averaging)
                fruitless = epoch + 1 == how.max_iter and not history.loss
                if fruitless or len(failures) > _RECOVERIES:
                    raise DivergenceError(epoch + 1, str(error)) from error
                scale *= 0.3
                optimizer = make_optimizer(module, how)
                bar.update()
                continue
            history.loss.append(loss)
            shown = {"loss": f"{loss:.4g}"}
            if score is None:
                keeper.keep_begun(-loss)
            else:
                history.scores.append(score)
                shown["validation"] = f"{score:.4g}"
            bar.set_postfix(shown, refresh=False)
            bar.update()
            schedule.watch(epoch, loss if score is None else -score)
            if schedule.done(epoch):
                bar.total = bar.n  # a fit that ends early is complete
                break
    except KeyboardInterrupt:
        history.interrupted = True
        if not history.loss:
            keeper.restore()
            raise  # nothing was learned that could be kept
        warnings.warn(
            f"Interrupted after {len(history.loss)} epochs: the best weights so far "
            "are kept and the estimator is fitted.",
            SolverWarning,
            stacklevel=2,
        )
    finally:
        bar.close()
    if failures:
        often = "once" if len(failures) == 1 else f"{len(failures)} times"
        warnings.warn(
            f"The fit went back to its best weights {often}, and lowered the learning "
            f"rate to {how.learning_rate * scale:.3g} in the end; set "
            f"learning_rate_init to that to avoid this. {failures[0]}",
            SolverWarning,
            stacklevel=2,
        )
    # Without a score, the average stands for the best weights: those of the least loss
    # of some epoch are noisier. Without an average, a fit that came to its end has the
    # last ones, of a learning rate near zero.
    if validate is not None or (history.interrupted and not how.averaging):
        keeper.restore()
    else:
        average.settle()
    history.converged = schedule.converged
    return history


def train_once(
    module: nn.Module,
    objective: Objective,
    n_rows: int,
    how: Training,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> float:
    """Train for one epoch at the full learning rate; return its mean loss.

    Raises
    ------
    DivergenceError
        If the loss was not finite; the module keeps the weights it came with.
    """
    keeper = _Keeper(module)
    _set_rate(optimizer, how.learning_rate)
    try:
        return _epoch(module, objective, n_rows, how.batch_size, optimizer, generator)
    except (SolverError, FloatingPointError) as error:
        keeper.restore()
        raise DivergenceError(1, str(error)) from error


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _epoch(
    module: nn.Module,
    objective: Objective,
    n_rows: int,
    batch_size: int,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    average: "_Average | None" = None,
) -> float:
    """Go over all rows once; return the mean loss."""
    module.train()
    params = list(module.parameters())
    total = 0.0
    order = (
        torch.randperm(n_rows, generator=generator)
        if batch_size < n_rows
        else torch.arange(n_rows)
    )
    for rows in _batches(order.to(params[0].device), batch_size):
        optimizer.zero_grad(set_to_none=True)
        loss = objective(rows)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(params, _CLIP)
        # One host sync for both.
        value, slope = torch.stack((loss.detach(), norm)).tolist()
        if not math.isfinite(value):
            raise FloatingPointError("The loss is not finite.")
        if not math.isfinite(slope):
            raise FloatingPointError("The gradient is not finite.")
        optimizer.step()
        if average is not None:
            average.follow()
        total += value * len(rows)
    return total / n_rows


def _batches(order: Tensor, batch_size: int) -> tuple[Tensor, ...]:
    """Split into batches of nearly equal size, none larger than `batch_size`."""
    return order.tensor_split(max(1, math.ceil(len(order) / batch_size)))


class _Keeper:
    """Remembers the best weights.

    A validation score is that of the weights at the end of its epoch. A training loss
    is not: the last step came after it, and may have been the one too far. It counts
    for the weights at the beginning of its epoch.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._best = -math.inf
        self._state = copy.deepcopy(module.state_dict())
        self._begun = copy.deepcopy(self._state)

    def begin(self) -> None:
        """Copy the weights with which an epoch begins."""
        self._copy_to(self._begun)

    def keep(self, score: float) -> None:
        """Keep the present weights if `score` is the best so far."""
        if score > self._best:
            self._best = score
            self._copy_to(self._state)

    def keep_begun(self, score: float) -> None:
        """Keep the weights of `begin` if `score` is the best so far."""
        if score > self._best:
            self._best = score
            self._state, self._begun = self._begun, self._state

    def _copy_to(self, state: dict[str, Tensor]) -> None:
        for name, value in self._module.state_dict().items():
            state[name].copy_(value)

    def restore(self) -> None:
        """Put the best weights back."""
        self._module.load_state_dict(self._state)


class _Average:
    """The running average of a module's weights (Polyak); nothing where `keep` is 0."""

    def __init__(self, module: nn.Module, keep: float) -> None:
        self._keep, self._steps = keep, 0
        self._params = [p.data for p in module.parameters()] if keep else []
        self._mean = [p.clone() for p in self._params]

    def follow(self) -> None:
        """Take note of the weights after a step."""
        if not self._params:
            return
        self._steps += 1
        # Early on, a longer memory would be of weights that were hardly trained.
        keep = min(self._keep, self._steps / (self._steps + 10))
        torch._foreach_lerp_(self._mean, self._params, 1 - keep)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Give the module the average inside the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def settle(self) -> None:
        """Give the module the average for good."""
        self._swap()

    def _swap(self) -> None:
        for mean, param in zip(self._mean, self._params, strict=True):
            held = param.clone()
            param.copy_(mean)
            mean.copy_(held)


class _Schedule:
    """Warm-up, plateau, decay; and when to stop."""

    def __init__(self, how: Training) -> None:
        self._how = how
        self._warm_up = min(_WARM_UP, max(1, how.max_iter // 10))
        self._decay = max(1, round(_DECAY_SHARE * how.max_iter))
        self._start = how.max_iter - self._decay
        self._bests: list[float] = []
        self._plateau = False
        self.converged = how.tol == 0
        """Whether there was a plateau, or nearly one: see `_NEARLY`. With `tol` 0, no
        plateau is looked for, and all epochs are what was asked for."""

    def factor(self, epoch: int) -> float:
        """Return the share of the learning rate for an epoch."""
        rise = min(1.0, (epoch + 1) / self._warm_up)
        if epoch < self._start:
            return rise
        left = 1.0 - (epoch - self._start) / self._decay
        return rise * max(left, 0.0)

    def watch(self, epoch: int, loss: float) -> None:
        """Take note of an epoch's loss; bring the decay forward on a plateau."""
        tol = self._how.tol
        # A short fit is judged on its second half.
        patience = min(self._how.n_iter_no_change, max(1, self._how.max_iter // 2))
        self._bests.append(min(loss, self._bests[-1] if self._bests else math.inf))
        if len(self._bests) <= patience:
            return
        gain = self._bests[-1 - patience] - self._bests[-1]
        grown = len(self._bests) > patience + self._how.plateau_from
        if grown and gain < tol and epoch < self._start:
            self._start = epoch + 1
            self._decay = min(self._decay, max(patience, epoch // 2))
            self._plateau = True
        # What the falling rate gains after a plateau does not undo it.
        self.converged = self._plateau or tol == 0 or gain <= _NEARLY * tol

    def done(self, epoch: int) -> bool:
        """Return whether the learning rate has come down to zero."""
        return epoch + 1 >= self._start + self._decay
