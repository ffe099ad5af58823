"""The files that extents refer to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from imgcore.files.update_file import UpdateFile

if TYPE_CHECKING:
    from imgcore import _core
    from imgcore.files.byte_source import ByteSource


_NO_END: Final = 1 << 62


class SourceFile(NamedTuple):
    """A host file that extents refer to by their index in ``sources``.

    Attributes
    ----------
    file : ByteSource
    guest_base, block_nbytes : int
        Bytes.  Compressed blocks start at ``guest_base + k * block_nbytes`` of the
        disk; ``block_nbytes`` is 0 for a file without them.
    """

    file: ByteSource
    guest_base: int = 0
    block_nbytes: int = 0


def native_sources(sources: Sequence[SourceFile]) -> list[tuple[_core.File, int, int, int]]:
    """Return source files as the engine takes them.

    The engine does not verify the size of a file that is written in place: it grows.
    """
    return [
        (
            source.file.core,
            _NO_END if isinstance(source.file, UpdateFile) else source.file.nbytes,
            source.guest_base,
            source.block_nbytes,
        )
        for source in sources
    ]
