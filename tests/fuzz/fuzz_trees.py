"""Checksum trees under a coverage-guided fuzzer; ``make fuzz`` runs it.

``python -m tests.fuzz.fuzz_trees [libFuzzer's options] CORPUS...``
"""

from __future__ import annotations

# First, so that imgcore is imported under atheris.
from tests.fuzz.instrumented import fuzz

from tests.fuzz.tree_files import TreeFolder  # isort: skip


def main() -> None:
    """Fuzz until told to stop."""
    folder = TreeFolder()
    try:
        fuzz(folder.use)
    finally:
        folder.close()


if __name__ == "__main__":
    main()
