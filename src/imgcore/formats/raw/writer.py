"""Raw: the writer."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from imgcore.formats.api import Measurement
from imgcore.formats.raw.options import Options, WriteOptions
from imgcore.formats.shared.flat_writer import FlatWriter, flat_geometry

if TYPE_CHECKING:
    from imgcore.engine.geometry import Geometry
    from imgcore.files.target import Target
    from imgcore.files.target_file import TargetFile
    from imgcore.formats.api import WriteRequest


def writer_for(request: WriteRequest[Options]) -> RawWriter:
    """Return a writer of a raw image."""
    return RawWriter(WriteOptions.of(request))


def measure(request: WriteRequest[Options], data_nbytes: int) -> Measurement:
    """Return the size of a raw image, holes included, as ``qemu-img measure`` does."""
    nbytes = WriteOptions.of(request).virtual_size
    return Measurement(required=nbytes, fully_allocated=nbytes)


class RawWriter(FlatWriter):
    """Writes a raw file or block device."""

    format_name: ClassVar[str] = "raw"
    writes_in_order: ClassVar[bool] = True

    def __init__(self, options: WriteOptions) -> None:
        super().__init__(
            flat_geometry(options.exact_nbytes, options.sparse_nbytes),
            options.exact_nbytes,
            options.preallocation,
        )
        self._in_place = self._is_on_device = False
        self._virtual_size = options.virtual_size

    def begin(self, target: Target) -> TargetFile:
        """Return the file; an existing one must be large enough."""
        self._in_place = target.in_place
        self._is_on_device = target.is_block_device
        if target.is_block_device:
            # The sectors of a device are whole.
            self._file_nbytes = self._virtual_size
            self.geometry: Geometry = self.geometry._replace(guest_nbytes=self._virtual_size)
        if target.in_place and not self._is_open_ended:
            target.require_capacity(self._file_nbytes)
        return super().begin(target)

    def end_disk(self, request: WriteRequest[Options]) -> None:
        """Set the sizes; see `imgcore.formats.api.EndsLate`."""
        options = WriteOptions.of(request)
        nbytes = options.virtual_size if self._is_on_device else options.exact_nbytes
        self._end(nbytes, nbytes)

    def finish(self, next_offset: int) -> None:
        """Set the file's final size."""
        if not self._in_place:
            self._finished_file()
