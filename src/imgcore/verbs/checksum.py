"""The verb ``checksum``: the digest of a disk's content."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex, cast

from imgcore.border import FilePath, file_name, source_name
from imgcore.checksums.digest import BLOCK_NBYTES, ChecksumError, Digest
from imgcore.disk.digests import DigestedDisk, DiskHasher
from imgcore.disk.image import Image
from imgcore.disk.limited_chunks import limited_chunks
from imgcore.disk.open_options import OpenOptions
from imgcore.disk.opened import require_no_options
from imgcore.disk.source import open_disk, open_source
from imgcore.disk.streamed import is_streamed
from imgcore.engine.control import Run
from imgcore.engine.hashing import require_algorithm
from imgcore.engine.job import thread_count
from imgcore.engine.progress import Tally
from imgcore.errors import OptionError, TargetError
from imgcore.files.commitment import until_committed
from imgcore.files.target import Target

if TYPE_CHECKING:
    from collections.abc import Iterator
    from socket import socket

    from imgcore.areas.area import Area
    from imgcore.border import Readable
    from imgcore.disk.source import Source
    from imgcore.engine.control import Control
    from imgcore.engine.hashing import LeafSink
    from imgcore.engine.progress import Progress
    from imgcore.files.commitment import Commitment


def checksum(
    image: FilePath | int | Image | Readable | socket,
    *,
    algorithm: str = "sha256",
    tree: FilePath | None = None,
    threads: SupportsIndex | None = None,
    progress: Callable[[Progress], None] | None = None,
    control: Control | None = None,
    format: str | None = None,
    backing_format: str | None = None,
    parent: FilePath | Sequence[FilePath] | None = None,
    read_options: Mapping[str, Any] | Sequence[str] | None = None,
    allow: Sequence[FilePath] = (),
    share: bool = False,
    files: Mapping[str, int] | None = None,
) -> Digest:
    """Return the digest of the disk in an image, as a guest reads it.

    It is the same for every image of the disk, whatever its format and whatever it has
    allocated: blkhash, over blocks of 64 KiB.  The disk of a raw file has exactly the
    file's bytes, also if the last sector is incomplete.

    ``format``, ``backing_format``, ``parent``, ``read_options``, ``allow``, ``share``
    and ``files`` are the keywords of `imgcore.open`.

    Parameters
    ----------
    image : str, bytes, os.PathLike, int or Image
        The image, a descriptor of it, or an open image, which stays open and takes no
        keywords for opening.  Compressed raw disks (``disk.raw.zst``) are read as well,
        and streams as by `imgcore.convert`: ``"-"``, pipes, and readable objects.
    algorithm : str
        ``"sha256"`` or ``"blake3"``.
    tree : str, bytes or os.PathLike, optional
        A file for the checksum of each block.  If it does not exist, it is written; it
        has 32 bytes for each 64 KiB of the disk.  If it exists, the disk is compared
        with it, and the file stays as it is.
    threads : int, optional
        Number of worker threads; one per CPU by default.
    progress : callable, optional
        Called with a `Progress` on the calling thread, at most every 50 ms and once at
        the end.
    control : Control, optional
        Steers the job from other threads.  Its rate is about the data that is read.

    Returns
    -------
    Digest

    Raises
    ------
    ChecksumError
        The disk is not the one of ``tree``.
    OptionError
        The algorithm is not known, or the tree has another one or is of a disk of
        another size.
    OSError, ImgcoreError
        The image or the tree cannot be read, or the tree cannot be written.
    """
    require_algorithm(algorithm)
    opening = OpenOptions.from_keywords(
        format=format,
        backing_format=backing_format,
        parent=parent,
        read_options=read_options,
        allow=allow,
        share=share,
        files=files,
    )
    reading = _Reading(algorithm, thread_count(threads), Run(control, progress))
    name = None if tree is None else file_name(tree)
    if is_streamed(image):
        return _of_stream(image, reading, name, opening)
    with _opened(cast("FilePath | int | Image", image), opening) as disk:
        if name is not None and not os.path.lexists(name):
            return reading.write_tree(disk, name)
        with reading.run:
            return reading.digest(disk) if name is None else reading.verify(disk, name)


def _of_stream(source: Any, reading: _Reading, tree: str | None, options: OpenOptions) -> Digest:
    """Return the digest of a disk whose size need not be known before its end."""
    if tree is not None:
        raise OptionError("a stream has no tree: save it to a file first", path=tree)
    with reading.run, open_disk(source, options._replace(on_wait=reading.run.wait)) as disk:
        if disk.size_is_known:
            return reading.digest(DigestedDisk.of_source(disk))
        return reading.digest_in_order(disk)


@contextmanager
def _opened(image: FilePath | int | Image, options: OpenOptions) -> Iterator[DigestedDisk]:
    if isinstance(image, Image):
        require_no_options(image, options)
        with image.kept_open() as state:
            yield DigestedDisk.of_state(state)
        return
    with open_source(source_name(image), options) as source:
        yield DigestedDisk.of_source(source)


class _Reading(NamedTuple):
    """How to read a disk, once, for its digest."""

    algorithm: str
    threads: int
    run: Run

    def digest(self, disk: DigestedDisk, sink: LeafSink | None = None) -> Digest:
        """Return the digest; ``sink`` gets the leaves."""
        tally = Tally(disk.nbytes, self.run.report)
        digest = disk.digest(
            self.algorithm,
            threads=self.threads,
            limit=self.run.limit,
            sink=sink,
            report=lambda done, data: tally.count(done, data=data, read=data, written=0),
        )
        disk.check_unchanged()
        tally.finish()
        return digest

    def digest_in_order(self, disk: Source) -> Digest:
        """Return the digest of a disk that is read to its end, on this thread."""
        hasher, tally, done = DiskHasher(self.algorithm), Tally(0, self.run.report), 0
        for chunk in limited_chunks(disk, self.run.limit, tally.repeat, self.threads):
            hasher.update(chunk)
            done += len(chunk)
            tally.count(done, data=done, read=done, written=0)
        tally.total_nbytes = done
        tally.finish()
        digest = hasher.digest()
        assert digest is not None
        return digest

    def write_tree(self, disk: DigestedDisk, path: str) -> Digest:
        """Write the tree, which gets its name when it is complete."""
        from imgcore.checksums.tree import TreeWriter, tree_nbytes

        def job(commitment: Commitment[Digest]) -> None:
            with self.run, Target(path) as target:
                target.protect(disk.files)
                target.require_space(tree_nbytes(disk.nbytes))
                writer = TreeWriter(target.main, self.algorithm, disk.nbytes)
                digest = self.digest(disk, writer)
                writer.finish(digest)
                self.run.phase = "syncing"
                target.prepare()
                self.run.keep()
                commitment.commit(target, digest)

        try:
            return until_committed(job)
        except TargetError as error:
            if not os.path.lexists(path):
                raise
            # Another process was faster.  A tree is never replaced.
            raise TargetError("has appeared meanwhile, and is kept", path=path) from error

    def verify(self, disk: DigestedDisk, path: str) -> Digest:
        """Compare the disk with the tree; ChecksumError if they differ."""
        from imgcore.checksums.differences import TreeDifferences
        from imgcore.checksums.tree import TreeFile

        count = _Count()
        with TreeFile.open(path) as tree:
            tree.refuse_other(disk.path, self.algorithm, disk.nbytes)
            differences = TreeDifferences(tree, count.add)
            digest = self.digest(disk, differences)
            differences.finish()
            tree.check_unchanged()
        if count.n_blocks:
            are = "is not that" if count.n_blocks == 1 else "are not those"
            raise ChecksumError(
                f"{count.n_blocks} of its blocks of {BLOCK_NBYTES} bytes {are} of {path}, the "
                f"first at 0x{count.first:x}",
                path=disk.path,
                found=digest,
                first_difference=count.first,
            )
        return digest


class _Count:
    """The first block of some areas, and the number of blocks."""

    def __init__(self) -> None:
        self.first = 0
        self.n_blocks = 0

    def add(self, area: Area) -> None:
        if not self.n_blocks:
            self.first = area.offset
        self.n_blocks += -(-area.length // BLOCK_NBYTES)
