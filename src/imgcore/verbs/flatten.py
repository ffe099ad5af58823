"""The verb ``flatten``: makes an image independent of its backing files, in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex

from imgcore.border import FilePath
from imgcore.disk.copy_job import CopyJob, CopySettings
from imgcore.disk.flattening import flatten_image
from imgcore.disk.image import Image
from imgcore.disk.open_options import OpenOptions
from imgcore.disk.opened import opened_for_update

if TYPE_CHECKING:
    from imgcore.engine.control import Control
    from imgcore.engine.progress import Progress


class FlattenResult(NamedTuple):
    """The result of `imgcore.flatten`.

    Attributes
    ----------
    path, format : str
        The image and its format.
    bytes_read : int
        Bytes of the disk that were read from the parents.
    bytes_written, bytes_zeroed : int
        Bytes that were written to the image as data, and as zeros.
    seconds : float
        Duration.
    """

    path: str
    format: str
    bytes_read: int
    bytes_written: int
    bytes_zeroed: int
    seconds: float


def flatten(
    image: FilePath | int | Image,
    *,
    threads: SupportsIndex | None = None,
    progress: Callable[[Progress], None] | None = None,
    rate: SupportsIndex | str | None = None,
    control: Control | None = None,
    format: str | None = None,
    backing_format: str | None = None,
    parent: FilePath | Sequence[FilePath] | None = None,
    read_options: Mapping[str, Any] | Sequence[str] | None = None,
    allow: Sequence[FilePath] = (),
) -> FlattenResult:
    """Copy what an image has from its backing files into it, and remove the link.

    Its disk reads the same afterwards, and the backing files are not needed any more.
    ``format``, ``backing_format``, ``parent``, ``read_options`` and ``allow`` are the
    keywords of `imgcore.open`.

    Parameters
    ----------
    image : str, bytes, os.PathLike, int or Image
        The image, an open descriptor of it, or an open image with the mode ``"r+"``,
        which takes no keywords for opening.
    threads : int, optional
        Number of threads that read; one per CPU by default.
    progress : callable, optional
        Called with a `Progress` on the calling thread, at most every 50 ms and once at
        the end.
    rate : int or str, optional
        The most bytes to copy in a second, for example ``"100M"``.
    control : Control, optional
        Steers the run from other threads, and has its rate, in place of ``rate``.

    Returns
    -------
    FlattenResult
        Without a backing file, nothing is done.

    Raises
    ------
    UnsupportedFeatureError
        The format cannot remove the link.
    ImgcoreError, OSError
        An image cannot be read, or the image cannot be written to.

    Notes
    -----
    The link is removed when everything else is on stable storage.  If it fails, or is
    interrupted, the image reads as before, and the same call goes on.
    """
    opening = OpenOptions.from_keywords(
        format=format,
        backing_format=backing_format,
        parent=parent,
        read_options=read_options,
        allow=allow,
    )
    settings = CopySettings.from_keywords(threads, rate, control, progress)
    with settings.run, opened_for_update(image, opening) as disk:
        job = CopyJob(disk.virtual_size, settings)
        copied = flatten_image(disk, job, opening.allow)
        return FlattenResult(
            disk.path, disk.format, copied.read, copied.written, copied.zeroed, job.finish()
        )
