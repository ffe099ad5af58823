"""VDI: the writers.

Layout of a new file: header, block map, then blocks from a multiple of 1 MiB on, as VirtualBox
aligns them.  The map's place is known from the start, so entries go into the file as blocks are
placed, and no more than a piece of the map is in memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final

from imgcore.engine.geometry import Geometry
from imgcore.errors import UnsupportedFeatureError
from imgcore.formats.api import Measurement
from imgcore.formats.shared.flat import flat_geometry
from imgcore.formats.vdi import layout
from imgcore.formats.vdi.options import VdiPlan, plan_request

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from imgcore.engine.extents import Placements
    from imgcore.files.target import Target
    from imgcore.files.target_file import TargetFile
    from imgcore.formats.api import Writer, WriteRequest

# Entries that are made and written at a time: 1 MiB.
_PIECE_ENTRIES: Final = 1 << 18


def writer_for(request: WriteRequest) -> Writer:
    """Return the writer that the options ask for; raises OptionError or LimitExceededError."""
    plan = plan_request(request)
    return FixedWriter(plan) if plan.is_fixed else DynamicWriter(plan)


def measure(request: WriteRequest, data_nbytes: int) -> Measurement:
    """Return the size of the file with ``data_nbytes`` of whole blocks, and with a full disk."""
    plan = plan_request(request)
    full = plan.file_nbytes(plan.n_blocks)
    if plan.is_fixed:
        return Measurement(full, full)
    n_data = min(-(-data_nbytes // plan.block_nbytes), plan.n_blocks)
    return Measurement(plan.file_nbytes(n_data), full)


class DynamicWriter:
    """Writes images that grow with their data, with a parent or without."""

    format_name: ClassVar[str] = "vdi"

    def __init__(self, plan: VdiPlan) -> None:
        self._plan = plan
        self._file: TargetFile | None = None
        self._n_allocated = 0
        # Entries of the map before this one are in the file.
        self._n_written = 0
        self.first_offset = plan.data_offset
        self.geometry = Geometry(
            block_nbytes=plan.block_nbytes,
            guest_nbytes=plan.virtual_size,
            zero_policy=plan.zero_policy,
            stored_alignment=plan.block_nbytes,
            sparse_nbytes=plan.sparse_nbytes,
        )

    def begin(self, target: Target) -> TargetFile:
        """Return the file; its header is written at the end."""
        from imgcore.formats.vdi.tables import table_format

        _refuse_in_place(target)
        self._file = target.main
        self._format = table_format(self._plan.block_nbytes, self._plan.data_offset)
        return self._file

    def place(self, first_block: int, placements: Placements, next_offset: int) -> int:
        """Write the entries of these blocks, and of those before them that have no data."""
        import numpy as np

        assert self._file is not None
        self._write_free(first_block)
        for start in range(0, len(placements), _PIECE_ENTRIES):
            entries = np.empty(min(_PIECE_ENTRIES, len(placements) - start), dtype="<u4")
            rows = placements[start : start + len(entries)]
            # A place that does not fit an entry cannot come up: blocks are in guest order,
            # and there are fewer of them than entries have values.
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
        """Complete the map and the last block, write the header."""
        assert self._file is not None
        self._write_free(self._plan.n_blocks)
        self._file.truncate(self._plan.file_nbytes(self._n_allocated))
        self._file.pwrite(0, self._plan.header(self._n_allocated))


class FixedWriter:
    """Writes images in which every block has its place from the start."""

    format_name: ClassVar[str] = "vdi"

    def __init__(self, plan: VdiPlan) -> None:
        self._plan = plan
        self._file: TargetFile | None = None
        self.first_offset = plan.file_nbytes(plan.n_blocks)
        self.geometry = flat_geometry(
            plan.virtual_size, plan.sparse_nbytes, host_base=plan.data_offset
        )

    def begin(self, target: Target) -> TargetFile:
        """Give the file its size, so that it reads as zeros, and return it."""
        _refuse_in_place(target)
        self._file = target.main
        if self._plan.preallocation != "off":
            target.require_space(self.first_offset)
        self._file.truncate(self.first_offset)
        self._file.preallocate(self._plan.preallocation, self.first_offset)
        return self._file

    def place(self, first_block: int, placements: Placements, next_offset: int) -> int:
        """Do nothing: all places are known."""
        return next_offset

    def finish(self, next_offset: int) -> None:
        """Write the block map and the header."""
        import numpy as np

        assert self._file is not None
        n_blocks = self._plan.n_blocks
        for first in range(0, n_blocks, _PIECE_ENTRIES):
            last = min(first + _PIECE_ENTRIES, n_blocks)
            _write_entries(self._file, first, np.arange(first, last, dtype="<u4"))
        self._file.truncate(self.first_offset)
        self._file.pwrite(0, self._plan.header(n_blocks))


def _write_entries(file: TargetFile, first: int, entries: NDArray[np.uint32]) -> None:
    file.pwrite(layout.MAP_OFFSET + first * layout.ENTRY_NBYTES, entries)


def _refuse_in_place(target: Target) -> None:
    if target.in_place:
        raise UnsupportedFeatureError(
            "VDI is written to a new file only, not in place (-n) nor to a block device",
            path=target.path,
        )
