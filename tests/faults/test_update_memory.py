"""Allocations fail while images are written in place: they stay sound.

The failure is a MemoryError, or is not noticed.  The same call then succeeds.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import imgcore
from tests.faults.chain_calls import CALLS, Images
from tests.faults.harness import agent_in
from tests.faults.update_cuts import FORMATS, Session, UpdateCuts, content_of
from tests.faults.update_history import random_changes
from tests.helpers import chains, images
from tests.helpers.update_variants import MIB, UpdateVariant

DISK_NBYTES = 2 * MIB
N_CHANGES = 25
N_FAILED = 25
WHOSE = pytest.mark.parametrize(
    "of_python",
    [pytest.param(False, id="core"), pytest.param(True, marks=pytest.mark.slow, id="interpreter")],
)


def fault(nth: int, *, of_python: bool) -> dict[str, Any]:
    """Return a job's fault; NumPy does not survive all of them, so a child does it."""
    return {"memory": nth, "of_python": True, "fork": True} if of_python else {"memory": nth}


def numbers(total: int) -> range:
    """Return which allocations fail, one after the other."""
    return range(1, total + 1, max(1, total // N_FAILED))


def require_clean(answer: dict[str, Any]) -> None:
    if answer["outcome"] == "error" and "type" in answer:
        assert answer["type"] == "MemoryError", answer


@WHOSE
@pytest.mark.parametrize("variant", FORMATS, ids=lambda variant: variant.name)
def test_changes(variant: UpdateVariant, of_python: bool, shim: Path, tmp_path: Path) -> None:
    """What was flushed is there, and nothing else than what was written."""
    rng = random.Random(images.SEED)
    content = content_of(rng, DISK_NBYTES)
    with agent_in(shim, tmp_path / "image", PYTHONMALLOC="malloc") as agent:
        cuts = UpdateCuts(agent, variant, content, tmp_path / "log")
        changes = random_changes(rng, N_CHANGES, len(content), variant.sizes)
        session = Session(cuts, content, changes, memory=0, of_python=of_python)
        n_failed = 0
        for nth in numbers(session.answer["allocations"]):
            cuts.reset()
            session = Session(cuts, content, changes, **fault(nth, of_python=of_python))
            require_clean(session.answer)
            n_failed += session.answer["outcome"] != "ok"
            try:
                session.advance(len(session.rows))
                cuts.image.examined(session.history)
            except (AssertionError, imgcore.ImgcoreError) as error:
                raise AssertionError(f"allocation {nth}: {session.answer}: {error}") from error
        assert n_failed


@WHOSE
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "qcow2" else pytest.mark.slow)
        for name in chains.FORMATS
    ],
)
@pytest.mark.parametrize("verb", CALLS)
def test_verbs(verb: str, name: str, of_python: bool, shim: Path, tmp_path: Path) -> None:
    contents = chains.disks(3, 3, 3 * MIB)
    with agent_in(shim, tmp_path / "image", PYTHONMALLOC="malloc") as agent:
        base, top = chains.chain(agent.folder, (name, name), contents[:2])
        other = chains.child(agent.folder / f"other.{name}", contents[2], None)
        made = Images(base, top, other, contents[1])
        call = {"verb": verb, **CALLS[verb](made)}
        before = {path: path.read_bytes() for path in agent.folder.iterdir()}
        answer = agent.do("chain", call, memory=0, of_python=of_python)
        assert answer["outcome"] == "ok", answer
        n_failed = 0
        for nth in numbers(answer["allocations"]):
            lay_out(agent.folder, before)
            answer = agent.do("chain", call, **fault(nth, of_python=of_python))
            require_clean(answer)
            n_failed += answer["outcome"] != "ok"
            try:
                require_kept(made, verb)
                done = agent.do("chain", call)
                assert done["outcome"] == "ok", done
                result = other if verb == "sync" else top
                assert (
                    chains.content_of(base if verb == "sync" else top)
                    == contents[2 if verb == "sync" else 1]
                )
                assert not imgcore.check(result).corruptions
            except (AssertionError, imgcore.ImgcoreError) as error:
                raise AssertionError(f"allocation {nth}: {answer}: {error}") from error
        assert n_failed


def lay_out(folder: Path, before: dict[Path, bytes]) -> None:
    for path in set(folder.iterdir()) - before.keys():
        path.unlink()
    for path, content in before.items():
        path.write_bytes(content)


def require_kept(made: Images, verb: str) -> None:
    """Fail unless the images are sound, and the overlay reads as before."""
    assert not imgcore.check(made.base).corruptions
    if verb != "sync" and not made.top.with_name(f"{made.top.name}.imgcore-commit").exists():
        assert chains.content_of(made.top) == made.content


@WHOSE
@pytest.mark.parametrize("verb", ["create", "apply", "delete"])
def test_snapshots(verb: str, of_python: bool, shim: Path, tmp_path: Path) -> None:
    content = content_of(random.Random(images.SEED), DISK_NBYTES)
    with agent_in(shim, tmp_path / "image", PYTHONMALLOC="malloc") as agent:
        path = agent.folder / "disk.qcow2"
        source = tmp_path / "source.raw"
        source.write_bytes(content)
        imgcore.convert(source, path)
        imgcore.create_snapshot(path, "kept")
        call = {"verb": verb, "path": path, "name": "new" if verb == "create" else "kept"}
        before = {path: path.read_bytes()}
        answer = agent.do("snapshot", call, memory=0, of_python=of_python)
        n_failed = 0
        for nth in numbers(answer["allocations"]):
            lay_out(agent.folder, before)
            answer = agent.do("snapshot", call, **fault(nth, of_python=of_python))
            require_clean(answer)
            n_failed += answer["outcome"] != "ok"
            try:
                assert chains.content_of(path) == content
                imgcore.check(path, repair="all")
                report = imgcore.check(path)
                assert (report.corruptions, report.leaks) == (0, 0), report.problems
                if answer["outcome"] != "ok" and len(imgcore.snapshots(path)) == 1:
                    assert verb == "delete" or agent.do("snapshot", call)["outcome"] == "ok"
            except (AssertionError, imgcore.ImgcoreError) as error:
                raise AssertionError(f"allocation {nth}: {answer}: {error}") from error
        assert n_failed
