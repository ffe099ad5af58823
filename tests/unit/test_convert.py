"""The verb ``convert`` as an API: backing files, progress, failures."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
from tests.helpers import qemu
from tests.helpers.images import noise
from tests.helpers.mounts import loop_device

import imgcore
from imgcore.disk import image_sink, image_source, stream_batches
from imgcore.engine import progress as progress_module
from imgcore.formats.api import BackingReference, Writer, WriteRequest
from imgcore.formats.qcow2 import writer as qcow2_writer
from imgcore.formats.registry import format_names

KIB, MIB = 1 << 10, 1 << 20


def write_disk(path: Path, nbytes: int, pieces: list[tuple[int, bytes]]) -> Path:
    with path.open("wb") as file:
        file.truncate(nbytes)
        for offset, data in pieces:
            file.seek(offset)
            file.write(data)
    return path


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    randbytes = random.Random(1).randbytes
    pieces = [(0, b"first" * 1000), (MIB, randbytes(200 * KIB)), (3 * MIB, b"text " * 40000)]
    return write_disk(tmp_path / "disk.raw", 4 * MIB + 512, pieces)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


class TestBackingFile:
    """``-B``: only differences are stored; the disk reads the same as the source."""

    @pytest.mark.parametrize("compress", [False, True], ids=["plain", "compressed"])
    @pytest.mark.parametrize("compat", ["0.10", "1.1"])
    @pytest.mark.parametrize("base_format", ["raw", "qcow2"])
    @pytest.mark.parametrize(
        "base_nbytes", [2 * MIB, 4 * MIB + 512, 6 * MIB], ids=["shorter", "as long", "longer"]
    )
    def test_reads_as_the_source(
        self,
        tmp_path: Path,
        disk: Path,
        compress: bool,
        compat: str,
        base_format: str,
        base_nbytes: int,
    ) -> None:
        content = disk.read_bytes()
        base = tmp_path / "base.raw"
        # Data where the source has zeros, zeros where it has data, and equal blocks.
        write_disk(base, base_nbytes, [(0, content[:MIB]), (MIB + 512 * KIB, b"gone" * 30000)])
        if base_format == "qcow2":
            imgcore.convert(base, base := tmp_path / "base.qcow2")
        over = tmp_path / "over.qcow2"
        imgcore.convert(
            disk,
            over,
            backing=base.name,
            backing_format=base_format,
            compress=compress,
            options={"compat": compat},
        )
        assert imgcore.compare(disk, over).identical
        assert "identical" in qemu.run("compare", disk, over).stdout
        assert "No errors" in qemu.run("check", over).stdout
        info = imgcore.info(over)
        assert info["backing-filename"] == base.name
        depths = {entry.depth for entry in imgcore.map(over) if entry.start < MIB}
        assert depths == {1}, "what is equal to the backing file was stored again"

    @pytest.mark.parametrize("verb", ["convert", "create"])
    def test_the_writer_is_told_what_the_parent_is(
        self, disk: Path, monkeypatch: pytest.MonkeyPatch, verb: str
    ) -> None:
        base = disk.with_name("base.vmdk")
        imgcore.convert(disk, base, options={"cid": "1a2b3c4d"})
        os.utime(base, (1_700_000_000, 1_700_000_000.75))
        requests: list[WriteRequest[Any]] = []
        make = qcow2_writer.writer_for

        def keep(request: WriteRequest[Any]) -> Writer:
            requests.append(request)
            return make(request)

        monkeypatch.setattr(qcow2_writer, "writer_for", keep)
        over = disk.with_name("over.qcow2")
        if verb == "convert":
            imgcore.convert(disk, over, backing=base.name, backing_format="vmdk")
        else:
            imgcore.create(over, backing=base.name, backing_format="vmdk")
        assert requests[-1].backing == BackingReference(
            "base.vmdk",
            "vmdk",
            {"content ID": "1a2b3c4d"},
            modified=1_700_000_000,
            path=str(base),
            virtual_size=disk.stat().st_size,
        )

    def test_the_backing_format_is_never_guessed(self, disk: Path) -> None:
        with pytest.raises(imgcore.OptionError, match="state it with -F"):
            imgcore.convert(disk, disk.with_name("over.qcow2"), backing=disk.name)

    def test_blocks_too_large_to_be_compared(
        self, disk: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(image_sink, "MAX_BASE_BLOCK_NBYTES", 32 * KIB)
        over = disk.with_name("over.qcow2")
        with pytest.raises(imgcore.OptionError, match="blocks of 65536 bytes"):
            imgcore.convert(disk, over, backing=disk.name, backing_format="raw")
        assert names(disk.parent) == ["disk.raw"]

    def test_a_missing_backing_file_is_named(self, disk: Path) -> None:
        with pytest.raises(FileNotFoundError, match="none.raw"):
            imgcore.convert(
                disk, disk.with_name("o.qcow2"), backing="none.raw", backing_format="raw"
            )
        assert names(disk.parent) == ["disk.raw"]

    @pytest.mark.parametrize("target", ["o.raw", "o.vmdk"])
    def test_only_qcow2_takes_one(self, disk: Path, target: str) -> None:
        with pytest.raises((imgcore.OptionError, imgcore.UnsupportedFeatureError), match="backing"):
            imgcore.convert(disk, disk.with_name(target), backing=disk.name, backing_format="raw")
        assert names(disk.parent) == ["disk.raw"]


class TestInPlace:
    """``-n`` writes into an existing file, including zeros."""

    def test_old_content_is_overwritten_with_zeros(self, tmp_path: Path, disk: Path) -> None:
        target = tmp_path / "volume.raw"
        target.write_bytes(b"\xee" * (5 * MIB))
        inode = target.stat().st_ino
        imgcore.convert(disk, target, in_place=True)
        content = target.read_bytes()
        assert target.stat().st_ino == inode
        assert content[: disk.stat().st_size] == disk.read_bytes()
        assert content[disk.stat().st_size :] == b"\xee" * (5 * MIB - disk.stat().st_size)

    def test_a_smaller_target_is_refused_untouched(self, tmp_path: Path, disk: Path) -> None:
        target = tmp_path / "volume.raw"
        target.write_bytes(b"\xee" * MIB)
        with pytest.raises(imgcore.TargetError, match="holds 1048576 bytes"):
            imgcore.convert(disk, target, in_place=True)
        assert target.read_bytes() == b"\xee" * MIB

    @pytest.mark.parametrize("format", format_names())
    @pytest.mark.parametrize("zeros", [True, False])
    def test_target_is_zero(self, tmp_path: Path, disk: Path, format: str, zeros: bool) -> None:
        """Only where the file is the disk do the file's zeros count."""
        target = tmp_path / "volume"
        target.write_bytes((b"\0" if zeros else b"\xee") * (8 * MIB))
        imgcore.convert(
            disk, target, target_format=format, in_place=True, target_is_zero=True, sparse=4096
        )
        same = imgcore.compare(disk, target, format_a="raw", format_b=format).identical
        assert same == (zeros or format != "raw")

    @pytest.mark.parametrize(
        "wrong", [{}, {"in_place": True, "backing": "b", "backing_format": "raw"}]
    )
    def test_target_is_zero_refused(self, disk: Path, wrong: dict[str, Any]) -> None:
        target = disk.with_name("new.qcow2")
        with pytest.raises(imgcore.OptionError, match="target-is-zero"):
            imgcore.convert(disk, target, target_is_zero=True, **wrong)
        assert not target.exists()

    @pytest.mark.parametrize("force", [False, True])
    def test_a_block_device_only_on_request(self, tmp_path: Path, disk: Path, force: bool) -> None:
        volume = tmp_path / "volume"
        volume.write_bytes(b"\xee" * (5 * MIB))
        with loop_device(volume) as device:
            for arguments in ({}, {"target_format": "raw"}):
                with pytest.raises(imgcore.TargetError, match="is a block device"):
                    imgcore.convert(disk, device, force=force, **arguments)
            for format in ("raw", "qcow2", "vhdx"):
                with pytest.raises(imgcore.TargetError, match="is a block device"):
                    imgcore.create(device, MIB, format=format, force=force)
            assert volume.read_bytes() == b"\xee" * (5 * MIB)
            imgcore.convert(disk, device, in_place=True)
        assert volume.read_bytes()[: disk.stat().st_size] == disk.read_bytes()

    @pytest.mark.parametrize("name", ["volume.raw.zst", "volume.raw.gz"])
    def test_no_stream(self, tmp_path: Path, disk: Path, name: str) -> None:
        target = tmp_path / name
        target.write_bytes(b"\xee" * (5 * MIB))
        with pytest.raises(imgcore.OptionError, match="cannot be written in place"):
            imgcore.convert(disk, target, in_place=True)
        assert target.read_bytes() == b"\xee" * (5 * MIB)

    def test_no_salvage_into_a_stream(self, tmp_path: Path, disk: Path) -> None:
        with pytest.raises(imgcore.OptionError, match="salvaged data cannot be written as"):
            imgcore.convert(disk, tmp_path / "a.raw.zst", salvage=True)

    def test_an_incomplete_target_is_said_to_be_so(
        self, tmp_path: Path, disk: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        target = tmp_path / "volume.raw"
        target.write_bytes(b"\xee" * (5 * MIB))

        def progress(_: imgcore.Progress) -> None:
            raise LookupError

        with pytest.raises(LookupError):
            imgcore.convert(disk, target, in_place=True, progress=progress)
        assert "now incomplete" in caplog.text


class TestSparse:
    def test_zeros_are_not_written(self, tmp_path: Path, disk: Path) -> None:
        imgcore.convert(disk, tmp_path / "out.raw")
        assert (tmp_path / "out.raw").stat().st_blocks * 512 < MIB
        assert (tmp_path / "out.raw").read_bytes() == disk.read_bytes()

    def test_zero_writes_all(self, tmp_path: Path, disk: Path) -> None:
        imgcore.convert(disk, tmp_path / "out.raw", sparse=0)
        assert (tmp_path / "out.raw").stat().st_blocks * 512 >= 4 * MIB
        assert (tmp_path / "out.raw").read_bytes() == disk.read_bytes()

    @pytest.mark.parametrize("preallocation", ["falloc", "full"])
    def test_preallocation(self, tmp_path: Path, disk: Path, preallocation: str) -> None:
        imgcore.convert(disk, tmp_path / "out.raw", options={"preallocation": preallocation})
        assert (tmp_path / "out.raw").stat().st_blocks * 512 >= 4 * MIB
        assert (tmp_path / "out.raw").read_bytes() == disk.read_bytes()

    @pytest.mark.parametrize("sparse", [1, 1000, "2M", -512])
    def test_a_granularity_that_makes_no_sense(self, disk: Path, sparse: Any) -> None:
        with pytest.raises(imgcore.OptionError, match="-S"):
            imgcore.convert(disk, disk.with_name("out.raw"), sparse=sparse)


class TestFailure:
    """Nothing remains of the target, and the source is unchanged."""

    @pytest.mark.parametrize("target", ["out.raw", "out.qcow2", "out.vmdk", "out.raw.zst"])
    def test_a_callback_that_raises(self, tmp_path: Path, disk: Path, target: str) -> None:
        (tmp_path / target).write_bytes(b"precious")

        def progress(_: imgcore.Progress) -> None:
            raise LookupError("no more")

        with pytest.raises(LookupError, match="no more"):
            imgcore.convert(disk, tmp_path / target, force=True, progress=progress)
        assert (tmp_path / target).read_bytes() == b"precious"
        assert names(tmp_path) == sorted(["disk.raw", target])

    def test_a_source_that_changes(self, disk: Path) -> None:
        def progress(_: imgcore.Progress) -> None:
            os.utime(disk, ns=(1, 1))

        with pytest.raises(imgcore.ImgcoreError, match="changed while it was read"):
            imgcore.convert(disk, disk.with_name("out.raw"), progress=progress)
        assert names(disk.parent) == ["disk.raw"]

    @pytest.mark.parametrize("link", ["same", "symlink", "hardlink"])
    def test_the_source_as_target(self, disk: Path, link: str) -> None:
        content = disk.read_bytes()
        target = disk.with_name("other.raw")
        if link == "same":
            target = disk
        elif link == "symlink":
            target.symlink_to(disk)
        else:
            target.hardlink_to(disk)
        before = names(disk.parent)
        with pytest.raises(imgcore.TargetError):
            imgcore.convert(disk, target, force=True)
        assert disk.read_bytes() == content
        assert names(disk.parent) == before

    def test_the_source_as_the_targets_second_file(self, tmp_path: Path, disk: Path) -> None:
        source = disk.rename(tmp_path / "out-flat.vmdk")
        content = source.read_bytes()
        with pytest.raises(imgcore.TargetError, match="is read by this conversion"):
            imgcore.convert(
                source,
                tmp_path / "out.vmdk",
                format="raw",
                options={"subformat": "monolithicFlat"},
                force=True,
            )
        assert source.read_bytes() == content
        assert names(tmp_path) == ["out-flat.vmdk"]

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            ({"threads": 0}, "1 to 256"),
            ({"options": {"colour": "blue"}}, "colour"),
            ({"target_format": "floppy"}, "floppy"),
            ({"target_format": "qed"}, "QED images are neither"),
            ({"kernels": {"zero": "abacus"}}, "abacus"),
            ({"backing_format": "raw"}, "but no backing file"),
        ],
    )
    def test_arguments_that_make_no_sense(
        self, disk: Path, arguments: dict[str, Any], text: str
    ) -> None:
        with pytest.raises(imgcore.ImgcoreError, match=text):
            imgcore.convert(disk, disk.with_name("out.raw"), **arguments)
        assert names(disk.parent) == ["disk.raw"]


class TestProgress:
    def test_it_ends_at_the_total_and_never_decreases(self, disk: Path) -> None:
        seen: list[imgcore.Progress] = []
        result = imgcore.convert(disk, disk.with_name("out.qcow2"), progress=seen.append)
        assert [p.done for p in seen] == sorted(p.done for p in seen)
        last = seen[-1]
        assert last.done == last.total == result.virtual_size == disk.stat().st_size
        assert last.data == result.bytes_data
        assert last.data + last.zero == last.total
        assert last.written == result.bytes_written

    def test_an_empty_disk_is_done_at_once(self, tmp_path: Path) -> None:
        imgcore.create(tmp_path / "empty.qcow2", 64 << 40, format="qcow2")
        seen: list[imgcore.Progress] = []
        result = imgcore.convert(
            tmp_path / "empty.qcow2", tmp_path / "out.qcow2", progress=seen.append
        )
        assert seen[-1].done == seen[-1].zero == 64 << 40
        assert result.bytes_data == 0


@pytest.mark.parametrize(
    ("target", "options", "compress"),
    [
        ("out.raw", {}, False),
        ("out.qcow2", {}, False),
        ("out.qcow2", {"cluster_size": "2M"}, False),
        ("out.qcow2", {"cluster_size": "512"}, True),
        ("out.qcow2", {"compression_type": "zstd"}, True),
        ("out.vmdk", {"subformat": "streamOptimized", "cid": "12345678"}, False),
    ],
)
def test_the_kernels_do_not_change_the_bytes(
    tmp_path: Path, disk: Path, target: str, options: dict[str, Any], compress: bool
) -> None:
    outputs = set()
    for kernels in ({"zero": "portable"}, {"io": "pread"}, {}):
        imgcore.convert(
            disk,
            tmp_path / target,
            options=options,
            compress=compress,
            kernels=kernels,
            force=True,
        )
        outputs.add((tmp_path / target).read_bytes())
    assert len(outputs) == 1


def test_a_stream_goes_into_every_format(tmp_path: Path, disk: Path) -> None:
    packed = tmp_path / "disk.raw.zst"
    imgcore.convert(disk, packed)
    for target in ("a.qcow2", "a.vmdk", "b.raw"):
        imgcore.convert(packed, tmp_path / target)
        assert imgcore.compare(disk, tmp_path / target).identical
    imgcore.convert(packed, tmp_path / "s.vmdk", options={"subformat": "streamOptimized"})
    assert imgcore.compare(disk, tmp_path / "s.vmdk").identical


@pytest.mark.parametrize(
    ("name", "profile"), [("a.raw.zst", None), ("a.raw.gz", None), ("a.tar.gz", "gce")]
)
def test_what_is_written_as_a_stream_is_counted(
    name: str, profile: str | None, tmp_path: Path, disk: Path
) -> None:
    seen: list[imgcore.Progress] = []
    result = imgcore.convert(disk, tmp_path / name, profile=profile, progress=seen.append)
    assert result.bytes_written == result.file_size == (tmp_path / name).stat().st_size
    assert seen[-1].written == result.bytes_written
    assert seen[-1].done == seen[-1].total
    for field in zip(*seen, strict=True):
        assert list(field) == sorted(field)


def test_scattered_data_makes_no_flood_of_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = [(offset, b"x") for offset in range(0, 32 * MIB, MIB)]
    source = write_disk(tmp_path / "disk.raw", 33 * MIB, pieces)
    seen: list[imgcore.Progress] = []
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: 0.0)
    imgcore.convert(source, tmp_path / "a.tar.gz", profile="gce", progress=seen.append)
    assert len(seen) < 5
    assert seen[-1].done == seen[-1].total


def test_a_stream_has_no_parent(tmp_path: Path, disk: Path) -> None:
    packed = tmp_path / "disk.raw.zst"
    imgcore.convert(disk, packed)
    with pytest.raises(imgcore.OptionError, match="a parent is given"):
        imgcore.convert(packed, tmp_path / "a.raw", parent=disk)
    for chain in (False, True):
        with pytest.raises(imgcore.OptionError, match="a parent is given"):
            imgcore.info(packed, parent=disk, chain=chain)
    with pytest.raises(imgcore.OptionError, match="a parent is given"):
        imgcore.measure(packed, parent=disk)


def test_requests_that_contradict_themselves(tmp_path: Path, disk: Path) -> None:
    packed = tmp_path / "disk.raw.zst"
    imgcore.convert(disk, packed)
    backed = {"backing": "disk.raw", "backing_format": "raw"}
    wrong: list[tuple[Path, str, dict[str, Any], str]] = [
        (disk, "a", {}, "no suffix of a known format"),
        (disk, "a.raw.zst", {"target_format": "vdi"}, "only raw can be written as a compressed"),
        (disk, "a.raw.zst", {"compress": True}, "does not allow -c, -B or -o"),
        (packed, "a.raw", {"salvage": True}, "data of a compressed stream cannot be salvaged"),
        (packed, "a.qcow2", backed, "cannot be combined with -B"),
        (disk, "a.qcow2", {"salvage": True, **backed}, "cannot be compared with a parent"),
    ]
    for source, target, arguments, words in wrong:
        with pytest.raises(imgcore.ImgcoreError, match=words):
            imgcore.convert(source, tmp_path / target, sync=False, **arguments)
        assert not (tmp_path / target).exists(), words


def test_a_stream_that_grows_is_read_only_on_request(tmp_path: Path, disk: Path) -> None:
    packed = tmp_path / "disk.raw.zst"
    imgcore.convert(disk, packed)

    def touch(_: imgcore.Progress) -> None:
        os.utime(packed, ns=(1, 1))

    with pytest.raises(imgcore.ImgcoreError, match="changed while it was read"):
        imgcore.convert(packed, tmp_path / "a.raw", progress=touch)
    imgcore.convert(packed, tmp_path / "a.raw", progress=touch, share=True)


def test_a_stream_is_not_held_in_huge_pieces(tmp_path: Path, disk: Path) -> None:
    packed, target = tmp_path / "disk.raw.zst", tmp_path / "a.vmdk"
    options = ["subformat=streamOptimized"]
    imgcore.convert(disk, packed)
    imgcore.convert(packed, target, options=[*options, "grain_size=128k"], force=True)
    with pytest.raises(imgcore.OptionError, match="smaller blocks"):
        imgcore.convert(packed, target, options=[*options, "grain_size=256k"], force=True)
    assert imgcore.compare(disk, target).identical


def test_long_streams_are_taken_in_turns(
    tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_source, "CHUNK_NBYTES", 256 * KIB)
    monkeypatch.setattr(stream_batches, "_CHUNK_NBYTES", 256 * KIB)
    packed = tmp_path / "disk.raw.zst"
    imgcore.convert(disk, packed)
    imgcore.convert(packed, tmp_path / "a.qcow2")
    assert imgcore.compare(disk, tmp_path / "a.qcow2").identical


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_every_byte_read_is_counted(tmp_path: Path, threads: int) -> None:
    """Also by workers that read windows which others write."""
    source = tmp_path / "a.raw"
    source.write_bytes(noise(16 * MIB))
    for turn in range(5):
        target = tmp_path / f"{turn}.raw"
        result = imgcore.convert(source, target, threads=threads, reflink=False)
        assert result.bytes_read == 16 * MIB
