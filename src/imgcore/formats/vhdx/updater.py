"""VHDX: writing in place.

The size and the parent are changed in steps.  What the new state needs is written
first, where nothing refers to it; then one log entry changes the metadata.

Source: [MS-VHDX] 2.2.3, 2.3.3, 2.5 and 2.6.
"""

from __future__ import annotations

import os
import uuid
from contextlib import closing
from typing import TYPE_CHECKING

import numpy as np

from imgcore.errors import CorruptImageError, OptionError
from imgcore.files.unnamed_file import UnnamedFile
from imgcore.files.update_file import Step
from imgcore.formats.shared.alignment import align_up
from imgcore.formats.vhdx import layout
from imgcore.formats.vhdx.block_updater import PLACED, BlockUpdater, runs
from imgcore.formats.vhdx.header import read_image, with_checksum
from imgcore.formats.vhdx.log import ZEROS, ReplayedFile
from imgcore.formats.vhdx.log_writer import LogWriter
from imgcore.formats.vhdx.metadata_changes import MetadataChanges
from imgcore.formats.vhdx.options import check_backing, check_size
from imgcore.formats.vhdx.parent import LOGICAL_SECTOR_SIZE, parent_locator
from imgcore.formats.vhdx.tables import (
    bitmap_index,
    payload_indices,
    read_payload,
    read_raw,
)
from imgcore.limits import MAX_BATCH_ROWS, MIB
from imgcore.log import log

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imgcore.files.update_file import UpdateFile
    from imgcore.formats.api import BackingReference
    from imgcore.formats.vhdx.header import Metadata, Region, VhdxImage
    from imgcore.formats.vhdx.reader import VhdxReader


def prepare(file: UpdateFile) -> None:
    """Replay the log that an interrupted writer has left.

    Raises
    ------
    CorruptImageError, LimitExceededError, UnsupportedFeatureError
        The image is not sound, or its log would overwrite headers or the log.
    """
    image = read_image(file)
    if image.replayed is None:
        return
    with closing(image.replayed.store):
        log.warning("%s: the log that an interrupted writer has left is replayed", file.path)
        writer = LogWriter(file, image.header)
        _refuse_overwriting(image, image.replayed)
        writer.update_headers(file_write_guid=uuid.uuid4())
        end = file.nbytes
        file.grow(image.replayed.nbytes)
        for start, stop, place in image.replayed.patches:
            if place != ZEROS:
                file.pwrite(start, image.replayed.store.pread(place, stop - start))
            elif start < end:
                file.zero(start, min(stop, end) - start)
        writer.empty()


def _refuse_overwriting(image: VhdxImage, replayed: ReplayedFile) -> None:
    """Raise if a log would change the headers, or itself."""
    header = image.header
    kept = (
        (0, min(layout.REGION_TABLE_OFFSETS), "the headers"),
        (header.log_offset, header.log_offset + header.log_nbytes, "the log"),
    )
    for start, end, name in kept:
        if any(patch.start < end and start < patch.end for patch in replayed.patches):
            raise CorruptImageError(
                f"its log would overwrite {name}", path=image.file.path, offset=start
            )


def updater_for(reader: VhdxReader, _parent_nbytes: int | None) -> VhdxUpdater:
    """Return what changes an image; see `imgcore.formats.api.Driver`."""
    is_unnamed = isinstance(reader.image.file, UnnamedFile)
    return UnnamedUpdater(reader) if is_unnamed else VhdxUpdater(reader)


class VhdxUpdater(BlockUpdater):
    """Changes a VHDX, its size and its parent; see `imgcore.formats.api.Updater`."""

    def drop(self, start: int, length: int) -> None:
        """Free whole blocks, which read as the parent has them again."""
        self._change_whole(
            start,
            length,
            lambda states: states != layout.BLOCK_NOT_PRESENT,
            layout.BLOCK_NOT_PRESENT,
        )
        # The sector bitmaps of blocks that are written again count for new places only.
        self.flush(is_unread=False)

    # -- the size ----------------------------------------------------------------------

    def resize(self, virtual_size: int) -> None:
        """Change the size of the disk; see `imgcore.formats.api.Updater`."""
        old, new = self._metadata, self._metadata._replace(virtual_size=virtual_size)
        check_size(new)
        self._settle()
        bat = self._image.bat
        if virtual_size > old.virtual_size:
            self._make_room(new)
            self._metadata = new
            self._write_new_entries(old.n_blocks)
            self._zero_rest(old.virtual_size)
            self.flush(is_unread=False)
        self._put_regions(bat)
        items = self._metadata_changes()
        items.change(layout.VIRTUAL_DISK_SIZE_ITEM, layout.VIRTUAL_DISK_SIZE.pack(virtual_size))
        self.flush(is_unread=False)
        if virtual_size < old.virtual_size:
            self._metadata = new
            self._free_behind(old)

    def _metadata_changes(self) -> MetadataChanges:
        region = next(r for r in self._image.regions if r.guid == layout.METADATA_REGION)
        return MetadataChanges(self._file, region)

    def _make_room(self, metadata: Metadata) -> None:
        """Use a BAT that has room for all entries: a copy in a new place if needed."""
        bat = self._image.bat
        needed = metadata.n_bat_entries * layout.BAT_ENTRY_NBYTES
        if needed <= bat.nbytes:
            return
        nbytes = align_up(needed, layout.ALIGNMENT)
        moved = bat._replace(offset=self._take(nbytes), nbytes=nbytes)
        for at in range(0, self._metadata.n_bat_entries * layout.BAT_ENTRY_NBYTES, MIB):
            piece = self._file.pread(bat.offset + at, MIB)
            if any(piece):
                self._file.pwrite(moved.offset + at, piece)
        regions = [moved if region is bat else region for region in self._image.regions]
        self._image = self._image._replace(regions=regions)

    def _put_regions(self, old: Region) -> None:
        """Change both region tables (2.2.3) if the BAT has been moved."""
        bat = self._image.bat
        if bat == old:
            return
        table = self._file.pread(layout.REGION_TABLE_OFFSETS[0], layout.REGION_TABLE_NBYTES)
        at = layout.REGION_TABLE_HEADER.size
        at += self._image.regions.index(bat) * layout.REGION_ENTRY.size
        end = at + layout.REGION_ENTRY.size
        flags = layout.REGION_ENTRY.unpack(table[at:end])[3]
        entry = layout.REGION_ENTRY.pack(bat.guid.bytes_le, bat.offset, bat.nbytes, flags)
        table = with_checksum(table[:at] + entry + table[end:])
        for place in layout.REGION_TABLE_OFFSETS:
            self._file.put(place, table[: layout.REGION_TABLE_HEADER.size], Step.REFERENCE)
            self._file.put(place + at, entry, Step.REFERENCE)

    def _write_new_entries(self, n_old: int) -> None:
        """Write the entries of blocks that the disk does not have yet.

        A child hides what the parent has there.  A fixed disk gets its blocks.
        """
        metadata, ratio = self._metadata, self._metadata.chunk_ratio
        n_new = metadata.n_blocks - n_old
        value, step = layout.BLOCK_NOT_PRESENT, 0
        if self._has_parent:
            value = layout.BLOCK_ZERO
        elif self._is_fixed and n_new:
            value = self._take(n_new * self._block_nbytes) | layout.BLOCK_FULLY_PRESENT
            step = self._block_nbytes
        for low in range(n_old, metadata.n_blocks, MAX_BATCH_ROWS):
            high = min(low + MAX_BATCH_ROWS, metadata.n_blocks)
            indices = payload_indices(low, high, ratio)
            base = int(indices[0])
            table = read_raw(self._image, base, int(indices[-1]) + 1).copy()
            numbers = np.arange(low - n_old, high - n_old, dtype=np.uint64)
            table[indices - base] = numbers * np.uint64(step) + np.uint64(value)
            offset = self._image.bat.offset + base * layout.BAT_ENTRY_NBYTES
            self._file.pwrite(offset, table.astype("<u8", copy=False))
        for index in self._bitmap_indices(n_old, metadata.n_blocks):
            self._write_entry(index, layout.BITMAP_NOT_PRESENT)

    def _bitmap_indices(self, first: int, last: int) -> Iterator[int]:
        """Yield the entries of sector bitmap blocks of chunks that begin in a range."""
        ratio = self._metadata.chunk_ratio
        for block in range(align_up(first, ratio), last, ratio):
            index = bitmap_index(block, ratio)
            if index * layout.BAT_ENTRY_NBYTES < self._image.bat.nbytes:
                yield index

    def _zero_rest(self, start: int) -> None:
        """Write zeros to the part of a block that the disk does not have yet."""
        block = start // self._block_nbytes
        end = min(align_up(start, self._block_nbytes), self._metadata.virtual_size)
        if start == end:
            return
        state = self._entry(self._index(block)) & layout.BAT_STATE_MASK
        if state in PLACED or self._is_inherited(state):
            for place in self.place(start, end - start):
                self._file.zero(place.host_offset, place.length)
                if place.is_new:
                    self.refer([place])

    def _free_behind(self, old: Metadata) -> None:
        """Free the blocks that the disk does not have any more."""
        n_blocks = self._metadata.n_blocks
        for low in range(n_blocks, old.n_blocks, MAX_BATCH_ROWS):
            high = min(low + MAX_BATCH_ROWS, old.n_blocks)
            self._change_states(
                low,
                high,
                lambda states: states != layout.BLOCK_NOT_PRESENT,
                layout.BLOCK_NOT_PRESENT,
            )
        self._free_bitmaps(n_blocks, old.n_blocks)

    def _free_bitmaps(self, first: int, last: int) -> None:
        for index in self._bitmap_indices(first, last):
            entry = self._entry(index)
            if entry & layout.BAT_STATE_MASK == layout.BITMAP_PRESENT:
                self._put_entries(index, layout.BITMAP_NOT_PRESENT)
                self._space.release(entry & layout.BAT_OFFSET_MASK, layout.BITMAP_BLOCK_NBYTES)

    # -- the parent --------------------------------------------------------------------

    def set_backing(self, reference: BackingReference | None) -> None:
        """Change the parent; see `imgcore.formats.api.Rebasable`."""
        locator = None if reference is None else self._locator(reference)
        self._settle()
        items = self._metadata_changes()
        if locator is not None:
            self._become_child()
            items.store(layout.PARENT_LOCATOR_ITEM, layout.ITEM_IS_REQUIRED, locator)
            self._put_flags(items, layout.HAS_PARENT)
        elif self._has_parent:
            self._complete_blocks()
            self._put_flags(items, 0)
            items.remove(layout.PARENT_LOCATOR_ITEM)

    def _put_flags(self, items: MetadataChanges, flags: int) -> None:
        parameters = layout.FILE_PARAMETERS.pack(self._block_nbytes, flags)
        items.change(layout.FILE_PARAMETERS_ITEM, parameters)

    def _become_child(self) -> None:
        """Let the BAT have the entries of all sector bitmap blocks."""
        if self._has_parent:
            return
        bat, n_entries = self._image.bat, self._metadata.n_bat_entries
        self._make_room(self._metadata._replace(has_parent=True))
        for index in self._bitmap_indices(0, self._metadata.n_blocks):
            if index >= n_entries:
                self._write_entry(index, layout.BITMAP_NOT_PRESENT)
        self._put_regions(bat)

    def _locator(self, reference: BackingReference) -> bytes:
        """Return the parent locator (2.6.2.6); OptionError if there can be none."""
        check_backing(reference, self._is_fixed)
        found = reference.identities.get(LOGICAL_SECTOR_SIZE)
        wanted = str(self._metadata.logical_sector_nbytes)
        if found != wanted:
            raise OptionError(
                f"the parent has the logical sector size {found}, the image {wanted}: they must "
                "be the same",
                path=self._file.path,
            )
        folder = self._file.folder
        if folder is None:
            raise OptionError(
                "has no folder, because it is given by its descriptor: the parent's path, which "
                "starts there, cannot be stored",
                path=self._file.path,
            )
        return parent_locator(reference, os.path.join(folder, os.path.basename(self._file.path)))

    def _complete_blocks(self) -> None:
        """Let each block have all its sectors: those that it lacks become zeros."""
        n_blocks = self._metadata.n_blocks
        for low in range(0, n_blocks, MAX_BATCH_ROWS):
            entries = read_payload(self._image, low, min(low + MAX_BATCH_ROWS, n_blocks))
            states = entries & np.uint64(layout.BAT_STATE_MASK)
            for index in np.flatnonzero(states == layout.BLOCK_PARTIALLY_PRESENT).tolist():
                offset = int(entries[index]) & layout.BAT_OFFSET_MASK
                self._zero_missing(low + index, offset)
                self._put_entries(self._index(low + index), offset | layout.BLOCK_FULLY_PRESENT)
        self.flush(is_unread=False)
        self._free_bitmaps(0, n_blocks)
        self.flush(is_unread=False)

    def _zero_missing(self, block: int, offset: int) -> None:
        missing = self._bitmap(block) ^ self._whole(block)
        octets = missing.to_bytes(self._block_nbytes // self.granule_nbytes // 8, "little")
        bits = np.unpackbits(np.frombuffer(octets, dtype=np.uint8), bitorder="little")
        for first, last in runs(np.flatnonzero(bits)):
            start = offset + first * self.granule_nbytes
            self._file.zero(start, (last - first) * self.granule_nbytes)


class UnnamedUpdater(VhdxUpdater):
    """Fills a new image.

    It needs no log, and nobody has seen it with other content, so that its GUIDs stay.
    """

    def begin(self, *, again: bool) -> None:
        """Change nothing: the GUIDs are new."""

    def flush(self, *, is_unread: bool) -> None:
        """Write what waits; see `imgcore.formats.api.Updater`."""
        self._file.write_steps()
        self._new_bitmaps.clear()
        self._space.settle(is_unread=is_unread)

    def finish(self) -> None:
        """End the file after its last block."""
        self._file.cut(self._space.end + self._kept_nbytes)
