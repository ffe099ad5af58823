"""Opens what comes in order from a pipe, a socket or an object with ``read``."""

from __future__ import annotations

import io
import os
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final

from imgcore.border import file_names
from imgcore.disk.image import Image
from imgcore.disk.once_source import OnceSource
from imgcore.errors import (
    CorruptImageError,
    OptionError,
    WrongFormatError,
)
from imgcore.files.stream_input import (
    STDIN,
    StreamInput,
    is_named_pipe,
    is_seekable_start,
    is_stream_object,
    named_stream,
    object_stream,
    stdin_stream,
)
from imgcore.formats.magic import HEAD_NBYTES
from imgcore.formats.registry import PLAIN_FORMAT, canonical_name, get_driver, streamed_format
from imgcore.formats.shared.ends import Ends
from imgcore.streams.names import CODEC_OF_FORMAT
from imgcore.streams.once import OnceReader

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imgcore.disk.open_options import OpenOptions
    from imgcore.disk.streamed_source import StreamedSource

_STDIN_NUMBER: Final = 0


def is_streamed(source: object) -> bool:
    """Tell whether a source is read in order: ``-``, a pipe's name, an object."""
    if isinstance(source, str | bytes | os.PathLike):
        return source == STDIN or is_named_pipe(os.fsdecode(source))
    # An image has bytes at offsets.
    return is_stream_object(source) and not isinstance(source, Image)


def source_names(source: Any) -> tuple[Any, ...]:
    """Return what a disk is read from: names of files, or one object to read from."""
    return (source,) if is_streamed(source) else file_names(source)


def seekable(source: object, options: OpenOptions) -> int | None:
    """Return a descriptor for a stream that is a file at its start; None if it is not.

    Such a file, as in ``imgcore convert - disk.qcow2 < disk.vmdk``, is read as if it
    was given by its name, unless it is compressed or its size is stated.
    """
    number = _STDIN_NUMBER if source == STDIN else _number_of(source)
    if number is None or options.stream_nbytes is not None or not is_seekable_start(number):
        return None
    if options.format in CODEC_OF_FORMAT:
        return None
    return number


def _number_of(source: object) -> int | None:
    """Return the descriptor of Python's own file objects, which have no other bytes."""
    raw = source.raw if isinstance(source, io.BufferedReader | io.BufferedRandom) else source
    return raw.fileno() if isinstance(raw, io.FileIO) and not raw.closed else None


def open_stream(source: Any) -> StreamInput:
    """Open what `is_streamed`."""
    if source == STDIN:
        return stdin_stream()
    if isinstance(source, str | bytes | os.PathLike):
        return named_stream(os.fsdecode(source))
    return object_stream(source)


@contextmanager
def open_streamed(source: Any, options: OpenOptions) -> Iterator[OnceSource | StreamedSource]:
    """Open a disk that comes in order; the caller's objects and descriptors stay open.

    Raises
    ------
    OptionError
        ``options`` do not apply to streams.
    WrongFormatError
        The first bytes are not those of the stated format, or of any.
    UnsupportedFeatureError
        The image has a parent, or is not in an order that can be read.
    """
    with ExitStack() as stack:
        stream = stack.enter_context(open_stream(source))
        stream.on_wait = options.on_wait
        _refuse_options(stream, options)
        yield _source(stream, options, stack)


def refuse_size(options: OpenOptions, source: object) -> None:
    """Raise OptionError if a size is stated for what is no stream."""
    if options.stream_nbytes is not None:
        raise OptionError(
            "--size is about a stream: an image that is a file has its size",
            path=source if isinstance(source, str) else None,
        )


def _refuse_options(stream: StreamInput, options: OpenOptions) -> None:
    if options.salvage:
        raise OptionError(
            "a stream is read once, and is not salvaged: save it to a file first",
            path=stream.path,
        )
    if options.parents:
        raise OptionError(
            "a stream cannot have a parent: save it to a file first", path=stream.path
        )


def _source(
    stream: StreamInput, options: OpenOptions, stack: ExitStack
) -> OnceSource | StreamedSource:
    nbytes, stated = options.stream_nbytes, options.format
    if stated in CODEC_OF_FORMAT:
        _refuse_read_options(stream, options)
        reader = OnceReader(stream, CODEC_OF_FORMAT[stated], nbytes=nbytes)
        return OnceSource(reader, PLAIN_FORMAT)
    name = None if stated is None else canonical_name(stated)
    if name == PLAIN_FORMAT:
        _refuse_read_options(stream, options)
        return OnceSource(OnceReader(stream, nbytes=nbytes), PLAIN_FORMAT)
    name, has_magic = streamed_format(
        stream.path, stream.peek(HEAD_NBYTES), name, flag=options.flags.format
    )
    if not has_magic:
        return _flat(stream, name, options)
    from imgcore.disk.streamed_source import open_streamed_image

    return stack.enter_context(open_streamed_image(stream, name, options))


def _refuse_read_options(stream: StreamInput, options: OpenOptions) -> None:
    if options.read_options:
        raise OptionError(f"{PLAIN_FORMAT} has no options for reading", path=stream.path)


def _flat(stream: StreamInput, name: str, options: OpenOptions) -> OnceSource:
    """Return the source of a format that has the disk first, and then its footer."""
    from imgcore.files.reference_gate import ReferenceGate
    from imgcore.formats.option_texts import parse_record

    driver = get_driver(name)
    record = None
    if options.read_options and driver.read_options is not None:
        record = parse_record(name, driver.read_options, options.read_options)
    reader = OnceReader(stream, nbytes=options.stream_nbytes, tail_nbytes=driver.flat_tail_nbytes)
    head = reader.head(HEAD_NBYTES)

    def verify_end() -> None:
        nbytes = reader.nbytes or 0
        ends = Ends(stream.path, head, reader.tail, nbytes + len(reader.tail))
        try:
            found = driver.open(ends, ReferenceGate(None), record).virtual_size
        except WrongFormatError:
            raise CorruptImageError(
                f"the stream ends after {nbytes + len(reader.tail)} bytes without the footer of "
                f"a {name} image: it is not complete (if zeros follow the footer, --size states "
                "the disk's size)",
                path=stream.path,
            ) from None
        if found != nbytes:
            raise CorruptImageError(
                f"the footer states a disk of {found} bytes, but {nbytes} come before it",
                path=stream.path,
            )

    return OnceSource(reader, name, verify_end)
