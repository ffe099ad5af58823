"""The verb ``info``: what an image says about itself.

Nothing here or below imports NumPy: ``imgcore info`` has to answer at once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

from imgcore.disk.describe import describe_layer
from imgcore.disk.layer import open_layer
from imgcore.errors import OptionError


@overload
def info(
    path: str | os.PathLike[str],
    *,
    format: str | None = ...,
    chain: Literal[False] = ...,
    allow: Sequence[str | os.PathLike[str]] = ...,
    share: bool = ...,
    backing_format: str | None = ...,
    parent: str | os.PathLike[str] | None = ...,
    read_options: Mapping[str, Any] | Sequence[str] | None = ...,
) -> dict[str, Any]: ...


@overload
def info(
    path: str | os.PathLike[str],
    *,
    format: str | None = ...,
    chain: Literal[True],
    allow: Sequence[str | os.PathLike[str]] = ...,
    share: bool = ...,
    backing_format: str | None = ...,
    parent: str | os.PathLike[str] | None = ...,
    read_options: Mapping[str, Any] | Sequence[str] | None = ...,
) -> list[dict[str, Any]]: ...


def info(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    chain: bool = False,
    allow: Sequence[str | os.PathLike[str]] = (),
    share: bool = False,
    backing_format: str | None = None,
    parent: str | os.PathLike[str] | None = None,
    read_options: Mapping[str, Any] | Sequence[str] | None = None,
) -> dict[str, Any] | list[dict[str, Any]]:
    """Describe an image by its headers; no guest byte is read.

    Parameters
    ----------
    path : path-like
        The image.
    format : str, optional
        Its format; found by its magic, or for raw by its suffix, if None.
    chain : bool
        Describe the backing files as well; without it none is opened.
    allow : sequence of path-like
        Folders, besides an image's own, in which files named inside images may lie.
    share : bool
        Open the image even if another process writes to it.
    backing_format : str, optional
        Format of backing files whose format the image does not state.
    parent : path-like, optional
        With ``chain``: the image's parent, in place of what the image calls it; see
        :func:`imgcore.open`.
    read_options : mapping or sequence of str, optional
        How to read the image; see :func:`imgcore.open`.

    Returns
    -------
    dict, or with ``chain`` a list of dict
        With the keys of ``qemu-img info --output=json``: ``filename``, ``format``,
        ``virtual-size`` and ``actual-size`` (bytes; the latter as allocated on the
        host, all files of the image together), ``dirty-flag``, ``format-specific``, and
        where they apply ``cluster-size``, ``backing-filename``, ``full-backing-filename``,
        ``backing-filename-format``, ``snapshots``. A list runs from the image to the
        last file of its chain.

    Raises
    ------
    WrongFormatError, CorruptImageError, UnsupportedFeatureError
        The file is no image that can be described, or the format of a backing file is
        stated nowhere.
    UnsafeReferenceError
        A file named inside an image lies outside the allowed folders.
    OSError
        The operating system refused; ``filename`` is set.
    """
    from imgcore.formats.registry import refuse_stream_options, stream_suffix

    if format in (None, "raw") and stream_suffix(os.fspath(path)) is not None:
        refuse_stream_options(os.fspath(path), read_options, parent)
        description = _describe_stream(path, share)
        return [description] if chain else description
    if not chain:
        if parent is not None:
            raise OptionError("a parent is given, but only the image itself is described")
        with open_layer(
            path, format=format, read_options=read_options, allow=allow, share=share
        ) as layer:
            return describe_layer(*layer)
    from imgcore.disk.image import open as open_image

    with open_image(
        path,
        format=format,
        backing_format=backing_format,
        parent=parent,
        read_options=read_options,
        allow=allow,
        share=share,
    ) as image:
        return [describe_layer(*layer) for layer in zip(image.files, image.layers, strict=True)]


def _describe_stream(path: str | os.PathLike[str], share: bool) -> dict[str, Any]:
    """Describe a compressed raw disk; one that does not state its size is decompressed for it."""
    from imgcore.streams.source import StreamSource

    with StreamSource.open(path, share=share) as stream:
        return {
            "filename": stream.path,
            "format": "raw",
            "virtual-size": stream.virtual_size,
            "actual-size": stream.file.allocated_nbytes,
            "dirty-flag": False,
            "format-specific": {"type": "raw", "data": {"compression": stream.codec}},
        }
