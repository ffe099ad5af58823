"""Images of many producers, and the formats that each can become without copying.

The programs that wrote an image decide where its blocks are, and so what can stay.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import imgcore
from tests.helpers import images, qemu
from tests.helpers.images import KIB, MIB, RawImage

# Data at both ends, in runs and in single sectors, some of it off every block.
_PIECES: Final = [
    (0, images.text(700 * KIB)),
    (2 * MIB - 512, images.noise(1536)),
    (4 * MIB, images.noise(3 * MIB, 1)),
    (9 * MIB + 64 * KIB, images.text(64 * KIB, 2)),
    (13 * MIB + 4096 * 3, images.noise(2 * MIB + 777, 3)),
    (18 * MIB, images.text(2 * MIB, 4)),
]
N_ODD_SECTORS: Final = 77


def _disk(name: str, nbytes: int) -> RawImage:
    return RawImage(name, nbytes, lambda: [*_PIECES, (nbytes - 9 * 512, images.noise(9 * 512, 5))])


DISK: Final = _disk("even", 24 * MIB)
ODD_DISK: Final = _disk("odd", 24 * MIB + N_ODD_SECTORS * 512)


class Made(NamedTuple):
    """An image as a program writes it; ``make`` gets the raw disk and the path."""

    name: str
    format: str
    producer: str
    make: Callable[[Path, Path], None]

    @property
    def suffix(self) -> str:
        return f".{self.format}"


class Becomes(NamedTuple):
    """A format that an image becomes, with its options."""

    name: str
    format: str
    options: tuple[str, ...] = ()
    inflate: bool = False

    @property
    def suffix(self) -> str:
        return f".{self.format}"


class Pair(NamedTuple):
    """An image, and what becomes of it."""

    source: Made
    target: Becomes

    @property
    def name(self) -> str:
        return f"{self.source.name}-{self.source.producer}-to-{self.target.name}"


# -- producers -------------------------------------------------------------------------


def _by_qemu(name: str, image_format: str, *options: str, compress: bool = False) -> Made:
    variant = qemu.Variant(name, image_format, options, compress)
    return Made(name, image_format, "qemu", lambda raw, path: qemu.convert(raw, path, variant))


def _by_imgcore(name: str, image_format: str, *options: str, compress: bool = False) -> Made:
    def make(raw: Path, path: Path) -> None:
        imgcore.convert(
            raw,
            path,
            format="raw",
            target_format=image_format,
            options=list(options),
            compress=compress,
            sync=False,
        )

    return Made(name, image_format, "imgcore", make)


def _by_virtualbox(name: str, image_format: str, kind: str = "Standard") -> Made:
    def make(raw: Path, path: Path) -> None:
        words = [qemu.require_vbox_img(), "convert", "--srcformat", "RAW", "--variant", kind]
        words += ["--dstformat", image_format.upper()]
        qemu.checked([*words, "--srcfilename", str(raw), "--dstfilename", str(path)])

    return Made(name, image_format, "virtualbox", make)


def _aged(name: str, image_format: str, *options: str) -> Made:
    """Return an image that a guest has filled piece by piece, in no order."""

    def make(raw: Path, path: Path) -> None:
        nbytes = raw.stat().st_size
        words = ["create", "-q", "-f", qemu_name(image_format)]
        qemu.run(*words, *(["-o", ",".join(options)] if options else []), path, str(nbytes))
        rng = random.Random(f"{name} {nbytes}")
        content = raw.read_bytes()
        starts = list(range(0, nbytes, 192 * KIB))
        rng.shuffle(starts)
        piece_path = path.with_suffix(".piece")
        commands = []
        for number, start in enumerate(starts):
            data = content[start : start + 192 * KIB]
            if not any(data):
                continue
            piece = piece_path.with_name(f"piece-{number}")
            piece.write_bytes(data)
            commands.append(f"write -s {piece} {start} {len(data)}")
        qemu_io(path, image_format, commands)
        for piece in path.parent.glob("piece-*"):
            piece.unlink()

    return Made(name, image_format, "aged", make)


RAW: Final = Made("raw", "raw", "plain", lambda raw, path: copy_sparse(str(raw), str(path)))
_FLAT: Final = "subformat=monolithicFlat"
_STREAM: Final = "subformat=streamOptimized"
_FIXED_VHDS: Final = (
    _by_qemu("fixed", "vhd", "subformat=fixed", "force_size=on"),
    _by_virtualbox("fixed", "vhd", "Fixed"),
    _by_imgcore("fixed", "vhd", "subformat=fixed"),
)
_FLAT_VMDKS: Final = (
    _by_qemu("flat", "vmdk", _FLAT),
    _by_virtualbox("flat", "vmdk", "Fixed"),
    _by_imgcore("flat", "vmdk", _FLAT),
)
_QCOW2S_8K: Final = (_by_qemu("qcow2-8k", "qcow2", "cluster_size=8k"),)
_QCOW2S_64K: Final = (
    _by_qemu("qcow2-64k", "qcow2"),
    _by_imgcore("qcow2-64k", "qcow2"),
    _aged("qcow2-64k", "qcow2"),
)
_QCOW2S_1M: Final = (
    _by_qemu("qcow2-1m", "qcow2", "cluster_size=1M"),
    _by_imgcore("qcow2-1m", "qcow2", "cluster_size=1M"),
    _aged("qcow2-1m", "qcow2", "cluster_size=1M"),
)
_QCOW2S_ZLIB: Final = (
    _by_qemu("qcow2-zlib", "qcow2", compress=True),
    _by_imgcore("qcow2-zlib", "qcow2", compress=True),
)
_VMDKS: Final = (
    _by_qemu("vmdk", "vmdk"),
    _by_virtualbox("vmdk", "vmdk"),
    _by_imgcore("vmdk", "vmdk"),
    _aged("vmdk", "vmdk"),
)
_STREAMS: Final = (
    _by_qemu("stream", "vmdk", _STREAM),
    _by_virtualbox("stream", "vmdk", "Stream"),
    _by_imgcore("stream", "vmdk", _STREAM),
)
# The blocks of QEMU's and VirtualBox's VHDs are 512 bytes off; imgcore's are on 4 KiB.
_VHDS_ALIGNED: Final = (_by_imgcore("vhd", "vhd"),)
_VHDS: Final = (
    _by_qemu("vhd", "vhd", "force_size=on"),
    _by_virtualbox("vhd", "vhd"),
    *_VHDS_ALIGNED,
    _aged("vhd", "vhd", "force_size=on"),
)
_VHDXS: Final = (
    _by_qemu("vhdx", "vhdx"),
    _by_imgcore("vhdx", "vhdx", "block_size=1M"),
    _aged("vhdx", "vhdx", "block_size=1M"),
)
# The blocks of QEMU's VDIs follow the map directly, off every block of the others.
_VDIS_ALIGNED: Final = (_by_virtualbox("vdi", "vdi"), _by_imgcore("vdi", "vdi"))
_VDIS: Final = (_by_qemu("vdi", "vdi"), *_VDIS_ALIGNED, _aged("vdi", "vdi"))


# -- targets ---------------------------------------------------------------------------


def _qcow2(size: str) -> Becomes:
    return Becomes(f"qcow2-{size}", "qcow2", (f"cluster_size={size}",))


def _vhdx(size: str) -> Becomes:
    return Becomes(f"vhdx-{size}", "vhdx", (f"block_size={size}",))


TO_RAW: Final = Becomes("raw", "raw")
TO_FIXED: Final = Becomes("fixed-vhd", "vhd", ("subformat=fixed",))
TO_FLAT: Final = Becomes("flat-vmdk", "vmdk", (_FLAT,))
TO_QCOW2: Final = _qcow2("64k")
TO_VMDK: Final = Becomes("vmdk", "vmdk")
TO_VMDK_8K: Final = Becomes("vmdk-8k", "vmdk", ("grain_size=8k",))
TO_VHDX: Final = _vhdx("1M")
TO_VDI: Final = Becomes("vdi", "vdi")
_FROM_FLAT: Final = (
    *map(_qcow2, ("512", "4k", "64k", "1M", "2M")),
    TO_VMDK,
    TO_VHDX,
    _vhdx("32M"),
    TO_VDI,
)


def _pairs(sources: Sequence[Made], *targets: Becomes) -> list[Pair]:
    return [Pair(source, target) for source in sources for target in targets]


PAIRS: Final = (
    *_pairs([RAW], TO_FIXED, TO_FLAT, *_FROM_FLAT),
    *_pairs(_FIXED_VHDS, TO_RAW, TO_FLAT, TO_QCOW2, TO_VMDK, TO_VHDX, TO_VDI),
    *_pairs(_FLAT_VMDKS, TO_RAW, TO_FIXED, TO_QCOW2, TO_VMDK, TO_VHDX, TO_VDI),
    *_pairs(_QCOW2S_8K, TO_VMDK_8K),
    *_pairs(_QCOW2S_64K, TO_VMDK),
    *_pairs(_QCOW2S_1M, TO_VMDK, TO_VHDX, TO_VDI),
    *_pairs(_QCOW2S_ZLIB, Becomes("vmdk-inflated", "vmdk", (), inflate=True)),
    *_pairs(_VMDKS, TO_QCOW2, _qcow2("4k")),
    *_pairs(_STREAMS, TO_QCOW2),
    *_pairs(_VHDS, TO_VMDK),
    *_pairs(_VHDS_ALIGNED, _qcow2("4k")),
    *_pairs(_VHDXS, TO_QCOW2, _qcow2("1M"), _qcow2("2M"), TO_VMDK, TO_VDI),
    *_pairs(_VDIS, TO_VMDK),
    *_pairs(_VDIS_ALIGNED, TO_QCOW2, _qcow2("1M"), TO_VHDX),
)

# One for each way of placing blocks and of writing tables.
USUAL: Final = (
    "raw-plain-to-fixed-vhd",
    "raw-plain-to-flat-vmdk",
    "fixed-imgcore-to-vmdk",
    "raw-plain-to-qcow2-64k",
    "raw-plain-to-vdi",
    "fixed-qemu-to-vhdx-1M",
    "flat-qemu-to-qcow2-64k",
    "qcow2-64k-aged-to-vmdk",
    "qcow2-1m-aged-to-vhdx-1M",
    "vmdk-aged-to-qcow2-64k",
    "stream-qemu-to-qcow2-64k",
    "vhd-qemu-to-vmdk",
    "vhdx-aged-to-qcow2-64k",
    "vhdx-imgcore-to-vdi",
    "vdi-imgcore-to-vhdx-1M",
)
# What may move, where it is more than the front of a raw disk and the last block.
MOVED_NBYTES: Final = dict.fromkeys(
    ("vmdk-inflated", "qcow2-2M", "vhdx-32M"), ODD_DISK.virtual_size
)


# -- judges ----------------------------------------------------------------------------

_HAS_CHECK: Final = ("qcow2", "vdi", "vhdx", "vmdk")


def qemu_name(image_format: str) -> str:
    """Return QEMU's name of a format."""
    return {"vhd": "vpc"}.get(image_format, image_format)


def qemu_imgs() -> list[str]:
    """Return every qemu-img: that of PATH and that of ``$IMGCORE_PEERS``."""
    found = [qemu.require_qemu_img(), shutil.which("qemu-img")]
    return list(dict.fromkeys(program for program in found if program is not None))


def qemu_io(path: Path, image_format: str, commands: Sequence[str]) -> None:
    """Run commands on an image; a failure shows qemu-io's output."""
    program = qemu.find_program("qemu-io")
    assert program is not None, "qemu-io comes with qemu-img (Debian: qemu-utils)"
    words = [part for command in commands for part in ("-c", command)]
    done = qemu.checked([program, "-f", qemu_name(image_format), *words, str(path)])
    assert "failed" not in done.stdout, done.stdout


def assert_reads_as(raw: Path, path: Path, image_format: str, *, leaks: bool = False) -> None:
    """Fail unless every program finds the raw disk in a sound image.

    With ``leaks`` the file may have parts that the image does not use.
    """
    same = imgcore.compare(raw, path, format_a="raw", format_b=image_format)
    assert same.identical, same
    if image_format != "raw":
        report = imgcore.check(path, format=image_format)
        assert report.corruptions == 0, report
        assert leaks or report.ok, report
    for program in qemu_imgs():
        words = ["compare", "-f", "raw", "-F", qemu_name(image_format)]
        qemu.checked([program, *words, str(raw), str(path)])
        if image_format in _HAS_CHECK:
            qemu.checked([program, "check", "-f", qemu_name(image_format), str(path)])
    if qemu.find_program("vbox-img") is not None and image_format != "raw":
        _assert_virtualbox_reads(raw, path, image_format)


def _assert_virtualbox_reads(raw: Path, path: Path, image_format: str) -> None:
    back = path.with_name("back.raw")
    name = {"qcow2": "QCOW"}.get(image_format, image_format.upper())
    words = [qemu.require_vbox_img(), "convert", "--srcformat", name, "--dstformat", "RAW"]
    qemu.checked([*words, "--srcfilename", str(path), "--dstfilename", str(back)])
    qemu.run("compare", "-f", "raw", "-F", "raw", raw, back)
    back.unlink()


def write_as_guest(raw: Path, path: Path, image_format: str, n_writes: int = 150) -> None:
    """Write to random places through QEMU, and the same to the raw disk."""
    rng = random.Random(f"{images.SEED} {path.name}")
    nbytes = raw.stat().st_size
    commands = []
    with open(raw, "r+b") as file:
        for number in range(n_writes):
            length = min(512 * rng.choice((1, 2, 7, 8, 64, 128, 300)), nbytes)
            offset = rng.randrange((nbytes - length) // 512 + 1) * 512
            byte = rng.randrange(4) and number % 255 + 1
            # VirtualBox does not know the zero clusters of a QCOW2.
            how = f"-P {byte}" if byte or image_format == "qcow2" else "-z"
            commands.append(f"write {how} {offset} {length}")
            file.seek(offset)
            file.write(bytes([byte]) * length)
    qemu_io(path, image_format, commands)


def copy_sparse(source: str, target: str) -> None:
    """Copy a file with its holes."""
    qemu.checked(["cp", "--sparse=always", source, target])


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in a folder."""
    return {path.name: images.sha256(path) for path in sorted(folder.iterdir())}
