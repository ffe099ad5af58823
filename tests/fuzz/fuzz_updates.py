"""Writing in place under a coverage-guided fuzzer (atheris): ``make fuzz`` runs it.

``python -m tests.fuzz.fuzz_updates [libFuzzer's options] CORPUS...``
"""

from __future__ import annotations

# First, so that imgcore is imported under atheris.
from tests.fuzz.instrumented import fuzz

from tests.fuzz import structure, updating  # isort: skip


def main() -> None:
    """Fuzz until told to stop."""
    place = updating.UpdatePlace()
    try:
        fuzz(place.use, structure.mutate)
    finally:
        place.close()


if __name__ == "__main__":
    main()
