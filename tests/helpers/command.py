"""Runs the imgcore command as a child process, as users do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def imgcore(
    *arguments: str | os.PathLike[str], cwd: Path | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run ``imgcore`` with the interpreter of the tests and return the outcome."""
    command = [sys.executable, "-m", "imgcore", *map(os.fspath, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=cwd, timeout=timeout
    )


def assert_one_line_error(
    done: subprocess.CompletedProcess[str], *words: str, code: int = 1
) -> None:
    """Fail unless the command ended with this exit code and one line with ``words``."""
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("imgcore: "), done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word.lower() in lines[0].lower(), done.stderr
