"""Reads and verifies VHD footers, dynamic disk headers and parent locators.

Nothing here imports NumPy, so that ``info`` starts fast.

Source: Microsoft, "Virtual Hard Disk Image Format Specification" 1.0; QEMU block/vpc.c
for the size that each creator means.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from imgcore.errors import (
    CorruptImageError,
    ImgcoreError,
    LimitExceededError,
    UnsupportedFeatureError,
    WrongFormatError,
)
from imgcore.formats.shared.damage import STRICT, Damage
from imgcore.formats.shared.trailing_zeros import end_of_data
from imgcore.formats.vhd import layout
from imgcore.formats.vhd.layout import DiskType, DynamicHeader, Footer, Locator
from imgcore.limits import (
    MAX_PADDING_NBYTES,
    SECTOR_NBYTES,
    VHD_MAX_BLOCK_NBYTES,
    VHD_MAX_BLOCKS_VERIFIED_AT_OPEN,
    VHD_MAX_DYNAMIC_NBYTES,
    VHD_MAX_LOCATOR_NBYTES,
)
from imgcore.log import log

if TYPE_CHECKING:
    from imgcore.files.byte_source import ByteSource

# BAT entries that are read at once.
_PIECE_ENTRIES: Final = 1 << 16


class FooterPlace(NamedTuple):
    """A footer that was found; ``problem`` is None if it is sound.

    ``nbytes`` is 511 for an old footer, but ``raw`` always has 512 bytes.
    """

    offset: int
    nbytes: int
    raw: bytes
    footer: Footer
    problem: ImgcoreError | None


class VirtualSize(NamedTuple):
    """Size of the disk in bytes, and the field that states it: ``chs`` or ``current``.

    ``because`` tells why this field counts: the ``creator`` uses it, the ``geometry``
    is empty or at its maximum, the ``file`` of a fixed disk has this length, or an
    ``option`` chose it.
    """

    nbytes: int
    field: str
    because: str


class VhdHeader(NamedTuple):
    """The verified headers of one image.

    ``end`` and ``copy`` are the footers at the file's end and start, or None;
    ``footer`` is the one in use.  A fixed disk has no ``dynamic`` header and no
    ``locators``.
    """

    footer: Footer
    end: FooterPlace | None
    copy: FooterPlace | None
    size: VirtualSize
    dynamic: DynamicHeader | None
    locators: tuple[Locator, ...]

    @property
    def disk_type(self) -> DiskType:
        """Fixed, dynamic or differencing."""
        return DiskType(self.footer.disk_type)

    @property
    def chs_nbytes(self) -> int:
        """Size of the disk in bytes by its geometry: cylinders, heads and sectors."""
        return chs_nbytes(self.footer)

    @property
    def n_blocks(self) -> int:
        """BAT entries that the disk needs."""
        return 0 if self.dynamic is None else -(-self.size.nbytes // self.dynamic.block_nbytes)

    @property
    def bitmap_nbytes(self) -> int:
        """Bytes of the sector bitmap before each block."""
        return 0 if self.dynamic is None else bitmap_nbytes(self.dynamic.block_nbytes)

    @property
    def structures(self) -> list[tuple[int, int, str]]:
        """(start, end, name) of what a dynamic disk's blocks must not overlap.

        The locators are left out.
        """
        assert self.dynamic is not None
        table, header = self.dynamic.table_offset, self.footer.data_offset
        table_nbytes = self.dynamic.max_table_entries * layout.ENTRY_NBYTES
        return [
            (0, layout.FOOTER_NBYTES, "the footer's copy"),
            (header, header + layout.HEADER_NBYTES, "the dynamic disk header"),
            (table, table + table_nbytes, "the BAT"),
        ]

    @property
    def blocks_end(self) -> int | None:
        """Offset of the footer at the end, where blocks must end; None without one."""
        return None if self.end is None else self.end.offset


def chs_nbytes(footer: Footer) -> int:
    """Return the size of the disk in bytes by the geometry in its footer."""
    return footer.cylinders * footer.heads * footer.sectors_per_track * SECTOR_NBYTES


def bitmap_nbytes(block_nbytes: int) -> int:
    """Return the bytes of a block's sector bitmap, which fills whole sectors."""
    n_bytes = -(-block_nbytes // (8 * SECTOR_NBYTES))
    return -(-n_bytes // SECTOR_NBYTES) * SECTOR_NBYTES


def checksum(raw: bytes, field_offset: int) -> int:
    """Return the one's complement of the sum of all bytes except the checksum field."""
    return ~(sum(raw) - sum(raw[field_offset : field_offset + 4])) & 0xFFFFFFFF


def footer_of(raw: bytes) -> Footer:
    """Return the fields of a footer."""
    return Footer._make(layout.FOOTER.unpack_from(raw))


def are_of_one_change(first: bytes, second: bytes) -> bool:
    """Tell whether two sound footers differ as a change in place may leave them.

    A change of the size, the kind or the header's place makes first one footer durable
    and then the other.
    """
    fields = [
        footer_of(raw)._replace(
            data_offset=0,
            current_size=0,
            cylinders=0,
            heads=0,
            sectors_per_track=0,
            disk_type=DiskType.DYNAMIC,
            checksum=0,
        )
        for raw in (first, second)
    ]
    is_rest_equal = first[layout.FOOTER.size :] == second[layout.FOOTER.size :]
    return fields[0] == fields[1] and is_rest_equal


def uuid_text(raw: bytes) -> str:
    """Return a UUID as it is usually written."""
    digits = raw.hex()
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def read_header(file: ByteSource, size: str | None = None, damage: Damage = STRICT) -> VhdHeader:
    """Read and verify everything before the BAT.

    Parameters
    ----------
    file : ByteSource
        The caller closes it.
    size : str, optional
        ``chs`` or ``current``: the size to use, regardless of the creator.
    damage : Damage
        When salvaging, checksums need not fit, and the file may be too short.

    Raises
    ------
    WrongFormatError
        There is no footer at the end or the start.
    CorruptImageError
        No footer is sound, or the headers contradict themselves or the file.
    UnsupportedFeatureError
        The version or the type of disk is unknown.
    LimitExceededError
        A claimed size is over its limit.
    """
    end, copy = find_footers(file)
    place = _choose_footer(file, end, copy, damage)
    footer = place.footer
    if footer.disk_type == DiskType.FIXED:
        virtual_size = _fixed_size(file, place, size, damage)
        return VhdHeader(footer, end, None, virtual_size, None, ())
    dynamic, locators = _read_dynamic_header(file, footer.data_offset, damage)
    virtual_size = _stated_size(file, footer, size)
    _verify_table(file, dynamic, virtual_size, damage)
    header = VhdHeader(footer, end, copy, virtual_size, dynamic, locators)
    if end is None and not damage.salvages:
        _refuse_truncated(file, header)
    _warn_of_footers(file, end, copy)
    return header


def find_footers(file: ByteSource) -> tuple[FooterPlace | None, FooterPlace | None]:
    """Return the footers at the end and the start of the file, sound or not.

    A block device may be longer than its image, and end in an older image's footer: the
    copy at the start then stands for both.
    """
    copy = _footer_at(file, 0, layout.FOOTER_NBYTES)
    end = None
    for nbytes in (layout.FOOTER_NBYTES, layout.OLD_FOOTER_NBYTES):
        end = end or _footer_at(file, file.nbytes - nbytes, nbytes)
    if end is None:
        end = _footer_before_zeros(file, copy)
    if file.is_block_device and copy is not None and _is_dynamic(copy):
        if end is not None and end.problem is None and not _is_dynamic(end):
            raise CorruptImageError(
                "the block device has a fixed disk's footer at its end and a dynamic disk's at "
                "its start: one of them is old or is the guest's data; overwrite the wrong one "
                f"(512 bytes at {end.offset:#x} or at 0)",
                path=file.path,
            )
        end = copy._replace(offset=file.nbytes)
    return end, copy


def _footer_before_zeros(file: ByteSource, copy: FooterPlace | None) -> FooterPlace | None:
    """Return a footer with zeros after it.

    The file was copied onto a larger volume.  Or a writer was interrupted while it made
    room for more blocks, and the new footer is lost.  A dynamic disk may also end in
    data that looks like a footer, which is not that of the copy.
    """
    data_end = end_of_data(file, MAX_PADDING_NBYTES)
    if data_end is None:
        return None
    # The last fields of a footer are zeros, but not its first sector.
    found = _footer_at(file, data_end - layout.FOOTER_NBYTES, layout.FOOTER_NBYTES)
    if found is not None and copy is not None and _is_dynamic(copy):
        found = found if are_of_one_change(found.raw, copy.raw) else None
    if found is not None:
        log.warning(
            "%s: %d bytes of zeros after its footer are ignored", file.path, file.nbytes - data_end
        )
    return found


def _is_dynamic(place: FooterPlace) -> bool:
    """Tell whether this is the sound footer of a dynamic or differencing disk."""
    return place.problem is None and place.footer.disk_type != DiskType.FIXED


def _footer_at(file: ByteSource, offset: int, nbytes: int) -> FooterPlace | None:
    if offset < 0 or offset + nbytes > file.nbytes:
        return None
    raw = file.pread(offset, nbytes).ljust(layout.FOOTER_NBYTES, b"\0")
    footer = footer_of(raw)
    if footer.cookie != layout.FOOTER_COOKIE:
        return None
    return FooterPlace(offset, nbytes, raw, footer, _footer_problem(file, offset, raw, footer))


def _footer_problem(
    file: ByteSource, offset: int, raw: bytes, footer: Footer
) -> ImgcoreError | None:
    found = checksum(raw, layout.FOOTER_CHECKSUM_OFFSET)
    if footer.checksum != found:
        return CorruptImageError(
            f"the footer at {offset:#x} states the checksum {footer.checksum:#010x}, its bytes "
            f"have {found:#010x}",
            path=file.path,
            offset=offset,
        )
    return _field_problem(file, offset, footer)


def _field_problem(file: ByteSource, offset: int, footer: Footer) -> ImgcoreError | None:
    where = f"the footer at {offset:#x}"
    if footer.version >> 16 != layout.VERSION >> 16:
        return UnsupportedFeatureError(
            f"{where} has version {footer.version:#010x}, supported is {layout.VERSION:#010x}",
            path=file.path,
        )
    if footer.disk_type not in list(DiskType):
        return UnsupportedFeatureError(
            f"{where} states disk type {footer.disk_type}, supported are 2 (fixed), 3 (dynamic) "
            "and 4 (differencing)",
            path=file.path,
        )
    header_end = footer.data_offset + layout.HEADER_NBYTES
    if footer.disk_type != DiskType.FIXED and header_end > file.nbytes:
        return CorruptImageError(
            f"{where} puts the dynamic disk header at {footer.data_offset:#x}, so that it "
            f"ends past the end of the file ({file.nbytes:#x})",
            path=file.path,
            offset=offset,
        )
    return None


def _choose_footer(
    file: ByteSource, end: FooterPlace | None, copy: FooterPlace | None, damage: Damage
) -> FooterPlace:
    """Return the footer to use: the one at the end, or its copy if that is damaged.

    Only dynamic and differencing disks have a copy.  A fixed disk starts with guest
    data, which may look like a footer.
    """
    if end is not None and end.problem is None:
        return end
    if copy is not None and _is_dynamic(copy):
        return copy
    for place in (end, copy):
        # Salvage one whose checksum is all that is wrong.
        if place is None or place.problem is None:
            continue
        is_usable = _field_problem(file, place.offset, place.footer) is None
        has_copy = place.footer.disk_type != DiskType.FIXED
        if damage.salvages and is_usable and (place is end or has_copy):
            damage.report(place.problem)
            return place
    if end is not None and end.problem is not None:
        raise end.problem
    if copy is not None and copy.problem is not None:
        raise copy.problem
    if copy is not None:
        raise CorruptImageError(
            "there is a fixed disk's footer at the start, but none at the end: "
            "the file is truncated",
            path=file.path,
            offset=0,
        )
    raise WrongFormatError(
        "no VHD footer at the end or the start (-f raw reads what is left of a fixed disk)",
        path=file.path,
    )


def _warn_of_footers(file: ByteSource, end: FooterPlace | None, copy: FooterPlace | None) -> None:
    """Warn if only one of the two footers can be used."""
    by_copy, by_end = "using its copy at the start", "using the one at the end"
    if end is None:
        problem = f"there is no footer at the end; {by_copy}"
    elif end.problem is not None:
        problem = f"{end.problem.reason}; {by_copy}"
    elif copy is None:
        problem = "there is no copy of the footer at the start"
    elif copy.problem is not None:
        problem = f"{copy.problem.reason}; {by_end}"
    elif copy.raw != end.raw:
        problem = f"the footer and its copy differ; {by_end}"
    else:
        return
    log.warning("%s: %s", file.path, problem)


def _refuse_truncated(file: ByteSource, header: VhdHeader) -> None:
    """Raise if a file has lost blocks together with the footer at its end.

    If the BAT is too large to be searched here, a lost block is found when it is read.
    """
    assert header.dynamic is not None
    block_nbytes, n_blocks = header.dynamic.block_nbytes, header.n_blocks
    if n_blocks > VHD_MAX_BLOCKS_VERIFIED_AT_OPEN:
        return
    for first in range(0, n_blocks, _PIECE_ENTRIES):
        count = min(_PIECE_ENTRIES, n_blocks - first)
        offset = header.dynamic.table_offset + first * layout.ENTRY_NBYTES
        raw = file.pread(offset, count * layout.ENTRY_NBYTES)
        for index, (sector,) in enumerate(layout.ENTRY.iter_unpack(raw), first):
            if sector == layout.ENTRY_ABSENT:
                continue
            held_nbytes = min(block_nbytes, header.size.nbytes - index * block_nbytes)
            block_end = sector * SECTOR_NBYTES + header.bitmap_nbytes + held_nbytes
            if block_end > file.nbytes:
                raise CorruptImageError(
                    f"there is no footer at the end, and block {index} ends at {block_end:#x}, "
                    f"past the end of the file ({file.nbytes:#x}): the file is truncated",
                    path=file.path,
                    offset=file.nbytes,
                )


def stated_size(footer: Footer, size: str | None = None) -> VirtualSize:
    """Return the size that the footer's creator means, or that the caller chooses."""
    by_geometry = chs_nbytes(footer)
    if by_geometry in (0, layout.MAX_CHS_NSECTORS * SECTOR_NBYTES):
        choice = ("current", "geometry")
    elif size is not None:
        choice = (size, "option")
    else:
        choice = ("chs" if footer.creator in layout.CHS_CREATORS else "current", "creator")
    return VirtualSize(by_geometry if choice[0] == "chs" else footer.current_size, *choice)


def _stated_size(file: ByteSource, footer: Footer, size: str | None) -> VirtualSize:
    stated = stated_size(footer, size)
    if stated.nbytes % SECTOR_NBYTES:
        raise CorruptImageError(
            f"the footer states {stated.nbytes} bytes, which is not a multiple of {SECTOR_NBYTES}",
            path=file.path,
        )
    return stated


def _fixed_size(
    file: ByteSource, place: FooterPlace, size: str | None, damage: Damage
) -> VirtualSize:
    """Return a fixed disk's size: the stated one, or the one that fits the file."""
    footer, held_nbytes = place.footer, place.offset
    stated = _stated_size(file, footer, size)
    if stated.nbytes == held_nbytes or (size is not None and stated.nbytes <= held_nbytes):
        return stated
    for field, nbytes in (("current", footer.current_size), ("chs", chs_nbytes(footer))):
        if nbytes == held_nbytes and nbytes % SECTOR_NBYTES == 0:
            return VirtualSize(nbytes, field, "file")
    if stated.nbytes > held_nbytes:
        damage.report(
            CorruptImageError(
                f"a fixed disk of {stated.nbytes} bytes, but only {held_nbytes} before its "
                "footer: the file is truncated",
                path=file.path,
                offset=held_nbytes,
            )
        )
    return stated


def _read_dynamic_header(
    file: ByteSource, offset: int, damage: Damage
) -> tuple[DynamicHeader, tuple[Locator, ...]]:
    raw = file.pread(offset, layout.HEADER_NBYTES)
    header = DynamicHeader._make(layout.HEADER.unpack_from(raw))
    if header.cookie != layout.HEADER_COOKIE:
        raise CorruptImageError(
            f"no dynamic disk header at {offset:#x}: its cookie is {header.cookie!r}, "
            f"expected {layout.HEADER_COOKIE!r}",
            path=file.path,
            offset=offset,
        )
    found = checksum(raw, layout.HEADER_CHECKSUM_OFFSET)
    if header.checksum != found:
        damage.report(
            CorruptImageError(
                f"the dynamic disk header states the checksum {header.checksum:#010x}, its bytes "
                f"have {found:#010x}",
                path=file.path,
                offset=offset,
            )
        )
    if header.version >> 16 != layout.VERSION >> 16:
        raise UnsupportedFeatureError(
            f"the dynamic disk header has version {header.version:#010x}, supported is "
            f"{layout.VERSION:#010x}",
            path=file.path,
        )
    entries = (
        Locator._make(
            layout.LOCATOR.unpack_from(raw, layout.LOCATORS_OFFSET + i * layout.LOCATOR.size)
        )
        for i in range(layout.N_LOCATORS)
    )
    return header, tuple(entry for entry in entries if entry.platform != layout.NO_PLATFORM)


def _verify_table(
    file: ByteSource, header: DynamicHeader, size: VirtualSize, damage: Damage
) -> None:
    block_nbytes = header.block_nbytes
    if not SECTOR_NBYTES <= block_nbytes <= VHD_MAX_BLOCK_NBYTES or block_nbytes & (
        block_nbytes - 1
    ):
        raise LimitExceededError(
            f"blocks of {block_nbytes} bytes, allowed: powers of two from {SECTOR_NBYTES} to "
            f"{VHD_MAX_BLOCK_NBYTES}",
            path=file.path,
        )
    if size.nbytes > VHD_MAX_DYNAMIC_NBYTES:
        raise LimitExceededError(
            f"a dynamic disk of {size.nbytes} bytes, at most {VHD_MAX_DYNAMIC_NBYTES} are allowed",
            path=file.path,
        )
    n_blocks = -(-size.nbytes // block_nbytes)
    if header.max_table_entries < n_blocks:
        damage.report(
            CorruptImageError(
                f"a BAT of {header.max_table_entries} entries, but a disk of {size.nbytes} bytes "
                f"needs {n_blocks}",
                path=file.path,
            )
        )
    table_end = header.table_offset + header.max_table_entries * layout.ENTRY_NBYTES
    if table_end > file.nbytes:
        damage.report(
            CorruptImageError(
                f"the BAT ends at {table_end:#x}, past the end of the file ({file.nbytes:#x})",
                path=file.path,
                offset=header.table_offset,
            )
        )


def parent_texts(
    file: ByteSource, header: VhdHeader
) -> tuple[list[tuple[bytes, str]], list[ImgcoreError]]:
    """Return the texts in which an image names its parent, and those that are damaged.

    Returns
    -------
    texts : list of (bytes, str)
        Platform code and text of each parent locator.  The name in the header has the
        code b"".
    problems : list of ImgcoreError
        A locator lies outside the file, is too long, or has an invalid encoding.  The
        other texts can still be used.
    """
    assert header.dynamic is not None
    texts: list[tuple[bytes, str]] = []
    problems: list[ImgcoreError] = []
    for locator in header.locators:
        code = locator.platform
        if code not in (layout.RELATIVE_PATH, layout.ABSOLUTE_PATH, layout.FILE_URL):
            continue
        encoding = "utf-8" if code == layout.FILE_URL else "utf-16-le"
        try:
            raw = _read_locator(file, locator)
            texts.append((code, _decode(file, raw, encoding, f"{_code(locator)} locator")))
        except ImgcoreError as error:
            problems.append(error)
    try:
        name = _decode(file, header.dynamic.parent_name, "utf-16-be", "parent's name")
        texts.append((b"", name))
    except ImgcoreError as error:
        problems.append(error)
    return texts, problems


def _code(locator: Locator) -> str:
    return locator.platform.decode("ascii", "backslashreplace")


def _read_locator(file: ByteSource, locator: Locator) -> bytes:
    if locator.data_nbytes > VHD_MAX_LOCATOR_NBYTES:
        raise LimitExceededError(
            f"the {_code(locator)} parent locator has {locator.data_nbytes} bytes, at most "
            f"{VHD_MAX_LOCATOR_NBYTES} are allowed",
            path=file.path,
        )
    if locator.data_offset + locator.data_nbytes > file.nbytes:
        raise CorruptImageError(
            f"the {_code(locator)} parent locator ends at "
            f"{locator.data_offset + locator.data_nbytes:#x}, past the end of the file "
            f"({file.nbytes:#x})",
            path=file.path,
            offset=locator.data_offset,
        )
    return file.pread(locator.data_offset, locator.data_nbytes)


def _decode(file: ByteSource, raw: bytes, encoding: str, what: str) -> str:
    # Ignore what follows the first NUL.
    unit = 1 if encoding == "utf-8" else 2
    ends = (at for at in range(0, len(raw), unit) if raw[at : at + unit] == bytes(unit))
    try:
        return raw[: next(ends, len(raw))].decode(encoding)
    except UnicodeDecodeError:
        raise CorruptImageError(
            f"the {what} is not valid {encoding.upper()}", path=file.path
        ) from None
