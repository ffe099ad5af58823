"""Compares conversions by reflinks with qemu-img, as whole commands.

python -m benchmarks.bench_reflink FOLDER [--mib 4096] [--rounds 3] [--only WORD]

FOLDER is on a file system with reflinks (XFS, Btrfs) and needs four times the space.

qemu-img makes reflinks itself from raw to QCOW2 (-C).  This line has a disk of 1 TiB in
which 100 GiB are allocated, all of them reflinks of one piece.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import struct
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import _environment
from benchmarks._harness import CommandFailed, Contender, in_turns, ratio, remove, run
from benchmarks.bench_convert import SUFFIXES

_FICLONERANGE = 0x4020940D
PIECE_NBYTES = 1 << 20
REQUIRED = 10.0
REQUIRED_OF_COPY_RANGE = 2.0


@dataclass(frozen=True)
class Pair:
    """A conversion; with ``offloads`` of the large disk, and qemu-img has ``-C``."""

    source: str
    target: str
    offloads: bool = False

    @property
    def title(self) -> str:
        return f"{self.source} to {self.target}{' against -C' if self.offloads else ''}"


FORMATS = ("raw", "qcow2", "vmdk", "vhdx", "vdi")
PAIRS = (
    *(Pair(a, b) for a in FORMATS for b in FORMATS if a != b),
    Pair("raw", "qcow2", offloads=True),
)


def write_disk(path: Path, nbytes: int) -> None:
    """Write a raw disk of which every second MiB is noise, which is synced."""
    with open(path, "wb") as file:
        file.truncate(2 * nbytes)
        for start in range(0, 2 * nbytes, 2 * PIECE_NBYTES):
            file.seek(start)
            file.write(os.urandom(PIECE_NBYTES))
        os.fsync(file.fileno())


def write_large_disk(path: Path) -> None:
    """Write a raw disk of 1 TiB with 100 GiB in pieces of 32 MiB."""
    piece, step = 32 << 20, 320 << 20
    with open(path, "w+b") as file:
        file.truncate(1 << 40)
        file.write(os.urandom(piece))
        os.fsync(file.fileno())
        for start in range(step, 3200 * step, step):
            fcntl.ioctl(file, _FICLONERANGE, struct.pack("@qQQQ", file.fileno(), 0, piece, start))


class Bench:
    """Sources in a folder, each made when it is needed by imgcore."""

    def __init__(self, folder: Path, mib: int, rounds: int) -> None:
        self.folder, self.rounds = folder, rounds
        self.imgcore = _environment.find_imgcore()
        self.qemu_img = _environment.find_qemu_img()
        self.raw = folder / "disk.raw"
        write_disk(self.raw, mib << 20)

    def source_path(self, name: str) -> Path:
        """Return the name of an image."""
        return self.raw if name == "raw" else self.folder / f"source{SUFFIXES[name]}"

    def source(self, name: str) -> Path:
        """Return an image whose blocks are its own."""
        path = self.source_path(name)
        if not path.exists():
            run((self.imgcore, "convert", "-q", "--no-reflink", str(self.raw), str(path)))
        return path

    def lines(self, only: str) -> Iterator[str]:
        """Measure the pairs and yield lines of the table."""
        for name in FORMATS:
            for pair in PAIRS:
                if pair.source == name and only in pair.title:
                    yield self.line(pair)
            if name != "raw":
                remove(self.source_path(name))

    def line(self, pair: Pair) -> str:
        """Measure a pair in turns."""
        source, suffix = self.source(pair.source), SUFFIXES[pair.target]
        if pair.offloads:
            source = self.folder / "large.raw"
            write_large_disk(source)
        words = ("convert", "-f", pair.source, "-O", pair.target)
        flags = ("-C",) if pair.offloads else ("-m", "16", "-W")
        peer, ours = (self.folder / f"{name}{suffix}" for name in ("peer", "ours"))
        own = ("-q", "--no-sync", "--reflink=always")
        contenders = [
            Contender("peer", (self.qemu_img, *words, *flags, str(source), str(peer)), peer),
            Contender("ours", (self.imgcore, *words, *own, str(source), str(ours)), ours),
        ]
        series = in_turns(contenders, self.rounds, lambda one: self.verify(one, pair))
        speed = ratio(series["peer"], series["ours"])
        required = REQUIRED_OF_COPY_RANGE if pair.offloads else REQUIRED
        return (
            f"{pair.title:<28} {required:>7.1f}x {speed.median:>7.1f}x "
            f"{f'{speed.low:.1f}..{speed.high:.1f}':>13} {series['peer'].seconds:>7.2f} "
            f"{series['ours'].seconds:>7.2f} {series['ours'].peak_nbytes >> 20:>8} "
            f" {'ok' if speed.median >= required else 'MISSED'}"
        )

    def verify(self, contender: Contender, pair: Pair) -> None:
        """Compare our output with the raw disk.

        What the run has left to be written back is written now: the next run would wait
        for it.
        """
        os.sync()
        if contender.name == "ours" and not pair.offloads:
            formats = ("-f", "raw", "-F", pair.target)
            run((self.qemu_img, "compare", *formats, str(self.raw), str(contender.target)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_reflink")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mib", type=int, default=4096, help="data of the disk")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each command")
    parser.add_argument("--only", default="", help="pairs whose title holds this word")
    choice = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="imgcore-bench-", dir=choice.folder) as folder:
        bench = Bench(Path(folder), choice.mib, choice.rounds)
        print(f"{choice.mib} MiB of data; no sync on either side")
        print(
            f"{'job':<28} {'required':>8} {'ours':>8} {'spread':>13} {'peer s':>7} {'ours s':>7} "
            f"{'peak MiB':>8}"
        )
        try:
            for line in bench.lines(choice.only):
                print(line, flush=True)
        except CommandFailed as error:
            print(f"bench_reflink: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
