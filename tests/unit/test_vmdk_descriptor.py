"""VMDK descriptors: text of real files, rejected text, and composed text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgcore import limits
from imgcore.errors import CorruptImageError, ImgcoreError, LimitExceededError
from imgcore.formats.vmdk.descriptor import (
    DiskDatabase,
    ExtentLine,
    compose_descriptor,
    parse_descriptor,
)

EXTENT = 'RW 8 FLAT "a-flat.vmdk" 0'
SIMPLE = f'version=1\nCID=0a0b0c0d\nparentCID=ffffffff\ncreateType="monolithicFlat"\n{EXTENT}\n'


@pytest.mark.parametrize(
    "text",
    [
        SIMPLE,
        "# Disk DescriptorFile\n" + SIMPLE,
        "# Description file created by VMDK stream converter\n" + SIMPLE,
        SIMPLE.replace("\n", "\r\n"),
        SIMPLE.replace("\n", " \n\n\n"),
        SIMPLE.replace("=", " = ").replace("CID", "cid"),
        "\n".join("  " + line for line in SIMPLE.splitlines()),
        SIMPLE + "\0" * 5000 + "garbage",
        SIMPLE + '# Change Tracking File\nchangeTrackPath="x"\n\x01\x02\n',
        "\ufeff" + SIMPLE,
    ],
    ids=[
        "plain",
        "signature",
        "converter",
        "crlf",
        "blank-lines",
        "spaces",
        "indented",
        "nul",
        "unknown-keys",
        "bom",
    ],
)
def test_quirks_of_real_files(text: str) -> None:
    parsed = parse_descriptor(text.encode(), "x.vmdk")
    assert (parsed.cid, parsed.parent_cid) == (0x0A0B0C0D, 0xFFFFFFFF)
    assert parsed.create_type == "monolithicFlat"
    assert parsed.extents == (ExtentLine("RW", 4096, "FLAT", "a-flat.vmdk", 0),)
    assert parsed.parent_hint == ""


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("RW 5 ZERO", ExtentLine("RW", 2560, "ZERO", "", 0)),
        (
            'RDONLY 1 SPARSE "s p a c e.vmdk"',
            ExtentLine("RDONLY", 512, "SPARSE", "s p a c e.vmdk", 0),
        ),
        ('RW 1 VMFS "a" # old', ExtentLine("RW", 512, "VMFS", "a", 0)),
        ('rw 1 flat "a" 7', ExtentLine("RW", 512, "FLAT", "a", 3584)),
        (
            'RW 63 FLAT "\\\\.\\PhysicalDrive0" 0 partitionUUID device',
            ExtentLine("RW", 63 * 512, "FLAT", "\\\\.\\PhysicalDrive0", 0),
        ),
    ],
)
def test_extent_lines(line: str, expected: ExtentLine) -> None:
    assert parse_descriptor(line.encode(), "x").extents == (expected,)


@pytest.mark.parametrize(
    ("encoding", "raw", "name"),
    [
        ("UTF-8", "plätte".encode(), "plätte"),
        ("windows-1252", "plätte".encode("cp1252"), "plätte"),
        ("GBK", "磁盘".encode("gbk"), "磁盘"),
        ("UTF-8", b"\xff\xfe", "\udcff\udcfe"),
        ("rot13", b"abc", "abc"),
        ("no-such", b"abc", "abc"),
        ("windows-9999", b"abc", "abc"),
    ],
)
def test_encodings(encoding: str, raw: bytes, name: str) -> None:
    text = f'encoding="{encoding}"\n'.encode() + b'RW 1 FLAT "' + raw + b'" 0\n'
    assert parse_descriptor(text, "x").extents[0].name == name


@pytest.mark.parametrize(
    ("text", "error", "word"),
    [
        ("CID=xyz\n", CorruptImageError, "cid is 'xyz'"),
        ("CID=123456789\n", CorruptImageError, "8 hexadecimal"),
        ("CID=1\nCID=2\n", CorruptImageError, "twice"),
        ('parentFileNameHint="a"\nparentFileNameHint="b"\n', CorruptImageError, "twice"),
        ('ddb.logicalSectorSize = "0"\n', CorruptImageError, "'0', allowed are 512 and 4096"),
        ('ddb.logicalSectorSize="512"\nddb.logicalSectorSize="4096"\n', CorruptImageError, "twice"),
        ("RW\n", CorruptImageError, "line 1 is not an extent"),
        ("\n\nRW x FLAT\n", CorruptImageError, "line 3"),
        ('RW 8 FLAT "a" -1\n', CorruptImageError, "line 1 is not an extent"),
        ('RW 8 FLAT "a" 0x10\n', CorruptImageError, "line 1 is not an extent"),
        (f'RW 8 FLAT "a" {10**20}\n', CorruptImageError, "line 1 is not an extent"),
        ("a" * (limits.VMDK_MAX_DESCRIPTOR_LINE_NBYTES + 1), LimitExceededError, "line 1"),
        ("\n" * (limits.VMDK_MAX_DESCRIPTOR_NBYTES + 1), LimitExceededError, "descriptor of"),
        ("RW 1 ZERO\n" * (limits.VMDK_MAX_EXTENTS + 1), LimitExceededError, "extents"),
    ],
)
def test_refusals(text: str, error: type[ImgcoreError], word: str) -> None:
    with pytest.raises(error, match=word) as caught:
        parse_descriptor(text.encode(), "x.vmdk")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "a" * limits.VMDK_MAX_DESCRIPTOR_LINE_NBYTES,
        "\n" * limits.VMDK_MAX_DESCRIPTOR_NBYTES,
        "RW 1 ZERO\n" * limits.VMDK_MAX_EXTENTS,
    ],
    ids=["line", "descriptor", "extents"],
)
def test_at_the_limit(text: str) -> None:
    parse_descriptor(text.encode(), "x.vmdk")


@given(st.binary(max_size=400))
def test_arbitrary_bytes(data: bytes) -> None:
    try:
        parse_descriptor(data, "x.vmdk")
        parse_descriptor(SIMPLE.encode() + data, "x.vmdk")
    except ImgcoreError:
        pass


@pytest.mark.parametrize(
    ("n_sectors", "adapter", "geometry"),
    [
        (1, "lsilogic", ("1", "64", "32")),
        (61440, "lsilogic", ("30", "64", "32")),
        (2097152, "lsilogic", ("512", "128", "32")),
        (33554432, "lsilogic", ("2088", "255", "63")),
        (1 << 40, "buslogic", ("65535", "255", "63")),
        (20480, "ide", ("20", "16", "63")),
        (1 << 40, "ide", ("16383", "16", "63")),
    ],
)
def test_geometry(n_sectors: int, adapter: str, geometry: tuple[str, str, str]) -> None:
    database = DiskDatabase(adapter, "4", "2147483647", 0xABCDEF, "0" * 24 + "00abcdef")
    text = compose_descriptor("monolithicFlat", EXTENT, n_sectors, database)
    parsed = parse_descriptor(text, "x.vmdk")
    keys = ("cylinders", "heads", "sectors")
    assert tuple(parsed.values[f"ddb.geometry.{key}"] for key in keys) == geometry
    assert parsed.values["ddb.longcontentid"].endswith("00abcdef")
    assert parsed.cid == 0xABCDEF
