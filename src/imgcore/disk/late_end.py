"""Targets of disks whose size is not known before their last byte was read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from imgcore.disk.profile_fitting import fitting_size, warn_about_size
from imgcore.errors import ImgcoreError, LimitExceededError, OptionError
from imgcore.formats.api import EndsLate
from imgcore.formats.registry import PLAIN_FORMAT, get_driver
from imgcore.limits import GIB, MIB, SECTOR_NBYTES

if TYPE_CHECKING:
    from imgcore.disk.sink_options import SinkOptions
    from imgcore.disk.source import Source
    from imgcore.files.target import Target
    from imgcore.formats.api import Writer, WriteRequest

# The largest disk; else a half, a quarter and so on of it, until the format allows the
# size and its tables leave no longer hole.
_MAX_NBYTES: Final = 16320 * GIB
_MAX_RESERVED_NBYTES: Final = 20 * MIB


def open_ended(
    request: WriteRequest[Any], options: SinkOptions, target: Target
) -> WriteRequest[Any]:
    """Return a request for the largest disk that may come.

    Raises
    ------
    OptionError
        The target needs the size first.
    """
    if target.in_place:
        if options.format != PLAIN_FORMAT:
            raise needs_size("an image that is written in place (-n)", target.path)
        nbytes = target.main.nbytes // SECTOR_NBYTES * SECTOR_NBYTES
        return request._replace(virtual_size=nbytes, exact_nbytes=nbytes)
    nbytes = _MAX_NBYTES
    while not _has_room(
        wanted := request._replace(virtual_size=nbytes, exact_nbytes=nbytes), options
    ):
        nbytes //= 2
    return wanted


def _has_room(request: WriteRequest[Any], options: SinkOptions) -> bool:
    """Tell whether the format has such disks, and not too much before their data."""
    try:
        writer = get_driver(options.format).writer(request)
        if isinstance(writer, EndsLate):
            writer.leave_end_open()
    except LimitExceededError:
        if request.virtual_size <= GIB:
            raise
        return False
    return writer.first_offset <= _MAX_RESERVED_NBYTES or request.virtual_size <= GIB


def leave_end_open(writer: Writer, target: Target) -> None:
    """Tell a writer that its request only has the largest size.

    Raises
    ------
    OptionError
        It needs the size first.
    """
    if not isinstance(writer, EndsLate):
        raise needs_size("this target", target.path)
    writer.leave_end_open()


def end_disk(
    writer: Writer, request: WriteRequest[Any], options: SinkOptions, source: Source
) -> WriteRequest[Any]:
    """Tell a writer the size of a disk that was read, and return the request for it."""
    assert isinstance(writer, EndsLate), "see leave_end_open"
    nbytes = fitting_size(options.profile, source)
    warn_about_size(options.profile, source, nbytes)
    exact_nbytes = source.exact_nbytes if nbytes == source.virtual_size else None
    request = request._replace(virtual_size=nbytes, exact_nbytes=exact_nbytes)
    writer.end_disk(request)
    return request


def needs_size(what: str, path: str) -> ImgcoreError:
    """Return the error for a target that must know the size of the disk first."""
    return OptionError(
        f"the size of the stream's disk is not known before its end, and {what} needs it: give "
        "it (--size)",
        path=path,
    )
