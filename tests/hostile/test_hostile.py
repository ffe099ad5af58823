"""Every image of the hostile set has its expected outcome, with limited resources."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.hostile.case import CANARY, Case, Stage
from tests.hostile.cases import CASES
from tests.hostile.run import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[2]
MAX_SECONDS = 2.0
N_PROCESSES = 4

Reports = dict[str, dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def reports_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Reports]:
    """Return a function that runs the cases of one process, and returns the reports."""

    @cache
    def run(number: int) -> Reports:
        found: Reports = {}
        folder = tmp_path_factory.mktemp(f"hostile-{number}")
        report = folder / "report"
        command = [sys.executable, "-m", "tests.hostile.run", str(folder), str(report)]
        done = subprocess.run(
            [*command, str(number), str(N_PROCESSES)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        lines = report.read_text().splitlines() if report.exists() else []
        for line in lines:
            answer = json.loads(line)
            found.setdefault(answer["case"], {})[answer["verb"]] = answer
        assert done.returncode == 0, (done.returncode, lines[-1:], done.stderr[-2000:])
        assert CANARY.decode() not in done.stdout + done.stderr
        return found

    return run


def test_the_set_is_as_large_as_promised() -> None:
    names = Counter(case.name for case in CASES)
    assert max(names.values()) == 1, names.most_common(3)
    assert len(names) >= 150
    for image_format in ("qcow2", "vmdk", "vhd", "vhdx", "vdi", "raw"):
        assert sum(name.startswith(f"{image_format}-") for name in names) >= 10, image_format


def cases() -> list[Any]:
    """Return each case with its process; one worker runs the cases of a process."""
    return [
        pytest.param(
            case,
            i % N_PROCESSES,
            id=case.name,
            marks=pytest.mark.xdist_group(f"hostile-{i % N_PROCESSES}"),
        )
        for i, case in enumerate(CASES)
    ]


@pytest.mark.parametrize(("case", "number"), cases())
def test_case(case: Case, number: int, reports_of: Callable[[int], Reports]) -> None:
    answers = reports_of(number)[case.name]
    for verb, answer in answers.items():
        assert "seconds" in answer, f"the process died in {verb}"
        check_promises(verb, answer)
        if verb == "rewrite":
            # It may refuse more than other verbs, but never takes what they refuse.
            assert answer["error"] or not case.fails("map"), (verb, answer)
            assert answer.get("is_content", True), (verb, answer)
            continue
        if verb == "update":
            # Tables are verified where they are used.
            assert not (answer["is_opened"] and case.stage is Stage.OPEN), (verb, answer)
            assert answer.get("is_content", True), (verb, answer)
            assert answer.get("is_bounded", True), (verb, answer)
            continue
        if verb == "stream":
            # It may refuse more than a file.  Of a VMDK, only the markers are read, and
            # that a stream is raw is stated.
            if answer["error"] is None:
                assert not case.fails("convert") or case.name[:4] in ("vmdk", "raw-"), answer
                assert case.content is None or answer["is_content"], answer
            continue
        if case.fails(verb):
            assert answer["error"] == case.error, (verb, answer)
            assert case.word.lower() in answer["message"].lower(), (verb, answer)
        elif not case.may_fail(verb):
            assert answer["error"] is None, (verb, answer)
        if case.stage is Stage.CHECK and verb == "check" and answer["error"] is None:
            assert "problems=[]" not in answer["result"], answer
    if case.content is not None and not case.fails("convert"):
        assert answers["convert"]["left"] == [f"{case.name}.raw"]
        assert answers["convert"]["is_content"]


def check_promises(verb: str, answer: dict[str, Any]) -> None:
    """Check the promises for every image and every verb."""
    where = (answer["case"], verb, answer)
    # Processor time, so that other processes of a busy machine do not count.
    assert answer["cpu_seconds"] < MAX_SECONDS, where
    assert answer["seconds"] < HANG_SECONDS, where
    assert answer["unchanged"], where
    text = answer["message"] + answer["result"] + "".join(answer["log"])
    assert CANARY.decode() not in text, where
    assert not answer.get("leaks"), where
    if answer["error"] is not None:
        assert "\n" not in answer["message"], where
        assert answer["message"], where
        assert answer["left"] == [], where
        is_own = "ImgcoreError" in answer["kinds"]
        assert is_own or ("OSError" in answer["kinds"] and answer["filename"]), where
