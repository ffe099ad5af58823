"""Directs a conversion without copying: from a survey to the new image's last byte.

It works on any file that keeps back what changes the old image: the image's own, or a
clone of it.
"""

from __future__ import annotations

from contextlib import closing
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from imgcore.engine.extents import Kind
from imgcore.errors import UnsupportedFeatureError
from imgcore.files.rehearsal import CountingStagedFile
from imgcore.formats.api import NeedsPlaces
from imgcore.limits import MIB
from imgcore.rewriting.layout import PROBED_NBYTES, Layout, Runs, lay_out, placements, with_wrappers
from imgcore.rewriting.survey import survey_image
from imgcore.sizes import format_size

if TYPE_CHECKING:
    from imgcore.disk.image import Image
    from imgcore.engine.progress import Tally
    from imgcore.files.staged_file import StagedFile
    from imgcore.formats.api import BlockRule, Driver, Rewriter, Survey, WriteRequest
    from imgcore.rewriting.layout import Offsets
    from imgcore.rewriting.moving import Workers

# So much may move, even if it is most of the data.
_MAX_SMALL_MOVE_NBYTES: Final = 64 * MIB


class RewriteCost(NamedTuple):
    """How much of a rewritten image stays, and what is written; in bytes.

    Attributes
    ----------
    block_size : int or None
        Size of the new image's blocks; None if it has none.
    bytes_stayed, bytes_moved : int
        Bytes of the disk in blocks that stay in their place, and that are copied.
    bytes_tables : int
        Bytes of tables and headers that are appended to the file.
    bytes_overwritten : int
        Bytes of the old file that are overwritten.
    bytes_written : int
        Bytes that are written to the file: moved, tables and overwritten.
    file_size : int
        Size of the new image's file.
    """

    block_size: int | None
    bytes_stayed: int
    bytes_moved: int
    bytes_tables: int
    bytes_overwritten: int
    bytes_written: int
    file_size: int


class Director:
    """Turns an image's file, or a clone of it, into an image of another format.

    Parameters
    ----------
    image : Image
        The source, without a parent, all data in one file.
    driver : Driver
        That of the new format.
    request : WriteRequest
    inflate : bool
        Decompress blocks that the new format cannot refer to.
    trust_blocks : bool
        Do not decompress blocks that stay compressed, to verify them.
    survey : Survey, optional
        That of the image, if it is known.

    Attributes
    ----------
    request : WriteRequest
        As given.
    survey : Survey
    rewriter : Rewriter

    Raises
    ------
    UnsupportedFeatureError
        The formats do not go together, or blocks are compressed.
    CorruptImageError
        A block that would stay compressed is damaged.
    OptionError, LimitExceededError
        The target's format cannot represent the disk, or the survey is too large.
    """

    def __init__(
        self,
        image: Image,
        driver: Driver,
        request: WriteRequest[Any],
        *,
        inflate: bool = False,
        trust_blocks: bool = False,
        survey: Survey | None = None,
    ) -> None:
        self._image, self._driver = image, driver
        self.request: WriteRequest[Any] = request
        self.survey: Survey = survey_image(image) if survey is None else survey
        self.rewriter: Rewriter = driver.rewriter(request, self.survey)
        if not inflate:
            self._refuse_compressed()
        if self._rule is not None and self._rule.takes_compressed:
            self.survey = self._verified(self._rule.takes_compressed, trust_blocks=trust_blocks)
        self._tell_places(self.rewriter)

    @property
    def _rule(self) -> BlockRule | None:
        return self.rewriter.rule

    @cached_property
    def _layout(self) -> Layout:
        """Which blocks stay; of a flat target, whole runs of bytes."""
        disk_nbytes = self._image.virtual_size
        if self._rule is None:
            rows = self.survey.rows
            first, count = (rows[name].astype(np.int64) for name in ("guest_offset", "length"))
            none = np.zeros(0, dtype=np.int64)
            return Layout(1, Runs.stored(first, count, first), none, none)
        rule = self._rule._replace(first_offset=self.front_nbytes)
        return lay_out(self.survey, rule, disk_nbytes, self.rewriter.overwrites)

    @cached_property
    def front_nbytes(self) -> int:
        """Size of the file's front, in which nothing of the disk stays."""
        if self._rule is None:
            return 0
        return max(self._rule.first_offset, PROBED_NBYTES if self.survey.is_flat else 0)

    @property
    def overwrites(self) -> list[tuple[int, int]]:
        """The ranges (host offset, length) of the old file that may be overwritten."""
        own = list(self.rewriter.overwrites)
        return [(0, self.front_nbytes), *own] if self.front_nbytes else own

    @property
    def append_offset(self) -> int:
        """The host offset from which on the file is free."""
        ends = self._layout.stay.host_end(self._layout.block_nbytes)
        return max(self.survey.file_nbytes, self.front_nbytes, int(ends.max(initial=0)))

    @cached_property
    def stayed_nbytes(self) -> int:
        """Bytes of the disk in blocks that stay."""
        stay = self._layout.stay
        return self._layout.nbytes_of(stay.first, stay.n_blocks, self._image.virtual_size)

    @property
    def stayed_ranges(self) -> tuple[Offsets, Offsets]:
        """Start and end in the file of each run of blocks that stay, in guest order."""
        stay = self._layout.stay
        return stay.host, stay.host_end(self._layout.block_nbytes)

    @property
    def reused(self) -> tuple[int, int]:
        """Bytes of the disk in compressed blocks that stay, and bytes of the file."""
        packed = self._layout.stay.packed
        return int((packed > 0).sum()) * self._layout.block_nbytes, int(packed.sum())

    @cached_property
    def moved_nbytes(self) -> int:
        """Bytes of the disk in blocks that move."""
        layout = self._layout
        first, count = layout.moved_first, layout.moved_count
        return layout.nbytes_of(first, count, self._image.virtual_size)

    @property
    def tables_bound(self) -> int:
        """The most bytes of tables that can be appended: those of a full disk."""
        if self._rule is None:
            return self.rehearse().bytes_tables
        return self._driver.measure(self.request, 0).required

    def _tell_places(self, rewriter: Rewriter) -> None:
        """Tell a rewriter that must know it where blocks stay."""
        if isinstance(rewriter, NeedsPlaces):
            layout = self._layout
            starts, ends = layout.stay.host, layout.stay.host_end(layout.block_nbytes)
            rewriter.know_places(starts, ends, is_moving=bool(len(layout.moved_first)))

    def refuse_large_move(self) -> None:
        """Raise UnsupportedFeatureError if most of the data would be copied."""
        moved, stayed = self.moved_nbytes, self.stayed_nbytes
        if moved > max(stayed, _MAX_SMALL_MOVE_NBYTES):
            raise UnsupportedFeatureError(
                f"only {format_size(stayed)} of {format_size(stayed + moved)} could stay in "
                "place: another block size may fit better (imgcore measure --rewrite), or "
                "imgcore convert writes a new image",
                path=self._image.path,
            )

    def _verified(self, taken: frozenset[Kind], *, trust_blocks: bool) -> Survey:
        """Return the survey after its compressed blocks were verified."""
        if not (self.survey.rows["kind"] > Kind.DATA).any():
            return self.survey
        from imgcore.rewriting.reusing import verify_blocks

        return verify_blocks(self._image, self.survey, taken, trust_blocks=trust_blocks)

    def _refuse_compressed(self) -> None:
        rows = self.survey.rows
        taken = frozenset() if self._rule is None else self._rule.takes_compressed
        refused = (rows["kind"] > Kind.DATA) & ~np.isin(rows["kind"], list(with_wrappers(taken)))
        if refused.any():
            nbytes = int(rows["length"][refused].sum())
            raise UnsupportedFeatureError(
                f"{format_size(nbytes)} of its disk are compressed, and {self._driver.name} cannot "
                "refer to these blocks: --inflate stores them decompressed, or imgcore convert "
                "writes a new image",
                path=self._image.path,
            )

    def write(self, file: StagedFile, tally: Tally, workers: Workers | None = None) -> RewriteCost:
        """Write the new image around the blocks that stay; the rewriter is used up.

        What changes the old image is kept back by ``file``, whose old content is that
        of the image's file.  ``workers`` copy the blocks that move.
        """
        from imgcore.rewriting.moving import Workers, move_blocks

        workers = workers or Workers.default()
        layout, offset = self._layout, self.rewriter.begin(file, self.append_offset)
        moved = Runs.none()
        if len(layout.moved_first):
            image, rows = self._image, self.survey.rows
            moved, offset = move_blocks(image, rows, layout, file, offset, tally, workers)
        self._place(self.rewriter, moved, offset, tally)
        file.clear_rest(self.front_nbytes)
        return self._cost(file, tally.written_nbytes)

    def rehearse(self) -> RewriteCost:
        """Return the cost; nothing is written, and no data is read any more.

        Blocks that move are counted as data, even if they turn out to be zeros.
        """
        from imgcore.engine.progress import Tally

        rewriter, layout = self._driver.rewriter(self.request, self.survey), self._layout
        self._tell_places(rewriter)
        tally = Tally(self._image.virtual_size, None)
        with closing(CountingStagedFile(self._image.path, self.survey.file_nbytes)) as file:
            offset = rewriter.begin(file, self.append_offset)
            before = np.cumsum(layout.moved_count) - layout.moved_count
            host = offset + before * layout.block_nbytes
            moved = Runs.stored(layout.moved_first, layout.moved_count, host)
            offset += int(layout.moved_count.sum()) * layout.block_nbytes
            self._place(rewriter, moved, offset, tally)
            file.clear_rest(self.front_nbytes)
            return self._cost(file, self.moved_nbytes)

    def _place(self, rewriter: Rewriter, moved: Runs, offset: int, tally: Tally) -> None:
        """Tell the rewriter where all blocks are, and let it finish."""
        size = self._layout.block_nbytes
        if rewriter.rule is not None:
            runs = Runs.joined((self._layout.stay, moved))
            for first_block, batch in placements(runs, size):
                offset = rewriter.place(first_block, batch, offset)
                # Blocks that moved, which take longer, were counted before.
                end = min((first_block + len(batch)) * size, tally.total_nbytes)
                done = max(end, tally.done_nbytes)
                tally.count(
                    done,
                    data=min(done, self._layout.data_nbytes(self._image.virtual_size)),
                    read=tally.read_nbytes,
                    written=tally.written_nbytes,
                )
        rewriter.finish(offset)

    def _cost(self, file: StagedFile | CountingStagedFile, moved_nbytes: int) -> RewriteCost:
        tables, overwritten = file.appended_nbytes, file.staged_nbytes
        return RewriteCost(
            block_size=None if self._rule is None else self._rule.block_nbytes,
            bytes_stayed=self.stayed_nbytes,
            bytes_moved=self.moved_nbytes,
            bytes_tables=tables,
            bytes_overwritten=overwritten,
            bytes_written=moved_nbytes + tables + overwritten,
            file_size=file.nbytes,
        )
