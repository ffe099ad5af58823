"""The verb ``snapshot``: lists and changes the internal snapshots of an image."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex

from imgcore.border import FilePath, integer, source_name
from imgcore.disk.image import Image, open_image
from imgcore.disk.open_options import OpenOptions
from imgcore.disk.opened import opened_for_update, require_no_options
from imgcore.errors import OptionError, UnsupportedFeatureError
from imgcore.formats.api import ChangesSnapshots, HasSnapshots, SnapshotInfo

if TYPE_CHECKING:
    from imgcore.formats.api import Updater


def snapshots(
    image: FilePath | int | Image,
    *,
    format: str | None = None,
    read_options: Mapping[str, Any] | Sequence[str] | None = None,
    allow: Sequence[FilePath] = (),
    share: bool = False,
) -> list[SnapshotInfo]:
    """Return the internal snapshots of an image, in the order of its table.

    ``format``, ``read_options``, ``allow`` and ``share`` are the keywords of
    `imgcore.open`.

    Parameters
    ----------
    image : str, bytes, os.PathLike, int or Image
        The image, a descriptor of it, or an open image.

    Returns
    -------
    list of SnapshotInfo
        Empty if there are none, also for formats that have no snapshots.

    Raises
    ------
    OSError, ImgcoreError
        The image cannot be read.
    """
    options = OpenOptions.from_keywords(
        format=format, read_options=read_options, allow=allow, share=share
    )
    if isinstance(image, Image):
        require_no_options(image, options)
        return _snapshots_of(image)
    with open_image(source_name(image), options, parents=False) as opened:
        return _snapshots_of(opened)


def create_snapshot(
    image: FilePath | int | Image,
    name: str,
    *,
    created_ns: SupportsIndex | None = None,
    format: str | None = None,
    backing_format: str | None = None,
    parent: FilePath | Sequence[FilePath] | None = None,
    read_options: Mapping[str, Any] | Sequence[str] | None = None,
    allow: Sequence[FilePath] = (),
) -> SnapshotInfo:
    """Add a snapshot of the disk, as it is, to a QCOW2 image.

    The other keywords are those of `imgcore.open`.

    Parameters
    ----------
    image : str, bytes, os.PathLike, int or Image
        The image, a descriptor of it, or an image that is open with the mode "r+".
    name : str
        1 to 255 bytes.  Other snapshots may have the same; each has its own identifier.
    created_ns : int, optional
        When it was taken, in nanoseconds since 1970-01-01 UTC; now by default.

    Returns
    -------
    SnapshotInfo

    Raises
    ------
    UnsupportedFeatureError
        Images of this format have no snapshots.
    OptionError
        The name is empty or too long.
    LimitExceededError
        There are too many snapshots, or the image's refcounts are too narrow.
    OSError, ImgcoreError
        As for `imgcore.open` with the mode "r+".

    Notes
    -----
    A crash leaves the image with or without the snapshot.  A version 3 image may then
    be marked as dirty: ``imgcore check -r all`` puts that right.
    """
    when = time.time_ns() if created_ns is None else integer(created_ns, "created_ns")
    options = OpenOptions.from_keywords(
        format=format,
        backing_format=backing_format,
        parent=parent,
        read_options=read_options,
        allow=allow,
    )
    return _changed(image, options, lambda _, updater: updater.create_snapshot(name, when))[-1]


def apply_snapshot(
    image: FilePath | int | Image,
    key: str,
    *,
    format: str | None = None,
    backing_format: str | None = None,
    parent: FilePath | Sequence[FilePath] | None = None,
    read_options: Mapping[str, Any] | Sequence[str] | None = None,
    allow: Sequence[FilePath] = (),
) -> None:
    """Make the disk of a QCOW2 image what it was when a snapshot was taken.

    What the disk is now is lost, unless there is a snapshot of it.  Parameters, errors
    and notes are those of `create_snapshot`.

    Parameters
    ----------
    key : str
        The snapshot's identifier or name.
    """
    options = OpenOptions.from_keywords(
        format=format,
        backing_format=backing_format,
        parent=parent,
        read_options=read_options,
        allow=allow,
    )
    _changed(image, options, lambda it, updater: updater.apply_snapshot(_index_of(it, key)))


def delete_snapshot(
    image: FilePath | int | Image,
    key: str,
    *,
    format: str | None = None,
    backing_format: str | None = None,
    parent: FilePath | Sequence[FilePath] | None = None,
    read_options: Mapping[str, Any] | Sequence[str] | None = None,
    allow: Sequence[FilePath] = (),
) -> None:
    """Remove a snapshot of a QCOW2 image; the disk stays as it is.

    Parameters, errors and notes are those of `create_snapshot`.

    Parameters
    ----------
    key : str
        The snapshot's identifier or name.
    """
    options = OpenOptions.from_keywords(
        format=format,
        backing_format=backing_format,
        parent=parent,
        read_options=read_options,
        allow=allow,
    )
    _changed(image, options, lambda it, updater: updater.delete_snapshot(_index_of(it, key)))


def _changed(
    image: FilePath | int | Image,
    options: OpenOptions,
    change: Callable[[Image, ChangesSnapshots], None],
) -> list[SnapshotInfo]:
    """Change the snapshots of an image; return those that it has then."""
    with opened_for_update(image, options) as opened:

        def restructure(updater: Updater) -> None:
            if not isinstance(updater, ChangesSnapshots):
                raise UnsupportedFeatureError(
                    f"{opened.format} images have no snapshots", path=opened.path
                )
            change(opened, updater)

        opened.restructure(restructure)
        return _snapshots_of(opened)


def _snapshots_of(image: Image) -> list[SnapshotInfo]:
    with image.kept_open() as state:
        reader = state.layers[0]
        return reader.snapshots() if isinstance(reader, HasSnapshots) else []


def _index_of(image: Image, key: str) -> int:
    """Return the number of the snapshot with an identifier or a name."""
    found = _snapshots_of(image)
    matches = [i for i, item in enumerate(found) if key in (item.identifier, item.name)]
    if len(matches) == 1:
        return matches[0]
    listed = ", ".join(f"{item.identifier} ({item.name[:80]!r})" for item in found[:20])
    if not matches:
        raise OptionError(
            f"no snapshot has the identifier or name {key[:80]!r}; there are: {listed or 'none'}",
            path=image.path,
        )
    raise OptionError(
        f"{len(matches)} snapshots have the identifier or name {key[:80]!r}; there are: {listed}",
        path=image.path,
    )
