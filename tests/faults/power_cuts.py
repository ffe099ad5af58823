"""Power cuts at random during a conversion in place, and during what recovers from it.

Each run is recorded.  A cut makes of its log a state that a disk may hold; the next run
starts with that, and may be cut as well.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.faults.crash import Disk, Event, Row, random_crash, read_log
from tests.faults.harness import Agent

SUFFIX = ".imgcore-journal"
MAX_CUTS = 3


class PowerCuts:
    """A folder with an image that is rewritten, cut, and recovered again and again.

    Parameters
    ----------
    agent : Agent
    image : str
        The old image's name in the agent's folder.
    data : str
        The name of the file that holds its disk; often the same.
    convert : callable
        Runs the conversion with the given job, by the agent.
    keep : callable
        Tells which rows of a log stay in it: without some, the disk forgets more.
    """

    def __init__(
        self,
        agent: Agent,
        image: str,
        data: str,
        convert: Callable[..., Mapping[str, Any]],
        log: Path,
        keep: Callable[[Row, int], bool] = lambda _row, _image: True,
    ) -> None:
        self.agent, self._image, self._log, self._keep = agent, image, log, keep
        self._folder = agent.folder
        self.old = self._read()
        self._before = self._disk()
        # The image is never created anew: its inode is that in the journal.
        self.inode = (self._folder / data).stat().st_ino
        self._started_ns = self._image_mtime()
        answer = convert(log=str(log))
        assert answer["outcome"] == "ok", answer
        self._rows = self._logged()
        self.new = {name: data for name, data in self._read().items() if not name.endswith(SUFFIX)}
        self._mtimes = (self._started_ns, self._image_mtime())
        self.seen: dict[str, int] = {}

    # -- the folder --------------------------------------------------------------------

    def _read(self) -> dict[str, bytes]:
        return {entry.name: entry.read_bytes() for entry in self._folder.iterdir()}

    def _disk(self) -> Disk:
        entries = list(self._folder.iterdir())
        names = {entry.name: entry.stat().st_ino for entry in entries}
        return Disk(names, {names[entry.name]: entry.read_bytes() for entry in entries})

    def _image_path(self) -> Path:
        (path,) = (e for e in self._folder.iterdir() if e.stat().st_ino == self.inode)
        return path

    def _image_mtime(self) -> int:
        return self._image_path().stat().st_mtime_ns

    def _logged(self) -> list[Row]:
        return [row for row in read_log(self._log) if self._keep(row, self.inode)]

    def _lay_out(self, disk: Disk, mtime_ns: int | None) -> Disk:
        """Make the folder hold a state; new files have other inodes than in it."""
        image = self._image_path()
        for entry in self._folder.iterdir():
            if entry != image:
                entry.unlink()
        (name,) = (name for name, inode in disk.names.items() if inode == self.inode)
        image = image.rename(self._folder / name)
        for name, inode in disk.names.items():
            (self._folder / name).write_bytes(disk.contents[inode])
        if mtime_ns is not None:
            os.utime(image, ns=(mtime_ns, mtime_ns))
        self._started_ns = self._image_mtime()
        return self._disk()

    # -- the cuts ----------------------------------------------------------------------

    def run(self, rng: random.Random) -> None:
        """Cut the conversion, recover with more cuts, and verify the outcome."""
        disk, rows, mtimes = self._before, self._rows, self._mtimes
        story = []
        for n_cuts in range(1, MAX_CUTS + 1):
            cut = rng.randint(0, len(rows))
            story.append(f"cut after {cut} of {len(rows)}")
            disk = random_crash(disk, rows[:cut], rng)
            disk = self._lay_out(disk, self._mtime_after(rows, cut, mtimes))
            action = rng.choice(("recover", "undo"))
            story.append(action)
            answer = self._recover(action, story)
            if n_cuts == MAX_CUTS or rng.random() < 0.5:
                break
            rows, mtimes = self._logged(), (self._started_ns, self._image_mtime())
        self._verify(action, answer, ", ".join(story))

    def _mtime_after(self, rows: list[Row], cut: int, mtimes: tuple[int, int]) -> int | None:
        """Return the image's time if no write to it is in progress at the cut."""
        is_change = [row.inode == self.inode and row.event is not Event.SYNC for row in rows]
        if not any(is_change[:cut]):
            return mtimes[0]
        return None if any(is_change[cut:]) else mtimes[1]

    def _recover(self, action: str, story: list[str]) -> dict[str, Any]:
        path = self._folder / self._image
        answer = self.agent.do(action, {"path": path}, log=str(self._log))
        if answer["outcome"] == "error" and "has no journal" in answer["text"]:
            return {"outcome": "ok", "result": {"state": None}}
        assert answer["outcome"] == "ok", f"broken: {', '.join(story)}: {answer}"
        return answer

    def _verify(self, action: str, answer: Mapping[str, Any], story: str) -> None:
        files = self._read()
        content = {name: data for name, data in files.items() if SUFFIX not in name}
        state = "old" if content == self.old else "new" if content == self.new else "broken"
        sizes = {name: len(data) for name, data in files.items()}
        assert state != "broken", f"broken: {story}: {answer}, {sizes}"
        told = answer["result"].get("state", "old")
        if told is None:
            assert not any(name.endswith(SUFFIX) for name in files), f"broken: {story}: {sizes}"
        else:
            assert told == state, f"broken: {story}: {answer}, {sizes}"
        self.seen[f"{action}: {state}"] = self.seen.get(f"{action}: {state}", 0) + 1


def without_syncs(what: str) -> Callable[[Row, int], bool]:
    """Return a filter of logs that drops the syncs of one thing.

    Parameters
    ----------
    what : {"folder", "image", "journal"}
    """

    def keep(row: Row, image: int) -> bool:
        if row.event is not Event.SYNC:
            return True
        kind = "folder" if row.is_folder else "image" if row.inode == image else "journal"
        return kind != what

    return keep
