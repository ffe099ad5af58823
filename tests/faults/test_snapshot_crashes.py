"""A change of snapshots is cut at any moment: it is made, or not, and loses nothing."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import imgcore
from tests.faults.crash import Event, read_log
from tests.faults.harness import Agent
from tests.faults.update_cuts import HOW, FileOnDisk
from tests.helpers import images, qemu

SECOND_NS = 1_000_000_000
N_CUTS = 17
OPTIONS = {
    "v3": {},
    "512": {"cluster_size": 512, "refcount_bits": 32},
    "v2": {"compat": "0.10", "cluster_size": "4k"},
}


class Prepared:
    """An image with one snapshot, after which the disk has changed."""

    def __init__(self, folder: Path, options: dict[str, object], rng: random.Random) -> None:
        source, self.path = folder / "source.raw", folder / "disk.qcow2"
        self.kept = b"".join(rng.randbytes(n) + bytes(n) for n in range(1, 300_000, 40_000))
        self.kept += bytes(-len(self.kept) % 512)
        source.write_bytes(self.kept)
        imgcore.convert(source, self.path, options=options)
        source.unlink()
        imgcore.create_snapshot(self.path, "kept", created_ns=SECOND_NS)
        with imgcore.open(self.path, mode="r+") as image:
            for _ in range(10):
                image.write(rng.randrange(len(self.kept) - 90_000), rng.randbytes(90_000))
            self.now = image.read(0, image.virtual_size)
        self.before = self.path.read_bytes()


def verify(path: Path, image: Prepared, verb: str) -> None:
    """Fail unless an image is sound, with or without a change of its snapshots."""

    def disk() -> bytes:
        with imgcore.open(path) as opened:
            return opened.read(0, opened.virtual_size)

    found = disk()
    assert found in ((image.now, image.kept) if verb == "apply" else (image.now,))
    imgcore.check(path, repair="all")
    report = imgcore.check(path)
    assert (report.corruptions, report.leaks) == (0, 0), report.problems
    qemu.run("check", "-q", path)
    assert disk() == found
    names = [item.name for item in imgcore.snapshots(path)]
    assert (
        names
        in {
            "create": (["kept"], ["kept", "new"]),
            "apply": (["kept"],),
            "delete": (["kept"], []),
        }[verb]
    )
    for name in names:
        imgcore.apply_snapshot(path, name)
        assert disk() == (image.kept if name == "kept" else image.now)
    with imgcore.open(path, mode="r+") as opened:
        opened.write(12_345, b"goes on")
    assert not imgcore.check(path).corruptions


@pytest.mark.parametrize("verb", ["create", "apply", "delete"])
@pytest.mark.parametrize("options", OPTIONS)
def test_power_cuts(options: str, verb: str, agent: Agent, tmp_path: Path) -> None:
    rng = random.Random(f"{images.SEED} {options} {verb}")
    image = Prepared(agent.folder, OPTIONS[options], rng)
    name = "new" if verb == "create" else "kept"
    arguments = {"verb": verb, "path": image.path, "name": name}
    answer = agent.do("snapshot", arguments, log=str(tmp_path / "log"))
    assert answer["outcome"] == "ok", answer
    rows = [row for row in read_log(tmp_path / "log") if row.event is not Event.MARK]
    assert sum(row.event is Event.SYNC for row in rows) > 2
    for at in sorted(rng.choices(range(len(rows) + 1), k=N_CUTS)):
        file = FileOnDisk(image.before)
        for row in rows[:at]:
            file.add(row)
        path = agent.folder / "cut.qcow2"
        path.write_bytes(file.after_cut(rng, rng.choice(HOW)))
        verify(path, image, verb)
