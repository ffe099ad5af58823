"""Calls fail while an image is written in place: it stays sound, and keeps what it has.

Each call fails once, or it and all others after it do, or the disk is full.
"""

from __future__ import annotations

import errno
import random
from pathlib import Path

import pytest

from tests.faults.harness import Agent, Calls, Mode
from tests.faults.update_cuts import FORMATS, Session, UpdateCuts, content_of
from tests.faults.update_history import random_changes
from tests.helpers import images
from tests.helpers.update_variants import MIB, VARIANTS, UpdateVariant

N_CHANGES = 16
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
            self._cuts.examined(session.history)
            self._cuts.examined(session.cut(self._rng))
        except Exception as error:
            raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error


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
    Faults(agent, variant, tmp_path / "log").visit(fault, step=STEP, again=True)
