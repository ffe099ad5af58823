"""Imports and includes point one way, and the extension exports one symbol."""

from __future__ import annotations

import ast
import graphlib
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
        "_text",
        "_log",
        "_errors",
        "_limits",
        "_version",
        "_geometry",
        "_levels",
        "_retry",
        "_sizes",
        "_profiles",
    },
    {"_extents", "_core", "_kernels"},
    {"_files", "_stream", "_target"},
    {"formats"},
    {
        "_chain",
        "_image",
        "_describe",
        "_host_holes",
        "_overlay",
        "_batches",
        "_job",
        "_salvage",
        "_supply",
    },
    {
        "_convert",
        "_compare",
        "_info",
        "_lint",
        "_map",
        "_check",
        "_measure",
        "_create",
    },
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


def c_code(path: Path) -> str:
    """Return a C file without comments and the content of string literals."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", " ", path.read_text(), flags=re.DOTALL)
    return re.sub(r'(#\s*include\s*)?"(?:[^"\\\n]|\\.)*"', _keep_include, text)


def _keep_include(found: re.Match[str]) -> str:
    return found[0] if found[1] else '""'


def c_files(suffix: str) -> list[Path]:
    """Return the library's own files, without its tests and fuzz targets."""
    folders = ("include", "common", "kernels", "codec", "tables", "io", "engine")
    return sorted(path for name in folders for path in (NATIVE / name).glob(f"*.{suffix}"))


def c_definitions(code: str) -> set[str]:
    """Return the functions and objects with external linkage that a C file defines."""
    # A definition starts in the first column; its braces or its initialiser end the match.
    head = r"^(?!static\b|typedef\b|extern\b)[A-Za-z_][\w \t*]*?[ \t*]"
    functions = re.findall(head + r"(\w+)\([^;{}]*\)\s*\{", code, re.MULTILINE)
    objects = re.findall(head + r"(\w+)(?:\[[^\]]*\])?\s*=\s*[^=]", code, re.MULTILINE)
    return {*functions, *objects}


def c_uses() -> dict[str, set[str]]:
    """Return for each C file the other C files whose functions or objects it names."""
    codes = {str(path.relative_to(NATIVE)): c_code(path) for path in c_files("c")}
    owners = {name: file for file, code in codes.items() for name in c_definitions(code)}
    words = {file: set(re.findall(r"\w+", code)) for file, code in codes.items()}
    return {
        file: {owners[word] for word in named if word in owners} - {file}
        for file, named in words.items()
    }


def c_includes() -> dict[str, set[str]]:
    """Return for each header the headers of this project that it includes."""
    found = {}
    for path in c_files("h"):
        names = re.findall(r'#\s*include\s*"([^"]+)"', c_code(path))
        found[str(path.relative_to(NATIVE))] = {
            f"include/{name}" if name == "imgc.h" else name for name in names
        }
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the nodes of one circle, the first again at the end; empty if there is none."""
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        nodes: list[str] = error.args[1]
        return nodes[::-1]  # in the order of the calls
    return []


def test_c_files_do_not_call_in_circles() -> None:
    uses = c_uses()
    # The patterns above still find what they are meant for.
    assert {"engine/worker.c", "engine/placer.c"} <= uses["engine/job.c"]
    assert {"io/io.c", "kernels/zero.c"} <= uses["kernels/variants.c"]
    assert not circle(uses), " uses ".join(circle(uses))


def test_c_headers_do_not_include_in_circles() -> None:
    includes = c_includes()
    assert "engine/source.h" in includes["engine/engine.h"]
    assert not circle(includes), " includes ".join(circle(includes))
