"""A conversion in place is cut at any moment: the image is the old or the new one.

The power fails at random points, also during the recovery; what was not synced is lost,
torn, or written in another order.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import imgcore
from imgcore.files.in_place import undo
from tests.faults.harness import CHANGES, DISK, Agent, Calls, Mode, agent_in
from tests.faults.power_cuts import PowerCuts, without_syncs
from tests.helpers import images, qemu
from tests.helpers.command import imgcore as imgcore_command
from tests.helpers.mounts import fill_up, leave_free, make_file_system, mounted
from tests.helpers.tiny import OLD, SIZE, new_content, rewrite

N_CUTS = 400
N_FEW_CUTS = 60
N_MOMENTS = 30

# Closing tells nothing that the sync before has not told.
FAILING = CHANGES & ~Calls.CLOSE


def tiny(agent: Agent, **more: Any) -> tuple[str, str, Callable[..., Mapping[str, Any]]]:
    """Write the tiny format's old image, and return its name and the conversion."""
    path = agent.folder / "disk.old"
    path.write_bytes(OLD)
    for name in more.get("removed", ()):
        (agent.folder / name).write_bytes(f"old {name}".encode())
    return path.name, path.name, lambda **job: agent.do("tiny", {"path": path, **more}, **job)


# New names, side files, and a side file that takes the place of another.
NAMES: dict[str, dict[str, Any]] = {
    "renamed": {},
    "same-name": {"name": None},
    "side-files": {"created": {"a.txt": "new a", "c.txt": "new c"}, "removed": ["a.txt", "b.txt"]},
    "in-place-of-side-file": {"name": "a.txt", "removed": ["a.txt"]},
}


@pytest.mark.parametrize("n_cuts", [N_FEW_CUTS, pytest.param(N_CUTS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("names", NAMES)
def test_power_cuts(names: str, n_cuts: int, agent: Agent, tmp_path: Path) -> None:
    cuts = PowerCuts(agent, *tiny(agent, **NAMES[names]), tmp_path / "log")
    rng = random.Random(images.SEED)
    for _ in range(n_cuts):
        cuts.run(rng)
    assert {*cuts.seen} == {"recover: old", "recover: new", "undo: old"}


class Pair(NamedTuple):
    """A source and a target format, with their options and the file of the disk."""

    source: str
    target: str
    source_options: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    suffix: str = ""
    data: str = ""

    @property
    def name(self) -> str:
        words = (self.source, *self.source_options, "to", self.target, *self.options)
        return "-".join(word.partition("=")[2] or word for word in words)

    def arguments(self, source: Path) -> dict[str, Any]:
        """Return the arguments of `imgcore.rewrite`."""
        return {
            "image": source,
            "target_format": self.target,
            "options": list(self.options),
            "format": self.source,
        }

    def write(self, folder: Path) -> Path:
        """Write the source image, and return its path."""
        raw, path = folder / "source.raw", folder / f"disk.{self.suffix or self.source}"
        DISK.write(raw)
        if self.source == "raw":
            return raw.rename(path)
        imgcore.convert(
            raw, path, format="raw", target_format=self.source, options=self.source_options
        )
        raw.unlink()
        return path


PAIRS = [
    Pair("raw", "qcow2", suffix="img"),
    Pair("raw", "vdi"),
    Pair("raw", "vhdx"),
    Pair("raw", "vmdk"),
    Pair("raw", "vmdk", options=("subformat=monolithicFlat",)),
    Pair("raw", "vhd", options=("subformat=fixed",)),
    Pair("vhd", "raw", ("subformat=fixed",)),
    Pair("vmdk", "qcow2", ("subformat=monolithicFlat",), data="disk-flat.vmdk"),
    Pair("vmdk", "qcow2"),
    Pair("vmdk", "qcow2", ("subformat=streamOptimized",)),
    Pair("qcow2", "vmdk"),
    Pair("vhdx", "qcow2", ("block_size=1M",)),
    Pair("vhdx", "vdi", ("block_size=1M",)),
    Pair("vdi", "vhdx"),
    Pair("vhd", "vmdk"),
]
_ORDINARY = {("raw", "qcow2"), ("raw", "vdi"), ("vhd", "raw"), ("vmdk", "qcow2")}


def pair_params(n_few: int, n_cuts: int) -> list[Any]:
    """Return the pairs with numbers of cuts: some of them in the ordinary run."""
    few = [pair for pair in PAIRS if (pair.source, pair.target) in _ORDINARY]
    return [
        *(pytest.param(pair, n_few, id=f"{pair.name}-{n_few}") for pair in few),
        *(
            pytest.param(pair, n_cuts, id=f"{pair.name}-{n_cuts}", marks=pytest.mark.slow)
            for pair in PAIRS
        ),
    ]


@pytest.mark.parametrize(("pair", "n_cuts"), pair_params(15, 300))
def test_power_cuts_of_a_pair(pair: Pair, n_cuts: int, agent: Agent, tmp_path: Path) -> None:
    """Old is the same bytes; new is those of a conversion that nothing has cut."""
    source = pair.write(agent.folder)
    shutil.copy(source, tmp_path)
    if pair.data:
        shutil.copy(agent.folder / pair.data, tmp_path)
    arguments = pair.arguments(source)
    rewritten: dict[str, Any] = {}

    def convert(**job: Any) -> dict[str, Any]:
        answer = agent.do("rewrite", arguments, **job)
        assert answer["outcome"] == "ok", answer
        rewritten.update(answer["result"])
        return answer

    data = pair.data or source.name
    cuts = PowerCuts(agent, source.name, data, convert, tmp_path / "log")
    with_undo = Path(rewritten["path"])
    qemu.assert_same(
        tmp_path / source.name,
        with_undo,
        source_format=pair.source,
        target_format=pair.target,
    )
    if pair.target != "raw":
        # What moved away from the front is unused, until the journal is removed.
        assert imgcore_command("check", with_undo).returncode in (0, 3)
    rng = random.Random(images.SEED)
    for _ in range(n_cuts):
        cuts.run(rng)
    assert sum(cuts.seen.values()) == n_cuts


@pytest.mark.parametrize("what", ["journal", "folder", "image"])
def test_every_barrier_is_needed(what: str, agent: Agent, tmp_path: Path) -> None:
    """If the disk forgets one kind of sync, the test above must find broken images."""
    cuts = PowerCuts(agent, *tiny(agent), tmp_path / "log", without_syncs(what))
    rng = random.Random(images.SEED)
    with pytest.raises(AssertionError, match="broken"):
        for _ in range(N_CUTS):
            cuts.run(rng)


# -- calls that fail, and kills --------------------------------------------------------


class Image:
    """The tiny format's image in a folder, again and again."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.old_path, self.new_path = agent.folder / "disk.old", agent.folder / "disk.new"

    def reset(self) -> None:
        for entry in self.agent.folder.iterdir():
            if entry.is_file():
                entry.unlink()
        self.old_path.write_bytes(OLD)

    def convert(self, **job: Any) -> dict[str, Any]:
        return self.agent.do("tiny", {"path": self.old_path}, **job)

    def files(self) -> list[str]:
        return sorted(entry.name for entry in self.agent.folder.iterdir() if entry.is_file())

    def state(self) -> str:
        """Recover, and return "old" or "new"; fails if it is anything else."""
        answer = self.agent.do("recover", {"path": self.old_path})
        assert answer["outcome"] == "ok", answer
        if self.new_path.exists():
            assert self.new_path.read_bytes() == new_content()
            assert self.files() == ["disk.new", "disk.new.imgcore-journal"]
            assert answer["result"]["state"] == "new"
            return "new"
        assert self.old_path.read_bytes() == OLD
        left = [name for name in self.files() if name != "disk.old"]
        assert left in ([], ["disk.old.imgcore-journal-new"])
        assert answer["result"]["state"] in ("old", None)
        return "old"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("mode", [Mode.FAIL_ONCE, Mode.FAIL_ON], ids=["once", "on"])
def test_every_call_fails(mode: Mode, code: int, agent: Agent) -> None:
    """The old image is there, at once or when the disk works again."""
    image = Image(agent)
    seen = set()
    for nth in range(1, 500):
        image.reset()
        answer = image.convert(arm=(FAILING, nth, code, mode))
        if not answer["hits"]:
            break
        names = image.files()
        if answer["outcome"] == "ok":
            assert mode is Mode.FAIL_ONCE
            assert image.state() == "new"
            continue
        assert answer["errno"] == code, answer
        assert str(agent.folder) in answer["path"], answer
        state = image.state()
        assert state == "old" or "converted" in answer["text"] or mode is Mode.FAIL_ON
        if mode is Mode.FAIL_ONCE and state == "old":
            assert names == ["disk.old"], answer
        seen.add(state)
        assert state == "new" or image.convert()["outcome"] == "ok"
    assert nth > 20
    assert seen == {"old", "new"}


@pytest.mark.parametrize("mode", [Mode.KILL_BEFORE, Mode.KILL_HALFWAY], ids=["before", "halfway"])
def test_killed_at_every_change(mode: Mode, agent: Agent) -> None:
    image = Image(agent)
    seen: list[str] = []
    for nth in range(1, 500):
        image.reset()
        if image.convert(arm=(CHANGES, nth, 0, mode), fork=True)["outcome"] == "ok":
            break
        seen.append(image.state())
        if seen[-1] == "old":
            assert image.convert()["outcome"] == "ok"
            assert image.state() == "new"
    assert len(seen) > 20
    # The point after which the new image is sure.
    assert seen == sorted(seen, reverse=True)
    assert {*seen} == {"old", "new"}


@pytest.mark.parametrize("mode", [Mode.KILL_BEFORE, Mode.KILL_HALFWAY], ids=["before", "halfway"])
def test_an_undo_is_killed_at_every_change(mode: Mode, agent: Agent) -> None:
    """From the record of the undo on, every recovery goes back."""
    image = Image(agent)
    seen: list[str] = []
    for nth in range(1, 500):
        image.reset()
        assert image.convert()["outcome"] == "ok"
        job = {"arm": (CHANGES, nth, 0, mode), "fork": True}
        if agent.do("undo", {"path": image.new_path}, **job)["outcome"] == "ok":
            break
        seen.append(image.state())
    assert seen == sorted(seen)
    assert {*seen} == {"old", "new"}


@pytest.mark.parametrize(
    "pair",
    [pytest.param(p, id=p.name, marks=() if p in PAIRS[:2] else pytest.mark.slow) for p in PAIRS],
)
def test_killed_at_random_moments(pair: Pair, agent: Agent, tmp_path: Path) -> None:
    """The same command again, by the old name, ends with the new image."""
    source = pair.write(agent.folder)
    saved = {entry.name: entry.read_bytes() for entry in agent.folder.iterdir()}
    for name, content in saved.items():
        (tmp_path / name).write_bytes(content)
    arguments = pair.arguments(source)
    rng = random.Random(images.SEED)
    started = time.monotonic()
    agent.do("rewrite", arguments, fork=True)
    seconds = time.monotonic() - started
    n_killed = 0
    for _ in range(N_MOMENTS):
        for entry in agent.folder.iterdir():
            entry.unlink()
        for name, content in saved.items():
            (agent.folder / name).write_bytes(content)
        job = {"fork": True, "kill_after": rng.uniform(0, seconds)}
        n_killed += agent.do("rewrite", arguments, **job)["outcome"] == "killed"
        answer = agent.do("rewrite", arguments)
        assert answer["outcome"] == "ok", answer
        qemu.assert_same(
            tmp_path / source.name,
            Path(answer["result"]["path"]),
            source_format=pair.source,
            target_format=pair.target,
        )
    assert n_killed


# -- real file systems -----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ext4-journal", "xfs"])
def test_shut_down_at_every_change(kind: str, shim: Path, tmp_path: Path) -> None:
    """The file system stops after every call, and is mounted again."""
    if shutil.which("xfs_io") is None:
        pytest.skip("xfs_io is not installed (Debian: xfsprogs)")
    states = []
    for nth in range(1, 500):
        disk = make_file_system(kind, tmp_path / "disk", 320 * images.MIB)
        with mounted(disk, tmp_path / "before", "-o", "loop") as folder:
            with agent_in(shim, folder) as agent:
                image = Image(agent)
                image.reset()
                os.sync()
                job = {"arm": (CHANGES, nth, 0, Mode.KILL_BEFORE), "fork": True}
                outcome = image.convert(**job)["outcome"]
            subprocess.run(["xfs_io", "-x", "-c", "shutdown", folder], check=True)
            # A copy, because other namespaces may keep the file system mounted.
            subprocess.run(["cp", "--sparse=always", disk, tmp_path / "copy"], check=True)
        (tmp_path / "before").rmdir()
        options = "loop,nouuid" if kind == "xfs" else "loop"
        with (
            mounted(tmp_path / "copy", tmp_path / "after", "-o", options) as folder,
            agent_in(shim, folder) as agent,
        ):
            states.append(Image(agent).state())
        (tmp_path / "after").rmdir()
        if outcome == "ok":
            break
    assert states[-1] == "new"
    assert states == sorted(states, reverse=True)


# -- a full disk -----------------------------------------------------------------------


@pytest.fixture(params=["ext4", "tmpfs"])
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Give a file system of 12 MiB."""
    folder = tmp_path / "small"
    if request.param == "ext4":
        disk = make_file_system("ext4", tmp_path / "ext4.img", 12 * images.MIB)
        with mounted(disk, folder, "-o", "loop"):
            yield folder
    else:
        with mounted("tmpfs", folder, "-t", "tmpfs", "-o", "size=12m"):
            yield folder


def test_full(small: Path) -> None:
    """The old image stays, byte for byte, and comes back although the disk is full."""
    path = small / "disk.old"
    outcomes = []
    for free in (0, 4, 8, 16, 32, 64, 80, 100, 128, 160, 200, 256, 300, 400, 1000, 5000):
        path.write_bytes(OLD)
        leave_free(small, free * images.KIB)
        names = sorted(os.listdir(small))
        try:
            new = rewrite(path)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            assert path.read_bytes() == OLD
            assert sorted(os.listdir(small)) == names
            outcomes.append("old")
            continue
        assert new.read_bytes() == new_content()
        outcomes.append("new")
        fill_up(small)
        assert undo(new) == str(path)
        assert path.read_bytes() == OLD
    assert outcomes == sorted(outcomes, reverse=True)
    assert {*outcomes} == {"old", "new"}


def test_the_front_of_a_sparse_image_gets_its_space_before(small: Path) -> None:
    """What is overwritten may be a hole; its space is there before it is needed."""
    path = small / "disk.old"
    for free in range(0, 600, 20):
        with path.open("wb") as file:
            file.truncate(SIZE)
        leave_free(small, free * images.KIB)
        try:
            new = rewrite(path)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            assert path.read_bytes() == bytes(SIZE)
            assert not path.with_name("disk.old.imgcore-journal").exists()
        else:
            fill_up(small)
            undo(new)
            assert path.read_bytes() == bytes(SIZE)
