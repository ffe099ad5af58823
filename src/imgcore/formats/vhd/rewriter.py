"""VHD: the rewriter of fixed disks, which puts the footer after the disk.

A dynamic disk cannot be made around blocks that stay: each of its blocks has a sector
bitmap in the 512 bytes before it, and there the block before ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from imgcore.errors import UnsupportedFeatureError
from imgcore.formats.shared.flat_rewriter import FlatRewriter
from imgcore.formats.vhd import layout
from imgcore.formats.vhd.layout import DiskType
from imgcore.formats.vhd.options import Options, WriteOptions
from imgcore.formats.vhd.writer import make_footer

if TYPE_CHECKING:
    from imgcore.formats.api import Survey, WriteRequest


def rewriter_for(request: WriteRequest[Options], survey: Survey) -> FixedRewriter:
    """Return the rewriter for a request; see `imgcore.formats.api.Driver.rewriter`."""
    options = WriteOptions.of(request)
    if options.disk_type is not DiskType.FIXED:
        raise UnsupportedFeatureError(
            "a dynamic VHD needs 512 bytes before each block, where the block before ends: "
            + (
                "-o subformat=fixed makes a fixed one"
                if survey.is_flat
                else "imgcore convert writes one"
            )
        )
    return FixedRewriter(options, survey)


class FixedRewriter(FlatRewriter):
    """Makes a file that holds the disk a fixed VHD."""

    format_name: ClassVar[str] = "vhd"

    def __init__(self, options: WriteOptions, survey: Survey) -> None:
        super().__init__(
            survey,
            "a fixed VHD",
            guest_nbytes=options.guest_nbytes,
            file_nbytes=options.virtual_size + layout.FOOTER_NBYTES,
            preallocation=options.preallocation,
        )
        self._options = options

    def finish(self, next_offset: int) -> None:
        """Write the footer."""
        file = self._finished_file()
        file.pwrite(self._options.virtual_size, make_footer(self._options))
