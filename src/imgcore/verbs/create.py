"""The verb ``create``: a new, empty image."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from imgcore.errors import OptionError, TargetError
from imgcore.limits import SECTOR_NBYTES

if TYPE_CHECKING:
    from imgcore.files.target import Target
    from imgcore.formats.api import BackingReference, Driver, WriteRequest


@dataclass(frozen=True)
class CreateResult:
    """The image that was made.

    Attributes
    ----------
    path, format : str
        The image.
    virtual_size, file_size : int
        Bytes: of the disk, and of the image's main file.
    options : dict
        The options of the format in effect.
    backing, backing_format : str or None
        The backing file, as the image names it.
    """

    path: str
    format: str
    virtual_size: int
    file_size: int
    options: dict[str, Any] = field(default_factory=dict)
    backing: str | None = None
    backing_format: str | None = None


def create(
    path: str | os.PathLike[str],
    virtual_size: int | None = None,
    *,
    format: str | None = None,
    options: Mapping[str, Any] | Sequence[str] | None = None,
    backing: str | os.PathLike[str] | None = None,
    backing_format: str | None = None,
    force: bool = False,
    sync: bool = True,
    allow: Sequence[str | os.PathLike[str]] = (),
) -> CreateResult:
    """Make an empty image, or one whose content is a backing file's.

    Parameters
    ----------
    path : path-like
        The new image. It appears under this name when it is complete.
    virtual_size : int, optional
        Bytes, a multiple of 512; the backing file's size if None.
    format : str, optional
        Its format; follows from the suffix if None.
    options : mapping or sequence of str, optional
        Options of the format, or strings ``"key=value,..."``.
    backing : path-like, optional
        Its backing file; a relative name counts from the folder of ``path`` and is stored as given.
    backing_format : str, optional
        Format of the backing file; required with ``backing``.
    force : bool
        Replace an existing file.
    sync : bool
        Return when the image is on stable storage.
    allow : sequence of path-like
        See :func:`imgcore.open`; for files that the backing file names.

    Returns
    -------
    CreateResult

    Raises
    ------
    OptionError
        No size, no format, or an option is wrong.
    TargetError
        ``path`` exists (and not ``force``), or is the backing file.
    OSError
        The operating system refused; ``filename`` is set.
    """
    from imgcore.disk.target_format import refuse_stream, target_format
    from imgcore.files.target import Target
    from imgcore.formats.registry import get_driver

    name = os.fspath(path)
    refuse_stream(name)
    driver = get_driver(target_format(name, format, flag="-f"))
    reference, backing_size, identity = _open_backing(name, backing, backing_format, allow)
    if virtual_size is None:
        virtual_size = backing_size
    if virtual_size is None:
        raise OptionError("a size is needed unless there is a backing file", path=name)
    request = _request(name, driver, virtual_size, options, reference)
    with Target(name, force=force, sync=sync) as target:
        if identity is not None and target.identity == identity:
            raise TargetError("is its own backing file", path=name)
        _write_empty(driver, request, target)
        target.commit()
    return CreateResult(
        path=name,
        format=driver.name,
        virtual_size=virtual_size,
        file_size=os.stat(name).st_size,
        options=dict(request.options),
        backing=reference.name if reference else None,
        backing_format=reference.format if reference else None,
    )


def _open_backing(
    name: str,
    backing: str | os.PathLike[str] | None,
    backing_format: str | None,
    allow: Sequence[str | os.PathLike[str]],
) -> tuple[BackingReference | None, int | None, object]:
    """Return the reference to store, the backing file's size (bytes) and its identity."""
    from imgcore.disk.backing import backing_path, backing_reference, opened_reference
    from imgcore.disk.layer import open_layer
    from imgcore.disk.options import OpenOptions

    reference = backing_reference(backing, backing_format)
    if reference is None:
        return None, None, None
    options = OpenOptions.from_keywords(format=reference.format, allow=allow, share=True)
    with open_layer(backing_path(name, reference), options) as layer:
        reference = opened_reference(reference, layer)
        return reference, layer.reader.virtual_size, layer.file.identity


def _request(
    name: str,
    driver: Driver,
    virtual_size: int,
    options: Mapping[str, Any] | Sequence[str] | None,
    reference: BackingReference | None,
) -> WriteRequest:
    from imgcore.formats.api import WriteRequest
    from imgcore.formats.option_texts import parse_options

    if virtual_size < 0 or virtual_size % SECTOR_NBYTES:
        raise OptionError(
            f"virtual size {virtual_size} is not a multiple of {SECTOR_NBYTES}", path=name
        )
    return WriteRequest(
        virtual_size=virtual_size,
        options=parse_options(driver, options),
        backing=reference,
        target_name=os.path.basename(name),
    )


def _write_empty(driver: Driver, request: WriteRequest, target: Target) -> None:
    if request.takes_space:
        target.require_space(driver.measure(request, request.virtual_size).fully_allocated)
    writer = driver.writer(request)
    writer.begin(target)
    writer.finish(writer.first_offset)
