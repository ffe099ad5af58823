"""Raw: the rewriter, which cuts off what follows the disk in its file."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from imgcore.formats.raw.options import Options, WriteOptions
from imgcore.formats.shared.flat_rewriter import FlatRewriter

if TYPE_CHECKING:
    from imgcore.formats.api import Survey, WriteRequest


def rewriter_for(request: WriteRequest[Options], survey: Survey) -> RawRewriter:
    """Return the rewriter for a request; see `imgcore.formats.api.Driver.rewriter`."""
    return RawRewriter(WriteOptions.of(request), survey)


class RawRewriter(FlatRewriter):
    """Makes a file that holds the disk and more hold the disk only."""

    format_name: ClassVar[str] = "raw"

    def __init__(self, options: WriteOptions, survey: Survey) -> None:
        super().__init__(
            survey,
            "raw",
            guest_nbytes=options.exact_nbytes,
            file_nbytes=options.exact_nbytes,
            preallocation=options.preallocation,
        )

    def finish(self, next_offset: int) -> None:
        """Set the file's final size."""
        self._finished_file()
