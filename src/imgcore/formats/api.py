"""The interface of a format: what its reader, writer and driver have to offer.

A format is a package ``formats/x`` with a `Driver`, named in
`imgcore.formats.registry`.

- Its `Reader` parses an image and states which bytes of the virtual disk are where.
- Its `Writer`, if it has one, states a `Geometry` for the engine.  The engine stores
  the blocks, and the writer turns their `Placements` into tables.
- Its records of options are described in `imgcore.formats.options`.

Neither a reader nor a writer ever moves guest bytes: the engine does.

Offsets and lengths are in bytes.  A *guest* offset is a place on the virtual disk, a
*host* offset a place in a file.  Everything in an image is untrusted: it is verified
before use, and sizes in it are limited by `imgcore.limits` before memory is allocated
for them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Generic,
    NamedTuple,
    Protocol,
    TypeVar,
    cast,
    runtime_checkable,
)

from imgcore.engine.source_file import SourceFile
from imgcore.errors import OptionError, UnsupportedFeatureError
from imgcore.formats.options import has_tables_in_front
from imgcore.formats.shared.damage import STRICT, Damage
from imgcore.text import without_secrets

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from imgcore.engine.extents import Extents, Kind, Placements
    from imgcore.engine.geometry import Geometry
    from imgcore.files.byte_source import ByteSource
    from imgcore.files.reference_gate import ReferenceGate
    from imgcore.files.target import Target
    from imgcore.files.target_file import TargetFile
    from imgcore.files.update_file import UpdateFile
    from imgcore.formats.options import FormatOptions
    from imgcore.formats.shared.check_report import CheckReport


# -- reading ---------------------------------------------------------------------------


class BackingReference(NamedTuple):
    """The parent of an image: as a child names it, or as a new child should store it.

    A `Reader` returns one as ``backing``.  `imgcore.disk.chain` tries its names in
    order and opens the first file that is the right parent.  A `WriteRequest` holds one
    for the parent of the target.

    Attributes
    ----------
    name : str
        File name, as `ReferenceGate.open` takes it.  It is tried first, and shown to
        users.
    format : str or None
        The parent's format, or None if the image does not state it.  It is never
        guessed: the user must then state it.
    identities : mapping of str to str
        The parent's identity, such as ``{"content ID": "1a2b3c4d"}``.  Each entry must
        also be in the parent's own ``Reader.identities``; the keys appear in messages.
    alternatives : mapping of str to str
        Further values that are accepted for the identities of the same keys.
    other_names : tuple of str
        Names to try, in this order, if ``name`` does not lead to the right parent.
    modified : int or None
        Time of the parent's last change in Unix seconds, if the format records it.  A
        difference causes a warning only, because copying a file changes its time.
    path : str or None
        Only in a `WriteRequest`: absolute path of the parent, which has been opened.
    virtual_size : int or None
        Only in a `WriteRequest`: size of the parent's disk in bytes.
    without_backing : bool
        The parent's own parent is left out.
    inherited : tuple
        Only in a `WriteRequest`: what the child takes over, in a form that only the
        format knows (`Inheritable`).

    Notes
    -----
    In a `WriteRequest`, ``identities`` and ``modified`` are the parent's present ones.
    """

    name: str
    format: str | None
    identities: Mapping[str, str] = MappingProxyType({})
    alternatives: Mapping[str, str] = MappingProxyType({})
    other_names: tuple[str, ...] = ()
    modified: int | None = None
    path: str | None = None
    virtual_size: int | None = None
    without_backing: bool = False
    inherited: tuple[Any, ...] = ()

    def __repr__(self) -> str:
        fields = zip(self._fields, self, strict=True)
        return without_secrets(f"BackingReference({', '.join(f'{k}={v!r}' for k, v in fields)})")


class Reader(Protocol):
    """An open image: tells where each range of its virtual disk is stored.

    A reader describes one image only.  Parents are opened and combined with it by
    `imgcore.disk.chain` and `imgcore.disk.overlay`.

    Opening an image reads its headers and verifies them.  It must not import NumPy, so
    that ``imgcore info`` starts fast: import it in `extents` and `check`.

    Notes
    -----
    Errors: any method that reads may raise OSError with the file's name,
    CorruptImageError if the image contradicts itself or its file,
    UnsupportedFeatureError, or LimitExceededError.  Messages state what is wrong,
    where, and what is allowed.
    """

    format_name: ClassVar[str]
    """The format's name in the registry."""

    is_flat: ClassVar[bool]
    """Whether the disk is the image's only file, byte for byte.

    A HOLE of such an image has a place in that file, too.
    """

    @property
    def subformat(self) -> str | None:
        """Kind within the format, such as ``streamOptimized``; None if only one."""
        ...

    @property
    def virtual_size(self) -> int:
        """Size of the virtual disk in bytes."""
        ...

    @property
    def block_nbytes(self) -> int:
        """Size of the allocation unit in bytes; 512 for an image without one."""
        ...

    @property
    def sources(self) -> Sequence[SourceFile]:
        """The files that hold guest data; ``file`` in an extent is an index here."""
        ...

    @property
    def backing(self) -> BackingReference | None:
        """The parent that the image names; None if it has none."""
        ...

    @property
    def identities(self) -> Mapping[str, str]:
        """Facts by which a child recognises this image, such as a UUID; may be empty.

        See `BackingReference.identities`.
        """
        ...

    def extents(self, start: int, length: int) -> Iterator[Extents]:
        """Yield batches of extents that cover ``[start, start + length)`` of the disk.

        Parameters
        ----------
        start, length : int
            Range of the virtual disk in bytes, inside ``virtual_size`` and not empty.
            Both are multiples of 512, unless the range ends where the disk does.

        Yields
        ------
        ndarray, shape (n,), dtype EXTENT_DTYPE, C-contiguous, 1 <= n <= MAX_BATCH_ROWS
            Over all batches together, the rows ascend, leave no gap, do not overlap,
            and are clipped to the range.  A compressed row may start or end inside its
            block.

        Raises
        ------
        CorruptImageError
            A table entry is impossible, for example one that points past the file's
            end.

        Notes
        -----
        Tables are read in pieces, so that memory does not grow with the disk.
        """
        ...

    def info(self) -> dict[str, Any]:
        """Return what is specific to the format, in the keys of ``qemu-img info``.

        General keys, such as the virtual size, are added by `imgcore.disk.describe`.
        """
        ...

    def check(self) -> CheckReport:
        """Verify the image's tables and report every problem found.

        Raises
        ------
        LimitExceededError
            The tables are too large to be checked.

        Notes
        -----
        Not called for a format whose driver has ``has_tables=False``.
        """
        ...

    def close(self) -> None:
        """Close every file that this reader opened; may be called more than once."""
        ...


@runtime_checkable
class SectorSized(Protocol):
    """A reader or writer whose format states the disk's logical sector size.

    Optional: readers and writers of other formats do not have this property.
    """

    @property
    def logical_sector_nbytes(self) -> int | None:
        """Logical sector size in bytes, usually 512 or 4096; None if it is unknown."""
        ...


@runtime_checkable
class LeavesOut(Protocol):
    """A reader of images that hold more than one state of the disk.

    Optional: readers of other formats do not have this method.
    """

    def left_out(self) -> list[str]:
        """Return what a conversion leaves out and what that means; may be empty."""
        ...


@runtime_checkable
class EndsItself(Protocol):
    """A reader that can tell whether a stream had all of its image.

    Optional: after what the readers of other formats have read of a stream, only zeros
    may follow.
    """

    def verify_end(self, read_rest: Callable[[], tuple[int, bytes]]) -> None:
        """Verify what follows the last extent of a stream.

        Parameters
        ----------
        read_rest : callable
            Reads the rest of the stream; only the size of the file is known then.  It
            returns the end of the last byte that is not zero, of those after what this
            reader and its extents have needed, or 0 if there is none; and the bytes
            before this end, as many as a footer may have.

        Raises
        ------
        CorruptImageError
            Something of the image is missing, or other bytes follow it.
        """
        ...


@runtime_checkable
class ComesLate(Protocol):
    """A reader of streams in which blocks may come after others that follow them.

    Optional: readers of other formats need the order of the disk.
    """

    def take_late(self) -> None:
        """Let `extents` be a hole from the first block on that comes late.

        Called before the first extents are asked for; without it, such a block is an
        error.
        """
        ...

    @property
    def has_late(self) -> bool:
        """Whether blocks are left, after the last extent."""
        ...

    def late_extents(self) -> Iterator[Extents]:
        """Yield batches of the blocks that are left, in any order.

        The rows of a batch ascend, but have gaps between them.  Each is the start of a
        compressed block, and all of it but at the end of the disk.
        """
        ...


@runtime_checkable
class HasBitmaps(Protocol):
    """A reader of images that may hold bitmaps of changed areas.

    Optional: readers of other formats do not have this method.
    """

    def bitmap_areas(self, name: str) -> Iterator[tuple[int, int]]:
        """Yield the areas that a bitmap marks as changed.

        Yields
        ------
        offset, length : int
            In bytes.  Areas are inside the disk and not empty; they ascend, and do not
            touch each other.

        Raises
        ------
        OptionError
            The image has no bitmap of this name; the message lists those it has.
        UnsupportedFeatureError
            The bitmap is in use, stale, or of an unknown kind.
        CorruptImageError, LimitExceededError
            Its tables are damaged, or larger than a named limit.
        """
        ...


class SnapshotInfo(NamedTuple):
    """A state of the disk that an image keeps besides the present one.

    Attributes
    ----------
    identifier : str
        Different for each snapshot of an image.
    name : str
        Several snapshots may have the same.
    created_ns : int
        When it was taken: nanoseconds since 1970-01-01 UTC.
    virtual_size : int or None
        Bytes of the disk then, if the image states it.
    vm_state_nbytes : int
        Bytes of the virtual machine's memory and devices; 0 if only the disk was saved.
    vm_clock_ns : int
        How long the virtual machine had run, in nanoseconds.
    icount : int or None
        How many instructions it had executed, if that was counted.
    """

    identifier: str
    name: str
    created_ns: int
    virtual_size: int | None = None
    vm_state_nbytes: int = 0
    vm_clock_ns: int = 0
    icount: int | None = None


@runtime_checkable
class HasSnapshots(Protocol):
    """A reader of images that may hold snapshots.

    Optional: readers of other formats do not have this method.
    """

    def snapshots(self) -> list[SnapshotInfo]:
        """Return the snapshots in the order of the image's table."""
        ...


@runtime_checkable
class Divided(Protocol):
    """A reader of images whose disk may be in several files.

    Optional: readers of other formats do not have this method.
    """

    def require_extents(self) -> None:
        """Raise the gate's error if it did not open all files of the disk.

        Without them, the image can be described, but not read.
        """
        ...


@runtime_checkable
class Inheritable(Protocol):
    """A reader whose format has facts about a disk that its children state as well.

    Optional: the children of other formats take over no more than identities.
    """

    def inherited(self) -> tuple[Any, ...]:
        """Return `BackingReference.inherited` for a new child."""
        ...


@runtime_checkable
class MaybeFlat(Protocol):
    """A reader of images some of which have the disk in one file, byte for byte.

    Optional: readers of other formats do not have this property.
    """

    @property
    def starts_with_disk(self) -> bool:
        """Whether guest byte i is byte i of the only file with guest data.

        The file may have other bytes after the disk.
        """
        ...


@runtime_checkable
class RefusesRewriting(Protocol):
    """A reader of images that may be in a state in which they are read only.

    Optional: readers of other formats do not have this method.
    """

    def refuse_rewriting(self) -> None:
        """Raise UnsupportedFeatureError if the image's tables may be wrong."""
        ...


@runtime_checkable
class KnowsConflicts(Protocol):
    """A reader of images that are sound for reading although `check` finds problems.

    Optional: of other formats, each problem that `check` finds counts as a conflict.
    """

    def conflicts(self) -> CheckReport:
        """Report only what makes it doubtful which blocks hold guest data."""
        ...


# -- checking and repairing ------------------------------------------------------------


class Repair(NamedTuple):
    """One kind of problem in an image's file, and the bytes that put it right.

    A format only states what to change.  `imgcore.disk.repair` applies the repairs, in
    order, to a copy of the file.  The copy replaces the image only if it reads the same
    and its check finds no more problems than before.

    Attributes
    ----------
    problem : str
        What is wrong and where; half a line.
    action : str
        What is done about it; half a line.
    file_nbytes : int or None
        Size in bytes that the file gets before the writes; None to keep it.
    writes : tuple of (int, bytes)
        Host offsets and the bytes to write there.  They lie inside the file and never
        overlap guest data.
    stream : callable, optional
        Takes the copy, open for reading, and yields further writes, which may depend on
        those before.  For repairs that would not fit in memory.
    is_leak : bool
        Whether it only frees space that nothing uses.
    """

    problem: str
    action: str
    file_nbytes: int | None = None
    writes: tuple[tuple[int, bytes], ...] = ()
    stream: Callable[[ByteSource], Iterator[tuple[int, bytes]]] | None = None
    is_leak: bool = False


@runtime_checkable
class Repairable(Protocol):
    """A reader whose format supports repairs.

    Optional: readers of other formats do not have this method.
    """

    def repairs(self, *, leaks_only: bool = False) -> list[Repair]:
        """Return the repairs that cannot lose data; empty if there are none.

        With ``leaks_only`` they only free space that nothing uses.
        """
        ...

    def obstacles(self, *, leaks_only: bool = False) -> list[str]:
        """Return why problems of the image are not among `repairs`, a line each."""
        ...


# -- writing ---------------------------------------------------------------------------

Options = TypeVar("Options", bound="FormatOptions")


class WriteRequest(NamedTuple, Generic[Options]):
    """A target as the user asks for it; the format verifies it.

    Attributes
    ----------
    virtual_size : int
        Size of the virtual disk in bytes.
    options : FormatOptions
        The format's own record, made from the ``-o`` options.
    compress : bool
        Whether guest data should be compressed (``-c``).
    backing : BackingReference or None
        The parent of the target (``-B``).
    sparse_nbytes : int
        Shortest run of zeros, in bytes, that is left out (``-S``); 0 stores all zeros.
    target_name : str
        The file's name, without its folder.
    logical_sector_nbytes : int or None
        Logical sector size of the source in bytes, or None if the source does not state
        it.
    exact_nbytes : int or None
        Size of the disk in bytes without the zeros that fill up its last sector, if
        the target may keep it; raw does.
    seed : bytes or None
        32 bytes that random identities are drawn from
        (`imgcore.formats.shared.identities`); None: other ones each time.
    tables_first : bool
        The image's tables must precede its data, as far as the format leaves that open.
        The writer is then told about all blocks before `Writer.begin` (`NeedsBlocks`).
    """

    virtual_size: int
    options: Options
    compress: bool = False
    backing: BackingReference | None = None
    sparse_nbytes: int = 4096
    target_name: str = ""
    logical_sector_nbytes: int | None = None
    exact_nbytes: int | None = None
    seed: bytes | None = None
    tables_first: bool = False


class Writer(Protocol):
    """Writes one image around the guest data, which the engine stores.

    The calls of a conversion, in this order:

    1. `begin`, which prepares the target's files;
    2. `place`, once for each batch of blocks, if the geometry's placing is APPEND;
    3. `finish`, which writes what is missing.

    A conversion that fails calls nothing more.  The unfinished files are then removed.

    Notes
    -----
    Errors: `begin`, `place` and `finish` may raise OSError or TargetError with the
    file's name, and LimitExceededError if the image outgrows the format.
    """

    format_name: ClassVar[str]
    """The format's name in the registry."""

    @property
    def geometry(self) -> Geometry:
        """Block size, placing and compression for the engine; final after `begin`."""
        ...

    @property
    def first_offset(self) -> int:
        """Host offset in bytes from which the engine may store guest data."""
        ...

    @property
    def needs_own_blocks(self) -> bool:
        """Whether all space is reserved in advance, which rules out reflinks."""
        ...

    def begin(self, target: Target) -> TargetFile:
        """Prepare the target's files and return the one that guest data goes to."""
        ...

    def place(self, first_block: int, placements: Placements, next_offset: int) -> int:
        """Record where the engine has stored the next blocks.

        Calls are in ascending order of blocks.  Blocks that no call mentions are
        ABSENT.

        Parameters
        ----------
        first_block : int
            Number of the block that ``placements[0]`` describes.
        placements : ndarray, shape (n,), dtype PLACEMENT_DTYPE
            Read only, and valid only during the call.
        next_offset : int
            Host offset of the first free byte of the file.

        Returns
        -------
        int
            Host offset of the first free byte after the call.  It is larger than
            ``next_offset`` if the writer has put tables there, so that no more than
            MAX_PENDING_TABLE_NBYTES of them are waiting.

        Raises
        ------
        LimitExceededError
            A block lies where no table entry can point.
        """
        ...

    def finish(self, next_offset: int) -> None:
        """Write the remaining tables and headers, and set the file's final size.

        Parameters
        ----------
        next_offset : int
            Host offset of the first free byte of the file.
        """
        ...


@runtime_checkable
class WritesInOrder(Protocol):
    """A writer that writes a file from its start to its end, in one pass.

    Optional.  It does so if ``TargetFile.in_order`` says that it must, and calls of
    `Writer.place` have one group of blocks each.
    """

    writes_in_order: ClassVar[bool]
    """True."""


@runtime_checkable
class NeedsBlocks(Protocol):
    """A writer whose ``first_offset`` depends on the blocks that will be placed.

    Optional.
    """

    def know_blocks(self, blocks: Iterable[tuple[int, Placements]], data_nbytes: int) -> None:
        """Take the states of all blocks, before `Writer.begin`.

        Parameters
        ----------
        blocks : iterable of (int, ndarray with dtype PLACEMENT_DTYPE)
            As for `Writer.place`, but ``host_offset`` means nothing.
        data_nbytes : int
            Bytes between the first offset and the end of the last block.
        """
        ...


@runtime_checkable
class EndsLate(Protocol):
    """A writer of disks whose size is not known before all of their data is stored.

    Optional: others need the size first.  The writer gets a request for the largest
    disk that may come.  Its `first_offset` leaves room for the tables of such a disk;
    what they do not need stays a hole.
    """

    def leave_end_open(self) -> None:
        """Expect `end_disk`; called before `begin`, and it may change `first_offset`.

        Raises
        ------
        OptionError
            With these options the size must be known.
        LimitExceededError
            The largest disk would need too much room.
        """
        ...

    def end_disk(self, request: WriteRequest[Any]) -> None:
        """Make the disk as large as it turned out to be.

        Called before the placements of its last blocks, or after all placements, and
        before `finish`.  It changes ``guest_nbytes`` of the geometry.

        Parameters
        ----------
        request : WriteRequest
            The same as before but for the size, which is not larger.

        Raises
        ------
        OptionError
            The format has no disks of this size.
        """
        ...


@runtime_checkable
class HoldsSectors(Protocol):
    """A writer of children that may hold single sectors of a block.

    Optional: children of other formats have whole blocks.  The format's `Updater` then
    writes the sectors into an empty child.
    """

    @property
    def holds_sectors(self) -> bool:
        """True."""
        ...


class Measurement(NamedTuple):
    """The result of `imgcore.measure`, in bytes.

    Attributes
    ----------
    required : int
        Size of the target for the data that the source has.
    fully_allocated : int
        Its size when the guest has filled the disk.
    """

    required: int
    fully_allocated: int


# -- rewriting without copying ---------------------------------------------------------


class BlockRule(NamedTuple):
    """Where a format may have its blocks in a file that another format laid out.

    Attributes
    ----------
    block_nbytes : int
        Size of a block.
    alignment, phase : int
        A block's host offset is ``phase`` modulo ``alignment``.
    first_offset : int
        Blocks start here or later: the format's headers need what is before.
    end_offset : int
        Blocks end here or earlier.
    takes_compressed : frozenset of Kind
        Kinds of compressed blocks, of one guest block each, that the format can refer
        to where they are.
    """

    block_nbytes: int
    alignment: int
    phase: int = 0
    first_offset: int = 0
    end_offset: int = 1 << 62
    takes_compressed: frozenset[Kind] = frozenset()


class Survey(NamedTuple):
    """Where the file that will be rewritten has the data of its disk.

    Attributes
    ----------
    file_nbytes : int
        Size of the file in bytes.
    is_flat : bool
        Whether guest byte i is host byte i, also where the file has holes.
    rows : ndarray, shape (n,), dtype EXTENT_DTYPE
        DATA and compressed extents of the whole disk, ascending; DATA that continues in
        guest and file is one row.
    is_verified : bool
        Whether the compressed blocks that may stay were verified; their length is exact
        then.
    """

    file_nbytes: int
    is_flat: bool
    rows: Extents
    is_verified: bool = False


class Rewriter(Protocol):
    """Writes a format's tables and headers around blocks that stay in their file.

    The calls, in this order: `begin`; `place` for all batches; `finish`.  The file that
    they write to keeps back what lies before ``append_offset``: the old image stays
    valid until all of it is exchanged in one step (`imgcore.files.staged_file`).

    Notes
    -----
    Errors: as for `Writer`.
    """

    format_name: ClassVar[str]
    """The format's name in the registry."""

    @property
    def rule(self) -> BlockRule | None:
        """Where blocks may be; None if the disk is the file, byte for byte."""
        ...

    @property
    def overwrites(self) -> Sequence[tuple[int, int]]:
        """The ranges (host offset, length) before the old end that it may write."""
        ...

    def begin(self, file: TargetFile, append_offset: int) -> int:
        """Take the file, and reserve space for tables of known size.

        Parameters
        ----------
        file : TargetFile
        append_offset : int
            The old size of the file, or larger: from here on it is free.

        Returns
        -------
        int
            The first free host offset after what is reserved, at which a block may be.
        """
        ...

    def place(self, first_block: int, placements: Placements, next_offset: int) -> int:
        """Record where blocks are; as `Writer.place`, but in any order of offsets."""
        ...

    def finish(self, next_offset: int) -> None:
        """Write the remaining tables and headers, and set the file's final size."""
        ...


@runtime_checkable
class NeedsPlaces(Protocol):
    """A rewriter that must know which blocks stay before it begins.

    Optional: what it overwrites depends on them.
    """

    def know_places(
        self, starts: NDArray[np.int64], ends: NDArray[np.int64], *, is_moving: bool
    ) -> None:
        """Take the ranges of the file that blocks stay in, once and before `begin`.

        Parameters
        ----------
        starts, ends : ndarray, shape (n,), dtype int64
            Host offsets, in any order and without overlaps.
        is_moving : bool
            Whether other blocks will be appended.

        Raises
        ------
        UnsupportedFeatureError, LimitExceededError
            The format cannot refer to them.
        """
        ...


@runtime_checkable
class Described(Protocol):
    """A rewriter of images of two files: one has the disk, a small one describes it.

    Optional.  The small file has the image's name (``WriteRequest.target_name``).
    """

    @property
    def data_name(self) -> str:
        """Name of the file that has the disk, without its folder."""
        ...

    @property
    def description(self) -> bytes:
        """Content of the small file."""
        ...


# -- writing in place ------------------------------------------------------------------


class Place(NamedTuple):
    """Where bytes of the disk go when they are written in place.

    Attributes
    ----------
    guest_offset, length : int
        The range of the disk, in bytes.
    host_offset : int
        Where the file has it, or will have it.
    file : int
        Index of the file in ``Reader.sources``.
    is_new : bool
        The tables do not refer to it yet: once it is written, `Updater.refer` makes
        them.
    needs_all : bool
        What the place has now is not the content of the disk, so all of it is written.
        Otherwise a part may be written.
    """

    guest_offset: int
    length: int
    host_offset: int
    file: int = 0
    is_new: bool = False
    needs_all: bool = False


class Updater(Protocol):
    """Changes an image in its own files: tells where bytes go, and changes the tables.

    General code (`imgcore.disk.write_access`) moves the bytes; an updater never does.
    Its calls come one at a time:

    - `begin`, once, before the first change;
    - `place`, then `refer` once the places are written, or `give_up` if that fails.
      Calls for other ranges may come in between;
    - `zero`, `discard`, `resize`;
    - `flush`, at any time; `finish`, once, before a changed image is closed.

    It changes tables by ``UpdateFile.put`` only, with the step that each change belongs
    to.  The image must be sound if only the first of these calls happen, because an
    exception may end them anywhere; and it must be sound if a crash leaves any part of
    one step, and all of the steps before.  Sound means that it opens, reads what the
    disk had before or has now, and that its check finds leaks at most.

    The image's `Reader` reads through the same files.  So it sees each change at once,
    and keeps nothing of a table in memory that an updater changes.

    Notes
    -----
    Errors: all may raise OSError with the file's name, LimitExceededError if the image
    outgrows its format, and CorruptImageError if a table is damaged.
    """

    granule_nbytes: int
    """The smallest range that tables describe: a cluster, a grain, or a sector.

    What is placed is aligned to it, unless it ends with the disk.
    """

    def begin(self, *, again: bool) -> None:
        """Change what says that the image has changed, or is being changed.

        Parameters
        ----------
        again : bool
            Whether it has begun before, and the image was opened anew since: its
            identity, by which children know it, is new already, and stays.
        """
        ...

    def place(self, start: int, length: int) -> list[Place]:
        """Return where a range of the disk goes, and reserve space for what has none.

        Parameters
        ----------
        start, length : int
            Bytes; multiples of ``granule_nbytes``, unless the range ends with the disk.

        Returns
        -------
        list of Place
            They cover the range in order.  Space is taken beside the neighbours of the
            disk if it is free.
        """
        ...

    def refer(self, places: Sequence[Place]) -> None:
        """Make the tables refer to new places, which have been written."""
        ...

    def give_up(self, places: Sequence[Place]) -> None:
        """Take back the space of new places, which could not be written."""
        ...

    def zero(self, start: int, length: int, *, unmap: bool) -> list[tuple[int, int]]:
        """Make a range read as zeros by changing tables, as far as the format can.

        Parameters
        ----------
        start, length : int
            Bytes, at any alignment.
        unmap : bool
            Whether space of the range may be given back.

        Returns
        -------
        list of (int, int)
            The parts (offset, length), ascending, that the caller writes as zeros.
        """
        ...

    def discard(self, start: int, length: int) -> None:
        """Free the space of whole blocks in a range that the guest does not need.

        They read as before or as zeros; never as an older state or as the parent.
        """
        ...

    def flush(self, *, is_unread: bool) -> None:
        """Make all changes durable, in their steps, and then free what was replaced.

        Parameters
        ----------
        is_unread : bool
            Whether no read is in progress that began before the last change of a table,
            so that space which is free since then may be used again.
        """
        ...

    def resize(self, virtual_size: int) -> None:
        """Change the size of the disk; then the image is flushed and opened again.

        Parameters
        ----------
        virtual_size : int
            Bytes, a multiple of 512; if it is smaller, what is behind is lost.  Before
            a disk grows, a granule that it ends in is written again.

        Raises
        ------
        OptionError
            The format cannot represent the size.
        """
        ...

    def withhold(self) -> None:
        """Use no space that is free now before a flush with ``is_unread``."""
        ...

    def finish(self) -> None:
        """Change what says that the image is in use, before it is closed."""
        ...


@runtime_checkable
class Overwritable(Protocol):
    """An updater that tells which places may be overwritten without asking it again.

    Optional: others are asked for each write.
    """

    def overwritable(self, start: int, length: int) -> list[Place]:
        """Return the parts of a range that `Updater.place` returns without a change.

        These are the places that are neither new nor need all, ascending.  Whatever
        changes them later is one of the calls of `Updater` for their range, or one
        after which the image is opened again.

        Parameters
        ----------
        start, length : int
            Bytes; multiples of ``granule_nbytes``, unless the range ends with the disk.
        """
        ...


@runtime_checkable
class MakesWay(Protocol):
    """An updater that overwrites places of the disk to make a table longer.

    Optional: others put a longer table elsewhere.
    """

    def make_way(self, virtual_size: int) -> bool:
        """Move the data away before `Updater.resize`; tell whether any was moved.

        What was moved is durable.  Reads that began before it end before the resize.
        """
        ...


@runtime_checkable
class Rebasable(Protocol):
    """An updater that changes which parent its image has, and what is left to it.

    Optional: a format without parents has no use for it.
    """

    def set_backing(self, reference: BackingReference | None) -> None:
        """Change what the image says about its parent.

        The image is flushed then, and not used any more until it is opened again.  A
        crash leaves the old parent or the new one.

        Parameters
        ----------
        reference : BackingReference or None
            The parent with its facts, as in a `WriteRequest`.  None: the image has no
            parent any more.  Every block (``Reader.block_nbytes``) of which the image
            has a part is written as a whole by then, and all others read as zeros.

        Raises
        ------
        OptionError
            The format cannot represent the parent, or none.
        """
        ...

    def drop(self, start: int, length: int) -> None:
        """Free whole blocks in a range, which read as the parent has them again.

        Parameters
        ----------
        start, length : int
            Bytes; multiples of ``Reader.block_nbytes``, unless the range ends with the
            disk.
        """
        ...


@runtime_checkable
class ChangesSnapshots(Protocol):
    """An updater of images that may hold snapshots.

    Optional.  After each call the image is flushed and opened again.  Snapshots are
    numbered from 0, in the order of `HasSnapshots.snapshots`.
    """

    def create_snapshot(self, name: str, created_ns: int) -> None:
        """Add a snapshot of the disk as it is.

        Raises
        ------
        OptionError
            The format does not allow the name.
        LimitExceededError
            There are too many snapshots, or blocks cannot be referred to once more.
        """
        ...

    def apply_snapshot(self, index: int) -> None:
        """Make the disk what it was; what it is now is lost."""
        ...

    def delete_snapshot(self, index: int) -> None:
        """Remove a snapshot; the disk stays as it is."""
        ...


# -- the format ------------------------------------------------------------------------


class Driver(NamedTuple):
    """Everything that general code knows about a format.

    ``formats/x/driver.py`` holds it as ``DRIVER``.  A driver imports the reader,
    the options and the writer only when they are needed.

    Attributes
    ----------
    name : str
        The format's name, the same as in the registry.
    options_module : str
        Module that holds ``Options``, the record of the options for writing (``-o``).
        Reading an image does not import it.
    reading : str
        Module that holds ``reader_for(file, gate, options, damage)``: it returns a
        `Reader` for a file, a gate, a record of ``read_options``, and the `Damage` that
        decides what happens if the image is damaged.  Files that the image names are
        opened through the gate; the parent is not opened.  Raises WrongFormatError only
        if the magic is absent.  The caller closes the file.
    writing : str or None
        Module that holds ``writer_for(request)`` and ``measure(request, data_nbytes)``;
        see `writer` and `measure`.  It may import NumPy.  None if the format is only
        read.
    read_options : subclass of FormatOptions, or None
        The record of the options for reading; None if there are none.
    has_tables : bool
        Whether images have tables, so that there is something to check.
    rewriting : str or None
        Module that holds ``rewriter_for(request, survey)``; see `rewriter`.  None if
        other images cannot become images of this format without copying.
    reading_extents : tuple of str
        Modules that the reader imports once it is asked for extents.
    updating : str or None
        Module that holds ``prepare(file)`` and ``updater_for(reader, parent_nbytes)``;
        see `prepare` and `updater`.  None if images are not written in place.
    flat_tail_nbytes : int
        Bytes after the disk of images that have no magic at their start, since they
        begin with the disk; 0 if there are no such images.
    tail_copy_nbytes : int
        Bytes at the end of an image that are a copy of its first ones.
    streaming : str or None
        Module that holds ``streamed_reader_for(file, gate, options)``: it returns a
        `Reader` for an image that comes in order.  Its `Reader.extents` are asked for
        once and in order.  None if the usual reader is as good.
    """

    name: str
    options_module: str
    reading: str
    writing: str | None
    read_options: type[FormatOptions] | None = None
    has_tables: bool = True
    rewriting: str | None = None
    reading_extents: tuple[str, ...] = ()
    updating: str | None = None
    flat_tail_nbytes: int = 0
    tail_copy_nbytes: int = 0
    streaming: str | None = None

    @property
    def options(self) -> type[FormatOptions]:
        """The record of the options for writing."""
        return cast("type[FormatOptions]", importlib.import_module(self.options_module).Options)

    def open(
        self,
        file: ByteSource,
        gate: ReferenceGate,
        options: FormatOptions | None = None,
        damage: Damage = STRICT,
    ) -> Reader:
        """Open an image; ``options`` defaults to those of ``read_options``."""
        if options is None and self.read_options is not None:
            options = self.read_options()
        module = importlib.import_module(self.reading)
        return cast("Reader", module.reader_for(file, gate, options, damage))

    def open_streamed(
        self, file: ByteSource, gate: ReferenceGate, options: FormatOptions | None = None
    ) -> Reader:
        """Open an image whose bytes come in order; see `open`."""
        if self.streaming is None:
            return self.open(file, gate, options)
        module = importlib.import_module(self.streaming)
        return cast("Reader", module.streamed_reader_for(file, gate, options))

    def writer(self, request: WriteRequest[Any]) -> Writer:
        """Verify a request and return its writer; touches no file.

        Raises
        ------
        OptionError
            The format cannot represent the request, or is only read.
        LimitExceededError
            The disk is too large for the format.
        """
        return cast("Writer", self._writing_module().writer_for(_settled(request)))

    def measure(self, request: WriteRequest[Any], data_nbytes: int) -> Measurement:
        """Return the size of the target's files without writing them.

        Parameters
        ----------
        request : WriteRequest
        data_nbytes : int
            Bytes of the blocks that hold data: a multiple of the writer's block size.

        Raises
        ------
        OptionError, LimitExceededError
            As for `writer`.
        """
        module = self._writing_module()
        return cast("Measurement", module.measure(_settled(request), data_nbytes))

    def rewriter(self, request: WriteRequest[Any], survey: Survey) -> Rewriter:
        """Return what makes an image of this format around another one's blocks.

        Raises
        ------
        OptionError, LimitExceededError
            As for `writer`.
        UnsupportedFeatureError
            The format cannot refer to the blocks where they are.
        """
        if self.rewriting is None:
            raise UnsupportedFeatureError(
                f"no image becomes {self.name} without copying: use imgcore convert"
            )
        if has_tables_in_front(request.options):
            raise OptionError("tables=front needs a copy: use imgcore convert")
        module = importlib.import_module(self.rewriting)
        return cast("Rewriter", module.rewriter_for(_settled(request), survey))

    def prepare(self, file: UpdateFile) -> None:
        """Complete what an interrupted writer has left, before the image is opened.

        Raises
        ------
        UnsupportedFeatureError
            Images of this format are not written in place.
        """
        self._updating_module().prepare(file)

    def updater(self, reader: Reader, *, parent_nbytes: int | None) -> Updater:
        """Return what changes an image whose files were opened for that.

        Parameters
        ----------
        reader : Reader
            The image's own.
        parent_nbytes : int or None
            Bytes of the parent's disk, if what the image does not have comes from a
            parent that is open; None if it reads as zeros.

        Raises
        ------
        UnsupportedFeatureError
            Images of this kind, or in this state, are not written in place.
        """
        return cast("Updater", self._updating_module().updater_for(reader, parent_nbytes))

    def _updating_module(self) -> Any:
        if self.updating is None:
            raise UnsupportedFeatureError(f"{self.name} images are not written in place")
        return importlib.import_module(self.updating)

    def _writing_module(self) -> Any:
        if self.writing is None:
            raise OptionError(f"{self.name} images can be read, but not written")
        return importlib.import_module(self.writing)


def _settled(request: WriteRequest[Any]) -> WriteRequest[Any]:
    """Return a request in which no block size is left open."""
    from imgcore.formats.options import without_auto

    return request._replace(options=without_auto(request.options))
