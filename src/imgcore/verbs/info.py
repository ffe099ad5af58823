"""The verb ``info``: what an image says about itself.

Nothing here or below imports NumPy: ``imgcore info`` has to answer at once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

from imgcore.disk.describe import STAT_BLOCK_NBYTES, describe_layer
from imgcore.disk.layer import open_layer
from imgcore.disk.options import OpenOptions
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
    chain : bool
        Describe the backing files as well; without it none is opened.
    format, backing_format, parent, read_options, allow, share
        See :func:`imgcore.open`; ``parent`` is for ``chain`` only.

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

    options = OpenOptions.from_keywords(
        format=format,
        backing_format=backing_format,
        parent=parent,
        read_options=read_options,
        allow=allow,
        share=share,
    )
    if format in (None, "raw") and stream_suffix(os.fspath(path)) is not None:
        refuse_stream_options(os.fspath(path), read_options, parent)
        description = _describe_stream(path, share)
        return [description] if chain else description
    if not chain:
        if parent is not None:
            raise OptionError("a parent is given, but only the image itself is described")
        with open_layer(path, options) as layer:
            return describe_layer(layer)
    from imgcore.disk.image import open_image

    with open_image(path, options) as image:
        return [describe_layer(layer) for layer in image.chain]


def _describe_stream(path: str | os.PathLike[str], share: bool) -> dict[str, Any]:
    """Describe a compressed raw disk; one that does not state its size is decompressed for it."""
    from imgcore.streams.source import StreamSource

    with StreamSource.open(path, share=share) as stream:
        return {
            "filename": stream.path,
            "format": "raw",
            "virtual-size": stream.virtual_size,
            "actual-size": os.fstat(stream.file.fd).st_blocks * STAT_BLOCK_NBYTES,
            "dirty-flag": False,
            "format-specific": {"type": "raw", "data": {"compression": stream.codec}},
        }
