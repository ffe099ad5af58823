"""The binding to the native core: thin, no algorithm (see native/include/imgc.h)."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from enum import IntEnum
from typing import Any, Final, Protocol, SupportsIndex, final

import numpy as np
from numpy.typing import NDArray
from typing_extensions import disjoint_base

def extent_table(rows: Sequence[tuple[int, ...]]) -> Any:
    """Return extents, given as tuples of at least one row, as a table for `Job.start`.

    It is a buffer in the place of an array.
    """

def walk_grains(
    view: object,
    offset: int,
    out: NDArray[np.void],
    *,
    n_grains: int,
    grain_nsectors: int,
    max_nbytes: int,
    most_nbytes: int,
) -> int:
    """Return how many grains were found by their markers: ``imgc_grains_walk``."""

NO_SOURCE: Final[int]
GRANULE_DIFFERS: Final[int]
GRANULE_HAS_DATA: Final[int]
TARGET: Final[int]
MAX_BAD_RANGES: Final[int]
MAX_THREADS: Final[int]
CHECKSUM_BLOCK_NBYTES: Final[int]
CHECKSUM_NBYTES: Final[int]

class Status(IntEnum):
    """The result of a native call: ``enum imgc_status``."""

    OK = 0
    IO = -1
    INVALID_ARGUMENT = -2
    OUT_OF_RANGE = -3
    CORRUPT = -4
    UNSUPPORTED = -5
    LIMIT = -6
    NO_MEMORY = -7
    CANCELLED = -8
    BAD_GRAIN_MARKER = -9
    PAST_END = -10
    TOO_MANY_BAD_RANGES = -11

class _Codec(Protocol):
    @property
    def codec(self) -> int: ...
    @property
    def engine(self) -> int: ...
    @property
    def level(self) -> int: ...
    @property
    def window_bits(self) -> int: ...

class _Geometry(Protocol):
    """What a job reads of ``imgcore.engine.geometry.Geometry``."""

    @property
    def block_nbytes(self) -> int: ...
    @property
    def guest_nbytes(self) -> int: ...
    @property
    def placing(self) -> int: ...
    @property
    def zero_policy(self) -> int: ...
    @property
    def guest_base(self) -> int: ...
    @property
    def host_base(self) -> int: ...
    @property
    def stored_alignment(self) -> int: ...
    @property
    def compressed_alignment(self) -> int: ...
    @property
    def prefix(self) -> int: ...
    @property
    def store_incompressible(self) -> bool: ...
    @property
    def codec(self) -> _Codec: ...
    @property
    def sparse_nbytes(self) -> int: ...
    @property
    def group_nblocks(self) -> int: ...
    @property
    def group_gap_nbytes(self) -> int: ...
    @property
    def stored_prefix_nbytes(self) -> int: ...
    @property
    def stored_prefix_byte(self) -> int: ...
    @property
    def clears_blocks(self) -> bool: ...
    @property
    def reuse(self) -> int: ...

class CoreError(Exception):
    """A native call failed: the attributes are those of ``struct imgc_error``."""

    status: Status
    os_errno: int
    offset: int
    source: int
    op: str
    def __init__(
        self, status: Status, os_errno: int, offset: int, source: int, op: str
    ) -> None: ...

def build_info() -> dict[str, str]: ...
def variants() -> dict[str, list[dict[str, object]]]: ...
def is_zero(data: object, variant: str | None = ...) -> bool: ...
def crc32c(data: object, crc: int = ..., variant: str | None = ...) -> int: ...

@final
class Xxh64:
    """XXH64 of bytes that come in order: ``struct imgc_xxh64``."""

    def __init__(self, state: tuple[int, ...] | None = ...) -> None: ...
    def update(self, data: object) -> None:
        """Add bytes."""
    @property
    def state(self) -> tuple[int, ...]:
        """What another one can be made with; whole stripes of 32 bytes were added."""
    def digest(self) -> int:
        """Return the hash of what was added so far, as a number."""

def checksum_algorithms() -> tuple[str, ...]:
    """Return the names of the checksum algorithms in this build."""

@final
class Hasher:
    """The checksum of a disk whose bytes come in order: ``struct imgc_hasher``.

    One thread may use it at a time.
    """

    def __init__(self, algorithm: str = ..., block_nbytes: int = ...) -> None:
        """Start with an empty disk.

        An unknown algorithm is a ValueError, one that is not built a RuntimeError.
        ``block_nbytes`` is a power of two, 512 B to 16 MiB.
        """
    def update(self, data: object) -> None:
        """Add bytes of the disk."""
    def zeros(self, nbytes: int) -> None:
        """Add zeros, as fast as their leaves can be hashed."""
    def add_leaves(self, leaves: object, nbytes: int) -> None:
        """Add ``nbytes`` of the disk by the leaves of their blocks.

        They start with a block.  After a block that is not whole nothing can follow.
        """
    def leaf(self, block: object) -> bytes:
        """Return the leaf of a block, which is not added."""
    def digest(self) -> bytes:
        """Return the checksum of what was added so far."""

@final
class TableFormat:
    def __init__(
        self,
        *,
        entry_nbytes: int,
        big_endian: bool,
        block_nbytes: int,
        offset_mask: int,
        offset_rshift: int = ...,
        offset_lshift: int = ...,
        host_base: int = ...,
        reserved_mask: int = ...,
        default_kind: int = ...,
        flags: int = ...,
        compressed_mask: int = ...,
        length_shift: int = ...,
        length_mask: int = ...,
        compressed_bound: int = ...,
        rules: Sequence[tuple[int, int, int]] = ...,
        absent_entry: int = ...,
        zero_entry: int = ...,
        stored_bits: int = ...,
        compressed_bits: int = ...,
    ) -> None: ...
    def decode(
        self,
        entries: object,
        out: NDArray[np.void],
        *,
        guest_offset: int,
        guest_end: int,
        file_nbytes: int,
        file: int,
        salvage: bool = ...,
    ) -> int:
        """Decode table entries into ``out`` and return the number of rows."""
    def encode(self, placements: NDArray[np.void], entries: object) -> None:
        """Encode placements into the writable buffer ``entries``, one for one."""

@final
class File:
    """A file of the engine.  The caller owns the descriptor behind it."""

    @staticmethod
    def from_fd(fd: int) -> File: ...
    @staticmethod
    def from_memory(buffer: object, writable: bool = ...) -> File: ...
    @staticmethod
    def null() -> File: ...
    @staticmethod
    def from_ordered(fd: int) -> File:
        """Wrap a pipe, a socket or another descriptor, which is written in order."""
    @staticmethod
    def from_stream(fd: int, head: object, *, open_ended: bool, tail_nbytes: int = ...) -> File:
        """Wrap a descriptor that is read in order, after ``head``.

        If it is not open-ended, its end is an error (PAST_END).  ``tail_nbytes`` at its
        end are not read.
        """
    @property
    def stream_end(self) -> int | None:
        """Where the disk in a stream ends, or None before a read has met its end."""
    @property
    def stream_position(self) -> int:
        """How many bytes of the disk in a stream were read; no job may read it."""
    def stream_rest(self) -> bytes:
        """Return what was taken from a stream and not read; no job may read it."""
    def zero(self, offset: int, length: int) -> None: ...
    def write(self, offset: int, data: object, tick: Callable[[], object] | None = ...) -> None:
        """Write bytes; call ``tick`` about every 50 ms while no reader takes them."""
    def drop_behind(self) -> None:
        """From now on, drop from the page cache what is read or written."""
    def kept_nbytes(self) -> int:
        """Return how much was in the page cache at `drop_behind`, as is known."""
    def go_direct(self, direct_fd: int) -> bool:
        """Return whether whole pages go past the page cache now, by a second fd."""
    def drop_rest(self) -> None:
        """Drop what is left of the file, at the end of the job."""
    def note_read(self, offset: int, length: int) -> None:
        """Note what the caller has read by the descriptor."""
    def note_written(self, offset: int, length: int) -> None:
        """Note what the caller has written by the descriptor; nothing before a sync."""
    def next_data(self, offset: int) -> tuple[int, int]:
        """Return (start, end) of the next data from ``offset`` on; equal if none."""
    def take_written(self) -> bool:
        """Return whether the core has written to it since the last call.

        Called before a sync.
        """
    def refuse_writes(self) -> None:
        """Let all later writes fail: what was written could not be synced."""
    def close(self) -> None: ...

@final
class RateLimit:
    """How many guest bytes a second jobs may handle; any thread may use it.

    Parameters
    ----------
    pauses_of : RateLimit, optional
        Another one: this one has its pauses, but not its rate.
    """

    def __init__(self, pauses_of: RateLimit | None = ...) -> None: ...
    def set(self, bytes_per_second: int) -> None:
        """Change the rate at once; 0 is no limit."""
    def pause(self, paused: bool) -> None:
        """Let nothing be handled, or go on; takes effect at once."""
    def take(self, nbytes: int, timeout_ms: int = ...) -> bool:
        """Wait until ``nbytes`` may be handled; return False after the timeout."""

@final
class Places:
    """Gives blocks the host offsets that a job gives them."""

    def __init__(self, geometry: _Geometry, next_offset: int) -> None: ...
    def give(self, first_block: int, rows: NDArray[np.void]) -> None:
        """Fill in offsets of placements with states, and lengths of STORED ones.

        COMPRESSED ones have their lengths.  Calls are in the order of the disk.
        """
    next_offset: int

@final
class Job:
    """One conversion, comparison or checksum, run batch by batch."""

    def __init__(
        self,
        *,
        sources: Sequence[tuple[File, int, int, int]],
        geometry: _Geometry | None = ...,
        target: File | None = ...,
        next_offset: int = ...,
        has_base: bool = ...,
        threads: int = ...,
        window_nbytes: int = ...,
        variants: dict[str, str] | None = ...,
        salvage: bool = ...,
        reflink: bool = ...,
        trust_blocks: bool = ...,
        stores_data: bool = ...,
        rate_limit: RateLimit | None = ...,
        checksum: str | None = ...,
        granule_nbytes: int = ...,
        batch_threads: Callable[[], int] | None = ...,
    ) -> None:
        """Create a job: a conversion if there is a ``geometry``.

        Without one it is a comparison, or with ``checksum`` it only makes leaves.

        ``sources`` holds (file, nbytes, guest_base, block_nbytes).  ``has_base``: each
        batch has the extents of the target's parent as ``base_extents``.  ``reflink``:
        data at a suitable place of a source is reflinked, not written.
        ``trust_blocks``: reused blocks are not decompressed.  ``stores_data``: blocks
        that extents state as data are stored whole.  ``rate_limit``: windows wait for
        it before they are read.  ``checksum``: an algorithm for which each
        batch receives ``leaves``; all data is read and hashed.
        ``granule_nbytes``: a comparison finds all
        differences, by granules of so many bytes, instead of the first one.
        ``batch_threads``: tells at the start of each batch how many of the threads
        work on it; the job drops it when it is closed.
        """
    def start(
        self,
        start: int,
        end: int,
        extents: NDArray[np.void],
        base_extents: NDArray[np.void] | None = ...,
        placements: NDArray[np.void] | None = ...,
        granules: NDArray[np.uint8] | None = ...,
        leaves: object | None = ...,
    ) -> None:
        """Start the workers on one part of the disk; hold the arrays until wait.

        ``leaves`` is a writable buffer of `CHECKSUM_NBYTES` for each block of
        `CHECKSUM_BLOCK_NBYTES` of the part, which starts with such a block.
        """
    def wait(
        self,
        tick: Callable[[], None] | None = ...,
        meanwhile: Callable[[], int] | None = ...,
    ) -> None:
        """Join the batch, and call ``tick`` on this thread about every 50 ms.

        ``meanwhile`` does a short piece of other work, and returns how many
        milliseconds to wait before it is called again, at most 50.  An exception of
        either cancels the job.
        """
    def run(
        self,
        start: int,
        end: int,
        extents: NDArray[np.void],
        base_extents: NDArray[np.void] | None = ...,
        placements: NDArray[np.void] | None = ...,
        leaves: object | None = ...,
    ) -> None: ...
    def cancel(self) -> None: ...
    def progress(self) -> tuple[int, int, int, int, int, int, int, int]:
        """Return counts of bytes.

        Guest bytes done, and of these data and zeros; host bytes read, written and
        reflinked; guest bytes of reused blocks, and of these not decompressed.
        """
    next_offset: int
    packing: tuple[int, int]
    def end_disk(self, guest_nbytes: int) -> None:
        """Make the target's disk end here: before a batch, or after `found_end`."""
    @property
    def found_end(self) -> int | None:
        """Where a stream has ended while a batch is running, or None.

        The batch then waits for `end_disk`.
        """
    @property
    def first_difference(self) -> int | None: ...
    @property
    def bad_ranges(self) -> list[tuple[int, int, int, int]]: ...
    def close(self) -> None: ...

@final
class Uses:
    """The uses of something that any thread may close at any time."""

    def __init__(self, idle: Callable[[], None], refuse: Callable[[], None]) -> None:
        """Call ``idle`` after the last use once closed, ``refuse`` for later uses."""
    def close(self) -> bool:
        """Refuse later uses; return whether this ends them: none is in progress."""
    def __enter__(self) -> None:
        """Begin a use, which a ``with`` block ends; not together with `is_over`."""
    def __exit__(self, *_: object) -> None: ...
    @property
    def is_idle(self) -> bool:
        """Whether no use is in progress now."""
    def epoch(self) -> int:
        """Return a number for this moment, for `is_over`."""
    def is_over(self, epoch: int) -> bool:
        """Return whether every use that began before that moment has ended.

        Some that began later may count too, but uses that always overlap do not put it
        off for ever.
        """
    def soon_over(self) -> bool:
        """Wait up to 0.1 s for the uses in progress; return whether they have ended.

        Long reads are several uses, one after the other.
        """

@disjoint_base
class Disk:
    """A disk for random access; any number of threads may use it.

    A subclass supplies the rows of tables, and checks ranges and thread counts.
    """

    def __init__(
        self,
        sources: Sequence[tuple[File, int, int, int]],
        *,
        virtual_size: int,
        span: int,
        cache: int,
        uses: Uses,
        lock: AbstractContextManager[object],
        variants: dict[str, str] | None = ...,
    ) -> None:
        """Open a disk whose tables cover ``span`` bytes each.

        ``sources`` are those of a `Job`.  ``cache`` is how many bytes of tables and
        decompressed blocks are kept.  Each call below is one of the ``uses``.  ``lock``
        is reentrant: one thread at a time asks for `rows`.
        """
    def rows(self, start: int, end: int) -> NDArray[np.void]:
        """Return the extents of a table."""
    def is_damage(self, error: Exception) -> bool:
        """Return whether an exception of `rows` is about what the image says."""
    def range(self, offset: SupportsIndex, length: SupportsIndex) -> tuple[int, int]:
        """Return a range of the disk as two ints, or raise ValueError."""
    def threads(self, threads: SupportsIndex | None) -> int:
        """Return how many threads a long read may use, if so many are stated."""
    def lease(self, threads: int) -> Any:
        """Return an object whose ``renew()`` tells how many of these may work now."""
    def readinto(
        self, offset: SupportsIndex, buffer: object, threads: SupportsIndex | None = ...
    ) -> int:
        """Fill a writable buffer with the bytes from ``offset`` on; return its size."""
    def read(self, offset: SupportsIndex, length: SupportsIndex) -> bytes:
        """Return ``length`` bytes from ``offset`` on."""
    def readv(
        self, requests: Iterable[tuple[SupportsIndex, object]], threads: SupportsIndex | None = ...
    ) -> None:
        """Fill the buffers of (offset, buffer) pairs, in the order of their places."""
    def forget(self, start: int = 0, end: int | None = None) -> None:
        """Forget the tables of ``[start, end)``, which have changed.

        Without a range, blocks are forgotten too.
        """
    def write(self, offset: SupportsIndex, data: object) -> int | None:
        """Write ``data`` if all of it can be overwritten in place; return its length.

        None if a part is not in a row of DATA of a table that is kept, a file refuses
        writes, or `stop_writing` was called; a part may be written then.  Also if the
        buffer is not contiguous.
        """
    def load(self, offset: int) -> None:
        """Get the table of an offset of the disk, so that `write` has it.

        Nothing happens if the ``uses`` are closed.
        """
    def stop_writing(self) -> None:
        """Let `write` write nothing; return once no write is in progress."""
    def resume_writing(self) -> None:
        """Let `write` write again."""
    @property
    def stats(self) -> tuple[int, int, int, int]:
        """Entries and bytes that are kept; how many were found, and how many not."""
