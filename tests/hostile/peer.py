"""Runs qemu-img on the hostile set.

``python -m tests.hostile.peer FOLDER QEMU_IMG [FIRST STEP]`` prints counts, and the
cases of each.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

from tests.hostile.case import CANARY, Case
from tests.hostile.cases import CASES
from tests.hostile.run import HANG_SECONDS, MAX_FILE_NBYTES, put_canaries

MANY_NBYTES = 448 << 20
# Content of files outside the image's folder: of the canaries, and of /etc/passwd.
FOREIGN = (CANARY, b"root:x:0:0")


def _limit() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE_NBYTES, MAX_FILE_NBYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def run(command: list[str]) -> tuple[int | None, float, int]:
    """Return exit status (None after a timeout), seconds, and bytes of memory."""
    begun = time.monotonic()
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=_limit,
    )
    while time.monotonic() - begun < HANG_SECONDS:
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        if pid:
            child.returncode = os.waitstatus_to_exitcode(status)
            return child.returncode, time.monotonic() - begun, usage.ru_maxrss * 1024
        time.sleep(0.005)
    child.kill()
    _, _, usage = os.wait4(child.pid, 0)
    child.returncode = -signal.SIGKILL
    return None, time.monotonic() - begun, usage.ru_maxrss * 1024


def judge(case: Case, image: Path, output: Path, program: str) -> set[str]:
    """Use one image in every way, and return the findings."""
    found = set()
    target = ["convert", "-O", case.target, str(image), str(output)]
    for verb in (["info", str(image)], ["map", str(image)], ["check", str(image)], target):
        if verb[0] == "convert" and case.error is None and case.content is None:
            continue
        status, seconds, nbytes = run([program, *verb])
        if status is None:
            found.add("hang")
        elif status < 0:
            found.add("crash")
        elif seconds > 2:
            found.add("slow")
        if nbytes > MANY_NBYTES:
            found.add("memory")
        if verb[0] != "convert":
            continue
        content = b""
        if output.exists() and output.stat().st_size <= MAX_FILE_NBYTES:
            content = output.read_bytes()
        if any(text in content for text in FOREIGN):
            found.add("followed a reference")
        if status == 0 and case.fails("convert"):
            found.add("converted what imgcore refuses")
        if status == 0 and case.content is not None and content != case.content:
            found.add("other content")
        if status != 0 and output.exists():
            found.add("left a partial target")
        if status not in (0, None) and case.content is not None and case.error is None:
            found.add("refused what imgcore reads")
    return found


def main(folder: Path, program: str, first: int = 0, step: int = 1) -> None:
    """Run every ``step``-th case from ``first`` on."""
    folder.mkdir(parents=True)
    put_canaries(folder / "outside")
    names = defaultdict(list)
    for case in CASES[first::step]:
        own = folder / case.name
        own.mkdir()
        image = case.make(own)
        output = folder / "output"
        for what in judge(case, image, output, program):
            names[what].append(case.name)
        output.unlink(missing_ok=True)
    print(f"{len(CASES[first::step])} cases")
    for what, cases in sorted(names.items()):
        print(f"{what}: {len(cases)}: {' '.join(cases)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
