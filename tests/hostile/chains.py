"""Hostile references: to files outside the folder, in a loop, or of another kind."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.helpers import vdi, vmdk
from tests.hostile import qcow2
from tests.hostile.case import SECTOR, Case, Stage, pattern

RAW = qcow2.extension(0xE2792ACA, 3, b"raw\0\0\0\0\0")
QCOW2 = qcow2.extension(0xE2792ACA, 5, b"qcow2\0\0\0")
Prepare = Callable[[Path], object]


def _upon(name: str, format: bytes = RAW, prepare: Prepare | None = None) -> Callable[[Path], Path]:
    """Return a function that creates an empty image with a backing file."""

    def make(folder: Path) -> Path:
        if prepare is not None:
            prepare(folder)
        image = qcow2.build({}, data=b"", extensions=format, backing=os.fsencode(name))
        path = folder / "disk.qcow2"
        path.write_bytes(image)
        return path

    return make


def _link(target: str) -> Prepare:
    return lambda folder: (folder / "link").symlink_to(target)


_UNSAFE = "UnsafeReferenceError"
NAMES: list[tuple[str, str, Prepare | None, str, str]] = [
    ("parent-folder", "../outside/canary.raw", None, _UNSAFE, "leads out"),
    ("dots-inside", "x/../../outside/canary.raw", None, _UNSAFE, "leads out"),
    ("many-dots", "../" * 40 + "etc/passwd", None, _UNSAFE, "leads out"),
    ("absolute", "/etc/passwd", None, _UNSAFE, "leads out"),
    ("proc-fd", "/proc/self/fd/0", None, _UNSAFE, "leads out"),
    ("device", "/dev/zero", None, _UNSAFE, "leads out"),
    ("json", 'json:{"driver":"file","filename":"/etc/passwd"}', None, _UNSAFE, "json"),
    ("json-upper", 'JSON:{"driver":"raw"}', None, _UNSAFE, "json"),
    ("nbd", "nbd://127.0.0.1:1/x", None, _UNSAFE, "URL"),
    ("http", "http://127.0.0.1:1/x", None, _UNSAFE, "URL"),
    ("file-url", "file:///etc/passwd", None, _UNSAFE, "URL"),
    ("fd", "fd:0", None, _UNSAFE, "URL"),
    ("drive", "C:\\base.raw", None, _UNSAFE, "drive"),
    ("nul", "a\0b", None, _UNSAFE, "NUL"),
    ("link-outside", "link", _link("../outside/canary.raw"), _UNSAFE, "leads out"),
    ("link-absolute", "link", _link("/etc/passwd"), _UNSAFE, "leads out"),
    ("link-folder", "link/canary.raw", _link("../outside"), _UNSAFE, "leads out"),
    ("missing", "gone.raw", None, "FileNotFoundError", "gone.raw"),
    ("folder", "sub", lambda folder: (folder / "sub").mkdir(), "ImgcoreError", "folder"),
    ("itself-as-folder", ".", None, _UNSAFE, ""),
    ("fifo", "pipe", lambda folder: os.mkfifo(folder / "pipe"), "ImgcoreError", "FIFO"),
    ("link-loop", "link", _link("link"), "OSError", ""),
    ("long-name", "x" * 1000, None, "OSError", ""),
]


def cases() -> Iterator[Case]:
    """Yield the cases."""
    for name, backing, prepare, error, word in NAMES:
        yield Case(f"qcow2-backing-{name}", _upon(backing, RAW, prepare), error, word, Stage.CHAIN)
    for name, format, error, word in (
        ("no-format", b"", "WrongFormatError", "never guessed"),
        (
            "unknown-format",
            qcow2.extension(0xE2792ACA, 4, b"evil\0\0\0\0"),
            "UnsupportedFeatureError",
            "of the format 'evil', which is not supported",
        ),
        ("other-format", QCOW2, "WrongFormatError", "not a qcow2 image"),
    ):
        make = _upon("base.raw", format, _base)
        yield Case(f"qcow2-backing-{name}", make, error, word, Stage.CHAIN)
    yield from _fields()
    yield from _loops()
    yield from _others()


def _base(folder: Path) -> None:
    (folder / "base.raw").write_bytes(pattern(qcow2.SIZE))


def _fields() -> Iterator[Case]:
    for name, fields, error, word in (
        (
            "name-cap-plus-1",
            {"backing_offset": 200, "backing_size": 1024},
            "LimitExceededError",
            "name takes",
        ),
        (
            "name-size-max",
            {"backing_offset": 200, "backing_size": 0xFFFFFFFF},
            "LimitExceededError",
            "name takes",
        ),
        (
            "name-in-header",
            {"backing_offset": 8, "backing_size": 8},
            "CorruptImageError",
            "backing file name",
        ),
        (
            "name-past-cluster",
            {"backing_offset": 65535, "backing_size": 8},
            "CorruptImageError",
            "backing file name",
        ),
        (
            "name-far",
            {"backing_offset": 1 << 60, "backing_size": 8},
            "CorruptImageError",
            "backing file name",
        ),
    ):
        yield Case(f"qcow2-backing-{name}", qcow2.put(qcow2.build(**fields)), error, word)
    # The bit decides before any name is examined.
    data_file = qcow2.extension(0x44415441, 21, b"../outside/canary.raw\0\0\0")
    yield Case(
        "qcow2-data-file-outside",
        qcow2.put(qcow2.build(extensions=data_file, incompatible=4)),
        "UnsupportedFeatureError",
        "external data file",
    )
    yield Case(
        "qcow2-data-file-without-bit",
        qcow2.put(qcow2.build(extensions=data_file)),
        None,
        stage=Stage.NONE,
        content=qcow2.CONTENT,
    )

    # An image may name files beside it, also through a link that stays inside.
    def inside(folder: Path) -> None:
        _base(folder)
        (folder / "link").symlink_to("base.raw")

    yield Case(
        "qcow2-backing-link-inside",
        _upon("link", RAW, inside),
        None,
        stage=Stage.NONE,
        content=pattern(qcow2.SIZE),
    )


def _loops() -> Iterator[Case]:
    yield Case(
        "qcow2-backing-itself",
        _upon("disk.qcow2", QCOW2),
        "CorruptImageError",
        "leads back",
        Stage.CHAIN,
    )
    yield Case(
        "qcow2-backing-itself-by-link",
        _upon("link", QCOW2, _link("disk.qcow2")),
        "CorruptImageError",
        "leads back",
        Stage.CHAIN,
    )

    def ring(folder: Path) -> None:
        other = qcow2.build({}, data=b"", extensions=QCOW2, backing=b"disk.qcow2")
        (folder / "other.qcow2").write_bytes(other)

    yield Case(
        "qcow2-backing-ring",
        _upon("other.qcow2", QCOW2, ring),
        "CorruptImageError",
        "leads back",
        Stage.CHAIN,
    )

    def deep(folder: Path) -> None:
        for n in range(65):
            image = qcow2.build({}, data=b"", extensions=QCOW2, backing=b"%d.qcow2" % (n + 1))
            (folder / f"{n}.qcow2").write_bytes(image)

    yield Case(
        "qcow2-backing-depth-cap-plus-1",
        _upon("0.qcow2", QCOW2, deep),
        "LimitExceededError",
        "64 images",
        Stage.CHAIN,
    )


def _delta(
    hint: str, prepare: Prepare | None = None, parent: str = "12345678"
) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        if prepare is not None:
            prepare(folder)
        path = folder / "disk.vmdk"
        extra = f'parentFileNameHint="{hint}"'
        path.write_bytes(vmdk.descriptor("custom", "RW 8 ZERO", extra=extra, parent=parent))
        return path

    return make


def _others() -> Iterator[Case]:
    for name, hint, error, word in (
        ("outside", "../outside/canary.vmdk", _UNSAFE, "leads out"),
        ("absolute", "/etc/passwd", _UNSAFE, "leads out"),
        ("json", "json:{}", _UNSAFE, "json"),
        ("missing", "gone.vmdk", "FileNotFoundError", ""),
        ("itself", "disk.vmdk", "CorruptImageError", "leads back"),
    ):
        yield Case(f"vmdk-parent-{name}", _delta(hint), error, word, Stage.CHAIN)

    def stranger(folder: Path) -> None:
        (folder / "flat.bin").write_bytes(bytes(8 * SECTOR))
        text = vmdk.descriptor("custom", 'RW 8 FLAT "flat.bin" 0')
        (folder / "base.vmdk").write_bytes(text)

    yield Case(
        "vmdk-parent-of-other-content",
        _delta("base.vmdk", stranger, "87654321"),
        "CorruptImageError",
        "content ID",
        Stage.CHAIN,
    )
    yield Case("vmdk-extent-link-outside", _linked_extent, _UNSAFE, "leads out")
    ids = (vdi.IDS[0], vdi.IDS[1], vdi.IDS[2], vdi.IDS[3])
    itself = (vdi.IDS[0], vdi.IDS[1], vdi.IDS[0], vdi.IDS[1])
    for name, uuids, error, word in (
        ("missing", ids, "FileNotFoundError", ""),
        ("itself", itself, "CorruptImageError", "leads back"),
    ):

        def make(folder: Path, uuids: tuple[object, ...] = uuids) -> Path:
            return vdi.make(folder / "disk.vdi", [vdi.FREE], image_type=4, uuids=uuids)  # type: ignore[arg-type]

        yield Case(f"vdi-parent-{name}", make, error, word, Stage.CHAIN)


def _linked_extent(folder: Path) -> Path:
    (folder / "flat.bin").symlink_to("../outside/canary.raw")
    path = folder / "disk.vmdk"
    path.write_bytes(vmdk.descriptor("custom", 'RW 8 FLAT "flat.bin" 0'))
    return path
