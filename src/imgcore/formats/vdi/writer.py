"""VDI: the writers.

A new file has the header, the block map, then blocks, which start at a multiple of 1
MiB as in VirtualBox.  The offset of the map is known from the start.  So entries are
written as blocks are placed, and only a piece of the map is in memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final

from imgcore.engine.geometry import Geometry
from imgcore.formats.api import Measurement
from imgcore.formats.shared.flat_writer import FlatWriter, flat_geometry
from imgcore.formats.shared.write_checks import zero_policy
from imgcore.formats.vdi import layout
from imgcore.formats.vdi.options import Options, WriteOptions

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from imgcore.engine.extents import Placements
    from imgcore.files.target import Target
    from imgcore.files.target_file import TargetFile
    from imgcore.formats.api import Writer, WriteRequest

# Entries that are written at once: 1 MiB.
_PIECE_ENTRIES: Final = 1 << 18


def writer_for(request: WriteRequest[Options]) -> Writer:
    """Return the writer for a request; raises OptionError or LimitExceededError."""
    options = WriteOptions.of(request)
    return FixedWriter(options) if options.is_fixed else DynamicWriter(options)


def measure(request: WriteRequest[Options], data_nbytes: int) -> Measurement:
    """Return the file's size with ``data_nbytes`` of data and with a full disk."""
    options = WriteOptions.of(request)
    full = options.file_nbytes(options.n_blocks)
    if options.is_fixed:
        return Measurement(full, full)
    n_data = min(-(-data_nbytes // options.block_nbytes), options.n_blocks)
    return Measurement(options.file_nbytes(n_data), full)


class DynamicWriter:
    """Writes dynamic and differencing images."""

    format_name: ClassVar[str] = "vdi"
    needs_own_blocks: ClassVar[bool] = False

    def __init__(self, options: WriteOptions) -> None:
        self._options = options
        self._file: TargetFile | None = None
        self._n_allocated = 0
        # Entries of the map before this one have been written.
        self._n_written = 0
        self.first_offset: int = options.data_offset
        self.geometry: Geometry = Geometry(
            block_nbytes=options.block_nbytes,
            guest_nbytes=options.virtual_size,
            zero_policy=zero_policy(
                options.sparse_nbytes, has_parent=options.parent_uuid is not None
            ),
            stored_alignment=options.block_nbytes,
            sparse_nbytes=options.sparse_nbytes,
        )

    def begin(self, target: Target) -> TargetFile:
        """Return the file; its header is written at the end."""
        from imgcore.formats.vdi.tables import table_format

        self._file = target.main
        self._format = table_format(self._options.block_nbytes, self._options.data_offset)
        return self._file

    def leave_end_open(self) -> None:
        """Do nothing: the header is written at the end."""

    def end_disk(self, request: WriteRequest[Options]) -> None:
        """Set the size; see `imgcore.formats.api.EndsLate`."""
        self._options = WriteOptions.of(request)._replace(data_offset=self.first_offset)
        nbytes = self._options.virtual_size
        self.geometry = self.geometry._replace(guest_nbytes=nbytes)

    def place(self, first_block: int, placements: Placements, next_offset: int) -> int:
        """Write the entries of these blocks, and of free blocks before them."""
        import numpy as np

        assert self._file is not None
        self._write_free(first_block)
        for start in range(0, len(placements), _PIECE_ENTRIES):
            entries = np.empty(min(_PIECE_ENTRIES, len(placements) - start), dtype="<u4")
            rows = placements[start : start + len(entries)]
            # Every place fits into an entry: blocks are in guest order, and there are
            # fewer of them than an entry has values.
            self._format.encode(rows, entries.view(np.uint8))
            _write_entries(self._file, first_block + start, entries)
            self._n_allocated += int((entries < layout.BLOCK_ZERO).sum())
        self._n_written = first_block + len(placements)
        return next_offset

    def _write_free(self, until: int) -> None:
        """Fill the map with free blocks up to ``until``."""
        import numpy as np

        assert self._file is not None
        for first in range(self._n_written, until, _PIECE_ENTRIES):
            count = min(_PIECE_ENTRIES, until - first)
            _write_entries(self._file, first, np.full(count, layout.BLOCK_FREE, dtype="<u4"))
        self._n_written = max(self._n_written, until)

    def finish(self, next_offset: int) -> None:
        """Complete the map and the last block, and write the header."""
        assert self._file is not None
        self._write_free(self._options.n_blocks)
        self._file.truncate(self._options.file_nbytes(self._n_allocated))
        self._file.pwrite(0, self._options.header(self._n_allocated))


class FixedWriter(FlatWriter):
    """Writes fixed images, in which every block is allocated from the start."""

    format_name: ClassVar[str] = "vdi"

    def __init__(self, options: WriteOptions) -> None:
        super().__init__(
            flat_geometry(
                options.virtual_size, options.sparse_nbytes, host_base=options.data_offset
            ),
            options.file_nbytes(options.n_blocks),
            options.preallocation,
        )
        self._options = options

    def end_disk(self, request: WriteRequest[Options]) -> None:
        """Set the sizes; see `imgcore.formats.api.EndsLate`."""
        self._options = WriteOptions.of(request)._replace(data_offset=self.first_offset)
        self._end(self._options.virtual_size, self._options.file_nbytes(self._options.n_blocks))

    def finish(self, next_offset: int) -> None:
        """Write the block map and the header."""
        import numpy as np

        file, n_blocks = self._finished_file(), self._options.n_blocks
        for first in range(0, n_blocks, _PIECE_ENTRIES):
            last = min(first + _PIECE_ENTRIES, n_blocks)
            _write_entries(file, first, np.arange(first, last, dtype="<u4"))
        file.pwrite(0, self._options.header(n_blocks))


def _write_entries(file: TargetFile, first: int, entries: NDArray[np.uint32]) -> None:
    file.pwrite(layout.MAP_OFFSET + first * layout.ENTRY_NBYTES, entries)
