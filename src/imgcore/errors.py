"""The exceptions that imgcore raises, one root and few stable kinds.

Operating-system errors stay :class:`OSError` with the file name.  Every message
says what, where, found, allowed, on one line.
"""

from __future__ import annotations

from imgcore.text import one_line


class ImgcoreError(Exception):
    """Root of everything that imgcore raises about images.

    Parameters
    ----------
    message : str
        What is wrong, without the path.
    path : str, optional
        The file that the message is about; it is put in front of the message.
    offset : int, optional
        Byte offset in that file, where one is known.

    Attributes
    ----------
    reason : str
        The message without the path.
    path : str or None
        The file's name as it is; in the message it is escaped and bounded, as all of it.
    offset : int or None
        As given.
    """

    def __init__(self, message: str, *, path: str | None = None, offset: int | None = None) -> None:
        self.reason = one_line(message)
        super().__init__(self.reason if path is None else f"{one_line(path)}: {self.reason}")
        self.path = path
        self.offset = offset


class FormatError(ImgcoreError, ValueError):
    """The file is not a valid image of the format."""


class WrongFormatError(FormatError):
    """The file is of another format than the one asked for, or of none known."""


class CorruptImageError(FormatError):
    """The image contradicts itself or ends too early."""


class UnsupportedFeatureError(ImgcoreError, NotImplementedError):
    """The image or the request needs something that imgcore does not do."""


class LimitExceededError(ImgcoreError):
    """A size claimed by an image, or a result, exceeds a named limit."""


class UnsafeReferenceError(ImgcoreError):
    """An image names a file outside the folders that it may refer to."""


class TargetError(ImgcoreError):
    """The target cannot be used: it exists, is the source, or is no place for a file."""


class OptionError(ImgcoreError, ValueError):
    """An option is unknown, malformed, or does not go with the others."""


class ConversionCancelled(ImgcoreError):
    """The job was cancelled before it ended; no target was left."""
