"""The verb ``rebase``: gives an image another backing file, in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple, SupportsIndex

from imgcore.border import FilePath, file_name
from imgcore.disk.backing import backing_path, backing_reference, opened_reference
from imgcore.disk.block_copy import Copied, copy_areas
from imgcore.disk.children import warn_about_new_identity
from imgcore.disk.copy_job import CopyJob, CopySettings
from imgcore.disk.differences import Differences
from imgcore.disk.flattening import flatten_image, require_rebasable
from imgcore.disk.image import Image, open_image
from imgcore.disk.layer import open_layer
from imgcore.disk.open_options import Flags, OpenOptions
from imgcore.disk.opened import opened_for_update
from imgcore.disk.own_areas import WithoutOwn
from imgcore.engine.control import Control
from imgcore.errors import ImgcoreError, OptionError
from imgcore.files.identity import named_identity
from imgcore.log import log

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from imgcore.areas.area import Area
    from imgcore.disk.disk_state import DiskState
    from imgcore.engine.control import Control
    from imgcore.engine.progress import Progress
    from imgcore.files.identity import Identity
    from imgcore.formats.api import BackingReference

# Differences are found, and copied, in blocks of this size.
_GRANULARITY: Final = 4096

_FLAGS: Final = Flags(backing_format="--source-backing-format")
_NEW_FLAGS: Final = Flags(format="-F", backing_format="", parent="")


class RebaseResult(NamedTuple):
    """The result of `imgcore.rebase`.

    Attributes
    ----------
    path, format : str
        The image and its format.
    backing, backing_format : str or None
        The backing file, as the image names it now, and its format.
    bytes_read : int
        Bytes of the disk that were read to be copied.
    bytes_written, bytes_zeroed : int
        Bytes that were written to the image as data, and as zeros.
    seconds : float
        Duration.
    """

    path: str
    format: str
    backing: str | None
    backing_format: str | None
    bytes_read: int
    bytes_written: int
    bytes_zeroed: int
    seconds: float


def rebase(
    image: FilePath,
    *,
    backing: FilePath | None,
    backing_format: str | None = None,
    unsafe: bool = False,
    threads: SupportsIndex | None = None,
    progress: Callable[[Progress], None] | None = None,
    rate: SupportsIndex | str | None = None,
    control: Control | None = None,
    format: str | None = None,
    source_backing_format: str | None = None,
    parent: FilePath | Sequence[FilePath] | None = None,
    read_options: Mapping[str, Any] | Sequence[str] | None = None,
    allow: Sequence[FilePath] = (),
) -> RebaseResult:
    """Change the backing file (parent) of an image, in place.

    Its disk reads the same afterwards: what differs between the old and the new backing
    file is first copied into the image.  ``format``, ``parent``, ``read_options`` and
    ``allow`` are the keywords of `imgcore.open`.  Its ``backing_format`` is
    ``source_backing_format`` here, since ``backing_format`` is about the new one.

    Parameters
    ----------
    image : str, bytes or os.PathLike
        The image.
    backing : str, bytes, os.PathLike or None
        The new backing file.  A relative name starts at the folder of the image, and is
        stored as given.  None: the image has none any more, as after `imgcore.flatten`.
    backing_format : str, optional
        Its format; required with ``backing``.
    unsafe : bool
        Only change the link.  This is for backing files that were moved or renamed:
        with another content, the image reads wrong data.
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
    RebaseResult

    Raises
    ------
    OptionError
        The format of the backing file is missing, or the image's format cannot refer to
        such a file.
    UnsupportedFeatureError
        The format cannot change the link.
    ImgcoreError, OSError
        An image cannot be read, or the image cannot be written to.

    Notes
    -----
    The link is changed when everything else is on stable storage.  If it fails, or is
    interrupted, the image reads as before, and the same call goes on.
    """
    name = file_name(image)
    opening = OpenOptions.from_keywords(
        format=format,
        backing_format=source_backing_format,
        parent=parent,
        read_options=read_options,
        allow=allow,
        chain=not unsafe,
        flags=_FLAGS,
    )
    reference = backing_reference(name, backing, backing_format)
    settings = CopySettings.from_keywords(threads, rate, control, progress)
    with settings.run, opened_for_update(name, opening) as disk:
        job = CopyJob(disk.virtual_size, settings)
        run = _Rebase(disk, opening, job)
        copied = run.relink(reference) if unsafe else run.move_to(reference)
        return RebaseResult(
            disk.path,
            disk.format,
            None if reference is None else reference.name,
            None if reference is None else reference.format,
            copied.read,
            copied.written,
            copied.zeroed,
            job.finish(),
        )


class _Rebase(NamedTuple):
    """One run; ``options`` are those of the image."""

    image: Image
    options: OpenOptions
    job: CopyJob

    def relink(self, reference: BackingReference | None) -> Copied:
        """Change the link, and nothing else."""
        image = self.image
        if not image.is_rebasable():
            require_rebasable(image)
        facts = None if reference is None else self._facts(reference)
        warn_about_new_identity(image, self.options.allow)
        self.job.run.keep()
        image.set_backing(facts)
        return Copied()

    def _facts(self, reference: BackingReference) -> BackingReference:
        """Return what the image stores about its parent, which need not be there."""
        path = backing_path(self.image.path, reference)
        with suppress(OSError):
            self._refuse_own(path, [named_identity(path)])
        try:
            with open_layer(path, self._new_options(reference)) as layer:
                return opened_reference(reference, layer)
        except (OSError, ImgcoreError) as error:
            if self.image.reader.identities:
                # An image of this format states the identity of its parent.
                raise
            text = f"{path}: {error.strerror}" if isinstance(error, OSError) else error
            log.warning("%s: its new backing file cannot be read: %s", self.image.path, text)
            return reference

    def _new_options(self, reference: BackingReference) -> OpenOptions:
        return OpenOptions(
            format=reference.format, allow=self.options.allow, flags=_NEW_FLAGS, share=True
        )

    def move_to(self, reference: BackingReference | None) -> Copied:
        """Copy what differs, and then change the link."""
        image = self.image
        require_rebasable(image)
        if reference is None:
            return flatten_image(image, self.job, self.options.allow)
        if image.reader.backing is None:
            raise OptionError(
                "has no backing file, so that all of its disk is its own: imgcore convert -B "
                "FILE -F FMT writes what differs from a backing file to a new image",
                path=image.path,
            )
        if image.reader.identities and reference.format != image.format:
            raise OptionError(
                f"the parent of {image.format} images has this format, too: {reference.name} has "
                f"{reference.format}",
                path=image.path,
            )
        with ExitStack() as stack:
            path = backing_path(image.path, reference)
            new = stack.enter_context(open_image(path, self._new_options(reference)))
            self._refuse_own(new.path, [file.identity for file in new.every_file()])
            facts = opened_reference(reference, new.chain[0])
            state = stack.enter_context(image.kept_open())
            base = stack.enter_context(new.kept_open())
            warn_about_new_identity(image, self.options.allow)
            copied = copy_areas(
                image,
                image,
                self._different(state, base),
                threads=self.job.threads,
                report=self.job.note_copied,
                control=self.job.control,
            )
            new.check_unchanged()
        self.job.run.phase = "syncing"
        image.flush()
        self.job.run.keep()
        image.set_backing(facts)
        return copied

    def _refuse_own(self, path: str, identities: Iterable[Identity]) -> None:
        """Raise if a new backing file has the image in its chain: that is a loop."""
        if not {file.identity for file in self.image.own_files()}.isdisjoint(identities):
            raise OptionError(
                f"the backing file {path} is the image, or has it as its own backing file",
                path=self.image.path,
            )

    def _different(self, state: DiskState, base: DiskState) -> Iterator[Area]:
        """Yield where the old backing file has other bytes than the new one."""
        found = Differences(
            WithoutOwn(state, state),
            WithoutOwn(base, state),
            nbytes=state.virtual_size,
            granularity=_GRANULARITY,
            threads=self.job.threads,
            limit=self.job.run.pauses,
            report=self.job.note_searched,
        )
        return found.areas()
