"""Raw: the writer."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from imgcore.engine.geometry import ZeroPolicy
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
    """Writes a raw file or block device.

    ``geometry`` is final after `begin`: it depends on whether the target is a new file.
    """

    format_name: ClassVar[str] = "raw"

    def __init__(self, options: WriteOptions) -> None:
        super().__init__(
            flat_geometry(options.virtual_size, options.sparse_nbytes),
            options.virtual_size,
            options.preallocation,
        )
        self._in_place = False

    def begin(self, target: Target) -> TargetFile:
        """Return the file; a new one gets its size, so that it reads as zeros."""
        self._in_place = target.in_place
        if not target.in_place:
            return super().begin(target)
        target.require_capacity(self._file_nbytes)
        if self.geometry.zero_policy is ZeroPolicy.SKIP:
            # Ranges that are not written would keep their old bytes.
            self.geometry: Geometry = self.geometry._replace(
                zero_policy=ZeroPolicy.EXPLICIT, sparse_nbytes=0
            )
        return target.main

    def finish(self, next_offset: int) -> None:
        """Set the file's final size."""
        if not self._in_place:
            self._finished_file()
