"""Raw images: files and block devices whose bytes are the guest's, nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Final

from imgcore.engine.geometry import ZeroPolicy
from imgcore.engine.sources import SourceFile
from imgcore.errors import CorruptImageError, OptionError, UnsupportedFeatureError
from imgcore.formats.api import Driver, Measurement, Option
from imgcore.formats.shared.flat import flat_geometry, sync_holes
from imgcore.limits import MAX_VIRTUAL_NBYTES, SECTOR_NBYTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from imgcore.engine.extents import Extents, Placements
    from imgcore.engine.geometry import Geometry
    from imgcore.files.host_file import HostFile
    from imgcore.files.target import Target
    from imgcore.files.target_file import TargetFile
    from imgcore.formats.api import BackingReference, CheckReport, WriteRequest

OPTIONS: Final = (
    Option(
        "preallocation",
        "choice",
        "off",
        "reserve the whole file: by the file system (falloc), by writing zeros (full)",
        ("off", "falloc", "full"),
    ),
)

# Each row costs two system calls to find; small batches keep the first one quick to come.
_BATCH_ROWS: Final = 1 << 14


class RawReader:
    """Reads a raw file or block device; closes it when it is closed itself."""

    format_name: ClassVar[str] = "raw"

    def __init__(self, file: HostFile) -> None:
        if file.nbytes % SECTOR_NBYTES:
            wanted = -(-file.nbytes // SECTOR_NBYTES) * SECTOR_NBYTES
            raise CorruptImageError(
                f"a raw disk has a multiple of {SECTOR_NBYTES} bytes, this file has {file.nbytes}: "
                f"pad a copy of it (truncate -s {wanted})",
                path=file.path,
            )
        self.file = file
        self.subformat: str | None = None
        self.virtual_size = file.nbytes
        self.block_nbytes = SECTOR_NBYTES
        self.sources = (SourceFile(file),)
        self.backing: BackingReference | None = None
        self.identities: Mapping[str, str] = {}
        self._synced = False

    def plan(self, start: int, length: int) -> Iterator[Extents]:
        """Yield extent batches of DATA and HOLE; see `imgcore.formats.api.Reader.plan`.

        Notes
        -----
        Asks the file system range by range while it goes on, so that a batch comes at once
        however large the disk.  A file system that cannot tell holes says that all is data.
        """
        import numpy as np

        from imgcore.engine.extents import EXTENT_DTYPE, Kind

        if not self._synced:
            self._synced = True
            sync_holes(self.file)
        end = start + length
        position = start
        rows: list[tuple[int, int, int, int, int, int, int]] = []
        while position < end:
            data_start, data_end = self._next_data(position, end)
            if data_start > position:
                rows.append((position, data_start - position, 0, 0, 0, Kind.HOLE, 0))
            if data_end > data_start:
                nbytes = data_end - data_start
                rows.append((data_start, nbytes, data_start, nbytes, 0, Kind.DATA, 0))
            position = data_end
            if len(rows) >= _BATCH_ROWS:
                yield np.array(rows, dtype=EXTENT_DTYPE)
                rows.clear()
        if rows:
            yield np.array(rows, dtype=EXTENT_DTYPE)

    def _next_data(self, position: int, end: int) -> tuple[int, int]:
        """Return the next range of data in [position, end), empty at the end if there is none."""
        data_start, data_end = self.file.next_data(position)
        if data_start >= data_end or data_start >= end:
            return end, end
        # Whole sectors: a file system's blocks may be smaller, and holes read as zeros.
        data_start = max(data_start // SECTOR_NBYTES * SECTOR_NBYTES, position)
        data_end = -(-data_end // SECTOR_NBYTES) * SECTOR_NBYTES
        return data_start, min(max(data_end, data_start + SECTOR_NBYTES), end)

    def info(self) -> dict[str, Any]:
        """Return what is specific to the format: nothing."""
        return {}

    def check(self) -> CheckReport:
        """Raise UnsupportedFeatureError: there is nothing to check."""
        raise UnsupportedFeatureError("a raw image has no tables to check", path=self.file.path)

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class RawWriter:
    """Writes a raw file or block device; every guest byte keeps its place.

    ``geometry`` is final after `begin`, when it is known what the target held before.
    """

    format_name: ClassVar[str] = "raw"

    def __init__(self, request: WriteRequest) -> None:
        _refuse(request)
        self._virtual_size = request.virtual_size
        self._preallocation = str(request.options.get("preallocation", "off"))
        self._sparse_nbytes = request.sparse_nbytes
        self._target: TargetFile | None = None
        self._in_place = False
        self.first_offset = 0
        self.geometry = self._make_geometry()

    def _make_geometry(self) -> Geometry:
        geometry = flat_geometry(self._virtual_size, self._sparse_nbytes)
        if self._in_place and self._sparse_nbytes:
            # What is not written would keep its old bytes.
            geometry = geometry._replace(zero_policy=ZeroPolicy.EXPLICIT, sparse_nbytes=0)
        return geometry

    def begin(self, target: Target) -> TargetFile:
        """Give the file its size, so that it reads as zeros, and return it."""
        self._in_place = target.in_place
        self.geometry = self._make_geometry()
        if target.in_place:
            target.require_capacity(self._virtual_size)
        else:
            if self._preallocation != "off":
                target.require_space(self._virtual_size)
            target.main.truncate(self._virtual_size)
            target.main.preallocate(self._preallocation, self._virtual_size)
        self._target = target.main
        return self._target

    def place(self, first_block: int, placements: Placements, next_offset: int) -> int:
        """Do nothing: there are no tables."""
        return next_offset

    def finish(self, next_offset: int) -> None:
        """Set the file's final size."""
        if self._target is not None and not self._in_place:
            self._target.truncate(self._virtual_size)


def _refuse(request: WriteRequest) -> None:
    if request.compress:
        raise OptionError("raw cannot be compressed (-c): name the target .raw.zst instead")
    if request.backing is not None:
        raise OptionError("raw cannot have a backing file (-B)")
    if request.virtual_size % SECTOR_NBYTES or not 0 <= request.virtual_size <= MAX_VIRTUAL_NBYTES:
        raise OptionError(
            f"the size of a raw disk is a multiple of {SECTOR_NBYTES} bytes, "
            f"not {request.virtual_size}"
        )
    if request.sparse_nbytes % SECTOR_NBYTES or request.sparse_nbytes < 0:
        raise OptionError(
            f"-S is {request.sparse_nbytes}: a multiple of {SECTOR_NBYTES} bytes is needed"
        )


def writer_for(request: WriteRequest) -> RawWriter:
    """Return a writer of a raw image."""
    return RawWriter(request)


def measure(request: WriteRequest, data_nbytes: int) -> Measurement:
    """Return the size of a raw image: holes count, as `qemu-img measure` has it."""
    _refuse(request)
    return Measurement(required=request.virtual_size, fully_allocated=request.virtual_size)


DRIVER: Final = Driver(
    name="raw",
    options=OPTIONS,
    read=lambda file, gate, values: RawReader(file),
    writing=__name__,
)
