"""An open image of which a part fails, is damaged, or changes.

Only the reads that need the part fail; nothing that was wrong is remembered.
"""

from __future__ import annotations

import gc
import hashlib
import os
import random
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import imgcore
from tests.faults.harness import DISK, Source
from tests.helpers import images, qemu
from tests.helpers.qemu import Variant
from tests.helpers.random_access import NAMES, write_disks

PIECE = 4096
# Where DISK has noise, and where it has text; both in blocks without the other.
NOISE = images.MIB + 128 * images.KIB
FAR = 64 * images.KIB

PLAIN = (
    qemu.RAW,
    qemu.QCOW2,
    qemu.VMDK_SPARSE,
    qemu.VMDK_FLAT,
    qemu.VHD_DYNAMIC,
    qemu.VHDX_DYNAMIC,
    qemu.VDI,
)
COMPRESSED = (qemu.QCOW2_ZLIB, qemu.QCOW2_ZSTD, qemu.VMDK_STREAM)
TABLES_LAST = (qemu.QCOW2, *COMPRESSED)


def by_name(variants: tuple[Variant, ...]) -> Any:
    return pytest.mark.parametrize("variant", variants, ids=lambda v: v.name)


def digest(content: bytes, offset: int) -> str:
    return hashlib.sha256(content[offset : offset + PIECE]).hexdigest()


@pytest.mark.parametrize("cache", ["0", "32M"])
@by_name((*PLAIN, *COMPRESSED))
def test_a_part_that_cannot_be_read(
    variant: Variant,
    cache: str,
    source: Callable[[Variant], Source],
) -> None:
    """It is tried anew each time, also after it has become readable."""
    here = source(variant)
    with imgcore.open(here.image, format=variant.format) as image:
        (row,) = next(image.extents(NOISE, 512))
        at = int(row["host_offset"])
    bad = here.bad(at, at + 1)
    nothing = (0, 0, 0)
    ranges = [[NOISE, PIECE], [FAR, PIECE], [NOISE, PIECE], [0, PIECE]]
    # In the first phase the far part is read alone, so that its table is known.
    phases = [(nothing, [[FAR, PIECE]]), (bad, ranges), (nothing, ranges), (bad, ranges)]
    answer = here.place.agent.do(
        "read_ranges",
        {
            "path": here.image,
            "keywords": {"format": variant.format, "cache": cache},
            "phases": phases,
        },
    )
    assert answer["outcome"] == "ok", answer
    _, during, after, again = answer["result"]["phases"]
    right = [digest(here.content, offset) for offset, _ in ranges]
    assert after == right
    assert during[1::2] == again[1::2] == right[1::2]
    for text in during[::2]:
        assert text.startswith("OSError: "), text
        assert "Input/output error" in text
        assert "0x" in text
        assert here.data in text
    # A block that was decompressed before is still known, if there is a cache for it.
    if variant not in COMPRESSED or cache == "0":
        assert again == during


# -- damage ----------------------------------------------------------------------------


class Damaged:
    """An image with a damaged place, and what was there before."""

    def __init__(self, path: Path, offset: int, data: bytes) -> None:
        self.path, self.offset, self.data = path, offset, data
        with open(path, "rb") as file:
            file.seek(offset)
            self.before = file.read(len(data))

    def damage(self) -> None:
        self._write(self.data)

    def repair(self) -> None:
        self._write(self.before)

    def _write(self, data: bytes) -> None:
        with open(self.path, "r+b") as file:
            file.seek(self.offset)
            file.write(data)


def with_16_threads(call: Callable[[int], None]) -> None:
    """Call something on 16 threads at once; fail as the first that fails."""
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            call(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "source.raw"
    DISK.write(path)
    return path


def written(raw: Path, variant: Variant, *options: str) -> Path:
    """Write the disk in a format."""
    target = raw.with_name(f"disk{variant.suffix}")
    imgcore.convert(
        raw,
        target,
        target_format=variant.format,
        options=[*variant.options, *options],
        compress=variant.compress,
        sync=False,
    )
    return target


@by_name(COMPRESSED)
def test_a_damaged_block_is_never_cached(variant: Variant, raw: Path) -> None:
    content = raw.read_bytes()
    path = written(raw, variant)
    with imgcore.open(path, share=True) as image:
        (row,) = next(image.extents(0, 512))
        damaged = Damaged(path, int(row["host_offset"]) + 30, b"\xff" * 300)
        damaged.damage()

        def read(_: int) -> None:
            for _ in range(4):
                with pytest.raises(imgcore.CorruptImageError) as caught:
                    image.read(100, 10)
                assert path.name in str(caught.value)
                assert image.read(NOISE, PIECE) == content[NOISE : NOISE + PIECE]

        with_16_threads(read)
        damaged.repair()
        assert image.read(100, 1000) == content[100:1100]


@pytest.mark.parametrize("where", ["a block", "a table"])
def test_a_read_that_fails_keeps_nothing(where: str, raw: Path) -> None:
    """Neither the buffer nor the files wait for the collection of cycles."""
    path = written(raw, qemu.QCOW2_ZLIB)
    with imgcore.open(path, share=True) as image:
        if where == "a block":
            (row,) = next(image.extents(0, 512))
            Damaged(path, int(row["host_offset"]) + 30, b"\xff" * 300).damage()
        else:
            os.truncate(path, 512)
        buffer = np.zeros(4096, np.uint8)
        kept = weakref.ref(buffer)
        gc.disable()
        try:
            with pytest.raises(imgcore.CorruptImageError):
                image.readinto(5, buffer)
            del buffer
            assert kept() is None
        finally:
            gc.enable()


def test_a_damaged_table_entry_is_met_only_by_reads_of_its_cluster(raw: Path) -> None:
    content = raw.read_bytes()
    path = written(raw, qemu.QCOW2, "cluster_size=4k")
    whole = path.read_bytes()
    l1 = int.from_bytes(whole[40:48], "big")
    l2 = int.from_bytes(whole[l1 : l1 + 8], "big") & ((1 << 56) - 512)
    # The table has 2 MiB.  The entry leads out of the file.
    entry = Damaged(path, l2 + 8 * (NOISE // 4096), ((1 << 63) | (1 << 50)).to_bytes(8, "big"))
    entry.damage()
    elsewhere = [0, FAR, NOISE - 4096, NOISE + 4096, 3 * images.MIB - 4096]
    with imgcore.open(path, format="qcow2") as image:

        def read(number: int) -> None:
            rng = random.Random(number)
            for _ in range(30):
                offset = rng.choice((*elsewhere, NOISE))
                if offset != NOISE:
                    assert image.read(offset, PIECE) == content[offset : offset + PIECE]
                    continue
                with pytest.raises(imgcore.CorruptImageError) as caught:
                    image.read(offset, PIECE)
                assert "\n" not in str(caught.value)

        read(0)
        with_16_threads(read)
        with pytest.raises(imgcore.CorruptImageError):
            image.read(NOISE - 100, 200)


@by_name((*PLAIN, *COMPRESSED))
def test_a_file_that_is_cut_short(variant: Variant, raw: Path) -> None:
    """What is missing is an error and never zeros; the rest reads as before."""
    content = raw.read_bytes()
    path = written(raw, variant)
    with imgcore.open(path, format=variant.format, share=True) as image:
        (row,) = next(image.extents(NOISE, 512))
        data = Path(image.paths[int(row["file"])])
        assert image.read(FAR, PIECE) == content[FAR : FAR + PIECE]
        os.truncate(data, int(row["host_offset"]) + 100)

        def read(_: int) -> None:
            for _ in range(4):
                with pytest.raises((imgcore.ImgcoreError, OSError)) as caught:
                    image.read(NOISE, PIECE)
                assert data.name in str(caught.value)
                assert "\n" not in str(caught.value)
                try:
                    assert image.read(FAR, PIECE) == content[FAR : FAR + PIECE]
                except imgcore.CorruptImageError as error:
                    assert variant in TABLES_LAST, error

        with_16_threads(read)


@pytest.mark.parametrize("cache", ["0", "32M"])
@pytest.mark.parametrize("name", NAMES)
def test_noise_that_is_written_into_an_open_image(name: str, cache: str, tmp_path: Path) -> None:
    """Whatever is read, an error is one line, and the files are closed at the end."""
    path = write_disks(tmp_path, names=[name])[name].path
    rng = random.Random(name)
    files = [file for file in tmp_path.iterdir() if file.stem.startswith(Path(name).stem)]
    with imgcore.open(path, cache=cache, share=True) as image:
        nbytes = image.virtual_size

        def work(number: int) -> None:
            own = random.Random(number)
            for _ in range(25):
                if number == 0:
                    file = rng.choice(files)
                    Damaged(file, rng.randrange(file.stat().st_size), rng.randbytes(8)).damage()
                    continue
                offset = own.randrange(nbytes)
                length = min(own.choice((1, 512, 4096, 200_000)), nbytes - offset)
                try:
                    assert len(image.read(offset, length)) == length
                    image.readinto(offset, bytearray(length))
                except (imgcore.ImgcoreError, OSError) as error:
                    assert "\n" not in str(error)
                    assert "defect of imgcore" not in str(error)

        with_16_threads(work)
