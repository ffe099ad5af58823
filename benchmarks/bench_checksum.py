"""Compares checksums and changed areas with other programs, as whole commands.

python -m benchmarks.bench_checksum [--mib 2048] [--rounds 5] [--only WORD] [--require]

The peers of a checksum are `qemu-img convert` to a raw file and `sha256sum` of it, and
`nbdcopy` to a pipe into `sha256sum`; the faster one counts.  `nbdcopy --blkhash`
makes the same digest as imgcore, with which ours is compared; its time is shown.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks import _environment
from benchmarks._harness import CommandFailed, Contender, Series, in_turns, run
from benchmarks.bench_convert import ROOT, ZLIB, work_folder

GIB, MIB, KIB = 1 << 30, 1 << 20, 1 << 10


@dataclass(frozen=True)
class Line:
    """One line: ours against one or more peers, or against a time.

    ``most`` is how many times the best peer's time ours may take, None if nothing is
    required; ``limit_seconds`` what it may take.
    """

    ours: tuple[str, ...]
    peers: dict[str, tuple[str, ...]]
    most: float | None = None
    limit_seconds: float | None = None
    shown: tuple[str, ...] = ()  # peers that are only shown
    target: Path | None = None


class Bench:
    """The images, and the programs."""

    def __init__(self, folder: Path, mebibytes: int, rounds: int) -> None:
        self.folder, self.nbytes, self.rounds = folder, mebibytes * MIB, rounds
        self.imgcore = _environment.find_imgcore()
        self.qemu_img = _environment.find_qemu_img()
        self.peers = Path(self.qemu_img).parent
        self.raw = folder / "source.raw"
        maker = ROOT / "tools" / "make_image.py"
        subprocess.run([sys.executable, maker, self.raw, str(mebibytes)], check=True)

    def jobs(self) -> dict[str, Callable[[], Line]]:
        """Return what makes each line and its images, by the titles."""
        return {
            "raw to raw with --checksum": self.converting,
            "checksum of a compressed QCOW2": lambda: self.hashing(self.compressed()),
            "checksum of a fragmented QCOW2": lambda: self.hashing(self.fragmented()),
            "checksum of a sparse QCOW2": lambda: self.hashing(self.sparse()),
            "checksum of written zeros": self.zeros,
            "checksum of 1 TiB of nothing": self.hole,
            "changes of 100 GiB, raw": lambda: self.changes("raw"),
            "changes of 100 GiB, QCOW2": lambda: self.changes("qcow2"),
        }

    def drop_images(self) -> None:
        """Remove the images of a line, to free memory."""
        for path in self.folder.iterdir():
            if path != self.raw:
                path.unlink()

    def converting(self) -> Line:
        """A copy with a digest against one without."""
        target = self.folder / "out.raw"
        words = (self.imgcore, "convert", "-q", "--no-sync", "--no-reflink", "--force")
        ends = ("-f", "raw", "-O", "raw", str(self.raw), str(target))
        plain = {"without": (*words, *ends)}
        ours = (*words, "--checksum", *ends)
        return Line(ours, plain, 1.25, target=target)

    def compressed(self) -> Path:
        path = self.folder / "compressed.qcow2"
        run((self.qemu_img, "convert", "-f", "raw", *ZLIB.peer_arguments, str(self.raw), str(path)))
        return path

    def fragmented(self) -> Path:
        """Every other cluster first, then the others: neighbours are far apart."""
        path, half = self.folder / "fragmented.qcow2", self.folder / "half.raw"
        flags: tuple[str, ...] = ()
        for first in (0, 64 * KIB):
            with open(self.raw, "rb") as raw, open(half, "wb") as file:
                file.truncate(self.nbytes)
                for offset in range(first, self.nbytes, 128 * KIB):
                    file.seek(offset)
                    file.write(os.pread(raw.fileno(), 64 * KIB, offset))
            words = ("convert", *flags, "-f", "raw", "-O", "qcow2", str(half), str(path))
            run((self.qemu_img, *words))
            flags = ("-n", "--target-is-zero")
        half.unlink()
        return path

    def sparse(self) -> Path:
        """A disk of eight times the size, with the files at the start of each part."""
        path, raw = self.folder / "sparse.qcow2", self.folder / "sparse.raw"
        with open(self.raw, "rb") as source, open(raw, "wb") as file:
            file.truncate(8 * self.nbytes)
            for offset in range(0, self.nbytes, 16 * MIB):
                file.seek(8 * offset)
                file.write(os.pread(source.fileno(), 16 * MIB, offset))
        run((self.qemu_img, "convert", "-f", "raw", "-O", "qcow2", str(raw), str(path)))
        raw.unlink()
        return path

    def hashing(self, path: Path) -> Line:
        """A digest of an image against the ways to get one of its bytes."""
        out, server = self.folder / "out.raw", f"[ {self.peers}/qemu-nbd -r -f qcow2 {path} ]"
        convert = f"{self.qemu_img} convert -f qcow2 -O raw -m 16 -W {path} {out}"
        nbdcopy = str(self.peers / "nbdcopy")
        peers = {
            "convert, sha256sum": shell(f"{convert} && sha256sum {out} && rm {out}"),
            "nbdcopy, sha256sum": shell(f"{nbdcopy} -- {server} - | sha256sum"),
            "nbdcopy --blkhash": shell(f"{nbdcopy} --blkhash -- {server} null:"),
        }
        ours = (self.imgcore, "checksum", "-f", "qcow2", str(path))
        self.verify(ours, peers["nbdcopy --blkhash"])
        return Line(ours, peers, 1 / 3, shown=("nbdcopy --blkhash",))

    def verify(self, ours: Sequence[str], theirs: Sequence[str]) -> None:
        """Fail if the digests differ."""
        digests = [_environment.output(*words).split()[:1] for words in (ours, theirs)]
        if digests[0] != digests[1] or not digests[0]:
            raise CommandFailed(f"the digests are not the same: {digests}")

    def zeros(self) -> Line:
        """Written zeros against a program that reads them once."""
        path = self.folder / "zeros.raw"
        with open(path, "wb") as file:
            for _ in range(self.nbytes // MIB):
                file.write(bytes(MIB))
        ours = (self.imgcore, "checksum", "-f", "raw", str(path))
        peers = {
            "cmp with /dev/zero": shell(f"cmp -n {self.nbytes} {path} /dev/zero"),
            "cat": shell(f"cat {path} | cat >/dev/null"),
        }
        return Line(ours, peers, 1.0)

    def hole(self) -> Line:
        """A disk of 1 TiB without data."""
        path = self.folder / "empty.qcow2"
        run((self.qemu_img, "create", "-q", "-f", "qcow2", str(path), "1T"))
        peers = {"imgcore map": (self.imgcore, "map", "--output=json", "-f", "qcow2", str(path))}
        return Line((self.imgcore, "checksum", str(path)), peers)

    def changes(self, suffix: str) -> Line:
        """Two disks of 100 GiB with 1 GiB of data each, of which a little differs."""
        pair = [self.folder / f"{name}.{suffix}" for name in "ab"]
        for number, path in enumerate(pair):
            raw = path.with_suffix(".raw")
            write_sparse(raw, self.raw, number)
            if suffix != "raw":
                run((self.qemu_img, "convert", "-f", "raw", "-O", suffix, str(raw), str(path)))
                raw.unlink()
        formats = ("-f", suffix, "-F", suffix)
        peer = shell(f"{self.qemu_img} compare {' '.join(formats)} {pair[0]} {pair[1]} || true")
        ours = (self.imgcore, "diff", "--json", *formats, *map(str, pair))
        return Line(
            shell(f"{shlex.join(ours)} || test $? = 1"),
            {"qemu-img compare": peer},
            limit_seconds=2.0,
        )

    def measure(self, title: str, line: Line) -> str:
        """Measure a line in turns, and return its rows."""
        contenders = [Contender("ours", line.ours, line.target)]
        contenders += [Contender(name, words, line.target) for name, words in line.peers.items()]
        warm = self.nbytes if line.target else 0
        series = in_turns(contenders, self.rounds, lambda _: None, warm)
        return show(title, line, series)


def shell(words: str) -> tuple[str, ...]:
    """Return a command of the shell that fails if a part of it does."""
    return ("bash", "-c", f"set -eo pipefail; {words}")


def write_sparse(path: Path, source: Path, number: int) -> None:
    """Write a disk of 100 GiB with 1024 pieces of 1 MiB; ``number`` changes some."""
    n_source = source.stat().st_size // MIB
    with open(source, "rb") as data, open(path, "wb") as file:
        file.truncate(100 * GIB)
        for piece in range(1024):
            content = bytearray(os.pread(data.fileno(), MIB, piece % n_source * MIB))
            if number and piece % 100 == 0:
                content[5000:5010] = b"changed..."
            file.seek(piece * 100 * MIB)
            file.write(content)


def show(title: str, line: Line, series: dict[str, Series]) -> str:
    """Return the rows of a line, one for each peer."""
    ours = series["ours"]
    rows = []
    counted = [name for name in line.peers if name not in line.shown]
    best = min(counted, key=lambda name: series[name].seconds)
    for name in line.peers:
        pairs = list(zip(ours.runs, series[name].runs, strict=True))
        ratios = [a.seconds / b.seconds for a, b in pairs]
        cpu = median(a.cpu_seconds / b.cpu_seconds for a, b in pairs)
        limit, verdict = "", ""
        if line.limit_seconds is not None:
            limit = f"< {line.limit_seconds:.0f} s"
            verdict = "ok" if ours.seconds < line.limit_seconds else "MISSED"
        elif line.most is not None and name == best:
            limit = f"{line.most:.2f}x"
            verdict = "ok" if median(ratios) <= line.most else "MISSED"
        rows.append(
            f"{title:<32} {name:<20} {limit:>6} {median(ratios):>6.2f}x "
            f"{f'{min(ratios):.2f}..{max(ratios):.2f}':>13} {cpu:>6.2f}x {ours.seconds:>7.2f} "
            f"{series[name].seconds:>7.2f} {ours.peak_nbytes >> 20:>5}  {verdict}"
        )
        title = ""
    return "\n".join(rows)


HEADER = (
    f"{'job':<32} {'peer':<20} {'limit':>6} {'ours':>7} {'spread':>13} {'CPU':>7} {'ours s':>7} "
    f"{'peer s':>7} {'MiB':>5}"
)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's choices."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_checksum")
    parser.add_argument("--mib", type=int, default=2048, help="data of the disks")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each command")
    parser.add_argument("--only", default="", help="lines whose title holds this word")
    parser.add_argument("--require", action="store_true", help="exit 1 if a line is missed")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    choice = parse(arguments)
    missed = False
    with work_folder() as folder:
        bench = Bench(folder, choice.mib, choice.rounds)
        print(f"{_environment.cpu_model()}; {choice.mib} MiB of files; no sync\n{HEADER}")
        try:
            for title, make in bench.jobs().items():
                if choice.only in title:
                    rows = bench.measure(title, make())
                    missed = missed or "MISSED" in rows
                    print(rows, flush=True)
                    bench.drop_images()
        except CommandFailed as error:
            print(f"bench_checksum: {error}", file=sys.stderr)
            return 1
    return 1 if missed and choice.require else 0


if __name__ == "__main__":
    sys.exit(main())
