"""Raw: the writer."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from imgcore.engine.geometry import ZeroPolicy
from imgcore.errors import OptionError
from imgcore.formats.api import Measurement
from imgcore.formats.shared.flat import flat_geometry
from imgcore.limits import MAX_VIRTUAL_NBYTES, SECTOR_NBYTES

if TYPE_CHECKING:
    from imgcore.engine.extents import Placements
    from imgcore.engine.geometry import Geometry
    from imgcore.files.target import Target
    from imgcore.files.target_file import TargetFile
    from imgcore.formats.api import WriteRequest


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
