"""VHDX: reads and writes the parent locator.

Nothing here imports NumPy.

Source: [MS-VHDX] 2.6.2.6, "Parent Locator".
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from typing import Final

from imgcore import limits
from imgcore.errors import (
    CorruptImageError,
    LimitExceededError,
    OptionError,
    UnsupportedFeatureError,
)
from imgcore.formats.api import BackingReference
from imgcore.formats.shared.windows_paths import names_from_windows_path
from imgcore.formats.vhdx import layout

# Facts by which children identify their parent, and those that they inherit from it.
DATA_WRITE_GUID: Final = "data write GUID"
LOGICAL_SECTOR_SIZE: Final = "logical sector size"
PHYSICAL_SECTOR_SIZE: Final = "physical sector size"
VIRTUAL_DISK_ID: Final = "virtual disk ID"

NIL: Final = uuid.UUID(int=0)


def read_locator(item: bytes, path: str) -> dict[str, str]:
    """Return the keys and values of a parent locator.

    Raises
    ------
    CorruptImageError, LimitExceededError, UnsupportedFeatureError
        The locator contradicts itself, is too long, or has another type than VHDX.
    """
    if len(item) < layout.LOCATOR_HEADER.size:
        raise CorruptImageError(f"the parent locator has {len(item)} bytes", path=path)
    kind, _, n_entries = layout.LOCATOR_HEADER.unpack_from(item)
    if uuid.UUID(bytes_le=kind) != layout.VHDX_LOCATOR:
        raise UnsupportedFeatureError(
            f"its parent is of the type {uuid.UUID(bytes_le=kind)}, only VHDX is supported",
            path=path,
        )
    if n_entries > limits.VHDX_MAX_LOCATOR_ENTRIES:
        raise LimitExceededError(
            f"the parent locator has {n_entries} entries, at most "
            f"{limits.VHDX_MAX_LOCATOR_ENTRIES} are allowed",
            path=path,
        )
    start = layout.LOCATOR_HEADER.size
    raw = item[start : start + n_entries * layout.LOCATOR_ENTRY.size]
    if len(raw) < n_entries * layout.LOCATOR_ENTRY.size:
        raise CorruptImageError(
            f"the parent locator has {len(item)} bytes, but {n_entries} entries need more",
            path=path,
        )
    locator: dict[str, str] = {}
    for key_at, value_at, key_nbytes, value_nbytes in layout.LOCATOR_ENTRY.iter_unpack(raw):
        key = _text(item, key_at, key_nbytes, path)
        if key in locator:
            raise CorruptImageError(f"the parent locator has the key {key!r} twice", path=path)
        locator[key] = _text(item, value_at, value_nbytes, path)
    return locator


def _text(item: bytes, offset: int, nbytes: int, path: str) -> str:
    if offset + nbytes > len(item):
        raise CorruptImageError(
            f"the parent locator has {len(item)} bytes, but one of its texts ends at "
            f"{offset + nbytes}",
            path=path,
        )
    try:
        return item[offset : offset + nbytes].decode("utf-16-le")
    except UnicodeDecodeError:
        raise CorruptImageError(
            f"the parent locator's text at {offset} is not valid UTF-16", path=path
        ) from None


def backing_reference(
    locator: Mapping[str, str], logical_sector_nbytes: int, path: str
) -> BackingReference:
    """Return the parent that a locator describes; raises CorruptImageError."""
    paths = [locator[key] for key in layout.PATH_KEYS if key in locator]
    names = [name for text in paths for name in names_from_windows_path(text)]
    if not names:
        raise CorruptImageError(
            f"the parent locator does not name a file (its keys: {', '.join(sorted(locator))})",
            path=path,
        )
    linkages = _linkages(locator, path)
    return BackingReference(
        names[0],
        "vhdx",
        {
            DATA_WRITE_GUID: linkages[0],
            LOGICAL_SECTOR_SIZE: str(logical_sector_nbytes),
        },
        alternatives={DATA_WRITE_GUID: linkages[-1]},
        other_names=tuple(dict.fromkeys(names[1:])),
    )


def _linkages(locator: Mapping[str, str], path: str) -> list[str]:
    """Return the data write GUIDs that the parent may have: one or two."""
    guids = []
    for key in (layout.LINKAGE_KEY, layout.LINKAGE2_KEY):
        if key not in locator:
            continue
        try:
            guids.append(uuid.UUID(locator[key]))
        except ValueError:
            raise CorruptImageError(
                f"the parent locator's {key} is {locator[key][:100]!r}, not a GUID", path=path
            ) from None
    wanted = [str(guid) for guid in guids if guid != NIL]
    if not wanted:
        raise CorruptImageError("the parent locator does not identify the parent", path=path)
    return wanted


def parent_locator(backing: BackingReference, target_path: str) -> bytes:
    """Return the parent locator (2.6.2.6): the parent's identity and relative path."""
    entries = {
        layout.LINKAGE_KEY: f"{{{backing.identities[DATA_WRITE_GUID]}}}",
        layout.RELATIVE_PATH_KEY: _relative_path(backing, target_path),
    }
    header = layout.LOCATOR_HEADER.pack(layout.VHDX_LOCATOR.bytes_le, 0, len(entries))
    offset = len(header) + len(entries) * layout.LOCATOR_ENTRY.size
    table = texts = b""
    for key_text, value_text in entries.items():
        key, value = key_text.encode("utf-16-le"), value_text.encode("utf-16-le")
        at = offset + len(texts)
        table += layout.LOCATOR_ENTRY.pack(at, at + len(key), len(key), len(value))
        texts += key + value
    return header + table + texts


def _relative_path(backing: BackingReference, target_path: str) -> str:
    r"""Return the parent's relative path in Windows form, such as ``.\base.vhdx``."""
    folder = os.path.dirname(os.path.abspath(target_path))
    path = os.path.relpath(backing.path or os.path.join(folder, backing.name), folder)
    text = path.replace("/", "\\")
    if not text.startswith("..\\"):
        text = ".\\" + text
    try:
        nbytes = len(text.encode("utf-16-le"))
    except UnicodeEncodeError:
        raise OptionError(f"the parent's name {path!r} is not encodable in UTF-16") from None
    # Readers, this one included, take a prefix before a colon as a drive or a protocol.
    if {"\\", ":"} & set(path) or nbytes > limits.VHDX_MAX_PATH_NBYTES:
        raise OptionError(
            f"the parent's name {path!r} cannot be stored: no backslash, no colon and up to "
            f"{limits.VHDX_MAX_PATH_NBYTES} bytes of UTF-16 are allowed"
        )
    return text
