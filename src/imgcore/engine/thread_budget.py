"""How many threads the jobs of this process use together.

A job that is alone gets all threads that it asks for.  Of several, each gets its part,
and at least the calling thread, which can do all of the work.  So nothing waits for a
thread that another job has.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Self
from weakref import WeakSet

from imgcore.engine.cpus import available_cpus
from imgcore.limits import MAX_THREADS

if TYPE_CHECKING:
    from typing import SupportsIndex


# How often a job that waits for its turn calls its ``tick``, and how long it waits if
# none of those before it goes on: they may wait for this one.
_TICK_SECONDS: Final = 0.05
_STUCK_SECONDS: Final = 1.0


class _Owner(threading.local):
    """The job that a thread works for: that of the calling thread."""

    number: int | None = None


class _Budget:
    """The threads of this process, and the leases on them."""

    def __init__(self) -> None:
        self.stated: int | None = None
        self.default: int | None = None
        # A signal handler may read from an image while its thread is in here.
        self.begin_child()

    @property
    def total(self) -> int:
        if self.stated is not None:
            return self.stated
        # It is counted once, since that takes longer than a read.
        self.default = self.default or min(available_cpus(), MAX_THREADS)
        return self.default

    def part_of(self, lease: Lease) -> int:
        """Return how many threads a lease may have now."""
        taken: dict[int, int] = {}
        wanted: dict[int, int] = {}
        for one in self.leases:
            if one.owner != lease.owner:
                taken[one.owner] = taken.get(one.owner, 0) + one.n_threads
                wanted[one.owner] = max(wanted.get(one.owner, 0), one.wanted)
        if not taken:
            return lease.wanted if self.stated is None else min(lease.wanted, self.stated)
        # Those that want little leave more to the others, who divide it equally.
        equal = self.total // (len(taken) + 1)
        little = [most for most in wanted.values() if most <= equal]
        fair = -((sum(little) - self.total) // (len(taken) + 1 - len(little)))
        left = self.total - sum(taken.values())
        return max(1, min(lease.wanted, fair, left))

    def begin_child(self) -> None:
        """Forget, in a forked child, the jobs and the lock of the parent."""
        self.lock = threading.RLock()
        self.leases: WeakSet[Lease] = WeakSet()
        self.turn_ended = threading.Condition(self.lock)
        self.turns: WeakSet[Turn] = WeakSet()
        self.spares: WeakSet[Lease] = WeakSet()
        self.n_steps = 0


class Lease:
    """Threads that a job has taken; a context manager.

    They are given back by `close`, or when the lease is dropped.

    Parameters
    ----------
    wanted : int
        The most that it can use, the calling thread included.

    Attributes
    ----------
    n_threads : int
        Those that it has.
    owner : int
        The job; leases that one calling thread takes belong together.
    """

    def __init__(self, wanted: int) -> None:
        self.wanted: Final = wanted
        self.owner: Final = _owner.number or threading.get_ident()
        self.n_threads: int = 0
        self.renew()

    def renew(self) -> int:
        """Take more threads, or give some back, as others come and go."""
        with _budget.lock:
            self.n_threads = 0
            self.n_threads = _budget.part_of(self)
            _budget.leases.add(self)
            return self.n_threads

    def take_spare(self) -> bool:
        """Take one thread more that mostly waits for others; False if there is none.

        Beside the threads that work, the budget has as many of these.
        """
        with _budget.lock:
            if len(_budget.spares) < _budget.total:
                _budget.spares.add(self)
            return self in _budget.spares

    def close(self) -> None:
        """Give all threads back."""
        with _budget.lock:
            self.n_threads = 0
            _budget.leases.discard(self)
            _budget.spares.discard(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Turn:
    """A turn among jobs that need threads besides their own, and much memory.

    A context manager.  As many jobs have a turn at once as the budget has threads.
    Entering waits for one, but not for jobs that do not go on themselves.

    Parameters
    ----------
    tick : callable
        Called several times a second while this one waits; it may raise.
    """

    def __init__(self, tick: Callable[[], None]) -> None:
        self._tick = tick
        self._budget = _budget

    def note(self) -> None:
        """Note that this job goes on, so that others wait for it."""
        self._budget.n_steps += 1

    def __enter__(self) -> Self:
        budget = self._budget
        seen, since = budget.n_steps, time.monotonic()
        while not self._begins(is_stuck=time.monotonic() - since >= _STUCK_SECONDS):
            self._tick()
            if seen != budget.n_steps:
                seen, since = budget.n_steps, time.monotonic()
        return self

    def _begins(self, *, is_stuck: bool) -> bool:
        """Take a turn; without one that is free, wait a moment."""
        budget = self._budget
        with budget.lock:
            if len(budget.turns) < budget.total or is_stuck:
                budget.turns.add(self)
                self.note()
                return True
            budget.turn_ended.wait(_TICK_SECONDS)
            return False

    def __exit__(self, *_: object) -> None:
        with self._budget.lock:
            self._budget.turns.discard(self)
            self.note()
            self._budget.turn_ended.notify()


def work_for(owner: int) -> None:
    """Let what this helping thread takes belong to the job that it helps."""
    _owner.number = owner


def set_thread_budget(threads: SupportsIndex | None) -> None:
    """Set how many threads all jobs of this process use together.

    A job that is alone gets the threads that it asks for, up to this number.  Several
    at once have as many together, and each at least the thread that called it.  What
    runs already changes at its next part of some GiB.  The bytes that are written do
    not depend on it.

    Parameters
    ----------
    threads : int or None
        1 to 256.  None, as at first: several jobs have one thread per CPU together, and
        a job that is alone has all that it asks for.

    Raises
    ------
    OptionError
        The number is outside of the range.
    """
    from imgcore.engine.job import thread_count

    _budget.stated = None if threads is None else thread_count(threads)


_owner: Final = _Owner()
_budget: Final = _Budget()
os.register_at_fork(after_in_child=_budget.begin_child)
