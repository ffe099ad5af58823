"""The package's one logger, ``imgcore``.

Messages contain names and numbers, never the content of images.  Names are escaped and
shortened, so that a message stays one line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

from imgcore.text import one_line


class Log:
    """Passes messages on.

    `logging` is imported for the first one: most conversions have none.

    Attributes
    ----------
    receiver : callable, optional
        Gets each warning as a text, in place of the logger.
    """

    def __init__(self) -> None:
        self.receiver: Callable[[str], None] | None = None

    def warning(self, message: str, *args: object) -> None:
        """Log a warning; ``args`` are put into the message."""
        if _is_silenced.get():
            return
        values = tuple(_cleaned(value) for value in args)
        text = message % values if values else message
        record = _record.get()
        if record is not None and text not in record:
            record.append(text)
        if self.receiver is not None:
            self.receiver(text)
            return
        import logging

        logging.getLogger("imgcore").warning(message, *values, stacklevel=2)


def _cleaned(value: Any) -> Any:
    return value if isinstance(value, int | float) else one_line(str(value))


log: Final = Log()

_is_silenced: Final = ContextVar("is_silenced", default=False)
_record: Final[ContextVar[list[str] | None]] = ContextVar("record", default=None)


@contextmanager
def silenced() -> Iterator[None]:
    """Drop this thread's messages: about files that the user has not asked about."""
    token = _is_silenced.set(True)
    try:
        yield
    finally:
        _is_silenced.reset(token)


@contextmanager
def recorded() -> Iterator[list[str]]:
    """Return a list that also gets this thread's messages, each once."""
    record: list[str] = []
    token = _record.set(record)
    try:
        yield record
    finally:
        _record.reset(token)
