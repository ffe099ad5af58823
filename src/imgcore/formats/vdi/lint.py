"""Lint rules for VDI."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from imgcore.formats.shared.lint import Rule
from imgcore.formats.vdi.reader import VdiReader
from imgcore.limits import VDI_MAX_WRITTEN_BLOCK_NBYTES, VDI_MIN_WRITTEN_BLOCK_NBYTES

if TYPE_CHECKING:
    from imgcore.formats.shared.lint import ImageFacts


def _has_uuids(facts: ImageFacts) -> str | None:
    if not isinstance(facts.reader, VdiReader):
        return None
    header = facts.reader.header
    uuids = {"uuid": header.uuid, "modification-uuid": header.modification_uuid}
    names = [name for name, uuid in uuids.items() if uuid.int == 0]
    return f"VirtualBox needs UUIDs, but these are zero: {', '.join(names)}" if names else None


def _blocks_fit(facts: ImageFacts) -> str | None:
    if not isinstance(facts.reader, VdiReader):
        return None
    low, high = VDI_MIN_WRITTEN_BLOCK_NBYTES, VDI_MAX_WRITTEN_BLOCK_NBYTES
    nbytes = facts.reader.block_nbytes
    if low <= nbytes <= high:
        return None
    return f"blocks of {nbytes} bytes, supported are {low} to {high}"


UUIDS: Final = Rule("vdi-uuid", _has_uuids)
BLOCK_SIZE: Final = Rule("vdi-block-size", _blocks_fit)
