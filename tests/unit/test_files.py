"""Files that are read, and the gate for files named inside images."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.helpers.mounts import loop_device
from tests.helpers.qemu import held_open

from imgcore.errors import (
    CorruptImageError,
    ImgcoreError,
    OptionError,
    UnsafeReferenceError,
)
from imgcore.files import host_file, identity
from imgcore.files import reference_gate as gate
from imgcore.files.host_file import HostFile
from imgcore.files.identity import same_file
from imgcore.files.reference_gate import ReferenceGate


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(range(256)) * 16)
    return path


def test_read(image: Path) -> None:
    with HostFile.open(image) as file:
        assert (file.nbytes, file.is_block_device) == (4096, False)
        assert file.pread(254, 4) == b"\xfe\xff\x00\x01"
        assert file.pread(4096, 0) == b""
        buffer = bytearray(8)
        file.pread_into(4088, buffer)
        assert buffer == bytes(range(248, 256))
        assert os.get_blocking(file.fd)
        assert not os.get_inheritable(file.fd)
    file.close()
    assert file.fd == -1


@pytest.mark.parametrize(
    ("offset", "length"), [(4095, 2), (4097, 0), (0, 1 << 60), (1 << 63, 1), (1 << 64, 1 << 64)]
)
def test_read_past_the_end(image: Path, offset: int, length: int) -> None:
    with HostFile.open(image) as file:
        with pytest.raises(
            CorruptImageError, match=r"past the end of the file \(0x1000\)"
        ) as caught:
            file.pread(offset, length)
        assert caught.value.offset == offset
        assert str(caught.value).startswith(f"{image}: ")


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, -1)])
def test_read_before_the_start(image: Path, offset: int, length: int) -> None:
    with HostFile.open(image) as file:
        with pytest.raises(ValueError, match="negative offset or length"):
            file.pread(offset, length)


def test_short_reads_are_joined(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.pread
    with HostFile.open(image) as file:
        monkeypatch.setattr(os, "pread", lambda fd, n, offset: pread(fd, min(n, 7), offset))
        assert file.pread(10, 100) == image.read_bytes()[10:110]
        buffer = bytearray(100)
        file.pread_into(10, buffer)
        assert buffer == image.read_bytes()[10:110]


def test_read_error_names_file_and_offset(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, nbytes: int, offset: int) -> bytes:
        raise OSError(5, "Input/output error")

    with HostFile.open(image) as file:
        monkeypatch.setattr(os, "pread", fail)
        with pytest.raises(OSError, match="reading 16 bytes at 0x200") as caught:
            file.pread(512, 16)
        assert caught.value.filename == str(image)


def test_file_that_shrinks(image: Path) -> None:
    with HostFile.open(image) as file:
        os.truncate(image, 100)
        with pytest.raises(CorruptImageError, match="became shorter"):
            file.pread(0, 4096)
        with pytest.raises(ImgcoreError, match="changed while it was read"):
            file.check_unchanged()


class TestCheckUnchanged:
    def test_same(self, image: Path) -> None:
        with HostFile.open(image) as file:
            file.check_unchanged()

    def test_touched(self, image: Path) -> None:
        with HostFile.open(image) as file:
            os.utime(image, ns=(0, 12345))
            with pytest.raises(ImgcoreError, match="time of modification"):
                file.check_unchanged()

    def test_replaced(self, image: Path) -> None:
        with HostFile.open(image) as file:
            other = image.with_name("other")
            other.write_bytes(b"x")
            other.replace(image)
            with pytest.raises(ImgcoreError, match="inode"):
                file.check_unchanged()

    def test_deleted_is_no_change(self, image: Path) -> None:
        with HostFile.open(image) as file:
            image.unlink()
            file.check_unchanged()

    def test_shared_may_change(self, image: Path) -> None:
        with HostFile.open(image, share=True) as file:
            image.write_bytes(b"new")
            file.check_unchanged()

    def test_relative_name_after_chdir(self, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(image.parent)
        with HostFile.open(image.name) as file:
            monkeypatch.chdir("/")
            file.check_unchanged()


class TestFileTypes:
    """Only regular files and block devices are opened, and opening never blocks."""

    def refuse(self, path: str, words: str) -> None:
        begun = time.monotonic()
        with pytest.raises(ImgcoreError, match=words) as caught:
            HostFile.open(path)
        assert str(caught.value).startswith(path)
        assert time.monotonic() - begun < 1

    def test_fifo(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.raw")
        self.refuse(str(tmp_path / "pipe.raw"), "is a pipe, not a regular file")

    def test_socket(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("s.raw")
            self.refuse("s.raw", "is a socket")

    def test_folder(self, tmp_path: Path) -> None:
        self.refuse(str(tmp_path), "is a folder")

    def test_character_device(self) -> None:
        self.refuse("/dev/zero", "is a character device")

    def test_terminal(self) -> None:
        try:
            controller, terminal = os.openpty()
        except OSError as error:
            pytest.skip(f"no pseudo-terminals here: {error}")
        try:
            self.refuse(os.ttyname(terminal), "is a character device")
        finally:
            os.close(controller)
            os.close(terminal)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError) as caught:
            HostFile.open(tmp_path / "none.raw")
        assert caught.value.filename == str(tmp_path / "none.raw")

    def test_exchanged_for_a_fifo_after_the_first_look(
        self, tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        os.mkfifo(tmp_path / "pipe")
        regular = os.stat(image)
        monkeypatch.setattr(os, "stat", lambda *_, **__: regular)
        with pytest.raises(ImgcoreError, match="is a pipe"):
            HostFile.open(tmp_path / "pipe")


def test_block_device(image: Path) -> None:
    with loop_device(image) as device, HostFile.open(device) as file:
        assert (file.is_block_device, file.nbytes) == (True, 4096)
        assert file.pread(0, 4096) == image.read_bytes()
        assert file.identity == (identity.BLOCK_DEVICE, os.stat(device).st_rdev)
        file.check_unchanged()


def test_block_device_without_a_medium(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.touch()
    with loop_device(path) as device:
        with pytest.raises(ImgcoreError, match=f"{device}: .*has no medium"):
            HostFile.open(device)


def test_identity(image: Path) -> None:
    os.link(image, image.with_name("hard"))
    image.with_name("soft").symlink_to(image)
    image.with_name("other").write_bytes(image.read_bytes())
    with contextlib.ExitStack() as stack:
        names = ("disk.raw", "hard", "soft", "other")
        first, *others = (
            stack.enter_context(HostFile.open(image.with_name(name))).identity for name in names
        )
        assert [same_file(first, other) for other in others] == [True, True, False]
    assert not same_file(first, None)
    assert not same_file(None, None)


class TestQemuLock:
    def test_writer(self, image: Path) -> None:
        with held_open("-f", "raw", image):
            with pytest.raises(ImgcoreError, match="in use by process .*-U"):
                HostFile.open(image)
            HostFile.open(image, share=True).close()
            with pytest.raises(ImgcoreError, match="in use"):
                ReferenceGate(str(image.parent)).open(image.name)
            ReferenceGate(str(image.parent), share=True).open(image.name).close()
            ReferenceGate(str(image.parent)).open(image.name, share=True).close()
        HostFile.open(image).close()

    def test_reader(self, image: Path) -> None:
        with held_open("-r", "-f", "raw", image):
            HostFile.open(image).close()

    def test_file_system_without_locks(self, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = fcntl.fcntl

        def refuse(fd: int, command: int, argument: Any = 0) -> Any:
            if command == 36:
                raise OSError(37, "No locks available")
            return real(fd, command, argument)

        monkeypatch.setattr(fcntl, "fcntl", refuse)
        HostFile.open(image).close()


@pytest.fixture(params=["openat2", "walk"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with and without openat2."""
    if request.param == "walk":
        monkeypatch.setattr(gate, "_openat2_beneath", lambda *_: None)
    return str(request.param)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """``images/`` with a base and links, ``shared/`` and a secret beside it."""
    for folder in ("images/sub", "shared"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("images/base.raw", "images/sub/deep.raw", "shared/base.raw", "secret.raw"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "images/inner.raw").symlink_to("base.raw")
    (tmp_path / "images/escape.raw").symlink_to("../secret.raw")
    (tmp_path / "images/absolute.raw").symlink_to(tmp_path / "secret.raw")
    (tmp_path / "images/out").symlink_to("..")
    (tmp_path / "images/to-shared.raw").symlink_to(tmp_path / "shared/base.raw")
    (tmp_path / "images/loop.raw").symlink_to("loop.raw")
    return tmp_path


@pytest.mark.usefixtures("way")
class TestReferenceGate:
    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("base.raw", b"images/base.raw"),
            ("./base.raw", b"images/base.raw"),
            ("sub/deep.raw", b"images/sub/deep.raw"),
            ("sub/../base.raw", b"images/base.raw"),
            ("../images/base.raw", b"images/base.raw"),
            ("inner.raw", b"images/base.raw"),
        ],
    )
    def test_inside(self, tree: Path, name: str, content: bytes) -> None:
        with ReferenceGate(str(tree / "images")).open(name) as file:
            assert file.pread(0, file.nbytes) == content
            assert file.path == os.path.normpath(tree / "images" / name)

    @pytest.mark.parametrize(
        "name",
        [
            "../secret.raw",
            "sub/../../secret.raw",
            "escape.raw",
            "absolute.raw",
            "out/secret.raw",
            "to-shared.raw",
            "/etc/passwd",
            "/proc/self/environ",
            "..",
            ".",
        ],
    )
    def test_outside(self, tree: Path, name: str) -> None:
        with pytest.raises(UnsafeReferenceError) as caught:
            ReferenceGate(str(tree / "images")).open(name)
        assert str(tree / "images") in str(caught.value)
        assert "--allow" in str(caught.value)

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ('json:{"file":{"driver":"file","filename":"base.raw"}}', "json:"),
            ("JSON:{}", "json:"),
            ("nbd://localhost/x", "URL"),
            ("file:base.raw", "protocol"),
            ("nbd:unix:/run/x", "protocol"),
            ("C:\\images\\base.raw", "drive letter"),
            ("c:base.raw", "drive letter"),
            ("base.raw\0.vmdk", "NUL"),
            ("", "empty"),
            ("\ud800", "encodable"),
        ],
    )
    def test_no_file_name(self, tree: Path, name: str, words: str) -> None:
        with pytest.raises(UnsafeReferenceError, match=words) as caught:
            ReferenceGate(str(tree / "images"), [str(tree)]).open(name)
        assert "\n" not in str(caught.value)

    def test_backslash_is_no_separator(self, tree: Path) -> None:
        (tree / "images/..\\secret.raw").write_bytes(b"plain name")
        with ReferenceGate(str(tree / "images")).open("..\\secret.raw") as file:
            assert file.pread(0, 5) == b"plain"

    def test_allowed_folder(self, tree: Path) -> None:
        gate = ReferenceGate(str(tree / "images"), [str(tree / "shared")])
        for name in ("../shared/base.raw", str(tree / "shared/base.raw"), "to-shared.raw"):
            with gate.open(name) as file:
                assert file.pread(0, 6) == b"shared"
        with pytest.raises(UnsafeReferenceError):
            gate.open("../secret.raw")

    def test_allowed_name_is_no_prefix(self, tree: Path) -> None:
        (tree / "shared2").mkdir()
        (tree / "shared2/x.raw").write_bytes(b"x")
        with pytest.raises(UnsafeReferenceError):
            ReferenceGate(str(tree / "images"), [str(tree / "shared")]).open("../shared2/x.raw")

    def test_everything_allowed(self, tree: Path) -> None:
        with ReferenceGate(str(tree / "images"), ["/"]).open("../secret.raw") as file:
            assert file.pread(0, 6) == b"secret"

    def test_folder_behind_a_link(self, tree: Path) -> None:
        (tree / "link").symlink_to("images")
        gate = ReferenceGate(str(tree / "link"))
        gate.open("base.raw").close()
        gate.open(str(tree / "images/base.raw")).close()
        gate.open(str(tree / "link/base.raw")).close()

    def test_relative_folders(self, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tree / "images")
        ReferenceGate("").open("base.raw").close()
        ReferenceGate(".", ["../shared"]).open("../shared/base.raw").close()

    def test_missing(self, tree: Path) -> None:
        with pytest.raises(FileNotFoundError) as caught:
            ReferenceGate(str(tree / "images")).open("none.raw")
        assert caught.value.filename == str(tree / "images/none.raw")

    def test_link_to_itself(self, tree: Path) -> None:
        with pytest.raises((OSError, UnsafeReferenceError)):
            ReferenceGate(str(tree / "images")).open("loop.raw")

    def test_fifo(self, tree: Path) -> None:
        os.mkfifo(tree / "images/pipe.raw")
        with pytest.raises(ImgcoreError, match="is a pipe, not a regular file"):
            ReferenceGate(str(tree / "images")).open("pipe.raw")

    def test_device_only_below_allowed_folders(self, image: Path) -> None:
        with loop_device(image) as device:
            with pytest.raises(ImgcoreError, match="is a block device, not a regular file"):
                ReferenceGate("/dev").open(os.path.basename(device))
            ReferenceGate("/", ["/dev"]).open(device).close()

    def test_chain_keeps_the_first_folder(self, tree: Path) -> None:
        gate = ReferenceGate(str(tree / "images"))
        with gate.open("sub/deep.raw") as file:
            nested = gate.beside(file)
        nested.open("../base.raw").close()
        nested.open("deep.raw").close()
        with pytest.raises(UnsafeReferenceError):
            nested.open("../../secret.raw")
        with pytest.raises(UnsafeReferenceError):
            ReferenceGate(str(tree / "images/sub")).open("../base.raw")

    def test_no_descriptor_is_left(self, tree: Path) -> None:
        gate = ReferenceGate(str(tree / "images"))
        before = os.listdir("/proc/self/fd")
        for name in ("base.raw", "escape.raw", "../secret.raw", "none.raw", "sub", "sub/none/x"):
            with contextlib.suppress(OSError, ImgcoreError):
                gate.open(name).close()
        assert os.listdir("/proc/self/fd") == before


def test_a_machine_whose_openat2_is_not_known(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine="s390x"))
    ReferenceGate(str(tree / "images")).open("sub/../base.raw").close()
    with pytest.raises(UnsafeReferenceError):
        ReferenceGate(str(tree / "images")).open("../secret.raw")


def test_allowed_folder_must_exist(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="allowed folder"):
        ReferenceGate(str(tmp_path), [str(tmp_path / "none")])


def test_link_exchanged_while_it_is_opened(tree: Path) -> None:
    """A racing process swaps a file for a link to a secret, which is never opened."""
    script = (
        "import os, sys\n"
        "os.chdir(sys.argv[1])\n"
        "while True:\n"
        "    os.link('base.raw', 'a'); os.rename('a', 'victim.raw')\n"
        "    os.symlink('../secret.raw', 'b'); os.rename('b', 'victim.raw')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tree / "images")])
    try:
        gate = ReferenceGate(str(tree / "images"))
        n_opened = 0
        start = time.monotonic()
        # A second is enough once the other process is running.
        while time.monotonic() < start + (1 if n_opened else 30):
            try:
                with gate.open("victim.raw") as file:
                    assert file.pread(0, file.nbytes) == b"images/base.raw"
                    n_opened += 1
            except UnsafeReferenceError:
                continue
            except OSError as error:
                assert error.filename == str(tree / "images/victim.raw")
        assert n_opened
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("file_system", ["ext4", "xfs"])
def test_is_on_xfs(tmp_path: Path, file_system: str) -> None:
    if shutil.which(f"mkfs.{file_system}") is None:
        pytest.skip(f"needs mkfs.{file_system}")
    backing, folder = tmp_path / "backing", tmp_path / "mnt"
    folder.mkdir()
    with backing.open("wb") as file:
        file.truncate(400 << 20)
    subprocess.run([f"mkfs.{file_system}", "-q", backing], check=True)
    with loop_device(backing) as device:
        if subprocess.run(["mount", device, folder], capture_output=True, check=False).returncode:
            pytest.skip("mounting is not permitted")
        try:
            with (folder / "x").open("wb") as file:
                assert host_file.is_on_xfs(file.fileno()) == (file_system == "xfs")
        finally:
            subprocess.run(["umount", folder], check=True)
