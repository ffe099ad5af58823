"""Images by other programs, which lie beside this repository."""

from __future__ import annotations

import fcntl
import os
import subprocess
from functools import cache
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[3] / "shared" / "images"


@cache
def unpacked_samples() -> Path:
    """Unpack the archive once; keep the folder for the next run and other workers."""
    if not SHARED.is_dir():
        pytest.skip("the sample images are not beside this repository")
    with open(SHARED / "unpack.sh") as script:
        fcntl.flock(script, fcntl.LOCK_EX)
        done = subprocess.run([script.name], capture_output=True, text=True, check=True)
    return Path(os.environ.get("IMGCORE_IMAGES") or done.stdout.strip().splitlines()[-1])
