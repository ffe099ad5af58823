"""A conversion inside a file: the old image, or the new one, and the way between."""

from __future__ import annotations

import json
import mmap
import os
import struct
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from tests.helpers import qemu
from tests.helpers.mounts import loop_device
from tests.helpers.tiny import FRONT, OLD, SIZE, new_content, rewrite

import imgcore
from imgcore.errors import ImgcoreError, LimitExceededError, TargetError
from imgcore.files.in_place import InPlace, finish, recover, undo
from imgcore.files.staged_file import Change
from imgcore.limits import MAX_OVERWRITTEN_NBYTES

MTIME_NS = 10**18 + 7


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.old"
    path.write_bytes(OLD)
    os.utime(path, ns=(MTIME_NS, MTIME_NS))
    return path


def files_beside(path: Path) -> list[str]:
    return sorted(os.listdir(path.parent))


def assert_old(path: Path) -> None:
    assert path.read_bytes() == OLD
    assert path.stat().st_mtime_ns == MTIME_NS
    assert files_beside(path) == [path.name]


class TestCommit:
    def test_there_and_back(self, disk: Path) -> None:
        new = rewrite(disk)
        assert new.name == "disk.new"
        assert new.read_bytes() == new_content()
        assert files_beside(new) == ["disk.new", "disk.new.imgcore-journal"]
        assert (disk.parent / "disk.new.imgcore-journal").stat().st_mode & 0o777 == 0o600
        assert undo(new) == str(disk)
        assert_old(disk)

    def test_without_commit_nothing_has_changed(self, disk: Path) -> None:
        assert rewrite(disk, commit=False) == disk
        assert_old(disk)

    def test_an_exception_restores(self, disk: Path) -> None:
        with pytest.raises(ZeroDivisionError), InPlace(disk) as job:
            job.start({}, [(0, FRONT)]).pwrite(SIZE, b"x" * 1000)
            raise ZeroDivisionError
        assert_old(disk)

    def test_the_name_may_stay(self, disk: Path) -> None:
        assert rewrite(disk, name=None) == disk
        assert disk.read_bytes() == new_content()
        assert undo(disk) == str(disk)
        assert_old(disk)

    def test_side_files(self, disk: Path) -> None:
        (disk.parent / "a.txt").write_bytes(b"old side")
        (disk.parent / "a.txt").chmod(0o640)
        new = rewrite(disk, name="b.txt", created={"a.txt": b"new side"}, removed=["a.txt"])
        assert (new.parent / "a.txt").read_bytes() == b"new side"
        assert undo(new.parent / "a.txt") == str(disk)
        assert (disk.parent / "a.txt").read_bytes() == b"old side"
        assert (disk.parent / "a.txt").stat().st_mode & 0o777 == 0o640
        (disk.parent / "a.txt").unlink()
        assert_old(disk)

    def test_recovering_what_is_complete(self, disk: Path) -> None:
        """The same command again, by the old or the new name, finds it done."""
        new = rewrite(disk, created={"side": b"x"})
        for path in (disk, new, new.parent / "side"):
            assert recover(path) == ("new", str(new), {"to": "new"})
        other = disk.with_name("other")
        other.write_bytes(b"x")
        assert recover(other) is None
        disk.write_bytes(OLD)
        assert recover(disk) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_side_files_belong_to_the_owner_of_the_image(disk: Path) -> None:
    side = disk.parent / "disk.old.txt"
    side.write_bytes(b"old")
    for path in (disk, side):
        os.chown(path, 1234, 2345)
    new = rewrite(disk, created={"disk.txt": b"new"}, removed=[side.name])
    status = (disk.parent / "disk.txt").stat()
    assert (status.st_uid, status.st_gid) == (1234, 2345)
    undo(new)
    assert (side.stat().st_uid, side.stat().st_gid) == (1234, 2345)


class TestUndo:
    @pytest.mark.parametrize("offset", [3, SIZE // 2, SIZE + FRONT + 7])
    def test_refused_after_a_write(self, disk: Path, offset: int) -> None:
        new = rewrite(disk)
        status = new.stat()
        with new.open("r+b") as file:
            file.seek(offset)
            file.write(b"guest")
        with pytest.raises(ImgcoreError, match="written to since .* time of modification"):
            undo(new)
        if offset != SIZE // 2:
            os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))
            with pytest.raises(ImgcoreError, match="written to since .* tables"):
                undo(new)
        os.truncate(new, SIZE)
        with pytest.raises(ImgcoreError, match="written to since .* size"):
            undo(new)

    def test_without_a_journal(self, disk: Path) -> None:
        for call in (undo, finish):
            with pytest.raises(ImgcoreError, match="has no journal"):
                call(disk)
        assert_old(disk)


class TestFinish:
    def test_blocks_are_given_back(self, disk: Path) -> None:
        new = rewrite(disk)
        keep = [(SIZE // 2 + 100, 4000), (FRONT, 5), (SIZE, 2 * FRONT)]
        assert finish(new, keep) == str(new)
        assert files_beside(new) == ["disk.new"]
        wanted = bytearray(new_content())
        wanted[FRONT + 4096 : SIZE // 2] = bytes(SIZE // 2 - FRONT - 4096)
        wanted[SIZE // 2 + 8192 : SIZE] = bytes(SIZE // 2 - 8192)
        assert new.read_bytes() == wanted

    def test_all_stays_if_it_was_written_to(
        self, disk: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        new = rewrite(disk)
        os.utime(new)
        finish(new, [])
        assert new.read_bytes() == new_content()
        assert files_beside(new) == ["disk.new"]
        assert "keep their space" in caplog.text

    def test_nothing_is_known_to_be_free(self, disk: Path) -> None:
        new = rewrite(disk)
        finish(new)
        assert new.read_bytes() == new_content()


class TestRefused:
    def test_links(self, disk: Path) -> None:
        link = disk.with_name("link")
        link.symlink_to(disk)
        with pytest.raises(TargetError, match="is a symbolic link"):
            InPlace(link)
        link.unlink()
        link.hardlink_to(disk)
        with pytest.raises(TargetError, match="has 2 names"):
            InPlace(disk)

    def test_other_kinds(self, disk: Path) -> None:
        os.mkfifo(disk.with_name("fifo"))
        with pytest.raises(TargetError, match="is a pipe"):
            InPlace(disk.with_name("fifo"))
        with pytest.raises(TargetError, match="is a folder"):
            InPlace(disk.parent)
        with pytest.raises(FileNotFoundError, match="missing"):
            InPlace(disk.with_name("missing"))

    def test_read_only(self, disk: Path) -> None:
        disk.chmod(0o444)
        with pytest.raises(TargetError, match="read-only"):
            InPlace(disk)

    @pytest.mark.parametrize("mode", ["rb", "r+b"])
    def test_open_elsewhere(self, disk: Path, mode: str) -> None:
        with disk.open(mode), pytest.raises(TargetError, match="another program has it open"):
            InPlace(disk)
        with InPlace(disk) as job:
            job.start({}, [(0, FRONT)]).pwrite(SIZE, b"x")
            with disk.open(mode), pytest.raises(TargetError, match="another program"):
                job.commit()
        assert_old(disk)

    def test_mapped(self, disk: Path) -> None:
        """A mapping keeps the file open although no descriptor does."""
        with disk.open("rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with pytest.raises(TargetError, match="another program has it open"):
            InPlace(disk)
        mapping.close()
        InPlace(disk).close()

    def test_loop_device(self, disk: Path) -> None:
        with loop_device(disk), pytest.raises(TargetError, match="another program has it open"):
            InPlace(disk)

    @pytest.mark.parametrize("options", [(), ("-r",)], ids=["writing", "reading"])
    def test_qemu(self, disk: Path, options: tuple[str, ...]) -> None:
        with (
            qemu.held_open("-f", "raw", *options, disk),
            pytest.raises(TargetError, match="QEMU's image lock"),
        ):
            InPlace(disk)
        with InPlace(disk):
            words = ["qemu-io", "-f", "raw", *options, "-c", "read 0 512", disk]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            assert "lock" in done.stdout + done.stderr

    def test_imgcore_does_not_wait_for_the_last_step(
        self, disk: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        apply, seen = Change.apply, []

        def open_it(change: Change, *words: Any, **more: Any) -> None:
            for call in (InPlace, recover, imgcore.info):
                with pytest.raises(BlockingIOError) as caught:
                    call(disk)
                seen.append(str(caught.value))
            apply(change, *words, **more)

        monkeypatch.setattr(Change, "apply", open_it)
        assert rewrite(disk).read_bytes() == new_content()
        assert len(seen) == 3
        assert all("Another program has it open: " in text for text in seen)

    def test_whoever_opens_it_in_the_last_step_waits(
        self, disk: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And the process that rewrites it gets no signal that ends it."""
        readers = []
        apply = Change.apply

        def with_reader(change: Change, *args: Any, **more: Any) -> None:
            readers.append(subprocess.Popen(["cat", disk], stdout=subprocess.PIPE))
            time.sleep(0.2)
            apply(change, *args, **more)

        monkeypatch.setattr(Change, "apply", with_reader)
        rewrite(disk, name=None)
        out, _ = readers[0].communicate()
        assert out == new_content()

    def test_two_jobs(self, disk: Path) -> None:
        with InPlace(disk) as job:
            job.start({}, [(0, FRONT)])
            for call in (InPlace, recover, undo, finish):
                with pytest.raises(TargetError, match="in use by this process"):
                    call(disk)
        assert_old(disk)

    def test_names_that_are_taken(self, disk: Path) -> None:
        for name in ("disk.new", "side", "disk.new.imgcore-journal"):
            disk.with_name(name).write_bytes(b"precious")
            with pytest.raises(TargetError, match=f"{name}: exists already"):
                rewrite(disk, created={"side": b"x"})
            assert disk.with_name(name).read_bytes() == b"precious"
            disk.with_name(name).unlink()
        assert_old(disk)

    def test_a_name_for_which_the_journal_has_none(self, disk: Path) -> None:
        """Refused before anything is changed, not when the journal is removed."""
        for nbytes in (239, 236):
            with pytest.raises(OSError, match="File name too long"):
                rewrite(disk, name="n" * nbytes)
            assert_old(disk)
        new = rewrite(disk, name="n" * 235)
        assert finish(new) == str(new)

    @pytest.mark.parametrize(
        "more", [{"created": 5}, {"created": [5]}, {"removed": [[]]}, {"removed": {"a": 1}}]
    )
    def test_journals_of_others_that_make_no_sense(self, disk: Path, more: dict[str, Any]) -> None:
        head = json.dumps({"name": "other", **more}).encode()
        start = b"imgcore journal 1\n".ljust(34, b"s") + struct.pack("<II", 4 + len(head), 0)
        other = disk.parent / "other.imgcore-journal"
        other.write_bytes(start + struct.pack("<I", len(head)) + head)
        assert undo(rewrite(disk)) == str(disk)
        other.unlink()
        assert_old(disk)

    def test_too_much_is_overwritten(self, tmp_path: Path) -> None:
        path = tmp_path / "large"
        with path.open("wb") as file:
            file.truncate(2 * MAX_OVERWRITTEN_NBYTES)
        with InPlace(path) as job, pytest.raises(LimitExceededError, match="at most 134217728"):
            job.start({}, [(0, MAX_OVERWRITTEN_NBYTES + 1)])
        assert files_beside(path) == ["large"]

    def test_changed_meanwhile(self, disk: Path) -> None:
        with InPlace(disk) as job:
            with disk.open("r+b") as file:
                file.write(b"x")
            with pytest.raises(ImgcoreError, match="changed while it was read"):
                job.start({}, [(0, FRONT)])
        assert files_beside(disk) == ["disk.old"]
        with InPlace(disk) as job:
            job.start({}, [(0, FRONT)])
            with disk.open("r+b") as file:
                file.write(b"guest")
            with pytest.raises(ImgcoreError, match="changed while it was converted"):
                job.commit()
        assert disk.read_bytes()[:5] == b"guest"
        assert files_beside(disk) == ["disk.old"]


def test_a_conversion_that_can_be_undone_is_kept(disk: Path) -> None:
    new = rewrite(disk)
    with pytest.raises(TargetError, match=r"disk\.new\.imgcore-journal.*--finish.*--undo"):
        rewrite(new, name="disk.third")
    assert undo(new) == str(disk)
    new = rewrite(disk)
    finish(new)
    rewrite(new, name="disk.third")


@pytest.mark.parametrize("flag", ["i", "a"])
def test_immutable(disk: Path, flag: str) -> None:
    if subprocess.run(["chattr", f"+{flag}", disk], check=False).returncode:
        pytest.skip("needs root, and a file system with flags")
    try:
        with pytest.raises(TargetError, match="immutable or append-only") as caught:
            InPlace(disk)
    finally:
        subprocess.run(["chattr", "-i", "-a", disk], check=True)
    assert f"chattr -i -a {disk} permits" in str(caught.value)
    InPlace(disk).close()
