"""Every call that a conversion makes on its files fails once, one after the other.

Each time the error is clean and names the file, no file is left, and the old target is
unchanged.  If a call can be repeated or is not needed, the new image is complete.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import Calls, Mode, Place, params
from tests.helpers.qemu import Variant

FAULTS = [
    (Calls.WRITE, errno.ENOSPC, Mode.FAIL_ON),
    (Calls.WRITE, errno.EIO, Mode.FAIL_ONCE),
    (Calls.WRITE, errno.EDQUOT, Mode.FAIL_ON),
    (Calls.SYNC, errno.EIO, Mode.FAIL_ONCE),
    (Calls.RENAME, errno.EIO, Mode.FAIL_ONCE),
    (Calls.RENAME, errno.EACCES, Mode.FAIL_ONCE),
    (Calls.ALLOCATE, errno.ENOSPC, Mode.FAIL_ON),
    (Calls.ALLOCATE, errno.EOPNOTSUPP, Mode.FAIL_ON),
    (Calls.TRUNCATE, errno.EFBIG, Mode.FAIL_ONCE),
    (Calls.CREATE, errno.EACCES, Mode.FAIL_ONCE),
    (Calls.CLOSE, errno.EIO, Mode.FAIL_ONCE),
    (Calls.STATUS, errno.EIO, Mode.FAIL_ONCE),
    (Calls.OPEN, errno.EIO, Mode.FAIL_ONCE),
    (Calls.OPEN, errno.EMFILE, Mode.FAIL_ONCE),
]


def visit(place: Place, calls: Calls, code: int, mode: Mode, **more: Any) -> list[str]:
    """Make each call fail in turn; return the states of the target."""
    states: list[str] = []
    for nth in range(1, 2000):
        place.reset()
        answer = place.convert(arm=(calls, nth, code, mode), more=more)
        files = place.files()
        if not answer["hits"]:
            assert answer["outcome"] == "ok"
            return states
        state = place.state(files)
        states.append(state)
        where = f"{calls.name} {nth}: {answer}, {sorted(files)}"
        assert set(files) == set(place.new if state == "new" else place.old), where
        if answer["outcome"] == "ok":
            assert state == "new", where
            continue
        assert answer["errno"] == code, where
        assert answer["path"], where
        assert state == "old" or "syncing the folder" in answer["text"], where
    raise AssertionError("no end of the calls")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f"{f[0].name}-{errno.errorcode[f[1]]}")
@pytest.mark.parametrize("variant", params())
def test_every_call(
    variant: Variant,
    fault: tuple[Calls, int, Mode],
    place: Callable[[Variant], Place],
) -> None:
    states = visit(place(variant), *fault)
    if fault[0] in (Calls.WRITE, Calls.SYNC, Calls.RENAME, Calls.CREATE):
        assert states


@pytest.mark.parametrize("cache", ["drop", "direct"])
@pytest.mark.parametrize(
    "fault",
    [
        (Calls.WRITE, errno.ENOSPC, Mode.FAIL_ON),
        (Calls.WRITE, errno.EIO, Mode.FAIL_ONCE),
        (Calls.SYNC, errno.EIO, Mode.FAIL_ONCE),
        (Calls.OPEN, errno.EMFILE, Mode.FAIL_ONCE),
    ],
    ids=lambda f: f"{f[0].name}-{errno.errorcode[f[1]]}",
)
@pytest.mark.parametrize("variant", params())
def test_every_call_past_the_page_cache(
    variant: Variant,
    fault: tuple[Calls, int, Mode],
    cache: str,
    place: Callable[[Variant], Place],
) -> None:
    assert visit(place(variant), *fault, source_cache=cache, target_cache=cache)


@pytest.mark.parametrize("variant", params())
def test_refused_direct_requests(variant: Variant, place: Callable[[Variant], Place]) -> None:
    """From whichever write on they are refused, the image is complete."""
    here = place(variant)
    for nth in range(1, 2000):
        here.reset()
        answer = here.convert(
            arm=(Calls.WRITE, nth, errno.EINVAL, Mode.FAIL_ONCE), more={"target_cache": "direct"}
        )
        if not answer["hits"]:
            assert nth > 1
            return
        if answer["outcome"] == "ok":
            assert here.state(here.files()) == "new"
        else:
            assert answer["errno"] == errno.EINVAL
    raise AssertionError("no end of the calls")


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSPC])
@pytest.mark.parametrize("mode", [Mode.FAIL_ONCE, Mode.FAIL_ON], ids=["once", "always"])
@pytest.mark.parametrize("variant", params())
def test_attributes_are_a_courtesy(
    variant: Variant, mode: Mode, code: int, place: Callable[[Variant], Place]
) -> None:
    """A system that refuses mode, owner or extended attributes fails no job."""
    here = place(variant)
    hits = 0
    for nth in range(1, 20):
        here.reset()
        for path in here.agent.folder.iterdir():
            set_attributes(path)
        answer = here.convert(arm=(Calls.ATTRIBUTE, nth, code, mode))
        assert answer["outcome"] == "ok", answer
        assert here.files() == here.new
        hits += answer["hits"]
        if not answer["hits"]:
            break
    assert hits


def set_attributes(path: Path) -> None:
    """Give a file attributes that new ones do not have."""
    path.chmod(0o640)
    with contextlib.suppress(OSError):
        os.setxattr(path, "user.backup", b"17")
    with contextlib.suppress(OSError):
        os.chown(path, 12345, 23456)
