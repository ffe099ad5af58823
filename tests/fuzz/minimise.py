"""Keeps the smallest inputs that reach something new, for a corpus to be committed.

``python -m tests.fuzz.minimise CORPUS FOLDER...`` adds inputs of all folders to CORPUS
if they reach something new, and removes those that are no longer needed.
"""

from __future__ import annotations

import hashlib
import logging
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import imgcore
from tests.fuzz.area_files import Folder
from tests.fuzz.exercise import Finding, Place
from tests.fuzz.pieces import Pieces
from tests.fuzz.tree_files import TreeFolder

PACKAGE = str(Path(imgcore.__file__).parent)
MAX_NBYTES = 4096
# By the name of the corpus; images are the rest.
PLACES: dict[str, type[Folder | TreeFolder]] = {
    "corpus_areas": Folder,
    "corpus_trees": TreeFolder,
}

Arc = tuple[str, int, int, str | None]


class Tracer:
    """Records which lines of imgcore follow which, for one format."""

    def __init__(self, format: str | None) -> None:
        self.arcs: set[Arc] = set()
        self._format = format

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        file, last = frame.f_code.co_filename, frame.f_lineno

        def line(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal last
            if event == "line":
                self.arcs.add((file, last, frame.f_lineno, self._format))
                last = frame.f_lineno
            return line

        return line


def reached(data: bytes, place: Place | Folder | TreeFolder) -> set[Arc]:
    """Return the steps that an input takes through imgcore."""
    tracer = Tracer(Pieces.unpack(data).format if isinstance(place, Place) else None)
    sys.settrace(tracer)
    threading.settrace(tracer)
    try:
        place.use(data)
    except Finding:
        pass  # tracing is slow; the fuzzer has reported real timeouts
    finally:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]
    return tracer.arcs


def main(corpus: Path, folders: list[Path]) -> None:
    """Update the corpus."""
    logging.getLogger("imgcore").addHandler(logging.NullHandler())
    logging.getLogger("imgcore").propagate = False
    corpus.mkdir(exist_ok=True)
    inputs = {path.read_bytes() for folder in (corpus, *folders) for path in folder.iterdir()}
    place = PLACES.get(corpus.name, Place)()
    known: set[Arc] = set()
    kept = set()
    for data in sorted(inputs, key=lambda data: (len(data), data)):
        if len(data) > MAX_NBYTES:
            continue
        arcs = reached(data, place)
        if not arcs <= known:
            known |= arcs
            kept.add(hashlib.sha1(data).hexdigest()[:16])
            (corpus / hashlib.sha1(data).hexdigest()[:16]).write_bytes(data)
    for path in corpus.iterdir():
        if path.name not in kept:
            path.unlink()
    place.close()
    print(f"{len(kept)} of {len(inputs)} inputs kept")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
