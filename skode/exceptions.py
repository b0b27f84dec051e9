"""Errors and warnings that skode raises, beside scikit-learn's own."""

from collections.abc import Sequence

__all__ = ["DivergenceError", "SolverError", "SolverWarning"]

_MAX_ROWS_NAMED = 5


class SolverError(RuntimeError):
    """An ODE solve that did not reach the end for some rows.

    Parameters
    ----------
    reason : str
        What happened, in words that finish the sentence "3 of 128 rows ...".
    rows : sequence of int
        Rows that failed, in the order of the input.
    n_rows : int
        Number of rows solved together.
    t : sequence of float
        Time that each failed row had reached.
    remedy : str
        What the caller can do about it.
    status : str, default=""
        Name of the status shared by the failed rows.

    Attributes
    ----------
    rows, n_rows, t, status
        As passed.
    """

    def __init__(
        self,
        reason: str,
        rows: Sequence[int] = (),
        n_rows: int = 0,
        t: Sequence[float] = (),
        remedy: str = "",
        status: str = "",
    ) -> None:
        # All arguments go to `args`, so that the error survives pickling between
        # the processes of a parallel search.
        super().__init__(reason, rows, n_rows, t, remedy, status)
        self.reason = reason
        self.rows = tuple(rows)
        self.n_rows = n_rows
        self.t = tuple(t)
        self.remedy = remedy
        self.status = status

    def __str__(self) -> str:
        """Say how many rows failed, how, where, and what to do."""
        if not self.rows:
            return f"{self.reason} {self.remedy}".strip()
        named = ", ".join(str(row) for row in self.rows[:_MAX_ROWS_NAMED])
        if len(self.rows) > _MAX_ROWS_NAMED:
            named += ", ..."
        at = f" at t={min(self.t):.6g}" if self.t else ""
        return (
            f"{len(self.rows)} of {self.n_rows} rows {self.reason}{at} "
            f"(rows {named}). {self.remedy}"
        ).strip()


class SolverWarning(UserWarning):
    """Something about the ODE solve deserves the user's attention."""


class DivergenceError(RuntimeError):
    """A fit whose loss was not finite, or whose ODE could not be solved, to its end.

    Parameters
    ----------
    epoch : int
        Epoch of the last attempt, from 1.
    reason : str
        What happened there.

    Attributes
    ----------
    epoch, reason
        As passed.
    """

    def __init__(self, epoch: int, reason: str) -> None:
        super().__init__(epoch, reason)
        self.epoch = epoch
        self.reason = reason

    def __str__(self) -> str:
        """Say when, what is kept, what to do, and why."""
        return (
            f"The fit diverged in epoch {self.epoch} and was given up. The estimator "
            "keeps its best weights, or those it began with if no epoch succeeded. "
            f"What happened: {self.reason} If the reason names no remedy: standardise "
            "the data, lower learning_rate_init, or raise alpha."
        )
