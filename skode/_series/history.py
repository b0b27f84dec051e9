"""Rows as they came, and the series that they make.

n rows, C channels, P covariates.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from skode._series.clock import seconds_between


@dataclass(frozen=True, eq=False)
class History:
    """One series: its rows in the order of time."""

    origin: int | float
    """Time of the first row when the history was made, exact; `times` count from it."""
    exact: np.ndarray
    """(n,) increasing: int64 nanoseconds, or float64 numbers."""
    values: np.ndarray
    """(n, C) float64, NaN where not observed; of queries (n, 0)."""
    covariates: np.ndarray
    """(n, P) float64."""

    def __len__(self) -> int:
        return len(self.exact)

    @cached_property
    def times(self) -> np.ndarray:
        """(n,) float64 seconds, or numbers in the user's units, since the origin."""
        return self.relative(self.exact)

    def relative(self, exact: np.ndarray) -> np.ndarray:
        """Return other exact times in float64, counted from this history's origin."""
        return seconds_between(np.asarray(exact, self.exact.dtype), self.origin)

    def take(self, rows: np.ndarray | slice) -> "History":
        """Return some of the rows, in their order, counted from the same origin."""
        return History(
            self.origin, self.exact[rows], self.values[rows], self.covariates[rows]
        )

    def before(self, exact: int | float, inclusive: bool = False) -> "History":
        """Return the rows before an exact time, or up to and with it."""
        return self.take(slice(self._count_before(exact, inclusive)))

    def after(self, exact: int | float, inclusive: bool = False) -> "History":
        """Return the rows after an exact time, or from it on."""
        return self.take(slice(self._count_before(exact, not inclusive), None))

    def _count_before(self, exact: int | float, inclusive: bool) -> int:
        time = self.exact.dtype.type(exact)
        return int((self.exact <= time if inclusive else self.exact < time).sum())

    def counted_from(self, origin: int | float) -> "History":
        """Return the same rows with another origin."""
        return History(origin, self.exact, self.values, self.covariates)

    def join(self, other: "History") -> "History":
        """Return the rows of both; at a time that both have, the mean of the two.

        The origin is the first time of all, and no time is rounded.
        """
        if not len(self) or not len(other):
            return self if len(self) else other
        order, starts, exact = _grouped(
            np.zeros(len(self) + len(other), dtype=np.intp),
            np.concatenate([self.exact, other.exact]),
        )
        values, covariates = (
            _merged(np.concatenate(pair), order, starts)
            for pair in (
                (self.values, other.values),
                (self.covariates, other.covariates),
            )
        )
        return History(exact[0].item(), exact, values, covariates)


@dataclass(frozen=True, eq=False)
class Table:
    """Rows as the user gave them, parsed."""

    keys: list[Hashable]
    """The distinct series in the order of their first rows; [None]: there is one."""
    codes: np.ndarray
    """(n,) which of the keys each row is of."""
    times: np.ndarray
    """(n,) exact: int64 nanoseconds (of zoned stamps, in UTC) or float64 numbers."""
    covariates: np.ndarray
    """(n, P) float64."""
    values: np.ndarray | None
    """(n, C) float64 with NaN; None: queries."""

    def __len__(self) -> int:
        return len(self.times)

    def histories(self) -> dict[Hashable, History]:
        """Return each series' rows by time, one per time.

        What was observed more than once at a time is the mean of it, and so are
        covariates. The order of rows changes nothing, to the last bit.
        """
        order, starts, exact = _grouped(self.codes, self.times)
        return self._split(
            self.codes[order][starts],
            exact,
            _merged(self._values, order, starts),
            _merged(self.covariates, order, starts),
        )

    def queries(self) -> dict[Hashable, History]:
        """Return each series' rows by time, every row on its own.

        Rows at one time may ask for different covariates, so that none are merged.
        `positions` says where a row went.
        """
        order = self._order
        return self._split(
            self.codes[order],
            self.times[order],
            self._values[order],
            self.covariates[order],
        )

    @cached_property
    def positions(self) -> np.ndarray:
        """(n,) each row's place in the query of its series.

        An answer of shape (B, T, ...) to the queries, in the order of `keys`, is
        `answer[codes, positions]` row by row.
        """
        order = self._order
        ends = np.searchsorted(self.codes[order], np.arange(len(self.keys)))
        positions = np.empty(len(self), dtype=np.intp)
        positions[order] = np.arange(len(self)) - ends[self.codes[order]]
        return positions

    @cached_property
    def _order(self) -> np.ndarray:
        return np.lexsort((self.times, self.codes))

    @property
    def _values(self) -> np.ndarray:
        return np.empty((len(self), 0)) if self.values is None else self.values

    def _split(
        self,
        codes: np.ndarray,
        exact: np.ndarray,
        values: np.ndarray,
        covariates: np.ndarray,
    ) -> dict[Hashable, History]:
        """Return histories of rows that are sorted by series and time."""
        bounds = np.searchsorted(codes, np.arange(len(self.keys) + 1))
        return {
            key: History(
                exact[start].item(),
                exact[start:end],
                values[start:end],
                covariates[start:end],
            )
            for key, start, end in zip(self.keys, bounds[:-1], bounds[1:], strict=True)
        }


def _grouped(
    codes: np.ndarray, exact: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the order by series and time, where equals start, and their times."""
    order = np.lexsort((exact, codes))
    codes, exact = codes[order], exact[order]
    new = (codes[1:] != codes[:-1]) | (exact[1:] != exact[:-1])
    starts = np.flatnonzero(np.concatenate([[True], new]))
    return order, starts, exact[starts]


def _merged(rows: np.ndarray, order: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return the mean of each group's rows, of what is there; (n, K) -> (groups, K)."""
    rows = rows[order]
    merged = rows[starts]
    sizes = np.diff(starts, append=len(rows))
    group = np.repeat(np.arange(len(starts)), sizes)
    of_several = np.repeat(sizes > 1, sizes)
    for column in range(rows.shape[1]):
        there = np.flatnonzero(of_several & ~np.isnan(rows[:, column]))
        # Sums are taken by size, so that no order of rows shows in the last bit.
        there = there[np.lexsort((rows[there, column], group[there]))]
        groups, first = np.unique(group[there], return_index=True)
        if len(groups):
            merged[groups, column] = _means(rows[there, column], first)
    return merged


def _means(values: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Return means of sorted groups, exact where all of a group are equal."""
    counts = np.diff(first, append=len(values))
    least = values[first]
    excess = values / np.repeat(counts, counts) - np.repeat(least / counts, counts)
    return least + np.add.reduceat(excess, first)
