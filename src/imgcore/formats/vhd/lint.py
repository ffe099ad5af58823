"""Lint rules for VHD."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from imgcore.formats.shared.lint import Rule
from imgcore.formats.vhd import layout
from imgcore.formats.vhd.header import find_footers, parent_texts
from imgcore.formats.vhd.reader import VhdReader, printable
from imgcore.limits import VHD_MAX_DYNAMIC_NBYTES, VHD_MAX_WRITTEN_BLOCK_NBYTES

if TYPE_CHECKING:
    from imgcore.formats.shared.lint import ImageFacts
    from imgcore.formats.vhd.header import FooterPlace, VhdHeader


def _header(facts: ImageFacts) -> VhdHeader | None:
    """Return the headers, or None if the image cannot be opened."""
    return facts.reader.header if isinstance(facts.reader, VhdReader) else None


def _footers(facts: ImageFacts) -> tuple[FooterPlace | None, FooterPlace | None]:
    """Return the footer at the end and its copy, even if the image cannot be opened."""
    header = _header(facts)
    return find_footers(facts.file) if header is None else (header.end, header.copy)


def size_source(facts: ImageFacts) -> str:
    """Return a half-sentence if the size is that of a VHD's geometry, else ''."""
    header = _header(facts)
    if header is None or header.chs_nbytes != header.size.nbytes:
        return ""
    return ", but the size that its geometry states (cylinders, heads and sectors)"


def _size_is_one(facts: ImageFacts) -> str | None:
    header = _header(facts)
    if header is None or header.end is None:
        return None
    if header.end.footer.creator not in layout.CHS_CREATORS:
        return None
    current, chs = header.footer.current_size, header.chs_nbytes
    if current == chs:
        return None
    return (
        f"its geometry states {chs} bytes and its current size {current}; programs disagree "
        f"about which one counts in a disk created by {printable(header.footer.creator)!r}"
    )


def _file_is_exact(facts: ImageFacts) -> str | None:
    header = _header(facts)
    if header is None or header.disk_type is not layout.DiskType.FIXED:
        return None
    expected = header.size.nbytes + layout.FOOTER_NBYTES
    if facts.file.nbytes == expected:
        return None
    return f"the file has {facts.file.nbytes} bytes, but the disk and its footer have {expected}"


def _footer_is_last(facts: ImageFacts) -> str | None:
    if facts.format != "vhd":
        return None
    end, _ = _footers(facts)
    if end is not None and end.offset == facts.file.nbytes - layout.FOOTER_NBYTES:
        return None
    return f"the last {layout.FOOTER_NBYTES} bytes are not a footer"


def _footers_are_sound(facts: ImageFacts) -> str | None:
    if facts.format != "vhd":
        return None
    end, copy = _footers(facts)
    for place in (end, copy):
        if place is not None and place.problem is not None:
            return place.problem.reason
    header = _header(facts)
    if header is not None and header.dynamic is not None and copy is None:
        return "the copy of the footer at the start is missing"
    return None


def _header_is_strict(facts: ImageFacts) -> str | None:
    header = _header(facts)
    if header is None or header.dynamic is None:
        return None
    version, data_offset = header.dynamic.version, header.dynamic.data_offset
    if version != layout.VERSION:
        return f"the dynamic disk header has version {version:#010x}, not 0x00010000"
    if data_offset != layout.NO_OFFSET:
        return f"the dynamic disk header has data offset {data_offset:#x}, not all ones"
    return None


def _locators_are_sound(facts: ImageFacts) -> str | None:
    header = _header(facts)
    if header is None or header.disk_type is not layout.DiskType.DIFFERENCING:
        return None
    _, problems = parent_texts(facts.file, header)
    return problems[0].reason if problems else None


def _blocks_are_small(facts: ImageFacts) -> str | None:
    header = _header(facts)
    if header is None or header.dynamic is None:
        return None
    nbytes, allowed = header.dynamic.block_nbytes, VHD_MAX_WRITTEN_BLOCK_NBYTES
    if nbytes <= allowed:
        return None
    return f"blocks of {nbytes} bytes, at most {allowed} are supported"


def _has_uuid(facts: ImageFacts) -> str | None:
    header = _header(facts)
    return None if header is None or any(header.footer.uuid) else "its UUID is zero"


def _is_small(facts: ImageFacts) -> str | None:
    header = _header(facts)
    if header is None or header.size.nbytes <= VHD_MAX_DYNAMIC_NBYTES:
        return None
    return (
        f"a VHD of {header.size.nbytes} bytes, at most {VHD_MAX_DYNAMIC_NBYTES} (2040 GiB) are "
        "supported"
    )


SIZE: Final = Rule("vhd-size", _size_is_one)
LIMIT: Final = Rule("vhd-limit", _is_small)
FILE_SIZE: Final = Rule("vhd-file-size", _file_is_exact)
FOOTER: Final = Rule("vhd-footer", _footer_is_last)
CHECKSUMS: Final = Rule("vhd-checksums", _footers_are_sound, "imgcore check --repair, or convert")
HEADER: Final = Rule("vhd-header", _header_is_strict)
LOCATORS: Final = Rule("vhd-locators", _locators_are_sound)
BLOCK_SIZE: Final = Rule("vhd-block-size", _blocks_are_small)
UUID: Final = Rule("vhd-uuid", _has_uuid)
