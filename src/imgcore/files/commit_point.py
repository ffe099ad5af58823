"""The commit point of a job: the last rename, after which nothing can cancel it.

Signals become exceptions at any place in Python code.  One that arrives after the
rename must not tell the caller that the job was cancelled: the old file is gone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

# How often a step after the commit point is tried if exceptions interrupt it.
ATTEMPTS: Final = (1, 2, 3)


class CommitCounter:
    """How many jobs of this process have passed their commit points."""

    count = 0


def report_late(path: str, error: BaseException) -> None:
    """Log an exception that came after the commit point."""
    # Loaded late: the command needs the counter before anything else.
    from imgcore.log import log

    log.warning("%s: complete already when %s came", path, repr(error))


def uninterrupted(path: str, step: Callable[[], None]) -> OSError | None:
    """Take a step that follows the commit point, again if an exception interrupts it.

    Returns the error of the system, if the step fails.
    """
    for _ in ATTEMPTS:
        try:
            step()
        except BaseException as error:
            if isinstance(error, OSError) and error.errno is not None:
                return error
            report_late(path, error)
        else:
            break
    return None
