"""The verb ``sync``: brings an image up to date, by its changed areas alone."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any, Final, NamedTuple, SupportsIndex

from imgcore.areas.area import Area
from imgcore.border import FilePath, file_name, source_name
from imgcore.checksums.digest import BLOCK_NBYTES, Digest
from imgcore.checksums.new_tree import NewTree
from imgcore.checksums.tree import TreeFile, tree_nbytes
from imgcore.checksums.tree_mark import TreeMark
from imgcore.disk.area_search import AreaSearch, SearchSettings
from imgcore.disk.block_copy import Copied, copy_areas
from imgcore.disk.copy_job import CopyJob, CopySettings
from imgcore.disk.digests import DigestedDisk
from imgcore.disk.image import Image, open_image
from imgcore.disk.image_names import local_image
from imgcore.disk.open_options import FLAGS, Flags, OpenOptions
from imgcore.disk.opened import opened_for_update, require_no_options
from imgcore.engine.control import Control
from imgcore.engine.hashing import require_algorithm
from imgcore.engine.progress import Progress
from imgcore.errors import ImgcoreError, OptionError, TargetError
from imgcore.files.block_devices import below
from imgcore.files.commitment import until_committed
from imgcore.files.given import given_name
from imgcore.files.identity import named_identity
from imgcore.files.target import Target
from imgcore.log import log

if TYPE_CHECKING:
    from imgcore.disk.disk_state import DiskState
    from imgcore.engine.hashing import LeafSink
    from imgcore.files.commitment import Commitment
    from imgcore.files.identity import Identity

_TARGET_FLAGS: Final = Flags(format="-F", parent="--parent-b")
# Without a tree, whose blocks are larger, areas are rounded to these.
_GRANULARITY: Final = 4096


class SyncResult(NamedTuple):
    """The result of `imgcore.sync`.

    Attributes
    ----------
    source, target : str
        The names of the two files.
    source_format, target_format : str
        Their formats.
    virtual_size : int
        Bytes of the target's disk.
    areas : int
        Number of areas that have changed.
    bytes_read : int
        Bytes of them that were read from the source to be copied.
    bytes_written, bytes_zeroed : int
        Bytes that were written to the target as data, and that became zeros.
    seconds : float
        Duration.
    checksum : Digest or None
        The digest of the source's disk, if ``checksum`` or ``tree`` was given.
    """

    source: str
    target: str
    source_format: str
    target_format: str
    virtual_size: int
    areas: int
    bytes_read: int
    bytes_written: int
    bytes_zeroed: int
    seconds: float
    checksum: Digest | None = None


def sync(
    source: FilePath | int | Image,
    target: FilePath | int | Image,
    *,
    areas: FilePath | Sequence[Area | tuple[SupportsIndex, SupportsIndex]] | None = None,
    bitmap: str | None = None,
    since: FilePath | int | None = None,
    by_checksum: bool = False,
    tree: FilePath | None = None,
    checksum: str | None = None,
    resize: bool = False,
    threads: SupportsIndex | None = None,
    progress: Callable[[Progress], None] | None = None,
    rate: SupportsIndex | str | None = None,
    control: Control | None = None,
    format: str | None = None,
    target_format: str | None = None,
    backing_format: str | None = None,
    parent: FilePath | Sequence[FilePath] | None = None,
    target_parent: FilePath | Sequence[FilePath] | None = None,
    read_options: Mapping[str, Any] | Sequence[str] | None = None,
    target_read_options: Mapping[str, Any] | Sequence[str] | None = None,
    allow: Sequence[FilePath] = (),
    share: bool = False,
    format_since: str | None = None,
    parent_since: FilePath | Sequence[FilePath] | None = None,
    read_options_since: Mapping[str, Any] | Sequence[str] | None = None,
) -> SyncResult:
    """Make the disk in an existing image equal to that of another, in place.

    Only what has changed is read and written.  At most one of ``areas``, ``bitmap``,
    ``since`` and ``by_checksum`` states how that is found.  Without them it is
    ``tree``, or else ``by_checksum``.

    ``format``, ``parent``, ``read_options`` and ``share`` are the keywords of
    `imgcore.open` for the source.  Those that begin with ``target_`` are for the
    target, and those that end in ``_since`` for the image ``since``.
    ``backing_format`` and ``allow`` apply to all.

    Parameters
    ----------
    source : str, bytes, os.PathLike, int or Image
        The disk as it is now: a file, an open descriptor of one, or an open image,
        which stays open, and takes no keywords for opening.
    target : str, bytes, os.PathLike, int or Image
        The image that is written to.  An open one has the mode ``"r+"``.
    areas : str, bytes, os.PathLike, or sequence of Area or (offset, length), optional
        The areas that have changed; see `imgcore.changes`.
    bitmap : str, optional
        The name of a persistent bitmap in ``source`` that marks them.
    since : str, bytes, os.PathLike or int, optional
        An older image of the disk, which has what the target has.
    by_checksum : bool
        Read both disks, and compare them.
    tree : str, bytes or os.PathLike, optional
        The checksum tree of the target's disk, which a former run or
        `imgcore.checksum` has written.  If nothing else states what has changed, the
        source is read once and compared with it.  It is replaced by the tree of the
        new state when the target is on stable storage.  With ``by_checksum`` it need
        not exist.
    checksum : str, optional
        Also return the digest of the source's disk: ``"sha256"`` or ``"blake3"``.
        Without a tree, all of the source is read for it.
    resize : bool
        Let the target grow if the source's disk is larger.
    threads : int, optional
        Number of threads that read; one per CPU by default.
    progress : callable, optional
        Called with a `Progress` on the calling thread, at most every 50 ms and once at
        the end.
    rate : int or str, optional
        The most bytes of changed data to copy in a second, for example ``"100M"``.
    control : Control, optional
        Steers the run from other threads, and has its rate, in place of ``rate``.

    Returns
    -------
    SyncResult

    Raises
    ------
    OptionError
        The arguments contradict each other, the source's disk is larger than the
        target's, or the areas or the tree are of another disk.
    TargetError
        Another process uses the target; or the source is read from it.
    ImgcoreError, OSError
        An image cannot be read or written, or the source has changed meanwhile.

    Notes
    -----
    A run that fails has copied some of the areas.  The target is a sound image then,
    and its tree is the old one, so that the same call copies all of them.

    What the target has after the end of a smaller source stays as it is.
    """
    finders = {"areas": areas, "bitmap": bitmap, "since": since}
    given = [name for name, value in finders.items() if value is not None]
    given += ["by_checksum"] if by_checksum else []
    if len(given) > 1:
        raise OptionError(f"{' and '.join(given)} are given: one states what has changed")
    if checksum is not None:
        require_algorithm(checksum)
    settings = CopySettings.from_keywords(threads, rate, control, progress)
    opening = OpenOptions.from_keywords(
        format=format,
        backing_format=backing_format,
        parent=parent,
        read_options=read_options,
        allow=allow,
        share=share,
    )
    writing = OpenOptions.from_keywords(
        format=target_format,
        backing_format=backing_format,
        parent=target_parent,
        read_options=target_read_options,
        allow=allow,
        flags=_TARGET_FLAGS,
    )
    older = OpenOptions.from_keywords(
        format=format_since,
        backing_format=backing_format,
        parent=parent_since,
        read_options=read_options_since,
        allow=allow,
        share=share,
        flags=Flags(format="", parent=""),
    )

    def find(search: AreaSearch, new: DiskState, old: DiskState) -> Iterator[Area]:
        if areas is not None:
            return search.listed(areas)
        if bitmap is not None:
            return search.marked(bitmap)
        if since is not None:
            return search.since(source_name(since), older)
        return _compared(search, new, old)

    with settings.run, ExitStack() as stack:
        disk = _opened(source, opening, stack)
        if not isinstance(target, Image):
            # Without this, the source would keep its own target out.
            name, _ = local_image(source_name(target), writing)
            shown = given_name(name) if isinstance(name, int) else name
            _refuse_own_source(disk, shown, [named_identity(name)])
        image = stack.enter_context(opened_for_update(target, _own(target, writing)))
        _refuse_own_source(disk, image.path, [file.identity for file in image.own_files()])
        _fit(image, disk.virtual_size, resize=resize)
        run = _Sync(disk, image, find, CopyJob(disk.virtual_size, settings))
        if tree is None:
            return run.without_tree(checksum)
        is_partial = bool(given) and not by_checksum
        return run.with_tree(file_name(tree), checksum, by_tree=not given, keeps_leaves=is_partial)


def _compared(search: AreaSearch, new: DiskState, old: DiskState) -> Iterator[Area]:
    return search.compared(old, new.virtual_size)


def _own(image: FilePath | int | Image, options: OpenOptions) -> OpenOptions:
    """Return options without those for all images if the image is open already."""
    if not isinstance(image, Image):
        return options
    return options._replace(backing_format=None, allow=(), share=False, flags=FLAGS)


def _opened(image: FilePath | int | Image, options: OpenOptions, stack: ExitStack) -> Image:
    """Return the open source; ``stack`` closes it if it was opened here."""
    if not isinstance(image, Image):
        return stack.enter_context(open_image(source_name(image), options))
    require_no_options(image, _own(image, options))
    return image


def _refuse_own_source(source: Image, target: str, identities: Sequence[Identity]) -> None:
    """Raise TargetError if the source has one of the files that would be changed."""
    changed = {one for identity in identities for one in _with_below(identity)}
    for file in source.every_file():
        if not changed.isdisjoint(_with_below(file.identity)):
            raise TargetError(
                "is the source, or one of its backing files, and would change while it is read",
                path=target,
            )


def _with_below(identity: Identity) -> tuple[Identity, ...]:
    return identity, *below(identity)


def _fit(target: Image, nbytes: int, *, resize: bool) -> None:
    """Make the target's disk large enough."""
    if target.virtual_size >= nbytes:
        return
    if not resize:
        raise OptionError(
            f"its disk has {target.virtual_size} bytes, and that of the source {nbytes}: state "
            "that it may grow (--resize)",
            path=target.path,
        )
    target.resize(nbytes)


class _Sync:
    """One run.

    Parameters
    ----------
    source, target : Image
    find : callable
        Returns the areas, for a search in the source and the state of both.
    job : CopyJob
    """

    def __init__(
        self,
        source: Image,
        target: Image,
        find: Callable[[AreaSearch, DiskState, DiskState], Iterator[Area]],
        job: CopyJob,
    ) -> None:
        self._source, self._target = source, target
        self._find = find
        self._job = job
        # Of the target's tree, if there is one.
        self._mark: TreeMark | None = None

    def without_tree(self, checksum: str | None) -> SyncResult:
        """Copy what has changed, and read the source for a digest if one is wanted."""
        with self._source.kept_open() as state:
            copied = self._copy(self._found(state, _GRANULARITY))
            digest = None
            if checksum is not None:
                digest = self._digest(DigestedDisk.of_state(state), checksum)
        return self._result(copied, digest)

    def with_tree(
        self, path: str, checksum: str | None, *, by_tree: bool, keeps_leaves: bool
    ) -> SyncResult:
        """Copy what has changed, and replace the target's tree at the end.

        Parameters
        ----------
        path : str
        checksum : str, optional
            The algorithm, which is the tree's by default.
        by_tree : bool
            The tree tells what has changed.
        keeps_leaves : bool
            What has not changed keeps its leaves, and is not read.
        """

        def job(commitment: Commitment[SyncResult]) -> None:
            with ExitStack() as stack:
                state = stack.enter_context(self._source.kept_open())
                disk = DigestedDisk.of_state(state)
                output = stack.enter_context(Target(path, force=True))
                output.protect([*disk.files, *self._target.every_file()])
                output.require_space(tree_nbytes(disk.nbytes))
                uses_tree = by_tree or keeps_leaves
                old = self._old_tree(path, stack, is_needed=uses_tree)
                algorithm = checksum or "sha256"
                if old is not None and uses_tree:
                    algorithm = checksum or old.digest.algorithm
                    old.refuse_other(disk.path, algorithm, disk.nbytes)
                if old is None or not uses_tree or self._is_stale(old):
                    copied = self._copy(self._found(state, _GRANULARITY))
                    new = NewTree(output.main, algorithm, disk.nbytes)
                    self._digest(disk, algorithm, new)
                else:
                    new = NewTree(output.main, algorithm, disk.nbytes, old)
                    if by_tree:
                        found = disk.changed_since(
                            old,
                            threads=self._job.threads,
                            limit=self._job.run.pauses,
                            sink=new,
                            report=self._searched,
                        )
                        copied = self._copy(found)
                    else:
                        found = self._found(state, BLOCK_NBYTES)
                        copied = self._copy(found, new.replace)
                        old.check_unchanged()
                result = self._result(copied, new.finish())
                output.prepare()
                self._job.run.keep()
                commitment.commit(output, result)
                if self._mark is not None:
                    self._mark.remove()

        return until_committed(job)

    def _digest(self, disk: DigestedDisk, algorithm: str, sink: LeafSink | None = None) -> Digest:
        return disk.digest(
            algorithm,
            threads=self._job.threads,
            limit=self._job.run.pauses,
            sink=sink,
            report=lambda *_: self._searched(0, 0),
        )

    def _old_tree(self, path: str, stack: ExitStack, *, is_needed: bool) -> TreeFile | None:
        """Open the tree; None if it is not needed, and cannot be used."""
        try:
            tree = stack.enter_context(TreeFile.open(path))
        except (OSError, ImgcoreError):
            if is_needed:
                raise
            return None
        self._mark = TreeMark(tree)
        return tree

    def _is_stale(self, tree: TreeFile) -> bool:
        """Tell whether the tree does not suit the target; then both are compared."""
        if self._mark is None or not self._mark.is_set():
            return False
        log.warning(
            "%s: an interrupted sync left a target that may differ from its tree: both disks are "
            "compared",
            tree.path,
        )
        self._find = _compared
        return True

    def _searched(self, done: int, _data: int) -> None:
        self._job.note_searched(done)

    def _found(self, state: DiskState, granularity: int) -> Generator[Area, None, None]:
        """Yield the areas, in whole blocks."""
        job = self._job
        how = SearchSettings(
            granularity,
            job.threads,
            lambda state: job.note_searched(state.done),
            job.run.pauses,
        )
        with self._target.kept_open() as old:
            yield from self._find(AreaSearch(state, how), state, old)

    def _copy(
        self,
        areas: Generator[Area, None, None],
        observe: Callable[[int, int, memoryview | None], None] | None = None,
    ) -> Copied:
        # The search keeps files open until it ends, also after an error.
        with closing(areas):
            return copy_areas(
                self._source,
                self._target,
                areas if self._mark is None else self._mark.before(areas),
                threads=self._job.threads,
                report=self._job.note_copied,
                observe=observe,
                control=self._job.control,
            )

    def _result(self, copied: Copied, digest: Digest | None) -> SyncResult:
        """Make the target durable, and return the result."""
        self._job.run.phase = "syncing"
        self._target.flush()
        self._source.check_unchanged()
        return SyncResult(
            source=self._source.path,
            target=self._target.path,
            source_format=self._source.format,
            target_format=self._target.format,
            virtual_size=self._target.virtual_size,
            areas=copied.areas,
            bytes_read=copied.read,
            bytes_written=copied.written,
            bytes_zeroed=copied.zeroed,
            seconds=self._job.finish(),
            checksum=digest,
        )
