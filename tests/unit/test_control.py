"""Jobs that are steered from other threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests.helpers.images import MIB, noise, text

import imgcore

SECONDS = 30.0


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until something is so; fail after a minute."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.002)


class Job:
    """A verb on another thread."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self._work = work
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.result = self._work()
        except BaseException as error:
            self.error = error

    def end(self) -> Any:
        self.thread.join(SECONDS)
        assert not self.thread.is_alive()
        return self.result


# -- every verb ------------------------------------------------------------------------


class Case(NamedTuple):
    """A verb that reads or writes 8 MiB; ``run`` gets the folder and a control."""

    run: Callable[[Path, imgcore.Control], Any]
    # A file that it makes.
    target: str | None = None


def areas(folder: Path, control: imgcore.Control) -> list[imgcore.Area]:
    return list(imgcore.changes(folder / "a.raw", since=folder / "b.raw", control=control))


def sync(folder: Path, control: imgcore.Control, **how: Any) -> imgcore.SyncResult:
    return imgcore.sync(folder / "a.raw", folder / "b.raw", control=control, **how)


def change(folder: Path, control: imgcore.Control) -> imgcore.ApplyResult:
    data = noise(64 * 1024)
    return imgcore.apply(
        folder / "b.raw", ((at, data) for at in range(0, 8 * MIB, len(data))), control=control
    )


def convert(target: str, **how: Any) -> Case:
    return Case(
        lambda folder, control: imgcore.convert(
            folder / "a.raw", folder / target, control=control, threads=2, **how
        ),
        target,
    )


VERBS: dict[str, Case] = {
    "convert": convert("new.qcow2"),
    "convert one thread": Case(
        lambda folder, control: imgcore.convert(
            folder / "a.raw", folder / "new.vhdx", control=control, threads=1
        ),
        "new.vhdx",
    ),
    "convert compressed": convert("new.vmdk", compress=True),
    "convert raw": convert("new.raw"),
    "convert zstd": convert("new.raw.zst"),
    "convert gzip": convert("new.raw.gz"),
    "convert gce": convert("new.tar.gz", profile="gce"),
    "convert verified": convert("new.vdi", verify=True),
    "convert with a parent": Case(
        lambda folder, control: imgcore.convert(
            folder / "a.raw",
            folder / "new.vhd",
            backing=folder / "base.vhd",
            backing_format="vhd",
            control=control,
        ),
        "new.vhd",
    ),
    "compare": Case(
        lambda folder, control: imgcore.compare(
            folder / "a.raw", folder / "a.qcow2", control=control
        )
    ),
    "compare_trees": Case(
        lambda folder, control: list(
            imgcore.compare_trees(folder / "b.tree", folder / "a.raw", control=control)
        )
    ),
    "checksum": Case(lambda folder, control: imgcore.checksum(folder / "a.raw", control=control)),
    "checksum tree": Case(
        lambda folder, control: imgcore.checksum(
            folder / "a.raw", tree=folder / "new.tree", control=control
        ),
        "new.tree",
    ),
    "changes": Case(areas),
    "changes since a tree": Case(
        lambda folder, control: list(
            imgcore.changes(folder / "a.raw", tree=folder / "b.tree", control=control)
        )
    ),
    "rewrite": Case(
        lambda folder, control: imgcore.rewrite(
            folder / "packed.qcow2", "vdi", inflate=True, control=control
        ),
        "packed.vdi",
    ),
    "sync": Case(sync),
    "sync by a tree": Case(
        lambda folder, control: sync(folder, control, tree=folder / "b.tree"), "b.tree"
    ),
    "apply": Case(change),
    "commit": Case(lambda folder, control: imgcore.commit(folder / "child.qcow2", control=control)),
    "rebase": Case(
        lambda folder, control: imgcore.rebase(
            folder / "child.qcow2",
            backing=folder / "a.raw",
            backing_format="raw",
            control=control,
        )
    ),
    "flatten": Case(
        lambda folder, control: imgcore.flatten(folder / "child.qcow2", control=control)
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images of two disks, which differ everywhere."""
    folder = tmp_path_factory.mktemp("control")
    (folder / "a.raw").write_bytes(noise(8 * MIB))
    (folder / "b.raw").write_bytes(noise(8 * MIB, seed=2))
    (folder / "half.raw").write_bytes(noise(4 * MIB) + noise(8 * MIB, seed=2)[4 * MIB :])
    imgcore.convert(folder / "a.raw", folder / "a.qcow2")
    (folder / "text.raw").write_bytes(text(8 * MIB))
    imgcore.convert(folder / "text.raw", folder / "packed.qcow2", compress=True)
    imgcore.convert(folder / "b.raw", folder / "base.vhd")
    imgcore.checksum(folder / "b.raw", tree=folder / "b.tree")
    imgcore.convert(
        folder / "half.raw", folder / "child.qcow2", backing="b.raw", backing_format="raw"
    )
    return folder


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    for path in model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


EVERY_VERB = pytest.mark.parametrize("name", VERBS)


@EVERY_VERB
def test_a_verb_is_paused_and_resumed(name: str, folder: Path) -> None:
    control = imgcore.Control()
    control.pause()
    job = Job(lambda: VERBS[name].run(folder, control))
    wait_for(lambda: control.progress().phase != "waiting")
    job.thread.join(0.15)
    assert job.thread.is_alive(), (job.error, job.result)
    paused = control.progress()
    assert paused.done < paused.total or not paused.total
    control.resume()
    assert job.end() is not None, job.error
    ended = control.progress()
    assert ended.phase == "done"
    assert ended.done == ended.total
    assert ended.eta == 0
    target = VERBS[name].target
    assert target is None or (folder / target).exists()


@EVERY_VERB
def test_a_verb_that_waits_is_cancelled(name: str, folder: Path) -> None:
    before = contents(folder)
    control = imgcore.Control()
    control.pause()
    job = Job(lambda: VERBS[name].run(folder, control))
    wait_for(lambda: control.progress().phase != "waiting")
    control.cancel()
    job.end()
    assert isinstance(job.error, imgcore.ConversionCancelled), job.result
    assert control.progress().phase == "cancelled"
    assert contents(folder) == before
    # It stays so.
    with pytest.raises(imgcore.ConversionCancelled):
        VERBS[name].run(folder, control)
