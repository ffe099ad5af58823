"""Power cuts while an image is written in place, and what must be true after each.

A session of random changes is recorded: the writes, zeroings, truncations and syncs of
its files.  A cut makes of them files as the disk may have them.  Then:

- the image opens, and `check` finds leaks at most;
- each sector has what the last completed flush made durable, or what a later change
  made of it;
- writing goes on, and may be cut again.
"""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import imgcore
from tests.faults.crash import Event, Row, read_log
from tests.faults.harness import Agent
from tests.faults.update_history import SECTOR, Change, History, random_changes
from tests.helpers import qemu
from tests.helpers.update_variants import VARIANTS, UpdateVariant

if TYPE_CHECKING:
    from numpy.typing import NDArray

N_CHANGES = 60
N_CHANGES_AFTER = 8
# Another program examines one in so many states.
QEMU_EXAMINES = 12
QEMU_CHECKS = ("qcow2", "vmdk", "vhdx", "vdi")
# What is all zeros in a piece is left out of a file.
_PIECE_NBYTES = 256 * 1024
# No errors, or leaks only.
QEMU_IS_SOUND = (0, 3)
# It wants an exact count of the blocks of a VDI.  One that is too high leaks some: both
# QEMU and VirtualBox put the next block where the count says.
COUNT_OF_VDI = re.compile(r"ERROR: allocated blocks mismatch, is (\d+), should be (\d+)")


def of_format(variant: UpdateVariant) -> list[UpdateVariant]:
    """Return the variants of the same format."""
    name = variant.name.partition("-")[0]
    return [other for other in VARIANTS if other.name.partition("-")[0] == name]


# One variant of each format, with small blocks.
_NAMES = ("raw", "vmdk-sparse", "qcow2", "vhd-dynamic", "vhdx-1M", "vdi-dynamic")
FORMATS = [variant for variant in VARIANTS if variant.name in _NAMES]


def content_of(rng: random.Random, nbytes: int) -> bytes:
    """Return a disk of data and zeros in pieces of odd lengths."""
    pieces = bytearray()
    while len(pieces) < nbytes:
        length = rng.randint(1, 200_000)
        pieces += rng.randbytes(length) if rng.random() < 0.5 else bytes(length)
    return bytes(pieces[:nbytes])


# -- one file --------------------------------------------------------------------------

HOW = ("lost", "kept", "prefix", "torn", "torn", "reordered", "reordered")


class FileOnDisk:
    """The durable content of a file, and the calls since its last sync.

    A sector is on the disk as it was after any one of those calls.  The size is one
    that the file has had since.  Truncations reach the disk in their order.
    """

    def __init__(self, content: bytes) -> None:
        self._durable = content
        self._rows: list[Row] = []

    def add(self, row: Row) -> None:
        """Note a call that has ended."""
        if row.event is Event.SYNC:
            self._durable, self._rows = self.latest(), []
        else:
            self._rows.append(row)

    def latest(self) -> bytes:
        """Return the content that the running system sees."""
        return self._first(len(self._rows))

    def after_cut(self, rng: random.Random, how: str) -> bytes:
        """Return what the disk may have; ``how`` is one of `HOW`."""
        n_rows = len(self._rows)
        if how in ("lost", "kept", "prefix"):
            n_kept = {"lost": 0, "kept": n_rows, "prefix": rng.randint(0, n_rows)}[how]
            return self._first(n_kept)
        sizes = self._sizes()
        shrinks = [at for at in range(n_rows) if sizes[at + 1] < sizes[at]]
        lost_at = rng.choice([*shrinks, n_rows])
        kept_at = max((at + 1 for at in shrinks if at < lost_at), default=0)
        size = sizes[rng.randint(kept_at, lost_at)]
        choose = self._torn if how == "torn" else self._reordered
        return self._content(choose(rng), lost_at, size)

    def _first(self, n_kept: int) -> bytes:
        kept = np.full(self._n_sectors(), n_kept)
        return self._content(kept, n_kept, self._sizes()[n_kept])

    def _torn(self, rng: random.Random) -> NDArray[np.int64]:
        """Tell for each sector, at random, how many calls have reached the disk."""
        numbers = np.random.default_rng(rng.getrandbits(32))
        return numbers.integers(0, len(self._rows) + 1, self._n_sectors())

    def _reordered(self, rng: random.Random) -> NDArray[np.int64]:
        """Lose some calls, with all that followed in their sectors."""
        kept = np.full(self._n_sectors(), len(self._rows))
        share = rng.choice((0.1, 0.3, 0.8))
        for at in reversed(range(len(self._rows))):
            if rng.random() < share:
                kept[self._sectors(self._rows[at])] = at
        return kept

    def _sectors(self, row: Row) -> slice:
        end = None if row.event is Event.TRUNCATE else -(-(row.offset + row.length) // SECTOR)
        return slice(row.offset // SECTOR, end)

    def _n_sectors(self) -> int:
        ends = [row.offset + row.length for row in self._rows]
        return -(-max((len(self._durable), *ends)) // SECTOR)

    def _sizes(self) -> list[int]:
        """Return the size before the first call, and after each."""
        sizes = [len(self._durable)]
        for row in self._rows:
            grown = max(sizes[-1], row.offset + row.length)
            change = {Event.TRUNCATE: row.offset, Event.WRITE: grown}
            sizes.append(change.get(row.event, sizes[-1]))
        return sizes

    def _content(self, kept: NDArray[np.int64], lost_at: int, size: int) -> bytes:
        """Return a content.

        ``kept`` has, for each sector, the number of calls that have reached the disk.
        The truncation ``lost_at``, and those after it, have not.
        """
        sectors = np.zeros((len(kept), SECTOR), np.uint8)
        octets = sectors.reshape(-1)
        octets[: len(self._durable)] = np.frombuffer(self._durable, np.uint8)
        for at, row in enumerate(self._rows):
            part = self._sectors(row)
            if row.event is Event.TRUNCATE:
                if at < lost_at:
                    octets[row.offset :] = 0
                else:
                    kept[-(-row.offset // SECTOR) :] = 0
                continue
            is_kept = kept[part] > at
            changed = sectors[part].copy()
            start = row.offset % SECTOR
            data = np.frombuffer(row.data, np.uint8) if row.data else 0
            changed.reshape(-1)[start : start + row.length] = data
            sectors[part][is_kept] = changed[is_kept]
        return octets[:size].tobytes()


# -- a session -------------------------------------------------------------------------


class Session:
    """A recorded session of changes, which may be cut at any row of its log.

    Parameters
    ----------
    cuts : UpdateCuts
    content : bytes
        The disk before the first change.
    changes : sequence of Change
    job
        Its faults, for the agent.

    Attributes
    ----------
    answer : dict
        How it ended.
    """

    def __init__(
        self, cuts: UpdateCuts, content: bytes, changes: Sequence[Change], **job: Any
    ) -> None:
        self._cuts, self._changes = cuts, changes
        self._before = cuts.files()
        self._content = content
        self.answer, self.rows = cuts.record(changes, **job)
        self._rewind()
        if self.answer["outcome"] != "killed":
            self.advance(len(self.rows))
            latest = {name: file.latest() for name, file in self._files.items()}
            assert latest == cuts.files(), "the log is not complete"
            self._rewind()

    def _rewind(self) -> None:
        self._at = 0
        self.history = History(self._content)
        self._files = {name: FileOnDisk(data) for name, data in self._before.items()}
        self._by_inode = {self._cuts.inode(name): file for name, file in self._files.items()}

    def advance(self, at: int) -> None:
        """Go on to the state after ``at`` rows."""
        for row in self.rows[self._at : at]:
            if row.event is Event.MARK:
                number, has_ended = divmod(row.offset, 2)
                if number == len(self._changes):
                    self.history.settle()
                elif has_ended:
                    self.history.end(self._changes[number])
                else:
                    self.history.begin(self._changes[number])
            else:
                self._by_inode[row.inode].add(row)
        self._at = at

    def moments(self, rng: random.Random, n_cuts: int) -> list[int]:
        """Return places in the log: around syncs, and anywhere."""
        edges = [
            at + side
            for at, row in enumerate(self.rows)
            if row.event is Event.SYNC
            for side in (0, 1)
        ]
        chosen = [rng.choice(edges) for _ in range(n_cuts // 2) if edges]
        chosen += [rng.randint(0, len(self.rows)) for _ in range(n_cuts - len(chosen))]
        return sorted(chosen)

    def cut(self, rng: random.Random) -> History:
        """Make the files what they may be after a cut now; return the history."""
        how = rng.choice(HOW)
        for name, file in self._files.items():
            self._cuts.lay_out(name, file.after_cut(rng, how))
        self.story = f"cut after {self._at} of {len(self.rows)} calls, {how}"
        return self.history


def without_inner_syncs(rows: list[Row]) -> list[Row]:
    """Drop all syncs of each change but the last, which keep the order of its steps."""
    kept: list[Row] = []
    is_followed: set[int] = set()
    for row in reversed(rows):
        if row.event is Event.MARK:
            is_followed.clear()
        elif row.event is Event.SYNC:
            if row.inode in is_followed:
                continue
            is_followed.add(row.inode)
        kept.append(row)
    return kept[::-1]


def without_last_syncs(rows: list[Row]) -> list[Row]:
    """Drop the last sync of each change."""
    kept: list[Row] = []
    is_dropped = False
    for row in reversed(rows):
        if row.event is Event.MARK:
            is_dropped = False
        elif row.event is Event.SYNC and not is_dropped:
            is_dropped = True
            continue
        kept.append(row)
    return kept[::-1]


class UpdatedImage:
    """An image that was written in place, and is examined.

    Parameters
    ----------
    folder : Path
        An empty one, for its files.
    variant : UpdateVariant
    content : bytes
        Its disk.

    Attributes
    ----------
    path : Path
    """

    def __init__(self, folder: Path, variant: UpdateVariant, content: bytes) -> None:
        self._folder, self._variant = folder, variant
        self._format = variant.qemu_format if variant.qemu_format == "raw" else None
        self.path: Path = variant.make(folder, content)

    def examined(self, history: History) -> bytes:
        """Verify that the image is sound, with a disk that may be; return the disk."""
        with imgcore.open(self.path, format=self._format) as image:
            content = image.read(0, image.virtual_size)
        history.check(content)
        if self._format != "raw":
            report = imgcore.check(self.path, format=self._format)
            assert not report.corruptions, report.problems
        return content

    def examine_by_qemu(self, content: bytes) -> None:
        """Verify that qemu-img finds no error in a copy, and reads the same."""
        name = self._variant.qemu_format
        if name is None or qemu.find_program("qemu-img") is None:
            return
        copy = self._folder.with_name("copy")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self._folder, copy)
        path = copy / self.path.name
        if name in QEMU_CHECKS:
            # It replays a log only if it may repair.
            repair = ("-r", "all") if name == "vhdx" else ()
            done = subprocess.run(
                ["qemu-img", "check", "-f", name, *repair, path], capture_output=True, text=True
            )
            counts = COUNT_OF_VDI.fullmatch(done.stderr.strip())
            is_high = counts is not None and int(counts[1]) < int(counts[2])
            told = f"qemu-img: {done.stdout}{done.stderr}"
            assert done.returncode in QEMU_IS_SOUND or is_high, told
        raw = copy / "copied by qemu-img"
        qemu.run("convert", "-f", name, "-O", "raw", path, raw)
        # The disk of a VHD ends with a cylinder there.
        assert raw.read_bytes()[: len(content)] == content, "qemu-img reads something else"


class UpdateCuts:
    """An image that is written in place, cut, examined, and written again.

    Parameters
    ----------
    agent : Agent
        The image's files are in its folder.
    variant : UpdateVariant
    content : bytes
        The disk.
    log : Path
        Where the agent records.
    keep : callable, optional
        Tells which rows of a log stay in it: without some, the disk forgets more.

    Attributes
    ----------
    image : UpdatedImage
    """

    def __init__(
        self,
        agent: Agent,
        variant: UpdateVariant,
        content: bytes,
        log: Path,
        keep: Callable[[list[Row]], list[Row]] = lambda rows: rows,
    ) -> None:
        self._agent, self._variant, self._log, self._keep = agent, variant, log, keep
        self._content = content
        self.image = UpdatedImage(agent.folder, variant, content)
        self._made = self.files()
        self.n_cuts = 0

    # -- the folder --------------------------------------------------------------------

    def files(self) -> dict[str, bytes]:
        """Return all files of the folder."""
        return {entry.name: entry.read_bytes() for entry in self._agent.folder.iterdir()}

    def inode(self, name: str) -> int:
        """Return the number by which the log calls a file."""
        return (self._agent.folder / name).stat().st_ino

    def lay_out(self, name: str, content: bytes) -> None:
        """Give a file another content; it is not replaced."""
        with (self._agent.folder / name).open("wb") as file:
            for at in range(0, len(content), _PIECE_NBYTES):
                piece = content[at : at + _PIECE_NBYTES]
                if piece.count(0) < len(piece):
                    file.seek(at)
                    file.write(piece)
            file.truncate(len(content))

    # -- the sessions ------------------------------------------------------------------

    def record(
        self, changes: Sequence[Change], *, again: bool = False, **job: Any
    ) -> tuple[dict[str, Any], list[Row]]:
        """Change the image in the agent; return how that ended, and the log."""
        arguments = {"path": self.image.path, "changes": changes, "again": again}
        answer = self._agent.do("update", arguments, log=str(self._log), **job)
        assert answer["outcome"] == "ok" or job, answer
        return answer, self._keep(read_log(self._log))

    def reset(self) -> None:
        """Make the image as it was made."""
        for name, data in self._made.items():
            self.lay_out(name, data)

    def run(self, rng: random.Random, n_cuts: int, n_changes: int = N_CHANGES) -> None:
        """Write to the image, and cut that ``n_cuts`` times."""
        self.reset()
        changes = random_changes(rng, n_changes, len(self._content), self._variant.sizes)
        session = Session(self, self._content, changes)
        for at in session.moments(rng, n_cuts):
            session.advance(at)
            self._cut(session, rng, "")

    def _cut(self, session: Session, rng: random.Random, story: str, *, again: bool = True) -> None:
        """Cut a session at its moment, examine the image, and write to it again."""
        history = session.cut(rng)
        story += session.story
        self.n_cuts += 1
        try:
            content = self.image.examined(history)
            if self.n_cuts % QEMU_EXAMINES == 0:
                self.image.examine_by_qemu(content)
            changes = random_changes(rng, N_CHANGES_AFTER, len(content), self._variant.sizes)
            after = Session(self, content, changes)
        except (AssertionError, imgcore.ImgcoreError, OSError) as error:
            raise AssertionError(f"{story}: {type(error).__name__}: {error}") from error
        if again and rng.random() < 0.25:
            after.advance(rng.randint(0, len(after.rows)))
            self._cut(after, rng, f"{story}, then ", again=False)
        else:
            after.advance(len(after.rows))
            self._cut_nothing(after, story)

    def _cut_nothing(self, session: Session, story: str) -> None:
        try:
            self.image.examined(session.history)
        except (AssertionError, imgcore.ImgcoreError, OSError) as error:
            raise AssertionError(f"{story}, written again: {error}") from error
