"""Targets: the final name is always absent, the old file, or the complete new one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from tests.helpers.mounts import loop_device, make_file_system
from tests.helpers.mounts import mounted as mounted_image
from tests.helpers.qemu import held_open

import imgcore
from imgcore.errors import TargetError
from imgcore.files import target as target_module
from imgcore.files import target_folder, temporary_names
from imgcore.files.host_file import HostFile
from imgcore.files.identity import same_file
from imgcore.files.locks import Lock, lock
from imgcore.files.target import Target

NEW = b"new" * 1000


def write(path: Path | str, *, data: bytes = NEW, **options: Any) -> None:
    with Target(path, **options) as target:
        target.main.pwrite(0, data)
        target.commit()


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.fixture(autouse=True)
def no_descriptor_left() -> Iterator[None]:
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert set(os.listdir("/proc/self/fd")) == before


class TestCommit:
    def test_new_file(self, tmp_path: Path) -> None:
        path = tmp_path / "disk.raw"
        with Target(path) as target:
            assert (target.identity, target.in_place) == (None, False)
            target.main.pwrite(0, NEW)
            assert not path.exists()
            (temporary,) = names(tmp_path)
            assert temporary.startswith(f".disk.raw.imgcore-{os.getpid()}-")
            target.commit()
        assert path.read_bytes() == NEW
        assert names(tmp_path) == ["disk.raw"]

    def test_without_commit(self, tmp_path: Path) -> None:
        with Target(tmp_path / "disk.raw") as target:
            target.main.pwrite(0, NEW)
        target.abort()
        assert names(tmp_path) == []

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
    def test_exception(self, tmp_path: Path, error: type[BaseException]) -> None:
        (tmp_path / "disk.raw").write_bytes(b"old")
        with pytest.raises(error), Target(tmp_path / "disk.raw", force=True) as target:
            target.main.pwrite(0, NEW)
            raise error
        assert names(tmp_path) == ["disk.raw"]
        assert (tmp_path / "disk.raw").read_bytes() == b"old"

    def test_without_sync(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "fsync", lambda fd: pytest.fail("synced"))
        write(tmp_path / "disk.raw", sync=False)
        assert (tmp_path / "disk.raw").read_bytes() == NEW

    def test_order_of_operations(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "disk.raw").write_bytes(b"old")
        done: list[str] = []

        def record(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **keywords: Any) -> Any:
                is_folder = name == "fsync" and stat.S_ISDIR(os.fstat(arguments[0]).st_mode)
                done.append(f"{name} folder" if is_folder else name)
                return real(*arguments, **keywords)

            return call

        for name in ("fsync", "rename", "pwrite"):
            monkeypatch.setattr(os, name, record(name, getattr(os, name)))
        write(tmp_path / "disk.raw", force=True)
        assert done == ["pwrite", "fsync", "rename", "fsync folder"]

    def test_twice(self, tmp_path: Path) -> None:
        with Target(tmp_path / "disk.raw") as target:
            target.commit()
            with pytest.raises(RuntimeError):
                target.commit()

    def test_long_name(self, tmp_path: Path) -> None:
        for name in ("n" * 255, "ü" * 127):
            write(tmp_path / name)
            assert (tmp_path / name).read_bytes() == NEW

    def test_name_of_any_bytes(self, tmp_path: Path) -> None:
        write(os.fsdecode(bytes(tmp_path) + b"/\xff\xfe.raw"))
        assert os.listdir(bytes(tmp_path)) == [b"\xff\xfe.raw"]

    def test_relative_name_after_chdir(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with Target("disk.raw") as target:
            monkeypatch.chdir("/")
            target.commit()
        assert names(tmp_path) == ["disk.raw"]


class TestMode:
    @pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
    def test_new_file_respects_umask(self, tmp_path: Path, umask: int, mode: int) -> None:
        old = os.umask(umask)
        try:
            write(tmp_path / "disk.raw")
        finally:
            os.umask(old)
        assert stat.S_IMODE(os.stat(tmp_path / "disk.raw").st_mode) == mode

    @pytest.mark.parametrize("mode", [0o600, 0o666, 0o640])
    def test_replacing_keeps_the_old_mode(self, tmp_path: Path, mode: int) -> None:
        path = tmp_path / "disk.raw"
        path.write_bytes(b"old")
        path.chmod(mode)
        with Target(path, force=True) as target:
            assert stat.S_IMODE(os.fstat(target.main.fd).st_mode) == mode
            target.commit()
        assert stat.S_IMODE(os.stat(path).st_mode) == mode

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
    def test_replacing_keeps_the_owner(self, tmp_path: Path) -> None:
        for name in ("disk.vmdk", "disk-flat.vmdk"):
            (tmp_path / name).write_bytes(b"old")
            os.chown(tmp_path / name, 12345, 23456)
        with Target(tmp_path / "disk.vmdk", force=True) as target:
            target.companion("disk-flat.vmdk")
            target.commit()
        for name in ("disk.vmdk", "disk-flat.vmdk"):
            status = os.stat(tmp_path / name)
            assert (status.st_uid, status.st_gid, status.st_size) == (12345, 23456, 0)


class TestAttributes:
    """What a replaced file had, its successor has, as far as the system permits."""

    NAMES = ("disk.vmdk", "disk-flat.vmdk")

    def replace(self, folder: Path) -> None:
        with Target(folder / "disk.vmdk", force=True) as target:
            target.companion("disk-flat.vmdk")
            target.commit()

    def old_files(self, folder: Path) -> list[Path]:
        paths = [folder / name for name in self.NAMES]
        for path in paths:
            path.write_bytes(b"old")
            path.chmod(0o660)
            try:
                os.setxattr(path, "user.backup", b"17")
            except OSError:
                pytest.skip("no extended attributes here")
        return paths

    def test_extended_attributes_stay(self, tmp_path: Path) -> None:
        paths = self.old_files(tmp_path)
        self.replace(tmp_path)
        for path in paths:
            assert path.stat().st_size == 0
            assert os.getxattr(path, "user.backup") == b"17"
            assert stat.S_IMODE(path.stat().st_mode) == 0o660

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
    def test_labels_stay(self, tmp_path: Path) -> None:
        """SELinux's label, and trusted attributes; not those of the old content."""
        paths = self.old_files(tmp_path)
        kept = {"security.selinux": b"system_u:object_r:virt_image_t:s0\0", "trusted.x": b"1"}
        present = {}
        for name, value in (kept | {"security.capability": CAPABILITY}).items():
            with contextlib.suppress(OSError):
                for path in paths:
                    os.setxattr(path, name, value)
                present[name] = value
        if not present.keys() & kept.keys():
            pytest.skip("no labels here")
        self.replace(tmp_path)
        for path in paths:
            found = {name: os.getxattr(path, name) for name in os.listxattr(path)}
            wanted = {name: value for name, value in present.items() if name in kept}
            assert found == wanted | {"user.backup": b"17"}

    @pytest.mark.parametrize("has_acl", [True, False])
    def test_the_acl_stays(self, tmp_path: Path, has_acl: bool) -> None:
        """A folder's default ACL does not apply to what takes another's place."""
        paths = self.old_files(tmp_path)
        if has_acl:
            for path in paths:
                set_acl(path, "system.posix_acl_access", 4321, 6)
        set_acl(tmp_path, "system.posix_acl_default", 1234, 7)
        before = [(sorted(os.listxattr(path)), path.stat().st_mode) for path in paths]
        self.replace(tmp_path)
        after = [(sorted(os.listxattr(path)), path.stat().st_mode) for path in paths]
        assert after == before
        for path in paths if has_acl else ():
            assert struct.pack("<I", 4321) in os.getxattr(path, "system.posix_acl_access")

    def test_the_project_stays(self, tmp_path: Path) -> None:
        image = make_file_system("xfs", tmp_path / "image", 320 << 20)
        with mounted_image(image, tmp_path / "mounted", "-o", "loop") as folder:
            path = folder / "disk.raw"
            path.write_bytes(b"old")
            with path.open("r+b") as file:
                record = bytearray(fcntl.ioctl(file, FSGETXATTR, bytes(28)))
                record[12:16] = struct.pack("@I", 42)
                fcntl.ioctl(file, FSSETXATTR, bytes(record))
            write(path, force=True)
            with path.open("rb") as file:
                record = bytearray(fcntl.ioctl(file, FSGETXATTR, bytes(28)))
            assert record[12:16] == struct.pack("@I", 42)

    @pytest.mark.parametrize("call", ["fchmod", "fchown", "setxattr"])
    @pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.EINVAL])
    def test_a_refusal_is_a_warning(
        self,
        tmp_path: Path,
        call: str,
        code: int,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """As on CIFS, NTFS and exFAT; it has the file's name."""
        paths = self.old_files(tmp_path)
        for path in paths:
            if os.geteuid() == 0:
                os.chown(path, 12345, 23456)

        def refuse(*_: object, **__: object) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, call, refuse)
        self.replace(tmp_path)
        assert all(path.stat().st_size == 0 for path in paths)
        if call == "fchown" and os.geteuid() != 0:
            return
        what = {"fchmod": "mode 0660", "fchown": "owner 12345", "setxattr": "user.backup"}[call]
        for path in paths:
            lines = [line for line in caplog.messages if line.startswith(f"{path}: its ")]
            assert any(f"{what} could not be kept: {os.strerror(code)}" in line for line in lines)
        # What the old group was permitted, another group is not.
        if call == "fchown":
            assert stat.S_IMODE(paths[0].stat().st_mode) == 0o600


FSGETXATTR, FSSETXATTR = 0x801C581F, 0x401C5820
CAPABILITY = struct.pack("<5I", 0x02000000, 1 << 10, 0, 0, 0)


def set_acl(path: Path, name: str, user: int, permissions: int) -> None:
    """Give one user permissions; Linux include/uapi/linux/posix_acl_xattr.h."""
    entries = [(1, 6, -1), (2, permissions, user), (4, 4, -1), (0x10, 7, -1), (0x20, 0, -1)]
    packed = b"".join(struct.pack("<HHi", *entry) for entry in entries)
    try:
        os.setxattr(path, name, struct.pack("<I", 2) + packed)
    except OSError:
        pytest.skip("no ACLs here")


class TestExisting:
    def test_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "disk.raw"
        path.write_bytes(b"old")
        with pytest.raises(TargetError, match="exists already; --force") as caught:
            Target(path)
        assert str(caught.value).startswith(str(path))
        assert path.read_bytes() == b"old"

    def test_forced(self, tmp_path: Path) -> None:
        path = tmp_path / "disk.raw"
        path.write_bytes(b"old")
        with path.open("rb") as old:
            write(path, force=True)
            assert old.read() == b"old"
        assert path.read_bytes() == NEW

    @pytest.mark.parametrize("way", ["renameat2", "link", "neither"])
    def test_appears_meanwhile(
        self, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "disk.raw"
        without(way, monkeypatch)
        with (
            pytest.raises(TargetError, match="appeared meanwhile"),
            Target(path) as target,
        ):
            path.write_bytes(b"theirs")
            target.commit()
        assert path.read_bytes() == b"theirs"
        assert names(tmp_path) == ["disk.raw"]

    @pytest.mark.parametrize("way", ["renameat2", "link", "neither"])
    def test_each_way_of_renaming(
        self, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        without(way, monkeypatch)
        write(tmp_path / "disk.raw")
        assert names(tmp_path) == ["disk.raw"]
        assert os.stat(tmp_path / "disk.raw").st_nlink == 1

    def test_two_jobs_without_force(self, tmp_path: Path) -> None:
        with Target(tmp_path / "a") as first, Target(tmp_path / "a") as second:
            first.main.pwrite(0, b"first")
            second.main.pwrite(0, b"second")
            second.commit()
            with pytest.raises(TargetError):
                first.commit()
        assert (tmp_path / "a").read_bytes() == b"second"
        assert names(tmp_path) == ["a"]

    def test_many_jobs_with_force(self, tmp_path: Path) -> None:
        """The name always has one complete result, whichever job is last."""
        path = tmp_path / "a"
        contents = [bytes([65 + i]) * 50_000 for i in range(4)]
        write(path, data=contents[0], sync=False)

        def job(content: bytes) -> None:
            for _ in range(25):
                write(path, data=content, force=True, sync=False)

        threads = [threading.Thread(target=job, args=(content,)) for content in contents]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            assert path.read_bytes() in contents
        for thread in threads:
            thread.join()
        assert names(tmp_path) == ["a"]


def without(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away the ways of renaming that come before ``way``."""
    import ctypes

    if way == "renameat2":
        return
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    if way == "neither":

        def link(*_: Any, **__: Any) -> None:
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(os, "link", link)


class TestLinks:
    def test_refused(self, tmp_path: Path) -> None:
        (tmp_path / "real").write_bytes(b"old")
        (tmp_path / "link").symlink_to("real")
        for in_place in (False, True):
            with pytest.raises(TargetError, match="is a symbolic link, not written through"):
                Target(tmp_path / "link", in_place=in_place)
        assert (tmp_path / "real").read_bytes() == b"old"

    def test_force_replaces_the_link_itself(self, tmp_path: Path) -> None:
        (tmp_path / "real").write_bytes(b"old")
        (tmp_path / "link").symlink_to("real")
        write(tmp_path / "link", force=True)
        assert (tmp_path / "real").read_bytes() == b"old"
        assert not (tmp_path / "link").is_symlink()
        assert (tmp_path / "link").read_bytes() == NEW

    def test_dangling(self, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to("none")
        with pytest.raises(TargetError, match="symbolic link"):
            Target(tmp_path / "link")
        write(tmp_path / "link", force=True)
        assert names(tmp_path) == ["link"]

    @pytest.mark.parametrize("how", ["same", "soft", "hard"])
    def test_identity_tells_the_source(self, tmp_path: Path, how: str) -> None:
        source = tmp_path / "source.raw"
        source.write_bytes(b"old")
        target = source if how == "same" else tmp_path / "target.raw"
        if how == "soft":
            target.symlink_to(source)
        elif how == "hard":
            os.link(source, target)
        with HostFile.open(source) as file, Target(target, force=True) as place:
            assert same_file(file.identity, place.identity)


def links_to_special(folder: Path) -> dict[str, str]:
    """Return names of links that must never be replaced, and what they lead to."""
    os.mkfifo(folder / "fifo")
    (folder / "folder").mkdir()
    (folder / "to-null").symlink_to("/dev/null")
    return {
        "character-device": "/dev/null",
        "terminal": "/dev/tty",
        "pipe": str(folder / "fifo"),
        "folder": str(folder / "folder"),
        "two-links": str(folder / "to-null"),
        "stdout": "/dev/stdout",
        "stderr": "/dev/stderr",
        "number": "/dev/fd/1",
        "proc": "/proc/self/fd/0",
        "proc-file": "/proc/version",
        "sysfs": "/sys/kernel/notes",
        "absent-device": "/dev/disk/by-id/none",
        "absent-process": "/proc/4999999/fd/1",
    }


KINDS = [
    *("character-device", "terminal", "pipe", "folder", "two-links", "stdout", "stderr"),
    *("number", "proc", "proc-file", "sysfs", "absent-device", "absent-process"),
]


class TestSpecial:
    """What is no ordinary file is never replaced, and --force is not advised."""

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("options", [{}, {"force": True}, {"in_place": True}], ids=str)
    @pytest.mark.parametrize("has_stdout_in_file", [True, False])
    def test_link(
        self, tmp_path: Path, kind: str, options: dict[str, bool], has_stdout_in_file: bool
    ) -> None:
        link = tmp_path / "disk.vmdk"
        link.symlink_to(links_to_special(tmp_path)[kind])
        with (tmp_path / "out").open("w+b") as out, standard_output(has_stdout_in_file, out):
            with pytest.raises(TargetError) as caught, Target(link, **options):
                pass
        assert "--force" not in str(caught.value)
        assert str(caught.value).startswith(f"{link}: is ")
        assert link.is_symlink()
        assert not [name for name in names(tmp_path) if name.startswith(".")]

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("force", [True, False])
    def test_companion(self, tmp_path: Path, kind: str, force: bool) -> None:
        link = tmp_path / "disk-flat.vmdk"
        link.symlink_to(links_to_special(tmp_path)[kind])
        with Target(tmp_path / "disk.vmdk", force=force) as target:
            with pytest.raises(TargetError) as caught:
                target.companion("disk-flat.vmdk")
        assert "--force" not in str(caught.value)
        assert link.is_symlink()

    @pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "/dev/null"])
    @pytest.mark.parametrize("force", [True, False])
    def test_the_thing_itself(self, tmp_path: Path, name: str, force: bool) -> None:
        before = os.lstat(name)
        with (tmp_path / "out").open("w+b") as out, standard_output(True, out):
            with pytest.raises(TargetError) as caught, Target(name, force=force):
                pass
        assert "--force" not in str(caught.value)
        assert os.lstat(name).st_mode == before.st_mode

    def test_a_file_of_the_kernel(self) -> None:
        for options in ({}, {"force": True}, {"in_place": True}):
            with pytest.raises(TargetError, match="is no ordinary file, and is never a target"):
                Target("/proc/sys/kernel/core_pattern", **options)

    @pytest.mark.parametrize("force", [True, False])
    @pytest.mark.parametrize("n_links", [1, 2, 3])
    def test_a_loop_of_links(self, tmp_path: Path, n_links: int, force: bool) -> None:
        for index in range(n_links):
            (tmp_path / f"link{index}").symlink_to(f"link{(index + 1) % n_links}")
        with pytest.raises(TargetError, match="is a symbolic link that leads to itself$"):
            Target(tmp_path / "link0", force=force)
        assert (tmp_path / "link0").is_symlink()

    @pytest.mark.parametrize("name", ["/dev/imgcore-none", "/dev/mapper/../imgcore-none"])
    @pytest.mark.parametrize("options", [{}, {"force": True}], ids=str)
    def test_a_device_that_is_absent(self, name: str, options: dict[str, bool]) -> None:
        """A misspelt name of a device fills no memory with a file of this name."""
        words = "there is no such device, and no file is created here$"
        with pytest.raises(TargetError, match=words), Target(name, **options):
            pass
        assert not os.path.lexists("/dev/imgcore-none")

    def test_shared_memory_takes_files(self) -> None:
        path = Path("/dev/shm") / f"imgcore-{os.getpid()}"
        if not path.parent.is_dir():
            pytest.skip("there is no /dev/shm")
        try:
            write(path)
            assert path.read_bytes() == NEW
        finally:
            path.unlink(missing_ok=True)

    def test_advice_for_a_dangling_link(self, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to("none")
        words = "is a symbolic link to none, which is missing, not written through; --force"
        with pytest.raises(TargetError, match=words):
            Target(tmp_path / "link")
        write(tmp_path / "link", force=True)
        assert names(tmp_path) == ["link"]


@contextlib.contextmanager
def standard_output(in_file: bool, file: IO[bytes]) -> Iterator[None]:
    """Have stdin, stdout and stderr lead to a regular file meanwhile."""
    saved = [os.dup(number) for number in range(3)]
    try:
        for number in range(3) if in_file else ():
            os.dup2(file.fileno(), number)
        yield
    finally:
        for number, fd in enumerate(saved):
            os.dup2(fd, number)
            os.close(fd)


class TestReplaceable:
    """What the rename would refuse at the end is refused before anything is written."""

    @pytest.mark.parametrize(
        ("flags", "name", "advice"),
        [("+i", "disk.raw", "-i -a"), ("+a", "disk.raw", "-i -a"), ("+a", "", "-a")],
    )
    def test_flags(self, tmp_path: Path, flags: str, name: str, advice: str) -> None:
        folder = tmp_path / "here"
        folder.mkdir()
        (folder / "disk.raw").write_bytes(b"old")
        path = folder / name
        if subprocess.run(["chattr", flags, path], capture_output=True, check=False).returncode:
            pytest.skip("no such flags here, or not root")
        try:
            with pytest.raises(TargetError) as caught, Target(folder / "disk.raw", force=True):
                pass
            assert names(folder) == ["disk.raw"]
            command = f"chattr {advice} {path}".rstrip("/")
            assert f"{command} permits it" in str(caught.value)
            subprocess.run(command.split(), check=True)
            write(folder / "disk.raw", force=True)
        finally:
            subprocess.run(["chattr", "-i", "-a", folder, folder / "disk.raw"], check=True)

    @pytest.mark.parametrize("mode", [0o555, 0o1777])
    def test_advice_to_write_in_place(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
    ) -> None:
        """Another user may write into the file, but not into its folder."""
        folder = tmp_path / "here"
        folder.mkdir()
        target = folder / "disk.img"
        target.write_bytes(bytes(1 << 20))
        target.chmod(0o666)
        folder.chmod(mode)
        (folder / "d.raw").write_bytes(b"new" + bytes((1 << 20) - 3))
        (folder / "d.raw").chmod(0o644)
        monkeypatch.chdir(folder)

        def convert(**options: bool) -> None:
            imgcore.convert("d.raw", "disk.img", format="raw", target_format="raw", **options)

        words = r"folder.*; -n \(in_place=True\) writes into the existing file"
        with another_user():
            with pytest.raises((PermissionError, TargetError), match=words):
                convert(force=True)
            convert(in_place=True)
        assert target.read_bytes()[:3] == b"new"
        target.write_bytes(bytes(512))
        with another_user():
            with pytest.raises((PermissionError, TargetError), match="folder") as caught:
                convert(force=True)
            assert "-n" not in str(caught.value), "the file is too small"
            with pytest.raises((PermissionError, TargetError), match="folder") as caught:
                imgcore.convert("d.raw", "disk.img", format="raw", target_format="vdi", force=True)
            assert "-n" not in str(caught.value), "a vdi cannot be written in place"
            if mode == 0o555:
                with pytest.raises(PermissionError, match=r"folder \. takes no new files"):
                    imgcore.create("new.qcow2", 1 << 20)
        assert names(folder) == ["d.raw", "disk.img"]


@contextlib.contextmanager
def another_user() -> Iterator[None]:
    """Have the rights of nobody meanwhile."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


class TestNoPlace:
    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (Path.mkdir, "is a folder"),
            (os.mkfifo, "is a pipe"),
        ],
    )
    def test_special_companion(
        self, tmp_path: Path, make: Callable[[Path], None], words: str
    ) -> None:
        make(tmp_path / "disk-flat.vmdk")
        with Target(tmp_path / "disk.vmdk", force=True) as target:
            with pytest.raises(TargetError, match=f"disk-flat.vmdk: {words}"):
                target.companion("disk-flat.vmdk")
        assert names(tmp_path) == ["disk-flat.vmdk"]

    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (Path.mkdir, "is a folder"),
            (os.mkfifo, "is a pipe"),
        ],
    )
    def test_special_file(self, tmp_path: Path, make: Callable[[Path], None], words: str) -> None:
        make(tmp_path / "disk.raw")
        for options in ({}, {"force": True}, {"in_place": True}):
            with pytest.raises(TargetError, match=words):
                Target(tmp_path / "disk.raw", **options)

    def test_character_device(self) -> None:
        with pytest.raises(TargetError, match="is a character device"):
            Target("/dev/null", in_place=True)

    @pytest.mark.parametrize("name", ["", "-", "folder/", ".", "folder/.."])
    def test_no_name(self, name: str) -> None:
        with pytest.raises(TargetError, match="not the name of a file"):
            Target(name)

    def test_folder_missing(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError) as caught:
            Target(tmp_path / "none/disk.raw")
        assert caught.value.filename == str(tmp_path / "none")

    def test_folder_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(NotADirectoryError):
            Target(tmp_path / "file/disk.raw")

    def test_folder_read_only(self, tmp_path: Path) -> None:
        with mounted(tmp_path / "ro", "ro,size=1m") as folder:
            with pytest.raises(OSError) as caught, Target(folder / "disk.raw"):
                pass
            assert caught.value.errno == errno.EROFS
            assert caught.value.filename == str(folder / "disk.raw")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_folder_not_permitted(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o555)
        with pytest.raises(PermissionError) as caught, Target(tmp_path / "disk.raw"):
            pass
        assert caught.value.filename == str(tmp_path / "disk.raw")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everywhere")
    def test_folder_that_cannot_be_listed(self, tmp_path: Path) -> None:
        (tmp_path / "blind").mkdir(0o300)
        write(tmp_path / "blind/disk.raw")
        (tmp_path / "blind").chmod(0o700)
        assert names(tmp_path / "blind") == ["disk.raw"]

    def test_name_of_the_temporary_is_taken(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        taken = tmp_path / f".disk.raw.imgcore-{os.getpid()}-{bytes(6).hex()}"
        taken.write_bytes(b"theirs")
        answers = iter([bytes(6), bytes(6), b"123456"])
        monkeypatch.setattr(os, "urandom", lambda n: next(answers))
        with locked(taken):
            write(tmp_path / "disk.raw")
        assert taken.read_bytes() == b"theirs"

    def test_name_too_long(self, tmp_path: Path) -> None:
        with pytest.raises(OSError) as caught:
            Target(tmp_path / ("n" * 256))
        assert caught.value.errno == errno.ENAMETOOLONG


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a file as a job does that is writing it."""
    with path.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """Mount a small tmpfs, or skip."""
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root")
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting is not permitted")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


class TestFull:
    def test_while_writing(self, tmp_path: Path) -> None:
        with mounted(tmp_path / "full", "size=256k") as folder:
            (folder / "disk.raw").write_bytes(b"old")
            with pytest.raises(OSError) as caught:
                write(folder / "disk.raw", data=bytes(1 << 20), force=True)
            assert caught.value.errno == errno.ENOSPC
            assert caught.value.filename == str(folder / "disk.raw")
            assert names(folder) == ["disk.raw"]
            assert (folder / "disk.raw").read_bytes() == b"old"

    def test_told_before(self, tmp_path: Path) -> None:
        with mounted(tmp_path / "full", "size=256k") as folder, Target(folder / "a") as target:
            target.require_space(100_000)
            with pytest.raises(OSError, match="1 GiB needed, 256 KiB free") as caught:
                target.require_space(1 << 30)
            assert caught.value.errno == errno.ENOSPC

    @pytest.mark.parametrize("mode", ["falloc", "full"])
    def test_preallocation(self, tmp_path: Path, mode: str) -> None:
        with mounted(tmp_path / "full", "size=256k") as folder:
            with pytest.raises(OSError) as caught, Target(folder / "a") as target:
                target.main.preallocate(mode, 1 << 20)
            assert (caught.value.errno, names(folder)) == (errno.ENOSPC, [])


class TestFaults:
    """Each operation fails once: the old target stays, and no other file is left."""

    @pytest.mark.parametrize("name", ["pwrite", "fsync", "rename", "close-late", "ftruncate"])
    @pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
    def test_fault(
        self, tmp_path: Path, name: str, code: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "disk.raw"
        path.write_bytes(b"old")

        def fail(*_: Any, **__: Any) -> None:
            raise OSError(code, os.strerror(code))

        with pytest.raises(OSError) as caught, Target(path, force=True) as target:
            if name == "close-late":
                monkeypatch.setattr(target_module.TargetFile, "check_written", fail)
            else:
                monkeypatch.setattr(os, name, fail)
            target.main.truncate(100)
            target.main.pwrite(0, NEW)
            target.commit()
        monkeypatch.undo()
        assert caught.value.errno == code
        assert caught.value.filename in (str(path), None if name == "close-late" else str(path))
        assert path.read_bytes() == b"old"
        assert names(tmp_path) == ["disk.raw"]

    def test_failed_sync_is_not_tried_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[int] = []

        def fail(fd: int) -> None:
            calls.append(fd)
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="Input/output error"):
            write(tmp_path / "disk.raw")
        assert len(calls) == 1
        assert names(tmp_path) == []

    def test_late_error_at_close(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        close = os.close

        def fail(fd: int) -> None:
            close(fd)
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

        with pytest.raises(OSError) as caught, Target(tmp_path / "a", sync=False) as target:
            monkeypatch.setattr(os, "close", fail)
            try:
                target.commit()
            finally:
                monkeypatch.undo()
        assert (caught.value.errno, names(tmp_path)) == (errno.EDQUOT, [])

    def test_short_writes_are_continued(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pwrite = os.pwrite
        monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:7], at))
        write(tmp_path / "disk.raw")
        assert (tmp_path / "disk.raw").read_bytes() == NEW

    @pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO])
    def test_folder_that_cannot_sync(
        self,
        tmp_path: Path,
        code: int,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        fsync = os.fsync

        def fail(fd: int) -> None:
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                raise OSError(code, os.strerror(code))
            fsync(fd)

        monkeypatch.setattr(os, "fsync", fail)
        expected = pytest.raises(OSError, match="syncing the folder")
        with (
            caplog.at_level(logging.WARNING, "imgcore"),
            contextlib.nullcontext() if code == errno.EINVAL else expected,
        ):
            write(tmp_path / "disk.raw")
        assert ("cannot be synced" in caplog.text) == (code == errno.EINVAL)
        assert (tmp_path / "disk.raw").read_bytes() == NEW
        assert names(tmp_path) == ["disk.raw"]


class TestStale:
    def leave(self, folder: Path, name: str = "disk.raw") -> str:
        """Kill a process that is writing; return the name of the file it left."""
        script = (
            "import os, sys\n"
            "from imgcore.files.target import Target\n"
            "target = Target(sys.argv[1], force=True)\n"
            "target.main.pwrite(0, b'half')\n"
            "os.kill(os.getpid(), 9)\n"
        )
        before = set(names(folder))
        subprocess.run([sys.executable, "-c", script, str(folder / name)], check=False)
        (left,) = set(names(folder)) - before
        return left

    def test_of_a_killed_process(self, tmp_path: Path) -> None:
        (tmp_path / "disk.raw").write_bytes(b"old")
        self.leave(tmp_path)
        assert (tmp_path / "disk.raw").read_bytes() == b"old"
        write(tmp_path / "disk.raw", force=True)
        assert names(tmp_path) == ["disk.raw"]
        assert (tmp_path / "disk.raw").read_bytes() == NEW

    def test_of_another_target_stays(self, tmp_path: Path) -> None:
        left = self.leave(tmp_path, "other.raw")
        write(tmp_path / "disk.raw")
        assert names(tmp_path) == sorted([left, "disk.raw"])

    def test_still_locked_stays(self, tmp_path: Path) -> None:
        with Target(tmp_path / "disk.raw") as running:
            write(tmp_path / "disk.raw")
            assert len(names(tmp_path)) == 2
            running.main.pwrite(0, b"x")
        assert names(tmp_path) == ["disk.raw"]

    @pytest.mark.parametrize(
        "pid", [1, 4999999, os.getpid(), os.getppid()], ids=["init", "none", "own", "parent"]
    )
    def test_the_lock_counts_whatever_the_process_id(self, tmp_path: Path, pid: int) -> None:
        """A container's next job may have the ID of the one before."""
        left = tmp_path / f".disk.raw.imgcore-{pid}-0123456789ab"
        left.touch()
        with locked(left):
            write(tmp_path / "disk.raw")
        assert left.exists()
        write(tmp_path / "disk.raw", force=True)
        assert names(tmp_path) == ["disk.raw"]

    def test_of_a_job_that_replaced_a_read_only_file(self, tmp_path: Path) -> None:
        (tmp_path / "here").mkdir(mode=0o777)
        (tmp_path / "here").chmod(0o777)
        left = tmp_path / "here/.disk.raw.imgcore-1-0123456789ab"
        left.touch()
        left.chmod(0o444)
        with contextlib.chdir(tmp_path / "here"), another_user():
            write("disk.raw")
        assert names(tmp_path / "here") == ["disk.raw"]

    def test_file_system_without_locks(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Nothing tells what is abandoned: it stays, and is named."""

        def refuse(fd: int, how: int) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        left = tmp_path / ".disk.raw.imgcore-4999999-0123456789ab"
        left.touch()
        monkeypatch.setattr(fcntl, "flock", refuse)
        write(tmp_path / "disk.raw")
        assert names(tmp_path) == sorted([left.name, "disk.raw"])
        assert f"{left}: left by a job that was killed" in caplog.text

    @pytest.mark.parametrize("kind", ["folder", "link", "fifo"])
    def test_something_else_of_such_a_name_stays(self, tmp_path: Path, kind: str) -> None:
        left = tmp_path / ".disk.raw.imgcore-4999999-0123456789ab"
        make: dict[str, Callable[[], object]] = {
            "folder": left.mkdir,
            "link": lambda: left.symlink_to("/etc/passwd"),
            "fifo": lambda: os.mkfifo(left),
        }
        make[kind]()
        write(tmp_path / "disk.raw")
        assert os.path.lexists(left) == (kind != "fifo")

    def test_taken_for_stale_before_it_was_locked(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        answers = iter([Lock.HELD_BY_OTHER, Lock.TAKEN])
        monkeypatch.setattr(target_folder, "lock", lambda fd: next(answers))
        write(tmp_path / "disk.raw")
        assert names(tmp_path) == ["disk.raw"]

    def test_removed_under_its_lock(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Otherwise a job that has just created it could lock it and then lose it."""
        left = tmp_path / ".disk.raw.imgcore-4999999-0123456789ab"
        left.touch()
        outcomes = []
        unlink = os.unlink

        def try_to_lock(name: str, **keywords: Any) -> None:
            if name == left.name:
                with left.open("rb") as file:
                    outcomes.append(lock(file.fileno()))
            unlink(name, **keywords)

        monkeypatch.setattr(os, "unlink", try_to_lock)
        write(tmp_path / "disk.raw")
        assert outcomes == [Lock.HELD_BY_OTHER]
        assert names(tmp_path) == ["disk.raw"]


class TestCompanion:
    def write(
        self, folder: Path, main: bytes = b"main", flat: bytes = b"flat", **options: Any
    ) -> None:
        with Target(folder / "disk.vmdk", **options) as target:
            target.companion("disk-flat.vmdk").pwrite(0, flat)
            target.main.pwrite(0, main)
            target.commit()

    def test_both_appear(self, tmp_path: Path) -> None:
        self.write(tmp_path)
        assert names(tmp_path) == ["disk-flat.vmdk", "disk.vmdk"]
        assert (tmp_path / "disk-flat.vmdk").read_bytes() == b"flat"
        assert (tmp_path / "disk.vmdk").read_bytes() == b"main"

    def test_aborted(self, tmp_path: Path) -> None:
        with Target(tmp_path / "disk.vmdk") as target:
            target.companion("disk-flat.vmdk")
        assert names(tmp_path) == []

    def test_folder_that_stays_locked(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("imgcore.files.locks._FOLDER_LOCK_SECONDS", 0.1)
        fd = os.open(tmp_path, os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            with pytest.raises(OSError, match="stays locked by another process"):
                self.write(tmp_path)
        finally:
            os.close(fd)
        assert names(tmp_path) == []

    def test_existing(self, tmp_path: Path) -> None:
        (tmp_path / "disk-flat.vmdk").write_bytes(b"old")
        with pytest.raises(TargetError, match="disk-flat.vmdk: exists already"):
            self.write(tmp_path)
        assert names(tmp_path) == ["disk-flat.vmdk"]
        self.write(tmp_path, force=True)
        assert (tmp_path / "disk-flat.vmdk").read_bytes() == b"flat"
        assert names(tmp_path) == ["disk-flat.vmdk", "disk.vmdk"]

    def test_old_pair_replaced(self, tmp_path: Path) -> None:
        self.write(tmp_path)
        self.write(tmp_path, b"main2", b"flat2", force=True)
        assert (tmp_path / "disk-flat.vmdk").read_bytes() == b"flat2"
        assert (tmp_path / "disk.vmdk").read_bytes() == b"main2"
        assert names(tmp_path) == ["disk-flat.vmdk", "disk.vmdk"]

    @pytest.mark.parametrize("has_old", [True, False])
    @pytest.mark.parametrize("nth", range(4))
    def test_interrupted_right_after_a_rename(
        self, tmp_path: Path, nth: int, has_old: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if has_old:
            self.write(tmp_path)
        rename = os.rename
        count = iter(range(100))

        def interrupt(*arguments: Any, **keywords: Any) -> None:
            rename(*arguments, **keywords)
            if next(count) == min(nth, 3 if has_old else 1):
                raise KeyboardInterrupt

        monkeypatch.setattr(os, "rename", interrupt)
        with pytest.raises(KeyboardInterrupt):
            self.write(tmp_path, b"main2", b"flat2", force=True)
        assert names(tmp_path) == (["disk-flat.vmdk", "disk.vmdk"] if has_old else [])
        if has_old:
            assert (tmp_path / "disk-flat.vmdk").read_bytes() == b"flat"
            assert (tmp_path / "disk.vmdk").read_bytes() == b"main"

    @pytest.mark.parametrize("nth", range(4))
    def test_failing_rename_brings_the_old_pair_back(
        self, tmp_path: Path, nth: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.write(tmp_path)
        rename = os.rename
        count = iter(range(100))

        def fail(*arguments: Any, **keywords: Any) -> None:
            # Main file and companion are never of different generations.
            state = [(tmp_path / name).exists() for name in ("disk.vmdk", "disk-flat.vmdk")]
            if all(state):
                pair = (
                    (tmp_path / "disk.vmdk").read_bytes()[4:],
                    (tmp_path / "disk-flat.vmdk").read_bytes()[4:],
                )
                assert pair[0] == pair[1]
            if next(count) == nth:
                raise OSError(errno.EIO, "Input/output error")
            rename(*arguments, **keywords)

        monkeypatch.setattr(os, "rename", fail)
        with pytest.raises(OSError, match="Input/output error"):
            self.write(tmp_path, b"main2", b"flat2", force=True)
        assert (tmp_path / "disk-flat.vmdk").read_bytes() == b"flat"
        assert (tmp_path / "disk.vmdk").read_bytes() == b"main"
        assert names(tmp_path) == ["disk-flat.vmdk", "disk.vmdk"]

    def set_aside(self, folder: Path, token: str = "999999999-0123456789ab") -> list[Path]:
        """Leave the backups of a process that was killed between its renames."""
        paths = [folder / f".{n}.imgcore-{token}-old" for n in ("disk.vmdk", "disk-flat.vmdk")]
        for path in paths:
            path.write_bytes(b"1")
        return paths

    @pytest.mark.parametrize("name", ["disk.vmdk", "disk-flat.vmdk"])
    def test_what_qemu_has_open_is_not_replaced(self, tmp_path: Path, name: str) -> None:
        self.write(tmp_path)
        lock = struct.pack("@hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 101, 1, 0)
        with (tmp_path / name).open("rb") as other:
            fcntl.fcntl(other, 37, lock)  # F_OFD_SETLK
            with pytest.raises(TargetError, match=f"{name}: in use by this process"):
                self.write(tmp_path, b"main2", b"flat2", force=True)
        assert names(tmp_path) == ["disk-flat.vmdk", "disk.vmdk"]
        assert (tmp_path / "disk.vmdk").read_bytes() == b"main"
        self.write(tmp_path, b"main2", b"flat2", force=True)
        assert (tmp_path / "disk.vmdk").read_bytes() == b"main2"

    def test_interrupted_between_the_renames(self, tmp_path: Path) -> None:
        self.set_aside(tmp_path)
        (tmp_path / "disk-flat.vmdk").write_bytes(b"2")
        with pytest.raises(TargetError, match="exists already"):
            Target(tmp_path / "disk.vmdk")
        assert names(tmp_path) == ["disk-flat.vmdk", "disk.vmdk"]
        assert (tmp_path / "disk-flat.vmdk").read_bytes() == b"1"

    def test_interrupted_after_the_renames(self, tmp_path: Path) -> None:
        self.write(tmp_path)
        self.set_aside(tmp_path)
        Target(tmp_path / "disk.vmdk", force=True).abort()
        assert names(tmp_path) == ["disk-flat.vmdk", "disk.vmdk"]
        assert (tmp_path / "disk.vmdk").read_bytes() == b"main"

    def test_a_strangers_files_are_not_put_back(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        left = self.set_aside(tmp_path)
        monkeypatch.setattr(temporary_names, "_is_trusted", lambda fd, entry: entry != left[1].name)
        Target(tmp_path / "disk.vmdk").abort()
        assert names(tmp_path) == sorted(path.name for path in left)

    @pytest.mark.parametrize("pid", [1, 999999999, os.getpid()], ids=["init", "none", "own"])
    def test_what_a_living_job_set_aside_stays(self, tmp_path: Path, pid: int) -> None:
        """It has its main temporary locked, also on another host of an NFS folder."""
        left = self.set_aside(tmp_path, f"{pid}-0123456789ab")
        temporary = left[0].with_name(left[0].name.removesuffix("-old"))
        temporary.touch()
        with locked(temporary):
            Target(tmp_path / "disk.vmdk").abort()
        assert names(tmp_path) == sorted(path.name for path in [*left, temporary])
        Target(tmp_path / "disk.vmdk", force=True).abort()
        assert names(tmp_path) == sorted(["disk-flat.vmdk", "disk.vmdk", temporary.name])

    def test_a_companion_as_target_undoes_the_whole_replacement(self, tmp_path: Path) -> None:
        self.set_aside(tmp_path)
        (tmp_path / "disk-flat.vmdk").write_bytes(b"2")
        Target(tmp_path / "disk-flat.vmdk", force=True).abort()
        assert names(tmp_path) == ["disk-flat.vmdk", "disk.vmdk"]
        assert (tmp_path / "disk-flat.vmdk").read_bytes() == b"1"

    def test_main_appears_meanwhile(self, tmp_path: Path) -> None:
        with pytest.raises(TargetError), Target(tmp_path / "disk.vmdk") as target:
            target.companion("disk-flat.vmdk")
            (tmp_path / "disk.vmdk").write_bytes(b"theirs")
            target.commit()
        assert names(tmp_path) == ["disk.vmdk"]
        assert (tmp_path / "disk.vmdk").read_bytes() == b"theirs"

    def test_two_jobs_never_mix(self, tmp_path: Path) -> None:
        self.write(tmp_path, b"0", b"0")

        def job(content: bytes) -> None:
            for _ in range(20):
                self.write(tmp_path, content, content, force=True, sync=False)

        threads = [threading.Thread(target=job, args=(c,)) for c in (b"1", b"2", b"3")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert names(tmp_path) == ["disk-flat.vmdk", "disk.vmdk"]
        assert (tmp_path / "disk.vmdk").read_bytes() == (tmp_path / "disk-flat.vmdk").read_bytes()

    @pytest.mark.parametrize("name", ["", "..", "sub/x", "disk.vmdk"])
    def test_bad_name(self, tmp_path: Path, name: str) -> None:
        with Target(tmp_path / "disk.vmdk") as target, pytest.raises(TargetError):
            target.companion(name)


class TestInPlace:
    def test_file(self, tmp_path: Path) -> None:
        path = tmp_path / "disk.raw"
        path.write_bytes(bytes(1024))
        inode = path.stat().st_ino
        with Target(path, in_place=True) as target:
            assert target.in_place
            target.require_capacity(1024)
            target.require_space(1 << 60)
            target.main.pwrite(512, b"x")
            target.commit()
        assert path.stat().st_ino == inode
        assert path.read_bytes() == bytes(512) + b"x" + bytes(511)
        assert names(tmp_path) == ["disk.raw"]

    def test_abort_leaves_it(self, tmp_path: Path) -> None:
        path = tmp_path / "disk.raw"
        path.write_bytes(bytes(1024))
        with Target(path, in_place=True) as target:
            target.main.pwrite(0, b"x")
        assert path.read_bytes()[:1] == b"x"

    def test_too_small(self, tmp_path: Path) -> None:
        (tmp_path / "disk.raw").write_bytes(bytes(1024))
        with Target(tmp_path / "disk.raw", in_place=True) as target:
            with pytest.raises(TargetError, match="holds 1024 bytes, fewer than the 1536"):
                target.require_capacity(1536)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            Target(tmp_path / "disk.raw", in_place=True)
        assert names(tmp_path) == []

    def test_no_companion(self, tmp_path: Path) -> None:
        (tmp_path / "disk.vmdk").write_bytes(bytes(1024))
        with Target(tmp_path / "disk.vmdk", in_place=True) as target:
            with pytest.raises(TargetError, match="several files"):
                target.companion("disk-flat.vmdk")

    def test_replaced_while_it_was_opened(self, tmp_path: Path) -> None:
        path = tmp_path / "disk.raw"
        path.write_bytes(b"old")
        target = Target(path, in_place=True)
        (tmp_path / "other").write_bytes(b"other")
        (tmp_path / "other").replace(path)
        with pytest.raises(TargetError, match="was replaced"):
            _ = target.main

    @pytest.mark.parametrize("how", ["in_place", "force"])
    def test_in_use_by_qemu(self, tmp_path: Path, how: str) -> None:
        path = tmp_path / "disk.raw"
        path.write_bytes(bytes(4096))
        with held_open("-f", "raw", path):
            with pytest.raises(TargetError, match="in use"), Target(path, **{how: True}):
                pass
        assert names(tmp_path) == ["disk.raw"]

    @pytest.mark.parametrize(("byte", "refused"), [(100, False), (101, True), (201, True)])
    def test_bytes_that_qemu_locks(self, tmp_path: Path, byte: int, refused: bool) -> None:
        path = tmp_path / "disk.raw"
        path.write_bytes(bytes(4096))
        expected = pytest.raises(TargetError, match="in use")
        with path.open("rb") as other:
            lock = struct.pack("@hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0)
            fcntl.fcntl(other, 37, lock)  # F_OFD_SETLK
            with expected if refused else contextlib.nullcontext(), Target(path, in_place=True):
                pass

    def test_block_device(self, tmp_path: Path) -> None:
        path = tmp_path / "backing"
        path.write_bytes(bytes(1 << 20))
        with loop_device(path) as device:
            (tmp_path / "link").symlink_to(device)
            for name in (device, str(tmp_path / "link")):
                for force in (False, True):
                    with pytest.raises(TargetError, match="is a block device"):
                        Target(name, force=force)
                with Target(name, in_place=True) as target, HostFile.open(device) as file:
                    assert (target.in_place, target.is_block_device) == (True, True)
                    assert same_file(target.identity, file.identity)
                    target.require_capacity(1 << 20)
                    target.main.truncate(1 << 20)
                    with pytest.raises(OSError) as caught:
                        target.main.truncate((1 << 20) + 512)
                    assert caught.value.errno == errno.ENOSPC
                    target.main.pwrite(0, b"x")
                    target.commit()
        assert path.read_bytes()[:1] == b"x"

    def test_mounted_block_device(self, tmp_path: Path) -> None:
        if shutil.which("mkfs.ext4") is None:
            pytest.skip("needs mkfs.ext4")
        path = tmp_path / "backing"
        path.write_bytes(bytes(1 << 22))
        subprocess.run(["mkfs.ext4", "-q", str(path)], check=True)
        (tmp_path / "mnt").mkdir()
        with loop_device(path) as device:
            command = ["mount", device, str(tmp_path / "mnt")]
            if subprocess.run(command, capture_output=True, check=False).returncode != 0:
                pytest.skip("mounting is not permitted")
            try:
                mounted = pytest.raises(OSError, match="in use or mounted")
                with mounted, Target(device, in_place=True):
                    pass
            finally:
                subprocess.run(["umount", str(tmp_path / "mnt")], check=True)


@pytest.mark.parametrize("mode", ["off", "falloc", "full"])
def test_preallocate(tmp_path: Path, mode: str) -> None:
    with Target(tmp_path / "disk.raw") as target:
        target.main.truncate((3 << 20) + 512)
        target.main.preallocate(mode, (3 << 20) + 512)
        allocated = os.fstat(target.main.fd).st_blocks * 512
        assert target.main.nbytes == (3 << 20) + 512
        assert (allocated >= 3 << 20) == (mode != "off")
        target.main.preallocate(mode, 0)
        with pytest.raises(ValueError, match="unknown preallocation"):
            target.main.preallocate("none", 1)
