"""The verb ``rewrite``: makes an image one of another format in its own file."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from imgcore.border import FilePath, file_name
from imgcore.disk.children import refuse_children
from imgcore.disk.open_options import Flags, OpenOptions
from imgcore.engine.control import Run
from imgcore.engine.progress import Tally
from imgcore.errors import CorruptImageError, LimitExceededError, OptionError, TargetError
from imgcore.files import in_place
from imgcore.files.in_place import InPlace
from imgcore.files.journal import SUFFIX
from imgcore.files.reference_gate import ReferenceGate
from imgcore.formats.api import Described
from imgcore.formats.registry import get_driver
from imgcore.limits import MIB
from imgcore.log import log
from imgcore.rewriting.naming import new_name
from imgcore.rewriting.refusals import refuse_damaged
from imgcore.rewriting.wish import Wish, open_alone, warn_about_disk

if TYPE_CHECKING:
    from imgcore.disk.image import Image
    from imgcore.engine.control import Control
    from imgcore.engine.progress import Progress
    from imgcore.files.host_file import HostFile
    from imgcore.rewriting.director import Director, RewriteCost

# Tables are counted exactly before their space is required if they may be larger.
_MAX_ESTIMATED_TABLES_NBYTES: Final = 256 * MIB
_FLAGS: Final = Flags(backing_format="", parent="")


class RewriteResult(NamedTuple):
    """The result of `imgcore.rewrite`; all sizes in bytes.

    Attributes
    ----------
    path : str
        The image's new name.
    source_format, target_format : str
        Its formats before and now.
    virtual_size : int
        Size of its disk.
    bytes_stayed, bytes_moved : int
        Bytes of the disk in blocks that stayed in their place, and in blocks that were
        copied.
    bytes_tables : int
        Bytes of tables and headers that were appended to the file.
    bytes_overwritten : int
        Bytes of the old file that were overwritten; the journal has them.
    bytes_written : int
        Bytes written to the file: moved, tables and overwritten.
    file_size : int
        Size of the file now.
    journal : str or None
        The journal, with which `undo_rewrite` restores the old image; None if there is
        none.
    recovered : bool
        An earlier call did the work; if it was interrupted, this one completed it.  The
        numbers of bytes are 0 then.
    seconds : float
        Duration.
    """

    path: str
    source_format: str
    target_format: str
    virtual_size: int
    bytes_stayed: int = 0
    bytes_moved: int = 0
    bytes_tables: int = 0
    bytes_overwritten: int = 0
    bytes_written: int = 0
    file_size: int = 0
    journal: str | None = None
    recovered: bool = False
    seconds: float = 0.0


def rewrite(
    image: FilePath,
    target_format: str,
    *,
    options: Mapping[str, Any] | Sequence[str] | None = None,
    name: FilePath | None = None,
    keep_name: bool = False,
    format: str | None = None,
    allow: Sequence[FilePath] = (),
    drop: bool = False,
    inflate: bool = False,
    trust_blocks: bool = False,
    keep_undo: bool = True,
    dry_run: bool = False,
    progress: Callable[[Progress], None] | None = None,
    control: Control | None = None,
) -> RewriteResult:
    """Make an image one of another format in its own file, without copying its data.

    Blocks of data stay where they are in the file.  The new format's tables are
    appended, and blocks in the way of its header are copied to the end.  A journal
    beside the image (``NAME.imgcore-journal``) makes each moment recoverable: after a
    crash, the same call restores the old image and starts again, or completes the new
    one.

    Parameters
    ----------
    image : str, bytes or os.PathLike
        The image, a regular file that nobody else has open.
    target_format : str
        The new format.
    options : mapping or sequence of str, optional
        Its options, as a mapping or as strings ``"key=value,..."``.
    name : str, bytes or os.PathLike, optional
        The image's new name in its folder; by default, the suffix of the new format
        takes the place of the old one's.
    keep_name : bool
        Keep the old name.
    format : str, optional
        The image's format; see `imgcore.open`.
    allow : sequence of str, bytes or os.PathLike
        Further folders in which to look for children of the image, which would be lost,
        and in which files that it names may lie.
    drop : bool
        Leave out what the new image will not have, such as snapshots.
    inflate : bool
        Decompress blocks that the new format cannot refer to.
    trust_blocks : bool
        Do not verify compressed blocks that stay compressed: those of a streamOptimized
        VMDK that becomes a QCOW2.  A damaged one is an error otherwise, before anything
        is changed.
    keep_undo : bool
        Keep the journal, with which `imgcore.undo_rewrite` restores the old image.
        Without it, unused space of the file is given back.
    dry_run : bool
        Only compute the result; no file is changed.
    progress : callable, optional
        As for `imgcore.convert`.
    control : Control, optional
        Steers the job from other threads.  Its rate is about the data that moves.  If
        it is cancelled, the old image is restored.

    Returns
    -------
    RewriteResult

    Raises
    ------
    UnsupportedFeatureError
        The image cannot be rewritten: it has a parent, children, snapshots or
        compressed blocks, the formats do not go together, or most of its data would
        have to be copied.
    TargetError
        The image is in use, has several names, or the new name is taken.
    OptionError
        An option is wrong.
    ImgcoreError, OSError
        The image cannot be read or written.  The old image is then restored.
    """
    started = time.monotonic()
    job = _Job(
        path=file_name(image),
        wish=Wish.from_keywords(
            target_format, options, drop=drop, inflate=inflate, trust_blocks=trust_blocks
        ),
        opening=OpenOptions.from_keywords(format=format, allow=allow, flags=_FLAGS),
        name=None if name is None else file_name(name),
        keep_name=keep_name,
    )
    result = job.rehearsed() if dry_run else job.recovered()
    if result is None:
        with Run(control, progress) as run:
            result = job.run(run)
    if result.journal is not None and not keep_undo:
        finish_rewrite(result.path)
        result = result._replace(journal=None, file_size=os.stat(result.path).st_size)
    return result._replace(seconds=time.monotonic() - started)


def undo_rewrite(image: FilePath) -> str:
    """Restore the image that a file was before it was rewritten.

    Parameters
    ----------
    image : str, bytes or os.PathLike
        The new image.

    Returns
    -------
    str
        The name of the old image.

    Raises
    ------
    ImgcoreError
        There is no journal, or the new image was written to.
    TargetError, OSError
        The image is in use, or cannot be written.
    """
    path = file_name(image)
    old_name = in_place.described(path)["old_name"]
    return _beside(in_place.undo(path, _is_whole), old_name)


def finish_rewrite(image: FilePath) -> str:
    """Remove the journal of a rewritten image, and give back unused space of its file.

    It cannot be undone afterwards.

    Parameters
    ----------
    image : str, bytes or os.PathLike
        The new image.

    Returns
    -------
    str
        Its name.

    Raises
    ------
    ImgcoreError
        There is no journal, or it is that of a conversion that was interrupted: the old
        image is restored then.
    TargetError, OSError
        The image is in use, or cannot be written.
    """
    path = file_name(image)
    found = in_place.recover(path, _is_whole)
    if found is None:
        return in_place.finish(path)
    if found.state == "old":
        raise TargetError(
            "its conversion had been interrupted before it was complete: the old image is restored",
            path=found.path,
        )
    return _beside(in_place.finish(found.path, _used_ranges(found)), found.job["name"])


def _beside(path: str, name: str) -> str:
    """Return the path of an image whose disk is in a file beside it, or in itself."""
    return os.path.join(os.path.dirname(path), os.path.basename(name))


def _is_whole(file: HostFile, facts: Mapping[str, Any]) -> bool:
    """Tell whether the tables of an old image refer to nothing past its file's end."""
    driver = get_driver(facts["source_format"])
    gate = ReferenceGate(os.path.dirname(file.path), image=file.path, unstated="-f")
    try:
        with closing(driver.open(file, gate)) as reader:
            refuse_damaged(reader, file.path)
    except CorruptImageError:
        return False
    return True


def _used_ranges(found: in_place.Recovered) -> list[tuple[int, int]] | None:
    """Return the ranges of a new image's file that hold data; None if not known."""
    from imgcore.rewriting.survey import survey_image

    opening = OpenOptions(format=found.job["target_format"], flags=_FLAGS)
    with open_alone(_beside(found.path, found.job["name"]), opening) as image:
        try:
            rows = survey_image(image).rows
        except LimitExceededError as error:
            log.warning("%s: unused blocks keep their space", error)
            return None
    return list(zip(rows["host_offset"].tolist(), rows["host_length"].tolist(), strict=True))


class _Job(NamedTuple):
    """One image, and what it shall become."""

    path: str
    wish: Wish
    opening: OpenOptions
    name: str | None
    keep_name: bool

    def _new_name(self) -> str:
        format = self.wish.driver.name
        return new_name(self.path, format, name=self.name, keep_name=self.keep_name)

    def _new_path(self) -> str:
        return _beside(self.path, self._new_name())

    def rehearsed(self) -> RewriteResult:
        """Return the result without changing anything."""
        with open_alone(self.path, self.opening) as image:
            director = self._director(image)
            refuse_children(image, self.opening.allow)
            self._names(image, director)
            return self._result(image, director.rehearse())

    def recovered(self) -> RewriteResult | None:
        """Go on after an interruption: forward if that completes the same work."""
        found = in_place.recover(self.path, _is_whole)
        if found is None or found.state == "old":
            return None
        if found.job.get("target_format") != self.wish.driver.name:
            return None
        return RewriteResult(
            path=_beside(found.path, found.job["name"]),
            source_format=found.job["source_format"],
            target_format=found.job["target_format"],
            virtual_size=found.job["virtual_size"],
            file_size=os.stat(found.path).st_size,
            journal=found.path + SUFFIX,
            recovered=True,
        )

    def run(self, run: Run) -> RewriteResult:
        """Rewrite the image."""
        from imgcore.rewriting.moving import Workers

        with ExitStack() as stack:
            place = stack.enter_context(InPlace(self._data_path()))
            # The locks are our own now.
            reading = self.opening._replace(share=True)
            image = stack.enter_context(open_alone(self.path, reading))
            director = self._director(image)
            if image.sources[0].file.identity != place.identity:
                raise TargetError("was replaced while it was opened", path=self.path)
            refuse_children(image, self.opening.allow)
            warn_about_disk(image, director, self._new_name())
            needed_nbytes = _needed_nbytes(director)
            place.require_space(needed_nbytes)
            tally = Tally(image.virtual_size, run.report)
            names = self._names(image, director)
            staged = place.start(
                self._head(image),
                director.overwrites,
                reserve_nbytes=needed_nbytes,
                **names,
            )
            cost = director.write(staged, tally, Workers.default(run.limit))
            tally.finish()
            run.keep()
            run.phase = "syncing"
            result = self._result(image, cost)
            # Its descriptors would look like those of another program.
            image.close()
            place.commit()
            return result._replace(journal=place.journal_path)

    def _data_path(self) -> str:
        """Return the file that holds the disk; it may not be the one with the name."""
        with open_alone(self.path, self.opening) as image:
            path = image.sources[0].file.path if image.sources else self.path
        folder = os.path.dirname(os.path.abspath(path))
        if folder != os.path.dirname(os.path.abspath(self.path)):
            raise TargetError(f"the file of its disk is in another folder: {path}", path=self.path)
        return path

    def _director(self, image: Image) -> Director:
        director = self.wish.director(image, self._new_name())
        if not self.wish.inflate:
            director.refuse_large_move()
        return director

    def _names(self, image: Image, director: Director) -> dict[str, Any]:
        """Return the files' names as `InPlace.start` takes them."""
        new, old = self._new_name(), os.path.basename(self.path)
        removed = [old] if image.files[0].identity != image.sources[0].file.identity else []
        if not isinstance(director.rewriter, Described):
            names: dict[str, Any] = {"name": new, "removed": removed}
        else:
            description = {new: director.rewriter.description}
            names = {
                "name": director.rewriter.data_name,
                "created": description,
                "removed": removed,
            }
        if new == old and (removed or "created" in names):
            raise OptionError(
                f"one of the two files of a disk is {old}: --name states another name",
                path=self.path,
            )
        return names

    def _head(self, image: Image) -> dict[str, Any]:
        return {
            "source_format": image.format,
            "target_format": self.wish.driver.name,
            "virtual_size": image.virtual_size,
            "name": self._new_name(),
            "old_name": os.path.basename(self.path),
        }

    def _result(self, image: Image, cost: RewriteCost) -> RewriteResult:
        sizes = cost._asdict()
        del sizes["block_size"]
        return RewriteResult(
            path=self._new_path(),
            source_format=image.format,
            target_format=self.wish.driver.name,
            virtual_size=image.virtual_size,
            **sizes,
        )


def _needed_nbytes(director: Director) -> int:
    """Return how much space the new blocks, the tables and the journal may take."""
    tables = director.tables_bound
    if tables > _MAX_ESTIMATED_TABLES_NBYTES:
        tables = director.rehearse().bytes_tables
    journal = 2 * sum(length for _, length in director.overwrites)
    return director.moved_nbytes + tables + journal
