"""Calls fail while an image is written in place: it stays sound, and keeps what it has.

Each call fails once, or it and all others after it do, or the disk is full.
"""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import imgcore
from tests.faults.harness import CHANGES, Agent, Calls, Mode
from tests.faults.update_cuts import FORMATS, Session, UpdateCuts, content_of
from tests.faults.update_history import KIB, Change, History, random_changes
from tests.helpers import images
from tests.helpers.mounts import leave_free, mounted
from tests.helpers.update_variants import MIB, VARIANTS, UpdateVariant
from tests.helpers.updates import Model

N_CHANGES = 16
N_CHANGES_AFTER = 4
N_MOMENTS = 10
FAULTS = [
    (Calls.WRITE, errno.ENOSPC, Mode.FAIL_ON),
    (Calls.WRITE, errno.EIO, Mode.FAIL_ONCE),
    (Calls.WRITE, errno.EFBIG, Mode.FAIL_ON),
    (Calls.WRITE | Calls.TRUNCATE | Calls.ALLOCATE, errno.EDQUOT, Mode.FAIL_ON),
    (Calls.TRUNCATE, errno.EIO, Mode.FAIL_ONCE),
    (Calls.ALLOCATE, errno.EIO, Mode.FAIL_ONCE),
    (Calls.ALLOCATE, errno.EOPNOTSUPP, Mode.FAIL_ON),
    (Calls.SYNC, errno.EIO, Mode.FAIL_ONCE),
    (Calls.READ, errno.EIO, Mode.FAIL_ONCE),
    (Calls.OPEN, errno.EMFILE, Mode.FAIL_ONCE),
]
Fault = tuple[Calls, int, Mode]

# Of all calls, one in so many fails where not each does.
STEP = 7
STEP_OF_READS = 41


def name_of(fault: Fault) -> str:
    return f"{fault[0].name}-{errno.errorcode[fault[1]]}".replace("|", "-")


class Faults:
    """An image whose changes meet one fault after the other."""

    def __init__(self, agent: Agent, variant: UpdateVariant, log: Path) -> None:
        self._rng = random.Random(images.SEED)
        self._content = content_of(self._rng, 2 * MIB)
        self._sizes = variant.sizes
        self._cuts = UpdateCuts(agent, variant, self._content, log)
        self._changes = random_changes(self._rng, N_CHANGES, len(self._content), variant.sizes)

    def visit(self, fault: Fault, *, step: int = 1, again: bool = False) -> int:
        """Make each ``step``-th call fail; return how many."""
        calls, code, mode = fault
        for n_hit, nth in enumerate(range(1, 5000, step)):
            self._cuts.reset()
            job = {"arm": (calls, nth, code, mode), "again": again}
            session = Session(self._cuts, self._content, self._changes, **job)
            if not session.answer["hits"]:
                assert session.answer["outcome"] == "ok"
                return n_hit
            self._verify(session, f"{calls.name} {nth}: {session.answer}", code, again=again)
        raise AssertionError("no end of the calls")

    def _verify(self, session: Session, where: str, code: int, *, again: bool) -> None:
        answer = session.answer
        try:
            if answer["outcome"] != "ok":
                assert not again
                assert answer["errno"] in (code, None), "another error"
                assert answer["path"], "no file is named"
            session.advance(len(session.rows))
            self._cuts.image.examined(session.history)
            self._cuts.image.examined(session.cut(self._rng))
        except Exception as error:
            raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error

    def kill_at_calls(self, mode: Mode, step: int) -> int:
        """Kill the process at each ``step``-th call; return how often."""
        for n_killed, nth in enumerate(range(1, 5000, step)):
            session = self._forked(arm=(CHANGES & ~Calls.CLOSE, nth, 0, mode))
            if session.answer["outcome"] == "ok":
                return n_killed
            assert session.answer["outcome"] == "killed", session.answer
        raise AssertionError("no end of the calls")

    def kill_at_moments(self, n_moments: int) -> None:
        started = time.monotonic()
        assert self._forked().answer["outcome"] == "ok"
        seconds = time.monotonic() - started
        for _ in range(n_moments):
            self._forked(kill_after=self._rng.uniform(0, 1.2 * seconds))

    def _forked(self, **job: Any) -> Session:
        self._cuts.reset()
        session = Session(self._cuts, self._content, self._changes, fork=True, **job)
        session.advance(len(session.rows))
        content = self._cuts.image.examined(session.history)
        changes = random_changes(self._rng, N_CHANGES_AFTER, len(content), self._sizes)
        after = Session(self._cuts, content, changes)
        after.advance(len(after.rows))
        self._cuts.image.examined(after.history)
        return session


@pytest.mark.parametrize("fault", FAULTS, ids=name_of)
@pytest.mark.parametrize("variant", FORMATS, ids=lambda variant: variant.name)
def test_some_calls(variant: UpdateVariant, fault: Fault, agent: Agent, tmp_path: Path) -> None:
    Faults(agent, variant, tmp_path / "log").visit(
        fault, step=STEP_OF_READS if fault[0] is Calls.READ else STEP
    )


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=name_of)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_every_call(variant: UpdateVariant, fault: Fault, agent: Agent, tmp_path: Path) -> None:
    n_hit = Faults(agent, variant, tmp_path / "log").visit(fault)
    assert n_hit or not fault[0] & (Calls.WRITE | Calls.SYNC)


ONCE = [
    (calls, errno.ENOSPC, Mode.FAIL_ONCE) for calls in (Calls.WRITE, Calls.TRUNCATE, Calls.ALLOCATE)
]


@pytest.mark.parametrize("fault", ONCE, ids=name_of)
@pytest.mark.parametrize("variant", FORMATS, ids=lambda variant: variant.name)
def test_what_failed_can_be_done_again(
    variant: UpdateVariant, fault: Fault, agent: Agent, tmp_path: Path
) -> None:
    """Once there is space again, nothing is lost of what was done before or since."""
    Faults(agent, variant, tmp_path / "log").visit(fault, again=True)


@pytest.mark.parametrize("mode", [Mode.KILL_BEFORE, Mode.KILL_HALFWAY], ids=["before", "halfway"])
@pytest.mark.parametrize("variant", FORMATS, ids=lambda variant: variant.name)
def test_killed_at_calls(variant: UpdateVariant, mode: Mode, agent: Agent, tmp_path: Path) -> None:
    """What was flushed is there, and the lock of the process that wrote it is not."""
    n_killed = Faults(agent, variant, tmp_path / "log").kill_at_calls(mode, STEP)
    assert n_killed > 3


@pytest.mark.parametrize("variant", FORMATS, ids=lambda variant: variant.name)
def test_killed_at_random_moments(variant: UpdateVariant, agent: Agent, tmp_path: Path) -> None:
    Faults(agent, variant, tmp_path / "log").kill_at_moments(N_MOMENTS)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """Give a file system of 24 MiB."""
    with mounted("tmpfs", tmp_path / "small", "-t", "tmpfs", "-o", "size=24m") as folder:
        yield folder


class Filled(NamedTuple):
    """An image of 4 MiB, and the options for opening it; its disk has data at first."""

    path: Path
    options: dict[str, Any]
    content: bytes


def filled(variant: UpdateVariant, small: Path) -> Filled:
    """Write an image, and leave space for a part of what it lacks."""
    folder = small / "image"
    folder.mkdir()
    content = content_of(random.Random(images.SEED), MIB).ljust(4 * MIB, b"\0")
    path = variant.make(folder, content)
    leave_free(small, 1200 * KIB)
    return Filled(path, {"format": "raw"} if variant.name == "raw" else {}, content)


@pytest.mark.parametrize("variant", FORMATS, ids=lambda variant: variant.name)
def test_a_full_disk(variant: UpdateVariant, small: Path) -> None:
    """The image keeps what was written, and writing goes on once there is space."""
    path, raw, content = filled(variant, small)
    model = Model(content)
    changes = [
        (offset, random.Random(offset).randbytes(64 * KIB))
        for offset in range(MIB, 4 * MIB, 64 * KIB)
    ]
    with imgcore.open(path, mode="r+", **raw) as image:
        failed = 0
        for offset, data in changes:
            try:
                image.write(offset, data)
                image.flush()
            except OSError as error:
                assert error.errno == errno.ENOSPC, error
                assert Path(str(error.filename)).parent == path.parent
                # The rest fits.
                failed += 1
                leave_free(small, 12 * MIB)
                model.check(0, image.read(0, offset))
                image.write(offset, data)
                image.flush()
            model.write(offset, data)
        assert failed == 1
    with imgcore.open(path, **raw) as image:
        model.check(0, image.read(0, len(content)))
    if variant.name != "raw":
        report = imgcore.check(path)
        assert not report.corruptions + report.leaks, report.problems


@pytest.mark.parametrize("variant", FORMATS, ids=lambda variant: variant.name)
def test_a_disk_that_stays_full(variant: UpdateVariant, small: Path) -> None:
    """What was flushed is there although the image cannot be closed well."""
    path, raw, content = filled(variant, small)
    history = History(content)
    changes = [Change("write", at, 64 * KIB, at) for at in range(MIB, 4 * MIB, 64 * KIB)]
    with (
        pytest.raises(OSError, match="No space left"),
        imgcore.open(path, mode="r+", **raw) as image,
    ):
        for change in changes:
            for each in (change, Change("flush")):
                history.begin(each)
                each.make(image)
                history.end(each)
    with imgcore.open(path, **raw) as image:
        history.check(image.read(0, len(content)))
    if variant.name != "raw":
        report = imgcore.check(path)
        assert not report.corruptions, report.problems
