"""Checks a repaired wheel: tools/check_wheel.py WHEEL.

The native libraries are linked into the module, not beside it.  The module exports its
init function only.  The wheel has no sources, and the licences of the libraries.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

SYSTEM_LIBRARIES = {"libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1"}
LOADERS = ("ld-linux-",)
LICENSES = {"LICENSE", "openssl.txt", "blake3.txt", "libdeflate.txt", "isa-l.txt", "zstd.txt"}
LICENSES |= {"liburing.txt"}


def words_of(program: str, *arguments: str) -> list[list[str]]:
    """Return the words of each line that a binutils program prints."""
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=True)
    return [line.split() for line in done.stdout.splitlines()]


def faults(wheel: Path, folder: Path) -> list[str]:
    """Unpack the wheel and return its faults."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(folder)
    found = [
        f"{name} does not belong in a wheel"
        for name in names
        if name.endswith((".c", ".h", ".pyx", ".pxd")) or ".libs/" in name
    ]
    modules = [name for name in names if name.endswith(".so")]
    if len(modules) != 1 or not modules[0].startswith("imgcore/_core."):
        return [*found, f"one extension module was expected, not {modules}"]
    module = str(folder / modules[0])
    needed = {
        words[-1].strip("[]") for words in words_of("readelf", "-d", module) if "(NEEDED)" in words
    }
    found += [
        f"{modules[0]} needs {name}"
        for name in sorted(needed - SYSTEM_LIBRARIES)
        if not name.startswith(LOADERS)
    ]
    exported = {words[-1] for words in words_of("nm", "-D", "--defined-only", module)}
    if exported != {"PyInit__core"}:
        found.append(f"{modules[0]} exports {sorted(exported)}")
    licenses = {Path(name).name for name in names if ".dist-info/licenses/" in name}
    found += [f"the license {name} is missing" for name in sorted(LICENSES - licenses)]
    return found


def main() -> int:
    """Print each fault on a line; return 1 if there are any."""
    wheel = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        found = faults(wheel, Path(folder))
    for line in found:
        print(f"{wheel.name}: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
