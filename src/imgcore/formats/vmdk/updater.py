"""Write in place to VMDK disks of sparse and flat extents.

The content ID changes before anything else, so that no child takes the disk for the one
that it was created from.

Source: Virtual Disk Format 5.0, "The Descriptor File".
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, cast

from imgcore.errors import CorruptImageError, OptionError, UnsupportedFeatureError
from imgcore.files.update_file import Step
from imgcore.formats.shared.flat_updater import FlatUpdater
from imgcore.formats.vmdk import sparse_header
from imgcore.formats.vmdk.descriptor import parse_descriptor
from imgcore.formats.vmdk.descriptor_edits import (
    text_of,
    with_new_content_id,
    with_parent,
    with_size,
)
from imgcore.formats.vmdk.header import read_embedded_descriptor
from imgcore.formats.vmdk.sparse_header import change_header, is_descriptor_away
from imgcore.formats.vmdk.sparse_updater import SparseUpdater
from imgcore.limits import SECTOR_NBYTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from imgcore.files.update_file import UpdateFile
    from imgcore.formats.api import BackingReference, Place
    from imgcore.formats.vmdk.extent import DiskExtent
    from imgcore.formats.vmdk.reader import VmdkReader

_ExtentUpdater: TypeAlias = SparseUpdater | FlatUpdater


def prepare(_file: UpdateFile) -> None:
    """Do nothing: an image is sound at any time; see `imgcore.formats.api.Driver`."""


def updater_for(reader: VmdkReader, parent_nbytes: int | None) -> VmdkUpdater:
    """Return what changes an image; see `imgcore.formats.api.Driver`."""
    _refuse_kinds(reader)
    _refuse_shared(reader)
    return VmdkUpdater(reader, has_parent=parent_nbytes is not None)


def _refuse_kinds(reader: VmdkReader) -> None:
    """Raise UnsupportedFeatureError for extents that are not written to."""
    path = reader.file.path
    for item in reader.disk_extents:
        if item.sparse is not None and item.sparse.is_compressed:
            raise UnsupportedFeatureError(
                "streamOptimized has compressed grains, which are not written in place: "
                "imgcore convert writes monolithicSparse",
                path=path,
            )
        if item.file is None:
            raise UnsupportedFeatureError(
                f"is not written in place: it has an extent of {item.nbytes} bytes without a "
                "file (ZERO, or lost)",
                path=path,
            )
    for line in reader.descriptor.extents:
        if line.access != "RW":
            raise UnsupportedFeatureError(
                f"is not written in place: extent {line.name!r} may only be read ({line.access})",
                path=path,
            )


def _refuse_shared(reader: VmdkReader) -> None:
    """Raise CorruptImageError if two extents are at the same place of a file."""
    ranges = sorted(
        (item.file.identity, *_host_range(item), item.kind)
        for item in reader.disk_extents
        if item.file is not None
    )
    for (identity, _, end, _), (other, start, _, _) in pairwise(ranges):
        if identity == other and start < end:
            raise CorruptImageError(
                f"two of its extents are at {start:#x} of the same file", path=reader.file.path
            )


def _host_range(item: DiskExtent) -> tuple[int, int]:
    if item.sparse is not None:
        return 0, 1 << 63
    return item.file_offset, item.file_offset + item.nbytes


class _Part(NamedTuple):
    """One extent: its range of the disk, and what changes it."""

    start: int
    end: int
    file: int
    updater: _ExtentUpdater


class VmdkUpdater:
    """Changes a VMDK disk of one or several extents."""

    def __init__(self, reader: VmdkReader, *, has_parent: bool) -> None:
        self._reader = reader
        hides_parent = has_parent or reader.backing is not None
        self._parts = [_part(item, hides_parent) for item in reader.disk_extents]
        self.granule_nbytes: int = max(part.updater.granule_nbytes for part in self._parts)
        for part in self._parts:
            if part.start % self.granule_nbytes:
                raise UnsupportedFeatureError(
                    f"is not written in place: an extent starts at {part.start:#x} of the "
                    f"disk, which is not a multiple of {self.granule_nbytes}",
                    path=reader.file.path,
                )
        # An odd descriptor is refused now, not by the first write.
        self._with_new_content_id()

    def begin(self, *, again: bool) -> None:
        """Give the disk a new content ID, and mark its extents as being written."""
        if not again:
            self._put_new_content_id()
        for part in self._parts:
            part.updater.begin(again=again)
            if isinstance(part.updater, SparseUpdater) and is_descriptor_away(part.updater):
                change_header(part.updater, self._text())

    def _put_new_content_id(self) -> None:
        at, old, new = self._with_new_content_id()
        for start, end in _changed_runs(old, new):
            self._descriptor_file.put(at + start, new[start:end], Step.REFERENCE)
        if new:
            self._reader.descriptor = parse_descriptor(new, self._reader.file.path)

    def _with_new_content_id(self) -> tuple[int, bytes, bytes]:
        """Return where the descriptor is, and its old and new content."""
        old, at = self._reader.raw_descriptor()
        return at, old or b"", with_new_content_id(old or b"", self._reader.file.path)

    @property
    def _descriptor_file(self) -> UpdateFile:
        return cast("UpdateFile", self._reader.file)

    def place(self, start: int, length: int) -> list[Place]:
        """Return where a range goes; see `imgcore.formats.api.Updater`."""
        found: list[Place] = []
        try:
            for part, low, nbytes in self._parts_of(start, length):
                for place in part.updater.place(low - part.start, nbytes):
                    guest_offset = place.guest_offset + part.start
                    found.append(place._replace(guest_offset=guest_offset, file=part.file))
        except BaseException:
            self.give_up([place for place in found if place.is_new])
            raise
        return found

    def overwritable(self, start: int, length: int) -> list[Place]:
        """Return the places that exist; see `imgcore.formats.api.Overwritable`."""
        return [
            place._replace(guest_offset=place.guest_offset + part.start, file=part.file)
            for part, low, nbytes in self._parts_of(start, length)
            for place in part.updater.overwritable(low - part.start, nbytes)
        ]

    def refer(self, places: Sequence[Place]) -> None:
        """Make the tables refer to new places."""
        for part, own in self._divided(places):
            part.updater.refer(own)

    def give_up(self, places: Sequence[Place]) -> None:
        """Take back the space of new places."""
        for part, own in self._divided(places):
            part.updater.give_up(own)

    def zero(self, start: int, length: int, *, unmap: bool) -> list[tuple[int, int]]:
        """Make a range read as zeros; see `imgcore.formats.api.Updater`."""
        return [
            (first + part.start, rest)
            for part, low, nbytes in self._parts_of(start, length)
            for first, rest in part.updater.zero(low - part.start, nbytes, unmap=unmap)
        ]

    def discard(self, start: int, length: int) -> None:
        """Free what is not needed of a range."""
        for part, low, nbytes in self._parts_of(start, length):
            part.updater.discard(low - part.start, nbytes)

    def flush(self, *, is_unread: bool) -> None:
        """Make all changes durable; see `imgcore.formats.api.Updater`."""
        self._descriptor_file.write_steps()
        for part in self._parts:
            part.updater.flush(is_unread=is_unread)

    def resize(self, virtual_size: int) -> None:
        """Change the size of a disk of one extent; see `Updater.resize`."""
        reader, path = self._reader, self._reader.file.path
        updater = self._parts[0].updater
        if len(self._parts) > 1:
            raise OptionError(
                f"has {len(self._parts)} extents: only a disk of one changes its size", path=path
            )
        if reader.backing is not None:
            raise OptionError("has a parent, whose size it keeps", path=path)
        if virtual_size % reader.logical_sector_nbytes:
            raise OptionError(
                f"the size is {virtual_size} bytes, which is not a multiple of the logical sector "
                f"size {reader.logical_sector_nbytes}",
                path=path,
            )
        adapter_type = reader.descriptor.values.get("ddb.adaptertype", "")
        text = with_size(self._text(), virtual_size // SECTOR_NBYTES, adapter_type, path)
        if isinstance(updater, SparseUpdater):
            self._require_embedded()
            sparse_header.resize(updater, virtual_size, text)
        else:
            self._resize_flat(virtual_size, text)

    def _resize_flat(self, virtual_size: int, text: bytes) -> None:
        (item,) = self._reader.disk_extents
        file = cast("UpdateFile", item.file)
        old_end, end = item.file_offset + item.nbytes, item.file_offset + virtual_size
        if old_end < end and old_end < file.nbytes:
            file.zero(old_end, min(end, file.nbytes) - old_end)
        file.grow(end)
        file.sync()
        self._descriptor_file.replace(text)
        if end < old_end:
            file.cut(end)

    def _require_embedded(self) -> None:
        """Refuse to resize an extent whose header cannot change with the descriptor."""
        if self._reader.disk_extents[0].file is not self._reader.file:
            raise OptionError(
                "its sparse extent is in another file than its descriptor: such disks do not "
                "change their size",
                path=self._reader.file.path,
            )

    def _text(self) -> bytes:
        """Return the descriptor; OptionError if there is none."""
        raw, _ = self._reader.raw_descriptor()
        first = self._parts[0].updater
        if isinstance(first, SparseUpdater) and first.file is self._reader.file:
            # It may have been put in its usual place since the image was opened.
            raw = read_embedded_descriptor(first.extent)
        if not raw:
            raise OptionError("it has no descriptor", path=self._reader.file.path)
        return text_of(raw)

    # -- the parent --------------------------------------------------------------------

    def set_backing(self, reference: BackingReference | None) -> None:
        """Change the parent; see `imgcore.formats.api.Rebasable`."""
        path = self._reader.file.path
        cid, name = None, ""
        if reference is not None:
            name = reference.name
            stated = reference.identities.get("content ID")
            if stated is None or any(item.sparse is None for item in self._reader.disk_extents):
                raise OptionError(
                    "only VMDK disks of sparse extents have a parent, which is a VMDK", path=path
                )
            cid = int(stated, 16)
        text = with_parent(self._text(), cid, name, path)
        updater = self._parts[0].updater
        if isinstance(updater, SparseUpdater) and updater.file is self._reader.file:
            change_header(updater, text)
        else:
            self._descriptor_file.replace(text)

    def drop(self, start: int, length: int) -> None:
        """Free whole grains; see `imgcore.formats.api.Rebasable`."""
        for part, low, nbytes in self._parts_of(start, length):
            if not isinstance(part.updater, SparseUpdater):
                raise OptionError(
                    "has a flat extent, through which no parent is seen",
                    path=self._reader.file.path,
                )
            part.updater.drop(low - part.start, nbytes)

    def withhold(self) -> None:
        """Append what is new while somebody reads; see `Updater`."""
        for part in self._parts:
            part.updater.withhold()

    def finish(self) -> None:
        """Mark the extents as closed cleanly."""
        for part in self._parts:
            part.updater.finish()

    def _parts_of(self, start: int, length: int) -> Iterator[tuple[_Part, int, int]]:
        """Yield each extent in a range of the disk, and its part of that range."""
        for part in self._parts:
            low, high = max(start, part.start), min(start + length, part.end)
            if low < high:
                yield part, low, high - low

    def _divided(self, places: Sequence[Place]) -> Iterator[tuple[_Part, list[Place]]]:
        """Yield each extent and its places, with guest offsets from its start."""
        for part in self._parts:
            own = [
                place._replace(guest_offset=place.guest_offset - part.start)
                for place in places
                if part.start <= place.guest_offset < part.end
            ]
            if own:
                yield part, own


def _part(item: DiskExtent, hides_parent: bool) -> _Part:
    updater: _ExtentUpdater
    if item.sparse is not None:
        updater = SparseUpdater(item.sparse, item.nbytes, has_parent=hides_parent)
    else:
        updater = FlatUpdater(cast("UpdateFile", item.file), item.file_offset)
    return _Part(item.guest_base, item.guest_base + item.nbytes, item.file_index, updater)


def _changed_runs(old: bytes, new: bytes) -> Iterator[tuple[int, int]]:
    """Yield the ranges of sectors in which two texts of one length differ."""
    for start in range(0, len(old), SECTOR_NBYTES):
        end = min(start + SECTOR_NBYTES, len(old))
        if old[start:end] != new[start:end]:
            yield start, end
