"""Parse and compose VMDK descriptors, the text that describes a disk.

Source: VMware "Virtual Disk Format 5.0", section "The Descriptor File".
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from typing import Final, NamedTuple

from imgcore.errors import (
    CorruptImageError,
    LimitExceededError,
    UnsupportedFeatureError,
)
from imgcore.formats.vmdk.layout import NO_PARENT_CID
from imgcore.limits import (
    MAX_VIRTUAL_NBYTES,
    SECTOR_NBYTES,
    VMDK_MAX_DESCRIPTOR_LINE_NBYTES,
    VMDK_MAX_DESCRIPTOR_NBYTES,
    VMDK_MAX_EXTENTS,
    VMDK_MAX_VERSION,
)

SIGNATURE: Final = "# Disk DescriptorFile"
# The values of ddb.logicalSectorSize, as in the text.
LOGICAL_SECTOR_SIZES: Final = ("512", "4096")
_ACCESS_WORDS: Final = ("RW", "RDONLY", "NOACCESS")
_EXTENT_LINE: Final = re.compile(
    r"(RW|RDONLY|NOACCESS)\s+(\d{1,20})\s+([A-Za-z]+)"
    # Any text may follow, except a malformed offset, which would read as none.
    r'(?:\s+"([^"]*)"(?:\s+(\d{1,20})(?:\s+\S.*)?|\s+[^\s\d+-].*)?)?',
    re.IGNORECASE,
)
_KEY_LINE: Final = re.compile(r"([A-Za-z][\w.]*)\s*=\s*(.*)")
# With two different values of one of these, two programs might see different disks.
_DECISIVE_KEYS: Final = frozenset(
    {
        "version",
        "cid",
        "parentcid",
        "createtype",
        "parentfilenamehint",
        "ddb.logicalsectorsize",
    }
)
# Code pages.  Python has other codecs too, some of which do not decode bytes to text.
_CODE_PAGE: Final = re.compile(
    r"(utf-?8|us-ascii|windows-\d{3,4}|iso-8859-\d{1,2}|gbk|gb2312|gb18030|big5|shift_jis|euc-(jp|kr))",
    re.IGNORECASE,
)


class ExtentLine(NamedTuple):
    """One line of the extent description; ``offset_nbytes`` is within a flat file."""

    access: str
    nbytes: int
    kind: str
    name: str
    offset_nbytes: int


class Descriptor(NamedTuple):
    """A parsed descriptor; the keys of ``values`` are in lower case."""

    values: dict[str, str]
    extents: tuple[ExtentLine, ...]
    cid: int
    parent_cid: int
    logical_sector_nbytes: int

    @property
    def create_type(self) -> str:
        """The stated disk type, empty if the descriptor has none."""
        return self.values.get("createtype", "")

    @property
    def parent_hint(self) -> str:
        """The parent's file name, empty if the disk has no parent."""
        return self.values.get("parentfilenamehint", "")


def parse_descriptor(data: bytes, path: str) -> Descriptor:
    """Parse a descriptor from its own file, or embedded and padded with NULs.

    Parameters
    ----------
    data : bytes
        Up to ``VMDK_MAX_DESCRIPTOR_NBYTES`` bytes before the first NUL.
    path : str
        For messages.

    Raises
    ------
    CorruptImageError
        An extent line or a number is malformed, or a key has two different values.
    LimitExceededError
        The descriptor, a line, the number of extents or the disk is too large.
    UnsupportedFeatureError
        The descriptor's version is unknown.
    """
    text = data.split(b"\0", 1)[0].removeprefix(codecs.BOM_UTF8)
    if len(text) > VMDK_MAX_DESCRIPTOR_NBYTES:
        raise LimitExceededError(
            f"descriptor of {len(text)} bytes, allowed up to {VMDK_MAX_DESCRIPTOR_NBYTES}",
            path=path,
        )
    values: dict[str, str] = {}
    extents: list[ExtentLine] = []
    for number, line in _lines(text, path):
        if line.split(None, 1)[0].upper() in _ACCESS_WORDS:
            extents.append(_parse_extent(line, number, path))
            if len(extents) > VMDK_MAX_EXTENTS:
                raise LimitExceededError(f"more than {VMDK_MAX_EXTENTS} extents", path=path)
        elif match := _KEY_LINE.fullmatch(line):
            _keep_value(values, match[1].lower(), _unquote(match[2]), path)
    if sum(extent.nbytes for extent in extents) > MAX_VIRTUAL_NBYTES:
        raise LimitExceededError(
            f"the extents together exceed {MAX_VIRTUAL_NBYTES} bytes", path=path
        )
    version = values.get("version", "1")
    if not version.isdecimal() or not 1 <= int(version[:9]) <= VMDK_MAX_VERSION:
        raise UnsupportedFeatureError(f"descriptor version {version[:20]!r}", path=path)
    return Descriptor(
        values,
        tuple(extents),
        _content_id(values, "cid", 0, path),
        _content_id(values, "parentcid", NO_PARENT_CID, path),
        _logical_sector_nbytes(values, path),
    )


def descriptor_without_parent(nbytes: int) -> Descriptor:
    """Return the descriptor of a disk of which only the sparse extent is known."""
    line = ExtentLine("RW", nbytes, "SPARSE", "", 0)
    return Descriptor({}, (line,), 0, NO_PARENT_CID, SECTOR_NBYTES)


def _lines(text: bytes, path: str) -> Iterator[tuple[int, str]]:
    """Yield number and text of each line that is not empty and not a comment."""
    encoding = encoding_of(text)
    for number, raw in enumerate(re.split(rb"\r\n|\n|\r", text), 1):
        if len(raw) > VMDK_MAX_DESCRIPTOR_LINE_NBYTES:
            raise LimitExceededError(
                f"descriptor line {number} has {len(raw)} bytes, "
                f"allowed up to {VMDK_MAX_DESCRIPTOR_LINE_NBYTES}",
                path=path,
            )
        line = raw.decode(encoding, "surrogateescape").strip()
        if line and not line.startswith("#"):
            yield number, line


def encoding_of(text: bytes) -> str:
    """Return the stated code page, or UTF-8 if it is missing or unknown.

    The caller decodes invalid bytes to surrogates, so that file names keep their bytes.
    """
    match = re.search(
        rb'^[ \t]*(?:ddb\.)?encoding[ \t]*=[ \t]*"?([\w-]{1,40})', text, re.MULTILINE | re.I
    )
    name = match[1].decode("ascii", "replace") if match else "utf-8"
    if not _CODE_PAGE.fullmatch(name):
        return "utf-8"
    try:
        return codecs.lookup(name).name
    except LookupError:
        return "utf-8"


def _parse_extent(line: str, number: int, path: str) -> ExtentLine:
    match = _EXTENT_LINE.fullmatch(line)
    if match is None:
        raise CorruptImageError(
            f"descriptor line {number} is not an extent: {line[:80]!r}, expected"
            ' ACCESS SECTORS TYPE "NAME" [OFFSET]',
            path=path,
        )
    access, n_sectors, kind, name, offset = match.groups()
    limit = MAX_VIRTUAL_NBYTES // SECTOR_NBYTES
    if int(n_sectors) > limit or int(offset or 0) > limit:
        raise LimitExceededError(
            f"descriptor line {number}: extent of {n_sectors} sectors at {offset or 0}, "
            f"allowed up to {limit}",
            path=path,
        )
    return ExtentLine(
        access.upper(),
        int(n_sectors) * SECTOR_NBYTES,
        kind.upper(),
        name or "",
        int(offset or 0) * SECTOR_NBYTES,
    )


def _unquote(value: str) -> str:
    value = value.strip()
    if value.startswith('"'):
        value = value[1:]
        end = value.rfind('"')
        return value if end < 0 else value[:end]
    return value


def _keep_value(values: dict[str, str], key: str, value: str, path: str) -> None:
    if key in _DECISIVE_KEYS and values.get(key, value) != value:
        raise CorruptImageError(
            f"the descriptor states {key} twice: {values[key][:80]!r} and {value[:80]!r}", path=path
        )
    values.setdefault(key, value)


def _content_id(values: dict[str, str], key: str, default: int, path: str) -> int:
    text = values.get(key)
    if text is None:
        return default
    if not re.fullmatch(r"(0x)?[0-9A-Fa-f]{1,8}", text):
        raise CorruptImageError(f"{key} is {text[:40]!r}, expected 8 hexadecimal digits", path=path)
    return int(text, 16)


def _logical_sector_nbytes(values: dict[str, str], path: str) -> int:
    """Return the guest's sector size, 512 unless the descriptor states another."""
    text = values.get("ddb.logicalsectorsize", str(SECTOR_NBYTES))
    if text not in LOGICAL_SECTOR_SIZES:
        raise CorruptImageError(
            f"ddb.logicalSectorSize is {text[:40]!r}, allowed are "
            f"{' and '.join(LOGICAL_SECTOR_SIZES)}",
            path=path,
        )
    return int(text)


class DiskDatabase(NamedTuple):
    """The virtual hardware and the content IDs in a new descriptor."""

    adapter_type: str
    hw_version: str
    tools_version: str
    cid: int
    long_content_id: str
    logical_sector_nbytes: int = SECTOR_NBYTES


def compose_descriptor(
    create_type: str, extent_line: str, n_sectors: int, database: DiskDatabase
) -> bytes:
    """Return a descriptor with one extent, with VMware's keys in VMware's order.

    Parameters
    ----------
    create_type : str
        For example ``"streamOptimized"``.
    extent_line : str
        The complete line of the extent description.
    n_sectors : int
        The capacity, from which the geometry follows.
    database : DiskDatabase
        The virtual hardware and the content IDs.

    Returns
    -------
    bytes
        UTF-8; lines end with a line feed.
    """
    cylinders, heads, sectors = disk_geometry(n_sectors, database.adapter_type)
    # Only disks with large sectors need the key, which some readers might not expect.
    large_sectors = (
        (f'ddb.logicalSectorSize = "{database.logical_sector_nbytes}"',)
        if database.logical_sector_nbytes != SECTOR_NBYTES
        else ()
    )
    lines = (
        SIGNATURE,
        "version=1",
        'encoding="UTF-8"',
        f"CID={database.cid:08x}",
        f"parentCID={NO_PARENT_CID:08x}",
        f'createType="{create_type}"',
        "",
        "# Extent description",
        extent_line,
        "",
        "# The Disk Data Base",
        "#DDB",
        "",
        f'ddb.adapterType = "{database.adapter_type}"',
        f'ddb.geometry.cylinders = "{cylinders}"',
        f'ddb.geometry.heads = "{heads}"',
        f'ddb.geometry.sectors = "{sectors}"',
        *large_sectors,
        f'ddb.longContentID = "{database.long_content_id}"',
        'ddb.toolsInstallType = "4"',
        f'ddb.toolsVersion = "{database.tools_version}"',
        f'ddb.virtualHWVersion = "{database.hw_version}"',
        "",
    )
    return "\n".join(lines).encode("utf-8")


def disk_geometry(n_sectors: int, adapter_type: str) -> tuple[int, int, int]:
    """Return cylinders, heads and sectors as VMware computes them."""
    gib_nsectors = (1 << 30) // SECTOR_NBYTES
    if adapter_type == "ide":
        heads, sectors, limit = 16, 63, 16383
    elif n_sectors < gib_nsectors:
        heads, sectors, limit = 64, 32, 65535
    elif n_sectors < 2 * gib_nsectors:
        heads, sectors, limit = 128, 32, 65535
    else:
        heads, sectors, limit = 255, 63, 65535
    return min(max(n_sectors // (heads * sectors), 1), limit), heads, sectors
