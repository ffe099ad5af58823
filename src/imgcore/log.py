"""The package's one logger, ``imgcore``.

A message has names and numbers, no content of images; names are made fit for one line of a log.
"""

from __future__ import annotations

import logging
from typing import Any, Final

from imgcore.text import one_line


def _clean(record: logging.LogRecord) -> bool:
    """Escape what a message is filled with, before any handler sees it."""
    if isinstance(record.args, tuple):
        record.args = tuple(_cleaned(value) for value in record.args)
    return True


def _cleaned(value: Any) -> Any:
    return value if isinstance(value, int | float) else one_line(str(value))


log: Final = logging.getLogger("imgcore")
log.addFilter(_clean)
