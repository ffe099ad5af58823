"""The descriptor file of a VMDK whose disk is in a flat file beside it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from imgcore.errors import OptionError
from imgcore.formats.vmdk.descriptor import compose_descriptor
from imgcore.formats.vmdk.options import FLAT_KINDS, is_plain_name

if TYPE_CHECKING:
    from imgcore.formats.vmdk.options import WriteOptions


def data_file_name(name: str) -> str:
    """Return the name of the flat file beside the descriptor file ``name``."""
    stem, suffix = os.path.splitext(name)
    return f"{stem if suffix.lower() == '.vmdk' else name}-flat.vmdk"


def flat_descriptor(options: WriteOptions) -> bytes:
    """Return the descriptor of a new monolithicFlat or vmfs disk."""
    kind = FLAT_KINDS[options.subformat]
    line = f'RW {options.n_sectors} {kind} "{data_file_name(options.name)}"'
    if kind == "FLAT":
        line += " 0"
    return compose_descriptor(options.subformat, line, options.n_sectors, options.database)


def refuse_odd_name(name: str, path: str | None = None) -> None:
    """Raise OptionError for a name that a descriptor cannot hold."""
    if not is_plain_name(name):
        raise OptionError(
            "a name with quotes, colons, control characters or bytes that are not UTF-8 cannot "
            "be written in a VMDK descriptor",
            path=path,
        )
