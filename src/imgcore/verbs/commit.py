"""The verb ``commit``: merges an image into its backing file, in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex

from imgcore.border import FilePath, file_name
from imgcore.disk.block_copy import Copied, copy_extents
from imgcore.disk.changed_areas import extents_above
from imgcore.disk.children import warn_about_children, warn_about_new_identity
from imgcore.disk.copy_job import CopyJob, CopySettings
from imgcore.disk.flattening import require_rebasable
from imgcore.disk.image import Image, open_image
from imgcore.disk.image_names import local_image
from imgcore.disk.open_options import OpenOptions
from imgcore.disk.parent_link import begin_below, open_mended, refresh_link
from imgcore.engine.control import Control
from imgcore.errors import ImgcoreError, OptionError, UnsupportedFeatureError
from imgcore.files.host_file import HostFile
from imgcore.files.identity import named_identity
from imgcore.files.mark import remove_file

if TYPE_CHECKING:
    from imgcore.engine.control import Control
    from imgcore.engine.progress import Progress


class CommitResult(NamedTuple):
    """The result of `imgcore.commit`.

    Attributes
    ----------
    path, base : str
        The overlay, and the image that it was merged into.
    bytes_read : int
        Bytes of the disk that were read from the overlay.
    bytes_written, bytes_zeroed : int
        Bytes that were written to the base as data, and that became zeros.
    emptied, removed : bool
        What became of the overlay.
    seconds : float
        Duration.
    """

    path: str
    base: str
    bytes_read: int
    bytes_written: int
    bytes_zeroed: int
    emptied: bool
    removed: bool
    seconds: float


def commit(
    overlay: FilePath,
    *,
    base: FilePath | None = None,
    empty: bool = True,
    remove: bool = False,
    threads: SupportsIndex | None = None,
    progress: Callable[[Progress], None] | None = None,
    rate: SupportsIndex | str | None = None,
    control: Control | None = None,
    format: str | None = None,
    backing_format: str | None = None,
    parent: FilePath | Sequence[FilePath] | None = None,
    read_options: Mapping[str, Any] | Sequence[str] | None = None,
    allow: Sequence[FilePath] = (),
) -> CommitResult:
    """Write what an overlay has into its backing file.

    The overlay reads the same afterwards.  ``format``, ``backing_format``, ``parent``,
    ``read_options`` and ``allow`` are the keywords of `imgcore.open`.

    Parameters
    ----------
    overlay : str, bytes or os.PathLike
        The image, which has a backing file.
    base : str, bytes or os.PathLike, optional
        A backing file deeper in the chain, which gets what all images above it have.
        The overlay keeps its data then.  Images between them must not be used alone any
        more.
    empty : bool
        Free what the overlay has, when the backing file is on stable storage.
    remove : bool
        Remove the overlay instead.
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
    CommitResult

    Raises
    ------
    OptionError
        The overlay has no backing file, or ``base`` is none of its backing files.
    UnsupportedFeatureError
        The format cannot empty the overlay (``empty=False`` leaves that out).
    TargetError
        Another process uses the overlay or the backing file.
    ImgcoreError, OSError
        An image cannot be read, or one cannot be written to.

    Notes
    -----
    A backing file that is smaller than the overlay grows.  If it fails, or is
    interrupted, the overlay reads as before, and the same call goes on.  A warning
    tells if other images depend on the backing file: they read wrong data, or are
    refused.
    """
    name = file_name(overlay)
    opening = OpenOptions.from_keywords(
        format=format,
        backing_format=backing_format,
        parent=parent,
        read_options=read_options,
        allow=allow,
        writable=True,
        # The backing file changes while the overlay is open.
        share=True,
    )
    settings = CopySettings.from_keywords(threads, rate, control, progress)
    with settings.run, open_mended(name, opening) as disk:
        depth = _depth(disk, None if base is None else file_name(base), opening)
        if remove:
            _refuse_removal(disk, depth)
        job = CopyJob(disk.virtual_size, settings)
        run = _Commit(disk, depth, opening, job)
        empties = empty and not remove and depth == 1
        if empties:
            require_rebasable(disk)
        copied = run.merge()
        job.run.keep()
        if remove:
            _remove(disk)
        elif empties:
            disk.drop()
        return CommitResult(
            disk.path,
            run.base_path,
            copied.read,
            copied.written,
            copied.zeroed,
            empties,
            remove,
            job.finish(),
        )


def _refuse_removal(disk: Image, depth: int) -> None:
    if depth > 1:
        raise OptionError(
            "the images between it and the base need it: it is not removed", path=disk.path
        )
    if any(file.is_block_device for file in disk.own_files()):
        raise OptionError("is a block device, which is not removed", path=disk.path)


def _depth(disk: Image, base: str | None, opening: OpenOptions) -> int:
    """Return the number of the layer that gets the changes."""
    if len(disk.layers) == 1:
        raise OptionError("has no backing file to commit to", path=disk.path)
    if base is None:
        return 1
    depth = disk.depth_of(named_identity(local_image(base, opening)[0]))
    if depth:
        return depth
    raise OptionError(f"{base} is not one of its backing files", path=disk.path)


class _Commit(NamedTuple):
    """One run; ``depth`` is the number of the layer that gets the changes."""

    overlay: Image
    depth: int
    opening: OpenOptions
    job: CopyJob

    @property
    def base_path(self) -> str:
        return self.overlay.files[self.depth].path

    def merge(self) -> Copied:
        """Write what the layers above the base have into it; it is durable then."""
        with ExitStack() as stack:
            base = stack.enter_context(open_image(self.base_path, self._base_options()))
            state = stack.enter_context(self.overlay.kept_open())
            with base.kept_open() as base_state:
                if not base_state.is_part_of(state, self.depth):
                    raise ImgcoreError("its chain of backing files has changed", path=base.path)
            self._refuse_other_writers()
            images = self._chain(base, stack)
            warn_about_new_identity(self.overlay, self.opening.allow)
            warn_about_children(base, self.opening.allow, but={self.overlay.files[0].identity})
            grows = base.virtual_size < self.overlay.virtual_size
            begin_below(images, self.overlay.virtual_size if grows else None)
            copied = copy_extents(
                self.overlay,
                base,
                extents_above(state, self.depth),
                threads=self.job.threads,
                report=self.job.note_copied,
                control=self.job.control,
            )
            self.job.run.phase = "syncing"
            base.flush()
            base.close()
            refresh_link(images[-2], self.base_path, self._base_options())
        return copied

    def _refuse_other_writers(self) -> None:
        """Raise if others write to images between the overlay and the base."""
        for layer in self.overlay.chain[1 : self.depth]:
            HostFile.open(layer.file.path).close()

    def _base_options(self) -> OpenOptions:
        """Return how to open the base for writing, with its own backing files."""
        opening = self.opening
        return OpenOptions(
            format=self.overlay.layers[self.depth].format_name,
            backing_format=opening.backing_format,
            parents=opening.parents[self.depth :],
            allow=opening.allow,
            writable=True,
        )

    def _chain(self, base: Image, stack: ExitStack) -> list[Image]:
        """Return the images that change, down to the base, open for writing.

        If nothing states the identity of the base, they are the overlay and the base.
        """
        if not base.reader.identities:
            return [self.overlay, base]
        images = [self.overlay]
        for layer in self.overlay.chain[1 : self.depth]:
            alone = OpenOptions(
                format=layer.reader.format_name,
                allow=self.opening.allow,
                chain=False,
                writable=True,
            )
            images.append(stack.enter_context(open_image(layer.file.path, alone)))
        for child in images:
            if not child.is_rebasable():
                raise UnsupportedFeatureError(
                    f"{child.format} images are not told in place that their parent changes",
                    path=child.path,
                )
        return [*images, base]


def _remove(image: Image) -> None:
    """Remove the files of an image, that with its name first."""
    for file in image.own_files():
        if isinstance(file, HostFile):
            remove_file(file)
