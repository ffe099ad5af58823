"""Every test that the documents with promises name exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
_LINK = re.compile(r"`((?:tests|native/tests)/[\w/]+\.(?:py|c))::([\w:]+)`")


def links(document: str) -> list[tuple[str, str]]:
    """Return file and name of each test that a document names."""
    return _LINK.findall((ROOT / document).read_text())


def names(path: Path) -> set[str]:
    """Return the tests of a file, those of classes as ``Class::test``."""
    if path.suffix == ".c":
        return set(re.findall(r"^static void (\w+)\(", path.read_text(), re.MULTILINE))
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{x.name}" for x in node.body if isinstance(x, ast.FunctionDef)}
    return found


@pytest.mark.parametrize("document", ["docs/reliability.md", "docs/embedding.md", "SECURITY.md"])
def test_named_tests_exist(document: str) -> None:
    found = links(document)
    assert found
    missing = [(file, name) for file, name in found if name not in names(ROOT / file)]
    assert not missing


@pytest.mark.parametrize(
    ("document", "n"), [("docs/reliability.md", 25), ("docs/embedding.md", 15)]
)
def test_every_promise_names_a_test(document: str, n: int) -> None:
    text = (ROOT / document).read_text()
    pattern = r"^\d+\. \*\*.*?(?=^\d+\. \*\*|^#|^\||\Z)"
    promises = re.findall(pattern, text, re.MULTILINE | re.DOTALL)
    assert len(promises) >= n
    assert [promise[:60] for promise in promises if not _LINK.search(promise)] == []
