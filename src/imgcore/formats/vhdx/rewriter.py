"""VHDX: the rewriter.

Log, metadata and BAT are appended to the file, each at a multiple of 1 MiB.  Only the
header section at its start is exchanged.

Source: [MS-VHDX] 2.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from imgcore.errors import UnsupportedFeatureError
from imgcore.formats.api import BlockRule
from imgcore.formats.shared.alignment import align_up
from imgcore.formats.vhdx import layout
from imgcore.formats.vhdx.options import Options, WriteOptions
from imgcore.formats.vhdx.structures import Structures

if TYPE_CHECKING:
    from imgcore.engine.extents import Placements
    from imgcore.files.target_file import TargetFile
    from imgcore.formats.api import Survey, WriteRequest


def rewriter_for(request: WriteRequest[Options], survey: Survey) -> VhdxRewriter:
    """Return the rewriter for a request; see `imgcore.formats.api.Driver.rewriter`."""
    options = WriteOptions.of(request)
    if options.is_fixed:
        raise UnsupportedFeatureError(
            "a VHDX with subformat=fixed has all its blocks, which another image need not have: "
            "leave subformat out, or use imgcore convert"
        )
    return VhdxRewriter(options)


class VhdxRewriter:
    """Writes the structures of a dynamic disk around blocks that stay."""

    format_name: ClassVar[str] = "vhdx"

    def __init__(self, options: WriteOptions) -> None:
        self._options = options
        self.logical_sector_nbytes: int = options.metadata.logical_sector_nbytes
        self.rule: BlockRule = BlockRule(
            block_nbytes=options.metadata.block_nbytes,
            alignment=layout.ALIGNMENT,
            first_offset=layout.HEADER_SECTION_NBYTES,
        )
        self.overwrites: tuple[tuple[int, int], ...] = ((0, layout.HEADER_SECTION_NBYTES),)

    def begin(self, file: TargetFile, append_offset: int) -> int:
        """Reserve the log, the metadata and the BAT."""
        start = align_up(append_offset, layout.ALIGNMENT)
        options = self._options._replace(log_offset=start)
        self._file = file
        self._structures = Structures(options)
        return options.data_offset

    def place(self, first_block: int, placements: Placements, next_offset: int) -> int:
        """Write the entries of blocks; see `imgcore.formats.api.Rewriter`."""
        # The disk's last block must be whole in the file, even if the disk ends inside.
        end = self._structures.write_entries(self._file, first_block, placements)
        return max(next_offset, end)

    def finish(self, next_offset: int) -> None:
        """Write the metadata and the header section."""
        self._file.truncate(next_offset)
        # The disk has no parent, so no path goes into the metadata.
        self._structures.write_headers(self._file, "")
