"""Images that come in order: disorder, damage, ends, and faults of the stream."""

from __future__ import annotations

import errno
import io
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.helpers import vhdx, vmdk
from tests.helpers.images import MIB, SEED, noise, text
from tests.helpers.vmdk import GRAIN, SECTOR

import imgcore
from imgcore.disk import streamed_source, streamed_window
from imgcore.errors import (
    CorruptImageError,
    ImgcoreError,
    LimitExceededError,
    UnsupportedFeatureError,
)
from imgcore.formats.vmdk import streamed

N_GRAINS = 40
WRITTEN = (
    ("vmdk", ("subformat=streamOptimized",)),
    ("vmdk", ("subformat=monolithicSparse",)),
    ("vhd", ("subformat=dynamic",)),
    ("vhdx", ("block_size=1M",)),
    ("vdi", ()),
    ("qcow2", ()),
    ("qcow2", ("compression_type=zstd",)),
)


def grain(number: int) -> bytes:
    return (text if number % 2 else noise)(GRAIN, SEED + number)


def disk(numbers: list[int], n_grains: int = N_GRAINS) -> bytes:
    content = bytearray(n_grains * GRAIN)
    for number in numbers:
        content[number * GRAIN : (number + 1) * GRAIN] = grain(number)
    return bytes(content)


def stream(tmp_path: Path, numbers: list[int], layout: str = "footer") -> bytearray:
    """Return a streamOptimized image with its grains in a given order."""
    grains = {number: grain(number) for number in numbers}
    n_sectors = N_GRAINS * GRAIN // SECTOR
    path = vmdk.stream(tmp_path / "made.vmdk", n_sectors, grains, layout=layout)
    return bytearray(path.read_bytes())


def read(content: bytes | io.RawIOBase, tmp_path: Path, image_format: str = "vmdk") -> bytes:
    """Convert a stream to a raw disk, and leave nothing behind if that fails."""
    target = tmp_path / "read.raw"
    source = content if isinstance(content, io.RawIOBase) else io.BytesIO(content)
    try:
        imgcore.convert(source, target, format=image_format, sync=False, threads=2)
    except BaseException:
        assert not target.exists()
        raise
    found = target.read_bytes()
    target.unlink()
    return found


@pytest.mark.parametrize("layout", ["footer", "patched", "front"])
def test_grains_in_any_order(layout: str, tmp_path: Path) -> None:
    numbers = list(range(0, N_GRAINS, 3))
    random.Random(SEED).shuffle(numbers)
    assert read(stream(tmp_path, numbers, layout), tmp_path) == disk(numbers)


def test_grains_in_another_order_than_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "VMDK_MAX_SORTED_NBYTES", 8 * GRAIN)
    near = [index ^ 1 for index in range(N_GRAINS)]
    assert read(stream(tmp_path, near), tmp_path) == disk(near)
    far = stream(tmp_path, [*range(1, N_GRAINS), 0])
    assert read(far, tmp_path) == disk(list(range(N_GRAINS)))
    with pytest.raises(UnsupportedFeatureError, match="comes long after others.*to a file first"):
        imgcore.checksum(io.BytesIO(far), format="vmdk")


def test_a_grain_that_comes_twice(tmp_path: Path) -> None:
    image = stream(tmp_path, [1, 2, 3])
    at = image.index(struct.pack("<Q", 2 * GRAIN // SECTOR), 128 * SECTOR)
    image[at : at + 8] = struct.pack("<Q", GRAIN // SECTOR)
    with pytest.raises(CorruptImageError, match="comes twice"):
        read(image, tmp_path)


def metadata(image: bytearray, kind: int, n_sectors: int) -> int:
    """Return the offset of a marker."""
    return image.rindex(vmdk.marker(n_sectors, kind))


def _swap(image: bytearray, a: int, b: int, n_sectors: int) -> None:
    size = n_sectors * SECTOR
    image[a : a + size], image[b : b + size] = image[b : b + size], image[a : a + size]


DAMAGE: dict[str, tuple[Callable[[bytearray], object], str]] = {
    "lba outside": (
        lambda image: struct.pack_into("<Q", image, 128 * SECTOR, N_GRAINS * GRAIN // SECTOR),
        "allowed are multiples of 128 below",
    ),
    "lba inside a grain": (
        lambda image: struct.pack_into("<Q", image, 128 * SECTOR, 1),
        "allowed are multiples of 128 below",
    ),
    "absurd grain": (
        lambda image: struct.pack_into("<I", image, 128 * SECTOR + 8, 0x7FFFFFFF),
        "has 2147483647 compressed bytes, allowed are 131072",
    ),
    "absurd table": (
        lambda image: struct.pack_into("<Q", image, metadata(image, 1, 4), 1 << 50),
        "has 1125899906842624 sectors, expected 4",
    ),
    "unknown marker": (
        lambda image: struct.pack_into("<I", image, metadata(image, 1, 4) + 12, 9),
        "has the unknown type 9",
    ),
    "footer before directory": (
        lambda image: _swap(image, metadata(image, 2, 1), metadata(image, 3, 1), 2),
        "is out of order",
    ),
    "no footer": (
        lambda image: image.__delitem__(
            slice(metadata(image, 3, 1), metadata(image, 3, 1) + 2 * SECTOR)
        ),
        "follows no footer",
    ),
    "no tables": (
        lambda image: image.__delitem__(
            slice(metadata(image, 1, 4), metadata(image, 3, 1) + 2 * SECTOR)
        ),
        "the EOS marker at 0x.* is out of order",
    ),
    "table of another disk": (
        lambda image: image.__setitem__(metadata(image, 1, 4) + SECTOR + 4, 77),
        "contradicts the grains",
    ),
    "directory elsewhere": (
        lambda image: image.__setitem__(metadata(image, 2, 1) + SECTOR, 1),
        "entry 0 of the grain directory is sector",
    ),
    "footer of another disk": (
        lambda image: image.__setitem__(metadata(image, 3, 1) + SECTOR + 12, 1),
        "the footer says capacity",
    ),
    "no end-of-stream marker": (
        lambda image: image.__delitem__(slice(-SECTOR, None)),
        "ends too early",
    ),
    "part of its end-of-stream marker": (
        lambda image: image.__delitem__(slice(-1, None)),
        "ends too early",
    ),
    "other bytes behind": (
        lambda image: image.extend(bytes(3 * MIB) + b"\1"),
        "goes on after the image's end",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused(name: str, tmp_path: Path) -> None:
    image = stream(tmp_path, [1, 2, 5])
    change, message = DAMAGE[name]
    change(image)
    with pytest.raises(CorruptImageError, match=message) as caught:
        read(image, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("image_format", "options"), WRITTEN)
def test_ends_and_padding(image_format: str, options: tuple[str, ...], tmp_path: Path) -> None:
    """Zeros behind an image are accepted; other bytes and any cut are not."""
    raw, image = tmp_path / "disk.raw", tmp_path / "image"
    content = noise(MIB) + bytes(2 * MIB) + noise(3 * MIB)
    raw.write_bytes(content)
    imgcore.convert(
        raw,
        image,
        target_format=image_format,
        options=list(options),
        compress=len(options) == 1 and "zstd" in options[0],
        sync=False,
    )
    whole = image.read_bytes()
    assert read(whole, tmp_path, image_format)[: len(content)] == content
    assert read(whole + bytes(MIB + 7), tmp_path, image_format)[: len(content)] == content
    with pytest.raises(CorruptImageError):
        read(whole + bytes(MIB) + b"x", tmp_path, image_format)
    cuts = random.Random(SEED)
    last = len(whole) - (1 if image_format != "vhdx" else MIB)
    for end in (last, *(cuts.randrange(len(whole) // 2) for _ in range(6)), 513, 511, 1):
        with pytest.raises(ImgcoreError) as caught:
            read(whole[:end], tmp_path, image_format)
        assert "\n" not in str(caught.value)


class Failing(io.RawIOBase):
    """Reads 64 KiB at a time; the Nth read fails, or is the last one."""

    def __init__(self, content: bytes, n: int, error: int) -> None:
        self._file = io.BytesIO(content)
        self._left = n
        self._error = error
        self.was_reached = False

    @property
    def has_given_all(self) -> bool:
        return self._file.tell() == len(self._file.getbuffer())

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if not self._left:
            self.was_reached = True
            if self._error:
                raise OSError(self._error, "injected")
            return 0
        self._left -= 1
        return self._file.readinto(memoryview(buffer)[:65536])


@pytest.mark.parametrize("error", [errno.EIO, 0], ids=["EIO", "EOF"])
@pytest.mark.parametrize(("image_format", "options"), WRITTEN[:6])
def test_the_nth_read_fails(
    image_format: str, options: tuple[str, ...], error: int, tmp_path: Path
) -> None:
    raw, image = tmp_path / "disk.raw", tmp_path / "image"
    raw.write_bytes(noise(MIB) + bytes(MIB) + noise(MIB))
    imgcore.convert(raw, image, target_format=image_format, options=list(options), sync=False)
    content = image.read_bytes()
    for n in range(len(content) // 65536 + 40):
        source = Failing(content, n, error)
        try:
            assert read(source, tmp_path, image_format)[: 3 * MIB] == raw.read_bytes()
        except (OSError, ImgcoreError) as raised:
            caught = raised
        else:
            assert source.has_given_all
            break
        assert source.was_reached
        if error:
            assert isinstance(caught, OSError)
            assert caught.errno == errno.EIO
        else:
            assert not source.has_given_all
    else:
        pytest.fail("no read was the last one")


@pytest.mark.parametrize(("image_format", "options"), WRITTEN)
def test_mutations_end_in_a_disk_or_in_one_line(
    image_format: str, options: tuple[str, ...], tmp_path: Path
) -> None:
    """A changed stream is never read in another way than the same file."""
    raw, image = tmp_path / "disk.raw", tmp_path / "image"
    raw.write_bytes(text(MIB) + bytes(MIB) + text(512 * 100))
    imgcore.convert(raw, image, target_format=image_format, options=list(options), sync=False)
    whole = image.read_bytes()
    rng = random.Random(SEED)
    places = [at for at in range(0, len(whole), 64) if any(whole[at : at + 64])]
    n_read = 0
    for _ in range(120):
        content = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 4])):
            at = rng.choice(places) + rng.randrange(64)
            content[at % len(content)] = rng.choice([0, 1, 0x7F, 0xFF, rng.randrange(256)])
        try:
            found = read(content, tmp_path, image_format)
        except (ImgcoreError, OSError) as error:
            assert "\n" not in str(error)
            continue
        n_read += 1
        image.write_bytes(content)
        try:
            imgcore.convert(
                image, tmp_path / "file.raw", format=image_format, force=True, sync=False
            )
        except ImgcoreError:
            # The tables of a stream may be damaged where only its markers are read.
            assert image_format == "vmdk"
        else:
            assert (tmp_path / "file.raw").read_bytes() == found
    assert n_read


@pytest.mark.parametrize("image_format", ["qcow2", "vdi", "vhd", "vhdx", "vmdk"])
def test_a_parent_or_other_files_are_refused(image_format: str, tmp_path: Path) -> None:
    base, child = tmp_path / f"base.{image_format}", tmp_path / f"child.{image_format}"
    imgcore.create(base, 8 * MIB, format=image_format)
    if image_format in ("vdi", "vmdk"):
        descriptor = vmdk.descriptor("monolithicFlat", 'RW 16 FLAT "flat.raw" 0')
        with pytest.raises(UnsupportedFeatureError, match="in other files"):
            read(descriptor, tmp_path)
        return
    imgcore.create(child, format=image_format, backing=base.name, backing_format=image_format)
    with pytest.raises(UnsupportedFeatureError, match="parent.*save it to a file first"):
        read(child.read_bytes(), tmp_path, image_format)


def test_blocks_far_from_the_order_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fits in the window is sorted; what does not is refused."""
    monkeypatch.setattr(streamed_window, "STREAM_SEGMENT_NBYTES", MIB)
    monkeypatch.setattr(streamed_window, "MIN_STREAM_SEGMENTS", 12)
    image = tmp_path / "disk.vdi"
    imgcore.create(image, 40 * MIB, format="vdi")
    with imgcore.open(image, mode="r+") as opened:
        for block in (3, 0, 2, 1, *range(6, 40), 4):
            opened.write(block * MIB, noise(MIB, block))
    with pytest.raises(UnsupportedFeatureError, match="save it to a file first"):
        read(image.read_bytes(), tmp_path, "vdi")


def test_tables_after_the_data(tmp_path: Path) -> None:
    raw, image = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    raw.write_bytes(noise(110 * MIB))
    imgcore.convert(raw, image, sync=False)
    source = Failing(image.read_bytes(), 40, errno.EIO)
    # It is known from the header, and the data is not read.
    with pytest.raises(UnsupportedFeatureError, match="save it to a file first"):
        read(source, tmp_path, "qcow2")


def test_a_size_is_refused(tmp_path: Path) -> None:
    image = stream(tmp_path, [1])
    with pytest.raises(imgcore.OptionError, match="states its size"):
        imgcore.convert(io.BytesIO(image), tmp_path / "disk.raw", format="vmdk", size="10M")
    assert read(bytes(image), tmp_path) == disk([1])


def test_too_many_awaited_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "VMDK_MAX_AWAITED_TABLES", 0)
    with pytest.raises(LimitExceededError, match="save the stream to a file first"):
        read(stream(tmp_path, [1]), tmp_path)


class TestAdvice:
    """What the messages advise works."""

    def _save(self, content: bytes, words: str, tmp_path: Path, image_format: str) -> bytes:
        """Return the disk of a file, after its stream was refused."""
        with pytest.raises(ImgcoreError, match=f"{words}.*: save (it|the stream) to a file first"):
            read(content, tmp_path, image_format)
        (tmp_path / "saved").write_bytes(content)
        imgcore.convert(tmp_path / "saved", tmp_path / "saved.raw", format=image_format, sync=False)
        return (tmp_path / "saved.raw").read_bytes()

    @pytest.mark.parametrize(
        ("order", "words"),
        [
            ([0, *range(2, 80), 1], "blocks at .* and at .* are close on the disk"),
            ([*range(16), *range(32, 80), *range(16, 32)], "are needed after those at"),
            ([*range(30, 80), *range(30)], "are needed before those at"),
        ],
        ids=["close", "after", "before"],
    )
    def test_disorder(
        self, order: list[int], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(streamed_window, "STREAM_SEGMENT_NBYTES", MIB)
        monkeypatch.setattr(streamed_window, "MIN_STREAM_SEGMENTS", 40)
        monkeypatch.setattr(streamed_source, "_BATCH_NBYTES", 16 * MIB)
        monkeypatch.setattr(streamed_source, "_FIRST_NBYTES", 16 * MIB)
        image, content = tmp_path / "disk.vdi", noise(len(order) * MIB)
        imgcore.create(image, len(content), format="vdi")
        with imgcore.open(image, mode="r+") as opened:
            for block in order:
                opened.write(block * MIB, content[block * MIB : (block + 1) * MIB])
        assert self._save(image.read_bytes(), words, tmp_path, "vdi") == content

    def test_a_long_start(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(streamed_window, "MAX_KEPT_NBYTES", 1000)
        raw, image = tmp_path / "disk.raw", tmp_path / "disk.vdi"
        raw.write_bytes(noise(MIB))
        imgcore.convert(raw, image, sync=False)
        words = "would stay in memory; allowed are 1000"
        assert self._save(image.read_bytes(), words, tmp_path, "vdi") == raw.read_bytes()

    def test_late_grains(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(streamed, "VMDK_MAX_SORTED_NBYTES", 8 * GRAIN)
        numbers, saved = [*range(1, N_GRAINS), 0], tmp_path / "saved.vmdk"
        image = bytes(stream(tmp_path, numbers))
        words = "comes long after others.*: save the stream to a file first"
        with pytest.raises(ImgcoreError, match=words):
            imgcore.checksum(io.BytesIO(image), format="vmdk")
        saved.write_bytes(image)
        with imgcore.open(saved) as opened:
            assert opened.read(0, opened.virtual_size) == disk(numbers)

    def test_late_tables(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(streamed, "VMDK_MAX_AWAITED_TABLES", 0)
        image = bytes(stream(tmp_path, [1]))
        assert self._save(image, "grain tables come before", tmp_path, "vmdk") == disk([1])

    @pytest.mark.parametrize("layout", ["footer", "front"])
    def test_a_strange_last_grain(self, layout: str, tmp_path: Path) -> None:
        last = noise(20 * SECTOR)
        path = vmdk.stream(tmp_path / "made.vmdk", 128 + 10, {0: grain(0), 1: last}, layout=layout)
        found = self._save(path.read_bytes(), "the last grain has 10240 bytes", tmp_path, "vmdk")
        assert found == grain(0) + last[: 10 * SECTOR]

    @pytest.mark.parametrize("image_format", ["qcow2", "vhd", "vhdx"])
    def test_a_parent(self, image_format: str, tmp_path: Path) -> None:
        base, child = tmp_path / f"base.{image_format}", tmp_path / "child"
        raw = tmp_path / "disk.raw"
        raw.write_bytes(noise(8 * MIB))
        imgcore.convert(raw, base, sync=False)
        imgcore.create(child, format=image_format, backing=base.name, backing_format=image_format)
        found = self._save(child.read_bytes(), "it has a parent", tmp_path, image_format)
        assert found == raw.read_bytes()

    def test_a_log(self, tmp_path: Path) -> None:
        guid, block = vhdx.guid(7), vhdx.pattern(0, MIB)
        entry = vhdx.log_entry(1, 0, [(6 * MIB, bytes(4096))], log_guid=guid)
        made = vhdx.Vhdx(
            4 * MIB, blocks={0: (vhdx.FULL, block)}, log_guid=guid, log=entry.ljust(MIB, b"\0")
        )
        image = made.write(tmp_path / "disk.vhdx").read_bytes()
        found = self._save(image, "in another file or in a log", tmp_path, "vhdx")
        assert len(found) == 4 * MIB

    def test_a_comparison_with_a_parent(self, tmp_path: Path) -> None:
        base, target = tmp_path / "base.qcow2", tmp_path / "child.qcow2"
        imgcore.create(base, N_GRAINS * GRAIN)
        image = bytes(stream(tmp_path, [1]))
        with pytest.raises(UnsupportedFeatureError, match=r"\(-B\): save it to a file first"):
            imgcore.convert(
                io.BytesIO(image), target, format="vmdk", backing=base.name, backing_format="qcow2"
            )
        imgcore.convert(
            tmp_path / "made.vmdk", target, backing=base.name, backing_format="qcow2", sync=False
        )
        with imgcore.open(target) as opened:
            assert opened.read(0, opened.virtual_size) == disk([1])
