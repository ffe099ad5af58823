"""The verbs that open an image, and images that name other files, in every format."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import imgcore
from tests.helpers import qemu

SIZE: Final = 4 << 20
# Formats with parents, by the suffix of their images.
CHILD_SUFFIXES: Final = {
    "qcow2": ".qcow2",
    "vmdk": ".vmdk",
    "vhd": ".vhd",
    "vhdx": ".vhdx",
    "vdi": ".vdi",
}
# Verbs that read the disk, and so need all files of the image.
READING: Final = ("convert", "map", "measure", "compare-a", "compare-b", "diff")
VERBS: Final = (*READING, "info", "check", "lint")


def use(verb: str, image: Path, other: Path, **keywords: Any) -> Any:
    """Call a verb of the library; ``other`` is a disk to compare with."""
    if verb == "convert":
        target = other.parent / "converted.raw"
        if "backing_format" in keywords:
            keywords["source_backing_format"] = keywords.pop("backing_format")
        try:
            return imgcore.convert(image, target, sync=False, **keywords)
        finally:
            target.unlink(missing_ok=True)
    if verb.startswith("compare"):
        side = verb[-1]
        keywords = {
            f"{key}_{side}" if key in ("format", "parent") else key: value
            for key, value in keywords.items()
        }
        pair = (image, other) if side == "a" else (other, image)
        return imgcore.compare(*pair, **keywords)
    calls: dict[str, Callable[..., Any]] = {
        "diff": lambda **words: list(imgcore.changes(image, since=other, **words)),
        "map": lambda **words: list(imgcore.map(image, **words)),
        "measure": lambda **words: imgcore.measure(image, target_format="qcow2", **words),
        "info": lambda **words: imgcore.info(image, chain="parent" in words, **words),
        "check": lambda **words: imgcore.check(image, **words),
        "lint": lambda **words: imgcore.lint(image, profile="openstack", **words),
    }
    return calls[verb](**keywords)


def command(verb: str, image: Path | str, other: Path, *options: str) -> list[str]:
    """Return the arguments of the same call by the command."""
    words = [str(image)]
    if verb == "convert":
        words.append(str(other.parent / "converted.raw"))
        options = ("--force", *options)
    elif verb in ("compare-a", "diff"):
        words.append(str(other))
    elif verb == "compare-b":
        words.insert(0, str(other))
    elif verb == "lint":
        options = ("--profile", "hyperv", *options)
    return [verb.partition("-")[0], *options, *words]


def disk(path: Path, seed: int = 1) -> Path:
    """Write a raw disk of `SIZE` bytes with some data."""
    content = bytearray(SIZE)
    content[: 3 * 65536] = bytes([seed]) * (3 * 65536)
    content[-512:] = bytes([seed + 1]) * 512
    path.write_bytes(content)
    return path


def child(folder: Path, image_format: str, name: str, parent: Path) -> Path:
    """Make an image that has no data of its own, and a parent of the same format."""
    path = folder / name
    relative = parent.relative_to(folder) if parent.is_relative_to(folder) else parent
    if image_format in ("qcow2", "vmdk"):
        qemu.run("create", "-q", "-f", image_format, "-F", image_format, "-b", str(relative), path)
        return path
    raw = folder / "same.raw"
    imgcore.convert(parent, raw, format=image_format, sync=False)
    imgcore.convert(
        raw,
        path,
        target_format=image_format,
        backing=relative,
        backing_format=image_format,
        sync=False,
    )
    raw.unlink()
    return path


def chain(folder: Path, image_format: str, n_images: int) -> tuple[list[Path], Path]:
    """Make a chain, the base first, and return it with the disk that it holds."""
    raw = disk(folder / "disk.raw")
    suffix = CHILD_SUFFIXES[image_format]
    paths = [folder / f"0{suffix}"]
    if image_format == "vmdk":
        qemu.run("convert", "-f", "raw", "-O", "vmdk", raw, paths[0])
    else:
        imgcore.convert(raw, paths[0], target_format=image_format, sync=False)
    for number in range(1, n_images):
        paths.append(child(folder, image_format, f"{number}{suffix}", paths[-1]))
    return paths, raw


def flat_vmdk(folder: Path) -> tuple[Path, Path, Path]:
    """Make a VMDK of two files; return descriptor, extent and the disk."""
    raw = disk(folder / "disk.raw")
    path = folder / "web01.vmdk"
    qemu.run("convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=monolithicFlat", raw, path)
    return path, folder / "web01-flat.vmdk", raw


def renamed(path: Path, name: str) -> Path:
    """Move an image to another name in its folder."""
    return Path(shutil.move(path, path.parent / name))
