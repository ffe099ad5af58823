"""How often a failed system call is repeated, and how long apart.

The same rules as in the native core (``native/engine/retry.c``, which says why).
"""

from __future__ import annotations

import errno
import time
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    Result = TypeVar("Result")

# 0.85 s in all: cancelling stays prompt.
_PAUSES: Final = (0.01, 0.04, 0.16, 0.64)

# A path or a server may come back; reading again does no harm.
READ_ERRORS: Final = frozenset({errno.EIO, errno.EAGAIN, errno.ETIMEDOUT})
# Nothing has been tried. After any other failure the state of the range is unknown.
WRITE_ERRORS: Final = frozenset({errno.EAGAIN})


def retrying(call: Callable[[], Result], transient: frozenset[int]) -> Result:
    """Return what ``call`` returns; an OSError of a transient kind is given a few more chances."""
    for pause in _PAUSES:
        try:
            return call()
        except OSError as error:
            if error.errno not in transient:
                raise
        time.sleep(pause)
    return call()
