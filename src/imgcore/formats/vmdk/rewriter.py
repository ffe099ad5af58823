"""Make a VMDK around the data of another image.

monolithicSparse: both sets of tables are appended to the file, and header and
descriptor are exchanged.  monolithicFlat and vmfs: a file that holds the disk stays as
it is, and a descriptor file beside it names it.

Source: Virtual Disk Format 5.0, "Hosted Sparse Extents".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from imgcore.errors import LimitExceededError, UnsupportedFeatureError
from imgcore.formats.api import BlockRule
from imgcore.formats.shared.alignment import align_up
from imgcore.formats.shared.flat_rewriter import FlatRewriter
from imgcore.formats.vmdk.flat_descriptor import (
    data_file_name,
    flat_descriptor,
    refuse_odd_name,
)
from imgcore.formats.vmdk.options import FLAT_KINDS, Options, WriteOptions
from imgcore.formats.vmdk.sparse_structures import FRONT_NBYTES, HostedLayout, HostedTables
from imgcore.limits import SECTOR_NBYTES, VMDK_MAX_SPARSE_FILE_NBYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from imgcore.engine.extents import Placements
    from imgcore.files.target_file import TargetFile
    from imgcore.formats.api import Rewriter, Survey, WriteRequest


def rewriter_for(request: WriteRequest[Options], survey: Survey) -> Rewriter:
    """Return the rewriter for a request; see `imgcore.formats.api.Driver.rewriter`."""
    options = WriteOptions.of(request)
    if options.subformat == "streamOptimized":
        raise UnsupportedFeatureError(
            "streamOptimized has only compressed blocks, in the order of the disk: imgcore convert "
            "writes them"
        )
    if options.subformat in FLAT_KINDS:
        refuse_odd_name(options.name)
        return DescribedRewriter(options, survey)
    return SparseRewriter(options, survey.file_nbytes)


class SparseRewriter:
    """Writes a monolithicSparse disk around grains that stay."""

    format_name: ClassVar[str] = "vmdk"
    overwrites: ClassVar[Sequence[tuple[int, int]]] = ((0, FRONT_NBYTES),)

    def __init__(self, options: WriteOptions, file_nbytes: int) -> None:
        self._options = options
        self._require_room(file_nbytes)
        self.logical_sector_nbytes: int = options.database.logical_sector_nbytes
        self.rule: BlockRule = BlockRule(
            block_nbytes=options.grain_nbytes,
            alignment=SECTOR_NBYTES,
            first_offset=FRONT_NBYTES,
            end_offset=VMDK_MAX_SPARSE_FILE_NBYTES,
        )

    def _require_room(self, append_offset: int) -> HostedLayout:
        """Return the layout of tables after the old end, which must fit the format."""
        start = align_up(append_offset, self._options.grain_nbytes)
        parts = HostedLayout(self._options, start)
        if parts.end > VMDK_MAX_SPARSE_FILE_NBYTES:
            raise LimitExceededError(
                f"the tables after the file's old end would reach to {parts.end:#x}, and a sparse "
                f"VMDK file holds at most {VMDK_MAX_SPARSE_FILE_NBYTES} bytes: qcow2, for "
                "example, has room"
            )
        return parts

    def begin(self, file: TargetFile, append_offset: int) -> int:
        """Reserve both sets of tables; see `imgcore.formats.api.Rewriter`."""
        parts = self._require_room(append_offset)
        self._file = file
        self._tables = HostedTables(self._options, file, parts)
        return parts.end

    def place(self, first_block: int, placements: Placements, next_offset: int) -> int:
        """Write the entries of blocks; see `imgcore.formats.api.Rewriter`."""
        self._tables.place(first_block, placements)
        return next_offset

    def finish(self, next_offset: int) -> None:
        """Write directories, descriptor and header."""
        # Zeros follow the descriptor's text.
        self._file.pwrite(0, bytes(FRONT_NBYTES))
        self._tables.finish(next_offset, FRONT_NBYTES)


class DescribedRewriter(FlatRewriter):
    """Makes a file that holds the disk the flat file of a VMDK."""

    format_name: ClassVar[str] = "vmdk"

    def __init__(self, options: WriteOptions, survey: Survey) -> None:
        super().__init__(
            survey,
            "a flat VMDK",
            guest_nbytes=options.virtual_size,
            file_nbytes=options.virtual_size,
            preallocation=options.preallocation,
        )
        self._options = options
        self.logical_sector_nbytes: int = options.database.logical_sector_nbytes

    @property
    def data_name(self) -> str:
        """The new name of the file; see `imgcore.formats.api.Described`."""
        return data_file_name(self._options.name)

    @property
    def description(self) -> bytes:
        """The descriptor file; see `imgcore.formats.api.Described`."""
        return flat_descriptor(self._options)

    def finish(self, next_offset: int) -> None:
        """Set the file's final size."""
        self._finished_file()
