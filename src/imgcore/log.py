"""The package's one logger, ``imgcore``.

Messages contain names and numbers, never the content of images.  Names are escaped and
shortened, so that a message stays one line.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from imgcore.text import one_line


def _clean(record: logging.LogRecord) -> bool:
    """Escape the arguments of a message before any handler sees them."""
    if isinstance(record.args, tuple):
        record.args = tuple(_cleaned(value) for value in record.args)
    return True


def _cleaned(value: Any) -> Any:
    return value if isinstance(value, int | float) else one_line(str(value))


log: Final = logging.getLogger("imgcore")
log.addFilter(_clean)


@contextmanager
def silenced() -> Iterator[None]:
    """Drop this thread's messages: about files that the user has not asked about."""
    thread = threading.get_ident()

    def is_of_other(record: logging.LogRecord) -> bool:
        return record.thread != thread

    log.addFilter(is_of_other)
    try:
        yield
    finally:
        log.removeFilter(is_of_other)
