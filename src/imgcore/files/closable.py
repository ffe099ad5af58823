"""Objects that own open files: closed once, after the last use."""

from __future__ import annotations

import threading
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterator


class Closable:
    """Something open that several threads may use; the last use closes it.

    A subclass calls `Closable.__init__` once it is open, and frees what it owns in
    `_free`.  An object that is dropped without `close` is closed with a
    ResourceWarning.

    Attributes
    ----------
    path : str
        Its name in messages.
    """

    path: str
    _what = "file"
    # Until __init__ runs, there is nothing to close.
    _is_closed = True
    _n_uses = 0

    def __init__(self) -> None:
        # Reentrant: a signal handler may close the object in the middle of a use.
        self._lock = threading.RLock()
        # The opener, and each use in progress.
        self._n_uses = 1
        self._is_closed = False

    def _free(self) -> None:
        """Close the files; called once."""
        raise NotImplementedError

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """Keep the object open in a ``with`` block; ValueError if it is closed."""
        with self._lock:
            if self._is_closed:
                self._refuse()
            self._n_uses += 1
        try:
            yield
        finally:
            self._end_use()

    def _refuse(self) -> NoReturn:
        raise ValueError(f"{self.path}: the {self._what} is closed")

    def close(self) -> None:
        """Close it; may be called more than once.

        From now on each use raises ValueError.  Uses in progress on other threads end
        as if it was open, and the last one closes the files.
        """
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        self._end_use()

    def _end_use(self) -> None:
        with self._lock:
            self._n_uses -= 1
            is_last = self._n_uses == 0
        if is_last:
            self._free()

    def __reduce__(self) -> NoReturn:
        """Reject copies: two objects would own the same descriptors."""
        raise TypeError(f"{self!r} cannot be copied or pickled")

    def __del__(self) -> None:
        if self._is_closed:
            return
        try:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)
        finally:
            self.close()
