"""Describes an open image by its headers, in the keys of ``qemu-img info``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from imgcore.text import without_secrets

if TYPE_CHECKING:
    from collections.abc import Iterable

    from imgcore.disk.layer import Layer
    from imgcore.files.byte_source import ByteSource

# Keys of Reader.info() that belong beside "format-specific", not inside it.
_TOP_LEVEL_KEYS: Final = ("cluster-size", "compressed", "snapshots")
_OWN_KEYS: Final = (*_TOP_LEVEL_KEYS, "dirty-flag", "backing-filename", "backing-filename-format")


def describe_layer(layer: Layer) -> dict[str, Any]:
    """Return the description of one image of a chain."""
    file, reader = layer.file, layer.reader
    answer = dict(reader.info())
    result: dict[str, Any] = {
        "filename": file.path,
        "format": reader.format_name,
        "virtual-size": reader.virtual_size,
        "actual-size": allocated_nbytes([file, *(source.file for source in reader.sources)]),
        "dirty-flag": bool(answer.get("dirty-flag", False)),
    }
    result |= {key: answer[key] for key in _TOP_LEVEL_KEYS if answer.get(key) is not None}
    if reader.backing is not None:
        name = _shown(reader.backing.name)
        result["backing-filename"] = name
        result["full-backing-filename"] = _full_name(file.path, name)
        if reader.backing.format is not None:
            result["backing-filename-format"] = reader.backing.format
    specific = answer.pop("format-specific", None)
    if specific is None:
        data = {key: value for key, value in answer.items() if key not in _OWN_KEYS}
        specific = {"type": reader.format_name, "data": data}
    if specific["data"]:
        result["format-specific"] = _shown(specific)
    return result


def _shown(value: Any) -> Any:
    """Return a value without the credentials that names in it may contain."""
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, dict):
        return {key: _shown(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(item) for item in value]
    return value


def _full_name(path: str, name: str) -> str:
    """Return the path that a name leads to; a URL or description stays as it is."""
    # QEMU block.c, path_has_protocol.
    if ":" in name.partition("/")[0]:
        return name
    return os.path.join(os.path.dirname(path), name)


def allocated_nbytes(files: Iterable[ByteSource]) -> int:
    """Return the bytes that the host has allocated to the files; each counts once."""
    distinct = {file.identity: file for file in files}
    return sum(file.allocated_nbytes for file in distinct.values())
