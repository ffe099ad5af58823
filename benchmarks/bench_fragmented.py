"""Reads fragmented images from a slow disk, as whole commands, in turns with qemu-img.

python -m benchmarks.bench_fragmented [--mib 256] [--rounds 3] [--only WORD]

Needs root, FUSE and loop devices.  Everything is in memory, three times --mib; the slow
disk is a model (``_slow_disk``).  Before each run its cache is dropped.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import _environment
from benchmarks._harness import CommandFailed, Series, ratio, remove, run
from benchmarks._slow_disk import MODELS, NoSlowDiskError, SlowDisk

CLUSTER_NBYTES = 65536


class Layout(NamedTuple):
    """An image by the order in which its clusters were written."""

    name: str
    order: str
    cluster_nbytes: int = CLUSTER_NBYTES
    is_compressed: bool = False


LAYOUTS = (
    Layout("in order", "sequential"),
    Layout("backwards", "backwards"),
    Layout("two streams", "interleaved"),
    Layout("shuffled", "shuffled"),
    Layout("shuffled, 1 MiB clusters", "shuffled", 1 << 20),
    Layout("shuffled, zlib", "shuffled", is_compressed=True),
)
VERBS = ("convert", "compare")


def order_of(layout: Layout, n_clusters: int) -> list[int]:
    """Return the numbers of the clusters, as they follow in the file."""
    numbers = list(range(n_clusters))
    if layout.order == "backwards":
        numbers.reverse()
    elif layout.order == "interleaved":
        numbers = numbers[::2] + numbers[1::2]
    elif layout.order == "shuffled":
        random.Random(1).shuffle(numbers)
    return numbers


class Bench:
    """Images in a file system of their own, which is served slowly."""

    def __init__(self, folder: Path, mib: int, rounds: int) -> None:
        self.folder, self.nbytes, self.rounds = folder, mib << 20, rounds
        self.imgcore = _environment.find_imgcore()
        self.qemu_img = _environment.find_qemu_img()
        self.target = folder / "target.raw"

    def lines(self, only: str) -> Iterator[str]:
        """Measure every layout on every disk; yield the lines of the table."""
        for layout in LAYOUTS:
            titles = {(m, v): f"{v}, {m}, {layout.name}" for m in MODELS for v in VERBS}
            wanted = {pair: title for pair, title in titles.items() if only in title}
            if not wanted:
                continue
            store = self._store(layout)
            for model in MODELS:
                with SlowDisk(store, self.folder / "served", model) as disk:
                    for verb in VERBS:
                        if (model, verb) in wanted:
                            yield self._line(disk, verb, wanted[model, verb])
            store.unlink()

    def _store(self, layout: Layout) -> Path:
        """Make a file system with two images of one layout and content."""
        images = self.folder / "images"
        images.mkdir()
        image = images / "a.qcow2"
        options = f"cluster_size={layout.cluster_nbytes}"
        create = (self.qemu_img, "create", "-q", "-f", "qcow2", "-o", options)
        run((*create, str(image), str(self.nbytes)))
        pattern = self.folder / "pattern"
        pattern.write_bytes(
            os.urandom(layout.cluster_nbytes // 2) + bytes(layout.cluster_nbytes // 2)
        )
        write = f"write -q {'-c ' if layout.is_compressed else ''}-s {pattern}"
        script = self.folder / "script"
        with script.open("w") as file:
            for number in order_of(layout, self.nbytes // layout.cluster_nbytes):
                at = number * layout.cluster_nbytes
                file.write(f"{write} {at} {layout.cluster_nbytes}\n")
        # Its commands are many more than an argument list may hold.
        qemu_io = str(Path(self.qemu_img).with_name("qemu-io"))
        run(("sh", "-c", f'exec "$0" -f qcow2 "$1" <"{script}"', qemu_io, str(image)))
        shutil.copyfile(image, images / "b.qcow2")
        store = self.folder / "store"
        nbytes = 3 * image.stat().st_size + (64 << 20)
        make = ("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", str(images), str(store))
        run((*make, f"{nbytes >> 10}k"))
        shutil.rmtree(images)
        return store

    def _line(self, disk: SlowDisk, verb: str, title: str) -> str:
        series = {"peer": Series(), "ours": Series()}
        for _ in range(self.rounds):
            for name, taken in series.items():
                with disk.mounted(self.folder / "mounted") as folder:
                    a, b = str(folder / "a.qcow2"), str(folder / "b.qcow2")
                    taken.runs.append(run(self._command(name, verb, a, b)))
                    if verb == "convert" and name == "ours":
                        run((self.qemu_img, "compare", "-q", str(self.target), a))
                remove(self.target)
        speed = ratio(series["peer"], series["ours"])
        return (
            f"{title:<44} {speed.median:>6.1f}x {f'{speed.low:.1f}..{speed.high:.1f}':>13} "
            f"{series['peer'].seconds:>7.2f} {series['ours'].seconds:>7.2f}"
        )

    def _command(self, name: str, verb: str, a: str, b: str) -> tuple[str, ...]:
        program = self.qemu_img if name == "peer" else self.imgcore
        if verb == "compare":
            return (program, "compare", "-q", a, b)
        flags = ("-m", "16", "-W") if name == "peer" else ("-q", "--no-sync")
        return (program, "convert", *flags, "-O", "raw", a, str(self.target))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_fragmented")
    parser.add_argument("--mib", type=int, default=256, help="data of an image")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each command")
    parser.add_argument("--only", default="", help="lines whose title holds this word")
    choice = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="imgcore-bench-", dir="/dev/shm") as folder:
        bench = Bench(Path(folder), choice.mib, choice.rounds)
        print(f"{choice.mib} MiB of data; nothing cached; no sync on either side")
        print(f"{'job':<44} {'ours':>7} {'spread':>13} {'peer s':>7} {'ours s':>7}")
        try:
            for line in bench.lines(choice.only):
                print(line, flush=True)
        except NoSlowDiskError as error:
            print(f"skipped: {error}")
        except CommandFailed as error:
            print(f"bench_fragmented: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
