"""Reads a target back before it gets its name, and compares the digest of its disk."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from imgcore.checksums.digest import ChecksumError
from imgcore.disk.digests import DigestedDisk, DiskHasher
from imgcore.disk.limited_chunks import await_rate, piece_nbytes
from imgcore.disk.source import open_source
from imgcore.errors import CorruptImageError
from imgcore.files.given_files import GivenFiles
from imgcore.formats.registry import PLAIN_FORMAT
from imgcore.limits import CHUNK_NBYTES, MIB
from imgcore.streams.decoder import OrderedInput
from imgcore.streams.gzip import GzipDecoder

if TYPE_CHECKING:
    from imgcore._core import RateLimit
    from imgcore.checksums.digest import Digest
    from imgcore.disk.image import Image
    from imgcore.disk.open_options import OpenOptions
    from imgcore.disk.sink_options import SinkOptions
    from imgcore.files.byte_source import ByteSource
    from imgcore.files.target import Target


# The usual 10 KiB would be a call of Python each.
_READ_NBYTES: Final = 1 * MIB


class ReadBack(NamedTuple):
    """How to read a target: the options that it was written with, and its parent.

    ``opening`` are the options for opening the parent ``base``.
    """

    target: Target
    options: SinkOptions
    base: Image | None
    opening: OpenOptions

    def verify(self, written: Digest, written_nbytes: int, tick: Callable[[], None]) -> None:
        """Read the disk of the target, which has been synced, and compare digests.

        Parameters
        ----------
        written : Digest
            That of what was written.
        written_nbytes : int
            Bytes of it.  A file or block device written in place may have more.
        tick : callable
            Called several times a second.

        Raises
        ------
        ChecksumError
            The disk reads differently.
        ImgcoreError, OSError
            The target cannot be read.
        """
        with ExitStack() as stack:
            files = self.target.reopened(self._name)
            for file in files:
                stack.callback(file.close)
            profile = self.options.profile
            if profile is not None and profile.is_archived:
                found = archive_digest(files[0], written.algorithm, tick)
            else:
                found = self._disk_digest(
                    GivenFiles(held=files), written.algorithm, written_nbytes, tick
                )
        if found != written:
            raise ChecksumError(
                f"does not read as it was written: its checksum is {found.hexdigest}, "
                f"and that of what was written {written.hexdigest}",
                path=self.target.path,
                found=found,
            )

    @property
    def _name(self) -> str:
        """The target's name, in a form that is not taken for a URL or a description."""
        path = self.target.path
        is_plain = os.path.isabs(path) or ":" not in path
        return path if is_plain else os.path.join(os.curdir, path)

    def _disk_digest(
        self, files: GivenFiles, algorithm: str, written_nbytes: int, tick: Callable[[], None]
    ) -> Digest:
        options, base = self.options, self.base
        opening = self.opening._replace(
            format=options.format,
            backing_format=None if options.backing is None else options.backing.format,
            parents=() if base is None else (base.path,),
            files=files,
        )
        with open_source(self._name, opening) as disk:
            digested = DigestedDisk.of_source(disk)
            if self.target.in_place and options.format == PLAIN_FORMAT:
                # What follows the disk in the file stays as it was.
                digested = digested._replace(nbytes=min(digested.nbytes, written_nbytes))
            return digested.digest(
                algorithm,
                threads=options.threads,
                variants=options.variants,
                limit=options.pauses,
                report=lambda *_: tick(),
            )


class _Content:
    """What a gzip file decompresses to, as tarfile reads it."""

    def __init__(self, file: ByteSource) -> None:
        self._decoder = GzipDecoder(OrderedInput(file))

    def read(self, nbytes: int) -> bytes:
        """Return that many bytes, fewer at the end."""
        content = bytearray(nbytes)
        return bytes(content[: self._decoder.fill(memoryview(content))])


def archive_digest(
    file: ByteSource, algorithm: str, tick: Callable[[], None], limit: RateLimit | None = None
) -> Digest:
    """Return the digest of the disk that is the first member of an archive.

    Data is read no faster than ``limit``; ``tick`` is called several times a second.
    """
    content: Any = _Content(file)
    try:
        with tarfile.open(fileobj=content, mode="r|", bufsize=_READ_NBYTES) as archive:
            digest = _first_member_digest(archive, algorithm, tick, limit)
    except tarfile.TarError as error:
        text = f"does not read as the archive that was written: {error}"
        raise CorruptImageError(text, path=file.path) from error
    # The end of the gzip stream has a checksum of all of it.
    while content.read(CHUNK_NBYTES):
        tick()
    return digest


def _first_member_digest(
    archive: tarfile.TarFile,
    algorithm: str,
    tick: Callable[[], None],
    limit: RateLimit | None,
) -> Digest:
    member: Any = archive.next()
    reader: Any = None if member is None else archive.extractfile(member)
    if reader is None:
        raise tarfile.ReadError("it has no file")
    hasher, position = DiskHasher(algorithm), 0
    for offset, length in member.sparse or [(0, member.size)]:
        if not length:
            continue  # an entry that the header has room for, or the end of the file
        hasher.zeros(offset - position)
        # Not the buffer above it, which would read on into the hole.
        reader.raw.seek(offset)
        position = offset + length
        nbytes = piece_nbytes(limit, threads=1)
        for left in range(length, 0, -nbytes):
            await_rate(limit, min(left, nbytes), tick)
            hasher.update(reader.raw.read(min(left, nbytes)))
            tick()
    hasher.zeros(member.size - position)
    digest = hasher.digest()
    assert digest is not None, "an algorithm is given"
    return digest
