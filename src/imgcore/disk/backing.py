"""The parent of a new image."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from imgcore.border import FilePath, file_name
from imgcore.errors import OptionError
from imgcore.files.reference_gate import PROTOCOL
from imgcore.formats.api import BackingReference, Inheritable
from imgcore.formats.registry import canonical_name

if TYPE_CHECKING:
    from imgcore.disk.layer import Layer


def backing_reference(
    target: str, backing: FilePath | None, backing_format: str | None
) -> BackingReference | None:
    """Return the reference to store; OptionError if only one of the two is given."""
    if backing is None:
        if backing_format is not None:
            raise OptionError(
                "a format of the backing file is given (-F), but no backing file", path=target
            )
        return None
    if backing_format is None:
        raise OptionError(
            "the backing file's format is never guessed: state it with -F", path=target
        )
    return BackingReference(file_name(backing), canonical_name(backing_format))


def backing_path(target: str, reference: BackingReference) -> str:
    """Return the parent's path; a relative name starts at the folder of the target."""
    path = os.path.join(os.path.dirname(target), reference.name)
    # A URL or a description starts nowhere.
    is_file = not PROTOCOL.match(reference.name) or os.path.lexists(path)
    return path if is_file else reference.name


def opened_reference(reference: BackingReference, parent: Layer) -> BackingReference:
    """Return the reference with the facts that a child stores about its parent."""
    reader = parent.reader
    return reference._replace(
        identities=dict(reader.identities),
        modified=parent.file.modified,
        path=os.path.abspath(parent.file.path),
        virtual_size=reader.virtual_size,
        inherited=reader.inherited() if isinstance(reader, Inheritable) else (),
    )
