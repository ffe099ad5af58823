"""VDI: which file is the parent of a differencing image.

An image states its parent's UUIDs and no name, so files are looked at.
"""

from __future__ import annotations

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

    from imgcore.files.gate import ReferenceGate
    from imgcore.formats.vdi.header import VdiHeader

_SUFFIX: Final = ".vdi"


def find_parent(header: VdiHeader, gate: ReferenceGate, path: str) -> BackingReference:
    """Return the parent of a differencing image.

    Parameters
    ----------
    header : VdiHeader
        Of an image whose ``parent_uuid`` is not None.
    gate : ReferenceGate
        The ``*.vdi`` files of its folder, then of the allowed ones, are opened through it.
    path : str
        The image; stands in messages.

    Returns
    -------
    BackingReference
        With the names of the files of that UUID, those of that modification first; if there
        is none, the name that VirtualBox gives to an image of that UUID.

    Notes
    -----
    No more than `VDI_MAX_SEARCHED_FILES` files are looked at; that others were not is logged as
    a warning.  The image itself can be described, and read with a parent that is given.
    """
    wanted = header.parent_identities
    same: list[str] = []
    changed: list[str] = []
    for n_files, name in enumerate(_candidates(gate)):
        if n_files == VDI_MAX_SEARCHED_FILES:
            log.warning(
                "%s: its parent, of UUID %s, is looked for in no more than %d *%s files: "
                "name it (--parent) if it is not found",
                path,
                header.parent_uuid,
                VDI_MAX_SEARCHED_FILES,
                _SUFFIX,
            )
            break
        found = _identities(gate, name)
        if found.get(layout.IDENTITY_UUID) == wanted[layout.IDENTITY_UUID]:
            (same if wanted.items() <= found.items() else changed).append(name)
    names = (*same, *changed) or (f"{{{header.parent_uuid}}}{_SUFFIX}",)
    return BackingReference(names[0], "vdi", wanted, other_names=names[1:])


def _candidates(gate: ReferenceGate) -> Iterator[str]:
    """Yield names as the gate takes them, in the same order on every machine."""
    for folder in (gate.folder, *gate.allowed):
        try:
            names = sorted(os.listdir(folder))
        except OSError:
            continue
        for name in names:
            if name.lower().endswith(_SUFFIX):
                yield name if folder == gate.folder else os.path.join(folder, name)


def _identities(gate: ReferenceGate, name: str) -> dict[str, str]:
    # Files that cannot be opened are none that the image could be read with.
    try:
        with gate.open(name, share=True) as file:
            return read_identities(file)
    except (OSError, ImgcoreError):
        return {}
