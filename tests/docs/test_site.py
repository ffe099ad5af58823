"""The documents hang together: links, the site's navigation, the API reference."""

from __future__ import annotations

import re

import pytest

import imgcore
from tests.docs.documents import DOCUMENTS, ROOT

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


def test_the_site_has_every_document() -> None:
    """Pages of docs/ under their own names, the others under those that the hook gives them."""
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
    """It says what the reader gets."""
    title, blank, first = (ROOT / document).read_text().splitlines()[:3]
    assert title.startswith("# ")
    assert blank == ""
    assert re.match(r"[A-Z\[`]", first), first
