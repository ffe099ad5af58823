"""The link from an image to a parent that is written to, and so changes its identity.

Two files cannot change at one moment: a mark beside the child says that its parent's
new identity is to be stored, so that a crash in between can be mended.
"""

from __future__ import annotations

import os
from itertools import pairwise
from typing import TYPE_CHECKING, Final, NamedTuple

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
    links = [
        _Link(Mark(child.files[0], _SUFFIX), child, parent)
        for child, parent in pairwise(images)
        if _identities(child)
    ]
    for link in links:
        link.mark.write(_text(link.parent.files[0].identity))
    try:
        if nbytes is not None:
            images[-1].resize(nbytes)
        images[-1].begin()
        for link in reversed(links):
            link.renew()
    except BaseException:
        # A mark that stays would also excuse a parent that changes later.  But to mend
        # one link changes the parent of the next.
        if all(link.is_right() for link in links):
            for link in links:
                link.mark.remove()
        raise


class _Link(NamedTuple):
    """A child, its parent, and the mark that says that the parent changes."""

    mark: Mark
    child: Image
    parent: Image

    def renew(self) -> None:
        """Store the parent's identity, after which the mark is not needed."""
        _store(self.child, _facts(self.child, self.parent))
        self.mark.remove()

    def is_right(self) -> bool:
        """Tell whether the child states what its parent's file says."""
        facts = _facts(self.child, self.parent)
        return not _differs(self.child, facts)


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
    if _differs(child, facts):
        child.set_backing(facts)


def _differs(child: Image, facts: BackingReference) -> bool:
    """Tell whether a child's reference does not have these facts of its parent."""
    reference = child.reader.backing
    assert reference is not None
    found = {key: facts.identities.get(key) for key in reference.identities}
    return found != dict(reference.identities) or (
        reference.modified is not None and reference.modified != facts.modified
    )


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
