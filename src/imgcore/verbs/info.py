"""The verb ``info``: describes an image by its headers.

``imgcore info`` does not import NumPy, which would take longer than everything else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

from imgcore.border import FilePath, file_name
from imgcore.disk.open_options import OpenOptions
from imgcore.disk.source import open_source


@overload
def info(
    path: FilePath,
    *,
    format: str | None = ...,
    chain: Literal[False] = ...,
    allow: Sequence[FilePath] = ...,
    share: bool = ...,
    backing_format: str | None = ...,
    parent: FilePath | Sequence[FilePath] | None = ...,
    read_options: Mapping[str, Any] | Sequence[str] | None = ...,
) -> dict[str, Any]: ...


@overload
def info(
    path: FilePath,
    *,
    format: str | None = ...,
    chain: Literal[True],
    allow: Sequence[FilePath] = ...,
    share: bool = ...,
    backing_format: str | None = ...,
    parent: FilePath | Sequence[FilePath] | None = ...,
    read_options: Mapping[str, Any] | Sequence[str] | None = ...,
) -> list[dict[str, Any]]: ...


def info(
    path: FilePath,
    *,
    format: str | None = None,
    chain: bool = False,
    allow: Sequence[FilePath] = (),
    share: bool = False,
    backing_format: str | None = None,
    parent: FilePath | Sequence[FilePath] | None = None,
    read_options: Mapping[str, Any] | Sequence[str] | None = None,
) -> dict[str, Any] | list[dict[str, Any]]:
    """Describe an image by its headers; guest data is not read.

    For the other keywords see `imgcore.open`; ``parent`` requires ``chain``.

    Parameters
    ----------
    path : str, bytes or os.PathLike
        The image.
    chain : bool
        Describe the backing files as well; otherwise they are not opened.

    Returns
    -------
    dict or list of dict
        The description of the image, or with ``chain`` those of the image and its
        backing files, in order.  The keys are those of ``qemu-img info --output=json``:
        ``filename``, ``format``, ``virtual-size`` (bytes), ``actual-size`` (bytes that
        the host has allocated to all files of the image), ``dirty-flag``, and if they
        apply ``format-specific``, ``cluster-size``, ``compressed``, ``snapshots``,
        ``backing-filename``, ``full-backing-filename`` and
        ``backing-filename-format``.

    Raises
    ------
    WrongFormatError, CorruptImageError, UnsupportedFeatureError
        The file is not an image that can be described, or the format of a backing file
        is not stated anywhere.
    UnsafeReferenceError
        An image names a file outside the allowed folders.
    OSError
        The operating system reported an error; ``filename`` is set.
    """
    options = OpenOptions.from_keywords(
        format=format,
        backing_format=backing_format,
        parent=parent,
        read_options=read_options,
        allow=allow,
        share=share,
    )
    with open_source(file_name(path), options, parents=chain) as source:
        described = source.describe()
    return described if chain else described[0]
