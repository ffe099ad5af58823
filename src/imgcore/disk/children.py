"""Finds the images that name an image, before it changes.

A child states the format of its parent, and a descriptor that of the file of its disk.
If they change, it reads wrong bytes.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

from imgcore.disk.image_names import NotLocalError, is_description, parse_description
from imgcore.errors import ImgcoreError, LimitExceededError, UnsupportedFeatureError
from imgcore.files.host_file import HostFile
from imgcore.files.identity import named_identity
from imgcore.files.reference_gate import ReferenceGate
from imgcore.formats.registry import format_names, get_driver, probe
from imgcore.limits import KIB, MAX_SEARCHED_FILES
from imgcore.log import log, silenced

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
    children = _children(image, allow)
    if children is None:
        raise LimitExceededError(
            f"more than {MAX_SEARCHED_FILES} files are beside it, any of which may be its "
            "child: move it to another folder first",
            path=image.path,
        )
    child = next(children, None)
    if child is not None:
        raise UnsupportedFeatureError(
            f"is the parent of {child}, or holds its disk, and that states its format: "
            "imgcore convert makes one image of both",
            path=image.path,
        )


def warn_about_children(
    image: Image, allow: Sequence[str], *, but: Collection[Identity] = ()
) -> None:
    """Log a warning if files beside an image have it as their parent: it changes.

    Parameters
    ----------
    image : Image
    allow : sequence of str
        Further folders that are searched.
    but : collection of Identity
        Files that may depend on it.
    """
    _warn(image, _warning(image, allow, but))


def warn_about_new_identity(image: Image, allow: Sequence[str]) -> None:
    """Warn as `warn_about_children` if an image gets an identity with a new link."""
    if image.reader.identities:
        warn_about_children(image, allow)


@contextmanager
def warned_about_children(image: Image, allow: Sequence[str]) -> Iterator[None]:
    """Warn as `warn_about_children` after a ``with`` block, unless that raises.

    The children are found before, by the identity that the block may change.
    """
    text = _warning(image, allow)
    yield
    _warn(image, text)


def _warn(image: Image, text: str | None) -> None:
    if text is not None:
        log.warning("%s: %s", image.path, text)


def _warning(image: Image, allow: Sequence[str], but: Collection[Identity] = ()) -> str | None:
    """Return what to say about the children of an image that changes; None without."""
    children = _children(image, allow, but)
    if children is None:
        return (
            f"more than {MAX_SEARCHED_FILES} files are beside it, any of which may be its child; "
            "they were not searched"
        )
    names = list(children)
    if not names:
        return None
    text = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    return (
        f"is the parent of {text}, and changes: what depends on it reads other data then, or is "
        "refused"
    )


def _children(
    image: Image, allow: Sequence[str], but: Collection[Identity] = ()
) -> Iterator[str] | None:
    """Return the files in the image's folder that name it; None if there are too many.

    An image that was given by its descriptor has no folder.
    """
    folder = image.files[0].folder
    own = {file.identity for file in image.every_file()}
    files: list[str] = []
    names: set[str] = set()
    folders = () if folder is None else (os.path.dirname(image.path) or ".",)
    for searched in dict.fromkeys((*folders, *allow)):
        for path, identity in _files(searched):
            if identity in own:
                names.add(os.path.basename(path))
            elif identity not in but:
                files.append(path)
        if len(files) > MAX_SEARCHED_FILES:
            return None
    return _naming(image, files, own, names)


def _naming(
    image: Image, files: Iterable[str], own: set[Identity], names: set[str]
) -> Iterator[str]:
    for path in files:
        with silenced():
            is_child = _is_child(path, image, own, names)
        if is_child:
            yield path


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
            key in ours and ours[key] in (value, reference.alternatives.get(key))
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
