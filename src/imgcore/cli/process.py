"""Prepares the process before the command is loaded.

This module imports nothing that takes time: what it does should happen soon.
"""

from __future__ import annotations

import os
import resource
from contextlib import suppress


def occupy_standard_numbers() -> None:
    """Open /dev/null as stdin, stdout and stderr if the caller has closed them.

    Another file would get their numbers otherwise, and what is printed would end up in
    it.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)


def raise_open_files_limit() -> None:
    """Raise the limit of open files as far as the system permits.

    A VMDK may have thousands of extents, and a chain many images.
    """
    with suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
