"""Counts outcomes of the same faults for imgcore and qemu-img (docs/reliability.md).

    python -m tests.faults.figures [imgcore] [qemu-img]

A case is *wrong* if the target is neither the old image nor the complete new one, or if
the command succeeds and the content is not the source's.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.harness import CHANGES, DISK, OLD_DISK, Calls, Mode, cuts, shim_path
from tests.helpers import images, qemu
from tests.helpers.qemu import Variant

VARIANTS = qemu.VARIANTS
N_MOMENTS = 20
_QEMU_NAMES = {"vhd": "vpc"}

Command = Callable[[Path, str, Path, Variant], list[str]]


def qemu_img(source: Path, source_format: str, target: Path, variant: Variant) -> list[str]:
    options = ",".join((*variant.options, *variant.qemu_options))
    words = [qemu.require_qemu_img(), "convert"]
    words += ["-f", _QEMU_NAMES.get(source_format, source_format)]
    words += ["-O", _QEMU_NAMES.get(variant.format, variant.format)]
    words += ["-c"] * variant.compress + (["-o", options] if options else [])
    return [*words, str(source), str(target)]


def imgcore(source: Path, source_format: str, target: Path, variant: Variant) -> list[str]:
    words = [sys.executable, "-m", "imgcore", "convert", "-q", "--force"]
    words += ["-f", source_format, "-O", variant.format]
    for option in (*variant.options, *variant.own_options):
        words += ["-o", option]
    return [*words, *["-c"] * variant.compress, str(source), str(target)]


TOOLS: dict[str, Command] = {"imgcore": imgcore, "qemu-img": qemu_img}


class Bench:
    """A folder with a source, and an old target before each run."""

    def __init__(self, shim: Path, folder: Path, command: Command, variant: Variant) -> None:
        self.shim, self.command, self.variant = shim, command, variant
        self.folder = folder / "target"
        self.folder.mkdir()
        self.source = folder / "source.raw"
        DISK.write(self.source)
        old = folder / "old.raw"
        OLD_DISK.write(old)
        self.target = self.folder / f"disk{variant.suffix}"
        self.old_content = images.sha256(old)
        self.new_content = images.sha256(self.source)
        self._out = folder / "out.raw"
        self._old = self._make(old)
        self.new = self._make(self.source)

    def _make(self, source: Path) -> dict[str, bytes]:
        for entry in self.folder.iterdir():
            entry.unlink()
        qemu.checked(self.command(source, "raw", self.target, self.variant))
        return {entry.name: entry.read_bytes() for entry in self.folder.iterdir()}

    def put(self, files: dict[str, bytes] | None = None) -> None:
        """Restore the old target, or other files, and remove everything else."""
        for entry in self.folder.iterdir():
            entry.unlink()
        for name, data in (self._old if files is None else files).items():
            (self.folder / name).write_bytes(data)

    def run(self, command: list[str], spec: str = "", seconds: float | None = None) -> int:
        """Run a command under the shim, killed after ``seconds``; return its status."""
        environment = {**os.environ, "LD_PRELOAD": str(self.shim), "FAULT_SPEC": spec}
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as job:
            try:
                return job.wait(timeout=60 if seconds is None else seconds)
            except subprocess.TimeoutExpired:
                job.kill()
                return job.wait()

    def write(self, spec: str = "", seconds: float | None = None) -> int:
        return self.run(self.command(self.source, "raw", self.target, self.variant), spec, seconds)

    def content(self) -> str | None:
        """Return the digest of the target's disk; None if it is not a valid image."""
        self._out.unlink(missing_ok=True)
        name = _QEMU_NAMES.get(self.variant.format, self.variant.format)
        words = ["convert", "-f", name, "-O", "raw", str(self.target), str(self._out)]
        done = subprocess.run([qemu.require_qemu_img(), *words], capture_output=True, check=False)
        return images.sha256(self._out) if done.returncode == 0 else None

    def outcome(self, code: int) -> str:
        """Judge the target after a run."""
        if not self.target.exists():
            return "wrong" if code == 0 else "absent"
        content = self.content()
        if content == self.new_content:
            return "new"
        if content == self.old_content and code != 0:
            return "old"
        return "wrong"


def killed(bench: Bench) -> Iterator[str]:
    """Kill at twenty moments, spread over the whole run."""
    rng = random.Random(images.SEED)
    bench.put()
    started = time.monotonic()
    bench.write()
    seconds = time.monotonic() - started
    for _ in range(N_MOMENTS):
        bench.put()
        yield bench.outcome(bench.write(seconds=rng.uniform(0, 1.1 * seconds)))


def killed_at_changes(bench: Bench) -> Iterator[str]:
    """Kill before twenty of the changes that the run makes to its folder."""
    for nth in range(1, N_MOMENTS + 1):
        bench.put()
        yield bench.outcome(
            bench.write(f"{bench.folder}|{int(CHANGES)}|{nth}|0|{int(Mode.KILL_BEFORE)}")
        )


def full(bench: Bench) -> Iterator[str]:
    """Make the n-th write and all later ones find the disk full."""
    for nth in (1, 2, 3, 5, 8):
        bench.put()
        spec = f"{bench.folder}|{int(Calls.WRITE)}|{nth}|{errno.ENOSPC}|{int(Mode.FAIL_ON)}"
        yield bench.outcome(bench.write(spec))


def unreadable(bench: Bench) -> Iterator[str]:
    """Make 4 KiB in the middle of the source unreadable."""
    for at in (0, images.MIB + 4096, images.MIB + 300 * images.KIB):
        bench.put()
        inode = bench.source.stat().st_ino
        folder = bench.source.parent
        yield bench.outcome(bench.write(f"{folder}|0|0|0|0|{inode}|{at}|{at + 4096}"))


def cut(bench: Bench) -> Iterator[str]:
    """Cut the image short and read it: it is rejected, the same, or wrong."""
    if bench.variant is qemu.RAW:
        return
    name = max(bench.new, key=lambda name: len(bench.new[name]))
    out = bench.folder / "out.raw"
    command = bench.command(bench.target, bench.variant.format, out, qemu.RAW)
    for nbytes in cuts(len(bench.new[name]), random.Random(images.SEED))[::2]:
        bench.put({**bench.new, name: bench.new[name][:nbytes]})
        code = bench.run(command)
        if code != 0:
            yield "refused, target left" if out.exists() else "refused"
        else:
            yield "same" if images.sha256(out) == bench.new_content else "wrong"


CASES = {
    "killed at a moment of the clock": killed,
    "killed at a change": killed_at_changes,
    "disk full at the n-th write": full,
    "4 KiB of the source unreadable": unreadable,
    "source cut short": cut,
}


@contextmanager
def scratch() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="imgcore-faults-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def main() -> None:
    with scratch() as folder:
        shim = shim_path(folder)
        counts: dict[tuple[str, str], Counter[str]] = {}
        for tool, command in ((tool, TOOLS[tool]) for tool in sys.argv[1:] or TOOLS):
            for variant in VARIANTS:
                with scratch() as place:
                    bench = Bench(shim, place, command, variant)
                    for case, play in CASES.items():
                        counts.setdefault((case, tool), Counter()).update(play(bench))
    for (case, tool), counter in sorted(counts.items()):
        total = sum(counter.values())
        words = ", ".join(f"{name} {n}" for name, n in sorted(counter.items()))
        print(f"| {case} | {tool} | {total} | {counter['wrong']} | {words} |")


if __name__ == "__main__":
    main()
