"""Conversions that go on: on block devices and full disks, after Ctrl-C, from journals
that are damaged or forged.
"""

from __future__ import annotations

import errno
import json
import random
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import imgcore
from imgcore._core import crc32c
from imgcore.disk import area_journal, batch_pieces, checkpoints, resuming
from imgcore.streams import zstd
from imgcore.streams.helpers import Helpers
from tests.faults.harness import Agent
from tests.faults.resumed import DISK, KINDS, Kind, parent_of
from tests.helpers import images
from tests.helpers.mounts import leave_free, loop_device, make_file_system, mounted

KIB, MIB = images.KIB, images.MIB
OF_NAME = {kind.name: kind for kind in KINDS}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.raw"
    DISK.write(path)
    return path


@pytest.fixture
def frequent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a checkpoint at the end of each batch, which has little data."""
    for name in ("_MIN_NBYTES", "_MAX_NBYTES"):
        monkeypatch.setattr(batch_pieces, name, 512 * KIB)
    monkeypatch.setattr(area_journal, "_BATCH_NBYTES", 512 * KIB)
    monkeypatch.setattr(zstd, "Helpers", lambda _, name: Helpers(0, name))
    monkeypatch.setattr(zstd, "_JOB_NBYTES", MIB)
    monkeypatch.setattr(checkpoints, "_DUE_NBYTES", 0)
    monkeypatch.setattr(checkpoints, "started", lambda _: False)
    monkeypatch.setattr(resuming, "_new_seed", lambda: bytes(32))


# -- block devices ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["raw", "qcow2-zlib", "vhdx-dynamic", "vmdk-streamOptimized"])
def test_killed_on_a_block_device(name: str, agent: Agent, source: Path, tmp_path: Path) -> None:
    """Also what it had before is the same then, where the image does not reach."""
    disk, journal = tmp_path / "device.img", agent.folder / "journal"
    old = images.noise(64 * MIB, 9)
    disk.write_bytes(old)
    with loop_device(disk) as device:

        def run(**job: Any) -> dict[str, Any]:
            arguments = {
                "source": source,
                "target": device,
                "in_place": True,
                "journal": journal,
                "format": "raw",
                "threads": 2,
                "batch_nbytes": 512 * KIB,
                "seed": "other" if journal.exists() else "first",
                **OF_NAME[name].arguments,
            }
            return agent.do("resume", arguments, **job)

        def content() -> bytes:
            return Path(device).read_bytes()

        answer = run()
        assert answer["outcome"] == "ok", answer
        whole = content()
        rng, n_kept = random.Random(images.SEED), 0
        for _ in range(6):
            Path(device).write_bytes(old)
            for _ in range(rng.randint(1, 3)):
                run(fork=True, kill_after=rng.uniform(0, 0.3))
            n_kept += sum(job.kept_nbytes > 0 for job in imgcore.jobs(journal.parent))
            answer = run()
            assert answer["outcome"] == "ok", answer
            assert content() == whole
            assert not journal.exists()


# -- full disks ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [OF_NAME[name] for name in (
    "raw", "qcow2-zlib", "raw-zst", "gce", "qcow2-front-zlib", "vhd-child"
)], ids=lambda kind: kind.name)  # fmt: skip
@pytest.mark.usefixtures("frequent")
def test_a_full_disk(kind: Kind, source: Path, tmp_path: Path) -> None:
    """It goes on as soon as there is room, and keeps what there was room for."""
    more = arguments_of(kind, source)
    whole = tmp_path / kind.target
    imgcore.convert(source, whole, resume=True, **more)
    need = whole.stat().st_blocks * 512
    image = make_file_system("ext4", tmp_path / "ext4.img", 24 * MIB)
    with mounted(image, tmp_path / "small", "-o", "loop") as folder:
        target = folder / kind.target
        for share in (0.0, 0.3, 0.6, 0.9):
            leave_free(folder, int(need * share) - used_nbytes(folder))
            with pytest.raises(OSError, match="No space left") as caught:
                imgcore.convert(source, target, resume=True, **more)
            assert caught.value.errno == errno.ENOSPC
            assert not target.exists()
        (job,) = imgcore.jobs(folder)
        assert job.kept_nbytes > 0 or kind.name.endswith("child")
        leave_free(folder, 2 * need + MIB)
        imgcore.convert(source, target, resume=True, **more)
        assert target.read_bytes() == whole.read_bytes()
        assert {entry.name for entry in folder.iterdir()} <= {target.name, "ballast", "lost+found"}


def used_nbytes(folder: Path) -> int:
    return sum(entry.stat().st_blocks * 512 for entry in folder.glob(".disk*partial"))


def arguments_of(kind: Kind, source: Path) -> dict[str, Any]:
    more = {"format": "raw", "threads": 2, **kind.arguments}
    if "backing" in more:
        more["backing"] = parent_of(source, more["backing_format"])
    return more


# -- Ctrl-C ----------------------------------------------------------------------------

# The command, stopped in the middle of its work until it gets a line.
COMMAND = """
import os, sys

from imgcore.disk import batch_pieces, checkpoints
from imgcore.engine.progress import Tally

batch_pieces._MIN_NBYTES = batch_pieces._MAX_NBYTES = 512 << 10
checkpoints._DUE_NBYTES = 0
checkpoints.started = lambda _: False
count, is_stopped = Tally.count, False

def stopping(tally, done, **more):
    global is_stopped
    if done > 6 << 20 and not is_stopped:
        is_stopped = True
        os.write(1, b"stopped\\n")
        sys.stdin.readline()
    return count(tally, done, **more)

Tally.count = stopping
from imgcore.__main__ import run
run()
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("target", ["disk.qcow2", "disk.raw", "disk.raw.gz"])
def test_ctrl_c(name: str, target: str, source: Path, tmp_path: Path) -> None:
    """What is done is kept only if that was asked for."""
    folder = tmp_path / "out"
    folder.mkdir()
    number = getattr(signal, name)
    for words, is_kept in (((), False), (("--resume",), True)):
        command = [sys.executable, "-c", COMMAND, "convert", *words, "-m", "1", str(source)]
        with subprocess.Popen(
            [*command, str(folder / target)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as job:
            assert job.stdout is not None
            assert job.stdout.readline() == "stopped\n"
            job.send_signal(number)
            _, errors = job.communicate(timeout=60)
        assert job.returncode == 128 + number
        kept = f".{target}.imgcore-partial", f"{target}.imgcore-resume"
        names = sorted(entry.name for entry in folder.iterdir())
        assert names == (list(kept) if is_kept else [])
        lines = errors.splitlines()
        assert lines[-1] == f"imgcore: ended by {name}"
        assert len(lines) == 1 + is_kept
    imgcore.convert(source, folder / target, resume=True, threads=2)
    imgcore.convert(source, folder / f"whole.{target}")
    assert (folder / target).read_bytes() == (folder / f"whole.{target}").read_bytes()


# -- damaged and forged journals -------------------------------------------------------

SMALL = images.RawImage(
    "journals",
    6 * MIB,
    lambda: [(0, images.text(3 * MIB)), (4 * MIB, images.text(MIB, 4))],
)
JOURNALED = ("qcow2", "qcow2-zlib", "raw-zst", "raw-gz", "gce", "vhd-child")


class Broken:
    """A conversion that has ended early, and the target that it was to make."""

    def __init__(self, kind: Kind, tmp_path: Path, checksum: str | None = None) -> None:
        self.source, self.folder = tmp_path / "small.raw", tmp_path / "out"
        SMALL.write(self.source)
        self.folder.mkdir()
        self.target = self.folder / kind.target
        self._more = {**arguments_of(kind, self.source), "threads": 1, "checksum": checksum}
        self.run()
        self.whole = self.target.read_bytes()
        self.target.unlink()

        def fail(progress: imgcore.Progress) -> None:
            if progress.done >= 5 * MIB:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            self.run(progress=fail)
        self._files = {entry: entry.read_bytes() for entry in self.folder.iterdir()}
        self.path = self.target.with_name(f"{kind.target}.imgcore-resume")
        self.journal = self._files[self.path].rstrip(b"\0")

    def run(self, **more: Any) -> None:
        imgcore.convert(self.source, self.target, resume=True, **self._more, **more)

    def goes_on(self, journal: bytes, *, to_the_same: bool = True) -> bool:
        """Tell whether it goes on with another journal, to the same target then."""
        for entry in self.folder.iterdir():
            entry.unlink()
        for path, content in self._files.items():
            path.write_bytes(journal if path == self.path else content)
        try:
            self.run()
        except (imgcore.ImgcoreError, OSError) as error:
            assert "\n" not in str(error)
            assert not self.target.exists()
            return False
        assert not to_the_same or self.target.read_bytes() == self.whole
        return True


@pytest.fixture(params=JOURNALED)
def broken(request: pytest.FixtureRequest, tmp_path: Path, frequent: None) -> Broken:
    return Broken(OF_NAME[request.param], tmp_path)


@pytest.fixture(params=JOURNALED)
def digested(request: pytest.FixtureRequest, tmp_path: Path, frequent: None) -> Broken:
    return Broken(OF_NAME[request.param], tmp_path, "sha256")


def flip(broken: Broken, offsets: range) -> set[bool]:
    outcomes = set()
    for offset in offsets:
        journal = bytearray(broken.journal)
        journal[offset] ^= 1 << offset % 8
        outcomes.add(broken.goes_on(bytes(journal)))
    return outcomes


def test_flipped_bytes(broken: Broken) -> None:
    n = len(broken.journal)
    assert flip(broken, range(0, n, max(n // 40, 1))) == {True, False}


@pytest.mark.slow
def test_every_flipped_byte(broken: Broken) -> None:
    assert flip(broken, range(len(broken.journal))) == {True, False}


@pytest.mark.slow
def test_every_length(broken: Broken) -> None:
    assert {broken.goes_on(broken.journal[:n]) for n in range(0, len(broken.journal), 7)} == {
        True,
        False,
    }


WRONG: tuple[Any, ...] = (None, -1, 0, 1 << 40, 1 << 70, 1.5, "", "no", [], {}, [[1]], True)


def records(journal: bytes) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yield head and bytes of each record."""
    at = journal.index(b"\n") + 1 + 16
    while at < len(journal):
        nbytes, _ = struct.unpack_from("<II", journal, at)
        body = journal[at + 8 : at + 8 + nbytes].ljust(nbytes, b"\0")
        end = 4 + struct.unpack_from("<I", body)[0]
        yield json.loads(body[4:end]), body[end:]
        at += 8 + nbytes


def forged(journal: bytes, rows: list[tuple[Any, bytes]]) -> bytes:
    """Return a journal of other records, with the right checksums."""
    start = journal.index(b"\n") + 1 + 16
    parts, salt = [journal[:start]], crc32c(journal[start - 16 : start])
    for head, blob in rows:
        text = json.dumps(head).encode()
        body = struct.pack("<I", len(text)) + text + blob
        parts += [struct.pack("<II", len(body), crc32c(body, salt)), body]
    return b"".join(parts)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of all parts of a head."""
    yield path
    if isinstance(value, dict | list):
        keys = value.keys() if isinstance(value, dict) else range(len(value))
        for key in keys:
            yield from places(value[key], (*path, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


def test_forged_records(digested: Broken) -> None:
    """Whatever a record with the right checksum says, at most it is not believed.

    It may lie about the target, but it leads to no traceback.
    """
    rows = list(records(digested.journal))
    assert forged(digested.journal, rows).rstrip(b"\0") == digested.journal
    assert len(rows) > 2
    rng = random.Random(images.SEED)
    cases = [
        (number, path, wrong)
        for number in (0, 1, len(rows) - 1)
        for path in places(rows[number][0])
        for wrong in WRONG
    ]
    for number, path, wrong in rng.sample(cases, 120):
        changed = list(rows)
        changed[number] = (replaced(rows[number][0], path, wrong), rows[number][1])
        try:
            digested.goes_on(forged(digested.journal, changed), to_the_same=False)
        except AssertionError:
            raise
        except Exception as error:
            raise AssertionError(f"{number} {path} {wrong!r}: {error!r}") from error
