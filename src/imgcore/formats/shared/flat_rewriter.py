"""Rewrites images whose file holds the disk unchanged from its first byte on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from imgcore.errors import OptionError, UnsupportedFeatureError
from imgcore.limits import MAX_DROPPED_NBYTES

if TYPE_CHECKING:
    from imgcore.engine.extents import Placements
    from imgcore.files.target_file import TargetFile
    from imgcore.formats.api import Survey


class FlatRewriter:
    """Base of rewriters that leave the disk where it is, and change what follows it.

    Parameters
    ----------
    survey : Survey
    name : str
        Name of the new kind of image, for messages.
    guest_nbytes : int
        Size of the source's disk in bytes.
    file_nbytes : int
        Final size of the file in bytes, not less.
    preallocation : str
        The option; the file's space stays as it is.

    Raises
    ------
    UnsupportedFeatureError
        The source's file does not hold the disk from its first byte on, or too much
        follows the disk.
    OptionError
        Preallocation is asked for.
    """

    rule: None = None

    def __init__(
        self, survey: Survey, name: str, *, guest_nbytes: int, file_nbytes: int, preallocation: str
    ) -> None:
        if preallocation != "off":
            raise OptionError(
                f"preallocation={preallocation} does not go with rewriting: the file keeps its "
                "space and its holes"
            )
        if not survey.is_flat:
            raise UnsupportedFeatureError(
                f"{name} has the disk's bytes in order, and this image has blocks: imgcore convert "
                "writes them in order"
            )
        n_behind = max(survey.file_nbytes - guest_nbytes, 0)
        if n_behind > MAX_DROPPED_NBYTES:
            raise UnsupportedFeatureError(
                f"{n_behind} bytes follow the disk in its file, at most {MAX_DROPPED_NBYTES} can "
                "be cut off: imgcore convert writes a file without them"
            )
        self.overwrites: tuple[tuple[int, int], ...] = (
            ((guest_nbytes, n_behind),) if n_behind else ()
        )
        self._guest_nbytes = guest_nbytes
        self._file_nbytes = file_nbytes
        # What follows the old disk, but is part of the new one, becomes zeros.
        self._n_stale = min(n_behind, file_nbytes - guest_nbytes)

    def begin(self, file: TargetFile, append_offset: int) -> int:
        """Take the file; see `imgcore.formats.api.Rewriter`."""
        self._file = file
        return append_offset

    def place(self, first_block: int, placements: Placements, next_offset: int) -> int:
        """Do nothing: no block is placed."""
        return next_offset

    def _finished_file(self) -> TargetFile:
        """Return the file at its final size; it has zeros after the old disk."""
        if self._n_stale:
            self._file.pwrite(self._guest_nbytes, bytes(self._n_stale))
        self._file.truncate(self._file_nbytes)
        return self._file
