"""The environment of the measurements, which is recorded with them."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

LIBRARIES = ("libcrypto", "libdeflate", "libisal", "libzstd", "liburing")


def output(*command: str) -> str:
    """Return the output of a command, empty if it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def cpu_model() -> str:
    """Return the processor's name as Linux gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "Model")):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def file_system(folder: Path) -> str:
    """Return the type of a folder's file system."""
    return output("stat", "-f", "-c", "%T", str(folder))


def find_qemu_img() -> str:
    """Return the qemu-img to compare with: of $IMGCORE_PEERS, else of PATH."""
    peers = os.environ.get("IMGCORE_PEERS") or os.path.expanduser("~/.cache/imgcore-peers")
    candidate = os.path.join(peers, "bin", "qemu-img")
    found = candidate if os.access(candidate, os.X_OK) else shutil.which("qemu-img")
    if found is None:
        raise SystemExit("benchmarks: qemu-img was not found: install qemu-utils")
    return found


def find_imgcore() -> str:
    """Return the installed command: beside this interpreter, else of PATH."""
    beside = Path(sys.executable).with_name("imgcore")
    found = str(beside) if beside.exists() else shutil.which("imgcore")
    if found is None:
        raise SystemExit("benchmarks: the imgcore command is not installed: run `make build`")
    return found


def peer_libzstd(qemu_img: str) -> Path | None:
    """Return the libzstd that a peer brings, None if it uses the system's."""
    root = Path(qemu_img).parent.parent / "root"
    return next(root.glob("usr/lib/*/libzstd.so.1"), None)


def lend_library(library: Path, folder: Path) -> dict[str, str]:
    """Return an environment that loads this library instead of the system's."""
    place = folder / "lib"
    place.mkdir()
    shutil.copyfile(library, place / library.name)
    return {**os.environ, "LD_LIBRARY_PATH": str(place)}


def describe(
    folder: Path, qemu_img: str, recipe: str, libzstd: Path | None = None
) -> dict[str, Any]:
    """Return the record for the JSON; ``libzstd`` is the one that both sides use."""
    code = "import json, imgcore._core as c; print(json.dumps(c.build_info()))"
    build = output(sys.executable, "-c", code)
    libraries = {name: output("pkg-config", "--modversion", name) for name in LIBRARIES}
    if libzstd is not None:
        libraries["libzstd"] = libzstd.resolve().name.removeprefix("libzstd.so.")
    return {
        "commit": output("git", "rev-parse", "HEAD"),
        "uncommitted_changes": bool(output("git", "status", "--porcelain")),
        "cpu": cpu_model(),
        "n_cpus": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "variants": json.loads(build) if build else {},
        "compiler": output("gcc", "--version").splitlines()[0],
        "libraries": libraries,
        "peer": output(qemu_img, "--version").splitlines()[0],
        "file_system": file_system(folder),
        "recipe": recipe,
    }
