"""Training with toy modules: schedule, batches, what is kept, and recovery."""

import math
import warnings
from itertools import chain

import pytest
import torch
from torch import nn

from skode._training import (
    History,
    Training,
    _batches,
    _Schedule,
    make_optimizer,
    train,
    train_once,
)
from skode.exceptions import DivergenceError, SolverError, SolverWarning


def how(**changes):
    settings = {
        "max_iter": 100,
        "batch_size": 1000,
        "learning_rate": 0.1,
        "optimizer": "adam",
        "alpha": 0.0,
        "tol": 1e-4,
        "n_iter_no_change": 10,
        "verbose": False,
    }
    return Training(**{**settings, **changes})


class Point(nn.Module):
    """One matrix and one bias to move about."""

    def __init__(self, start=0.0):
        super().__init__()
        self.matrix = nn.Parameter(torch.full((1, 1), start))
        self.bias = nn.Parameter(torch.full((1,), start))


def generator():
    return torch.Generator().manual_seed(0)


def towards(module, target):
    """Return the objective (matrix - target)^2."""
    return lambda rows: (module.matrix - target).square().sum()


# -------------------------------------------------------------------- schedule


def factors(schedule, epochs):
    return [schedule.factor(epoch) for epoch in epochs]


def test_the_rate_rises_stays_and_falls_to_zero():
    schedule = _Schedule(how(max_iter=100))
    assert factors(schedule, range(5)) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors(schedule, range(5, 66)) == [1.0] * 61
    falling = factors(schedule, range(65, 101))
    assert falling == pytest.approx([1 - i / 35 for i in range(36)])
    assert not schedule.done(98) and schedule.done(99)


@pytest.mark.parametrize("max_iter", [1, 2, 3, 7, 10])
def test_few_epochs_all_learn(max_iter):
    schedule = _Schedule(how(max_iter=max_iter))
    assert min(factors(schedule, range(max_iter))) > 0
    assert max(factors(schedule, range(max_iter))) == 1
    assert [schedule.done(i) for i in range(max_iter)].index(True) == max_iter - 1


def test_a_plateau_brings_the_decay_forward():
    schedule = _Schedule(how(max_iter=100, n_iter_no_change=10))
    for epoch in range(10):
        schedule.watch(epoch, 1.0)
        assert schedule.factor(epoch + 1) == min(1.0, (epoch + 2) / 5)
        assert not schedule.converged
    schedule.watch(10, 1.0)
    assert schedule.converged
    assert factors(schedule, range(11, 22)) == pytest.approx(
        [1 - i / 10 for i in range(11)]
    )
    assert not schedule.done(19) and schedule.done(20)


def test_what_the_falling_rate_gains_does_not_undo_a_plateau():
    schedule = _Schedule(how(max_iter=100, n_iter_no_change=10))
    for epoch in range(20):
        schedule.watch(epoch, 1.0 if epoch < 12 else 0.5)
    assert schedule.converged


def test_a_large_gain_up_to_the_end_is_no_convergence():
    schedule = _Schedule(how(max_iter=30, n_iter_no_change=10, tol=1e-4))
    for epoch in range(30):  # 0.2 in ten epochs
        schedule.watch(epoch, -0.02 * epoch)
        assert not schedule.converged
    for epoch in range(30, 41):  # 0.09, less than 1000 tol
        schedule.watch(epoch, -0.58 - 0.009 * (epoch - 29))
    assert schedule.converged


def test_without_tol_there_is_no_plateau_and_the_last_epoch_is_the_end():
    schedule = _Schedule(how(max_iter=30, tol=0.0))
    assert schedule.converged
    for epoch in range(19):
        schedule.watch(epoch, 1.0 if epoch else 2.0)
        assert schedule.converged and not schedule.done(epoch)
    assert schedule.factor(19) == 1


def test_progress_keeps_the_rate_up():
    schedule = _Schedule(how(max_iter=100, tol=1e-4))
    for epoch in range(60):
        schedule.watch(epoch, 10.0 - 0.02 * epoch)
    assert schedule.factor(60) == 1 and not schedule.converged


def test_a_plateau_is_of_the_best_loss():
    noisy = _Schedule(how(max_iter=100, n_iter_no_change=3))
    for epoch, loss in enumerate([1.0, 3.0, 2.0, 1.5]):
        noisy.watch(epoch, loss)
    assert noisy.converged


# --------------------------------------------------------------------- batches


@pytest.mark.parametrize(
    ("rows", "size"), [(10, 3), (10, 10), (10, 99), (7, 1), (9, 4)]
)
def test_batches_cover_all_rows_evenly(rows, size):
    order = torch.randperm(rows, generator=generator())
    batches = _batches(order, size)
    sizes = [len(batch) for batch in batches]
    assert torch.equal(torch.cat(batches), order)
    assert max(sizes) <= size and max(sizes) - min(sizes) <= 1


def rows_of(batch_size, epochs=3, rows=10, seed=0):
    module, seen = Point(), []

    def objective(index):
        seen.append(index.tolist())
        return module.matrix.square().sum()

    settings = how(batch_size=batch_size, max_iter=epochs)
    train(module, objective, rows, settings, torch.Generator().manual_seed(seed))
    return seen


def test_every_epoch_sees_every_row_once_in_an_order_of_its_own():
    seen = rows_of(batch_size=4)
    epochs = [list(chain(*seen[i : i + 3])) for i in (0, 3, 6)]
    assert len(seen) == 9
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert seen == rows_of(batch_size=4) and seen != rows_of(batch_size=4, seed=1)


def test_a_whole_table_is_not_shuffled():
    assert rows_of(batch_size=10) == [list(range(10))] * 3


def test_the_loss_of_an_epoch_is_the_mean_over_its_rows():
    module = Point()

    def objective(rows):
        return rows.float().mean() + 0 * module.matrix.sum()

    history = train(module, objective, 11, how(batch_size=4, max_iter=2), generator())
    assert history.loss == pytest.approx([5.0, 5.0])


# ------------------------------------------------------------------- optimiser


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_it_minimises(optimizer):
    module = Point()
    history = train(
        module, towards(module, 0.7), 1, how(optimizer=optimizer), generator()
    )
    assert float(module.matrix.detach()) == pytest.approx(0.7, abs=0.05)
    assert history.converged and len(history.loss) < 100


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_matrices_decay_and_biases_do_not(optimizer):
    module = Point(1.0)
    settings = how(optimizer=optimizer, alpha=0.5)
    step = make_optimizer(module, settings)
    for param in module.parameters():
        param.grad = torch.zeros_like(param)
    step.step()
    assert float(module.bias.detach()) == 1
    assert 0.9 < float(module.matrix.detach()) < 0.96


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adam_is_that_of_the_paper(dtype):
    """Loshchilov & Hutter (2019), arXiv:1711.05101, Algorithm 2."""
    module, targets = Point(1.0).to(dtype), [0.0, 3.0, -1.0, 0.5]
    step = make_optimizer(module, how(alpha=0.5))
    weight, m, v = 1.0, 0.0, 0.0
    for t, target in enumerate(targets, start=1):
        step.zero_grad()
        towards(module, target)(None).backward()
        step.step()
        slope = 2 * (weight - target)
        m, v = 0.9 * m + 0.1 * slope, 0.99 * v + 0.01 * slope**2
        scaled = (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.99**t)) + 1e-8)
        weight -= 0.1 * scaled + 0.1 * 0.5 * weight
        rel = 1e-12 if dtype == torch.float64 else 1e-5
        assert float(module.matrix.detach()) == pytest.approx(weight, rel=rel)


def test_a_huge_gradient_is_clipped():
    module = Point()
    settings = how(optimizer="sgd", max_iter=1)
    train(module, lambda rows: 1e9 * module.matrix.sum(), 1, settings, generator())
    # Nesterov's first step is 1.9 times the gradient, whose norm is 5.
    assert float(module.matrix.detach()) == pytest.approx(-0.1 * 1.9 * 5, rel=1e-4)


# ------------------------------------------------- validation and what is kept


def test_the_weights_of_the_best_score_are_kept():
    module, weights = Point(), []
    scores = [0.1, 0.5, 0.9, 0.3, 0.2]

    def validate():
        weights.append(float(module.matrix.detach()))
        return scores[len(weights) - 1]

    history = train(
        module, towards(module, 5.0), 1, how(max_iter=5), generator(), validate
    )
    assert history.scores == scores and history.best_score == 0.9
    assert float(module.matrix.detach()) == weights[2]
    assert len(set(weights)) == 5


def test_scores_are_taken_in_evaluation_mode_and_epochs_are_not():
    module, modes = Point().eval(), []

    def objective(rows):
        modes.append(module.training)
        return module.matrix.square().sum()

    def validate():
        modes.append(module.training)
        return 0.0

    train(module, objective, 1, how(max_iter=3), generator(), validate)
    assert modes == [True, False] * 3


def test_training_stops_when_the_score_has_stopped_improving():
    module = Point()
    settings = how(n_iter_no_change=3)
    history = train(module, towards(module, 1e3), 1, settings, generator(), lambda: 0.5)
    assert history.converged and 4 < len(history.scores) < 20


# -------------------------------------------------------------------- recovery


class Cliff:
    """(matrix - 9)^2, but NaN once the matrix has moved beyond `edge`."""

    def __init__(self, module, edge):
        self.module, self.edge, self.seen = module, edge, []

    def __call__(self, rows):
        at = float(self.module.matrix.detach())
        self.seen.append(at)
        loss = (self.module.matrix - 9).square().sum()
        return loss * math.nan if at > self.edge else loss


def test_after_a_divergence_it_goes_back_and_learns_more_slowly():
    module = Point()
    cliff = Cliff(module, edge=5.0)
    settings = how(max_iter=8, learning_rate=6.0)
    with pytest.warns(SolverWarning) as caught:
        history = train(module, cliff, 1, settings, generator())
    (told,) = caught
    assert str(told.message) == (
        "The fit went back to its best weights 2 times, and lowered the learning rate "
        "to 0.54 in the end; set learning_rate_init to that to avoid this. Epoch 2 "
        "diverged: The loss is not finite."
    )
    # The step from 0 led over the edge, so it goes back to 0, not to the bad weights.
    assert cliff.seen[:3] == [0.0, pytest.approx(6.0, rel=1e-4), 0.0]
    assert 0 < cliff.seen[3] < 5
    assert all(math.isfinite(loss) for loss in history.loss)
    assert float(module.matrix.detach()) != 0


def test_a_divergence_under_validation_goes_back_to_the_best_score():
    module, calls = Point(), []

    def objective(rows):
        calls.append(float(module.matrix.detach()))
        loss = (module.matrix - 9).square().sum()
        return loss * math.nan if len(calls) == 4 else loss

    scores = iter([0.1, 0.9, 0.2, 0.3, 0.4])
    with pytest.warns(SolverWarning, match=r"weights once, .* Epoch 4 diverged"):
        train(module, objective, 1, how(max_iter=5), generator(), lambda: next(scores))
    assert calls[4] == calls[2] != calls[3]


@pytest.mark.parametrize(
    "failure",
    [
        lambda loss: loss * math.inf,
        lambda loss: _fail(SolverError("met NaN.")),
        lambda loss: _nan_gradient(loss),
    ],
    ids=["loss", "solver", "gradient"],
)
def test_when_no_rate_helps_it_says_so_and_keeps_the_best(failure):
    module, calls = Point(), []

    def objective(rows):
        calls.append(float(module.matrix.detach()))
        loss = (module.matrix - 9).square().sum()
        return loss if len(calls) <= 3 else failure(loss)

    history = History()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the error tells it
        with pytest.raises(DivergenceError, match="diverged in epoch 9 ") as error:
            train(module, objective, 1, how(), generator(), history=history)
    assert error.value.epoch == 9
    assert len(history.loss) == 3
    assert float(module.matrix.detach()) == calls[2]


def test_several_divergences_are_told_in_one_warning():
    module, calls = Point(), []

    def objective(rows):
        calls.append(None)
        loss = (module.matrix - 9).square().sum()
        return loss * math.nan if len(calls) in (2, 4) else loss

    with pytest.warns(SolverWarning) as caught:
        train(module, objective, 1, how(max_iter=6), generator())
    (told,) = caught
    assert "weights 2 times, and lowered the learning rate to 0.009" in str(
        told.message
    )
    assert "Epoch 2 diverged" in str(told.message)


@pytest.mark.parametrize("max_iter", [1, 3, 5])
def test_a_fit_without_a_good_epoch_is_an_error_however_few_there_are(max_iter):
    module = Point(2.0)
    history = History()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DivergenceError) as error:
            train(
                module,
                lambda rows: math.nan * module.matrix.sum(),
                1,
                how(max_iter=max_iter),
                generator(),
                history=history,
            )
    assert error.value.epoch == max_iter
    assert "those it began with if no epoch succeeded" in str(error.value)
    assert history.loss == [] and float(module.matrix.detach()) == 2


def test_one_good_epoch_is_a_fit():
    module, calls = Point(), []

    def objective(rows):
        calls.append(None)
        return module.matrix.sum() * (1.0 if len(calls) == 2 else math.nan)

    with pytest.warns(SolverWarning) as caught:
        history = train(module, objective, 1, how(max_iter=3), generator())
    assert len(history.loss) == 1 and len(caught) == 1


def _fail(error):
    raise error


def _nan_gradient(loss):
    return loss + torch.sqrt(0.0 * loss)


def test_a_divergence_keeps_the_scores():
    module, calls = Point(), []

    def validate():
        calls.append(None)
        if len(calls) > 2:
            raise SolverError("met NaN.")
        return float(len(calls))

    history = History()
    with pytest.raises(DivergenceError):
        train(module, towards(module, 9), 1, how(), generator(), validate, history)
    assert history.scores == [1.0, 2.0] and history.best_score == 2.0


def interrupted_in_epoch_seven():
    """Return a module, its objective, and the weights that were seen."""
    module, seen = Point(), []

    def objective(rows):
        seen.append(float(module.matrix.detach()))
        if len(seen) == 7:
            raise KeyboardInterrupt
        return (module.matrix - 9).square().sum()

    return module, objective, seen


def test_an_interruption_keeps_the_best_and_is_no_error():
    module, objective, seen = interrupted_in_epoch_seven()
    with pytest.warns(SolverWarning, match="Interrupted after 6 epochs"):
        history = train(module, objective, 1, how(), generator())
    assert history.interrupted and not history.converged and len(history.loss) == 6
    assert float(module.matrix.detach()) == seen[5]


def test_an_interruption_keeps_the_average_where_there_is_one():
    module, objective, seen = interrupted_in_epoch_seven()
    with pytest.warns(SolverWarning, match="Interrupted after 6 epochs"):
        train(module, objective, 1, how(averaging=0.9), generator())
    kept = float(module.matrix.detach())
    assert seen[1] < kept < seen[6] and kept not in seen


def test_an_interruption_before_anything_was_learned_passes():
    def objective(rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(Point(), objective, 1, how(), generator())


def test_other_errors_pass():
    with pytest.raises(ZeroDivisionError):
        train(Point(), lambda rows: _fail(ZeroDivisionError()), 1, how(), generator())


# ------------------------------------------------------------------ train_once


def test_one_epoch_at_the_full_rate():
    module = Point()
    settings = how()
    step = make_optimizer(module, settings)
    loss = train_once(module, towards(module, 9.0), 1, settings, step, generator())
    assert loss == pytest.approx(81.0)
    assert float(module.matrix.detach()) == pytest.approx(0.1, rel=1e-4)


def test_the_rate_is_read_at_each_epoch():
    module = Point()
    step = make_optimizer(module, how())
    for rate in (0.1, 0.02):
        before = float(module.matrix.detach())
        settings = how(learning_rate=rate)
        train_once(module, towards(module, 1e6), 1, settings, step, generator())
        moved = float(module.matrix.detach()) - before
        assert moved == pytest.approx(rate, rel=1e-3)


def test_a_diverging_epoch_changes_nothing():
    module, calls = Point(), []

    def objective(rows):
        calls.append(None)
        return module.matrix.sum() * (1.0 if len(calls) == 1 else math.nan)

    settings = how(batch_size=1)
    step = make_optimizer(module, settings)
    with pytest.raises(DivergenceError, match="The loss is not finite"):
        train_once(module, objective, 2, settings, step, generator())
    assert len(calls) == 2 and float(module.matrix.detach()) == 0


@pytest.fixture
def quiet_tqdm():
    with warnings.catch_warnings():
        # tqdm misses ipywidgets in a notebook only, but says so anywhere.
        warnings.filterwarnings("ignore", "IProgress not found")
        yield


def last_bar(capsys):
    """Return what the bar shows in the end; empty, if there was none."""
    return capsys.readouterr().err.split("\r")[-1]


@pytest.mark.usefixtures("quiet_tqdm")
def test_verbose_shows_a_bar(capsys):
    module = Point()
    settings = how(max_iter=3, verbose=True)
    train(module, towards(module, 1.0), 1, settings, generator())
    bar = last_bar(capsys)
    assert "100%" in bar and " 3/3 [" in bar and "loss=" in bar
    assert "validation=" not in bar
    train(module, towards(module, 1.0), 1, how(max_iter=3), generator())
    assert last_bar(capsys) == ""


@pytest.mark.usefixtures("quiet_tqdm")
def test_the_bar_of_a_fit_that_ends_early_is_complete(capsys):
    module = Point()
    settings = how(n_iter_no_change=3, verbose=True)
    history = train(module, towards(module, 9), 1, settings, generator(), lambda: 0.5)
    n = len(history.loss)
    bar = last_bar(capsys)
    assert n < 100 and "100%" in bar and f" {n}/{n} [" in bar
    assert "validation=0.5" in bar
