"""Runs cases of the hostile set in a process with limits; the tests check its report.

``python -m tests.hostile.run FOLDER REPORT FIRST STEP`` makes and uses every STEP-th
case.  It writes a line of JSON before and after each verb, which shows where a process
died.
"""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import imgcore
from tests.hostile.case import CANARY, Case
from tests.hostile.cases import CASES

MIB = 1 << 20
# Memory that a verb may use beyond the interpreter with its libraries: 256 MiB, the
# buffers and stacks of two workers, and the arenas that malloc reserves for them.
HEADROOM_NBYTES = 448 * MIB
MAX_FILE_NBYTES = 64 * MIB
# A verb that takes longer hangs; the tests have stricter limits.
HANG_SECONDS = 20
N_CHANGES = 20


def put_canaries(outside: Path) -> None:
    """Write files, valid in every format, that no image may reach."""
    outside.mkdir()
    text = (CANARY * 40)[:512] * 16
    raw = outside / "canary.raw"
    raw.write_bytes(text)
    for name in ("qcow2", "vmdk", "vhd", "vhdx", "vdi"):
        imgcore.convert(
            raw, outside / f"canary.{name}", format="raw", target_format=name, sync=False
        )
    (outside / "canary.txt").write_bytes(text)


def limit_resources() -> None:
    """Limit this process's resources, after all modules have been loaded."""
    with open("/proc/self/statm") as file:
        held_nbytes = int(file.read().split()[0]) * resource.getpagesize()
    limit = held_nbytes + HEADROOM_NBYTES
    # AddressSanitizer reserves terabytes of addresses, and has its own limit.
    if "asan" not in os.environ.get("LD_PRELOAD", ""):
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def verbs(image: Path, output: Path, case: Case) -> dict[str, Callable[[], Any]]:
    """Return the verbs for each image, in their order."""
    name = str(image)

    def convert() -> None:
        imgcore.convert(name, output, target_format=case.target, threads=2, sync=False)

    found: dict[str, Callable[[], Any]] = {
        "info": lambda: imgcore.info(name),
        "map": lambda: sum(entry.length for entry in imgcore.map(name)),
        "check": lambda: imgcore.check(name),
        "measure": lambda: imgcore.measure(name, target_format="qcow2"),
    }
    if case.error is not None or case.content is not None:
        found["convert"] = convert
        if image.is_file():
            found["stream"] = lambda: convert_stream(image, output, case)
    return found


def convert_stream(image: Path, output: Path, case: Case) -> None:
    """Convert an image that comes through a pipe, which another thread fills."""
    reading, writing = os.pipe()

    def feed() -> None:
        # The conversion may end before it has read all.
        with suppress(BrokenPipeError), open(writing, "wb", buffering=0) as pipe:
            with image.open("rb") as file:
                shutil.copyfileobj(file, pipe)

    thread = threading.Thread(target=feed)
    thread.start()
    try:
        with open(reading, "rb") as source:
            imgcore.convert(
                Path(f"/proc/self/fd/{source.fileno()}"),
                output,
                format=stated_format(image),
                target_format=case.target,
                threads=2,
                sync=False,
            )
    finally:
        thread.join()


def stated_format(image: Path) -> str | None:
    """Return the format that a suffix states."""
    suffix = image.suffix.removeprefix(".")
    return suffix if suffix in ("qcow2", "vmdk", "vhd", "vhdx", "vdi", "raw") else None


class Log(logging.Handler):
    """Keeps imgcore's log messages."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


LOG = Log()


class HangError(BaseException):
    """A verb took too long."""


def _hang(*_: object) -> None:
    raise HangError


def use(do: Callable[[], Any]) -> dict[str, Any]:
    """Run one verb, and return the outcome."""
    LOG.lines.clear()
    begun, cpu_begun = time.monotonic(), time.process_time()
    answer: dict[str, Any] = {"error": None, "message": "", "filename": None, "result": ""}
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE_NBYTES, resource.RLIM_INFINITY))
    try:
        answer["result"] = repr(do())[:100_000]
    except BaseException as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        answer["error"] = next(name for name in kinds if not name.startswith("_"))
        answer["kinds"] = kinds
        answer["message"] = str(error)
        answer["filename"] = getattr(error, "filename", None) or getattr(error, "path", None)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    answer["log"] = list(LOG.lines)
    answer["seconds"] = time.monotonic() - begun
    answer["cpu_seconds"] = time.process_time() - cpu_begun
    return answer


def run_case(case: Case, folder: Path, report: IO[str]) -> None:
    """Make one image, use it in every way, and report each outcome."""
    own = folder / case.name
    own.mkdir()
    image = case.make(own)
    before = snapshot(own)
    output = folder / "out" / f"{case.name}.{case.target}"
    for verb, do in verbs(image, output, case).items():
        report.write(json.dumps({"case": case.name, "verb": verb}) + "\n")
        report.flush()
        answer = use(do)
        answer |= {"case": case.name, "verb": verb, "unchanged": snapshot(own) == before}
        left = sorted(os.listdir(output.parent))
        answer["left"] = left
        if left:
            content = output.read_bytes() if output.exists() else b""
            answer["is_content"] = content == case.content
            answer["leaks"] = CANARY in content
            for name in left:
                (output.parent / name).unlink()
        report.write(json.dumps(answer) + "\n")
        report.flush()


def rewrite_case(case: Case, folder: Path, report: IO[str]) -> None:
    """Make one image once more, and rewrite it in its own file."""
    own = folder / f"{case.name}-rewritten"
    own.mkdir()
    image = case.make(own)
    before = snapshot(own)
    target = "vmdk" if image.suffix == ".qcow2" else "qcow2"
    path = ""

    def rewrite() -> None:
        nonlocal path
        path = imgcore.rewrite(image, target, name=f"new.{target}", keep_undo=False).path

    report.write(json.dumps({"case": case.name, "verb": "rewrite"}) + "\n")
    report.flush()
    answer = use(rewrite) | {"case": case.name, "verb": "rewrite", "left": []}
    # A new image has its expected content; what fails leaves all as it was.
    answer["unchanged"] = bool(path) or snapshot(own) == before
    if path and case.content is not None:
        output = folder / "out" / f"{case.name}.raw"
        imgcore.convert(path, output, sync=False)
        content = output.read_bytes()
        output.unlink()
        answer["is_content"] = content == case.content
        answer["leaks"] = CANARY in content
    report.write(json.dumps(answer) + "\n")
    report.flush()


def update_case(case: Case, folder: Path, report: IO[str]) -> None:
    """Make one image once more, and write to it in place."""
    own = folder / f"{case.name}-updated"
    own.mkdir()
    image = case.make(own)
    before = snapshot(own)
    changes = Changes(image, case)
    report.write(json.dumps({"case": case.name, "verb": "update"}) + "\n")
    report.flush()
    answer = use(changes.make) | {"case": case.name, "verb": "update", "left": []}
    # What was refused is as it was, and so is every file that is not the image's own.
    after = snapshot(own)
    answer["unchanged"] = changes.without_own(after) == changes.without_own(before)
    answer["is_opened"] = changes.is_opened
    if changes.is_opened:
        # What it may take: a block for each change, and tables.
        allowed = sum(size for _, size, _ in before) + changes.allowed_nbytes
        answer["is_bounded"] = sum(size for _, size, _ in after) <= allowed
        answer["is_content"] = changes.is_content
    report.write(json.dumps(answer) + "\n")
    report.flush()


class Changes:
    """Random changes of an image that may be refused at any moment.

    Attributes
    ----------
    is_opened : bool
        Whether the image could be opened for writing.
    is_content : bool
        Whether all reads returned what was written, and later ones the same.
    allowed_nbytes : int
        By how much its files may grow.
    """

    def __init__(self, image: Path, case: Case) -> None:
        self._image, self._case = image, case
        self._own: frozenset[str] = frozenset()
        self.is_opened = False
        self.is_content = True
        self.allowed_nbytes = 0

    def without_own(self, found: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
        return [entry for entry in found if entry[0] not in self._own]

    def make(self) -> None:
        """Change the image; an error is the first one of any change."""
        chance = random.Random(self._case.name)
        errors: list[Exception] = []
        with imgcore.open(self._image, mode="r+") as image:
            self.is_opened = True
            paths = (self._image, *(source.file.path for source in image.layers[0].sources))
            self._own = frozenset(os.path.basename(os.path.realpath(path)) for path in paths)
            self.allowed_nbytes = 2 * N_CHANGES * max(image.block_size, 65536) + 16 * MIB
            for _ in range(N_CHANGES):
                try:
                    self._change(image, chance)
                except (imgcore.ImgcoreError, OSError) as error:
                    errors.append(error)
        if errors:
            raise errors[0]

    def _change(self, image: imgcore.Image, chance: random.Random) -> None:
        size = image.virtual_size
        nbytes = min(chance.choice((1, 512, 70_000)), size)
        offset = chance.choice((0, size - nbytes, chance.randint(0, size - nbytes)))
        action = chance.choice(("write", "write", "write", "zero", "discard", "flush", "resize"))
        if action == "write":
            data = chance.randbytes(nbytes)
            image.write(offset, data)
            self.is_content &= image.read(offset, nbytes) == data
        elif action == "zero":
            image.zero(offset, nbytes, unmap=chance.random() < 0.5)
            self.is_content &= image.read(offset, nbytes) == bytes(nbytes)
        elif action == "discard":
            image.discard(offset, nbytes)
        elif action == "resize":
            image.resize(max(size + chance.choice((-65536, 512, 1 << 20)), 512), shrink=True)
        else:
            image.flush()


def snapshot(folder: Path) -> list[tuple[str, int, int]]:
    """Return names, sizes and times of the files in an image's folder."""
    found = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        status = entry.stat(follow_symlinks=False)
        found.append((entry.name, status.st_size, status.st_mtime_ns))
    return found


def main(folder: Path, report_path: Path, first: int, step: int) -> None:
    """Run every ``step``-th case from ``first`` on."""
    put_canaries(folder / "outside")
    (folder / "out").mkdir()
    logging.getLogger("imgcore").addHandler(LOG)
    signal.signal(signal.SIGALRM, _hang)
    # Memory for modules that a conversion loads must not count for a case.
    warm = folder / "outside" / "canary.qcow2"
    imgcore.convert(warm, folder / "warm.vmdk", target_format="vmdk", sync=False)
    imgcore.check(warm)
    imgcore.rewrite(folder / "warm.vmdk", "qcow2", keep_undo=False)
    for name in ("raw", "qcow2", "vmdk", "vhd", "vhdx", "vdi"):
        with imgcore.open(folder / "outside" / f"canary.{name}", mode="r+") as image:
            image.write(0, image.read(0, 8192))
    limit_resources()
    with open(report_path, "w") as report:
        for case in CASES[first::step]:
            run_case(case, folder, report)
            rewrite_case(case, folder, report)
            update_case(case, folder, report)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
