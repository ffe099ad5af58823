"""Builds the extension module; everything else is in pyproject.toml.

Environment:

``IMGCORE_<LIB>_PREFIX`` (LIBCRYPTO, LIBDEFLATE, LIBISAL, LIBZSTD, LIBURING, LIBBLAKE3)
    Folder with ``include/`` and ``lib/``, used instead of pkg-config.
``IMGCORE_SANITIZE``
    For example ``address,undefined``: a build that dies on the first fault.
``IMGCORE_WERROR``
    If set, warnings of the native sources are errors.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE_FOLDERS = ("common", "kernels", "digest", "codec", "tables", "io", "engine")
COMPILE_ARGS = ["-std=c11", "-D_GNU_SOURCE", "-O3", "-fvisibility=hidden", "-Wall", "-Wextra"]


@dataclass(frozen=True)
class Library:
    """A system library: its pkg-config name, the oldest version, and its packages."""

    name: str
    minimum: str
    debian: str
    fedora: str
    link_name: str
    required: bool = True
    macro: str | None = None


LIBRARIES = (
    Library("libcrypto", "3.0", "libssl-dev", "openssl-devel", "crypto"),
    Library("libdeflate", "1.14", "libdeflate-dev", "libdeflate-devel", "deflate"),
    Library("libisal", "2.30", "libisal-dev", "isa-l-devel", "isal"),
    Library("libzstd", "1.5.0", "libzstd-dev", "libzstd-devel", "zstd"),
    Library("liburing", "2.2", "liburing-dev", "liburing-devel", "uring", False, "IMGC_HAVE_URING"),
    Library(
        "libblake3", "1.5", "libblake3-dev", "libblake3-devel", "blake3", False, "IMGC_HAVE_BLAKE3"
    ),
)


@dataclass
class Flags:
    """Flags of the compiler and the linker."""

    compile_args: list[str] = field(default_factory=list)
    link_args: list[str] = field(default_factory=list)


def pkg_config(library: Library) -> list[str] | None:
    """Return the flags that pkg-config states, None if it does not find the library."""
    program = os.environ.get("PKG_CONFIG", "pkg-config")
    wanted = f"{library.name} >= {library.minimum}"
    try:
        found = subprocess.run(
            [program, "--cflags", "--libs", wanted], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return shlex.split(found.stdout) if found.returncode == 0 else None


def find(library: Library) -> Flags | None:
    """Find a library by its environment variable, else by pkg-config."""
    variable = f"IMGCORE_{library.name.upper()}_PREFIX"
    prefix = os.environ.get(variable)
    if prefix:
        return Flags([f"-I{prefix}/include"], [f"-L{prefix}/lib", f"-l{library.link_name}"])
    words = pkg_config(library)
    if words is not None:
        compile_args = [word for word in words if word.startswith(("-I", "-D", "-pthread"))]
        return Flags(compile_args, [word for word in words if word not in compile_args])
    if not library.required:
        return None
    raise SystemExit(
        f"imgcore: {library.name} >= {library.minimum} was not found by pkg-config: install "
        f"{library.debian} (Debian) or {library.fedora} (Fedora), or set {variable}"
    )


def sanitizer_flags(names: str) -> Flags:
    """Return the flags of a sanitizer build; they undo flags of CPython's."""
    sanitize = [f"-fsanitize={names}", "-fno-sanitize-recover=all"]
    strict = ["-UNDEBUG", "-fno-wrapv", "-fstrict-overflow"]
    return Flags(["-O1", "-g", "-fno-omit-frame-pointer", *sanitize, *strict], sanitize)


def all_flags() -> Flags:
    """Collect the flags of every library and of the build's variant."""
    # The module exports its init function only, not symbols of static libraries.
    flags = Flags(list(COMPILE_ARGS), ["-pthread", "-Wl,--exclude-libs,ALL"])
    for library in LIBRARIES:
        found = find(library)
        if found is None:
            continue
        flags.compile_args += found.compile_args
        flags.link_args += found.link_args
        if library.macro is not None:
            flags.compile_args.append(f"-D{library.macro}=1")
    sanitize = os.environ.get("IMGCORE_SANITIZE")
    if sanitize:
        extra = sanitizer_flags(sanitize)
        flags.compile_args += extra.compile_args
        flags.link_args += extra.link_args
    if os.environ.get("IMGCORE_WERROR"):
        # Cython's generated C causes these two warnings.
        flags.compile_args += [
            "-Werror",
            "-Wno-error=unused-function",
            "-Wno-error=unused-variable",
        ]
    return flags


class BuildExtension(build_ext):
    """Finds the libraries and runs Cython only for a real build."""

    def build_extensions(self) -> None:
        """Add the flags to each extension, then build it."""
        from Cython.Build import cythonize

        flags = all_flags()
        for extension in self.extensions:
            extension.extra_compile_args = flags.compile_args
            extension.extra_link_args = flags.link_args
            extension.sources[:] = cythonize(
                [extension],
                include_path=["src"],
                build_dir="build/cython",
                force=bool(self.force),
                quiet=True,
                compiler_directives={"language_level": 3},
            )[0].sources
        super().build_extensions()


def extensions() -> list[Extension]:
    """Return the extension; in sanitizer builds also the deliberate faults."""
    native = sorted(path for name in NATIVE_FOLDERS for path in glob(f"native/{name}/*.c"))
    found = [
        Extension(
            "imgcore._core",
            ["src/imgcore/_core.pyx", *native],
            include_dirs=["native/include", "native"],
            depends=[
                "setup.py",
                *glob("src/imgcore/*.pxd"),
                *glob("native/*/*.h"),
            ],
        )
    ]
    if os.environ.get("IMGCORE_SANITIZE"):
        found.append(Extension("imgcore._canary", ["native/tests/canary.c"]))
    return found


if sys.platform != "linux":
    print("imgcore: only Linux is tested", file=sys.stderr)

setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
