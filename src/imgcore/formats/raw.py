"""Raw images: files and block devices whose bytes are the guest's, nothing else."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any, ClassVar, Final

from imgcore._errors import CorruptImageError, OptionError, UnsupportedFeatureError
from imgcore._files import is_on_xfs
from imgcore._geometry import Geometry, Placing, ZeroPolicy
from imgcore._limits import MAX_VIRTUAL_NBYTES, MIB, SECTOR_NBYTES
from imgcore.formats._base import Measurement, Option, SourceFile

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imgcore._extents import Extents, Placements
    from imgcore._files import HostFile, ReferenceGate
    from imgcore._target import Target, TargetFile
    from imgcore.formats._base import BackingReference, CheckReport, WriteRequest

name: Final = "raw"
aliases: Final[tuple[str, ...]] = ()
suffixes: Final = (".raw", ".img", ".dd", ".bin")
options: Final = (
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

# Blocks of the target: whole ones of zeros are skipped, in others zeros of -S bytes are.
_MIN_BLOCK_NBYTES: Final = 64 * 1024
_MAX_BLOCK_NBYTES: Final = 2 * MIB


class RawReader:
    """Reads a raw file or block device; closes it when it is closed itself."""

    format_name: ClassVar[str] = name

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
        self._synced = False

    def _sync_holes(self) -> None:
        """Write back what the file has in memory where its holes could not be trusted else.

        XFS can report a hole where a reflinked file has data that is not written back yet.
        """
        if self._synced:
            return
        self._synced = True
        with contextlib.suppress(OSError):
            status = os.fstat(self.file.fd)
            has_holes = status.st_blocks * 512 < status.st_size
            if not self.file.is_block_device and has_holes and is_on_xfs(self.file.fd):
                os.fdatasync(self.file.fd)

    def plan(self, start: int, length: int) -> Iterator[Extents]:
        """Yield extent batches of DATA and HOLE; see `imgcore.formats._base.Reader.plan`.

        Notes
        -----
        Asks the file system range by range while it goes on, so that a batch comes at once
        however large the disk.  A file system that cannot tell holes says that all is data.
        """
        import numpy as np

        from imgcore._extents import EXTENT_DTYPE, Kind

        self._sync_holes()
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
        data_start, data_end = self.file.core.next_data(position)
        if data_start == data_end or data_start >= end:
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

    format_name: ClassVar[str] = name

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
        sparse_nbytes = self._sparse_nbytes
        policy = ZeroPolicy.SKIP
        if sparse_nbytes == 0:
            policy = ZeroPolicy.STORE
        elif self._in_place:
            # What is not written would keep its old bytes.
            policy, sparse_nbytes = ZeroPolicy.EXPLICIT, 0
        # A block of zeros is skipped whole, so it must not be smaller than -S.
        wanted = 1 << max(self._sparse_nbytes - 1, 0).bit_length()
        return Geometry(
            block_nbytes=min(max(wanted, _MIN_BLOCK_NBYTES), _MAX_BLOCK_NBYTES),
            guest_nbytes=self._virtual_size,
            placing=Placing.IDENTITY,
            zero_policy=policy,
            sparse_nbytes=sparse_nbytes,
        )

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


def probe(head: bytes, tail: bytes) -> bool:
    """Return False: raw is never the outcome of probing."""
    return False


def open(file: HostFile, gate: ReferenceGate) -> RawReader:
    """Open a raw image; it names no other files."""
    return RawReader(file)


def writer(request: WriteRequest) -> RawWriter:
    """Return a writer of a raw image."""
    return RawWriter(request)


def measure(request: WriteRequest, data_nbytes: int) -> Measurement:
    """Return the size of a raw image: holes count, as `qemu-img measure` has it."""
    _refuse(request)
    return Measurement(required=request.virtual_size, fully_allocated=request.virtual_size)
