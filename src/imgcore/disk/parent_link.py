"""The link from an image to a parent that is written to, and so changes its identity.

Two files cannot change at one moment: a mark beside the child says that its parent's
new identity is to be stored, so that a crash in between can be mended.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from imgcore.disk.backing import opened_reference
from imgcore.disk.image import Image, open_image
from imgcore.disk.layer import Layer, gate_of, open_layer
from imgcore.disk.open_options import OpenOptions
from imgcore.errors import CorruptImageError
from imgcore.files.identity import named_identity
from imgcore.files.mark import Mark
from imgcore.formats.registry import open_reader
from imgcore.limits import MAX_CHAIN_DEPTH
from imgcore.log import log

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from imgcore.files.identity import Identity
    from imgcore.formats.api import BackingReference

_SUFFIX: Final = ".imgcore-commit"


def begin_below(images: Sequence[Image], nbytes: int | None) -> None:
    """Begin to change the last image of a chain, and let those above follow it.

    Each of them is the parent of the one before, and open for writing.  An image that
    names its parent anew changes its own identity, so that the one above must follow.

    Parameters
    ----------
    images : sequence of Image
        At least two.
    nbytes : int or None
        A new size for the disk of the last one.
    """
    *children, base = images
    marks = [Mark(child.files[0], _SUFFIX) if _identities(child) else None for child in children]
    for mark, parent in zip(marks, images[1:], strict=True):
        if mark is not None:
            mark.write(_text(parent.files[0].identity))
    if nbytes is not None:
        base.resize(nbytes)
    base.begin()
    for mark, child, parent in reversed(list(zip(marks, children, images[1:], strict=True))):
        if mark is not None:
            _store(child, _facts(child, parent))
            mark.remove()


def _identities(image: Image) -> Mapping[str, str]:
    """Return what an image states of its parent's identity."""
    reference = image.reader.backing
    return {} if reference is None else reference.identities


def _text(identity: Identity) -> bytes:
    return "{} {}\n".format(*identity).encode()


def _facts(child: Image, parent: Image) -> BackingReference:
    """Return the child's reference with what the parent's file says now."""
    reference = child.reader.backing
    assert reference is not None
    file = parent.files[0].again()
    try:
        gate = gate_of(file, OpenOptions(share=True))
        reader = open_reader(file, gate, parent.format, flag="")
        with Layer(file, gate, reader) as layer:
            return opened_reference(reference, layer)
    finally:
        file.close()


def _store(child: Image, facts: BackingReference) -> None:
    """Make the child's reference right, if it is not."""
    reference = child.reader.backing
    assert reference is not None
    found = {key: facts.identities.get(key) for key in reference.identities}
    if found != dict(reference.identities) or (
        reference.modified is not None and reference.modified != facts.modified
    ):
        child.set_backing(facts)


def refresh_link(child: Image, parent: str, options: OpenOptions) -> None:
    """Store what the parent says after it was closed: it may record its last change."""
    if child.reader.backing is None or not child.is_rebasable():
        return
    with open_layer(parent, options._replace(writable=False, parents=())) as layer:
        _store(child, opened_reference(child.reader.backing, layer))


def open_mended(path: str, options: OpenOptions) -> Image:
    """Open an image for writing, after mending links that a crash has left."""
    for _ in range(MAX_CHAIN_DEPTH):
        try:
            return open_image(path, options)
        except CorruptImageError as error:
            # It names the image with the link; only that of the first is stated.
            found = error.path
            stated = options if found == path else options._replace(format=None)
            if found is None or not _mend(found, stated):
                raise
    return open_image(path, options)


def _mend(path: str, options: OpenOptions) -> bool:
    """Complete what a mark says; False without one that suits the image."""
    alone = options._replace(chain=False, parents=(), read_options=None)
    with open_image(path, alone) as child:
        mark = Mark(child.files[0], _SUFFIX)
        reference, content = child.reader.backing, mark.read()
        if content is None or reference is None or not child.is_rebasable():
            return False
        for name in (reference.name, *reference.other_names):
            parent = os.path.join(os.path.dirname(path), name)
            if not _is_marked(parent, content):
                continue
            log.warning("%s: an interrupted commit left an old link to %s: mended", path, parent)
            with open_layer(parent, OpenOptions(format=reference.format, share=True)) as layer:
                _store(child, opened_reference(reference, layer))
            mark.remove()
            return True
    return False


def _is_marked(path: str, content: bytes) -> bool:
    try:
        return _text(named_identity(path)) == content
    except (OSError, ValueError):
        return False
