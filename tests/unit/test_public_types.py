"""The types that the package states: complete, exported, and right."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import imgcore

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "imgcore"

# -- complete --------------------------------------------------------------------------


def attributes_without_type(text: str) -> Iterator[str]:
    """Yield the public attributes of a module's classes whose type is not stated.

    Type checkers infer the same type only from one literal or annotated parameter.
    """
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ClassDef) or node.name.startswith("_"):
            continue
        stated: set[str] = set()
        unstated: dict[str, int] = {}
        literals: dict[str, str] = {}
        for statement in node.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                stated.add(statement.target.id)
            if not isinstance(statement, ast.FunctionDef):
                continue
            arguments = statement.args
            parameters = {
                one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
            }
            for part in ast.walk(statement):
                if isinstance(part, ast.AnnAssign):
                    stated.update(names_of(part.target))
                elif isinstance(part, ast.Assign):
                    literal = isinstance(part.value, ast.Constant)
                    literal |= isinstance(part.value, ast.Name) and part.value.id in parameters
                    names = [name for target in part.targets for name in names_of(target)]
                    for name in names:
                        value = ast.unparse(part.value)
                        if not literal or literals.setdefault(name, value) != value:
                            unstated[name] = part.lineno
                elif isinstance(part, ast.AugAssign):
                    unstated |= dict.fromkeys(names_of(part.target), part.lineno)
        for name, line in unstated.items():
            if name not in stated and not name.startswith("_"):
                yield f"{node.name}.{name} (line {line})"


def names_of(target: ast.expr) -> list[str]:
    """Return the attributes of ``self`` that a target assigns to."""
    if isinstance(target, ast.Tuple):
        return [name for part in target.elts for name in names_of(part)]
    if not isinstance(target, ast.Attribute) or not isinstance(target.value, ast.Name):
        return []
    return [target.attr] if target.value.id == "self" else []


def test_every_public_attribute_states_its_type() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for name in attributes_without_type(path.read_text())
    ]
    assert found == []


def test_attributes_without_a_type_are_noticed() -> None:
    text = """
        class A:
            known: int
            def __init__(self, given: int) -> None:
                self.given = given
                self.pair, self._other = f(given)
                self.known = f(given)
                self.literal = None
                self.stated: int = f(given)
                self._private = f(given)
                self.missing = f(given)
                self.counted = 0
                self.switched = False
                self.switched = True
                self.stated += 1
                self.counted += 1
    """
    found = list(attributes_without_type(textwrap.dedent(text)))
    assert [name.split()[0] for name in found] == ["A.pair", "A.missing", "A.switched", "A.counted"]


def test_types_are_complete_for_pyright() -> None:
    """`make types` installs basedpyright, which is too large for every environment."""
    if importlib.util.find_spec("basedpyright") is None:
        pytest.skip("basedpyright is not installed (make types)")
    done = subprocess.run(
        [sys.executable, "-m", "basedpyright", "--verifytypes", "imgcore", "--ignoreexternal"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Type completeness score: 100%" in done.stdout, done.stdout


# -- exported --------------------------------------------------------------------------

# What the annotations of the public names may mention besides them.
ELSEWHERE = {
    *("io", "RawIOBase", "Iterable", "socket"),
    *("None", "Any", "Callable", "Iterator", "Literal", "Mapping", "Protocol", "Self"),
    *(
        "Sequence",
        "SupportsIndex",
        "ReadableBuffer",
        "WriteableBuffer",
        "bool",
        "bytes",
        "dict",
        "float",
        "int",
        "ndarray",
        "np",
    ),
    *("list", "object", "str", "tuple", "False", "True", "BaseException", "ndarray", "np"),
}


def documented_members(name: str) -> list[str]:
    """Return the members that docs/api.md lists for a class."""
    page = (ROOT / "docs/api.md").read_text()
    listed = re.search(
        rf"^::: imgcore\.{name}\n    options:\n      members:\s*\[([^]]*)\]", page, re.M
    )
    return [] if listed is None else re.split(r",\s*", listed[1])


def annotations() -> Iterator[tuple[str, str]]:
    """Yield (where, annotation) for all that is public and documented."""
    for name in imgcore.__all__:
        value = getattr(imgcore, name)
        if inspect.isfunction(value):
            yield from ((name, str(text)) for text in value.__annotations__.values())
        elif inspect.isclass(value):
            for text in vars(value).get("__annotations__", {}).values():
                yield name, getattr(text, "__forward_arg__", str(text))
            for member in documented_members(name):
                function = inspect.getattr_static(value, member)
                function = getattr(function, "fget", function)
                texts = function.__annotations__.values()
                yield from ((f"{name}.{member}", str(text)) for text in texts)


def test_every_type_that_is_mentioned_is_exported() -> None:
    found = list(annotations())
    assert len(found) > 150
    missing = {
        (where, word)
        for where, text in found
        for word in re.findall(r"[A-Za-z_]\w*", re.sub(r"'\w+'|\"\w+\"", "", text))
        if word not in ELSEWHERE and word not in imgcore.__all__
    }
    assert missing == set()


def test_the_types_of_extents(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"x" * 4096)
    imgcore.convert(path, tmp_path / "disk.qcow2")
    with imgcore.open(tmp_path / "disk.qcow2") as image:
        batch = next(image.extents())
        assert batch.dtype == imgcore.EXTENT_DTYPE
        assert {imgcore.Kind(kind) for kind in batch["kind"]} <= set(imgcore.Kind)
        assert isinstance(image.sources[0], imgcore.SourceFile)
        assert image.sources[0].file.path == image.paths[0] == str(tmp_path / "disk.qcow2")
    assert isinstance(imgcore.measure(path), imgcore.Measurement)


# -- right -----------------------------------------------------------------------------

PROGRAM = """
import io
import os
from pathlib import Path

import numpy as np

import imgcore

class BytesPath:
    def __fspath__(self) -> bytes: return b"x"

with imgcore.open(b"disk.raw", allow=[b"x", "y", Path("z"), BytesPath()]) as image:
    for batch in image.extents(np.uint64(0), np.int32(512)):
        rows: imgcore.Extents = batch
        data: bytes = image.read(batch["guest_offset"][0], np.uint64(5))
        kind: imgcore.Kind = imgcore.Kind(batch["kind"][0])
    image.readinto(0, bytearray(5), threads=np.int64(1))
    image.readinto(0, memoryview(bytearray(5)))
    image.readinto(0, np.zeros(5, np.uint8))
    image.readinto(0, 5)  # error
    image.readinto(0, "text")  # error
    image.readinto(0.5, bytearray(5))  # error
    count: int = image.readinto(np.uint64(0), np.zeros(5, np.uint8))
    image.readv([(0, bytearray(5)), (np.uint64(5), np.zeros(5))], threads=2)
    image.readv((n, memoryview(bytearray(5))) for n in range(3))
    image.readv([bytearray(5)])  # error
    image.readv([("0", bytearray(5))])  # error
    file: io.RawIOBase = image.as_file(start=np.uint64(0), length=5)
    buffered = io.BufferedReader(image.as_file())
    for batch in image.extents(layer=np.uint16(1)):
        layer_rows: imgcore.Extents = batch
    image.refresh()
    is_closed: bool = image.closed
    image.virtual_size = 5  # error
    image.read(0, None)  # error
imgcore.open(5, mode="r", chain=False, cache="1M", files={"base.vmdk": 7})
imgcore.open("x", cache=np.uint64(5), files=None)
imgcore.open(5.0)  # error
imgcore.open("x", files={"base.vmdk": "7"})  # error
imgcore.open("x", cache=0.5)  # error
size: imgcore.Measurement = imgcore.measure(size=np.uint64(512))
both: imgcore.ReflinkMeasurement = imgcore.measure_reflink(b"disk.raw", "qcow2")
imgcore.measure_reflink("x", 5)  # error
for entry in imgcore.map(BytesPath(), start=np.uint64(0), length=True):
    place: int | None = entry.offset
imgcore.map("x", start=0.5)  # error
imgcore.create("x", "10G")  # error
imgcore.convert(b"x", Path("y"), backing=BytesPath(), sparse=np.int64(0), threads=np.uint8(1))
imgcore.convert("x", "y", sparse="64k")
imgcore.convert("x", "y", reflink="always")
imgcore.convert(5, "y")  # error
finding: imgcore.Finding = imgcore.lint("x", profile="aws").findings[0]
path: imgcore.FilePath = BytesPath()
"""


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")
def test_type_checkers_take_what_the_functions_take(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path), str(program)],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = {int(line) for line in re.findall(r"program\.py:(\d+): error", done.stdout)}
    expected = {n for n, line in enumerate(PROGRAM.splitlines(), 1) if "# error" in line}
    assert lines == expected, done.stdout
