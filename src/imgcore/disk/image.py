"""An open image, with its backing files: sizes, extents, random-access reads."""

from __future__ import annotations

import io
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, NoReturn, SupportsIndex, TypeVar

from imgcore.border import (
    FilePath,
    byte_count,
    integer,
    octets_of,
    range_of_disk,
    request_of,
    source_name,
)
from imgcore.disk.chain import open_chain
from imgcore.disk.disk_state import DiskState
from imgcore.disk.open_options import OpenOptions
from imgcore.disk.pieces import Piece, without_overlaps
from imgcore.errors import ImgcoreError, OptionError
from imgcore.files.closable import Closable
from imgcore.files.descriptors import forks_held_back
from imgcore.formats.api import Rebasable, SectorSized
from imgcore.formats.registry import get_driver
from imgcore.limits import GIB, SECTOR_NBYTES

if TYPE_CHECKING:
    import numpy as np
    from _typeshed import ReadableBuffer, WriteableBuffer

    from imgcore._core import Uses
    from imgcore.disk.layer import Layer
    from imgcore.disk.overlay import Depths
    from imgcore.disk.random_access import RandomAccess
    from imgcore.disk.salvage import Salvage
    from imgcore.disk.write_access import Access, WriteAccess
    from imgcore.engine.extents import Extents
    from imgcore.engine.reflinks import ReflinkRule
    from imgcore.engine.source_file import SourceFile
    from imgcore.files.byte_source import ByteSource
    from imgcore.files.host_file import HostFile
    from imgcore.files.identity import Identity
    from imgcore.formats.api import BackingReference, Reader, Updater


_Item = TypeVar("_Item")

# Whole blocks of every format.
_DROPPED_NBYTES: Final = 16 * GIB

# What an open image imports when it is used first.
_USED_BY_READS: Final = (
    "imgcore._core",
    "imgcore.disk.describe",
    "imgcore.disk.disk_file",
    "imgcore.disk.host_holes",
    "imgcore.disk.overlay",
    "imgcore.disk.random_access",
    "numpy.ma",  # numpy.union1d
)


# The users of the files that all reads of ranges are together (`Closable._begin_use`),
# and all changes.
_READS: Final = "reads"
_CHANGES: Final = "changes"


class Image(Closable):
    """A virtual disk that is open for reading; `imgcore.open` returns it.

    Several threads may use it at once, and any of them may close or refresh it: uses in
    progress end as if it had not, and every use after `close` raises ValueError.  An
    image that is dropped without `close` is closed with a ResourceWarning.

    Attributes
    ----------
    path : str
        The image file; ``"descriptor N"`` if it was given by its descriptor.
    format, subformat : str
        For example ``"vmdk"`` and ``"streamOptimized"``; ``subformat`` may be None.
    virtual_size : int
        Bytes of the virtual disk.
    block_size : int
        Bytes of its allocation unit (cluster, grain).
    sources : list of SourceFile
        Every file that extents refer to by index, those of backing files included.
    paths : list of str
        Their names.
    """

    _what = "image"
    # Whether a forked child has it from its parent, which writes to it.
    _is_foreign = False

    def __init__(
        self, chain: Sequence[Layer], source: str | os.PathLike[str] | int, options: OpenOptions
    ) -> None:
        self._source = source
        # The working folder may be another when the image is refreshed.
        self._options = options._replace(allow=tuple(map(os.path.abspath, options.allow)))
        self._state = DiskState(chain)
        self.path: str = self._state.path
        # Those that iterators still use are among them.
        self._states = weakref.WeakSet([self._state])
        self._refreshing = threading.RLock()
        # Made by the first read.
        self._disk: RandomAccess | None = None
        self._reads: Uses | None = None
        # Of an image that is written in place: what changes it, made by the first
        # change, and the views of its states that readers have.
        self._writer: WriteAccess | None = None
        self._changes: Uses | None = None
        self._views: weakref.WeakSet[DiskState] = weakref.WeakSet()
        super().__init__()

    @property
    def format(self) -> str:
        return self.reader.format_name

    @property
    def subformat(self) -> str | None:
        return self.reader.subformat

    @property
    def virtual_size(self) -> int:
        return self._state.virtual_size

    @property
    def block_size(self) -> int:
        return self.reader.block_nbytes

    @property
    def sources(self) -> list[SourceFile]:
        return self._state.sources

    @property
    def paths(self) -> list[str]:
        """Names of the source files, by the index that extents use."""
        return self._state.paths

    @property
    def mode(self) -> str:
        """How it was opened: "r", or "r+" if it is also written in place."""
        return "r+" if self._options.writable else "r"

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._is_closed

    # The verbs use what is inside; see `DiskState`.

    @property
    def chain(self) -> list[Layer]:
        """The image and its parents."""
        return self._state.chain

    @property
    def layers(self) -> list[Reader]:
        """The reader of each."""
        return self._state.layers

    @property
    def reader(self) -> Reader:
        """The image's own reader."""
        return self._state.layers[0]

    @property
    def first_files(self) -> list[int]:
        """The index of each layer's first file in ``sources``."""
        return self._state.first_files

    @property
    def files(self) -> list[HostFile]:
        """The file of each layer that was opened by its name or descriptor."""
        return self._state.files

    @property
    def logical_sector_nbytes(self) -> int | None:
        """Bytes of a logical sector, or None if the format does not state it."""
        with self._in_use():
            reader = self.reader
            return reader.logical_sector_nbytes if isinstance(reader, SectorSized) else None

    def layer_extents(
        self, start: SupportsIndex = 0, length: SupportsIndex | None = None
    ) -> Iterator[tuple[Extents, Depths]]:
        """Yield extents as `extents` does, and for each the layer that it comes from.

        Yields
        ------
        tuple of ndarray
            The extents, and their depths (uint16): 0 for the image itself, 1 for its
            backing file, and so on.
        """
        with self._in_use():
            state = self._view()
            batches = state.layer_extents(*self._range(state, start, length))
            return self._guarded(state, batches)

    def extents(
        self,
        start: SupportsIndex = 0,
        length: SupportsIndex | None = None,
        *,
        layer: SupportsIndex | None = None,
    ) -> Iterator[Extents]:
        """Yield the extents of a range: where its bytes are stored.

        Parameters
        ----------
        start : int
            Byte offset in the disk, a multiple of 512.
        length : int, optional
            Bytes, a multiple of 512 unless the range ends with the disk; up to the end
            of the disk by default.
        layer : int, optional
            Yield only what this layer of the chain states: 0 is the image itself, 1 its
            backing file, and so on.  The rest is holes, also past the end of a backing
            file that is shorter than the disk.

        Yields
        ------
        ndarray
            A batch of extents, shape (n,), ascending and gap-free.  Its fields include
            ``guest_offset``, ``length``, ``host_offset``, ``host_length``, ``file`` (an
            index into ``sources``) and ``kind``.

        Raises
        ------
        ValueError
            The range is not inside the disk, there is no such layer, or the image is
            closed; raised at the call, and for an image that is closed later by the
            next step.
        CorruptImageError
            A table entry points outside its file.
        """
        with self._in_use():
            state = self._view()
            first, nbytes = self._range(state, start, length)
            if layer is None:
                return self._guarded(state, state.extents(first, nbytes))
            depth = integer(layer, "layer")
            if not 0 <= depth < len(state.layers):
                raise ValueError(
                    f"{self.path}: layer is {depth}, but its chain has {len(state.layers)}, "
                    "numbered from 0"
                )
            return self._guarded(state, state.extents_of_layer(depth, first, nbytes))

    def data_extents(
        self,
        start: SupportsIndex = 0,
        length: SupportsIndex | None = None,
        *,
        rule: ReflinkRule | None = None,
    ) -> Iterator[Extents]:
        """Yield the extents of a range, with long holes of host files as ZERO.

        What is reflinked by ``rule`` is marked, and may contain such holes.
        """
        with self._in_use():
            state = self._view()
            batches = state.data_extents(*self._range(state, start, length), rule)
            return self._guarded(state, batches)

    def salvaged_extents(self, salvage: Salvage) -> Iterator[Extents]:
        """Yield the data extents of the disk; what is lost is ZERO, and listed."""
        with self._in_use():
            state = self._view()
            return self._guarded(state, state.salvaged_extents(salvage))

    def _range(
        self,
        state: DiskState,
        start: SupportsIndex,
        length: SupportsIndex | None,
        what: str = "start",
    ) -> tuple[int, int]:
        """Return a range of the disk as two ints; ValueError if it is not inside.

        ``what`` names the argument ``start`` in messages.
        """
        return range_of_disk(self.path, state.virtual_size, start, length, what)

    @contextmanager
    def kept_open(self) -> Iterator[DiskState]:
        """Keep the files open in a ``with`` block; ValueError if they are closed.

        It receives the state of the image, which is closed when it is dropped, if the
        image is refreshed meanwhile.
        """
        with self._in_use():
            yield self._view()

    def _view(self) -> DiskState:
        """Return the state for one reader, during whose life no space is used again."""
        if not self._options.writable:
            return self._state
        view = self._state.view()
        self._views.add(view)
        return view

    def _guarded(self, state: DiskState, batches: Iterator[_Item]) -> Iterator[_Item]:
        """Yield from an iterator that uses the files: only its steps keep them open.

        It goes on with the state of the image that it has begun with, which is closed
        with the image, or else when the iterator ends or is dropped.
        """
        while True:
            with self._in_use():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def read(self, offset: SupportsIndex, length: SupportsIndex) -> bytes:
        """Return ``length`` bytes of the virtual disk, starting at ``offset``.

        Raises
        ------
        ValueError
            The range is not inside the disk, or the image is closed.
        CorruptImageError, OSError
            The bytes cannot be read.
        """
        disk = self._disk or self._start_reading()
        try:
            return disk.read(offset, length)
        except Exception as error:
            disk.explain(error)

    def readinto(
        self,
        offset: SupportsIndex,
        buffer: WriteableBuffer | np.ndarray[Any, Any],
        *,
        threads: SupportsIndex | None = None,
    ) -> int:
        """Fill a buffer with the bytes of the virtual disk that start at ``offset``.

        Parameters
        ----------
        offset : int
            Byte offset in the disk; any alignment.
        buffer : writable bytes-like
            All of it is filled, or its content is undefined after an exception.
        threads : int, optional
            Most threads that read at once.  By default one per CPU, fewer for short
            reads, which the calling thread does alone.

        Returns
        -------
        int
            Bytes of the buffer.

        Raises
        ------
        ValueError, CorruptImageError, OSError
            As for `read`.
        TypeError, BufferError
            The buffer is not contiguous, or not writable.
        """
        disk = self._disk or self._start_reading()
        try:
            return disk.readinto(offset, buffer, threads)
        except Exception as error:
            disk.explain(error)

    def readv(
        self,
        requests: Iterable[tuple[SupportsIndex, WriteableBuffer | np.ndarray[Any, Any]]],
        *,
        threads: SupportsIndex | None = None,
    ) -> None:
        """Fill several buffers, each with the bytes that start at its offset.

        Parameters
        ----------
        requests : iterable of tuple
            Pairs of an offset and a buffer, as for `readinto`, in any order.  All are
            verified before the first is read.
        threads : int, optional
            Most threads that read at once; one per CPU by default.

        Raises
        ------
        ValueError, CorruptImageError, OSError, TypeError, BufferError
            As for `readinto`.  The content of all buffers is undefined then.
        """
        disk = self._disk or self._start_reading()
        try:
            disk.readv(requests, threads)
        except Exception as error:
            disk.explain(error)

    def write(self, offset: SupportsIndex, data: ReadableBuffer) -> int:
        """Write bytes to the virtual disk, from ``offset`` on.

        Parameters
        ----------
        offset : int
            Byte offset in the disk; any alignment.
        data : bytes-like
            Contiguous.

        Returns
        -------
        int
            Bytes of the data.

        Raises
        ------
        ValueError
            The range is not inside the disk, or the image is closed.
        ImgcoreError
            The image is open for reading only.
        OSError
            The file system is full, or fails.  The range then has old and new bytes.
        """
        in_place = None if self._writer is None else self._writer.in_place
        if in_place is not None:
            nbytes = in_place.overwrite(offset, data)
            if nbytes is not None:
                return nbytes
        writer, changes = self._writing()
        with changes:
            piece = self._piece(offset, data)
            writer.write([piece])
            return piece.nbytes

    def _piece(self, offset: SupportsIndex, data: ReadableBuffer) -> Piece:
        octets = octets_of(data)
        start, nbytes = self._range(self._state, offset, len(octets), "offset")
        return Piece(start, start + nbytes, octets)

    def writev(
        self,
        requests: Iterable[tuple[SupportsIndex, ReadableBuffer]],
        *,
        threads: SupportsIndex | None = None,
    ) -> int:
        """Write several buffers, each from its offset on; see `write`.

        Where ranges overlap, later ones win.

        Parameters
        ----------
        requests : iterable of tuple
            Pairs of an offset and a buffer.  All are verified before the first is
            written.
        threads : int, optional
            Most threads that write at once; one per CPU by default.  Only images of
            several files, and block devices, are written by more than one.

        Returns
        -------
        int
            Bytes of all buffers.
        """
        if threads is not None:
            from imgcore.engine.job import thread_count

            threads = thread_count(threads)
        writer, changes = self._writing()
        with changes:
            pieces = [self._piece(*request_of(request)) for request in requests]
            rest = writer.overwrite(without_overlaps(pieces))
            if rest:
                writer.write_in_parallel(rest, threads)
            return sum(piece.nbytes for piece in pieces)

    def write_pieces(self, pieces: Sequence[Piece]) -> None:
        """Write pieces that ascend and do not overlap; see `write`."""
        writer, changes = self._writing()
        with changes:
            writer.write(pieces)

    def zero(self, offset: SupportsIndex, length: SupportsIndex, *, unmap: bool = True) -> None:
        """Make a range of the virtual disk read as zeros.

        Parameters
        ----------
        offset, length : int
            Bytes; any alignment.
        unmap : bool
            Whether the space of the range may be given back.  Without it, what is
            allocated stays so.

        Raises
        ------
        ValueError, ImgcoreError, OSError
            As for `write`.
        """
        writer, changes = self._writing()
        with changes:
            nbytes = integer(length, "length")
            start, _ = self._range(self._state, offset, nbytes, "offset")
            writer.zero(start, nbytes, unmap=unmap)

    def discard(self, offset: SupportsIndex, length: SupportsIndex) -> None:
        """Tell that a range of the virtual disk is not needed any more.

        Its space is given back where the format and the file system allow that.  The
        range then has old bytes or zeros.

        Parameters
        ----------
        offset, length : int
            Bytes; any alignment.

        Raises
        ------
        ValueError, ImgcoreError, OSError
            As for `write`.
        """
        writer, changes = self._writing()
        with changes:
            nbytes = integer(length, "length")
            start, _ = self._range(self._state, offset, nbytes, "offset")
            writer.discard(start, nbytes)

    def flush(self) -> None:
        """Make durable what was written before: it survives a crash of the host.

        Raises
        ------
        ValueError
            The image is closed.
        OSError
            The system has failed.  After a failed sync nothing more is written.
        """
        if not self._options.writable:
            with self._in_use():
                return
        writer, changes = self._writing()
        with changes:
            writer.flush()

    def resize(self, virtual_size: SupportsIndex, *, shrink: bool = False) -> None:
        """Change the size of the virtual disk.

        What is new reads as zeros.  The change is durable when the call returns.

        Parameters
        ----------
        virtual_size : int
            Bytes, a multiple of 512.
        shrink : bool
            Whether the disk may become smaller, which loses what is at its end.

        Raises
        ------
        ValueError
            The image is closed.
        OptionError
            The disk would become smaller without ``shrink``, or the format cannot have
            this size.
        ImgcoreError, OSError
            As for `write`.
        """
        nbytes = byte_count(virtual_size, "virtual_size")
        if nbytes <= 0 or nbytes % SECTOR_NBYTES:
            raise OptionError(
                f"the size is {nbytes} bytes, which is not a positive multiple of {SECTOR_NBYTES}",
                path=self.path,
            )
        with self._in_use():
            if nbytes < self.virtual_size and not shrink:
                raise OptionError(
                    f"the disk has {self.virtual_size} bytes and would lose those after {nbytes}: "
                    "state that it may shrink (--shrink; shrink=True in Python)",
                    path=self.path,
                )
            if nbytes != self.virtual_size:
                with self._refreshing:
                    writer, changes = self._writing()
                    with changes:
                        writer.resize(nbytes, self._reopened)

    def restructure(self, change: Callable[[Updater], None]) -> None:
        """Let a function change the image by its format's updater, and read it anew.

        The change is durable when the call returns.  Exceptions are those of `write`.
        """
        with self._refreshing, self._in_use():
            writer, changes = self._writing()
            with changes:
                writer.restructure(change, self._reopened)

    def drop(self) -> None:
        """Free all that the image has of its disk, which then reads as its parent."""
        writer, changes = self._writing()
        with changes:
            nbytes = self.virtual_size
            for start in range(0, nbytes, _DROPPED_NBYTES):
                writer.drop(start, min(_DROPPED_NBYTES, nbytes - start))
            writer.flush()

    def is_rebasable(self) -> bool:
        """Tell whether the format can change the image's parent."""
        writer, changes = self._writing()
        with changes:
            return isinstance(writer.updater, Rebasable)

    def begin(self) -> None:
        """Make durable that the image is being changed, before the first change."""
        writer, changes = self._writing()
        with changes:
            writer.begin()

    def set_backing(self, reference: BackingReference | None) -> None:
        """Change what the image says about its parent, and read it anew.

        A parent that was stated when the image was opened counts no more.  The rest is
        as for `imgcore.formats.api.Rebasable.set_backing`.
        """

        def change(updater: Updater) -> None:
            assert isinstance(updater, Rebasable)
            updater.set_backing(reference)
            self._options = self._options._replace(parents=())

        self.restructure(change)

    def _writing(self) -> tuple[WriteAccess, Uses]:
        """Return what changes the image, and the uses that all changes are."""
        writer, changes = self._writer, self._changes
        if writer is None or changes is None:
            return self._start_writing()
        return writer, changes

    def _start_writing(self) -> tuple[WriteAccess, Uses]:
        from imgcore.disk.write_access import WriteAccess

        with self._in_use():
            if not self._options.writable:
                raise ImgcoreError("the image is open for reading only", path=self.path)
            with self._state_lock():
                if self._reads is None:
                    self._reads = self._counted(_READS)
                if self._writer is None:
                    self._writer = WriteAccess(
                        self._access(),
                        read_into=_weak_call(self.readinto),
                        forget=_weak_call(self._forget_tables),
                        is_unread=_weak_call(self._is_unread),
                        reads=self._reads,
                        is_current=_weak_call(self._is_current),
                    )
                    _writers.add(self._writer)
                    _being_used.add(self)
                if self._changes is None:
                    self._changes = self._counted(_CHANGES)
                return self._writer, self._changes

    def _access(self) -> Access:
        from imgcore.disk.write_access import Access

        state = self._state
        parent_nbytes = state.layers[1].virtual_size if len(state.layers) > 1 else None
        updater = get_driver(self.format).updater(self.reader, parent_nbytes=parent_nbytes)
        return Access(state, updater)

    def _forget_tables(self, start: int, end: int) -> None:
        disk = self._disk
        if disk is not None:
            disk.forget(start, end)

    def _is_unread(self) -> bool:
        return not self._views and (self._reads is None or self._reads.soon_over())

    def _is_current(self, state: DiskState) -> bool:
        return state is self._state

    def _counted(self, user: str) -> Uses:
        """Return the uses that are together one user of the files."""
        from imgcore._core import Uses

        uses = Uses(_weak_call(self._end_use, user), _weak_call(self._refuse))
        self._begin_use(user)
        return uses

    def _start_reading(self) -> RandomAccess:
        """Return what reads the image.

        All that it does is one use of the image.
        """
        from imgcore.disk.random_access import RandomAccess

        with self._in_use(), self._state_lock():
            if self._disk is not None:
                return self._disk  # another thread was first
            if self._reads is None:
                self._reads = self._counted(_READS)
            state, cache_nbytes = self._state, self._options.cache_nbytes
            disk = RandomAccess(state, cache_nbytes=cache_nbytes, uses=self._reads)
            _being_used.add(self)
            # A signal handler may have refreshed or closed the image meanwhile.
            if self._state is state:
                self._disk = disk
            if self._is_closed:
                self.close()
            return disk

    def close(self) -> None:
        """Close it; may be called more than once.

        From now on each use raises ValueError.  Uses in progress on other threads end
        as if it was open, and the last one closes the files.  An image that is written
        in place is flushed before that, and its files are unlocked; both also happen if
        it fails.

        Raises
        ------
        OSError, ImgcoreError
            What was written since the last flush may not be durable.
        """
        super().close()
        for user, uses in ((_READS, self._reads), (_CHANGES, self._changes)):
            if uses is not None and uses.close():
                self._end_use(user)

    def as_file(
        self, *, start: SupportsIndex = 0, length: SupportsIndex | None = None
    ) -> io.RawIOBase:
        """Return a range of the disk as a file, which is read and sought.

        Parameters
        ----------
        start : int
            Byte offset in the disk of the file's first byte; any alignment.
        length : int, optional
            Bytes; up to the end of the disk by default, also after `refresh` has found
            it larger.

        Returns
        -------
        io.RawIOBase
            It has a position, but no buffer: `io.BufferedReader` gives it one.  To
            close it leaves the image open.  Once the image is closed, each use raises
            ValueError.

        Raises
        ------
        ValueError
            The range is not inside the disk, or the image is closed.
        """
        from imgcore.disk.disk_file import DiskFile

        with self._in_use():
            first, nbytes = self._range(self._state, start, length)
            return DiskFile(self, first, None if length is None else nbytes)

    def refresh(self) -> None:
        """Read headers and tables again, of an image that has changed since.

        The files are those that are open already, even if others have their names by
        now.  Files that the image did not name before are opened as by `imgcore.open`.
        Reads and iterators that are under way end with the image as it was.

        Raises
        ------
        ImgcoreError
            The image was opened without ``share``, and a file of it has changed.
        ValueError
            The image is closed.
        Exception
            As `imgcore.open`.  The image stays as it was.
        """
        with self._refreshing, self._in_use():
            if not self._options.writable:
                self._reopen()
                return
            writer, changes = self._writing()
            with changes:
                writer.refresh(self._reopened)

    def _reopened(self) -> Access:
        self._reopen()
        return self._access()

    def _reopen(self) -> None:
        self.check_unchanged()
        given = self._options.files.holding(self._state.host_files())
        chain = open_chain(self._source, self._options._replace(files=given))
        with _closing_unless_used(chain):
            state = DiskState(chain)
        with self._state_lock():
            self._states.add(state)
            self._state = state
            self._disk = None

    def info(self) -> dict[str, Any]:
        """Describe the image, with the keys of ``qemu-img info --output=json``.

        Raises
        ------
        ValueError
            The image is closed.
        """
        from imgcore.disk.describe import describe_layer

        with self._in_use():
            return describe_layer(self.chain[0])

    def check_unchanged(self) -> None:
        """Raise ImgcoreError if a file of the chain has changed since it was opened."""
        with self._in_use():
            for file in self.every_file():
                file.check_unchanged()

    def every_file(self) -> list[ByteSource]:
        """Return the files of all layers, each once."""
        return self._state.every_file()

    def depth_of(self, identity: Identity) -> int | None:
        """Return the number of the layer whose file it is; None if there is none."""
        return self._state.depth_of(identity)

    def own_files(self) -> list[ByteSource]:
        """Return the files of the image itself, without those of its parents."""
        return self._state.own_files()

    def _free(self) -> None:
        with ExitStack() as stack:
            for state in list(self._states):
                stack.callback(state.close)
            writer, self._writer = self._writer, None
            if writer is not None:
                stack.callback(_writers.discard, writer)
                writer.finish()

    def _adopt(self) -> None:
        super()._adopt()
        self._refreshing = threading.RLock()
        self._disk = self._reads = self._writer = self._changes = None
        if self._options.writable:
            self._is_closed = self._is_foreign = True

    def _refuse(self) -> NoReturn:
        if self._is_foreign:
            raise ImgcoreError(
                "the image belongs to the parent process, which writes to it",
                path=self.path,
            )
        super()._refuse()

    def __enter__(self) -> Image:
        with self._in_use():
            return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        mode = " r+" if self._options.writable else ""
        return f"<Image {self.path!r} {self.format} {self.virtual_size}{mode}>"


def open(
    source: FilePath | int,
    *,
    mode: str = "r",
    chain: bool = True,
    cache: SupportsIndex | str = "32M",
    files: Mapping[str, int] | None = None,
    format: str | None = None,
    backing_format: str | None = None,
    parent: FilePath | Sequence[FilePath] | None = None,
    read_options: Mapping[str, Any] | Sequence[str] | None = None,
    allow: Sequence[FilePath] = (),
    share: bool = False,
) -> Image:
    """Open an image and its backing files, for reading or for writing in place.

    Parameters
    ----------
    source : str, bytes, os.PathLike or int
        A regular file or a block device; or an open descriptor of one, which stays the
        caller's, open and unchanged.
    mode : str
        ``"r"``: images are only read.  ``"r+"``: the image is also written in place,
        and no other process may use it meanwhile; its backing files are only read.
    chain : bool
        Without it, the image is opened alone, without its backing files.  What it does
        not state itself reads as zeros.
    cache : int or str
        Most bytes of tables and decompressed blocks that are kept for later reads, for
        the image and its backing files together, such as ``"32M"``.
    files : mapping of str to int, optional
        Open descriptors for files that the images of the chain name, which are used
        before any other file.  A key is the whole name as the image states it, or its
        last component.
    format : str, optional
        ``raw``, ``qcow2``, ``vmdk``, ``vhd``, ``vhdx`` or ``vdi``; detected by its
        magic if None.  Raw is never guessed from content: a file is raw only if it has
        a suffix of raw disks (.raw, .img, .dd, .bin), if it is a block device, or if
        ``"raw"`` is stated here.  If the name states no format (.img, or no suffix of
        disks), the content decides; files that such an image names are opened only if
        its format is stated here, or if they are in ``files``.  A descriptor has no
        name.
    backing_format : str, optional
        Format of backing files whose format the image does not state; it is never
        guessed.
    parent : str, bytes or os.PathLike, or a sequence of them, optional
        The image's parent (backing file), instead of the file that the image names.
        Its identity is verified against the one that the image states.  A sequence has
        one name for each level: the parent, the parent's parent, and so on.
    read_options : mapping or sequence of str, optional
        Options for reading the image, as a mapping or as strings ``"key=value,..."``.
        VHD has ``size``, which is ``chs`` or ``current``.
    allow : sequence of str, bytes or os.PathLike
        Further folders in which files that an image names may lie.  The image's own
        folder is always allowed.  An image that is given by its descriptor has no
        folder, and relative names in it start at these.
    share : bool
        Open the image even if another process (a running virtual machine) writes to it.

    Returns
    -------
    Image
        A context manager.

    Raises
    ------
    OSError
        A file cannot be opened, or a descriptor is closed.
    ImgcoreError
        A descriptor does not allow reading, or is neither of a regular file nor of a
        block device.
    WrongFormatError, CorruptImageError, UnsupportedFeatureError, LimitExceededError
        The image cannot be read, or its parent is not the one it was created from.
    OptionError
        ``parent`` is given for an image that has none, or has more names than there are
        parents; ``files`` has a name that no image of the chain states; or a read
        option is unknown.
    UnsafeReferenceError
        The image names a file outside the allowed folders.
    """
    if mode not in ("r", "r+"):
        raise OptionError(f"mode is {mode!r}: 'r' opens for reading, 'r+' for writing as well")
    options = OpenOptions.from_keywords(
        format=format,
        backing_format=backing_format,
        parent=parent,
        read_options=read_options,
        allow=allow,
        share=share,
        chain=chain,
        cache=cache,
        files=files,
        writable=mode == "r+",
    )
    image = open_image(source_name(source), options)
    try:
        _import_what_reads_use(image)
    except BaseException:
        image.close()
        raise
    return image


def open_image(
    source: str | os.PathLike[str] | int, options: OpenOptions, *, parents: bool = True
) -> Image:
    """Open an image by its path or a descriptor.

    Without ``parents``, only its headers can be used.
    """
    chain = open_chain(source, options, parents=parents)
    with _closing_unless_used(chain):
        image = Image(chain, source, options)
        if options.writable:
            # An image that cannot be written to is refused now.
            try:
                image._writing()
            except BaseException:
                image.close()
                raise
        return image


def _import_what_reads_use(image: Image) -> None:
    """Import modules that an open image would import later, while no thread may fork.

    A child that is forked while another thread imports a module can never import it.
    """
    with forks_held_back():
        for name in _USED_BY_READS:
            import_module(name)
        for reader in image.layers:
            for name in get_driver(reader.format_name).reading_extents:
                import_module(name)


# The images that are used in this process.  A child that is forked starts anew: another
# thread may have held the locks of what reads and changes them.
_being_used: weakref.WeakSet[Image] = weakref.WeakSet()


# What changes open images.  It is held here, with the files, until the image is closed:
# when an image is dropped in a cycle, its files must not be closed before it.
_writers: set[WriteAccess] = set()


def _start_anew() -> None:
    for image in list(_being_used):
        image._disk = image._writer = None
    _writers.clear()


os.register_at_fork(after_in_child=_start_anew)


def _weak_call(method: Callable[..., _Item], *fixed: object) -> Callable[..., _Item]:
    """Return a function that calls a method, but does not hold its object.

    Whoever uses an image holds it, so that it is there when the call comes.
    """
    held_weakly = weakref.WeakMethod(method)

    def call(*arguments: object) -> _Item:
        found = held_weakly()
        assert found is not None
        return found(*fixed, *arguments)

    return call


@contextmanager
def _closing_unless_used(chain: Sequence[Layer]) -> Iterator[None]:
    """Close the layers if the block raises."""
    try:
        yield
    except BaseException:
        for layer in chain:
            layer.close()
        raise
