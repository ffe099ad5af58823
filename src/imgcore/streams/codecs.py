"""The codecs of compressed raw disks, by their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from imgcore.streams.gzip import GzipDecoder, GzipEncoder, is_gzip
from imgcore.streams.zstd import ZstdDecoder, ZstdEncoder, content_nbytes, is_zstd

if TYPE_CHECKING:
    from imgcore.files.byte_source import ByteSource
    from imgcore.files.target_file import TargetFile
    from imgcore.streams.decoder import Decoder
    from imgcore.streams.encoder import Encoder


class StreamCodec(NamedTuple):
    """The functions and classes of a codec.

    Attributes
    ----------
    matches : callable
        Tells by a file's first four bytes whether the file is such a stream.
    content_nbytes : callable
        Returns the bytes that a file says it decompresses to, or None if it does not say so.
    decoder, encoder : callable
        The encoder takes a file, how many bytes it will be given, and a number of threads; the
        bytes that it writes do not depend on the latter.
    """

    matches: Callable[[bytes], bool]
    content_nbytes: Callable[[ByteSource], int | None]
    decoder: Callable[[ByteSource], Decoder]
    encoder: Callable[[TargetFile, int, int], Encoder]


CODECS: Final = {
    "zstd": StreamCodec(is_zstd, content_nbytes, ZstdDecoder, ZstdEncoder),
    # The size at the end of a gzip member has 32 bits, and there may be further members.
    "gzip": StreamCodec(
        is_gzip,
        lambda file: None,
        GzipDecoder,
        lambda file, nbytes, threads: GzipEncoder(file, threads),
    ),
}
