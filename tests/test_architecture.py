"""Imports and includes point one way, and the extension exports one symbol."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "imgcore"
NATIVE = ROOT / "native"

# Lower layers first; a module imports from its own layer and from those below it.
PYTHON_LAYERS = (
    {
        "text",
        "log",
        "errors",
        "limits",
        "_version",
        "sizes",
    },
    {"_core"},
    {"files"},
    {"engine"},
    {"streams"},
    {"formats"},
    {"platforms"},
    {"disk"},
    {"verbs"},
    {"__init__"},
    {"cli"},
    {"__main__"},
)

# engine -> {tables, io, codec, kernels} -> common -> include
C_LAYERS = (("include",), ("common",), ("kernels", "codec", "tables", "io"), ("engine",))


def layer_of(module: str) -> int:
    """Return the layer of a top-level module or package of imgcore."""
    for rank, names in enumerate(PYTHON_LAYERS):
        if module in names:
            return rank
    # A helper shares its verb's layer: _convert_stream sits with _convert.
    for rank, names in enumerate(PYTHON_LAYERS):
        if any(module.startswith(f"{name}_") for name in names):
            return rank
    raise AssertionError(f"imgcore.{module} has no layer: add it to PYTHON_LAYERS")


def module_of(path: Path) -> str:
    """Return the top-level name below imgcore that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """Yield top-level names below imgcore that a file imports, anywhere in it."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "imgcore":
                yield parts[1] if len(parts) > 1 and is_module(parts[1]) else "__init__"


def is_module(name: str) -> bool:
    """Tell whether imgcore has a module or package of that name."""
    return any((PACKAGE / entry).exists() for entry in (name, f"{name}.py", f"{name}.pyi"))


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_python_imports_point_down(path: Path) -> None:
    own = module_of(path)
    for name in imported(path):
        assert layer_of(name) <= layer_of(own), f"imgcore.{own} imports imgcore.{name}"


@pytest.mark.parametrize(
    "path",
    sorted(
        path for folder in C_LAYERS for name in folder for path in (NATIVE / name).glob("*.[ch]")
    ),
    ids=lambda path: str(path.relative_to(NATIVE)),
)
def test_c_includes_point_down(path: Path) -> None:
    folders = {name: rank for rank, names in enumerate(C_LAYERS) for name in names}
    for included in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE):
        folder = included.split("/")[0] if "/" in included else path.parent.name
        if included == "imgc.h":
            folder = "include"
        assert folder in folders, f"{path}: {included}"
        same = folder == path.parent.name
        assert same or folders[folder] < folders[path.parent.name], f"{path}: {included}"


def test_native_code_knows_no_python() -> None:
    for path in NATIVE.rglob("*.[ch]"):
        assert re.search(r"#\s*include\s*<Python.h>", path.read_text()) is None, path


def test_native_code_neither_prints_nor_exits() -> None:
    """Nor reads the environment: every choice comes from the caller."""
    forbidden = re.compile(r"\b(printf|fprintf|abort|exit|getenv|assert)\s*\(")
    for folder in ("common", "kernels", "codec", "tables", "io", "engine"):
        for path in (NATIVE / folder).glob("*.[ch]"):
            code = re.sub(r"/\*.*?\*/|//[^\n]*", "", path.read_text(), flags=re.DOTALL)
            found = forbidden.search(code)
            assert found is None, f"{path}: {found and found.group()}"


def test_the_extension_exports_one_symbol() -> None:
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed (Debian: binutils)")
    import imgcore._core

    done = subprocess.run(
        ["nm", "-D", "--defined-only", imgcore._core.__file__],
        capture_output=True,
        text=True,
        check=True,
    )
    names = {line.split()[-1] for line in done.stdout.splitlines()}
    names = {name for name in names if not name.startswith(("__asan", "__ubsan", "__odr_asan"))}
    assert names == {"PyInit__core"}


def test_no_file_shells_out() -> None:
    """imgcore itself never starts another program."""
    for path in PACKAGE.rglob("*.py"):
        for word in ("subprocess", "os.system", "os.popen"):
            assert word not in path.read_text(), f"{path}: {word}"
