"""The codecs of compressed raw disks, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from imgcore.streams.gzip import GzipDecoder, GzipEncoder, is_gzip
from imgcore.streams.zstd import ZstdDecoder, ZstdEncoder, content_nbytes, is_zstd

if TYPE_CHECKING:
    from imgcore.files.byte_source import ByteSource
    from imgcore.files.target_file import TargetFile
    from imgcore.streams.decoder import Decoder, Input
    from imgcore.streams.encoder import Encoder


class StreamCodec(NamedTuple):
    """The functions and classes of a codec.

    Attributes
    ----------
    matches : callable
        Takes a file's first four bytes, and returns whether it is such a stream.
    content_nbytes : callable
        Returns the decompressed size that a file states, or None if it states none.
    decoder, encoder : callable
        The decoder takes the compressed bytes in order.  The encoder takes a file, the
        number of bytes to expect, and a number of threads, which does not change the
        bytes written.
    takes_turns : bool
        Whether the encoder has a thread besides the calling one in any case.
    """

    matches: Callable[[bytes], bool]
    content_nbytes: Callable[[ByteSource], int | None]
    decoder: Callable[[Input], Decoder]
    encoder: Callable[[TargetFile, int | None, int], Encoder]
    takes_turns: bool = False


CODECS: Final = {
    "zstd": StreamCodec(is_zstd, content_nbytes, ZstdDecoder, ZstdEncoder, takes_turns=True),
    # A gzip member states its size modulo 2^32, and further members may follow.
    "gzip": StreamCodec(
        is_gzip,
        lambda file: None,
        GzipDecoder,
        lambda file, nbytes, threads: GzipEncoder(file, threads),
    ),
}
