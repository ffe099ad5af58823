"""Links, the site's navigation, the API reference, and paths of the code are right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import imgcore
from tests.docs.documents import DOCUMENTS, ROOT

PACKAGE = ROOT / "src" / "imgcore"
NATIVE = ROOT / "native"
TESTS = ROOT / "tests"
PROSE_COLUMNS = 88


def without_code(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)


def test_the_api_page_lists_the_public_names() -> None:
    page = (ROOT / "docs/api.md").read_text()
    listed = re.findall(r"^::: imgcore\.(\w+)$", page, re.MULTILINE)
    assert sorted(listed) == sorted(imgcore.__all__)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files(document: str) -> None:
    path = ROOT / document
    targets = re.findall(r"\]\(([^)#:\s]+)[)#]", without_code(path.read_text()))
    assert [target for target in targets if not (path.parent / target).exists()] == []


def files_at(name: str) -> list[Path]:
    """Return the files and folders that a path in a document names.

    It may start at the repository, at ``src/imgcore`` or at ``native``, or be only a
    file's name.  A part ``x`` stands for any format.
    """
    pattern = re.sub(r"(?<![^/])x(?![^/.])", "*", name)
    found = [path for root in (ROOT, PACKAGE, NATIVE) for path in root.glob(pattern)]
    if "/" not in name:
        found += [path for root in (PACKAGE, NATIVE, TESTS) for path in root.rglob(name)]
    return found


@pytest.mark.parametrize("document", ["ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_paths_of_the_code_exist(document: str) -> None:
    """A path in backticks has a slash at its end or a suffix of source files."""
    text = without_code((ROOT / document).read_text())
    named = re.findall(r"`([\w.-][\w./-]*(?:/|\.(?:py|pyx|c|h|sh|md|toml)))(?:::\w+)?`", text)
    assert len(named) > 40
    assert [name for name in named if not files_at(name)] == []


@pytest.mark.parametrize(
    ("name", "exists"),
    [
        ("src/imgcore/cli/", True),
        ("disk/source.py", True),
        ("formats/x/options.py", True),
        ("docs/formats/x.md", True),
        ("native/engine/job.c", True),
        ("worker.c", True),
        ("native/engine/plan.c", False),
        ("disk/plan.py", False),
        ("formats/x/plan.py", False),
        ("plan.py", False),
        ("plans/", False),
    ],
)
def test_missing_paths_are_noticed(name: str, exists: bool) -> None:
    assert bool(files_at(name)) is exists


def test_the_site_has_every_document() -> None:
    """Pages of docs/ have their own names; the hook names the others."""
    nav = re.findall(r"^ +- .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    hook = (ROOT / "tools/site_pages.py").read_text()
    moved = dict(re.findall(r'^    "(\S+\.md)": "(\S+)",$', hook, re.MULTILINE))
    assert sorted(nav) == sorted(moved.get(d, d.removeprefix("docs/")) for d in DOCUMENTS)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_prose_fits_the_columns(document: str) -> None:
    lines = without_code((ROOT / document).read_text()).splitlines()
    long = [line for line in lines if len(line) > PROSE_COLUMNS and " " in line.strip()]
    assert [line for line in long if not line.startswith("|")] == []


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if d.startswith("docs/")])
def test_pages_begin_with_a_sentence(document: str) -> None:
    """The first sentence tells the reader what the page is about."""
    title, blank, first = (ROOT / document).read_text().splitlines()[:3]
    assert title.startswith("# ")
    assert blank == ""
    assert re.match(r"[A-Z\[`]", first), first
