"""The tree's rules: directions of imports and includes, and names that code may use.

The tests read the members of each layer from the tree, so they cover new modules and
folders.  Imports inside functions and those for type checkers count like all others.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "imgcore"
NATIVE = ROOT / "native"
TESTS = ROOT / "tests"

# Upper layers first: a module imports from its own layer and from those below it.
LAYERS = (
    "cli",
    "verbs",
    "rewriting",
    "disk",
    "platforms",
    "formats",
    "checksums",
    "areas",
    "streams",
    "engine",
    "files",
)
# Modules beside the layers: the package's face above all of them; leaves are below.
FACE = ("imgcore", "imgcore.__main__")
# Modules that a format may import besides its own, the layers below and the leaves.
FORMAT_MAY_IMPORT = tuple(
    f"imgcore.formats.{name}" for name in ("api", "magic", "options", "shared")
)
FORMAT_LAYERS = ("areas", "engine", "files")

# Layers that ask drivers about formats, and never name one.
GENERAL_LAYERS = (
    "cli",
    "verbs",
    "rewriting",
    "disk",
    "checksums",
    "areas",
    "streams",
    "engine",
    "files",
)

C_LAYERS = (("include",), ("common",), ("kernels", "digest", "codec", "tables", "io"), ("engine",))


def folders_of(layer: str) -> list[str]:
    """Return the names of a layer's folders."""
    return sorted(path.parent.name for path in (PACKAGE / layer).glob("*/__init__.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> Mapping[str, Path]:
    """Return every module of the package; the compiled one has its stub."""
    paths = [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.pyi")]
    return {module_name(path): path for path in sorted(paths)}


def names_imported(text: str, where: str) -> Iterator[str]:
    """Yield the full names that a module's text imports anywhere."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{where}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_of(text: str, where: str) -> Iterator[str]:
    """Yield the modules of imgcore that a module's text imports."""
    for name in names_imported(text, where):
        if name.split(".")[0] == "imgcore":
            yield name if name in modules() else name.rpartition(".")[0]


@cache
def graph() -> Mapping[str, frozenset[str]]:
    """Return the imported modules of each module."""
    return {
        name: frozenset(imports_of(path.read_text(), name)) - {name}
        for name, path in modules().items()
    }


def rank_of(module: str) -> int:
    """Return the number of a module's layer; lower layers have larger numbers."""
    if module in FACE:
        return -1
    first = module.split(".")[1]
    if first in LAYERS:
        return LAYERS.index(first)
    assert not (PACKAGE / first).is_dir(), f"{first}/ is in no layer: add it to LAYERS"
    return len(LAYERS)


def circle_in(edges: Mapping[str, Iterable[str]]) -> list[str] | None:
    """Return the names along a circle, None without one."""
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> list[str] | None:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return None
        for below in sorted(edges.get(name, ())):
            if (found := walk(below, [*way, name])) is not None:
                return found
        done.add(name)
        return None

    return next((found for name in sorted(edges) if (found := walk(name, []))), None)


# -- the rules for Python, as functions of the graph -----------------------------------


def upward_imports(edges: Mapping[str, Iterable[str]]) -> list[str]:
    return [
        f"{name} imports {other}"
        for name, others in edges.items()
        for other in others
        if rank_of(other) < rank_of(name)
    ]


def imports_between_members(edges: Mapping[str, Iterable[str]]) -> list[str]:
    """Return imports between formats, between verbs, and between commands."""
    formats = {f"imgcore.formats.{name}" for name in folders_of("formats")}
    formats.discard("imgcore.formats.shared")
    verbs = {name for name in modules() if name.startswith("imgcore.verbs.")}
    commands = {name.replace(".verbs.", ".cli.") for name in verbs}
    return [
        f"{name} imports {other}"
        for members in (formats, verbs, commands)
        for name, others in edges.items()
        for other in others
        if (own := member_of(name, members)) and own != (member_of(other, members) or own)
    ]


def member_of(module: str, members: Iterable[str]) -> str | None:
    return next((one for one in members if f"{module}.".startswith(f"{one}.")), None)


def stray_imports_of_formats(edges: Mapping[str, Iterable[str]]) -> list[str]:
    """Return imports of formats other than protocols, shared modules, lower layers."""
    members = [f"imgcore.formats.{name}" for name in folders_of("formats")]
    allowed = (*FORMAT_MAY_IMPORT, *(f"imgcore.{layer}" for layer in FORMAT_LAYERS))
    return [
        f"{name} imports {other}"
        for name, others in edges.items()
        if (own := member_of(name, members))
        for other in others
        if rank_of(other) < len(LAYERS) and not member_of(other, (own, *allowed))
    ]


RULES = (upward_imports, imports_between_members, stray_imports_of_formats)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_python_imports(rule: object) -> None:
    assert callable(rule)
    assert rule(graph()) == []


def test_python_modules_import_in_no_circle() -> None:
    assert circle_in(graph()) is None


@pytest.mark.parametrize(
    ("module", "other", "rule"),
    [
        ("imgcore.engine.job", "imgcore.verbs.convert", upward_imports),
        ("imgcore.errors", "imgcore.files.host_file", upward_imports),
        ("imgcore.formats.vhd.reader", "imgcore.formats.vhdx.reader", imports_between_members),
        ("imgcore.verbs.convert", "imgcore.verbs.compare", imports_between_members),
        ("imgcore.cli.convert", "imgcore.cli.compare", imports_between_members),
        ("imgcore.formats.vhd.reader", "imgcore.streams.reader", stray_imports_of_formats),
        ("imgcore.formats.vhd.reader", "imgcore.formats.registry", stray_imports_of_formats),
        ("imgcore.formats.shared.tables", "imgcore.formats.registry", stray_imports_of_formats),
    ],
)
def test_the_rules_notice(module: str, other: str, rule: object) -> None:
    """Each rule reports an import that breaks it."""
    assert {module, other} <= set(modules())
    assert callable(rule)
    assert rule({module: {other}}) == [f"{module} imports {other}"]


def test_circles_are_noticed() -> None:
    assert circle_in({"a": ["b"], "b": ["c"], "c": ["a"]}) == ["a", "b", "c", "a"]
    assert circle_in({"a": ["b", "c"], "b": ["c"], "c": []}) is None


def test_the_tables_name_what_exists() -> None:
    for layer in (*LAYERS, *FORMAT_LAYERS, *GENERAL_LAYERS):
        assert (PACKAGE / layer / "__init__.py").is_file(), layer
    for name in (*FACE, *FORMAT_MAY_IMPORT):
        assert name in modules(), name
    for folder in (name for names in C_LAYERS for name in names):
        assert (NATIVE / folder).is_dir(), folder


@cache
def names_of_formats() -> frozenset[str]:
    """Return every name, alias and subformat of the registered formats."""
    from imgcore.formats.option_texts import options_help
    from imgcore.formats.registry import DRIVERS, get_driver

    names = {name for entry in DRIVERS for name in (entry.name, *entry.aliases)}
    for entry in DRIVERS:
        for name, values, *_ in options_help(get_driver(entry.name)):
            names.update(values.split("|") if name == "subformat" else ())
    return frozenset(names)


def named_formats(text: str) -> list[str]:
    """Return the strings of a module that are exactly the name of a format."""
    constants = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
    return [node.value for node in constants if node.value in names_of_formats()]


def test_general_code_names_no_format() -> None:
    """It asks drivers and readers; help texts and docstrings may name formats."""
    found = {
        name: words
        for name, path in modules().items()
        if name.startswith(tuple(f"imgcore.{layer}." for layer in GENERAL_LAYERS))
        and (words := named_formats(path.read_text()))
    }
    assert found == {}


def test_names_of_formats_are_noticed() -> None:
    assert named_formats('"""raw"""\nif kind == "vmfs" or name in ("vpc", b"raw", 1): ...') == [
        "raw",
        "vmfs",
        "vpc",
    ]


def test_no_file_shells_out() -> None:
    """imgcore never starts another program."""
    for path in PACKAGE.rglob("*.py"):
        for word in ("subprocess", "os.system", "os.popen"):
            assert word not in path.read_text(), f"{path}: {word}"


def uses_of_descriptors(text: str) -> list[int]:
    """Return the lines that use an attribute ``fd``."""
    nodes = ast.walk(ast.parse(text))
    return [node.lineno for node in nodes if isinstance(node, ast.Attribute) and node.attr == "fd"]


def test_descriptors_stay_in_files() -> None:
    """Other layers use the interface in `imgcore.files.byte_source`."""
    assert uses_of_descriptors("os.fstat(file.fd)") == [1]
    for name, path in modules().items():
        if path.suffix == ".py" and not name.startswith("imgcore.files."):
            assert uses_of_descriptors(path.read_text()) == [], name


# -- the rules for tests and documents -------------------------------------------------


def stray_imports_of_tests(text: str, path: Path) -> list[str]:
    """Return the forbidden imports of a file of the tests.

    Nothing imports a module of tests (``test_*.py``).  Of the tests, such a module
    imports only ``tests.helpers`` and modules of its own folder.
    """
    own = (path.parent.relative_to(ROOT).parts, ("tests", "helpers"))
    found = []
    for name in names_imported(text, str(path)):
        parts = tuple(name.split("."))
        if parts[0] != "tests":
            continue
        is_test = any(part.startswith("test_") for part in parts)
        is_far = path.name.startswith("test_") and not any(parts[: len(o)] == o for o in own)
        if is_test or is_far:
            found.append(f"{path.relative_to(ROOT)} imports {name}")
    return found


def test_no_test_module_imports_another() -> None:
    """Shared code belongs in tests/helpers or in a module of the folder."""
    paths = sorted(TESTS.rglob("*.py"))
    assert [x for path in paths for x in stray_imports_of_tests(path.read_text(), path)] == []


@pytest.mark.parametrize(
    ("where", "text", "is_stray"),
    [
        ("unit/test_raw.py", "from tests.unit.test_files import way", True),
        ("unit/test_raw.py", "from tests.unit import test_files", True),
        ("unit/test_raw.py", "from tests.faults.harness import Calls", True),
        ("unit/test_raw.py", "import tests.helpers.qemu", False),
        ("faults/test_cut.py", "from tests.faults.harness import Calls", False),
        ("faults/figures.py", "from tests.faults.test_cut import cuts", True),
        ("fuzz/exercise.py", "from tests.hostile.case import CANARY", False),
    ],
)
def test_stray_imports_of_tests_are_noticed(where: str, text: str, is_stray: bool) -> None:
    assert bool(stray_imports_of_tests(text, TESTS / where)) is is_stray


@pytest.mark.parametrize(
    ("root", "what"), [(PACKAGE, "__init__.py"), (NATIVE, "*.[ch]")], ids=["python", "native"]
)
def test_every_folder_is_described(root: Path, what: str) -> None:
    """ARCHITECTURE.md names each folder of the code, with a slash at its end."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    folders = sorted({path.parent for path in root.rglob(what)} - {root})
    assert len(folders) > 5
    assert [f"{f}/" for f in folders if not re.search(rf"\b{f.name}/", text)] == []


# -- the rules for C -------------------------------------------------------------------


def test_c_includes_point_down() -> None:
    folders = {name: rank for rank, names in enumerate(C_LAYERS) for name in names}
    for path in (path for folder in folders for path in (NATIVE / folder).glob("*.[ch]")):
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
    """It does not read the environment either: callers make every choice."""
    forbidden = re.compile(r"\b(printf|fprintf|abort|exit|getenv|assert)\s*\(")
    for folder in (name for names in C_LAYERS for name in names):
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


def c_code(path: Path) -> str:
    """Return a C file without comments and without the content of strings."""
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
    # A definition starts in the first column; its brace or initialiser ends the match.
    head = r"^(?!static\b|typedef\b|extern\b)[A-Za-z_][\w \t*]*?[ \t*]"
    functions = re.findall(head + r"(\w+)\([^;{}]*\)\s*\{", code, re.MULTILINE)
    objects = re.findall(head + r"(\w+)(?:\[[^\]]*\])?\s*=\s*[^=]", code, re.MULTILINE)
    return {*functions, *objects}


def c_uses() -> dict[str, set[str]]:
    """Return the other C files whose functions or objects each C file names."""
    codes = {str(path.relative_to(NATIVE)): c_code(path) for path in c_files("c")}
    owners = {name: file for file, code in codes.items() for name in c_definitions(code)}
    words = {file: set(re.findall(r"\w+", code)) for file, code in codes.items()}
    return {
        file: {owners[word] for word in named if word in owners} - {file}
        for file, named in words.items()
    }


def c_includes() -> dict[str, set[str]]:
    """Return the headers of this project that each header includes."""
    found = {}
    for path in c_files("h"):
        names = re.findall(r'#\s*include\s*"([^"]+)"', c_code(path))
        found[str(path.relative_to(NATIVE))] = {
            f"include/{name}" if name == "imgc.h" else name for name in names
        }
    return found


def test_c_files_do_not_call_in_circles() -> None:
    uses = c_uses()
    # The patterns above must still find these.
    assert {"engine/worker.c", "engine/placer.c"} <= uses["engine/job.c"]
    assert {"io/io.c", "kernels/zero.c"} <= uses["kernels/variants.c"]
    assert circle_in(uses) is None


def test_c_headers_do_not_include_in_circles() -> None:
    includes = c_includes()
    assert "engine/source.h" in includes["engine/engine.h"]
    assert circle_in(includes) is None
