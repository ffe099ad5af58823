"""Images on block devices: written over old bytes, read by qemu-img and by imgcore."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

import imgcore
from tests.helpers import qemu
from tests.helpers.images import noise
from tests.helpers.mounts import loop_device, make_file_system, mounted
from tests.helpers.vhd import FIXED, footer

MIB = 1 << 20
UUID = "11111111-2222-3333-4444-555555555555"
DISK = 70 * MIB + 3 * 512
DEVICE = 160 * MIB
# Runs of zeros that are shorter than a block, in each block size that a format has.
PIECES = (
    (0, 5000),
    (70_000, 65_536),
    (MIB, 512),
    (3 * MIB + 1536, 4096),
    (9 * MIB, 200_000),
    (66 * MIB + 512, 3 * MIB),
    (DISK - 512, 512),
)


class Kind(NamedTuple):
    format: str
    options: Mapping[str, str] = MappingProxyType({})
    compress: bool = False
    sparse: int = 4096


KINDS = {
    "raw": Kind("raw"),
    "qcow2": Kind("qcow2"),
    "qcow2-4k": Kind("qcow2", {"cluster_size": "4k"}),
    "qcow2-2M": Kind("qcow2", {"cluster_size": "2M"}),
    "qcow2-v2": Kind("qcow2", {"compat": "0.10"}),
    "qcow2-zlib": Kind("qcow2", compress=True),
    "qcow2-zstd": Kind("qcow2", {"compression_type": "zstd"}, compress=True),
    "qcow2-full": Kind("qcow2", sparse=0),
    "qcow2-metadata": Kind("qcow2", {"preallocation": "metadata"}),
    "qcow2-falloc": Kind("qcow2", {"preallocation": "falloc"}),
    "vmdk": Kind("vmdk"),
    "vmdk-zeroed": Kind("vmdk", {"zeroed_grain": "on"}),
    "vmdk-stream": Kind("vmdk", {"subformat": "streamOptimized"}),
    "vhd": Kind("vhd"),
    "vhd-batmap": Kind("vhd", {"batmap": "on"}),
    "vhd-fixed": Kind("vhd", {"subformat": "fixed"}),
    "vhdx": Kind("vhdx"),
    "vhdx-1M": Kind("vhdx", {"block_size": "1M"}),
    "vhdx-fixed": Kind("vhdx", {"subformat": "fixed"}),
    "vdi": Kind("vdi"),
    "vdi-fixed": Kind("vdi", {"static": "on"}),
}


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("disk") / "disk.raw"
    with path.open("wb") as file:
        file.truncate(DISK)
        for number, (offset, nbytes) in enumerate(PIECES):
            file.seek(offset)
            file.write(noise(nbytes, number))
    return path


@contextmanager
def old_device(path: Path, nbytes: int = DEVICE, *, sector_nbytes: int = 512) -> Iterator[str]:
    """Give a device full of old bytes, with the footer of a fixed VHD at its end."""
    with path.open("wb") as file:
        for _ in range(-(-nbytes // MIB)):
            file.write(b"\xa5" * MIB)
        file.truncate(nbytes - 512)
        file.seek(nbytes - 512)
        file.write(footer(nbytes - 512, FIXED))
    with loop_device(path, sector_nbytes=sector_nbytes) as device:
        yield device


def write(source: str | Path, target: str | Path, kind: Kind, **more: Any) -> imgcore.ConvertResult:
    return imgcore.convert(
        source,
        target,
        target_format=kind.format,
        options=kind.options,
        compress=kind.compress,
        sparse=kind.sparse,
        **more,
    )


def assert_holds(source: str | Path, target: str | Path, format: str) -> None:
    """Require the same disk and sound tables, for qemu-img and for imgcore."""
    assert imgcore.compare(source, target, format_a="raw", format_b=format).identical
    theirs = {"vhd": "vpc"}.get(format, format)
    done = qemu.run("compare", "-f", "raw", "-F", theirs, source, target)
    assert "identical" in done.stdout
    if format == "raw":
        return
    assert not imgcore.check(target, format=format).problems
    if format in ("qcow2", "vmdk", "vdi", "vhdx"):
        qemu.run("check", "-f", theirs, target)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("sector_nbytes", [512, 4096])
def test_every_format(tmp_path: Path, disk: Path, name: str, sector_nbytes: int) -> None:
    kind = KINDS[name]
    with old_device(tmp_path / "device", sector_nbytes=sector_nbytes) as device:
        write(disk, device, kind, in_place=True)
        if kind.format != "raw":
            assert_holds(disk, device, kind.format)
            return
    # The rest of the device is not the disk's.
    written = (tmp_path / "device").read_bytes()
    assert written[:DISK] == disk.read_bytes()
    assert set(written[DISK:-512]) == {0xA5}


@pytest.mark.parametrize("name", KINDS)
def test_bytes_are_those_of_a_file(tmp_path: Path, disk: Path, name: str) -> None:
    """On a device of zeros nothing is left out and nothing is added."""
    kind = KINDS[name]
    fixed = {"vmdk": {"cid": "12345678"}, "vhd": {"uuid": UUID}, "vdi": {"uuid": UUID}}
    options = dict(kind.options) | fixed.get(kind.format, {})
    if kind.format == "vhdx":
        options |= {f"{what}_guid": UUID for what in ("data_write", "file_write")}
        options |= {"virtual_disk_id": UUID}
    if kind.format == "vdi":
        options |= {"modification_uuid": UUID}
    kind = kind._replace(options=options)
    write(disk, tmp_path / "file", kind)
    path = tmp_path / "device"
    path.write_bytes(b"")
    nbytes = (tmp_path / "file").stat().st_size
    with path.open("r+b") as file:
        file.truncate(nbytes)
    with loop_device(path) as device:
        # A VMDK's descriptor holds the name.
        file_of_that_name = tmp_path / Path(device).name
        write(disk, file_of_that_name, kind)
        write(disk, device, kind, in_place=True)
    ours, theirs = path.read_bytes(), file_of_that_name.read_bytes()
    if name == "vmdk-stream":
        # The header names the directory: a device may end far behind the footer.
        ours, theirs = ours[512:], theirs[512:]
    assert ours == theirs


@pytest.mark.parametrize("name", [name for name in KINDS if name != "raw"])
def test_an_existing_file(tmp_path: Path, disk: Path, name: str) -> None:
    """It gets the image's size, and keeps its inode."""
    target = tmp_path / "old"
    target.write_bytes(b"\xa5" * DEVICE)
    inode = target.stat().st_ino
    write(disk, target, KINDS[name], in_place=True)
    assert target.stat().st_ino == inode
    assert target.stat().st_size < DEVICE
    assert_holds(disk, target, KINDS[name].format)


@pytest.mark.parametrize("name", KINDS)
def test_a_device_that_just_suffices_and_one_that_does_not(
    tmp_path: Path, disk: Path, name: str
) -> None:
    kind = KINDS[name]
    write(disk, tmp_path / "file", kind)
    nbytes = (tmp_path / "file").stat().st_size
    with old_device(tmp_path / "exact", nbytes) as device:
        write(disk, device, kind, in_place=True)
        assert_holds(disk, device, kind.format)
    with old_device(tmp_path / "small", nbytes - 512) as device:
        before = (tmp_path / "small").read_bytes()
        with pytest.raises(imgcore.TargetError, match=rf"{nbytes - 512} bytes, fewer than the"):
            write(disk, device, kind, in_place=True)
    assert (tmp_path / "small").read_bytes() == before


def test_a_bound_that_does_not_fit_is_no_reason(tmp_path: Path) -> None:
    """Data that turns out to be zeros, or to compress, needs no room."""
    source = tmp_path / "zeros.raw"
    source.write_bytes(bytes(20 * MIB) + noise(4096))
    for name in ("qcow2", "qcow2-zlib", "vmdk", "vhd", "vhdx-1M", "vdi"):
        with old_device(tmp_path / name, 8 * MIB) as device:
            calls: list[imgcore.Progress] = []
            write(source, device, KINDS[name], in_place=True, progress=calls.append)
            assert_holds(source, device, KINDS[name].format)
            assert calls[-1].done == calls[-1].total
            assert [call.done for call in calls] == sorted(call.done for call in calls)


def test_a_cancelled_rehearsal_writes_nothing(tmp_path: Path) -> None:
    source = tmp_path / "zeros.raw"
    source.write_bytes(bytes(20 * MIB) + noise(4096))

    def cancel(_: imgcore.Progress) -> None:
        raise LookupError("no more")

    with old_device(tmp_path / "device", 8 * MIB) as device:
        before = (tmp_path / "device").read_bytes()
        with pytest.raises(LookupError):
            write(source, device, KINDS["qcow2"], in_place=True, progress=cancel)
    assert (tmp_path / "device").read_bytes() == before


def test_streams_and_overlays(tmp_path: Path, disk: Path) -> None:
    """A compressed source is read twice if need be; a base is left out."""
    imgcore.convert(disk, tmp_path / "disk.raw.zst")
    with old_device(tmp_path / "device", 8 * MIB) as device:
        write(tmp_path / "disk.raw.zst", device, KINDS["qcow2-zlib"], in_place=True)
        assert_holds(disk, device, "qcow2")
    base = tmp_path / "base.raw"
    base.write_bytes(disk.read_bytes())
    with base.open("r+b") as file:
        file.seek(9 * MIB)
        file.write(noise(100_000, 77))
    with old_device(tmp_path / "overlay", 2 * MIB) as device:
        write(disk, device, KINDS["qcow2"], in_place=True, backing=base, backing_format="raw")
        assert imgcore.compare(
            disk, device, format_a="raw", format_b="qcow2", allow=[tmp_path]
        ).identical
        done = qemu.run("compare", "-f", "raw", "-F", "qcow2", disk, device)
        assert "identical" in done.stdout


@pytest.mark.parametrize("subformat", ["monolithicFlat", "vmfs"])
def test_several_files_cannot_be_written_in_place(
    tmp_path: Path, disk: Path, subformat: str
) -> None:
    target = tmp_path / "old.vmdk"
    target.write_bytes(b"precious")
    with pytest.raises(imgcore.TargetError, match="several files"):
        imgcore.convert(disk, target, options={"subformat": subformat}, in_place=True)
    assert target.read_bytes() == b"precious"


def test_contradicting_footers(tmp_path: Path, disk: Path) -> None:
    """A fixed disk's footer at the end, and a dynamic disk's at the start."""
    with old_device(tmp_path / "device") as device:
        qemu.run("convert", "-f", "raw", "-O", "vpc", disk, tmp_path / "a.vhd")
        with open(device, "r+b") as file:
            file.write((tmp_path / "a.vhd").read_bytes())
        with pytest.raises(imgcore.CorruptImageError, match=f"at {DEVICE - 512:#x} or at 0"):
            imgcore.open(device, format="vhd")
        with open(device, "r+b") as file:
            file.seek(DEVICE - 512)
            file.write(bytes(512))
        assert imgcore.compare(disk, device, format_a="raw", format_b="vhd").identical
        assert not imgcore.check(device, format="vhd").problems


class TestSectorSize:
    """The logical sector size of a device is kept, or a line says that it is not."""

    @pytest.mark.parametrize("sector_nbytes", [512, 2048, 4096])
    @pytest.mark.parametrize("name", KINDS)
    def test_of_a_source(
        self,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
        name: str,
        sector_nbytes: int,
    ) -> None:
        kind, target = KINDS[name], tmp_path / "image"
        with old_device(tmp_path / "device", 4 * MIB, sector_nbytes=sector_nbytes) as device:
            write(device, target, kind, format="raw")
            assert imgcore.compare(device, target, format_a="raw", format_b=kind.format).identical
            with imgcore.open(device, format="raw") as image:
                assert image.logical_sector_nbytes == sector_nbytes
        texts = [record.getMessage() for record in caplog.records]
        is_kept = sector_nbytes == 512 or (
            kind.format in ("vhdx", "vmdk") and sector_nbytes == 4096
        )
        if kind.format in ("vhdx", "vmdk"):
            stated = imgcore.info(target, format=kind.format)["format-specific"]["data"]
            assert stated["logical-sector-size"] == (sector_nbytes if is_kept else 512)
        assert len(texts) == (0 if is_kept else 1)
        if not is_kept:
            assert f"have 512 bytes, those of {device} have {sector_nbytes}" in texts[0]

    @pytest.mark.parametrize("sector_nbytes", [512, 4096])
    @pytest.mark.parametrize("source_nbytes", [None, 512, 4096])
    def test_of_a_target(
        self,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
        source_nbytes: int | None,
        sector_nbytes: int,
    ) -> None:
        """Only a raw disk has the device's sectors."""
        source = tmp_path / "a.raw"
        source.write_bytes(noise(4096) * 1024)
        if source_nbytes is not None:
            size = {"logical_sector_size": str(source_nbytes)}
            imgcore.convert(source, tmp_path / "a.vhdx", options=size)
            source = tmp_path / "a.vhdx"
        caplog.clear()
        with old_device(tmp_path / "device", 8 * MIB, sector_nbytes=sector_nbytes) as device:
            imgcore.convert(source, device, in_place=True)
            texts = [record.getMessage() for record in caplog.records]
            assert len(texts) == (sector_nbytes != (source_nbytes or 512))
            caplog.clear()
            imgcore.convert(source, device, in_place=True, target_format="qcow2")
            texts = [record.getMessage() for record in caplog.records]
            assert len(texts) == (source_nbytes == 4096)

    def test_of_zeros(self, tmp_path: Path, disk: Path) -> None:
        """Runs of zeros start and end inside the sectors of a device."""
        with old_device(tmp_path / "device", sector_nbytes=4096) as device:
            source = tmp_path / "a.raw"
            with source.open("wb") as file:
                for number in range(100):
                    file.seek(number * 300_000 // 512 * 512)
                    file.write(noise(512 * (1 + number % 20), number))
                file.truncate(40 * MIB + 512)
            imgcore.convert(source, device, in_place=True)
        with (tmp_path / "device").open("rb") as written:
            assert written.read(40 * MIB + 512) == source.read_bytes()
            assert set(written.read(4 * MIB)) == {0xA5}


class TestRefused:
    """One line, before anything is written."""

    @pytest.mark.parametrize("format", ["raw", "qcow2", "vhdx"])
    def test_a_loop_device_over_the_source(self, tmp_path: Path, format: str) -> None:
        with old_device(tmp_path / "device.raw", 8 * MIB) as device:
            before = (tmp_path / "device.raw").read_bytes()
            for source, target in ((tmp_path / "device.raw", device), (device, device)):
                with pytest.raises(imgcore.TargetError, match="is read by this conversion"):
                    imgcore.convert(
                        source, target, format="raw", target_format=format, in_place=True
                    )
            for changes in ({"in_place": True}, {"force": True}):
                with pytest.raises(imgcore.TargetError, match="is read by this conversion"):
                    imgcore.convert(
                        device,
                        tmp_path / "device.raw",
                        format="raw",
                        target_format=format,
                        **changes,  # type: ignore[arg-type]
                    )
            assert (tmp_path / "device.raw").read_bytes() == before

    def test_a_read_only_device(
        self, tmp_path: Path, disk: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "device").write_bytes(b"\xa5" * MIB)
        with loop_device(tmp_path / "device", read_only=True) as device:
            for format in ("raw", "qcow2"):
                with pytest.raises(OSError, match="The block device is read-only"):
                    imgcore.convert(disk, device, target_format=format, in_place=True)
        assert (tmp_path / "device").read_bytes() == b"\xa5" * MIB
        assert not caplog.records

    @pytest.mark.parametrize("format", ["raw", "qcow2", "vhd"])
    def test_a_mounted_device(
        self, tmp_path: Path, disk: Path, caplog: pytest.LogCaptureFixture, format: str
    ) -> None:
        image = make_file_system("ext4", tmp_path / "image", DEVICE)
        with loop_device(image) as device, mounted(device, tmp_path / "mnt"):
            with pytest.raises(OSError, match="in use or mounted"):
                imgcore.convert(disk, device, target_format=format, in_place=True)
        assert not caplog.records
