"""Chains of images with known contents, for the tests of verbs that change them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import imgcore
from tests.helpers import qemu

MIB: Final = 1 << 20
SIZE: Final = 12 * MIB
# Formats whose images have parents of the same format.
FORMATS: Final = ("qcow2", "vmdk", "vhd", "vhdx", "vdi")
# Of the child, and of its parent.
PAIRS: Final = (
    *((name, name) for name in FORMATS),
    *(("qcow2", name) for name in ("raw", "vmdk", "vhd", "vhdx", "vdi")),
)


def disks(seed: int, number: int, nbytes: int = SIZE) -> list[bytes]:
    """Return the contents of a disk and of later states of it."""
    chance = random.Random(seed)
    states = []
    state = bytearray(nbytes)
    for index in range(number):
        for _ in range(40 if index == 0 else 12):
            length = chance.choice((512, 4096, 65536, 200_704, MIB))
            start = chance.randrange(nbytes - length) // 512 * 512
            is_data = chance.random() < 0.7
            state[start : start + length] = chance.randbytes(length) if is_data else bytes(length)
        states.append(bytes(state))
    return states


def chain(folder: Path, formats: Sequence[str], contents: Sequence[bytes]) -> list[Path]:
    """Write a chain of images, the base first: ``0.qcow2``, ``1.qcow2``, and so on."""
    paths: list[Path] = []
    for number, (name, content) in enumerate(zip(formats, contents, strict=True)):
        paths.append(child(folder / f"{number}.{name}", content, paths[-1] if paths else None))
    return paths


def child(path: Path, content: bytes, parent: Path | None) -> Path:
    """Write an image that has what its parent has not."""
    name = path.suffix[1:]
    raw = path.with_suffix(".content")
    raw.write_bytes(content)
    if parent is None:
        imgcore.convert(raw, path, format="raw", target_format=name, sync=False)
    elif name == "vmdk":
        words = ["convert", "-f", "raw", "-O", name, "-B", parent.name, "-F", parent.suffix[1:]]
        qemu.checked([qemu.require_qemu_img(), *words, raw.name, path.name], cwd=path.parent)
    else:
        imgcore.convert(
            raw,
            path,
            format="raw",
            target_format=name,
            backing=parent.name,
            backing_format=parent.suffix[1:],
            sync=False,
        )
    raw.unlink()
    return path


def content_of(path: Path) -> bytes:
    with imgcore.open(path) as image:
        return image.read(0, image.virtual_size)


def own_nbytes(path: Path) -> int:
    """Return how much of its disk an image has itself."""
    with imgcore.open(path) as image:
        return sum(
            int(rows["length"][rows["kind"] != imgcore.Kind.HOLE].sum())
            for rows in image.extents(layer=0)
        )


def check(path: Path) -> None:
    """Let imgcore and qemu-img check an image, as far as that reads it."""
    if path.suffix == ".raw":
        return
    report = imgcore.check(path)
    assert (report.corruptions, report.leaks) == (0, 0), report.problems
    name = path.suffix[1:]
    has_parent = "backing-filename" in imgcore.info(path)
    if name == "qcow2" or (name in ("vmdk", "vhdx", "vdi") and not has_parent):
        qemu.run("check", "-f", name, path)
