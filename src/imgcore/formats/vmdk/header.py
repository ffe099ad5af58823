"""Parse and verify headers of VMDK sparse extents, and find the grain directory.

This module does not import NumPy, so that ``info`` starts fast.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Final, NamedTuple

from imgcore.errors import (
    CorruptImageError,
    LimitExceededError,
    UnsupportedFeatureError,
    WrongFormatError,
)
from imgcore.formats.shared.damage import STRICT, Damage
from imgcore.formats.shared.trailing_zeros import end_of_data
from imgcore.formats.vmdk import layout
from imgcore.formats.vmdk.layout import Flags, SparseHeader
from imgcore.formats.vmdk.stream_walk import end_of_stream
from imgcore.limits import (
    MAX_VIRTUAL_NBYTES,
    SECTOR_NBYTES,
    VMDK_MAX_DESCRIPTOR_NBYTES,
    VMDK_MAX_DIRECTORY_ENTRIES,
    VMDK_MAX_GRAIN_NBYTES,
    VMDK_MAX_GTES_PER_GT,
    VMDK_MAX_TRAILING_ZERO_NBYTES,
    VMDK_MAX_VERSION,
    VMDK_MIN_GRAIN_NBYTES,
)
from imgcore.log import log

if TYPE_CHECKING:
    from imgcore.files.byte_source import ByteSource

# About kinds of ESX(i).
QEMU_READS: Final = "qemu-img convert reads it"


class SparseExtent(NamedTuple):
    """One verified sparse extent; offsets and lengths in bytes.

    ``capacity`` is the header's, from which ``n_directory_entries`` follows.
    ``gd_offset`` is the directory to read, ``rgd_offset`` the other one or 0.  When
    salvaging, ``gd_offset`` may be 0, too, and the directories may be cut off.
    ``header`` is the one at the start of the file.
    """

    file: ByteSource
    version: int
    flags: Flags
    capacity: int
    grain_nbytes: int
    n_gtes_per_gt: int
    gd_offset: int
    rgd_offset: int
    overhead: int
    descriptor_offset: int
    descriptor_nbytes: int
    unclean_shutdown: bool
    n_directory_entries: int
    header: SparseHeader

    @property
    def is_compressed(self) -> bool:
        """Whether every grain is a zlib stream."""
        return Flags.COMPRESSED in self.flags

    @property
    def has_markers(self) -> bool:
        """Whether LBA and size precede every compressed grain."""
        return Flags.MARKERS in self.flags

    @property
    def has_zeroed_grains(self) -> bool:
        """Whether an entry of 1 means explicit zeros."""
        return Flags.ZEROED_GRAIN in self.flags

    @property
    def gt_nbytes(self) -> int:
        """The size of a grain table in bytes."""
        return self.n_gtes_per_gt * layout.ENTRY_NBYTES

    @property
    def gt_reach_nbytes(self) -> int:
        """The number of guest bytes that a grain table covers."""
        return self.n_gtes_per_gt * self.grain_nbytes

    @property
    def compressed_bound(self) -> int:
        """The largest size of a compressed grain with its marker, in bytes."""
        prefix = layout.GRAIN_MARKER.size if self.has_markers else 0
        return prefix + layout.MAX_COMPRESSED_GRAINS * self.grain_nbytes


def open_sparse(file: ByteSource, damage: Damage = STRICT) -> SparseExtent:
    """Verify a sparse extent's header and find its grain directory.

    Parameters
    ----------
    file : ByteSource
        The caller closes it.
    damage : Damage
        When salvaging, footer and directories may be missing.

    Raises
    ------
    WrongFormatError
        The magic is absent.
    CorruptImageError
        The header contradicts itself or the file, or the footer is missing.
    UnsupportedFeatureError
        A version, flag or kind of extent is not supported.
    LimitExceededError
        A size in the header exceeds its limit.

    Notes
    -----
    Source: Virtual Disk Format 5.0, "Hosted Sparse Extent Header", "Footer".
    """
    header = _read_header(file, 0)
    gd_offset, rgd_offset = header.gd_offset, header.rgd_offset
    if gd_offset == layout.GD_AT_END:
        gd_offset, rgd_offset = _directories_of_footer(file, header, damage)
    n_entries = _verify_fields(file.path, header)
    has_redundant = bool(header.flags & Flags.REDUNDANT_GD)
    directories = _directories(
        file,
        gd_offset * SECTOR_NBYTES,
        rgd_offset * SECTOR_NBYTES if has_redundant else 0,
        n_entries,
        damage,
    )
    return _sparse_extent(file, header, n_entries, *directories)


def reads_by_markers(file: ByteSource) -> bool:
    """Tell whether a file's grains have markers, and its tables follow them."""
    header = _read_header(file, 0)
    wanted = Flags.COMPRESSED | Flags.MARKERS
    return header.flags & wanted == wanted and header.gd_offset >= max(header.overhead, 1)


def open_by_markers(file: ByteSource) -> SparseExtent:
    """Verify the header of an extent that `reads_by_markers`; see `open_sparse`.

    Both directories are 0: they are not known before they come.
    """
    header = _read_header(file, 0)
    return _sparse_extent(file, header, _verify_fields(file.path, header), 0, 0)


def directory_of_footer(extent: SparseExtent, raw: bytes, offset: int) -> int:
    """Return the sector of the grain directory that a footer states.

    Raises
    ------
    CorruptImageError
        It contradicts the header, or is none.
    """
    footer = SparseHeader._make(layout.SPARSE_HEADER.unpack_from(raw))
    path = extent.file.path
    if footer.magic != layout.SPARSE_MAGIC:
        raise CorruptImageError(
            f"the footer at {offset:#x} has the magic {footer.magic!r}, expected "
            f"{layout.SPARSE_MAGIC!r}",
            path=path,
            offset=offset,
        )
    _refuse_other_fields(path, extent.header, footer)
    return footer.gd_offset


def _directories_of_footer(
    file: ByteSource, header: SparseHeader, damage: Damage
) -> tuple[int, int]:
    """Return where the footer puts the two directories, (0, 0) if it is lost."""
    try:
        footer = _read_footer(file, header)
        _refuse_other_fields(file.path, header, footer)
    except CorruptImageError as error:
        damage.report(error)
        return 0, 0
    return footer.gd_offset, footer.rgd_offset


def _refuse_other_fields(path: str, header: SparseHeader, footer: SparseHeader) -> None:
    for field in ("capacity", "grain_size", "n_gtes_per_gt", "flags"):
        if getattr(footer, field) != getattr(header, field):
            raise CorruptImageError(
                f"the footer says {field} {getattr(footer, field)}, "
                f"the header {getattr(header, field)}",
                path=path,
            )


def refuse_foreign_extent(file: ByteSource, head: bytes) -> None:
    """Raise UnsupportedFeatureError for ESX(i) extents that are not supported."""
    for magic, name in (
        (layout.COWD_MAGIC, "vmfsSparse (COWD)"),
        (layout.SESPARSE_MAGIC, "seSparse"),
    ):
        if head.startswith(magic):
            raise UnsupportedFeatureError(
                f"VMDK extent of type {name}, which is not supported: open the disk's "
                f"descriptor file with another program ({QEMU_READS})",
                path=file.path,
            )


def read_embedded_descriptor(extent: SparseExtent) -> bytes | None:
    """Return the embedded descriptor with its NUL padding, or None."""
    if extent.descriptor_offset == 0 or extent.descriptor_nbytes == 0:
        return None
    if extent.descriptor_nbytes > VMDK_MAX_DESCRIPTOR_NBYTES:
        raise LimitExceededError(
            f"descriptor of {extent.descriptor_nbytes} bytes, "
            f"allowed up to {VMDK_MAX_DESCRIPTOR_NBYTES}",
            path=extent.file.path,
        )
    if not _fits(extent.file, extent.descriptor_offset, extent.descriptor_nbytes):
        raise _outside(
            extent.file, "descriptor", extent.descriptor_offset, extent.descriptor_nbytes
        )
    return extent.file.pread(extent.descriptor_offset, extent.descriptor_nbytes)


def _read_header(file: ByteSource, offset: int) -> SparseHeader:
    if file.nbytes < offset + layout.HEADER_NBYTES:
        raise WrongFormatError(
            f"not a VMDK sparse extent: {file.nbytes} bytes are too few for a header",
            path=file.path,
        )
    raw = file.pread(offset, layout.HEADER_NBYTES)
    refuse_foreign_extent(file, raw)
    header = SparseHeader._make(layout.SPARSE_HEADER.unpack_from(raw))
    if header.magic != layout.SPARSE_MAGIC:
        raise WrongFormatError(
            f"not a VMDK sparse extent: its magic is not {layout.SPARSE_MAGIC!r}",
            path=file.path,
        )
    return header


def _read_footer(file: ByteSource, header: SparseHeader) -> SparseHeader:
    """Find and read the footer; warn if more than padding follows the stream.

    The stream ends with a footer marker, the footer and an end-of-stream marker.  Some
    producers then pad the file with zero sectors.  The end-of-stream marker is a zero
    sector too, so the footer is the last sector that is not zero.  If it is not, all
    markers are followed: the file may have been copied onto a larger volume.
    """
    footer_end = end_of_data(file, VMDK_MAX_TRAILING_ZERO_NBYTES)
    footer = None if footer_end is None else _footer_at(file, footer_end)
    if footer is None:
        footer_end = end_of_stream(file, header)
        footer = None if footer_end is None else _footer_at(file, footer_end)
        if footer_end is None or footer is None:
            raise _truncated(file)
        log.warning(
            "%s: %d bytes after the end of the stream are ignored",
            file.path,
            file.nbytes - footer_end - SECTOR_NBYTES,
        )
    if footer.gd_offset == layout.GD_AT_END:
        raise CorruptImageError(
            "the footer does not say where the grain directory is",
            path=file.path,
            offset=footer_end,
        )
    return footer


def _footer_at(file: ByteSource, end: int) -> SparseHeader | None:
    """Return the footer that ends at a place and follows its marker, or None."""
    marker_start = end - layout.HEADER_NBYTES - SECTOR_NBYTES
    whole_nbytes = file.nbytes // SECTOR_NBYTES * SECTOR_NBYTES
    if marker_start < SECTOR_NBYTES or whole_nbytes - end < SECTOR_NBYTES:
        return None
    raw = file.pread(marker_start, SECTOR_NBYTES + layout.HEADER_NBYTES)
    _, size, kind = layout.MARKER.unpack_from(raw)
    footer = SparseHeader._make(layout.SPARSE_HEADER.unpack_from(raw, SECTOR_NBYTES))
    is_footer = footer.magic == layout.SPARSE_MAGIC and size == 0
    return footer if is_footer and kind == layout.Marker.FOOTER else None


def stream_end(file: ByteSource) -> int | None:
    """Return where a file with a footer should end, None for a file without one.

    It should end with the sector of the end-of-stream marker.

    Raises
    ------
    CorruptImageError
        The footer is missing.
    """
    header = _read_header(file, 0)
    if header.gd_offset != layout.GD_AT_END:
        return None
    footer_end = end_of_data(file, VMDK_MAX_TRAILING_ZERO_NBYTES)
    if footer_end is None or _footer_at(file, footer_end) is None:
        footer_end = end_of_stream(file, header)
    if footer_end is None:
        raise _truncated(file)
    return footer_end + SECTOR_NBYTES


def _truncated(file: ByteSource) -> CorruptImageError:
    return CorruptImageError(
        "the grain directory should be at the end, but the footer or the end-of-stream marker "
        f"is missing: the file ({file.nbytes} bytes) is truncated",
        path=file.path,
        offset=file.nbytes,
    )


def _verify_fields(path: str, header: SparseHeader) -> int:
    """Verify what does not depend on the file; return the directory's entries."""
    _verify_version(path, header)
    grain_nbytes = header.grain_size * SECTOR_NBYTES
    if (
        header.grain_size & (header.grain_size - 1)
        or not VMDK_MIN_GRAIN_NBYTES <= grain_nbytes <= VMDK_MAX_GRAIN_NBYTES
    ):
        raise LimitExceededError(
            f"grain of {grain_nbytes} bytes, allowed are powers of two from "
            f"{VMDK_MIN_GRAIN_NBYTES} to {VMDK_MAX_GRAIN_NBYTES}",
            path=path,
        )
    n_gtes = header.n_gtes_per_gt
    if not 1 <= n_gtes <= VMDK_MAX_GTES_PER_GT:
        raise LimitExceededError(
            f"grain table of {n_gtes} entries, allowed are 1 to {VMDK_MAX_GTES_PER_GT}",
            path=path,
        )
    n_entries = -(-header.capacity // (header.grain_size * n_gtes))
    if (
        n_entries > VMDK_MAX_DIRECTORY_ENTRIES
        or header.capacity > MAX_VIRTUAL_NBYTES // SECTOR_NBYTES
    ):
        raise LimitExceededError(
            f"capacity of {header.capacity} sectors needs {n_entries} grain directory entries, "
            f"allowed up to {VMDK_MAX_DIRECTORY_ENTRIES}",
            path=path,
        )
    return n_entries


def _sparse_extent(
    file: ByteSource, header: SparseHeader, n_entries: int, gd_offset: int, rgd_offset: int
) -> SparseExtent:
    if header.unclean_shutdown and not file.share:
        log.warning("%s: the extent was not closed cleanly; reading it anyway", file.path)
    return SparseExtent(
        file=file,
        version=header.version,
        flags=Flags(header.flags & 0x30007),
        capacity=header.capacity * SECTOR_NBYTES,
        grain_nbytes=header.grain_size * SECTOR_NBYTES,
        n_gtes_per_gt=header.n_gtes_per_gt,
        gd_offset=gd_offset,
        rgd_offset=rgd_offset,
        overhead=header.overhead * SECTOR_NBYTES,
        descriptor_offset=header.descriptor_offset * SECTOR_NBYTES,
        descriptor_nbytes=header.descriptor_size * SECTOR_NBYTES,
        unclean_shutdown=bool(header.unclean_shutdown),
        n_directory_entries=n_entries,
        header=header,
    )


def _verify_version(path: str, header: SparseHeader) -> None:
    if not 1 <= header.version <= VMDK_MAX_VERSION:
        raise UnsupportedFeatureError(
            f"VMDK extent version {header.version}, supported are 1 to {VMDK_MAX_VERSION}",
            path=path,
        )
    unknown = header.flags & layout.INCOMPATIBLE_FLAGS & ~layout.KNOWN_INCOMPATIBLE_FLAGS
    if unknown:
        raise UnsupportedFeatureError(f"unknown incompatible flags {unknown:#x}", path=path)
    if header.flags & Flags.NEWLINE_TEST and header.newline_test != layout.NEWLINE_TEST:
        raise CorruptImageError(
            f"end-of-line bytes are {header.newline_test!r}, expected {layout.NEWLINE_TEST!r}: "
            "the file was transferred as text or is damaged",
            path=path,
            offset=73,
        )
    if header.flags & Flags.COMPRESSED:
        if header.compression != layout.COMPRESSION_DEFLATE:
            raise UnsupportedFeatureError(
                f"VMDK compression algorithm {header.compression}", path=path
            )
    elif header.flags & Flags.MARKERS:
        raise CorruptImageError(
            "the header has the flag for markers but not for compression", path=path, offset=8
        )


def _directories(
    file: ByteSource, gd_offset: int, rgd_offset: int, n_entries: int, damage: Damage
) -> tuple[int, int]:
    """Return the offsets of the directory to read and of the other one (0: absent).

    The primary directory is read, as by VMware, QEMU and VirtualBox.  Nearly every
    hosted extent has a redundant one too, which is read only if the primary does not
    fit in the file.  When salvaging, both are compared.
    """
    gd_nbytes = n_entries * layout.ENTRY_NBYTES
    if n_entries == 0:
        return 0, 0
    redundant_fits = rgd_offset > 0 and _fits(file, rgd_offset, gd_nbytes)
    if gd_offset > 0 and _fits(file, gd_offset, gd_nbytes):
        return gd_offset, rgd_offset if redundant_fits or damage.salvages else 0
    if redundant_fits:
        log.warning(
            "%s: the grain directory cannot be at %#x; reading the redundant one at %#x",
            file.path,
            gd_offset,
            rgd_offset,
        )
        return rgd_offset, 0
    if gd_offset == 0:
        damage.report(
            CorruptImageError("the header has no grain directory", path=file.path, offset=56)
        )
    else:
        damage.report(_outside(file, "grain directory", gd_offset, gd_nbytes))
    return gd_offset, rgd_offset


def _fits(file: ByteSource, offset: int, nbytes: int) -> bool:
    return offset + nbytes <= file.nbytes


def _outside(file: ByteSource, what: str, offset: int, nbytes: int) -> CorruptImageError:
    return CorruptImageError(
        f"{what} ends at {offset + nbytes:#x}, past the end of the file ({file.nbytes:#x})",
        path=file.path,
        offset=offset,
    )


def short_last_grain(extent: SparseExtent, guest_nbytes: int, place: int | None = None) -> int:
    """Return the inflated size of a truncated last grain, 0 if it is stored whole.

    The tables tell where it is, unless its ``place`` is given.

    If the disk ends within its last grain, VirtualBox compresses the whole grain, QEMU
    and VMware only the part up to the end of the disk.  Damage is reported later, when
    the grain is read.
    """
    grain_nbytes = extent.grain_nbytes
    tail_nbytes = guest_nbytes % grain_nbytes
    if not extent.is_compressed or tail_nbytes == 0:
        return 0
    grain_index = guest_nbytes // grain_nbytes
    if place is None:
        place = _place_of(extent, grain_index)
    if not place or place >= extent.file.nbytes:
        return 0
    stored_nbytes = extent.compressed_bound
    if extent.has_markers:
        if extent.file.nbytes - place < layout.GRAIN_MARKER.size:
            return 0
        marker = extent.file.pread(place, layout.GRAIN_MARKER.size)
        lba, stored_nbytes = layout.GRAIN_MARKER.unpack(marker)
        if lba * SECTOR_NBYTES != grain_index * grain_nbytes:
            return 0
        place += layout.GRAIN_MARKER.size
        stored_nbytes = min(stored_nbytes, extent.compressed_bound - layout.GRAIN_MARKER.size)
    raw = extent.file.pread(place, min(stored_nbytes, extent.file.nbytes - place))
    try:
        inflated_nbytes = len(zlib.decompressobj().decompress(raw, grain_nbytes))
    except zlib.error:
        return 0
    return inflated_nbytes if tail_nbytes <= inflated_nbytes < grain_nbytes else 0


def _place_of(extent: SparseExtent, grain_index: int) -> int:
    """Return where a grain is, 0 if the tables do not tell."""
    table_index, entry_index = divmod(grain_index, extent.n_gtes_per_gt)
    if not extent.gd_offset:
        return 0
    table = _sector_at(extent.file, extent.gd_offset + table_index * layout.ENTRY_NBYTES)
    return _sector_at(extent.file, table + entry_index * layout.ENTRY_NBYTES) if table else 0


def _sector_at(file: ByteSource, offset: int) -> int:
    """Return the byte offset stored in the table entry at ``offset``, 0 if none."""
    if offset + layout.ENTRY_NBYTES > file.nbytes:
        return 0
    entry = int.from_bytes(file.pread(offset, layout.ENTRY_NBYTES), "little")
    return entry * SECTOR_NBYTES if entry > layout.ENTRY_ZEROED else 0
