"""How many CPUs this process may use: by its affinity and by its control groups.

A container has the affinity of the whole host, but often a quota of CPU time.  More
threads than the quota pays for only make the group wait for its next period.
Source: Linux Documentation/admin-guide/cgroup-v2.rst ("cpu.max"), cgroups(7),
Documentation/scheduler/sched-bwc.rst.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from imgcore.files.descriptors import is_of_system, standard_numbers_taken

if TYPE_CHECKING:
    from collections.abc import Iterator

_GROUPS_OF_PROCESS: Final = "/proc/self/cgroup"
_GROUPS: Final = "/sys/fs/cgroup"
# Longer files are not what they seem; nesting deeper than this is not looked at.
_MAX_NBYTES: Final = 64 * 1024
_MAX_DEPTH: Final = 64


def available_cpus() -> int:
    """Return how many threads of this process can run at once, at least 1."""
    n_cpus = len(os.sched_getaffinity(0))
    quotas = [q for folder, version in _folders() if (q := _quota(folder, version)) is not None]
    return max(1, min([n_cpus, *quotas]))


def _folders() -> Iterator[tuple[str, int]]:
    """Yield (folder, version) of each control group that may have a quota for us.

    A group may use no more than the groups that it is in.
    """
    for line in _text(_GROUPS_OF_PROCESS).splitlines()[:_MAX_DEPTH]:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            roots, version = [_GROUPS, f"{_GROUPS}/unified"], 2
        elif "cpu" in controllers.split(","):
            roots, version = [f"{_GROUPS}/cpu", f"{_GROUPS}/{controllers}"], 1
        else:
            continue
        # In a namespace, a group outside of it has a path with "..".
        parts = [part for part in path.split("/") if part not in ("", ".", "..")]
        for root in roots:
            for depth in range(min(len(parts), _MAX_DEPTH), -1, -1):
                yield "/".join((root, *parts[:depth])), version


def _quota(folder: str, version: int) -> int | None:
    """Return the CPUs that a group's quota pays for, rounded up; None without one."""
    if version == 2:
        words = _text(f"{folder}/cpu.max").split()
    else:
        words = [_text(f"{folder}/cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    # Without a limit the quota is "max" in version 2 and -1 in version 1.
    if len(words) != 2 or not all(word.isascii() and word.isdigit() for word in words):
        return None
    quota, period = (int(word[:20]) for word in words)
    return -(-quota // period) if period else None


def _text(path: str) -> str:
    """Return the content of a file of the kernel, empty if it cannot be read."""
    try:
        with standard_numbers_taken(), open(path, "rb") as file:
            return file.read(_MAX_NBYTES).decode("utf-8", "surrogateescape")
    except OSError as error:
        if not is_of_system(error):
            raise
        return ""
