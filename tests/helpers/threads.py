"""Counts the threads of the test's process."""

from __future__ import annotations

import os
import threading
import time

# The system may list a thread for a moment after it was joined.
_N_LOOKS = 10
_SECONDS = 0.01


def n_tasks() -> int:
    """Return the threads that the system lists now."""
    return len(os.listdir("/proc/self/task"))


def settled_counts() -> tuple[int, int]:
    """Return Python's threads, and the system's without those that have ended."""
    counts = []
    for _ in range(_N_LOOKS):
        counts.append((threading.active_count(), n_tasks()))
        time.sleep(_SECONDS)
    return min(counts)
