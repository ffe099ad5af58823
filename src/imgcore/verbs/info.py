"""The verb ``info``: describes an image by its headers.

``imgcore info`` imports no NumPy, which would take longer than all the rest.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

from imgcore.disk.options import OpenOptions
from imgcore.disk.source import open_source


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
    options = OpenOptions.from_keywords(
        format=format,
        backing_format=backing_format,
        parent=parent,
        read_options=read_options,
        allow=allow,
        share=share,
    )
    with open_source(path, options, parents=chain) as source:
        described = source.describe()
    return described if chain else described[0]
