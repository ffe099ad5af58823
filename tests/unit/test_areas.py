"""Lists of changed areas: files of each kind, normal form, rounding."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from tests.helpers import qemu

from imgcore.areas.area import Area
from imgcore.areas.normal import check_granularity, rounded
from imgcore.areas.qemu_map import map_lines
from imgcore.areas.reading import AreaList, read_areas
from imgcore.errors import FormatError, ImgcoreError, OptionError, WrongFormatError

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
    ([(1 << 70, 1)], r"entry 1 of the areas is from 1180591620717411303424"),
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
    with pytest.raises((TypeError, ValueError)):
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
        cuts = sorted(rng.sample(range(size + 1), min(size + 1, rng.randrange(2, 12))))
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
    text = " " * (1 << 20) + text + "\n" * (1 << 20)
    assert len(text) > 6 << 20
    assert listed(write(tmp_path / "map", text)) == areas


ENTRY = '{"start": 0, "length": 512, "data": true, "zero": false}'
BAD_MAPS = [
    ("", "not a list of changed areas"),
    ("MZ", "not a list of changed areas"),
    ("[", "not JSON|ends too early"),
    ("[1]", "1 instead of an object"),
    ("[[]]", r"\[\] instead of an object"),
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
    path.write_bytes(b"[\xff\xfe\x00")
    with pytest.raises(FormatError, match="not a text"):
        listed(path)
    path.write_bytes(bytes(1000))
    with pytest.raises(WrongFormatError, match="not a list of changed areas"):
        listed(path)
    with pytest.raises(ImgcoreError, match="is a folder|is a directory"):
        listed(tmp_path)
