"""VDI: finds the parent of a differencing image.

An image states only the UUIDs of its parent, not its name, so files are searched.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

from imgcore.errors import ImgcoreError
from imgcore.formats.api import BackingReference
from imgcore.formats.vdi import layout
from imgcore.formats.vdi.header import read_identities
from imgcore.limits import VDI_MAX_SEARCHED_FILES
from imgcore.log import log

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imgcore.files.reference_gate import ReferenceGate
    from imgcore.formats.vdi.header import VdiHeader

_SUFFIX: Final = ".vdi"
# These errors tell nothing about the file that was to be opened.
_OF_THIS_PROCESS: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def find_parent(header: VdiHeader, gate: ReferenceGate, path: str) -> BackingReference:
    """Return the parent of a differencing image.

    Parameters
    ----------
    header : VdiHeader
        Header of an image whose ``parent_uuid`` is not None.
    gate : ReferenceGate
        It opens the files that the caller has given, the ``*.vdi`` files in its folder,
        and those in the allowed folders.
    path : str
        Name of the image for messages.

    Returns
    -------
    BackingReference
        It names the files that have the parent's UUID, first those that also have its
        modification UUID.  If there are none, it has the name that VirtualBox would
        give the parent.

    Notes
    -----
    At most `VDI_MAX_SEARCHED_FILES` files are opened; a warning tells if there are
    more.  Without its parent, the image can still be described, or read with a parent
    that the user states.
    """
    wanted = header.parent_identities
    same: list[str] = []
    changed: list[str] = []
    for n_files, name in enumerate(_candidates(gate)):
        if n_files == VDI_MAX_SEARCHED_FILES:
            log.warning(
                "%s: only %d *%s files are searched for its parent with UUID %s",
                path,
                VDI_MAX_SEARCHED_FILES,
                _SUFFIX,
                header.parent_uuid,
            )
            break
        found = _identities(gate, name)
        if found.get(layout.IDENTITY_UUID) == wanted[layout.IDENTITY_UUID]:
            (same if wanted.items() <= found.items() else changed).append(name)
    names = (*same, *changed) or (f"{{{header.parent_uuid}}}{_SUFFIX}",)
    return BackingReference(names[0], "vdi", wanted, other_names=names[1:])


def _candidates(gate: ReferenceGate) -> Iterator[str]:
    """Yield names as the gate takes them, in the same order on every host."""
    yield from gate.files.names
    if gate.unstated:
        return
    for folder in filter(None, (gate.folder, *gate.allowed)):
        try:
            names = sorted(os.listdir(folder))
        except OSError as error:
            if error.errno in _OF_THIS_PROCESS:
                raise
            continue
        for name in names:
            if name.lower().endswith(_SUFFIX):
                yield name if folder == gate.folder else os.path.join(folder, name)


def _identities(gate: ReferenceGate, name: str) -> dict[str, str]:
    # A file that cannot be opened cannot be used as the parent either.
    try:
        with gate.open(name, share=True, role="parent") as file:
            return read_identities(file)
    except OSError as error:
        if error.errno in _OF_THIS_PROCESS:
            raise
        return {}
    except ImgcoreError:
        return {}
