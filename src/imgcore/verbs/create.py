"""The verb ``create``: creates an empty image."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, SupportsIndex

from imgcore.border import FilePath, byte_count, file_name
from imgcore.errors import OptionError, TargetError
from imgcore.limits import SECTOR_NBYTES

if TYPE_CHECKING:
    from imgcore.files.commitment import Commitment
    from imgcore.files.target import Target
    from imgcore.formats.api import BackingReference, Driver, WriteRequest
    from imgcore.formats.options import FormatOptions


@dataclass(frozen=True)
class CreateResult:
    """The result of `imgcore.create`.

    Attributes
    ----------
    path, format : str
        The new image and its format.
    virtual_size, file_size : int
        Bytes of the disk, and of the image's main file.
    options : dict
        All options of the format with the values used.
    backing, backing_format : str or None
        The backing file, as the image names it, and its format.
    """

    path: str
    format: str
    virtual_size: int
    file_size: int
    options: dict[str, Any] = field(default_factory=dict)
    backing: str | None = None
    backing_format: str | None = None


def create(
    path: FilePath,
    virtual_size: SupportsIndex | None = None,
    *,
    format: str | None = None,
    options: Mapping[str, Any] | Sequence[str] | None = None,
    backing: FilePath | None = None,
    backing_format: str | None = None,
    force: bool = False,
    sync: bool = True,
    allow: Sequence[FilePath] = (),
) -> CreateResult:
    """Create an image that is empty or reads as its backing file.

    Parameters
    ----------
    path : str, bytes or os.PathLike
        The new image.  It appears under this name only when it is complete.
    virtual_size : int, optional
        Bytes of the disk, a multiple of 512; by default the size of the backing
        file's disk.
    format : str, optional
        The image's format; by default the suffix of ``path`` decides.
    options : mapping or sequence of str, optional
        Options of the format, as a mapping or as strings ``"key=value,..."``.
    backing : str, bytes or os.PathLike, optional
        The backing file.  A relative name starts at the folder of ``path``, and is
        stored as given.
    backing_format : str, optional
        Format of the backing file; required with ``backing``.
    force : bool
        Replace an existing file.
    sync : bool
        Return only when the image is on stable storage.
    allow : sequence of str, bytes or os.PathLike
        See `imgcore.open`; for files that the backing file names.

    Returns
    -------
    CreateResult

    Raises
    ------
    OptionError
        The size or the format is missing, or an option is wrong.
    TargetError
        ``path`` exists and ``force`` is not given, or it is the backing file.
    OSError
        The operating system reported an error; ``filename`` is set.
    """
    from imgcore.disk.target_format import refuse_other_name, refuse_stream, target_format
    from imgcore.files.commitment import until_committed
    from imgcore.files.target import Target
    from imgcore.formats.registry import get_driver

    name = file_name(path)
    refuse_stream(name)
    driver = get_driver(target_format(name, format, flag="-f"))
    refuse_other_name(name, driver.name, flag="-f")
    reference, backing_size, identity = _open_backing(name, backing, backing_format, allow)
    nbytes = backing_size if virtual_size is None else byte_count(virtual_size, "virtual_size")
    if nbytes is None:
        raise OptionError("a size is needed unless there is a backing file", path=name)
    request = _request(name, driver, nbytes, options, reference)

    def job(commitment: Commitment[CreateResult]) -> None:
        with Target(name, force=force, sync=sync) as target:
            if identity is not None and target.identity == identity:
                raise TargetError("is its own backing file", path=name)
            _write_empty(driver, request, target)
            result = CreateResult(
                path=name,
                format=driver.name,
                virtual_size=request.virtual_size,
                file_size=target.main.file_size,
                options=request.options.as_dict(),
                backing=reference.name if reference else None,
                backing_format=reference.format if reference else None,
            )
            commitment.commit(target, result)

    return until_committed(job)


def _open_backing(
    name: str,
    backing: FilePath | None,
    backing_format: str | None,
    allow: Sequence[FilePath],
) -> tuple[BackingReference | None, int | None, object]:
    """Return the reference to store, the backing file's disk size and its identity."""
    from imgcore.disk.backing import backing_path, backing_reference, opened_reference
    from imgcore.disk.layer import open_layer
    from imgcore.disk.open_options import Flags, OpenOptions

    reference = backing_reference(name, backing, backing_format)
    if reference is None:
        return None, None, None
    options = OpenOptions.from_keywords(
        format=reference.format, allow=allow, share=True, flags=Flags(format="-F")
    )
    with open_layer(backing_path(name, reference), options) as layer:
        reference = opened_reference(reference, layer)
        return reference, layer.reader.virtual_size, layer.file.identity


def _request(
    name: str,
    driver: Driver,
    virtual_size: int,
    options: Mapping[str, Any] | Sequence[str] | None,
    reference: BackingReference | None,
) -> WriteRequest[FormatOptions]:
    from imgcore.formats.api import WriteRequest
    from imgcore.formats.option_texts import parse_options
    from imgcore.formats.options import has_tables_in_front

    if virtual_size < 0 or virtual_size % SECTOR_NBYTES:
        raise OptionError(
            f"virtual size {virtual_size} is not a multiple of {SECTOR_NBYTES}", path=name
        )
    parsed = parse_options(driver, options)
    in_front = has_tables_in_front(parsed)
    if in_front and reference is not None:
        raise OptionError("an image with a parent cannot have its tables in front", path=name)
    return WriteRequest(
        virtual_size=virtual_size,
        options=parsed,
        backing=reference,
        target_name=os.path.basename(name),
        tables_first=in_front,
    )


def _write_empty(driver: Driver, request: WriteRequest[FormatOptions], target: Target) -> None:
    from imgcore.formats.api import NeedsBlocks

    writer = driver.writer(request)
    if isinstance(writer, NeedsBlocks):
        writer.know_blocks((), 0)
    writer.begin(target)
    writer.finish(writer.first_offset)
