"""Runs a job whose target is committed at its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from imgcore.files.commit_point import report_late
from imgcore.files.target import Target

Result = TypeVar("Result")


class Commitment(Generic[Result]):
    """The result of a job, and the target that makes it final."""

    result: Result

    def __init__(self) -> None:
        self.target: Target | None = None

    def commit(self, target: Target, result: Result) -> None:
        """Commit the target; afterwards the job has this result, whatever happens."""
        self.target, self.result = target, result
        target.commit()


def until_committed(job: Callable[[Commitment[Result]], None]) -> Result:
    """Run a job, which sets the result, or commits a target with it.

    An exception after the commit point is logged, except for the system's own: that the
    folder cannot be synced.
    """
    commitment: Commitment[Result] = Commitment()
    # No call may follow the job on the way to the result: it would let a signal in.
    try:
        job(commitment)
    except BaseException as error:
        target = commitment.target
        if target is None or not target.is_committed or error is target.late_error:
            raise
        report_late(target.path, error)
        target.conclude()
        if target.late_error is not None:
            raise target.late_error from None
    return commitment.result
