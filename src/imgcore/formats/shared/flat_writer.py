"""Writes disks that a host file stores unchanged: raw, flat extents, fixed images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from imgcore.engine.geometry import Geometry, Placing, ZeroPolicy
from imgcore.errors import OptionError
from imgcore.limits import KIB, MIB

if TYPE_CHECKING:
    from imgcore.engine.extents import Placements
    from imgcore.files.target import Target
    from imgcore.files.target_file import TargetFile

# A block of zeros is skipped as a whole; in others, runs of zeros of -S bytes are
# skipped.
_MIN_BLOCK_NBYTES: Final = 64 * KIB
_MAX_BLOCK_NBYTES: Final = 2 * MIB


def flat_geometry(guest_nbytes: int, sparse_nbytes: int, *, host_base: int = 0) -> Geometry:
    """Return the geometry of a new file in which each guest byte has a fixed place.

    Parameters
    ----------
    guest_nbytes : int
        Size of the disk in bytes.
    sparse_nbytes : int
        ``-S`` in bytes; 0 writes zeros too.
    host_base : int
        Host offset of guest byte 0.
    """
    # A block of zeros is skipped whole, so it must not be smaller than -S.
    wanted = 1 << max(sparse_nbytes - 1, 0).bit_length()
    return Geometry(
        block_nbytes=min(max(wanted, _MIN_BLOCK_NBYTES), _MAX_BLOCK_NBYTES),
        guest_nbytes=guest_nbytes,
        placing=Placing.IDENTITY,
        zero_policy=ZeroPolicy.SKIP if sparse_nbytes else ZeroPolicy.STORE,
        host_base=host_base,
        sparse_nbytes=sparse_nbytes,
    )


class FlatWriter:
    """Base of writers in whose file every block has a fixed place.

    Parameters
    ----------
    geometry : Geometry
        Its placing is IDENTITY.
    file_nbytes : int
        Final size of the file in bytes.
    preallocation : str
        ``falloc`` or ``full`` reserves the file's space; other values do not.
    """

    def __init__(self, geometry: Geometry, file_nbytes: int, preallocation: str = "off") -> None:
        self.geometry: Geometry = geometry
        self.first_offset: int = geometry.host_base
        self.needs_own_blocks: bool = preallocation in ("falloc", "full")
        self._file_nbytes = file_nbytes
        self._preallocation = preallocation
        self._file: TargetFile | None = None
        self._is_open_ended = False

    def leave_end_open(self) -> None:
        """Leave the file's size to `finish`; see `imgcore.formats.api.EndsLate`."""
        if self.needs_own_blocks:
            raise OptionError(
                f"preallocation={self._preallocation} needs the size of the disk, which a stream "
                "states at its end: give it (--size)"
            )
        self._is_open_ended = True

    def _end(self, guest_nbytes: int, file_nbytes: int) -> None:
        """Set the sizes of the disk and of the file."""
        self.geometry = self.geometry._replace(guest_nbytes=guest_nbytes)
        self._file_nbytes = file_nbytes

    def begin(self, target: Target) -> TargetFile:
        """Give a new file its size, so that it reads as zeros, and return it."""
        return self._reserve(target, target.main)

    def _reserve(self, target: Target, file: TargetFile) -> TargetFile:
        self._file = file
        if target.in_place or self._is_open_ended:
            return file
        if self.needs_own_blocks:
            target.require_space(self._file_nbytes)
        file.truncate(self._file_nbytes)
        if self.needs_own_blocks:
            file.preallocate(self._preallocation, self._file_nbytes)
        return file

    def place(self, first_block: int, placements: Placements, next_offset: int) -> int:
        """Do nothing: every block has a fixed place."""
        return next_offset

    def _finished_file(self) -> TargetFile:
        """Return the file at its final size."""
        assert self._file is not None
        self._file.truncate(self._file_nbytes)
        return self._file
