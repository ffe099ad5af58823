"""Write VMDK disks: choose the writer, measure, and write flat extents."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final

from imgcore.formats.api import Measurement
from imgcore.formats.shared.flat_writer import FlatWriter, flat_geometry
from imgcore.formats.vmdk.flat_descriptor import (
    data_file_name,
    flat_descriptor,
    refuse_odd_name,
)
from imgcore.formats.vmdk.options import Options, WriteOptions

if TYPE_CHECKING:
    from imgcore.files.target import Target
    from imgcore.files.target_file import TargetFile
    from imgcore.formats.api import Writer, WriteRequest

_DESCRIPTOR_NBYTES: Final = 1024


def writer_for(request: WriteRequest[Options]) -> Writer:
    """Return the writer for the request's subformat.

    Raises
    ------
    OptionError
        An option's value is not allowed, or cannot be combined with the others.
    LimitExceededError
        The disk is too large for the subformat.
    UnsupportedFeatureError
        The request has a backing file.
    """
    from imgcore.formats.vmdk.sparse_writer import SparseWriter, StreamWriter

    options = WriteOptions.of(request)
    if options.subformat == "streamOptimized":
        return StreamWriter(options)
    if options.subformat == "monolithicSparse":
        return SparseWriter(options)
    return DescribedWriter(options)


def measure(request: WriteRequest[Options], data_nbytes: int) -> Measurement:
    """Return the size of all files with ``data_nbytes`` of data, and with a full disk.

    For streamOptimized both are upper bounds, as if nothing could be compressed.
    """
    from imgcore.formats.vmdk import sparse_writer as sparse

    options = WriteOptions.of(request)
    if options.subformat == "streamOptimized":
        nbytes = sparse.stream_bound_nbytes
        return Measurement(nbytes(options, data_nbytes), nbytes(options, options.virtual_size))
    if options.subformat == "monolithicSparse":
        nbytes = sparse.sparse_file_nbytes
        return Measurement(nbytes(options, data_nbytes), nbytes(options, options.virtual_size))
    full = _DESCRIPTOR_NBYTES + options.virtual_size
    if options.preallocation != "off":
        return Measurement(full, full)
    return Measurement(_DESCRIPTOR_NBYTES + min(data_nbytes, options.virtual_size), full)


class DescribedWriter(FlatWriter):
    """Writes monolithicFlat and vmfs: a descriptor, and the raw disk beside it."""

    format_name: ClassVar[str] = "vmdk"

    def __init__(self, options: WriteOptions) -> None:
        super().__init__(
            flat_geometry(options.virtual_size, options.sparse_nbytes),
            options.virtual_size,
            options.preallocation,
        )
        self._options = options
        self._descriptor: TargetFile | None = None
        self.logical_sector_nbytes: int = options.database.logical_sector_nbytes

    def begin(self, target: Target) -> TargetFile:
        """Create the data file at its full size and return it."""
        refuse_odd_name(self._options.name, target.path)
        self._descriptor = target.main
        return self._reserve(target, target.companion(data_file_name(self._options.name)))

    def end_disk(self, request: WriteRequest[Options]) -> None:
        """Set the sizes; see `imgcore.formats.api.EndsLate`."""
        self._options = WriteOptions.of(request)
        self._end(self._options.virtual_size, self._options.virtual_size)

    def finish(self, next_offset: int) -> None:
        """Write the descriptor."""
        self._finished_file()
        text = flat_descriptor(self._options)
        assert self._descriptor is not None
        self._descriptor.pwrite(0, text)
        self._descriptor.truncate(len(text))
