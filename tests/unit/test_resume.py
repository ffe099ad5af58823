"""Conversions that go on after a break: what is kept, refused and listed.

tests/faults/test_resume.py breaks them at every kind of moment.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import jsonschema
import pytest
from tests.helpers import images
from tests.helpers.command import imgcore as run_cli

import imgcore
from imgcore import limits
from imgcore.disk import (
    area_journal,
    batch_journal,
    batch_pieces,
    checkpoints,
    limited_chunks,
    resuming,
)
from imgcore.disk.block_table import BlockTable
from imgcore.files.locks import Lock, lock
from imgcore.files.target_folder import TargetFolder
from imgcore.streams import zstd
from imgcore.streams.helpers import Helpers

KIB, MIB = images.KIB, images.MIB
SCHEMA = json.loads((Path(__file__).parents[2] / "docs/receipt.schema.json").read_text())
DISK = images.RawImage(
    "resumed",
    6 * MIB,
    lambda: [(0, images.text(2 * MIB)), (3 * MIB, images.noise(2 * MIB)), (6 * MIB - 512, b"end")],
)


class OnlyRead:
    """A stream: an object with ``read`` and nothing else."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, nbytes: int) -> bytes:
        return self._file.read(nbytes)


class Interrupted(Exception):
    """Raised by the callback of a test."""


@pytest.fixture(autouse=True)
def frequent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a checkpoint at the end of each batch, which has little data."""
    for name in ("_MIN_NBYTES", "_MAX_NBYTES"):
        monkeypatch.setattr(batch_pieces, name, 256 * KIB)
    monkeypatch.setattr(area_journal, "_BATCH_NBYTES", 256 * KIB)
    monkeypatch.setattr(zstd, "Helpers", lambda _, name: Helpers(0, name))
    monkeypatch.setattr(zstd, "_JOB_NBYTES", MIB)
    monkeypatch.setattr(limited_chunks, "CHUNK_NBYTES", 512 * KIB)
    monkeypatch.setattr(checkpoints, "_DUE_NBYTES", 0)
    monkeypatch.setattr(checkpoints, "started", lambda _: False)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.raw"
    DISK.write(path)
    return path


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder / "disk.qcow2"


def interrupt_at(nbytes: int) -> Callable[[imgcore.Progress], None]:
    def report(progress: imgcore.Progress) -> None:
        if progress.done >= nbytes:
            raise Interrupted

    return report


def start(source: Path, target: Path, **more: Any) -> None:
    """Convert most of the disk, and fail then."""
    with pytest.raises(Interrupted):
        imgcore.convert(source, target, resume=True, progress=interrupt_at(4 * MIB), **more)


def journal_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.imgcore-resume")


def partial_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.imgcore-partial")


def names(target: Path) -> list[str]:
    return sorted(entry.name for entry in target.parent.iterdir())


class TestGoesOn:
    def test_what_is_done_is_kept(self, source: Path, target: Path) -> None:
        start(source, target)
        assert names(target) == [partial_of(target).name, journal_of(target).name]
        reported: list[int] = []
        result = imgcore.convert(
            source, target, resume=True, progress=lambda progress: reported.append(progress.done)
        )
        assert min(reported) > MIB
        assert names(target) == [target.name]
        assert imgcore.compare(source, target).identical
        whole = imgcore.convert(source, target.with_name("whole.qcow2"))
        assert result.bytes_data == whole.bytes_data
        assert target.read_bytes() == target.with_name("whole.qcow2").read_bytes()

    @pytest.mark.parametrize("compress", [False, True])
    @pytest.mark.parametrize("size", [512, 1024])
    def test_tables_between_the_data(
        self,
        tmp_path: Path,
        target: Path,
        size: int,
        compress: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Their places depend on the disk only: not on checkpoints or breaks."""
        source = tmp_path / "long.raw"
        with open(source, "wb") as file:
            for at, nbytes in ((0, 3 * MIB), (9 * MIB + 4096, 2 * MIB + 512), (30 * MIB, MIB)):
                file.seek(at)
                file.write(images.noise(nbytes))
            file.truncate(40 * MIB + 512)
        options = {"options": {"cluster_size": size}, "compress": compress}
        at_end, whole = target.with_name("end.qcow2"), target.with_name("whole.qcow2")
        imgcore.convert(source, at_end, **options)
        monkeypatch.setattr(limits, "MAX_PENDING_TABLE_NBYTES", 64 * KIB)
        imgcore.convert(source, whole, **options)
        assert whole.read_bytes() != at_end.read_bytes()
        with pytest.raises(Interrupted):
            imgcore.convert(source, target, resume=True, progress=interrupt_at(10 * MIB), **options)
        imgcore.convert(source, target, resume=True, **options)
        digested = target.with_name("digested.qcow2")
        imgcore.convert(source, digested, checksum="sha256", **options)
        assert target.read_bytes() == whole.read_bytes()
        assert digested.read_bytes() == whole.read_bytes()
        assert imgcore.compare(source, target).identical
        assert not imgcore.check(target).corruptions

    @pytest.mark.parametrize("suffix", ["qcow2", "raw", "raw.zst"])
    def test_the_rate_is_that_of_this_run(self, source: Path, target: Path, suffix: str) -> None:
        target = target.with_suffix(f".{suffix}")
        start(source, target)
        control, seen = imgcore.Control(), []

        def note(progress: imgcore.Progress) -> None:
            seen.append((progress.done, control.progress()))

        imgcore.convert(source, target, resume=True, progress=note, control=control)
        done, first = seen[0]
        assert done > MIB
        # All of it is of the earlier run, or some of it is, which took no time.
        assert first.rate * first.seconds <= done - MIB

    def test_nothing_is_kept_before_the_first_checkpoint(self, source: Path, target: Path) -> None:
        with pytest.raises(Interrupted):
            imgcore.convert(source, target, resume=True, progress=interrupt_at(0))
        assert names(target) == []

    def test_without_it_nothing_is_kept(self, source: Path, target: Path) -> None:
        with pytest.raises(Interrupted):
            imgcore.convert(source, target, progress=interrupt_at(4 * MIB))
        assert names(target) == []

    @pytest.mark.parametrize("options", [(), ("subformat=monolithicFlat",)])
    def test_the_digest_is_of_all_runs(
        self, source: Path, target: Path, options: tuple[str, ...]
    ) -> None:
        more: dict[str, Any] = {"target_format": "vmdk", "options": options, "checksum": "sha256"}
        target = target.with_suffix(".vmdk")
        start(source, target, **more)
        result = imgcore.convert(source, target, resume="verify", verify=True, **more)
        assert result.checksum == imgcore.checksum(source)

    @pytest.mark.parametrize(("nth", "force"), [(2, False), (2, True), (3, True)])
    def test_a_sync_of_the_names_that_fails(
        self, source: Path, target: Path, nth: int, force: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Both files go back to the names under which they are kept.

        The first sync is that of a new partial file, and others are of the old files'
        names, and of one new name.
        """
        more: dict[str, Any] = {"target_format": "vmdk", "options": ("subformat=monolithicFlat",)}
        target = target.with_suffix(".vmdk")
        if force:
            target.write_bytes(b"old")
            more["force"] = True
        calls = 0

        def fail(_: TargetFolder) -> None:
            nonlocal calls
            calls += 1
            if calls == nth:
                raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as context, pytest.raises(OSError, match="Input/output"):
            context.setattr(TargetFolder, "sync_names", fail)
            imgcore.convert(source, target, resume=True, **more)
        kept = {partial_of(target).name, ".disk-flat.vmdk.imgcore-partial", journal_of(target).name}
        assert set(names(target)) == kept | ({target.name} if force else set())
        imgcore.convert(source, target, resume="verify", **more)
        assert names(target) == ["disk-flat.vmdk", target.name]
        assert imgcore.compare(source, target).identical

    def test_other_threads(self, source: Path, target: Path) -> None:
        start(source, target, threads=1)
        imgcore.convert(source, target, resume=True, threads=3)
        assert imgcore.compare(source, target).identical

    def test_a_parent(self, source: Path, target: Path) -> None:
        base = target.with_name("base.qcow2")
        older = source.with_name("older.raw")
        content = bytearray(source.read_bytes())
        content[MIB : MIB + 70000] = bytes(70000)
        older.write_bytes(content)
        imgcore.convert(older, base)
        more = {"backing": base.name, "backing_format": "qcow2"}
        start(source, target, **more)
        imgcore.convert(source, target, resume="verify", **more)
        assert imgcore.compare(source, target).identical
        assert target.stat().st_size < 2 * MIB

    def test_in_place(self, source: Path, target: Path) -> None:
        target = target.with_suffix(".raw")
        target.write_bytes(images.noise(8 * MIB))
        start(source, target, in_place=True)
        assert names(target) == [target.name, journal_of(target).name]
        imgcore.convert(source, target, resume="verify", in_place=True)
        assert target.read_bytes()[: 6 * MIB] == source.read_bytes()
        assert names(target) == [target.name]

    def test_an_image_in_place(self, source: Path, target: Path) -> None:
        target.write_bytes(images.noise(8 * MIB))
        start(source, target, in_place=True)
        imgcore.convert(source, target, resume=True, in_place=True)
        imgcore.convert(source, target.with_name("whole.qcow2"))
        assert target.read_bytes() == target.with_name("whole.qcow2").read_bytes()

    def test_a_journal_elsewhere(self, source: Path, target: Path, tmp_path: Path) -> None:
        journal = tmp_path / "journal"
        start(source, target, journal=journal)
        assert names(target) == [partial_of(target).name]
        imgcore.convert(source, target, resume=True, journal=journal)
        assert not journal.exists()
        assert imgcore.compare(source, target).identical

    def test_a_journal_elsewhere_by_the_targets_name(
        self, source: Path, target: Path, tmp_path: Path
    ) -> None:
        """Its folder does not tell where the target is."""
        journal = tmp_path / journal_of(target).name
        start(source, target, journal=journal)
        (job,) = imgcore.jobs(tmp_path)
        assert job.target == str(target)
        imgcore.jobs(tmp_path, remove=True)
        assert names(target) == []
        assert not journal.exists()

    def test_a_run_in_place_without_it_gives_up(self, source: Path, target: Path) -> None:
        """A later run would go on, although the target has been used since."""
        target = target.with_suffix(".raw")
        target.write_bytes(images.noise(8 * MIB))
        start(source, target, in_place=True)
        fd = os.open(journal_of(target), os.O_RDWR)
        assert lock(fd) is Lock.TAKEN
        with pytest.raises(imgcore.TargetError, match="another run of this conversion"):
            imgcore.convert(source, target, in_place=True)
        os.close(fd)
        imgcore.convert(source, target, in_place=True)
        assert names(target) == [target.name]

    @pytest.mark.parametrize("mode", ["falloc", "full"])
    def test_preallocated(self, source: Path, target: Path, mode: str) -> None:
        target = target.with_suffix(".raw")
        more: dict[str, Any] = {"options": {"preallocation": mode}}
        start(source, target, **more)
        imgcore.convert(source, target, resume=True, **more)
        assert target.read_bytes() == source.read_bytes()
        assert target.stat().st_blocks * 512 >= 6 * MIB

    def test_the_last_block_ends_with_zeros(self, source: Path, target: Path) -> None:
        """They are not written, so the file is shorter than what is complete of it."""
        with source.open("r+b") as file:
            file.truncate(MIB + KIB)
            file.truncate(8 * MIB)
        options = {"cluster_size": "2M"}
        report = interrupt_at(8 * MIB)
        with pytest.raises(Interrupted):
            imgcore.convert(source, target, resume=True, options=options, progress=report)
        # As a kill leaves it, before tables follow.
        os.truncate(partial_of(target), imgcore.jobs(target.parent)[0].kept_nbytes - MIB // 2)
        imgcore.convert(source, target, resume=True, options=options)
        assert imgcore.compare(source, target).identical

    @pytest.mark.parametrize("suffix", [".vhdx", ".vhd", ".vdi", ".vmdk", ".qcow2"])
    def test_blocks_of_any_size(self, source: Path, target: Path, suffix: str) -> None:
        """A block of VHDX has 32 MiB, more than a compressed one may have."""
        target = target.with_suffix(suffix)
        with source.open("r+b") as file:
            file.seek(70 * MIB)
            file.write(images.noise(MIB))
        report = interrupt_at(70 * MIB)
        with pytest.raises(Interrupted):
            imgcore.convert(source, target, resume=True, progress=report)
        assert imgcore.jobs(target.parent)[0].kept_nbytes > MIB
        imgcore.convert(source, target, resume="verify")
        assert imgcore.compare(source, target).identical

    @pytest.mark.parametrize("name", ["disk.raw.zst", "disk.raw.gz", "disk.tar.gz"])
    @pytest.mark.parametrize("compressed", [False, True])
    def test_a_stream_to_a_file(
        self, source: Path, target: Path, name: str, compressed: bool
    ) -> None:
        """Also if the source is a compressed raw disk, which is read from its start."""
        target = target.with_name(name)
        more: dict[str, Any] = {"checksum": "sha256", "threads": 1}
        if name.endswith("tar.gz"):
            more["profile"] = "gce"
        if compressed:
            imgcore.convert(source, source.with_name("source.raw.gz"))
            source = source.with_name("source.raw.gz")
        whole = target.with_name(f"whole.{name}")
        expected = imgcore.convert(source, whole, **more)
        for until in (3 * MIB, 5 * MIB):
            with pytest.raises(Interrupted):
                imgcore.convert(source, target, resume=True, progress=interrupt_at(until), **more)
        assert imgcore.jobs(target.parent)[0].kept_nbytes > 100 * KIB
        reported: list[imgcore.Progress] = []
        result = imgcore.convert(source, target, resume="verify", progress=reported.append, **more)
        assert target.read_bytes() == whole.read_bytes()
        assert min(progress.done for progress in reported) > 512 * KIB
        for field in ("checksum", "bytes_data", "bytes_written", "file_size"):
            assert getattr(result, field) == getattr(expected, field)

    @pytest.mark.parametrize("suffix", [".raw.zst", ".raw.gz"])
    def test_a_stream_that_has_changed(self, source: Path, target: Path, suffix: str) -> None:
        target = target.with_suffix(suffix)
        start(source, target)
        kept_nbytes = imgcore.jobs(target.parent)[0].kept_nbytes
        for offset, policy in ((100, "verify"), (kept_nbytes - 1, True)):
            content = partial_of(target).read_bytes()
            with partial_of(target).open("r+b") as file:
                file.seek(offset)
                file.write(bytes([content[offset] ^ 1]))
            with pytest.raises(imgcore.TargetError, match="before the break has changed, from 0x"):
                imgcore.convert(source, target, resume=policy)
            assert not target.exists()
            partial_of(target).write_bytes(content)
        imgcore.convert(source, target, resume=True)

    def test_a_stream_by_another_library(
        self, source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        target = target.with_suffix(".raw.gz")
        start(source, target)
        monkeypatch.setattr(zlib, "ZLIB_RUNTIME_VERSION", "0.9")
        with pytest.raises(imgcore.OptionError, match="compressor was zlib .*, not zlib 0.9"):
            imgcore.convert(source, target, resume=True)

    @pytest.mark.parametrize("compress", [False, True])
    def test_tables_in_front(self, source: Path, target: Path, compress: bool) -> None:
        more: dict[str, Any] = {"options": "tables=front", "compress": compress}
        start(source, target, **more)
        assert imgcore.jobs(target.parent)[0].kept_nbytes > 256 * KIB
        imgcore.convert(source, target, resume="verify", **more)
        imgcore.convert(source, target.with_name("whole.qcow2"), **more)
        assert target.read_bytes() == target.with_name("whole.qcow2").read_bytes()

    def test_the_first_of_two_passes(
        self, source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What it has learned is not learned again."""
        more: dict[str, Any] = {"options": "tables=front", "compress": True}
        add, taken = BlockTable.add, []

        def fail(table: BlockTable, first_block: int, placements: Any) -> None:
            taken.append(first_block)
            if first_block * 64 * KIB >= 4 * MIB:
                raise Interrupted
            add(table, first_block, placements)

        monkeypatch.setattr(BlockTable, "add", fail)
        with pytest.raises(Interrupted):
            imgcore.convert(source, target, resume=True, **more)
        (job,) = imgcore.jobs(target.parent)
        assert job.kept_nbytes == 0
        monkeypatch.setattr(BlockTable, "add", add)
        reads: list[int] = []
        remaining = batch_journal.BatchJournal.remaining

        def note(journal: batch_journal.BatchJournal, *arguments: Any) -> Any:
            reads.append(journal.position)
            return remaining(journal, *arguments)

        monkeypatch.setattr(batch_journal.BatchJournal, "remaining", note)
        imgcore.convert(source, target, resume=True, **more)
        assert reads[0] > MIB
        assert reads[1:] == [0]
        imgcore.convert(source, target.with_name("whole.qcow2"), **more)
        assert target.read_bytes() == target.with_name("whole.qcow2").read_bytes()

    @pytest.mark.parametrize("format", ["vhd", "vhdx"])
    def test_a_child_by_sectors(
        self, source: Path, target: Path, format: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The differences that are known are not searched for again."""
        base, child = target.with_name(f"base.{format}"), target.with_name(f"child.{format}")
        older = bytearray(source.read_bytes())
        for offset in range(0, 5 * MIB, 300 * KIB):
            older[offset : offset + 512] = images.noise(512, offset)
        source.with_name("older.raw").write_bytes(older)
        imgcore.convert(source.with_name("older.raw"), base)
        more: dict[str, Any] = {"backing": base.name, "backing_format": format}
        monkeypatch.setattr(resuming, "_new_seed", lambda: bytes(32))
        start(source, child, **more)
        positions: list[int] = []
        limits = area_journal.AreaJournal.limits

        def note(journal: area_journal.AreaJournal) -> dict[str, int]:
            positions.append(journal.position)
            assert limits.fget is not None
            found: dict[str, int] = limits.fget(journal)
            return found

        monkeypatch.setattr(area_journal.AreaJournal, "limits", property(note))
        imgcore.convert(source, child, resume=True, **more)
        assert positions[0] > MIB
        assert imgcore.compare(source, child).identical
        content = child.read_bytes()
        imgcore.convert(source, child, resume=True, force=True, **more)
        assert child.read_bytes() == content

    def test_a_target_that_is_gone_begins_anew(self, source: Path, target: Path) -> None:
        start(source, target)
        partial_of(target).unlink()
        imgcore.convert(source, target, resume=True)
        assert imgcore.compare(source, target).identical


class TestRefused:
    def test_a_source_that_has_changed(self, source: Path, target: Path) -> None:
        start(source, target)
        status, content = source.stat(), bytearray(source.read_bytes())
        os.utime(source, ns=(0, 0))
        self.refused(source, target, r"source\.raw has changed \(time of modification\)")
        content[100] ^= 1
        source.write_bytes(content)
        os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
        self.refused(source, target, r"source\.raw has changed \(content of its headers\)")
        source.write_bytes(content + bytes(512))
        self.refused(source, target, r"has changed \(size, time")

    def test_another_file(self, source: Path, target: Path) -> None:
        start(source, target)
        content, status = source.read_bytes(), source.stat()
        other = source.with_name("other.raw")
        other.write_bytes(content)
        os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
        self.refused(other, target, r"other\.raw has changed \(inode\)")

    def test_other_options(self, source: Path, target: Path) -> None:
        start(source, target)
        self.refused(source, target, "-c was False, not True", compress=True)
        self.refused(source, target, "cluster_size was 65536, not", options={"cluster_size": "1M"})
        self.refused(source, target, "-S was 4096, not 512", sparse=512)
        text = r"the digest \(--checksum, --verify, --receipt\) was None, not sha256"
        self.refused(source, target, text, checksum="sha256")
        self.refused(source, target, text, verify=True)

    def test_a_target_that_has_changed(self, source: Path, target: Path) -> None:
        start(source, target)
        with partial_of(target).open("r+b") as file:
            file.seek(imgcore.jobs(target.parent)[0].kept_nbytes - 64 * KIB)
            file.write(b"not this")
        with pytest.raises(imgcore.TargetError, match="has changed, between 0x"):
            imgcore.convert(source, target, resume=True)

    def test_an_old_change_is_found_by_verify(self, source: Path, target: Path) -> None:
        target = target.with_suffix(".raw")
        start(source, target)
        with partial_of(target).open("r+b") as file:
            file.write(b"not this")
        with pytest.raises(imgcore.TargetError, match="has changed, between 0x0 and"):
            imgcore.convert(source, target, resume="verify")

    def test_two_runs(self, source: Path, target: Path) -> None:
        start(source, target)
        fd = os.open(journal_of(target), os.O_RDWR)
        assert lock(fd) is Lock.TAKEN
        with pytest.raises(imgcore.TargetError, match="another run of this conversion"):
            imgcore.convert(source, target, resume=True)
        assert [job.is_running for job in imgcore.jobs(target.parent)] == [True]
        assert imgcore.jobs(target.parent, remove=True) == []
        os.close(fd)
        imgcore.convert(source, target, resume=True)

    def test_two_runs_at_once(self, source: Path, target: Path) -> None:
        """The second one ends with one line, and the first one is not disturbed."""
        is_inside, may_go_on = threading.Event(), threading.Event()

        def report(progress: imgcore.Progress) -> None:
            if progress.done >= 4 * MIB:
                is_inside.set()
                assert may_go_on.wait(60)

        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(imgcore.convert, source, target, resume=True, progress=report)
            assert is_inside.wait(60)
            result = run_cli("convert", "--resume", str(source), str(target))
            assert result.returncode == 1
            assert result.stderr.count("\n") == 1
            assert "another run of this conversion is at work" in result.stderr
            assert [job.is_running for job in imgcore.jobs(target.parent)] == [True]
            may_go_on.set()
            first.result()
        assert names(target) == [target.name]
        assert imgcore.compare(source, target).identical

    def test_the_journal_of_a_target_in_another_folder(self, source: Path, target: Path) -> None:
        journal = target.with_name("journal")
        start(source, target, journal=journal)
        (target.parent / "other").mkdir()
        with pytest.raises(imgcore.OptionError, match=f"is the journal of {target}"):
            other = target.parent / "other" / target.name
            imgcore.convert(source, other, resume=True, journal=journal)
        imgcore.convert(source, target, resume=True, journal=journal)

    def test_another_version(self, source: Path, target: Path) -> None:
        start(source, target)
        content = journal_of(target).read_bytes()
        journal_of(target).write_bytes(content.replace(b"resume 1\n", b"resume 2\n", 1))
        with pytest.raises(imgcore.UnsupportedFeatureError, match="another version"):
            imgcore.convert(source, target, resume=True)

    @pytest.mark.parametrize(
        ("more", "words"),
        [
            ({"sync": False}, "--no-sync"),
            ({"salvage": True}, "what is lost cannot be kept .* leave out --resume"),
            ({"reflink": "always"}, "--reflink=always.*leave out --resume"),
        ],
    )
    def test_what_cannot_go_on(
        self, source: Path, target: Path, more: dict[str, Any], words: str
    ) -> None:
        with pytest.raises(imgcore.OptionError, match=words):
            imgcore.convert(source, target, resume=True, **more)
        assert names(target) == []

    def test_a_block_device_needs_a_journal(self, source: Path) -> None:
        with pytest.raises(imgcore.OptionError, match="state a file with --journal"):
            imgcore.convert(source, "/dev/null", resume=True, in_place=True, target_format="raw")

    def test_a_stream(self, source: Path, target: Path) -> None:
        with (
            source.open("rb") as stream,
            pytest.raises(imgcore.UnsupportedFeatureError, match="save it to a file first"),
        ):
            imgcore.convert(OnlyRead(stream), target, format="raw", resume=True)
        assert names(target) == []
        imgcore.convert(source, target, resume=True)

    def test_a_journal_without_resume(self, source: Path, target: Path) -> None:
        with pytest.raises(imgcore.OptionError, match="--journal is about --resume"):
            imgcore.convert(source, target, journal="j")

    def refused(self, source: Path, target: Path, words: str, **more: Any) -> None:
        before = partial_of(target).read_bytes()
        with pytest.raises(imgcore.OptionError, match=words):
            imgcore.convert(source, target, resume=True, **more)
        assert partial_of(target).read_bytes() == before


def test_damaged_journals(source: Path, target: Path) -> None:
    """Each flipped byte is an error of one line, or an earlier checkpoint goes on."""
    start(source, target)
    journal, partial = journal_of(target).read_bytes(), partial_of(target).read_bytes()
    whole = target.with_name("whole.qcow2")
    imgcore.convert(source, whole)
    outcomes = {"refused": 0, "went on": 0}
    for offset in (*range(0, 40, 5), *range(40, len(journal), max(len(journal) // 25, 1))):
        damaged = bytearray(journal)
        damaged[offset] ^= 0x40
        journal_of(target).write_bytes(damaged)
        partial_of(target).write_bytes(partial)
        try:
            imgcore.convert(source, target, resume=True)
        except imgcore.ImgcoreError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
            assert not target.exists()
        else:
            outcomes["went on"] += 1
            assert target.read_bytes() == whole.read_bytes()
            target.unlink()
    assert outcomes["refused"] > 5
    assert outcomes["went on"] > 5


@pytest.mark.parametrize("suffix", [".qcow2", ".raw.zst", ".raw.gz"])
def test_a_receipt(source: Path, target: Path, suffix: str) -> None:
    """It says that the job went on, and has the digests of all runs."""
    target, receipt = target.with_suffix(suffix), target.with_name("receipt.json")
    # With one thread, a checkpoint comes before the interruption.
    start(source, target, receipt=receipt, threads=1)
    assert not receipt.exists()
    kept_nbytes = imgcore.jobs(target.parent)[0].kept_nbytes
    imgcore.convert(source, target, resume=True, receipt=receipt, verify=True)
    found = json.loads(receipt.read_text())
    jsonschema.validate(found, SCHEMA)
    assert found["resumed"]["kept"] == kept_nbytes > 0
    assert found["resumed"]["started"] <= found["started"]
    digest = imgcore.checksum(source).hexdigest
    for part in ("source", "target"):
        assert found[part]["checksum"]["digest"] == digest
    assert imgcore.verify(receipt).checksum.hexdigest == digest
    imgcore.convert(source, target, resume=True, receipt=receipt, force=True)
    assert json.loads(receipt.read_text())["resumed"] is None


class TestJobs:
    @pytest.mark.parametrize(
        ("name", "more"),
        [
            ("disk.raw.zst", {}),
            ("disk.raw.gz", {"threads": 1}),
            ("disk.tar.gz", {"profile": "gce", "threads": 1}),
            ("disk.qcow2", {"options": "tables=front", "compress": True}),
            ("disk.vhd", {"backing": "parent.vhd", "backing_format": "vhd"}),
        ],
    )
    def test_every_kind(self, source: Path, target: Path, name: str, more: dict[str, Any]) -> None:
        target = target.with_name(name)
        if "backing" in more:
            imgcore.convert(source, target.with_name("parent.vhd"))
        start(source, target, **more)
        (job,) = imgcore.jobs(target.parent)
        assert (job.target, job.sources[0]) == (str(target), str(source))
        # A child begins anew: what differs is kept in the journal.
        assert (job.kept_nbytes > 0) == ("backing" not in more)
        assert run_cli("jobs", str(target.parent)).stdout.startswith(f"{target}: ")
        assert imgcore.jobs(target.parent, remove=True) == [job]
        assert names(target) == (["parent.vhd"] if "backing" in more else [])

    def test_listed_and_removed(self, source: Path, target: Path) -> None:
        assert imgcore.jobs(target.parent) == []
        start(source, target)
        (job,) = imgcore.jobs(target.parent)
        assert job.target == str(target)
        assert job.journal == str(journal_of(target))
        assert job.sources == (str(source),)
        assert job.kept_nbytes > MIB
        assert imgcore.jobs(job.journal) == [job]
        assert imgcore.jobs(target.parent, remove=True) == [job]
        assert names(target) == []

    def test_all_files_are_removed(self, source: Path, target: Path) -> None:
        flat = target.with_suffix(".vmdk")
        start(source, flat, options={"subformat": "monolithicFlat"})
        assert len(names(flat)) == 3
        imgcore.jobs(flat.parent, remove=True)
        assert names(flat) == []

    def test_a_damaged_journal_is_a_warning(self, source: Path, target: Path) -> None:
        start(source, target)
        journal_of(target).write_bytes(b"something else")
        result = run_cli("jobs", str(target.parent))
        assert result.returncode == 0
        assert result.stdout == ""
        assert "the journal is damaged" in result.stderr

    @pytest.mark.parametrize(
        "content", [b"", b"imgcore resume 9\nnew", b"imgcore resume 1\nbroken"]
    )
    def test_an_unreadable_journal_is_given_up_on_request(
        self, source: Path, target: Path, content: bytes
    ) -> None:
        start(source, target)
        journal_of(target).write_bytes(content)
        result = run_cli("convert", "--resume", str(source), str(target))
        assert result.returncode == 1
        assert result.stderr.endswith("give it up (imgcore jobs --remove), and start again\n")
        result = run_cli("jobs", "--remove", str(target.parent))
        assert result.stdout == f"{target}: given up\n"
        assert names(target) == []
        assert run_cli("convert", "--resume", str(source), str(target)).returncode == 0

    def test_what_is_no_journal_is_not_removed(self, tmp_path: Path) -> None:
        path = tmp_path / "letter"
        path.write_bytes(b"Dear Sir")
        assert imgcore.jobs(path, remove=True) == []
        assert path.read_bytes() == b"Dear Sir"

    def test_by_the_command(self, source: Path, target: Path) -> None:
        start(source, target)
        folder = str(target.parent)
        assert run_cli("jobs", folder).stdout.startswith(f"{target}: ")
        (row,) = json.loads(run_cli("jobs", "--json", folder).stdout)
        assert row["target"] == str(target)
        assert run_cli("jobs", "--remove", folder).stdout == f"{target}: given up\n"
        assert names(target) == []


def test_no_thread(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one, the library would write other bytes; nothing is lost by that."""
    target = target.with_suffix(".raw.zst")
    start(source, target)
    monkeypatch.setattr(zstd.ZstdEncoder, "_stream_after", lambda *_: None)
    with pytest.raises(imgcore.ImgcoreError, match="no thread can be made"):
        imgcore.convert(source, target, resume=True)
    monkeypatch.undo()
    monkeypatch.setattr(zstd, "_JOB_NBYTES", MIB)
    assert imgcore.jobs(target.parent)[0].kept_nbytes > 100 * KIB
    imgcore.convert(source, target, resume=True)
    assert imgcore.checksum(target) == imgcore.checksum(source)
