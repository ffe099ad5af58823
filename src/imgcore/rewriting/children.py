"""Finds images that name an image, before it changes its format.

A child states the format of its parent, and a descriptor that of the file of its disk.
With another one, they would read wrong bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from imgcore.disk.image_names import NotLocalError, is_description, parse_description
from imgcore.errors import ImgcoreError, LimitExceededError, UnsupportedFeatureError
from imgcore.files.host_file import HostFile
from imgcore.files.identity import named_identity
from imgcore.files.reference_gate import ReferenceGate
from imgcore.formats.registry import format_names, get_driver, probe
from imgcore.limits import KIB, MAX_SEARCHED_FILES
from imgcore.log import silenced

if TYPE_CHECKING:
    from imgcore.disk.image import Image
    from imgcore.files.identity import Identity
    from imgcore.formats.api import BackingReference

_FILE_PROTOCOL: Final = "file:"
_HEADERS_NBYTES: Final = 64 * KIB


def refuse_children(image: Image, allow: Sequence[str]) -> None:
    """Raise UnsupportedFeatureError if a file beside an image has it as its parent.

    Parameters
    ----------
    image : Image
    allow : sequence of str
        Further folders that are searched.

    Notes
    -----
    The names in images are compared; no file is opened that only an image names.
    """
    own = {file.identity for file in image.every_file()}
    files: list[str] = []
    names: set[str] = set()
    for folder in dict.fromkeys((os.path.dirname(image.path) or ".", *allow)):
        for path, identity in _files(folder):
            if identity in own:
                names.add(os.path.basename(path))
            else:
                files.append(path)
        if len(files) > MAX_SEARCHED_FILES:
            raise LimitExceededError(
                f"more than {MAX_SEARCHED_FILES} files are beside it, any of which may be its "
                "child: move it to another folder first",
                path=image.path,
            )
    with silenced():
        child = next((path for path in files if _is_child(path, image, own, names)), None)
    if child is not None:
        raise UnsupportedFeatureError(
            f"is the parent of {child}, or holds its disk, and that states its format: "
            "imgcore convert makes one image of both",
            path=image.path,
        )


def _files(folder: str) -> Iterator[tuple[str, Identity]]:
    """Yield the regular files of a folder, also those that links lead to."""
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):
                if entry.is_file():
                    # The current folder has no name in messages.
                    path = entry.path.removeprefix(f".{os.sep}")
                    yield path, named_identity(path)


def _is_child(path: str, image: Image, own: set[Identity], names: set[str]) -> bool:
    extents: list[str] = []
    try:
        reference = _parent_of(path, extents)
    except UnsupportedFeatureError:
        # Other programs may read it.
        return _mentions(path, names)
    if any(_leads_to(os.path.dirname(path), name, own, names) for name in extents):
        return True
    if reference is None:
        return False
    if reference.identities:
        ours = image.reader.identities
        return all(
            ours.get(key) in (value, reference.alternatives.get(key))
            for key, value in reference.identities.items()
        )
    folder = os.path.dirname(path)
    return any(
        _leads_to(folder, name, own, names) for name in (reference.name, *reference.other_names)
    )


class _ClosedGate(ReferenceGate):
    """A gate that opens nothing, and notes what the disk of an image is in."""

    def __init__(self, image: str, extents: list[str]) -> None:
        super().__init__(os.path.dirname(image), (), share=True, image=image, unstated="-f")
        self._noted = extents

    def open(
        self, name: str, *, share: bool | None = None, role: str = "file", remedy: str = ""
    ) -> HostFile:
        if role == "extent":
            self._noted.append(name)
        return super().open(name, share=share, role=role, remedy=remedy)


def _parent_of(path: str, extents: list[str]) -> BackingReference | None:
    """Return the parent that a file names; None if it is no image, or has none.

    The files that it names for its own disk are added to ``extents``.
    """
    try:
        with HostFile.open(path, share=True) as file:
            found = probe(file)
            if found not in format_names():
                return None
            reader = get_driver(found).open(file, _ClosedGate(path, extents))
            try:
                return reader.backing
            finally:
                reader.close()
    except UnsupportedFeatureError:
        raise
    except (OSError, ImgcoreError):
        # Nobody can read it as an image.
        return None


def _mentions(path: str, names: set[str]) -> bool:
    """Tell whether one of our names is at the start of a file, where headers are."""
    try:
        with HostFile.open(path, share=True) as file:
            head = file.pread(0, min(_HEADERS_NBYTES, file.nbytes))
    except (OSError, ImgcoreError):
        return False
    return any(os.fsencode(name) in head for name in names)


def _leads_to(folder: str, name: str, own: set[Identity], names: set[str]) -> bool:
    """Tell whether the name that a child in a folder has for its parent is ours."""
    if is_description(name):
        try:
            name = parse_description(name).filename
        except NotLocalError:
            return False
    name = name.removeprefix(_FILE_PROTOCOL)
    if os.path.basename(name.replace("\\", "/")) not in names:
        return False
    try:
        return named_identity(os.path.join(folder, name)) in own
    except OSError:
        # The name is of another host, or was moved with the parent.
        return True
