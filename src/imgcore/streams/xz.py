"""Reads xz streams, by the decompressor of the standard library.

Source: The .xz File Format 1.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from imgcore.errors import CorruptImageError, ImgcoreError, LimitExceededError
from imgcore.limits import MIB
from imgcore.streams.decoder import READ_NBYTES, MembersDecoder

if TYPE_CHECKING:
    pass

# Section 2.1.1.1, "Header Magic Bytes".
_MAGIC: Final = b"\xfd7zXZ\x00"
# `xz -9` needs 65 MiB, for a dictionary of 64 MiB.
_MAX_MEMORY_NBYTES: Final = 256 * MIB


def is_xz(head: bytes) -> bool:
    """Tell whether a file with these first bytes is an xz stream."""
    return head.startswith(_MAGIC)


class XzDecoder(MembersDecoder):
    def _decompress(self, room: int) -> bytes:
        import lzma

        stream = self._member
        if stream.needs_input and not self._pending:
            self._pending = self._input.read(READ_NBYTES)
            if not self._pending:
                raise CorruptImageError("the xz stream ends too early", path=self._path)
        try:
            data: bytes = stream.decompress(self._pending, room)
        except lzma.LZMAError as error:
            raise self._failure(error) from error
        self._pending = b""
        if stream.eof:
            self._pending, self._member = stream.unused_data, None
        return data

    def _failure(self, error: Exception) -> ImgcoreError:
        if "limit" in str(error):
            return LimitExceededError(
                f"the xz stream needs more than {_MAX_MEMORY_NBYTES // MIB} MiB of memory",
                path=self._path,
            )
        return CorruptImageError(f"the xz stream is broken: {error}", path=self._path)

    def _next_member(self) -> Any:
        # Zeros after a stream are padding.
        import lzma

        if self._n_members:
            self._skip_padding()
            if not self._pending:
                return None
        while len(self._pending) < len(_MAGIC) and (more := self._input.read(READ_NBYTES)):
            self._pending += more
        if not is_xz(self._pending):
            what = "there is garbage after the xz stream" if self._n_members else "no xz stream"
            raise CorruptImageError(what, path=self._path)
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MAX_MEMORY_NBYTES)

    def _skip_padding(self) -> None:
        self._pending = self._pending.lstrip(b"\0")
        while not self._pending and (more := self._input.read(READ_NBYTES)):
            self._pending = more.lstrip(b"\0")
