"""Uses each image that a fuzzer makes, and checks the outcome."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import imgcore
from imgcore.formats.api import HasBitmaps
from tests.fuzz.pieces import Pieces
from tests.helpers import vdi, vhd, vhdx, vmdk
from tests.hostile import qcow2
from tests.hostile.case import CANARY, pattern

MAX_SECONDS = 2.0
READ_NBYTES = 64 * 1024
MAX_CONVERTED_NBYTES = 1 << 20
MAX_BATCHES = 64
SUFFIXES = {"raw": ".raw"}


class Finding(AssertionError):
    """An outcome that must not happen; not an error of imgcore."""


def _family(folder: Path) -> None:
    """Write files for images to refer to: parents and extents, and canaries outside."""
    outside = folder.parent / "outside"
    outside.mkdir()
    secret = (CANARY * 40)[:512] * 32
    (outside / "canary.raw").write_bytes(secret)
    (folder.parent / "canary.raw").write_bytes(secret)
    (folder / "base.raw").write_bytes(pattern(512) + bytes(qcow2.SIZE - 512))
    (folder / "base.qcow2").write_bytes(qcow2.build())
    (folder / "flat.bin").write_bytes(pattern(4096))
    vhd.fixed(folder / "p.vhd", pattern(16384), uuid=vhd.PARENT_UUID)
    vmdk.hosted(folder / "base.vmdk", 256, {})
    vdi.make(folder / "p.vdi", [0], block=65536, uuids=(vdi.IDS[2], vdi.IDS[3], None, None))
    vhdx.Vhdx(vhdx.MIB).write(folder / "parent.vhdx")


class Place:
    """A folder with a family, in which images are used one after the other."""

    def __init__(self) -> None:
        memory = Path("/dev/shm")
        self._root = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
        self._folder = self._root / "images"
        self._folder.mkdir()
        _family(self._folder)
        self.files = {path: path.read_bytes() for path in self._root.rglob("*") if path.is_file()}

    def path_of(self, image: Pieces) -> Path:
        """Return the name that an image gets."""
        return self._folder / f"disk{SUFFIXES.get(image.format or '', '')}"

    def restore(self) -> None:
        """Remove what was made, and write the family anew where it has changed."""
        for path in self._root.rglob("*"):
            if path.is_file() and path not in self.files:
                path.unlink()
        for path, content in self.files.items():
            if not path.exists() or path.read_bytes() != content:
                path.write_bytes(content)

    def close(self) -> None:
        """Remove everything."""
        shutil.rmtree(self._root)

    def use(self, data: bytes) -> str:
        """Use one packed image; return ``ok`` or the name of the exception.

        Raises
        ------
        Finding
            An exception that is not imgcore's, a leak, or a timeout.
        """
        image = Pieces.unpack(data)
        path = self.path_of(image)
        image.save(path)
        try:
            outcomes = [
                attempt(do, path, image.format)
                for do in (_read, _describe, _check, _list, _convert)
            ]
        finally:
            path.unlink()
        return outcomes[0]


def attempt(do: Callable[[str, str | None], None], path: Path, format: str | None) -> str:
    """Do one thing with a file; return ``ok`` or the name of the exception.

    Raises
    ------
    Finding
        A bad message, or a timeout.
    """
    begun = time.process_time()
    try:
        do(str(path), format)
        outcome = "ok"
    except imgcore.ImgcoreError as error:
        text = str(error)
        if not text or "\n" in text or CANARY.decode() in text:
            raise Finding(f"a message of {type(error).__name__}: {text!r}") from error
        outcome = type(error).__name__
    except OSError as error:
        if error.filename is None:
            raise Finding(f"an OSError without a file: {error}") from error
        outcome = "OSError"
    seconds = time.process_time() - begun
    if seconds > MAX_SECONDS:
        raise Finding(f"{do.__name__} took {seconds:.1f} s of CPU time, until {outcome}")
    return outcome


def _read(path: str, format: str | None) -> None:
    with imgcore.open(path, format=format) as image:
        for _ in itertools.islice(image.extents(), MAX_BATCHES):
            pass
        length = min(image.virtual_size, READ_NBYTES)
        for offset in {0, (image.virtual_size - length) // 2, image.virtual_size - length}:
            if CANARY in image.read(offset, length):
                raise Finding("what lies outside the folder was read")


def _describe(path: str, format: str | None) -> None:
    if CANARY.decode() in repr(imgcore.info(path, format=format)):
        raise Finding("info shows what lies outside the folder")


def _check(path: str, format: str | None) -> None:
    imgcore.check(path, format=format)


def _list(path: str, format: str | None) -> None:
    with imgcore.open(path, format=format) as image:
        reader = image.reader
        if not isinstance(reader, HasBitmaps):
            return
        end = 0
        for bitmap in image.info()["format-specific"]["data"].get("bitmaps", ()):
            for offset, length in itertools.islice(reader.bitmap_areas(bitmap["name"]), 1000):
                if not end <= offset < offset + length <= image.virtual_size:
                    raise Finding(f"a bitmap marks {length} bytes at {offset}")
                end = offset + length
            end = 0


def _convert(path: str, format: str | None) -> None:
    with imgcore.open(path, format=format) as image:
        if not 0 < image.virtual_size <= MAX_CONVERTED_NBYTES:
            return
    output = Path(path).parent.parent / "out.raw"
    try:
        imgcore.convert(path, output, format=format, target_format="raw", threads=1, sync=False)
        if CANARY in output.read_bytes():
            raise Finding("what lies outside the folder was copied")
    finally:
        output.unlink(missing_ok=True)
