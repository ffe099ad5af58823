"""Reads and verifies VHDX headers, region tables and metadata.

Nothing here imports NumPy, so that ``info`` starts fast.

Source: [MS-VHDX], by section.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from imgcore import limits
from imgcore._core import crc32c
from imgcore.errors import (
    CorruptImageError,
    ImgcoreError,
    LimitExceededError,
    UnsupportedFeatureError,
)
from imgcore.formats.api import BackingReference
from imgcore.formats.shared.damage import STRICT, Damage
from imgcore.formats.vhdx import layout
from imgcore.formats.vhdx.log import ReplayedFile, replay
from imgcore.formats.vhdx.parent import NIL, backing_reference, read_locator

if TYPE_CHECKING:
    from imgcore.files.byte_source import ByteSource

    # The file itself, or the file with its log replayed.
    ImageFile = ByteSource | ReplayedFile


class FileHeader(NamedTuple):
    """The current one of the two headers (2.2.2); offsets and sizes in bytes."""

    sequence: int
    file_write_guid: uuid.UUID
    data_write_guid: uuid.UUID
    log_guid: uuid.UUID
    log_version: int
    version: int
    log_nbytes: int
    log_offset: int


class Region(NamedTuple):
    """One entry of the region table (2.2.3.2)."""

    guid: uuid.UUID
    offset: int
    nbytes: int
    is_required: bool

    @property
    def end(self) -> int:
        """Host offset where it ends."""
        return self.offset + self.nbytes


class MetadataItem(NamedTuple):
    """A metadata item (2.6.1.2) and its bytes."""

    guid: uuid.UUID
    flags: int
    data: bytes


class StoredItem(NamedTuple):
    """The place of a metadata item in the file (2.6.1.2); no bytes have no place."""

    guid: uuid.UUID
    flags: int
    offset: int
    nbytes: int


class Metadata(NamedTuple):
    """The known metadata items (2.6.2), verified; sizes in bytes.

    ``inherited`` are the other items that belong to the disk, not to the file: a new
    child has them, too.
    """

    block_nbytes: int
    leave_block_allocated: bool
    has_parent: bool
    virtual_size: int
    virtual_disk_id: uuid.UUID
    logical_sector_nbytes: int
    physical_sector_nbytes: int
    locator: dict[str, str] | None
    inherited: tuple[StoredItem, ...] = ()

    @property
    def chunk_ratio(self) -> int:
        """Payload blocks for each sector bitmap block (2.4)."""
        return layout.SECTORS_PER_CHUNK * self.logical_sector_nbytes // self.block_nbytes

    @property
    def n_blocks(self) -> int:
        """Payload blocks of the disk, which may end inside the last one."""
        return -(-self.virtual_size // self.block_nbytes)

    @property
    def n_bat_entries(self) -> int:
        """Entries of the BAT, payload and sector bitmap blocks together (2.5)."""
        if self.has_parent:
            return -(-self.n_blocks // self.chunk_ratio) * (self.chunk_ratio + 1)
        return self.n_blocks + max(self.n_blocks - 1, 0) // self.chunk_ratio


class Problem(NamedTuple):
    """A problem with one copy of a structure; the other copy is used.

    ``sound`` holds the right bytes for ``offset``, or None if they are not known.
    """

    line: str
    offset: int
    sound: bytes | None


class VhdxImage(NamedTuple):
    """An image whose structures are verified.

    ``replayed`` is the file with its log replayed, or None if the log is empty.
    """

    file: ByteSource
    creator: str
    header: FileHeader
    replayed: ReplayedFile | None
    regions: Sequence[Region]
    metadata: Metadata
    backing: BackingReference | None
    problems: Sequence[Problem]

    @property
    def view(self) -> ImageFile:
        """The file to read tables from: replayed, if there is a log."""
        return self.file if self.replayed is None else self.replayed

    @property
    def bat(self) -> Region:
        """The region of the BAT."""
        return next(region for region in self.regions if region.guid == layout.BAT_REGION)


def read_image(file: ByteSource, damage: Damage = STRICT) -> VhdxImage:
    """Read and verify everything except the BAT.

    When salvaging, headers and checksums may be wrong, the log need not be valid, and
    the file may be too short, as long as there are a region table and the metadata.

    Raises
    ------
    CorruptImageError, LimitExceededError, UnsupportedFeatureError
        The image contradicts itself, is unsupported, or is over a limit.
    """
    head = file.pread(0, min(file.nbytes, layout.CREATOR_OFFSET + layout.CREATOR_NBYTES))
    problems: list[Problem] = []
    header = _current_header(file, problems, damage)
    _check_header(header, file, damage)
    replayed = _replayed(file, header, damage)
    try:
        view: ImageFile = file if replayed is None else replayed
        regions = _read_regions(view, header, problems, damage)
        _check_ends(view, regions, damage)
        metadata = _read_metadata(view, _region(view, regions, layout.METADATA_REGION, "metadata"))
        _check_bat(view, _region(view, regions, layout.BAT_REGION, "BAT"), metadata, damage)
        backing = None
        if metadata.locator is not None:
            backing = backing_reference(metadata.locator, metadata.logical_sector_nbytes, file.path)
    except BaseException:
        if replayed is not None:
            replayed.store.close()
        raise
    creator = head[layout.CREATOR_OFFSET :].decode("utf-16-le", "replace").partition("\0")[0]
    return VhdxImage(file, creator, header, replayed, regions, metadata, backing, problems)


def _replayed(file: ByteSource, header: FileHeader, damage: Damage) -> ReplayedFile | None:
    """Return the file with its log replayed, None without a log."""
    if header.log_guid == NIL:
        return None
    place = header.log_guid, header.log_offset, header.log_nbytes
    if not damage.salvages:
        return replay(file, *place)
    try:
        return replay(file, *place, damage)
    except (ImgcoreError, OSError) as error:
        reason = error.reason if isinstance(error, ImgcoreError) else error.strerror
        damage.report(
            CorruptImageError(
                f"its log is not replayed ({reason}): blocks written last may be old or missing",
                path=file.path,
            )
        )
        return None


def with_checksum(raw: bytes | bytearray) -> bytes:
    """Return a structure with its checksum (2.2.2, 2.2.3.1) computed."""
    return b"".join(
        (
            raw[: layout.CHECKSUM_OFFSET],
            layout.CHECKSUM.pack(_checksum(raw)),
            raw[layout.CHECKSUM_OFFSET + layout.CHECKSUM.size :],
        )
    )


def _checksum(raw: bytes | bytearray) -> int:
    end = layout.CHECKSUM_OFFSET + layout.CHECKSUM.size
    crc = crc32c(raw[: layout.CHECKSUM_OFFSET])
    return crc32c(raw[end:], crc32c(bytes(layout.CHECKSUM.size), crc))


def _read_copy(
    file: ImageFile, what: str, offset: int, nbytes: int, signature: bytes, damage: Damage
) -> bytes | str:
    """Return a checksummed structure, or a line that tells why it is invalid."""
    if offset + nbytes > file.nbytes:
        return f"{what} at {offset:#x} lies past the end of the file ({file.nbytes:#x})"
    raw = bytes(damage.read_table(file, offset, nbytes, b"\0"))
    if not raw.startswith(signature):
        return f"{what} at {offset:#x} starts with {raw[:4]!r}, not {signature!r}"
    (stored,) = layout.CHECKSUM.unpack_from(raw, layout.CHECKSUM_OFFSET)
    computed = _checksum(raw)
    if stored != computed:
        return f"{what} at {offset:#x} has the checksum {stored:#010x}, computed {computed:#010x}"
    return raw


def _read_copies(
    file: ImageFile,
    what: str,
    offsets: Sequence[int],
    nbytes: int,
    signature: bytes,
    problems: list[Problem],
    damage: Damage,
) -> list[bytes]:
    """Return the valid copies of a structure; the other one becomes a problem.

    When salvaging, copies with a wrong checksum are returned if there are no others.
    """
    copies = [
        _read_copy(file, f"{what} {number}", offset, nbytes, signature, damage)
        for number, offset in enumerate(offsets, 1)
    ]
    bad = [copy for copy in copies if isinstance(copy, str)]
    good = [copy for copy in copies if not isinstance(copy, str)]
    if not good:
        damage.report(CorruptImageError("; ".join(bad), path=file.path, offset=offsets[0]))
        held = [offset for offset in offsets if offset + nbytes <= file.nbytes]
        raws = [bytes(damage.read_table(file, offset, nbytes, b"\0")) for offset in held]
        return [raw for raw in raws if raw.startswith(signature)]
    for copy, offset in zip(copies, offsets, strict=True):
        if isinstance(copy, str):
            problems.append(Problem(copy, offset, good[0]))
    return good


# ---------------------------------------------------------------------- headers (2.2.2)


def _current_header(file: ByteSource, problems: list[Problem], damage: Damage) -> FileHeader:
    """Return the valid header with the highest sequence number.

    Without any, salvaging goes on as if there was no log.
    """
    damaged: list[Problem] = []
    copies = _read_copies(
        file,
        "header",
        layout.HEADER_OFFSETS,
        layout.HEADER_NBYTES,
        layout.HEADER_SIGNATURE,
        damaged,
        damage,
    )
    if not copies:
        return FileHeader(0, NIL, NIL, NIL, 0, layout.VERSION, 0, 0)
    headers = [_unpack_header(raw) for raw in copies]
    # A repaired header needs another sequence number: with equal ones, neither is
    # current.
    sequence = headers[0].sequence - 1 if headers[0].sequence else 1
    problems += [item._replace(sound=_with_sequence(copies[0], sequence)) for item in damaged]
    if len({header.sequence for header in headers}) < len(set(headers)):
        damage.report(
            CorruptImageError(
                f"both headers have the sequence number {headers[0].sequence}, but differ",
                path=file.path,
                offset=layout.HEADER_OFFSETS[0],
            )
        )
    return max(headers, key=lambda header: header.sequence)


def _with_sequence(raw: bytes, sequence: int) -> bytes:
    start, end = layout.SEQUENCE_OFFSET, layout.SEQUENCE_OFFSET + layout.SEQUENCE.size
    return with_checksum(raw[:start] + layout.SEQUENCE.pack(sequence) + raw[end:])


def pack_header(header: FileHeader) -> bytes:
    """Return a header as it is stored, with its checksum."""
    raw = layout.HEADER.pack(
        layout.HEADER_SIGNATURE,
        0,
        header.sequence,
        header.file_write_guid.bytes_le,
        header.data_write_guid.bytes_le,
        header.log_guid.bytes_le,
        header.log_version,
        header.version,
        header.log_nbytes,
        header.log_offset,
    )
    return with_checksum(raw.ljust(layout.HEADER_NBYTES, b"\0"))


def _unpack_header(raw: bytes) -> FileHeader:
    (_, _, sequence, file_write, data_write, log, log_version, version, log_nbytes, log_offset) = (
        layout.HEADER.unpack_from(raw)
    )
    return FileHeader(
        sequence,
        uuid.UUID(bytes_le=file_write),
        uuid.UUID(bytes_le=data_write),
        uuid.UUID(bytes_le=log),
        log_version,
        version,
        log_nbytes,
        log_offset,
    )


def _check_header(header: FileHeader, file: ByteSource, damage: Damage) -> None:
    if header.version != layout.VERSION:
        raise UnsupportedFeatureError(
            f"is VHDX version {header.version}, supported is {layout.VERSION}", path=file.path
        )
    if header.log_guid != NIL and header.log_version != layout.LOG_VERSION:
        raise UnsupportedFeatureError(
            f"its log has version {header.log_version}, supported is {layout.LOG_VERSION}",
            path=file.path,
        )
    if damage.salvages:
        # What is wrong with the log is found when it is replayed.
        return
    if header.log_nbytes % layout.ALIGNMENT or header.log_offset % layout.ALIGNMENT:
        raise CorruptImageError(
            f"the log of {header.log_nbytes:#x} bytes at {header.log_offset:#x} is not aligned "
            f"to {layout.ALIGNMENT:#x}",
            path=file.path,
            offset=header.log_offset,
        )
    is_in_use = header.log_guid != NIL
    if is_in_use and (header.log_offset < layout.HEADER_SECTION_NBYTES or not header.log_nbytes):
        raise CorruptImageError(
            f"the log of {header.log_nbytes:#x} bytes at {header.log_offset:#x} must be replayed, "
            "but it is empty or inside the headers",
            path=file.path,
            offset=header.log_offset,
        )


# ---------------------------------------------------------------------- regions (2.2.3)


def _read_regions(
    file: ImageFile, header: FileHeader, problems: list[Problem], damage: Damage
) -> list[Region]:
    tables = _read_copies(
        file,
        "region table",
        layout.REGION_TABLE_OFFSETS,
        layout.REGION_TABLE_NBYTES,
        layout.REGION_TABLE_SIGNATURE,
        problems,
        damage,
    )
    if not tables:
        raise CorruptImageError(
            "has no region table, so the places of its metadata and its BAT are unknown",
            path=file.path,
            offset=layout.REGION_TABLE_OFFSETS[0],
        )
    if len(set(tables)) > 1:
        line = "the two region tables differ: the first one is used"
        problems.append(Problem(line, layout.REGION_TABLE_OFFSETS[1], None))
    _, _, n_entries, _ = layout.REGION_TABLE_HEADER.unpack_from(tables[0])
    if n_entries > layout.MAX_TABLE_ENTRIES:
        raise CorruptImageError(
            f"the region table has {n_entries} entries, at most "
            f"{layout.MAX_TABLE_ENTRIES} are allowed",
            path=file.path,
            offset=layout.REGION_TABLE_OFFSETS[0],
        )
    start = layout.REGION_TABLE_HEADER.size
    raw = tables[0][start : start + n_entries * layout.REGION_ENTRY.size]
    regions = [
        Region(uuid.UUID(bytes_le=guid), offset, nbytes, bool(flags & layout.REGION_REQUIRED))
        for guid, offset, nbytes, flags in layout.REGION_ENTRY.iter_unpack(raw)
    ]
    try:
        _check_regions(file, header, regions)
    except CorruptImageError as error:
        damage.report(error)
    return regions


def _check_regions(file: ImageFile, header: FileHeader, regions: list[Region]) -> None:
    known = (layout.BAT_REGION, layout.METADATA_REGION)
    for region in regions:
        if region.is_required and region.guid not in known:
            raise UnsupportedFeatureError(
                f"needs the region {region.guid}, which is not supported", path=file.path
            )
        is_aligned = region.offset % layout.ALIGNMENT == 0 == region.nbytes % layout.ALIGNMENT
        if not is_aligned or region.offset < layout.HEADER_SECTION_NBYTES:
            raise CorruptImageError(
                f"the region {region.guid} has {region.nbytes:#x} bytes at {region.offset:#x}, "
                f"allowed: multiples of {layout.ALIGNMENT:#x} after the headers",
                path=file.path,
                offset=region.offset,
            )
    if len({region.guid for region in regions}) < len(regions):
        raise CorruptImageError("two regions have the same GUID", path=file.path)
    taken = [(region.offset, region.end, f"the region {region.guid}") for region in regions]
    taken.append((header.log_offset, header.log_offset + header.log_nbytes, "the log"))
    taken.sort()
    for (_, end, name), (start, _, other) in pairwise(taken):
        if start < end:
            raise CorruptImageError(
                f"{name} ends at {end:#x}, inside {other}, which starts at {start:#x}",
                path=file.path,
                offset=start,
            )


def _check_ends(file: ImageFile, regions: list[Region], damage: Damage) -> None:
    """Report known regions that the file does not have completely."""
    names = {layout.BAT_REGION: "BAT", layout.METADATA_REGION: "metadata"}
    for region in regions:
        if region.guid in names and region.end > file.nbytes:
            damage.report(
                CorruptImageError(
                    f"the {names[region.guid]} region ends at {region.end:#x}, past the end of "
                    f"the file ({file.nbytes:#x})",
                    path=file.path,
                    offset=region.offset,
                )
            )


def _region(file: ImageFile, regions: list[Region], guid: uuid.UUID, name: str) -> Region:
    for region in regions:
        if region.guid == guid:
            return region
    raise CorruptImageError(f"has no {name} region", path=file.path)


def _check_bat(file: ImageFile, bat: Region, metadata: Metadata, damage: Damage) -> None:
    needed = metadata.n_bat_entries * layout.BAT_ENTRY_NBYTES
    if bat.nbytes < needed:
        damage.report(
            CorruptImageError(
                f"the BAT region has {bat.nbytes} bytes, but a disk of {metadata.virtual_size} "
                f"bytes with blocks of {metadata.block_nbytes} needs {needed}",
                path=file.path,
                offset=bat.offset,
            )
        )


# --------------------------------------------------------------------- metadata (2.6)


def _read_metadata(file: ImageFile, region: Region) -> Metadata:
    items, inherited = _read_items(file, region)

    def number(guid: uuid.UUID, name: str) -> int:
        return int(_unpack_item(file.path, items, guid, name, layout.SECTOR_SIZE)[0])

    block_nbytes, flags = _unpack_item(
        file.path, items, layout.FILE_PARAMETERS_ITEM, "file parameters", layout.FILE_PARAMETERS
    )
    (virtual_size,) = _unpack_item(
        file.path,
        items,
        layout.VIRTUAL_DISK_SIZE_ITEM,
        "virtual disk size",
        layout.VIRTUAL_DISK_SIZE,
    )
    (disk_id,) = _unpack_item(
        file.path, items, layout.VIRTUAL_DISK_ID_ITEM, "virtual disk ID", layout.VIRTUAL_DISK_ID
    )
    has_parent = bool(flags & layout.HAS_PARENT)
    locator = items.get(layout.PARENT_LOCATOR_ITEM) if has_parent else None
    if has_parent and locator is None:
        raise CorruptImageError("has a parent, but no parent locator", path=file.path)
    metadata = Metadata(
        block_nbytes=block_nbytes,
        leave_block_allocated=bool(flags & layout.LEAVE_BLOCK_ALLOCATED),
        has_parent=has_parent,
        virtual_size=virtual_size,
        virtual_disk_id=uuid.UUID(bytes_le=disk_id),
        logical_sector_nbytes=number(layout.LOGICAL_SECTOR_SIZE_ITEM, "logical sector size"),
        physical_sector_nbytes=number(layout.PHYSICAL_SECTOR_SIZE_ITEM, "physical sector size"),
        locator=None if locator is None else read_locator(locator, file.path),
        inherited=tuple(inherited),
    )
    _check_metadata(metadata, file.path)
    return metadata


def _read_items(file: ImageFile, region: Region) -> tuple[dict[uuid.UUID, bytes], list[StoredItem]]:
    """Return the known items of the system metadata, and the others of the disk."""
    table = file.pread(region.offset, layout.METADATA_TABLE_NBYTES)
    signature, _, n_entries, _ = layout.METADATA_HEADER.unpack_from(table)
    if signature != layout.METADATA_SIGNATURE:
        raise CorruptImageError(
            f"the metadata table starts with {signature!r}", path=file.path, offset=region.offset
        )
    if n_entries > layout.MAX_TABLE_ENTRIES:
        raise CorruptImageError(
            f"the metadata table has {n_entries} entries, at most "
            f"{layout.MAX_TABLE_ENTRIES} are allowed",
            path=file.path,
            offset=region.offset,
        )
    start = layout.METADATA_HEADER.size
    raw = table[start : start + n_entries * layout.METADATA_ENTRY.size]
    seen: set[tuple[uuid.UUID, bool]] = set()
    items: dict[uuid.UUID, bytes] = {}
    inherited: list[StoredItem] = []
    for packed, offset, nbytes, flags, _ in layout.METADATA_ENTRY.iter_unpack(raw):
        guid, is_user = uuid.UUID(bytes_le=packed), bool(flags & layout.ITEM_IS_USER)
        if (guid, is_user) in seen:
            raise CorruptImageError(f"two metadata items are named {guid}", path=file.path)
        seen.add((guid, is_user))
        is_known = guid in _KNOWN_ITEMS and not is_user
        if flags & layout.ITEM_IS_REQUIRED and not is_known:
            raise UnsupportedFeatureError(
                f"needs the metadata item {guid}, which is not supported", path=file.path
            )
        _check_item(file.path, region, guid, offset, nbytes)
        if is_known:
            items[guid] = file.pread(region.offset + offset, nbytes)
        elif flags & layout.ITEM_IS_VIRTUAL_DISK:
            flags &= layout.ITEM_IS_USER | layout.ITEM_IS_VIRTUAL_DISK
            inherited.append(StoredItem(guid, flags, region.offset + offset, nbytes))
    return items, inherited


def inherited_items(image: VhdxImage) -> tuple[MetadataItem, ...]:
    """Return the items that a new child has as well (2.6.1.2, IsVirtualDisk).

    Raises
    ------
    LimitExceededError
        They have more bytes in all than are copied.
    """
    stored = image.metadata.inherited
    nbytes = sum(item.nbytes for item in stored)
    if nbytes > limits.VHDX_MAX_INHERITED_NBYTES:
        raise LimitExceededError(
            f"its metadata for children has {nbytes} bytes, at most "
            f"{limits.VHDX_MAX_INHERITED_NBYTES} are copied: convert without -B",
            path=image.file.path,
        )
    return tuple(
        MetadataItem(item.guid, item.flags, image.view.pread(item.offset, item.nbytes))
        for item in stored
    )


_KNOWN_ITEMS: Final = frozenset(
    {
        layout.FILE_PARAMETERS_ITEM,
        layout.VIRTUAL_DISK_SIZE_ITEM,
        layout.VIRTUAL_DISK_ID_ITEM,
        layout.LOGICAL_SECTOR_SIZE_ITEM,
        layout.PHYSICAL_SECTOR_SIZE_ITEM,
        layout.PARENT_LOCATOR_ITEM,
    }
)


def _check_item(path: str, region: Region, guid: uuid.UUID, offset: int, nbytes: int) -> None:
    is_inside = layout.METADATA_TABLE_NBYTES <= offset <= region.nbytes - nbytes
    if nbytes > layout.MAX_ITEM_NBYTES or (nbytes and not is_inside):
        raise CorruptImageError(
            f"the metadata item {guid} has {nbytes} bytes at {offset:#x} of the metadata region, "
            f"allowed: at most {layout.MAX_ITEM_NBYTES} bytes after "
            f"{layout.METADATA_TABLE_NBYTES:#x}",
            path=path,
            offset=region.offset + offset,
        )


def _unpack_item(
    path: str, items: dict[uuid.UUID, bytes], guid: uuid.UUID, name: str, form: struct.Struct
) -> tuple[Any, ...]:
    item = items.get(guid)
    if item is None:
        raise CorruptImageError(f"has no metadata item {name}", path=path)
    if len(item) < form.size:
        raise CorruptImageError(
            f"the metadata item {name} has {len(item)} bytes, {form.size} are needed", path=path
        )
    return form.unpack_from(item)


def _check_metadata(metadata: Metadata, path: str) -> None:
    low, high = limits.VHDX_MIN_BLOCK_NBYTES, limits.VHDX_MAX_BLOCK_NBYTES
    block_nbytes = metadata.block_nbytes
    if not low <= block_nbytes <= high or block_nbytes & (block_nbytes - 1):
        raise CorruptImageError(
            f"the block size is {block_nbytes}, allowed: powers of two from {low} to {high}",
            path=path,
        )
    for what, nbytes in (
        ("logical", metadata.logical_sector_nbytes),
        ("physical", metadata.physical_sector_nbytes),
    ):
        if nbytes not in layout.SECTOR_SIZES:
            raise CorruptImageError(
                f"the {what} sector size is {nbytes}, allowed: 512 and 4096", path=path
            )
    size = metadata.virtual_size
    if size > limits.VHDX_MAX_VIRTUAL_NBYTES:
        raise LimitExceededError(
            f"the disk has {size} bytes, at most {limits.VHDX_MAX_VIRTUAL_NBYTES} are allowed",
            path=path,
        )
    if size % metadata.logical_sector_nbytes:
        raise CorruptImageError(
            f"the disk has {size} bytes, not a multiple of its logical sector size "
            f"{metadata.logical_sector_nbytes}",
            path=path,
        )
