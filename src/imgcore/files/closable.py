"""Objects that own open files: closed once, after the last use."""

from __future__ import annotations

import os
import threading
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterator


# Forks between the first process and this one, and the thread that came along.
_n_forks = 0
_survivor = 0
_adopting = threading.RLock()


def _begin_child() -> None:
    global _n_forks, _survivor, _adopting
    _n_forks += 1
    _survivor = threading.get_ident()
    _adopting = threading.RLock()


os.register_at_fork(after_in_child=_begin_child)


class Closable:
    """Something open that several threads may use; the last use closes it.

    A subclass calls `Closable.__init__` once it is open, and frees what it owns in
    `_free`.  An object that is dropped without `close` is closed with a
    ResourceWarning.

    A forked child may use the object whatever other threads of the parent were doing
    with it: they do not exist there, so their uses and their lock are forgotten.

    Attributes
    ----------
    path : str
        Its name in messages.
    """

    path: str
    _what = "file"
    # Until __init__ runs, there is nothing to close.
    _is_closed = _is_freed = True

    def __init__(self) -> None:
        # Reentrant: a signal handler may close the object in the middle of a use.
        self._lock = threading.RLock()
        # The lock of each use, held as long as it lasts, and its thread.
        self._uses: dict[threading.Lock, int] = {}
        # Other users.
        self._users: set[str] = set()
        self._freeing = threading.Lock()
        self._forks_before = _n_forks
        self._is_closed = self._is_freed = False

    def _free(self) -> None:
        """Close the files; called again if an exception has ended it."""
        raise NotImplementedError

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """Keep the object open in a ``with`` block; ValueError if it is closed.

        Wherever an exception of a signal handler ends it, the use is over.
        """
        use = threading.Lock()
        try:
            with use:
                with self._state_lock():
                    if self._is_closed:
                        self._refuse()
                    self._uses[use] = threading.get_ident()
                yield
        finally:
            self._uses.pop(use, None)
            self._free_after_use()

    def _begin_use(self, user: str) -> None:
        """Keep the object open until `_end_use`; ValueError if it is closed.

        The user is forgotten in forked children.
        """
        with self._state_lock():
            if self._is_closed:
                self._refuse()
            self._users.add(user)

    def _end_use(self, user: str) -> None:
        self._users.discard(user)
        self._free_after_use()

    def _refuse(self) -> NoReturn:
        raise ValueError(f"{self.path}: the {self._what} is closed")

    def close(self) -> None:
        """Close it; may be called more than once.

        From now on each use raises ValueError.  Uses in progress on other threads end
        as if it was open, and the last one closes the files.
        """
        self._is_closed = True
        self._free_after_use()

    def _free_after_use(self) -> None:
        if not self._is_closed or self._is_freed:
            return
        with self._state_lock():
            is_used = self._users or any(use.locked() for use in list(self._uses))
        if is_used or self._freeing.locked():
            return
        with self._freeing:
            if not self._is_freed:
                self._free()
                self._is_freed = True

    def _state_lock(self) -> threading.RLock:
        """Return the lock of the counts, which a forked child has to itself."""
        if self._forks_before != _n_forks:
            with _adopting:
                if self._forks_before != _n_forks:
                    self._adopt()
                    self._forks_before = _n_forks
        return self._lock

    def _adopt(self) -> None:
        """Forget the threads that did not come along into this forked child."""
        self._lock = threading.RLock()
        self._uses = {use: me for use, me in self._uses.items() if me == _survivor}
        self._users = set()
        self._freeing = threading.Lock()

    def __reduce__(self) -> NoReturn:
        """Reject copies: two objects would own the same descriptors."""
        raise TypeError(f"{self!r} cannot be copied or pickled")

    def __del__(self) -> None:
        if self._is_freed:
            return
        try:
            if not self._is_closed:
                warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)
        finally:
            self.close()
            self._users.clear()
            self._free_after_use()
