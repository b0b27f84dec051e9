"""Which rows of a history a query is answered from. A service of `forecast`."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import numpy as np

from skode._series.history import History

__all__ = ["Question", "questions_of"]


@dataclass(frozen=True, eq=False)
class Question:
    """A context, and what is asked of it."""

    key: Hashable
    context: History
    queries: History
    """Times count from the context's origin; in the order of time."""
    positions: np.ndarray
    """Where the queries stand among all of this series'."""


def questions_of(
    queries: Mapping[Hashable, History],
    known: Mapping[Hashable, History],
    span: float | None,
    n_channels: int,
) -> list[Question]:
    """Return questions that together answer all queries.

    Parameters
    ----------
    queries : mapping of History
        Rows that want an answer, by series. They keep values to compare answers with.
    known : mapping of History
        What was observed; a series may be missing, which is asked of the prior.
    span : float or None
        Time that a context covers; None: the whole history. Queries in the second half
        of a history's last span, or beyond, are answered from that; older ones from as
        long a stretch around them, or the first one.
    """
    questions = []
    for key, asked in queries.items():
        history = known.get(key)
        if history is None or not len(history):
            asked = _unobserved(asked, n_channels)
            every = np.arange(len(asked))
            questions.append(Question(key, asked.take(slice(0, 0)), asked, every))
            continue
        times = history.relative(asked.exact)
        for rows, context in _stretches(times, history, span):
            context = context.counted_from(context.exact[0].item())
            part = asked.take(rows).counted_from(context.origin)
            part = _unobserved(part, n_channels)
            questions.append(Question(key, context, part, rows))
    return questions


def _stretches(times: np.ndarray, history: History, span: float | None):
    """Yield rows of the queries, and the part of the history that answers them."""
    begin, end = history.times[0], history.times[-1]
    if span is None or end - begin <= span:
        yield np.arange(len(times)), history
        return
    half = span / 2
    # Stretch 0 is the last one; stretch j covers half a span, and sees one around it.
    # The oldest sees the record's first span, and answers all that was before.
    oldest = np.ceil((end - begin) / half - 1.5)
    stretch = np.clip(np.ceil((end - half - times) / half), 0, oldest).astype(np.int64)
    for number in np.unique(stretch):
        rows = np.flatnonzero(stretch == number)
        if number == 0:
            seen = history.times >= end - span
        else:
            centre = max(end - half * (number + 0.5), begin + half)
            seen = np.abs(history.times - centre) <= half
            if not seen.any():
                seen[np.argmin(np.abs(history.times - centre))] = True
        yield rows, history.take(seen)


def _unobserved(asked: History, n_channels: int) -> History:
    """Return queries that hold no values with all of them missing."""
    if asked.values.shape[1]:
        return asked
    nothing = np.full((len(asked), n_channels), np.nan)
    return History(asked.origin, asked.exact, nothing, asked.covariates)
