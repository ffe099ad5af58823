"""MkDocs hook: documents outside ``docs/`` are pages of the site.

Documents link to each other by their paths in the repository.  The site has other
paths, so the hook rewrites the links.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

# Path in the repository: path in the site.
PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "LICENSE": "LICENSE",
    "benchmarks/BENCHMARKING.md": "benchmarking.md",
}
_ORIGINS = {site: repository for repository, site in PAGES.items()}
_LINK = re.compile(r"\]\((?P<path>[^)#:\s]+)(?=[)#])")


def on_files(files: Files, config: Any) -> Files:
    """Add the documents outside ``docs/``."""
    root = Path(config.config_file_path).parent
    for repository, site in PAGES.items():
        files.append(File.generated(config, site, abs_src_path=str(root / repository)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the links of a page."""
    return site_links(markdown, page.file.src_uri)


def site_links(markdown: str, site_path: str) -> str:
    """Return a document of the repository with links for the site."""
    folder = posixpath.dirname(_ORIGINS.get(site_path, f"docs/{site_path}"))

    def rewritten(match: re.Match[str]) -> str:
        repository = posixpath.normpath(posixpath.join(folder, match["path"]))
        site = PAGES.get(repository, repository.removeprefix("docs/"))
        return "](" + posixpath.relpath(site, posixpath.dirname(site_path) or ".")

    return _LINK.sub(rewritten, markdown)
