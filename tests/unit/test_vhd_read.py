"""Reading VHD: which footer and which size count; the BAT and the sector bitmaps."""

from __future__ import annotations

import gzip
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.helpers import command, vhd
from tests.helpers.images import noise
from tests.helpers.reading import extent_rows, poke
from tests.helpers.vhd import Block, be32, be64

import imgcore
from imgcore import CorruptImageError, LimitExceededError, UnsupportedFeatureError, WrongFormatError
from imgcore.engine.extents import Kind

BLOCK = 8192
SECTOR = vhd.SECTOR
SIZE = 5 * BLOCK + 3 * SECTOR
DATA = noise(BLOCK)
# Offset of the first block's data: after headers, one sector of BAT, sector bitmap.
FIRST = vhd.TABLE_OFFSET + 2 * SECTOR
STRIDE = SECTOR + BLOCK


def dynamic(tmp_path: Path, blocks: dict[int, Block] | None = None, **fields: Any) -> Path:
    blocks = {1: Block(DATA), 4: Block(noise(BLOCK, 4))} if blocks is None else blocks
    return vhd.dynamic(tmp_path / "a.vhd", SIZE, blocks, block_nbytes=BLOCK, **fields)


def rows_of(path: Path, start: int = 0, length: int | None = None) -> list[tuple[Any, ...]]:
    """Return (guest offset, length, kind, host offset of data) of every row."""
    reader = vhd.open_vhd(path)
    rows = extent_rows(reader, start, length)
    reader.close()
    return [(row[0], row[1], Kind(row[5]).name, row[2]) for row in rows]


class TestBlocks:
    def test_declared_blocks(self, tmp_path: Path) -> None:
        path = dynamic(tmp_path)
        assert rows_of(path) == [
            (0, BLOCK, "HOLE", 0),
            (BLOCK, BLOCK, "DATA", FIRST),
            (2 * BLOCK, 2 * BLOCK, "HOLE", 0),
            (4 * BLOCK, BLOCK, "DATA", FIRST + STRIDE),
            (5 * BLOCK, 3 * SECTOR, "HOLE", 0),
        ]

    def test_part_of_a_block(self, tmp_path: Path) -> None:
        path = dynamic(tmp_path)
        assert rows_of(path, BLOCK + 1024, 2048) == [(BLOCK + 1024, 2048, "DATA", FIRST + 1024)]
        assert rows_of(path, BLOCK - 512, 1024) == [
            (BLOCK - 512, 512, "HOLE", 0),
            (BLOCK, 512, "DATA", FIRST),
        ]

    def test_last_block_is_cut_by_the_disk(self, tmp_path: Path) -> None:
        path = dynamic(tmp_path, {5: Block(DATA)})
        assert rows_of(path)[-1] == (5 * BLOCK, 3 * SECTOR, "DATA", FIRST)

    @pytest.mark.parametrize(
        ("disk_type", "absent"), [(vhd.DYNAMIC, "ZERO"), (vhd.DIFFERENCING, "HOLE")]
    )
    def test_bitmap_is_honoured_by_the_sector(
        self, tmp_path: Path, disk_type: int, absent: str
    ) -> None:
        """The bits are 11001000; some readers take a byte from its other end."""
        blocks = {0: Block(DATA, frozenset({0, 1, 4}))}
        fields = {"parent_uuid": vhd.PARENT_UUID, "parent_name": "p.vhd"}
        path = dynamic(tmp_path, blocks, disk_type=disk_type, **fields)
        assert rows_of(path, 0, BLOCK) == [
            (0, 1024, "DATA", FIRST),
            (1024, 1024, absent, 0),
            (2048, 512, "DATA", FIRST + 2048),
            (2560, BLOCK - 2560, absent, 0),
        ]

    @pytest.mark.parametrize("block_nbytes", [512, 4096, 1 << 19, 1 << 21, 1 << 25])
    def test_block_sizes(self, tmp_path: Path, block_nbytes: int) -> None:
        path = vhd.dynamic(
            tmp_path / "a.vhd", 2 * block_nbytes, {1: Block(b"\x07")}, block_nbytes=block_nbytes
        )
        with imgcore.open(path) as image:
            assert image.block_size == block_nbytes
            assert image.read(block_nbytes - 1, 3) == b"\0\x07\0"
            assert image.read(2 * block_nbytes - 1, 1) == b"\0"

    def test_no_blocks_at_all(self, tmp_path: Path) -> None:
        path = vhd.dynamic(tmp_path / "a.vhd", 0, {})
        assert imgcore.info(path)["virtual-size"] == 0
        assert rows_of(path) == []

    @settings(
        max_examples=60,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(
        bits=st.lists(st.sets(st.integers(0, 15)) | st.none(), min_size=1, max_size=6),
        cut=st.tuples(st.integers(0, 90), st.integers(1, 90)),
    )
    def test_any_bitmaps(
        self, tmp_path: Path, bits: list[set[int] | None], cut: tuple[int, int]
    ) -> None:
        blocks = {
            index: Block(noise(BLOCK, index), None if chosen is None else frozenset(chosen))
            for index, chosen in enumerate(bits)
        }
        size = len(bits) * BLOCK
        path = vhd.dynamic(tmp_path / "a.vhd", size, blocks, block_nbytes=BLOCK)
        expected = bytearray(size)
        for index, block in blocks.items():
            for sector in range(16) if block.bits is None else block.bits:
                at = index * BLOCK + sector * SECTOR
                expected[at : at + SECTOR] = block.data[sector * SECTOR : (sector + 1) * SECTOR]
        start = min(cut[0] * SECTOR, size - SECTOR)
        length = min(cut[1] * SECTOR, size - start)
        with imgcore.open(path) as image:
            assert image.read(0, size) == expected
            assert image.read(start, length) == expected[start : start + length]

    def test_batches_stay_bounded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("imgcore.formats.vhd.tables.MAX_BATCH_ROWS", 8)
        blocks = {i: Block(DATA, frozenset(range(0, 16, 2))) for i in range(5)}
        path = dynamic(tmp_path, blocks)
        reader = vhd.open_vhd(path)
        batches = list(reader.extents(0, SIZE))
        reader.close()
        assert all(1 <= len(batch) <= 8 for batch in batches)
        assert sum(int(batch["length"].sum()) for batch in batches) == SIZE
        assert sum(len(batch) for batch in batches) == 5 * 16 + 1


# Offsets count from the footer's copy, which the header follows, as in `poke_sound`.
FOOTER_CASES = {
    "version": ((12, be32(0x00020000)), UnsupportedFeatureError, "version 0x00020000"),
    "type-none": ((60, be32(0)), UnsupportedFeatureError, "disk type 0"),
    "type-reserved": ((60, be32(6)), UnsupportedFeatureError, "disk type 6"),
    "header-past-the-end": ((16, be64(1 << 40)), CorruptImageError, "past the end of the file"),
    "header-wraps": ((16, be64((1 << 64) - 2)), CorruptImageError, "past the end of the file"),
    "no-header-there": ((16, be64(0)), CorruptImageError, "no dynamic disk header at 0x0"),
    "odd-size": ((48, be64(SIZE + 1)), CorruptImageError, "not a multiple of 512"),
    "size-beyond-the-bat": ((48, be64(1 << 30)), CorruptImageError, "a BAT of 6 entries"),
    "petabytes": ((48, be64(1 << 60)), LimitExceededError, "at most 2190433320960 are allowed"),
}
HEADER_CASES = {
    "cookie": ((512, b"cxsparsf"), CorruptImageError, "its cookie is b'cxsparsf'"),
    "version": ((512 + 24, be32(0x00030000)), UnsupportedFeatureError, "version 0x00030000"),
    "block-0": ((512 + 32, be32(0)), LimitExceededError, "blocks of 0 bytes"),
    "block-256": ((512 + 32, be32(256)), LimitExceededError, "blocks of 256 bytes"),
    "block-odd": ((512 + 32, be32(12288)), LimitExceededError, "blocks of 12288 bytes"),
    "block-512-mib": ((512 + 32, be32(1 << 29)), LimitExceededError, "blocks of 536870912"),
    "bat-short": ((512 + 28, be32(5)), CorruptImageError, "needs 6"),
    "bat-huge": ((512 + 28, be32(0xFFFFFFFF)), CorruptImageError, "past the end of the file"),
    "bat-past-the-end": ((512 + 16, be64(1 << 50)), CorruptImageError, "past the end of the file"),
}


class TestRefusals:
    @pytest.mark.parametrize("name", FOOTER_CASES)
    def test_footer(self, tmp_path: Path, name: str) -> None:
        change, error, match = FOOTER_CASES[name]
        path = vhd.poke_sound(dynamic(tmp_path), change)
        with pytest.raises(error, match=match) as caught:
            vhd.open_vhd(path)
        assert str(caught.value).startswith(f"{path}: ")

    @pytest.mark.parametrize("name", HEADER_CASES)
    def test_header(self, tmp_path: Path, name: str) -> None:
        change, error, match = HEADER_CASES[name]
        path = vhd.poke_sound(dynamic(tmp_path), change)
        with pytest.raises(error, match=match):
            vhd.open_vhd(path)

    def test_header_checksum(self, tmp_path: Path) -> None:
        path = poke(dynamic(tmp_path), (512 + 800, b"\x01"))
        with pytest.raises(CorruptImageError, match="header states the checksum 0x"):
            vhd.open_vhd(path)

    def test_largest_block(self, tmp_path: Path) -> None:
        path = vhd.poke_sound(dynamic(tmp_path), (512 + 32, be32(256 << 20)))
        reader = vhd.open_vhd(path)
        assert reader.block_nbytes == 256 << 20
        reader.close()

    def test_largest_dynamic_disk(self, tmp_path: Path) -> None:
        limit = 2040 << 30
        path = tmp_path / "a.vhd"
        n_entries = limit >> 21
        the_footer = vhd.footer(limit)
        with open(path, "wb") as file:
            file.write(the_footer + vhd.header(n_entries, 1 << 21))
            file.write(b"\xff" * (4 * n_entries))
            file.write(the_footer)
        assert rows_of(path)[0][2] == "HOLE"
        assert imgcore.info(path)["virtual-size"] == limit
        vhd.poke_sound(path, (48, be64(limit + 512)))
        with pytest.raises(LimitExceededError, match="a dynamic disk of"):
            vhd.open_vhd(path)

    @pytest.mark.parametrize("sector", [20, 37, 0x00FFFFFF, 0xFFFFFFFE])
    def test_block_past_the_end(self, tmp_path: Path, sector: int) -> None:
        path = poke(dynamic(tmp_path, {1: Block(DATA)}), (vhd.TABLE_OFFSET, be32(sector)))
        with pytest.raises(CorruptImageError, match=r"block 0 is at 0x.*past the end of the file"):
            rows_of(path)

    def test_block_whose_bitmap_ends_the_one_before(self, tmp_path: Path) -> None:
        """Its data would follow the other's without a gap, which no VHD has."""
        path = dynamic(tmp_path, {1: Block(DATA), 4: Block(DATA)})
        second = FIRST // SECTOR - 1 + BLOCK // SECTOR
        poke(path, (vhd.TABLE_OFFSET + 8, be32(second)))
        with pytest.raises(CorruptImageError, match="block 2 overlaps block 1"):
            rows_of(path)

    def test_last_block_upon_the_footer(self, tmp_path: Path) -> None:
        """A file that is cut inside its last block and has a footer is rejected."""
        path = dynamic(tmp_path, {1: Block(DATA), 4: Block(DATA)})
        whole = path.read_bytes()
        path.write_bytes(whole[: -2 * SECTOR] + whole[-SECTOR:])
        with pytest.raises(CorruptImageError, match="block 4 at 0x.* overlaps the footer$"):
            rows_of(path)

    @pytest.mark.parametrize("nbytes", [0, 1, 511, 512, 1535, 2000, FIRST + BLOCK - 1])
    def test_cut_short(self, tmp_path: Path, nbytes: int) -> None:
        """If only the footer's copy is left, missing blocks are an error."""
        path = dynamic(tmp_path)
        path.write_bytes(path.read_bytes()[:nbytes])
        with pytest.raises((CorruptImageError, WrongFormatError)):
            rows_of(path)

    @pytest.mark.parametrize("last", [5, 4])
    def test_blocks_cut_off_with_the_footer(self, tmp_path: Path, last: int) -> None:
        """Opening the image finds them; a last block may end where the disk does."""
        path = dynamic(tmp_path, {1: Block(DATA), last: Block(DATA)})
        held_nbytes = 3 * SECTOR if last == 5 else BLOCK
        whole = path.read_bytes()
        path.write_bytes(whole[: FIRST + STRIDE + held_nbytes])
        assert rows_of(path)
        path.write_bytes(whole[: FIRST + STRIDE + held_nbytes - 1])
        with pytest.raises(CorruptImageError, match=f"block {last} ends at 0x.* is truncated"):
            vhd.open_vhd(path)

    def test_a_bat_too_large_to_search(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A lost block is then found when it is read."""
        path = dynamic(tmp_path)
        path.write_bytes(path.read_bytes()[: -SECTOR - BLOCK])
        monkeypatch.setattr("imgcore.formats.vhd.header.VHD_MAX_BLOCKS_VERIFIED_AT_OPEN", 5)
        vhd.open_vhd(path).close()
        with pytest.raises(CorruptImageError):
            rows_of(path)

    def test_no_footer(self, tmp_path: Path) -> None:
        path = tmp_path / "a.vhd"
        path.write_bytes(bytes(4096))
        with pytest.raises(WrongFormatError, match="no VHD footer"):
            vhd.open_vhd(path)


class TestFooters:
    def test_sound(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        vhd.open_vhd(dynamic(tmp_path)).close()
        vhd.open_vhd(vhd.fixed(tmp_path / "f.vhd", DATA)).close()
        assert caplog.records == []

    @pytest.mark.parametrize(
        ("damage", "words"),
        [
            ((-SECTOR + 100, b"\x01"), "states the checksum"),
            ((-SECTOR, b"\0" * SECTOR), "there is no footer at the end"),
        ],
        ids=["checksum", "gone"],
    )
    def test_bad_end(
        self,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
        damage: tuple[int, bytes],
        words: str,
    ) -> None:
        path = dynamic(tmp_path)
        before = rows_of(path)
        poke(path, (path.stat().st_size + damage[0], damage[1]))
        with caplog.at_level(logging.WARNING, "imgcore"):
            assert rows_of(path) == before
        assert [words in record.message for record in caplog.records] == [True]
        assert "using its copy at the start" in caplog.text

    @pytest.mark.parametrize(
        ("damage", "words"),
        [
            ((100, b"\x01"), "using the one at the end"),
            ((0, b"\0" * SECTOR), "no copy of the footer"),
            ((0, vhd.footer(SIZE, timestamp=9)), "differ; using the one at the end"),
        ],
        ids=["checksum", "gone", "other"],
    )
    def test_bad_copy(
        self,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
        damage: tuple[int, bytes],
        words: str,
    ) -> None:
        path = dynamic(tmp_path)
        before = rows_of(path)
        poke(path, damage)
        with caplog.at_level(logging.WARNING, "imgcore"):
            assert rows_of(path) == before
        assert words in caplog.text

    def test_both_bad(self, tmp_path: Path) -> None:
        path = dynamic(tmp_path)
        end = path.stat().st_size - SECTOR
        poke(path, (100, b"\x01"), (end + 100, b"\x02"))
        with pytest.raises(CorruptImageError, match=f"footer at {end:#x} states the checksum"):
            vhd.open_vhd(path)

    def test_old_footer_of_511_bytes(self, tmp_path: Path) -> None:
        path = vhd.fixed(tmp_path / "old.vhd", DATA)
        path.write_bytes(path.read_bytes()[:-1])
        with imgcore.open(path) as image:
            assert (image.format, image.virtual_size) == ("vhd", BLOCK)
            assert image.read(0, BLOCK) == DATA
        path = dynamic(tmp_path)
        before = rows_of(path)
        path.write_bytes(path.read_bytes()[:-1])
        assert rows_of(path) == before

    def test_what_a_guest_writes_into_a_fixed_disk_is_data(self, tmp_path: Path) -> None:
        inner = dynamic(tmp_path).read_bytes()
        path = vhd.fixed(tmp_path / "f.vhd", inner)
        with imgcore.open(path) as image:
            assert image.subformat == "fixed"
            assert image.read(0, len(inner)) == inner

    def test_fixed_disk_without_its_footer(self, tmp_path: Path) -> None:
        """A footer in the first sector of a fixed disk is guest data, not a copy."""
        path = tmp_path / "f.vhd"
        path.write_bytes(vhd.footer(BLOCK, vhd.FIXED) + DATA)
        with pytest.raises(CorruptImageError, match="the file is truncated"):
            vhd.open_vhd(path)

    def test_truncated_fixed_disk(self, tmp_path: Path) -> None:
        path = tmp_path / "f.vhd"
        path.write_bytes(DATA[:4096] + vhd.footer(BLOCK, vhd.FIXED, chs=(1, 1, 3)))
        with pytest.raises(CorruptImageError, match="a fixed disk of 8192 bytes, but only 4096"):
            vhd.open_vhd(path)


CHS = (2, 4, 17)
CHS_NBYTES = 2 * 4 * 17 * SECTOR
CURRENT = CHS_NBYTES + 5 * SECTOR
MAXIMUM = (65535, 16, 255)


class TestSize:
    @pytest.mark.parametrize(
        ("creator", "chs", "option", "expected"),
        [
            *(
                (creator, CHS, None, (CHS_NBYTES, "chs", "creator"))
                for creator in (b"vpc ", b"vs  ", b"qemu")
            ),
            *(
                (creator, CHS, None, (CURRENT, "current", "creator"))
                for creator in (b"win ", b"d2v ", b"qem2", b"tap\0", b"CTXS", b"vbox", b"wa\0\0")
            ),
            (b"vpc ", (0, 0, 0), None, (CURRENT, "current", "geometry")),
            (b"vpc ", MAXIMUM, None, (CURRENT, "current", "geometry")),
            (b"vpc ", CHS, "current", (CURRENT, "current", "option")),
            (b"win ", CHS, "chs", (CHS_NBYTES, "chs", "option")),
            (b"win ", MAXIMUM, "chs", (CURRENT, "current", "geometry")),
        ],
    )
    def test_dynamic(
        self,
        tmp_path: Path,
        creator: bytes,
        chs: tuple[int, int, int],
        option: str | None,
        expected: tuple[int, str, str],
    ) -> None:
        fields = {"creator": creator, "chs": chs}
        path = vhd.dynamic(tmp_path / "a.vhd", CURRENT, {}, footer_fields=fields)
        reader = vhd.open_vhd(path, option)
        size = reader.info()["format-specific"]["data"]["size"]
        reader.close()
        assert (reader.virtual_size, size["from"], size["because"]) == expected
        assert (size["current"], size["chs"]) == (
            CURRENT,
            chs[0] * chs[1] * chs[2] * SECTOR,
        )

    @pytest.mark.parametrize(
        ("creator", "held", "expected"),
        [
            (b"win ", CURRENT, (CURRENT, "current", "creator")),
            (b"win ", CHS_NBYTES, (CHS_NBYTES, "chs", "file")),
            (b"vpc ", CURRENT, (CURRENT, "current", "file")),
            (b"vpc ", CHS_NBYTES, (CHS_NBYTES, "chs", "creator")),
            (b"win ", CURRENT + SECTOR, (CURRENT, "current", "creator")),
        ],
    )
    def test_fixed(
        self, tmp_path: Path, creator: bytes, held: int, expected: tuple[int, str, str]
    ) -> None:
        path = tmp_path / "f.vhd"
        path.write_bytes(bytes(held) + vhd.footer(CURRENT, vhd.FIXED, creator=creator, chs=CHS))
        size = imgcore.info(path)["format-specific"]["data"]["size"]
        got = imgcore.info(path)["virtual-size"]
        assert (got, size["from"], size["because"]) == expected


def test_info(tmp_path: Path) -> None:
    path = dynamic(tmp_path, footer_fields={"timestamp": 5, "saved": 1, "creator": b"tap\0"})
    info = imgcore.info(path)
    data = info["format-specific"]["data"]
    assert (info["format"], info["cluster-size"]) == ("vhd", BLOCK)
    assert data["subformat"] == "dynamic"
    assert data["uuid"] == "00112233-4455-6677-8899-aabbccddeeff"
    assert (data["creator"], data["creator-version"], data["creator-os"]) == ("tap", "10.0", "Wi2k")
    assert (data["timestamp"], data["saved-state"]) == (946684805, True)
    assert data["geometry"] == {"cylinders": 1, "heads": 4, "sectors": 17}
    assert "parent-uuid" not in data


@pytest.mark.parametrize("name", ["vhd", "vpc", None])
def test_names_of_the_format(tmp_path: Path, name: str | None) -> None:
    with imgcore.open(dynamic(tmp_path), format=name) as image:
        assert image.format == "vhd"


def test_nothing_of_numpy_is_needed_for_headers(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys, imgcore\n"
        f"imgcore.info({str(dynamic(tmp_path))!r})\n"
        "assert 'numpy' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class TestReadOptions:
    def make(self, tmp_path: Path) -> Path:
        fields = {"creator": b"win ", "chs": CHS}
        return vhd.dynamic(tmp_path / "a.vhd", CURRENT, {}, footer_fields=fields)

    def test_every_verb(self, tmp_path: Path) -> None:
        path, options = self.make(tmp_path), ["size=chs"]
        with imgcore.open(path, read_options=options) as image:
            assert image.virtual_size == CHS_NBYTES
        assert imgcore.info(path, read_options={"size": "chs"})["virtual-size"] == CHS_NBYTES
        chain = imgcore.info(path, chain=True, read_options=options)
        assert chain[0]["virtual-size"] == CHS_NBYTES
        assert sum(entry.length for entry in imgcore.map(path, read_options=options)) == CHS_NBYTES
        assert imgcore.measure(path, read_options=options).required == CHS_NBYTES
        result = imgcore.convert(path, tmp_path / "a.raw", read_options=options, sync=False)
        assert result.virtual_size == CHS_NBYTES
        compared = imgcore.compare(path, path, read_options_a=options, strict=True)
        assert (compared.size_a, compared.size_b) == (CHS_NBYTES, CURRENT)

    @pytest.mark.parametrize("arguments", [("info",), ("map",)])
    def test_command(self, tmp_path: Path, arguments: tuple[str, ...]) -> None:
        done = command.imgcore(*arguments, "--json", "-o", "size=chs", self.make(tmp_path))
        assert str(CHS_NBYTES) in done.stdout

    @pytest.mark.parametrize(
        ("options", "match"),
        [(["size=big"], "allowed: chs, current"), (["cut=1"], "unknown option 'cut' for vhd")],
    )
    def test_refused(self, tmp_path: Path, options: list[str], match: str) -> None:
        with pytest.raises(imgcore.OptionError, match=match):
            imgcore.open(self.make(tmp_path), read_options=options)

    @pytest.mark.parametrize("name", ["a.raw", "a.raw.gz"])
    def test_formats_without_any(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / name
        path.write_bytes(gzip.compress(bytes(512)) if name.endswith("gz") else bytes(512))
        for use in (imgcore.info, imgcore.measure):
            with pytest.raises(imgcore.OptionError, match="raw has no options for reading"):
                use(path, read_options=["size=chs"])
        with pytest.raises(imgcore.OptionError, match="raw has no options for reading"):
            imgcore.convert(path, tmp_path / "b.vhd", read_options=["size=chs"])


@pytest.mark.parametrize("padding", ["hole", "zeros", "sector"])
def test_a_fixed_disk_before_zeros(
    padding: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The file was copied onto a larger volume, or padded to whole blocks."""
    content = noise(1 << 20)
    path = vhd.fixed(tmp_path / "a.vhd", content)
    end = path.stat().st_size
    with path.open("ab") as file:
        file.write(bytes({"hole": 0, "zeros": 3 << 20, "sector": 512}[padding]))
        if padding == "hole":
            # Holes are not read, however long they are.
            file.truncate(1 << 40)
    for stated in (None, "vhd"):
        imgcore.convert(path, tmp_path / "a.raw", format=stated, force=True)
        assert (tmp_path / "a.raw").read_bytes() == content
    assert f"{path.stat().st_size - end} bytes of zeros after its footer" in caplog.text
    assert imgcore.check(path).ok
    # Neither a disk named raw, nor one with other bytes after the footer.
    raw = path.rename(tmp_path / "b.raw")
    assert imgcore.info(raw)["format"] == "raw"
    with raw.open("rb") as file:
        (tmp_path / "d.vhd").write_bytes(file.read(end) + b"x" * 513)
    with pytest.raises(imgcore.WrongFormatError, match="no magic found"):
        imgcore.convert(tmp_path / "d.vhd", tmp_path / "d.raw")
