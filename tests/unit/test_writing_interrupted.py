"""The exception of a signal handler, anywhere in a change of an open image."""

from __future__ import annotations

import random
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import imgcore

MIB = 1 << 20
OURS = str(Path(imgcore.__file__).parent)
# Python runs signal handlers when a function of Python begins, and when one of C ends.
POINTS = ("call", "c_return")
START, NBYTES = 1000, 100_000
NEW = b"N" * NBYTES


class Interrupt:
    """Raises KeyboardInterrupt at the n-th point."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.n = 0

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        name = frame.f_code.co_filename
        if event in POINTS and (name.startswith(OURS) or name.endswith("contextlib.py")):
            self.n += 1
            if self.n == self.at:
                sys.setprofile(None)
                raise KeyboardInterrupt

    def strikes(self, image: imgcore.Image, action: str) -> bool:
        """Change the image; return whether it was interrupted.

        Python drops what is raised while it drops an object: then the change goes on.
        """
        sys.setprofile(self)
        try:
            if action == "zero":
                image.zero(START, NBYTES)
            elif action == "discard":
                image.discard(START, NBYTES)
            else:
                image.write(START, NEW)
                image.flush()
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)
        return self.n == self.at


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("raw") / "disk.raw"
    path.write_bytes(random.Random(1).randbytes(MIB // 20) + bytes(MIB - MIB // 20))
    return path


def go_on(image: imgcore.Image) -> None:
    image.write(START + 5, b"other")
    image.flush()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("stride", [37, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("action", ["write", "zero", "discard"])
@pytest.mark.parametrize("format", ["raw", "qcow2", "vhd", "vhdx", "vmdk", "vdi"])
def test_an_interrupt_anywhere(
    format: str, action: str, stride: int, raw: Path, tmp_path: Path
) -> None:
    """Other threads and this one go on; the image is sound, and can be opened again."""
    before = raw.read_bytes()
    path = tmp_path / f"disk.{format}"
    imgcore.convert(raw, path, target_format=format)
    made = path.read_bytes()
    at = random.Random(f"{format} {action}").randint(1, stride)
    while True:
        path.unlink()
        path.write_bytes(made)
        image = imgcore.open(path, mode="r+", format=format)
        interrupt = Interrupt(at)
        was_struck = interrupt.strikes(image, action)
        found = image.read(0, MIB)
        after = NEW if action == "write" else bytes(NBYTES)
        pairs = zip(found[START:], before[START : START + NBYTES], after, strict=False)
        assert all(byte in either for byte, *either in pairs), at
        assert found[START + NBYTES :] == before[START + NBYTES :]
        other = threading.Thread(target=go_on, args=(image,), daemon=True)
        other.start()
        other.join(60)
        assert not other.is_alive(), at
        image.write(START, b"same")
        image.close()
        with imgcore.open(path, mode="r+", format=format) as image:
            assert image.read(START + 5, 5) == b"other"
            assert image.read(START, 4) == b"same"
        if format != "raw":
            report = imgcore.check(path)
            assert not report.corruptions, (at, report.problems)
        if not was_struck:
            break
        at += stride
