"""The exceptions that imgcore raises: one root and few, stable kinds.

Errors of the operating system stay `OSError` with the file's name.  A message
is one line: what, where, found, allowed.
"""

from __future__ import annotations

from imgcore.text import one_line


class ImgcoreError(Exception):
    """The base class of all exceptions that imgcore raises about images.

    Parameters
    ----------
    message : str
        What is wrong, without the path.
    path : str, optional
        The file that the message is about; it is put in front of the message.
    offset : int, optional
        Byte offset in that file, if one is known.

    Attributes
    ----------
    reason : str
        The message without the path.
    path : str or None
        The file's name, unchanged; in the message it is escaped and shortened.
    offset : int or None
        As given.
    """

    def __init__(self, message: str, *, path: str | None = None, offset: int | None = None) -> None:
        self.reason: str = one_line(message)
        super().__init__(self.reason if path is None else f"{one_line(path)}: {self.reason}")
        self.path = path
        self.offset = offset


class FormatError(ImgcoreError, ValueError):
    """The file is not a valid image of the format."""


class WrongFormatError(FormatError):
    """The file does not have the requested format, or any known one."""


class CorruptImageError(FormatError):
    """The image contradicts itself, or ends too early."""


class UnsupportedFeatureError(ImgcoreError, NotImplementedError):
    """The image or the request needs something that imgcore does not support."""


class LimitExceededError(ImgcoreError):
    """A size that an image claims, or the size of a result, exceeds a named limit."""


class UnsafeReferenceError(ImgcoreError):
    """An image names a file outside the folders that it may refer to."""


class TargetError(ImgcoreError):
    """The target cannot be used: it exists, is a source, or cannot be a file."""


class OptionError(ImgcoreError, ValueError):
    """An option is unknown, malformed, or cannot be combined with the others."""


class ConversionCancelled(ImgcoreError):
    """The job was cancelled before it ended; it left no target."""
