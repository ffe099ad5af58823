"""The verb ``verify``: compares a target with the receipt of the job that wrote it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, SupportsIndex

from imgcore.border import FilePath, file_name
from imgcore.checksums.digest import ChecksumError, Digest
from imgcore.disk.digests import DigestedDisk
from imgcore.disk.open_options import Flags, OpenOptions
from imgcore.disk.read_back import archive_digest
from imgcore.disk.receipt import Receipt
from imgcore.disk.source import open_source
from imgcore.disk.stream_source import StreamSource
from imgcore.engine.control import Control, Run
from imgcore.engine.hashing import require_algorithm
from imgcore.engine.job import thread_count
from imgcore.engine.progress import Progress, Tally
from imgcore.errors import OptionError
from imgcore.files.host_file import HostFile
from imgcore.formats.registry import PLAIN_FORMAT
from imgcore.streams.reader import StreamReader

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from imgcore.disk.source import Source

_FLAGS: Final = Flags(format="")


class VerifyResult(NamedTuple):
    """The result of `imgcore.verify`: the target has what its receipt says.

    Attributes
    ----------
    receipt, target, format : str
        The names of the two files, and the target's format.
    virtual_size : int
        Bytes of the disk that were compared.
    checksum : Digest
        The digest of the target's disk, which is that of the receipt.
    """

    receipt: str
    target: str
    format: str
    virtual_size: int
    checksum: Digest


def verify(
    receipt: FilePath,
    target: FilePath | None = None,
    *,
    threads: SupportsIndex | None = None,
    progress: Callable[[Progress], None] | None = None,
    control: Control | None = None,
    backing_format: str | None = None,
    parent: FilePath | Sequence[FilePath] | None = None,
    allow: Sequence[FilePath] = (),
    share: bool = False,
) -> VerifyResult:
    """Verify that a target still has the disk that its receipt tells of.

    All of its disk is read, and its digest compared.  ``backing_format``, ``parent``,
    ``allow`` and ``share`` are the keywords of `imgcore.open` for the target; its
    format is that of the receipt.

    Parameters
    ----------
    receipt : str, bytes or os.PathLike
        The file that `imgcore.convert` has written (``receipt=``).
    target : str, bytes or os.PathLike, optional
        The target, if it has another name by now.
    threads : int, optional
        Number of worker threads; one per CPU by default.
    progress : callable, optional
        Called with a `Progress` on the calling thread, at most every 50 ms and once at
        the end.
    control : Control, optional
        Steers the job from other threads.  Its rate is about the data that is read.

    Returns
    -------
    VerifyResult

    Raises
    ------
    ChecksumError
        The disk is another one.
    OptionError
        The target was a stream, so that its name must be given.
    FormatError, UnsupportedFeatureError, LimitExceededError
        The file is not a receipt, or not one of a version that is known.
    ImgcoreError, OSError
        The receipt or the target cannot be read.
    """
    opening = OpenOptions.from_keywords(
        backing_format=backing_format, parent=parent, allow=allow, share=share, flags=_FLAGS
    )
    n_threads = thread_count(threads)
    found = Receipt.read(file_name(receipt))
    require_algorithm(found.digest.algorithm)
    name = found.target if target is None else file_name(target)
    if name is None:
        raise OptionError("its target was a stream: name the file that has it", path=found.path)
    with Run(control, progress) as run:
        tally = Tally(found.disk_nbytes, run.report)
        if found.is_archive:
            with HostFile.open(name, share=share) as file:
                digest = archive_digest(file, found.digest.algorithm, tally.repeat, run.limit)
                file.check_unchanged()
        else:
            digest = _disk_digest(found, name, opening, n_threads, tally, run)
        if digest != found.digest:
            raise ChecksumError(
                f"is not what {found.path} tells of: the checksum of its disk is "
                f"{digest.hexdigest}, and was {found.digest.hexdigest}",
                path=name,
                found=digest,
            )
        tally.finish()
    return VerifyResult(found.path, name, found.format, found.disk_nbytes, digest)


def _opened(receipt: Receipt, name: str, opening: OpenOptions) -> AbstractContextManager[Source]:
    if receipt.codec is None:
        return open_source(name, opening._replace(format=receipt.format))
    # By any name, which need not state how it is compressed.
    return StreamSource(StreamReader.open(name, share=opening.share), is_stated=True)


def _disk_digest(
    receipt: Receipt, name: str, opening: OpenOptions, threads: int, tally: Tally, run: Run
) -> Digest:
    with _opened(receipt, name, opening) as source:
        disk = DigestedDisk.of_source(source)
        if receipt.in_place and receipt.format == PLAIN_FORMAT:
            # What follows the disk in the file was there before.
            disk = disk._replace(nbytes=min(disk.nbytes, receipt.disk_nbytes))
        digest = disk.digest(
            receipt.digest.algorithm,
            threads=threads,
            limit=run.limit,
            report=lambda done, data: tally.count(done, data=data, read=data, written=0),
        )
        disk.check_unchanged()
    return digest
