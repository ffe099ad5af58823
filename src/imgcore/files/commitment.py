"""Runs a job whose target is committed at its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from imgcore.errors import ImgcoreError
from imgcore.files.commit_point import ATTEMPTS, report_late
from imgcore.files.target import Target

Result = TypeVar("Result")


class Commitment(Generic[Result]):
    """The result of a job, and the target that makes it final."""

    result: Result

    def __init__(self) -> None:
        self.target: Target | None = None

    def commit(self, target: Target, result: Result, receipt: Target | None = None) -> None:
        """Commit the target; afterwards the job has this result, whatever happens.

        A receipt gets its name next, also if exceptions of signals come in between.
        """
        self.target, self.result = target, result
        target.commit()
        if receipt is not None:
            _commit_receipt(target, receipt)


def _commit_receipt(target: Target, receipt: Target) -> None:
    """Commit a receipt; its failure is that of the job, whose target is complete."""
    for _ in ATTEMPTS:
        try:
            receipt.commit()
        except (OSError, ImgcoreError) as error:
            target.late_error = error
            raise
        except BaseException as error:
            report_late(target.path, error)
        if receipt.is_committed:
            return


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
