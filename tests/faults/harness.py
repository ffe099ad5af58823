"""The shim, the agent under it, and the disks and formats for every fault."""

from __future__ import annotations

import ctypes
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import IntEnum, IntFlag
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import images, qemu
from tests.helpers.qemu import Variant

_HERE = Path(__file__).parent


class Calls(IntFlag):
    """Classes of calls (``enum fault_class``)."""

    READ = 1
    WRITE = 2
    SYNC = 4
    RENAME = 8
    ALLOCATE = 16
    TRUNCATE = 32
    CREATE = 64
    CLOSE = 128
    UNLINK = 256
    COPY = 512
    REFLINK = 1024
    ATTRIBUTE = 2048
    STATUS = 4096
    OPEN = 8192


CHANGES = (
    Calls.WRITE
    | Calls.SYNC
    | Calls.RENAME
    | Calls.ALLOCATE
    | Calls.TRUNCATE
    | Calls.CREATE
    | Calls.CLOSE
    | Calls.UNLINK
    | Calls.COPY
    | Calls.REFLINK
)


class Mode(IntEnum):
    """How the chosen call fails (``enum fault_mode``)."""

    FAIL_ONCE = 0
    FAIL_ON = 1
    KILL_BEFORE = 2
    KILL_HALFWAY = 3


VMDK_VMFS = Variant("vmdk-vmfs", "vmdk", ("subformat=vmfs",), False, ("cid=1a2b3c4d",))
RAW_PREALLOCATED = Variant("raw-falloc", "raw", ("preallocation=falloc",))

# Every format that is written, and every kind of target.
VARIANTS = (*qemu.VARIANTS, VMDK_VMFS, RAW_PREALLOCATED)

# One for each way of writing: identity, tables, compressed stream, two files,
# prefixes, a log.
_ORDINARY = (
    qemu.RAW,
    qemu.QCOW2_ZLIB,
    qemu.VMDK_STREAM,
    qemu.VMDK_FLAT,
    qemu.VHD_DYNAMIC,
    qemu.VHDX_DYNAMIC,
)


def params(variants: Sequence[Variant] = VARIANTS) -> list[Any]:
    """Return the formats as parameters; `make faults` also runs similar ones."""
    return [
        pytest.param(v, id=v.name, marks=() if v in _ORDINARY else pytest.mark.slow)
        for v in variants
    ]


DISK = images.RawImage(
    "faults",
    3 * images.MIB,
    lambda: [
        (0, images.text(300 * images.KIB)),
        (images.MIB, images.noise(700 * images.KIB)),
        (3 * images.MIB - 4096, images.noise(4096)),
    ],
)
OLD_DISK = images.RawImage("old", images.MIB, lambda: [(4096, images.text(200 * images.KIB, 7))])

N_CUTS = 40


def cuts(nbytes: int, rng: random.Random) -> list[int]:
    """Return sizes to cut to: edges of structures, and random ones."""
    fixed = [0, 1, 511, 512, 1024, 4096, 65536, nbytes - 1, nbytes - 512, nbytes - 65536]
    sizes = {size for size in fixed if 0 <= size < nbytes}
    while len(sizes) < min(N_CUTS, nbytes):
        unit = rng.choice((1, 512, 4096, 65536))
        sizes.add(rng.randrange(nbytes) // unit * unit)
    return sorted(sizes)


@cache
def shim_path(folder: Path) -> Path:
    """Compile the shim, or skip if that is not possible."""
    if os.environ.get("LD_PRELOAD"):
        pytest.skip("something is preloaded already (a sanitizer?), the fault shim cannot be")
    out = folder / "shim.so"
    compiler = os.environ.get("CC", "cc")
    command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(out), str(_HERE / "shim.c"), "-ldl"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip(f"no C compiler ({compiler}) for the fault shim")
    if done.returncode != 0:
        pytest.skip(f"the fault shim does not compile here: {done.stderr.splitlines()[:1]}")
    try:
        ctypes.CDLL(str(out))
    except OSError as error:  # compiled for another machine than this interpreter's
        pytest.skip(f"the fault shim does not load here: {error}")
    return out


class Agent:
    """A process under the shim that keeps running; faults happen in ``folder`` only.

    ``more`` is added to its environment.
    """

    def __init__(self, shim: Path, folder: Path, **more: str) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        environment = {
            **os.environ,
            "LD_PRELOAD": str(shim),
            "FAULT_SHIM": str(shim),
            "PYTHONDONTWRITEBYTECODE": "1",
            **more,
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.agent", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=_HERE.parent.parent,
        )

    def do(self, action: str, arguments: Mapping[str, Any], **job: Any) -> dict[str, Any]:
        """Run a job in the agent; ``job`` has its faults."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        named = {key: str(v) if isinstance(v, Path) else v for key, v in arguments.items()}
        stdin.write(json.dumps({"do": action, "with": named, **job}, default=str) + "\n")
        stdin.flush()
        line = stdout.readline()
        assert line, f"the agent died over {action} {named} {job}"
        answer: dict[str, Any] = json.loads(line)
        assert answer["outcome"] != "bug", (action, named, job, answer)
        # The interpreter may lose a descriptor between the system call and its owner.
        if "of_python" not in job:
            assert answer.get("descriptors", 0) == 0, (action, named, job, answer)
        return answer

    def convert(
        self, source: Path, target: Path, variant: Variant, *, more: Any = None, **job: Any
    ) -> dict[str, Any]:
        """Convert, and replace the target."""
        arguments = {
            "source": source,
            "target": target,
            "format": None if source.suffix != ".raw" else "raw",
            "target_format": variant.format,
            "options": [*variant.options, *variant.own_options],
            "compress": variant.compress,
            "threads": 2,
            "force": True,
            **(more or {}),
        }
        return self.do("convert", arguments, **job)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        assert self._process.stdout is not None
        self._process.stdout.close()


@contextmanager
def agent_in(shim: Path, folder: Path, **more: str) -> Iterator[Agent]:
    """Run an agent while the block runs."""
    agent = Agent(shim, folder, **more)
    try:
        yield agent
    finally:
        agent.close()


class Place:
    """A folder in which a target is repeatedly written over an older one.

    The promises allow three states: the name is absent, or it is the old image, or the
    complete new one.
    """

    def __init__(self, agent: Agent, variant: Variant, folder: Path) -> None:
        self.agent = agent
        self.variant = variant
        self.source = folder / "source.raw"
        self._spare = folder / "spare"
        self._spare.mkdir()
        DISK.write(self.source)
        old = folder / "old.raw"
        OLD_DISK.write(old)
        self.target = agent.folder / f"disk{variant.suffix}"
        self.old = self._make(old)
        self.new = self._make(self.source)
        assert self.old != self.new

    def _make(self, source: Path) -> dict[str, bytes]:
        """Return the target's files as an undisturbed conversion writes them."""
        answer = self.agent.convert(source, self.target, self.variant)
        assert answer["outcome"] == "ok", answer
        return self.files()

    def files(self) -> dict[str, bytes]:
        """Return all files in the folder, temporaries included."""
        return {entry.name: entry.read_bytes() for entry in self.agent.folder.iterdir()}

    def reset(self, files: Mapping[str, bytes] | None = None) -> None:
        """Restore the old image, or other files, and remove everything else."""
        wanted = self.old if files is None else files
        for entry in self.agent.folder.iterdir():
            entry.unlink()
        for name, data in wanted.items():
            (self.agent.folder / name).write_bytes(data)

    def convert(self, **job: Any) -> dict[str, Any]:
        """Write the new image over the target."""
        return self.agent.convert(self.source, self.target, self.variant, **job)

    def state(self, files: Mapping[str, bytes]) -> str:
        """Return "old", "new" or "absent"; fails if it is anything else."""
        return state_of(files, self.old, self.new, self.target.name)


class Source:
    """An image in the agent's folder that is read with faults."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.image = place.target
        self.data = max(place.new, key=lambda name: len(place.new[name]))
        self.out = place.agent.folder.parent / "out.raw"
        self.content = place.source.read_bytes()

    def read(self, *, more: Any = None, **job: Any) -> dict[str, Any]:
        arguments = {"format": self.place.variant.format, "sync": False, **(more or {})}
        return self.place.agent.convert(self.image, self.out, qemu.RAW, more=arguments, **job)

    def bad(self, start: int, end: int) -> tuple[int, int, int]:
        """Return the job's fault for a range of the data file that cannot be read."""
        return ((self.image.parent / self.data).stat().st_ino, start, end)

    def find(self, guest_offset: int) -> int:
        """Return the offset of a piece of the disk in the data file."""
        needle = self.content[guest_offset : guest_offset + 512]
        at: int = (self.image.parent / self.data).read_bytes().find(needle)
        return at


def state_of(
    files: Mapping[str, bytes], old: Mapping[str, bytes], new: Mapping[str, bytes], main: str
) -> str:
    """Return the state of the target's names: "old", "new" or "absent"."""
    if main not in files:
        return "absent"
    seen = {name: data for name, data in files.items() if name in old or name in new}
    if seen == dict(old):
        return "old"
    if seen == dict(new):
        return "new"
    sizes = {name: len(data) for name, data in files.items()}
    raise AssertionError(f"neither the old nor the new image: {sizes}")
