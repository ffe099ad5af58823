"""Repeats failed system calls, after pauses.

The native core has the same rules; ``native/engine/retry.c`` gives the reasons.
"""

from __future__ import annotations

import errno
import time
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    Result = TypeVar("Result")

# 0.85 s in all, so that cancelling stays prompt.
_PAUSES: Final = (0.01, 0.04, 0.16, 0.64)

# A path or a server may come back, and reading again does no harm.
READ_ERRORS: Final = frozenset({errno.EIO, errno.EAGAIN, errno.ETIMEDOUT})
# Nothing was written.  After any other failure the state of the range is unknown.
WRITE_ERRORS: Final = frozenset({errno.EAGAIN})


def retrying(call: Callable[[], Result], transient: frozenset[int]) -> Result:
    """Call, and call again after each OSError with an errno in ``transient``.

    The last attempt's OSError is raised.
    """
    for pause in _PAUSES:
        try:
            return call()
        except OSError as error:
            if error.errno not in transient:
                raise
        time.sleep(pause)
    return call()
