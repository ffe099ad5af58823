"""A verb that changes a chain in place is cut at any moment: nothing is lost."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import imgcore
from tests.faults.chain_calls import CALLS, Images
from tests.faults.crash import Event, Row, random_names, read_log
from tests.faults.harness import Agent
from tests.faults.update_cuts import HOW, FileOnDisk
from tests.helpers import images
from tests.helpers.chains import FORMATS, MIB, chain, child, content_of, disks

DISK_NBYTES = 3 * MIB
N_FEW_CUTS = 8
N_CUTS = 100
MARK = ".imgcore-commit"
# What changes a file, not a name.
CONTENT = (Event.WRITE, Event.ZERO, Event.TRUNCATE, Event.SYNC)


def lay_out(path: Path, content: bytes) -> None:
    """Give a file a content: what was never written is a hole."""
    with path.open("wb") as file:
        file.truncate(len(content))
        for at in range(0, len(content), 4096):
            piece = content[at : at + 4096]
            if piece.strip(b"\0"):
                file.seek(at)
                file.write(piece)


class Cuts:
    """A recorded call, which may be cut at any row of its log."""

    def __init__(self, agent: Agent, verb: str, made: Images, log: Path) -> None:
        self._folder, self._verb, self._made = agent.folder, verb, made
        self._names = {path.name: path.stat().st_ino for path in self._folder.iterdir()}
        self._before = {name: (self._folder / name).read_bytes() for name in self._names}
        self._call = CALLS[verb](made)
        answer = agent.do("chain", {"verb": verb, **self._call}, log=str(log))
        assert answer["outcome"] == "ok", answer
        self.rows: list[Row] = [row for row in read_log(log) if row.event is not Event.MARK]

    def cut(self, at: int, rng: random.Random) -> None:
        """Make the folder what it may be after ``at`` rows, and call again."""
        rows, how = self.rows[:at], rng.choice(HOW)
        story = f"cut after {at} of {len(self.rows)} calls, {how}"
        files = {inode: FileOnDisk(self._before[name]) for name, inode in self._names.items()}
        for row in rows:
            if row.event in CONTENT and not row.is_folder:
                files.setdefault(row.inode, FileOnDisk(b"")).add(row)
        names = random_names(self._names, rows, rng)
        for path in self._folder.iterdir():
            if path.name not in names:
                path.unlink()
        for name, inode in names.items():
            # An image keeps its inode, which a mark may state.
            file = files.get(inode)
            lay_out(self._folder / name, b"" if file is None else file.after_cut(rng, how))
        try:
            self._verify()
        except Exception as error:
            raise AssertionError(f"{story}: {error}") from error

    def _verify(self) -> None:
        made, verb = self._made, self._verb
        if verb == "sync":
            content_of(made.base)
        else:
            self._read_top()
        keywords = dict(self._call)
        getattr(imgcore, verb)(keywords.pop("image"), **keywords)
        for path in (made.base, made.top):
            if path.suffix != ".raw" and not (verb == "sync" and path == made.top):
                assert not imgcore.check(path).corruptions
        if verb == "sync":
            assert content_of(made.base) == content_of(made.other)
            return
        assert content_of(made.top) == made.content
        if verb == "commit":
            assert content_of(made.base) == made.content
        assert not [path.name for path in self._folder.iterdir() if path.name.endswith(MARK)]

    def _read_top(self) -> None:
        """The disk is whole, or a commit has to mend the link first."""
        try:
            assert content_of(self._made.top) == self._made.content
        except imgcore.CorruptImageError as error:
            assert self._verb == "commit"
            assert "was written to since" in str(error)
            assert (self._folder / f"{self._made.top.name}{MARK}").exists()


def cut(agent: Agent, verb: str, name: str, log: Path, seed: int, n_cuts: int) -> None:
    rng = random.Random(f"{images.SEED} {verb} {name} {seed}")
    contents = disks(rng.randrange(1000), 3, DISK_NBYTES)
    base, top = chain(agent.folder, (name, name), contents[:2])
    other = child(agent.folder / f"other.{name}", contents[2], None)
    cuts = Cuts(agent, verb, Images(base, top, other, contents[1]), log)
    edges = [
        at + side
        for at, row in enumerate(cuts.rows)
        if row.event in (Event.SYNC, Event.RENAME, Event.UNLINK)
        for side in (0, 1)
    ]
    moments = [rng.choice(edges) for _ in range(n_cuts // 2)]
    moments += [rng.randint(0, len(cuts.rows)) for _ in range(n_cuts - len(moments))]
    for at in moments:
        cuts.cut(at, rng)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("verb", CALLS)
def test_power_cuts(verb: str, name: str, agent: Agent, tmp_path: Path) -> None:
    cut(agent, verb, name, tmp_path / "log", 0, N_FEW_CUTS)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("verb", CALLS)
def test_many_power_cuts(verb: str, name: str, seed: int, agent: Agent, tmp_path: Path) -> None:
    cut(agent, verb, name, tmp_path / "log", seed, N_CUTS)
