"""Settings of a job that other threads may change while it runs."""

from __future__ import annotations

import threading
from typing import Final, SupportsIndex

from imgcore._core import RateLimit
from imgcore.border import integer
from imgcore.errors import OptionError
from imgcore.sizes import MAX_SIZE, parse_size


class Control:
    """Controls a conversion while it runs; any thread may use it.

    Conversions that get the same control share its rate.

    Parameters
    ----------
    rate : int or str, optional
        The attribute ``rate``.

    Attributes
    ----------
    rate : int or None
        Bytes of the disk that may be handled in a second; None is no limit.  It may be
        set to a text as well (``"50M"``).  A change takes effect at once.
    """

    def __init__(self, *, rate: SupportsIndex | str | None = None) -> None:
        self.limit: Final = RateLimit()
        self._lock: Final = threading.Lock()
        self._rate: int | None = None
        self.rate = rate

    @property
    def rate(self) -> int | None:
        """Bytes of the disk a second; None is no limit."""
        return self._rate

    @rate.setter
    def rate(self, rate: SupportsIndex | str | None) -> None:
        nbytes = None if rate is None else _rate_nbytes(rate)
        with self._lock:
            self.limit.set(nbytes or 0)
            self._rate = nbytes


def control_of(rate: SupportsIndex | str | None, control: Control | None) -> Control | None:
    """Return the control of a job: the one that was given, or one for a rate."""
    if rate is None:
        return control
    if control is not None:
        raise OptionError("rate and control are both given: set the rate of the control")
    return Control(rate=rate)


def _rate_nbytes(rate: SupportsIndex | str) -> int:
    nbytes = parse_size(rate) if isinstance(rate, str) else integer(rate, "rate")
    if not 0 < nbytes <= MAX_SIZE:
        raise OptionError(
            f"a rate of {nbytes} bytes a second, 1 to {MAX_SIZE} are allowed; None is no limit"
        )
    return nbytes
