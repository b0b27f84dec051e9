"""Which rows of a history a query is answered from."""

import numpy as np
import pytest

from skode._conditioning import questions_of
from skode._series.history import History

EXACT = np.array([0.0, 1.0, 1.5, 4.0, 7.0, 7.5, 9.0, 10.0])
KNOWN = History(0.0, EXACT, np.arange(16.0).reshape(8, 2), np.empty((8, 0)))


def asked(times):
    times = np.sort(np.asarray(times, dtype=float))
    return History(
        times[0], times, np.empty((len(times), 0)), np.empty((len(times), 0))
    )


def questions(times, span, known=KNOWN):
    return questions_of({"x": asked(times)}, {"x": known}, span, 2)


@pytest.mark.parametrize("span", [None, 0.5, 3.0, 100.0])
@pytest.mark.parametrize(
    "times", [[11.0], [-5, 0, 3, 8, 10, 50], np.linspace(-3, 13, 40), [-1e30, 5, 1e30]]
)
def test_every_query_is_answered_once_from_the_time_of_a_context(times, span):
    found = questions(times, span)
    positions = np.concatenate([question.positions for question in found])
    assert sorted(positions) == list(range(len(times)))
    whole = asked(times)
    for question in found:
        assert question.key == "x" and len(question.context)
        assert np.array_equal(question.queries.exact, whole.exact[question.positions])
        assert question.queries.origin == question.context.origin
        assert question.context.times[0] == 0
        assert question.queries.values.shape == (len(question.positions), 2)
        assert np.isnan(question.queries.values).all()
        if span is not None:
            assert np.ptp(question.context.exact) <= span


def test_without_a_span_the_whole_history_is_the_context():
    (question,) = questions([-5.0, 3.0, 20.0], None)
    assert np.array_equal(question.context.exact, EXACT)
    assert question.queries.times.tolist() == [-5, 3, 20]


def test_the_future_is_asked_of_the_last_span():
    (question,) = questions([10.5, 99.0], 3.0)
    assert question.context.exact.tolist() == [7.0, 7.5, 9.0, 10.0]
    assert question.queries.times.tolist() == [3.5, 92.0]


def test_the_past_is_asked_of_what_lies_around_it():
    found = {q.queries.exact[0]: q for q in questions([1.2, 8.0, 9.9], 3.0)}
    # 9.9 is in the second half of the last span, the others are not.
    assert found[9.9].context.exact.tolist() == [7.0, 7.5, 9.0, 10.0]
    for time in (1.2, 8.0):
        seen = found[time].context.exact
        assert seen.min() <= time <= seen.max()
    assert found[1.2].context.exact.tolist() == [1.0, 1.5]


def test_where_nothing_was_observed_the_nearest_row_is_the_context():
    (question,) = questions([5.5], 0.5)
    assert question.context.exact.tolist() in ([4.0], [7.0])


@pytest.mark.parametrize("known", [{}, {"x": KNOWN.take(slice(0))}])
def test_a_series_without_rows_is_asked_of_nothing(known):
    (question,) = questions_of({"x": asked([3.0, 5.0])}, known, 2.0, 2)
    assert not len(question.context) and question.positions.tolist() == [0, 1]
    assert question.queries.times.tolist() == [0, 2]


def test_a_context_does_not_depend_on_what_else_is_asked():
    times = np.linspace(-3, 13, 40)
    together = {}
    for question in questions(times, 2.5):
        for time in question.queries.exact:
            together[time] = question.context.exact
    for time in times:
        (alone,) = questions([time], 2.5)
        assert np.array_equal(alone.context.exact, together[time])
