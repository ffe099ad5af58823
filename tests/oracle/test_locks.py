"""Locks: imgcore, qemu-img, qemu-io and a running QEMU keep each other out."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import imgcore
from imgcore.errors import ImgcoreError, TargetError
from imgcore.files import given, lock_holders
from tests.helpers import qemu
from tests.helpers.mounts import loop_device, make_file_system, mounted

KIB = 1024
CONTENT = bytes(range(256)) * 4 * KIB

# Kinds of images, and their options.
KINDS: dict[str, dict[str, str]] = {"raw": {}, "qcow2": {}, "vmdk": {"subformat": "monolithicFlat"}}


@pytest.fixture(params=["raw", "qcow2"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make(tmp_path, request.param)


def make(folder: Path, kind: str) -> Path:
    source, path = folder / "source.raw", folder / f"disk.{kind}"
    source.write_bytes(CONTENT)
    imgcore.convert(source, path, target_format=kind, options=KINDS[kind])
    return path


@contextmanager
def daemon(path: Path, *, writable: bool) -> Iterator[int]:
    """Have qemu-storage-daemon export an image while the block runs."""
    program = shutil.which("qemu-storage-daemon")
    if program is None:
        pytest.skip("qemu-storage-daemon is not installed (Debian: qemu-system-common)")
    read_only = "off" if writable else "on"
    pid_file = path.with_name("pid")
    words = [
        *(program, "--pidfile", pid_file),
        *("--blockdev", f"driver=file,node-name=file,filename={path},read-only={read_only}"),
        "--blockdev",
        f"driver={path.suffix[1:]},node-name=disk,file=file,read-only={read_only}",
        *("--nbd-server", f"addr.type=unix,addr.path={path.with_name('socket')}"),
        *("--export", f"type=nbd,id=export,node-name=disk,writable={'on' if writable else 'off'}"),
    ]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        while not pid_file.exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        yield process.pid
    finally:
        process.terminate()
        process.wait(timeout=30)
        process.stderr.close()


def refused_by_qemu(*words: str | Path) -> None:
    """Run a program of QEMU that must not get the lock."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert "lock" in done.stdout + done.stderr, (words, done.stdout, done.stderr)


def writes_by_qemu(path: Path) -> list[str | Path]:
    return ["qemu-io", "-f", path.suffix[1:], "-c", "write -P 7 0 64k", path]


HOLDER = """
import imgcore, sys
with imgcore.open(sys.argv[1], mode=sys.argv[2]) as image:
    print("open", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_by_imgcore(path: Path, mode: str) -> Iterator[subprocess.Popen[str]]:
    """Keep an image open in another process while the block runs."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, path, mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    try:
        yield process
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(timeout=30)


class TestQemuHoldsIt:
    def test_writing(self, image: Path) -> None:
        with daemon(image, writable=True) as pid:
            user = re.escape(f"in use by process {pid} (qemu-storage-da)")
            with pytest.raises(TargetError, match=user):
                imgcore.open(image, mode="r+")
            with pytest.raises(ImgcoreError, match=f"{user}, which writes to it .*; -U reads it"):
                imgcore.open(image)
            with imgcore.open(image, share=True) as shared:
                assert shared.read(0, 4) == CONTENT[:4]
        with imgcore.open(image, mode="r+") as own:
            own.write(0, b"own")

    def test_reading(self, image: Path) -> None:
        with daemon(image, writable=False) as pid:
            with pytest.raises(TargetError, match=f"in use by process {pid} "):
                imgcore.open(image, mode="r+")
            with imgcore.open(image) as both:
                assert both.read(0, 4) == CONTENT[:4]
            # A virtual machine may read it.
            with pytest.raises(TargetError, match=f"in use by process {pid} "):
                imgcore.convert(image, image.with_name("b.raw"), target_format="raw")
                imgcore.convert(image.with_name("b.raw"), image, force=True)


class TestImgcoreHoldsIt:
    def test_writing(self, image: Path) -> None:
        kind = image.suffix[1:]
        with imgcore.open(image, mode="r+") as own:
            own.write(0, b"own")
            refused_by_qemu(*writes_by_qemu(image))
            own.flush()
            refused_by_qemu("qemu-img", "convert", "-O", "raw", image, image.with_name("copy"))
            qemu.run("info", "-U", "-f", kind, image)
            with pytest.raises(AssertionError, match="lock"), daemon(image, writable=True):
                pass
            if kind != "raw":  # QEMU lets others write to a raw image that it reads
                refused_by_qemu("qemu-io", "-r", "-f", kind, "-c", "read 0 512", image)
                refused_by_qemu("qemu-img", "info", "-f", kind, image)
        qemu.checked([str(word) for word in writes_by_qemu(image)])

    def test_reading(self, image: Path) -> None:
        kind = image.suffix[1:]
        with imgcore.open(image) as own:
            refused_by_qemu(*writes_by_qemu(image))
            qemu.run("info", "-f", kind, image)
            own.refresh()
            refused_by_qemu(*writes_by_qemu(image))
            with daemon(image, writable=False):
                pass
        qemu.checked([str(word) for word in writes_by_qemu(image)])
        with imgcore.open(image, share=True):
            qemu.checked([str(word) for word in writes_by_qemu(image)])

    def test_after_a_resize(self, tmp_path: Path) -> None:
        path = make(tmp_path, "raw")
        with imgcore.open(path, mode="r+") as own:
            own.resize(2 * len(CONTENT))
            refused_by_qemu(*writes_by_qemu(path))
        qemu.checked([str(word) for word in writes_by_qemu(path)])


class TestTwoOfImgcore:
    def test_in_one_process(self, image: Path) -> None:
        with imgcore.open(image, mode="r+"):
            for mode, error in (("r+", TargetError), ("r", ImgcoreError)):
                with pytest.raises(error, match="in use by this process"):
                    imgcore.open(image, mode=mode)
            imgcore.open(image, share=True).close()
        with imgcore.open(image), imgcore.open(image) as second:
            with pytest.raises(TargetError, match="in use by this process"):
                imgcore.open(image, mode="r+")
            assert second.read(0, 4) == CONTENT[:4]
        imgcore.open(image, mode="r+").close()

    @pytest.mark.parametrize("mode", ["r", "r+"])
    def test_in_two_processes(self, image: Path, mode: str) -> None:
        command = Path("/proc/self/comm").read_text().strip()
        with held_by_imgcore(image, mode) as other:
            user = rf"in use by process {other.pid} \({re.escape(command[:6])}"
            with pytest.raises(TargetError, match=user):
                imgcore.open(image, mode="r+")
            if mode == "r+":
                with pytest.raises(ImgcoreError, match=user):
                    imgcore.open(image)
            other.send_signal(signal.SIGKILL)
            other.wait(timeout=30)
            # The lock has ended with the process.
            imgcore.open(image, mode="r+").close()

    def test_a_holder_that_the_system_does_not_tell(
        self, image: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with held_by_imgcore(image, "r+"):
            monkeypatch.setattr(lock_holders, "MAX_DESCRIPTORS", 1)
            with pytest.raises(TargetError, match="in use by another process"):
                imgcore.open(image, mode="r+")

    def test_what_is_read_may_be_replaced(self, image: Path) -> None:
        """Its readers keep the old file."""
        new = image.with_name("new.raw")
        new.write_bytes(bytes(len(CONTENT)))
        with imgcore.open(image) as reader:
            imgcore.convert(new, image, target_format=image.suffix[1:], force=True)
            assert reader.read(0, 512) == CONTENT[:512]
        with imgcore.open(image) as reader:
            assert reader.read(0, 512) == bytes(512)

    def test_what_is_written_may_not_be_replaced(self, image: Path) -> None:
        new = image.with_name("new.raw")
        new.write_bytes(bytes(len(CONTENT)))
        with imgcore.open(image, mode="r+"), pytest.raises(TargetError, match="in use by"):
            imgcore.convert(new, image, target_format=image.suffix[1:], force=True)


def test_all_files_of_an_image(tmp_path: Path) -> None:
    path = make(tmp_path, "vmdk")
    flat = path.with_name("disk-flat.vmdk")
    for mode in ("r", "r+"):
        with imgcore.open(path, mode=mode):
            for file in (path, flat):
                refused_by_qemu("qemu-io", "-f", "raw", "-c", "write 0 512", file)
    with imgcore.open(flat, mode="r", format="raw"):
        with pytest.raises(TargetError, match=r"disk-flat.vmdk: in use by .* \(the extent"):
            imgcore.open(path, mode="r+")
    qemu.checked(["qemu-io", "-f", "raw", "-c", "read 0 512", str(path)])


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_forked_child_does_not_keep_the_lock(image: Path, mode: str) -> None:
    own = imgcore.open(image, mode=mode)
    if mode == "r+":
        own.write(0, bytes(100 * KIB))
    assert len(own.read(0, 100 * KIB)) == 100 * KIB
    wait, go = os.pipe()
    child = os.fork()
    if not child:
        os.close(go)
        os.read(wait, 1)
        os._exit(0)
    os.close(wait)
    own.close()
    try:
        imgcore.open(image, mode="r+").close()
    finally:
        os.close(go)
        os.waitpid(child, 0)


def test_a_forked_child_does_not_end_the_lock(image: Path) -> None:
    with imgcore.open(image) as own:
        child = os.fork()
        if not child:
            own.close()
            os._exit(0)
        os.waitpid(child, 0)
        refused_by_qemu(*writes_by_qemu(image))


def locked_bytes(path: Path) -> list[int]:
    """Return the bytes of a file on which another open file has a lock."""
    found = []
    with path.open("rb+") as file:
        for byte in range(90, 310):
            request = struct.pack("@hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
            answer = fcntl.fcntl(file, 36, request)  # F_OFD_GETLK
            if struct.unpack("@hhqqi4x", answer)[0] != fcntl.F_UNLCK:
                found.append(byte)
    return found


def test_bytes_that_are_locked(tmp_path: Path) -> None:
    """A writer has those that QEMU has; a reader has one more, which QEMU ignores."""
    image = make(tmp_path, "qcow2")
    with imgcore.open(image, mode="r+"):
        own = locked_bytes(image)
    with daemon(image, writable=True):
        assert own == [100, 101, 103, 201, 203] == locked_bytes(image)
    with imgcore.open(image):
        assert locked_bytes(image) == [100, 201, 300]
    assert locked_bytes(image) == []


def test_a_descriptor_that_cannot_be_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is one of the caller's open file, and ends all the same."""
    path = make(tmp_path, "raw")
    monkeypatch.setattr(given, "_reopened", lambda *_: None)
    with path.open("rb+") as file:
        with imgcore.open(file.fileno(), mode="r+", format="raw") as image:
            image.resize(2 * len(CONTENT))
            assert locked_bytes(path) == [100, 101, 103, 201, 203]
        assert locked_bytes(path) == []
        with imgcore.open(file.fileno(), format="raw"):
            assert locked_bytes(path) == []


def test_a_file_system_without_locks(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fcntl.fcntl

    def refuse(fd: int, command: int, argument: Any = 0) -> Any:
        if command in (36, 37):
            raise OSError(37, "No locks available")
        return real(fd, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    for mode in ("r+", "r"):
        with imgcore.open(image, mode=mode) as own:
            assert own.read(0, 4) == CONTENT[:4]


class TestWhatCannotBeWritten:
    def test_a_mode_without_writing(self, image: Path) -> None:
        """Root could; but the owner does not want it."""
        image.chmod(0o444)
        with pytest.raises(TargetError, match=r"is read-only; chmod u\+w permits writing to it"):
            imgcore.open(image, mode="r+")
        image.chmod(0o644)
        imgcore.open(image, mode="r+").close()

    def test_a_descriptor_for_reading(self, image: Path) -> None:
        with image.open("rb") as file, pytest.raises(ImgcoreError, match="for reading only"):
            imgcore.open(file.fileno(), mode="r+", format=image.suffix[1:])

    def test_an_immutable_file(self, image: Path) -> None:
        if subprocess.run(["chattr", "+i", image], capture_output=True, check=False).returncode:
            pytest.skip("chattr +i does not work here")
        try:
            with pytest.raises(TargetError, match=f"chattr -i -a {image} permits writing to it"):
                imgcore.open(image, mode="r+")
        finally:
            subprocess.run(["chattr", "-i", image], check=True)

    def test_a_file_system_that_is_read_only(self, tmp_path: Path) -> None:
        with mounted("tmpfs", tmp_path / "m", "-t", "tmpfs", "-o", "size=8m") as folder:
            path = make(folder, "raw")
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
            with pytest.raises(OSError, match="Read-only file system") as caught:
                imgcore.open(path, mode="r+")
            assert caught.value.filename == str(path)
            imgcore.open(path).close()

    def test_a_device_that_is_read_only(self, tmp_path: Path) -> None:
        with loop_device(make(tmp_path, "raw")) as device:
            subprocess.run(["blockdev", "--setro", device], check=True)
            with pytest.raises(OSError, match="The block device is read-only"):
                imgcore.open(device, mode="r+")
            subprocess.run(["blockdev", "--setrw", device], check=True)
            with imgcore.open(device, mode="r+") as own:
                own.write(0, b"own")

    def test_a_device_that_is_mounted(self, tmp_path: Path) -> None:
        image = make_file_system("ext4", tmp_path / "ext4.img", 12 << 20)
        with loop_device(image) as device, mounted(device, tmp_path / "m"):
            with pytest.raises(OSError, match="The block device is in use or mounted"):
                imgcore.open(device, mode="r+")
