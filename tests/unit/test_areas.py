"""Lists of changed areas: files of each kind, normal form, rounding."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import qemu

from imgcore import limits
from imgcore.areas.area import Area
from imgcore.areas.bmap import bmap_of
from imgcore.areas.normal import check_granularity, rounded
from imgcore.areas.qemu_map import map_lines
from imgcore.areas.reading import AreaList, read_areas
from imgcore.errors import (
    FormatError,
    ImgcoreError,
    LimitExceededError,
    OptionError,
    UnsupportedFeatureError,
    WrongFormatError,
)

MIB = 1 << 20


def listed(source: AreaList, size: int = MIB) -> list[Area]:
    return list(read_areas(source, size))


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


# -- normal form -----------------------------------------------------------------------


def test_a_sequence() -> None:
    assert listed([(0, 512), Area(512, 10, is_zero=False), (600, 1)]) == [
        (0, 522, False),
        (600, 1, False),
    ]
    assert listed([(np.uint64(512), np.int32(512))]) == [(512, 512, False)]
    assert listed([]) == []
    assert listed([Area(0, 5, is_zero=True), Area(5, 5, is_zero=False)]) == [
        (0, 5, True),
        (5, 5, False),
    ]


BAD = [
    ([(-512, 1024)], r"entry 1 of the areas starts at -512, before the start"),
    ([(0, 512), (512, 0)], r"entry 2 of the areas at 512 has a length of 0"),
    ([(0, -1)], r"entry 1 of the areas at 0 has a length of -1"),
    ([(MIB - 512, 1024)], r"entry 1 .* from 1048064 to 1049088, outside the disk of 1048576"),
    ([((1 << 63) - 1, (1 << 63) - 1)], r"entry 1 of the areas is from 9223372036854775807 to"),
    ([(1 << 70, 1)], r"exceeds 2\^63 - 1"),
    # Their sum has more digits than Python prints.
    ([(10**4300 - 1, 10**4300 - 1)], r"exceeds 2\^63 - 1"),
    ([(0, -(10**4299))], r"exceeds 2\^63 - 1"),
    ([(0, 512), (4096, 512), (2048, 512)], r"entry 3 .* starts at 2048, .* \(4096\): not sorted"),
    ([(0, 4096), (2048, 512)], r"entry 2 .* starts at 2048, inside .*: they overlap"),
    ([(0, 512), (0, 512)], r"entry 2 .* starts at 0, inside .*: they overlap"),
]


@pytest.mark.parametrize(("areas", "words"), BAD)
def test_bad_areas(tmp_path: Path, areas: list[tuple[int, int]], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        listed(areas)
    # The same in a file.
    path = write(tmp_path / "a", "".join(map_lines(Area(*area, False) for area in areas)))
    with pytest.raises(FormatError, match=words) as caught:
        listed(path)
    assert caught.value.path == str(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("areas", [[1], [(1, 2, 3)], [("a", 1)], [(1.0, 2)], [None]])
def test_not_areas(areas: list[object]) -> None:
    with pytest.raises(TypeError, match="is needed, not"):
        listed(areas)  # type: ignore[arg-type]


@pytest.mark.parametrize("granularity", [0, -512, 256, 511, 513, 3 << 20, 1 << 32])
def test_bad_granularity(granularity: int) -> None:
    with pytest.raises(OptionError, match=f"granularity is {granularity}: allowed are powers"):
        check_granularity(granularity)


def test_rounding_is_that_of_each_byte() -> None:
    """A block is listed if one of its bytes is, and zero if all of them are."""
    rng = random.Random(1)
    for _ in range(500):
        size = rng.randrange(1, 6000)
        cuts = sorted(rng.sample(range(size), min(size, rng.randrange(2, 12))))
        cuts += [size] * rng.randrange(2)
        kinds = [rng.randrange(3) for _ in cuts[1:]]
        areas = [
            Area(a, b - a, is_zero=kind == 1)
            for a, b, kind in zip(cuts, cuts[1:], kinds, strict=False)
            if kind
        ]
        map_of_bytes = np.zeros(size, np.int8)
        for offset, length, is_zero in areas:
            map_of_bytes[offset : offset + length] = 1 if is_zero else 2
        expected = []
        for start in range(0, size, 512):
            block = map_of_bytes[start : start + 512]
            if block.any():
                expected.append(Area(start, len(block), is_zero=bool((block == 1).all())))
        found = list(rounded(read_areas(areas, size), 512, size))
        assert found == listed(expected, size)


# -- the JSON of qemu-img map ----------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_map_of_qemu_img(tmp_path: Path, encoding: str) -> None:
    raw = tmp_path / "a.raw"
    with raw.open("wb") as file:
        file.truncate(16 * MIB)
        for at in range(0, 16, 4):
            file.seek(at * MIB)
            file.write(b"x" * 8192)
    text = qemu.run("map", "--output=json", "-f", "raw", raw).stdout
    found = listed(write(tmp_path / "map", text, encoding), 16 * MIB)
    assert [area[:2] for area in found if not area.is_zero] == [
        (at * MIB, 8192) for at in range(0, 16, 4)
    ]
    assert sum(area.length for area in found) == 16 * MIB
    # One object on each line.
    lines = text.strip().strip("[]").replace("},\n", "}\n")
    assert listed(write(tmp_path / "lines", lines), 16 * MIB) == found


def test_what_the_image_does_not_have_is_not_listed(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    qemu.run("create", "-q", "-f", "qcow2", path, "1M")
    text = qemu.run("map", "--output=json", path).stdout
    assert listed(write(tmp_path / "map", text)) == []


def test_a_map_of_a_bitmap(tmp_path: Path) -> None:
    """In what QEMU prints for x-dirty-bitmap, data is what did *not* change."""
    entries = [(0, 131072, "true"), (131072, 65536, "false"), (196608, 851968, "true")]
    text = ",\n".join(
        f'{{ "start": {start}, "length": {length}, "depth": 0, "present": {data}, '
        f'"zero": false, "data": {data}, "compressed": false}}'
        for start, length, data in entries
    )
    with pytest.raises(FormatError, match="neither data nor zero: not the map of an image"):
        listed(write(tmp_path / "map", f"[{text}]\n"))


def test_written_maps_read_back(tmp_path: Path) -> None:
    areas = [Area(512 * n, 512, is_zero=n % 3 == 0) for n in range(0, 4000, 2)]
    path = write(tmp_path / "map", "".join(map_lines(areas)))
    assert listed(path, 4 * MIB) == areas
    assert "".join(map_lines([])) == "[]\n"
    assert listed(write(path, "[]\n")) == []


def test_a_map_of_many_pieces(tmp_path: Path) -> None:
    """The file is read in pieces of 1 MiB; entries and white space span them."""
    areas = [Area(2 * n, 1, is_zero=False) for n in range(30_000)]
    text = "".join(map_lines(areas)).replace(",\n", "," + " " * 90)
    text = " " * 60_000 + text + "\n" * (1 << 20)
    assert len(text) > 5 << 20
    assert listed(write(tmp_path / "map", text)) == areas
    # Errors tell the place.
    with pytest.raises(FormatError, match=rf"'x' instead of the end .*, at character {len(text)}$"):
        listed(write(tmp_path / "map", text + "x"))


ENTRY = '{"start": 0, "length": 512, "data": true, "zero": false}'
BAD_MAPS = [
    ("", "not a list of changed areas"),
    ("MZ", "not a list of changed areas"),
    ("[", "not a list of changed areas"),
    ("[1]", "not a list of changed areas"),
    ("[[]]", "not a list of changed areas"),
    ('[{"offset": 0, "length": 512, "type": 0}]', "not a list of changed areas"),
    (f"[{ENTRY}, 1]", "1 instead of an object"),
    ("[] []", "'\\[' instead of the end"),
    (f"[{ENTRY}", "the end of the text instead of , or ]"),
    (f"[{ENTRY},]", "not JSON"),
    (f"[{ENTRY}] x", "'x' instead of the end"),
    (f"{ENTRY} x", "'x' instead of the end"),
    (ENTRY[:-1], "not JSON"),
    (ENTRY.replace("512", "512.0"), "no 'length' that is a whole number"),
    (ENTRY.replace("512", "true"), "no 'length' that is a whole number"),
    (ENTRY.replace("512", "9" * 5000), "not JSON"),
    (ENTRY.replace("512", "9" * 70000), "65536 characters or more"),
    (ENTRY.replace('"length": 512, ', ""), "no 'length' that"),
    (ENTRY.replace("true", "1"), "no 'data' that is true or false"),
    (ENTRY.replace("true", "false"), "neither data nor zero"),
    ('{"start": ' + "[" * 30_000, "nested too deeply"),
    ('{"start": "' + "x" * 70_000 + '"}', "65536 characters or more"),
]


@pytest.mark.parametrize(("text", "words"), BAD_MAPS)
def test_bad_maps(tmp_path: Path, text: str, words: str) -> None:
    path = write(tmp_path / "map", text)
    with pytest.raises(ImgcoreError, match=words) as caught:
        listed(path)
    assert caught.value.path == str(path)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_binary_files(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(f"[{ENTRY},\xff\xfe\x00".encode("latin-1"))
    with pytest.raises(FormatError, match="not a text"):
        listed(path)
    for content in (bytes(1000), b"QFI\xfb" + bytes(1000), b"[\xff", b"\xff\xfe[", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(WrongFormatError, match="not a list of changed areas"):
            listed(path)
    with pytest.raises(ImgcoreError, match="is a folder|is a directory"):
        listed(tmp_path)


# -- VMware ----------------------------------------------------------------------------


def extent(start: int, length: int, **more: object) -> dict[str, object]:
    return {**more, "start": start, "length": length}


def response(
    areas: list[dict[str, object]], start: object = 0, length: object = MIB, **more: object
) -> dict[str, object]:
    return {**more, "startOffset": start, "length": length, "changedArea": areas}


AREAS = [(65536, 65536), (512 * 1024, 512)]
EXTENTS = [extent(*area) for area in AREAS]
# As pyVmomi 9 writes it.
PYVMOMI: dict[str, object] = {
    "dynamicType": None,
    "dynamicProperty": [],
    "_vimtype": "vim.VirtualMachine.DiskChangeInfo",
}
PYVMOMI_EXTENTS = [
    extent(*area, **PYVMOMI | {"_vimtype": f"{PYVMOMI['_vimtype']}.DiskChangeExtent"})
    for area in AREAS
]
CAPITALS = {
    "StartOffset": 0,
    "Length": MIB,
    "ChangedArea": [{"Start": start, "Length": length} for start, length in AREAS],
}
RESPONSES = {
    "one": json.dumps(response(EXTENTS)),
    "array": json.dumps([response(EXTENTS)]),
    "pyvmomi": json.dumps(response(PYVMOMI_EXTENTS, **PYVMOMI)),
    "pyvmomi-sorted": json.dumps([response(PYVMOMI_EXTENTS, **PYVMOMI)], indent=4, sort_keys=True),
    "powercli": json.dumps(CAPITALS, indent=4).replace("\n", "\r\n"),
    "strings": json.dumps(response([extent(*map(str, area)) for area in AREAS], "0", str(MIB))),  # type: ignore[arg-type]
    "pages": json.dumps(
        [
            response(EXTENTS[:1], 0, 256 * 1024),
            {"startOffset": 256 * 1024, "length": 4096},
            {"startOffset": 260 * 1024, "length": 4096, "changedArea": None},
            response(EXTENTS[1:], 264 * 1024, MIB - 264 * 1024),
        ]
    ),
    "lines": "\n".join(
        json.dumps(one)
        for one in (response(EXTENTS[:1], 0, 1 << 19), response(EXTENTS[1:], 1 << 19, 1 << 19))
    ),
}


@pytest.mark.parametrize("name", RESPONSES)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_responses_of_vmware(tmp_path: Path, name: str, encoding: str) -> None:
    path = write(tmp_path / "a.json", RESPONSES[name], encoding)
    assert listed(path) == [(*area, False) for area in AREAS]


def test_a_response_without_changes(tmp_path: Path) -> None:
    assert listed(write(tmp_path / "a", json.dumps(response([])))) == []


BAD_RESPONSES = [
    ([response(EXTENTS, 0, MIB // 2)], "ends here is of 524288 bytes from 0, but has areas from"),
    ([response(EXTENTS[:1], 0, MIB // 2)], "cover 524288 bytes, the disk has 1048576"),
    ([response([], 0, 2 * MIB)], "cover 2097152 bytes, the disk has 1048576"),
    ([response(EXTENTS[1:], MIB // 2, MIB // 2)], "starts at 524288 of the disk, not at 0"),
    ([response([]), response([])], "starts at 0 of the disk, not at 1048576"),
    ([response([extent(MIB, 512)])], "outside the disk"),
    ([response(EXTENTS[::-1])], "not sorted"),
    ([response(EXTENTS * 2)], "not sorted"),
    ([response([extent(0, 0)])], "has a length of 0"),
    ([response([1])], "1 instead of an area"),  # type: ignore[list-item]
    ([response([{"start": 1}])], "no 'length' that is a whole number"),
    ([response([], "0x0")], "no 'startoffset' that is a whole number"),
    ([response([], None)], "no 'startoffset' that is a whole number"),
    ([{"startOffset": 0, "changedArea": []}], "no 'length' that is a whole number"),
    ([response([]), 1], "1|instead of {"),
    # PowerShell's ConvertTo-Json, where its -Depth ends.
    ([response("VMware.Vim.DiskChangeExtent")], "DiskChangeExtent' instead of the areas"),  # type: ignore[arg-type]
    ([response({"start": 0, "length": 512})], "instead of the areas"),  # type: ignore[arg-type]
    ([response([], STARTOFFSET=0)], "'startoffset' twice"),
    ([response([extent(0, 512, Start=512)])], "has a key twice"),
]


@pytest.mark.parametrize(("responses", "words"), BAD_RESPONSES)
def test_bad_responses(tmp_path: Path, responses: object, words: str) -> None:
    path = write(tmp_path / "a.json", json.dumps(responses))
    with pytest.raises(FormatError, match=words) as caught:
        listed(path)
    assert caught.value.path == str(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        '[{"start": 0, "start": 4096, "length": 512, "zero": false, "data": true}]',
        '{"startOffset": 0, "length": 1048576, "changedArea": [{"start": 0, "start": 1}]}',
    ],
)
def test_a_key_twice(tmp_path: Path, text: str) -> None:
    with pytest.raises(FormatError, match="has a key twice, at character"):
        listed(write(tmp_path / "a.json", text + " " * 100_000))


def test_a_change_tracking_file(tmp_path: Path) -> None:
    """Only its magic is known; what is advised is read."""
    path = tmp_path / "a-ctk.vmdk"
    path.write_bytes(b"\xa2\x72\x19\xf6\1\0\0\0" + bytes(4088))
    with pytest.raises(UnsupportedFeatureError, match="use the JSON of QueryChangedDiskAreas"):
        listed(path)
    test_responses_of_vmware(tmp_path, "one", "utf-8")


# -- block maps ------------------------------------------------------------------------


class Disk:
    """An open image, as block maps need it."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def readinto(self, offset: int, buffer: memoryview) -> int:
        buffer[:] = self.content[offset : offset + len(buffer)]
        return len(buffer)


def bmaptool(*words: object) -> None:
    if shutil.which("bmaptool") is None:
        pytest.skip("bmaptool is not installed (Debian: bmap-tools)")
    qemu.checked(["bmaptool", *map(str, words)])


@pytest.mark.parametrize("size", [MIB, MIB + 512, 5 * MIB - 1])
def test_bmaptool_copies_by_our_map(tmp_path: Path, size: int) -> None:
    content = random.Random(2).randbytes(size)
    raw, target, path = tmp_path / "a.raw", tmp_path / "b.raw", tmp_path / "a.bmap"
    raw.write_bytes(content)
    areas = [Area(0, 100, False), Area(8192, 4096, True), Area(12288, 1, False)]
    areas += [Area(size - 70_000, 65536, False), Area(size - 1, 1, False)]
    path.write_text(bmap_of(areas, Disk(content), size))
    bmaptool("copy", "--bmap", path, raw, target)
    expected = bytearray(size)
    for offset, length, _ in areas:
        low, high = offset // 4096 * 4096, -(-(offset + length) // 4096) * 4096
        expected[low:high] = content[low:high]
    # It leaves out the end of the file if that is not mapped.
    assert target.read_bytes() == expected
    assert listed(path, size) == list(
        rounded((area._replace(is_zero=False) for area in areas), 4096, size)
    )
    # It verifies what it copies.
    raw.write_bytes(bytes(size))
    with pytest.raises(AssertionError, match="checksum mismatch"):
        bmaptool("copy", "--bmap", path, raw, target)


def test_a_map_of_bmaptool(tmp_path: Path) -> None:
    raw, path = tmp_path / "a.raw", tmp_path / "a.bmap"
    with raw.open("wb") as file:
        for at in (0, 3 * MIB, 9 * MIB):
            file.seek(at)
            file.write(b"x" * 10_000)
        file.truncate(16 * MIB + 100)
    bmaptool("create", "-o", path, raw)
    found = listed(path, raw.stat().st_size)
    assert found == [(at, 12288, False) for at in (0, 3 * MIB, 9 * MIB)]


def bmap(change: Callable[[str], str] = str, *, size: int = MIB, fix: bool = True) -> str:
    """Return a changed block map whose checksum is right."""
    text = change(bmap_of([Area(0, 8192, False), Area(65536, 1, False)], Disk(bytes(size)), size))
    if not fix or (found := re.search("BmapFileChecksum> ([0-9a-f]{64}) <", text)) is None:
        return text
    zeroed = text.replace(found[1], "0" * 64)
    return zeroed.replace("0" * 64, hashlib.sha256(zeroed.encode()).hexdigest())


BAD_BMAPS: list[tuple[Callable[[str], str], str]] = [
    (lambda text: text[:-8], "not XML: no element found|not XML: unclosed"),
    (lambda text: text + "x", "not XML: junk after document"),
    (lambda text: "<html></html>", "not a list of changed areas, but XML with the root 'html'"),
    (lambda text: text.replace('"2.0"', '"3.0"'), "version '3.0', allowed is 2.0"),
    (lambda text: text.replace('"2.0"', '"1.3"'), "version '1.3', allowed is 2.0"),
    (
        lambda text: text.replace("<bmap", '<!DOCTYPE bmap [<!ENTITY a "0">]>\n<bmap', 1),
        "a document type",
    ),
    (lambda text: text.replace('1.0" ?', '1.0" encoding="EBCDIC-XX" ?'), "not XML"),
    (lambda text: text.replace("sha256", "sha000"), "unknown checksum type 'sha000'"),
    (lambda text: text.replace("sha256", "shake_128"), "unknown checksum type 'shake_128'"),
    (lambda text: text.replace(" 4096 ", " 0 "), "256 blocks of 0 bytes"),
    (lambda text: text.replace(" 4096 ", " -1 "), "BlockSize is '-1', not a number"),
    (lambda text: text.replace(" 4096 ", " 512 "), "256 blocks of 512 bytes in an image of"),
    (lambda text: text.replace(" 4096 ", f" {'9' * 5000} "), "BlockSize is '9999"),
    (lambda text: text.replace("MappedB", "Mappedb"), "without MappedBlocksCount"),
    (lambda text: text.replace("Count> 3 <", "Count> 4 <"), "3 blocks in the ranges, but .* is 4"),
    (lambda text: text.replace(" 0-1 ", " 0-1-2 "), "range ' 0-1-2 ', allowed is FIRST-LAST"),
    (lambda text: text.replace(" 0-1 ", " 1-0 "), "0 blocks|1 blocks"),
    (lambda text: text.replace(" 0-1 ", " 17-18 "), "not sorted"),
    (lambda text: text.replace(" 16 ", " 1 "), "they overlap"),
    (lambda text: text.replace(" 16 ", " 256 "), "outside the disk"),
    (lambda text: text.replace(" 16 ", f" {'9' * 19} "), "exceeds 2"),
    (lambda text: text.replace(" 0-1 ", " <a/> "), "element 'a' inside 'Range'"),
    (lambda text: text.replace("<BlockMap>", "<BlockMap><Area/>"), "'Area' inside 'BlockMap'"),
    (lambda text: text.replace("<BlockMap>", "<BlockMap/><BlockMap>"), "two elements 'BlockMap'"),
    (lambda text: "<bmap version='2.0'>" * 100_000, "element 'bmap' inside 'bmap'|not XML"),
]


@pytest.mark.parametrize(("change", "words"), BAD_BMAPS)
def test_bad_block_maps(tmp_path: Path, change: Callable[[str], str], words: str) -> None:
    path = write(tmp_path / "a.bmap", bmap(change))
    with pytest.raises(ImgcoreError, match=words) as caught:
        listed(path)
    assert caught.value.path == str(path)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_a_block_map_of_another_disk(tmp_path: Path) -> None:
    path = write(tmp_path / "a.bmap", bmap())
    assert listed(path) == [(0, 8192, False), (65536, 4096, False)]
    with pytest.raises(FormatError, match="of a disk of 1048576 bytes, this one has 2097152"):
        listed(path, 2 * MIB)


def test_each_changed_character_is_noticed(tmp_path: Path) -> None:
    text = bmap()
    for at in range(0, len(text), 7):
        changed = text[:at] + chr(ord(text[at]) ^ 1) + text[at + 1 :]
        with pytest.raises(ImgcoreError):
            listed(write(tmp_path / "a.bmap", changed))


def test_large_block_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.bmap"
    with path.open("w") as file:
        file.write("<bmap version='2.0'>")
        file.truncate((16 << 20) + 1)
    with pytest.raises(LimitExceededError, match="the XML has 16777217 bytes"):
        listed(path)
    monkeypatch.setattr(limits, "AREAS_MAX_XML_NBYTES", 20_000)
    areas = [Area(n * 8192, 1, False) for n in range(MIB // 8192)]
    assert len(bmap_of(areas, Disk(bytes(MIB)), MIB)) < 20_000
    monkeypatch.setattr(limits, "AREAS_MAX_XML_NBYTES", 10_000)
    with pytest.raises(LimitExceededError, match="the block map would have more than 10000"):
        bmap_of(areas, Disk(bytes(MIB)), MIB)


# -- any file --------------------------------------------------------------------------

Cuts: TypeAlias = list[tuple[int, bool]]
AREA_LISTS = st.lists(st.tuples(st.integers(0, 3000), st.booleans()), unique_by=itemgetter(0))


@settings(max_examples=50, deadline=None)
@given(cuts=AREA_LISTS)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, cuts: Cuts) -> None:
    cuts = sorted(cuts)
    areas = [
        Area(a, b - a, is_zero=zero)
        for (a, zero), (b, _) in list(pairwise(cuts))[:: 1 + len(cuts) % 2]
    ]
    path = tmp_path_factory.getbasetemp() / "round"
    write(path, "".join(map_lines(areas)))
    assert listed(path, 3000) == listed(areas, 3000)
    write(path, bmap_of(areas, Disk(bytes(3000)), 3000))
    assert listed(path, 3000) == ([(0, 3000, False)] if areas else [])
    write(path, json.dumps(response([extent(*area[:2]) for area in areas], 0, 3000)))
    data = [area._replace(is_zero=False) for area in areas]
    assert listed(path, 3000) == listed(data, 3000)


@pytest.mark.parametrize("text", [*RESPONSES.values(), bmap(), f"[{ENTRY},\n{ENTRY}]"])
def test_cut_and_damaged_files(tmp_path: Path, text: str) -> None:
    """Each ends with an error of imgcore, or with areas inside the disk."""
    rng = random.Random(3)
    path, whole = tmp_path / "a", text.encode()
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(rng.randrange(4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        cut = bytes(data[: rng.randrange(len(data))])
        for damaged in (cut, bytes(data) + rng.randbytes(3), cut + whole):
            path.write_bytes(damaged)
            try:
                for area in listed(path):
                    assert 0 <= area.offset < area.offset + area.length <= MIB
            except ImgcoreError as error:
                assert error.path == str(path)
                assert "\n" not in str(error)
