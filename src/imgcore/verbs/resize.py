"""The verb ``resize``: changes the size of a disk in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, SupportsIndex

from imgcore.border import FilePath, integer
from imgcore.disk.children import warned_about_children
from imgcore.disk.image import Image
from imgcore.disk.open_options import OpenOptions
from imgcore.disk.opened import opened_for_update
from imgcore.errors import OptionError
from imgcore.limits import SECTOR_NBYTES
from imgcore.sizes import parse_size


class ResizeResult(NamedTuple):
    """The result of `imgcore.resize`.

    Attributes
    ----------
    path, format : str
        The image and its format.
    old_size, virtual_size : int
        Bytes of the disk before and now.
    """

    path: str
    format: str
    old_size: int
    virtual_size: int


def resize(
    image: FilePath | int | Image,
    size: SupportsIndex | str,
    *,
    shrink: bool = False,
    format: str | None = None,
    backing_format: str | None = None,
    parent: FilePath | Sequence[FilePath] | None = None,
    read_options: Mapping[str, Any] | Sequence[str] | None = None,
    allow: Sequence[FilePath] = (),
) -> ResizeResult:
    """Change the size of the disk in an image, in place.

    ``format``, ``backing_format``, ``parent``, ``read_options`` and ``allow`` are the
    keywords of `imgcore.open`.

    Parameters
    ----------
    image : str, bytes, os.PathLike, int or Image
        The image, an open descriptor of it, or an open image with the mode ``"r+"``,
        which takes no keywords for opening.
    size : int or str
        Bytes, or a text such as ``"10G"``.  A text that starts with ``+`` or ``-`` is
        the difference from the present size.
    shrink : bool
        Whether the disk may become smaller, which loses what is at its end.

    Returns
    -------
    ResizeResult

    Raises
    ------
    OptionError
        The disk would become smaller without ``shrink``, or the format cannot have this
        size.
    ImgcoreError, OSError
        The image cannot be written to; another process uses it.

    Notes
    -----
    What is new reads as zeros, also if a parent is larger.  The guest's partitions and
    file systems are not changed.  A warning tells if other images beside this one have
    it as their parent.
    """
    opening = OpenOptions.from_keywords(
        format=format,
        backing_format=backing_format,
        parent=parent,
        read_options=read_options,
        allow=allow,
    )
    with opened_for_update(image, opening) as disk:
        old = disk.virtual_size
        nbytes = _new_size(size, disk)
        is_change = nbytes != old
        with warned_about_children(disk, opening.allow) if is_change else nullcontext():
            disk.resize(nbytes, shrink=shrink)
        return ResizeResult(disk.path, disk.format, old, disk.virtual_size)


def _new_size(size: SupportsIndex | str, disk: Image) -> int:
    if not isinstance(size, str):
        return integer(size, "size")
    text = size.strip()
    if text[:1] not in ("+", "-"):
        return parse_size(text)
    if text in ("+", "-"):
        raise OptionError(f"{text} alone is no size: expected a number of bytes after it")
    nbytes = parse_size(text[1:])
    if text[0] == "-":
        nbytes = -nbytes
    if disk.virtual_size + nbytes < SECTOR_NBYTES:
        raise OptionError(
            f"a disk of {disk.virtual_size} bytes cannot become smaller by {-nbytes}",
            path=disk.path,
        )
    return disk.virtual_size + nbytes
