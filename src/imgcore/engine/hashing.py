"""Checksums of disks: the leaves of a job's batches become one digest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from imgcore._core import (
    CHECKSUM_BLOCK_NBYTES,
    CHECKSUM_NBYTES,
    Hasher,
    Job,
    checksum_algorithms,
)
from imgcore.engine.geometry import Geometry, Placing
from imgcore.engine.thread_budget import Lease
from imgcore.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from imgcore._core import RateLimit
    from imgcore.engine.supply import Batch, Supply

# Zeros that are hashed by one call, in less than a second: a signal waits for its end.
_ZEROS_NBYTES: Final = 1 << 39

_KNOWN: Final = ("sha256", "blake3")


def require_algorithm(name: str) -> None:
    """Raise OptionError if checksums cannot be made with this algorithm."""
    built = checksum_algorithms()
    if name in built:
        return
    if name in _KNOWN:
        raise OptionError(f"checksum algorithm {name!r} is not in this build of imgcore")
    raise OptionError(f"no checksum algorithm {name!r}: choose one of {', '.join(built)}")


def digest_geometry(nbytes: int) -> Geometry:
    """Return the geometry whose batches suit a job that only makes a checksum."""
    block = CHECKSUM_BLOCK_NBYTES
    return Geometry(block, nbytes, placing=Placing.IDENTITY, leaf_nbytes=block)


class LeafSink(Protocol):
    """Receives the leaves of a disk in order."""

    def add(self, leaves: memoryview) -> None:
        """Take leaves, which are valid until the call returns."""
        ...

    def add_zeros(self, n_blocks: int) -> None:
        """Take the leaf of a whole block of zeros, ``n_blocks`` times."""
        ...


class LeafStream:
    """The digest of a disk, from the leaves of its batches in guest order.

    What is between two batches, and after the last one, is zeros.

    Parameters
    ----------
    algorithm : str
        A name that `require_algorithm` accepts.
    sink : LeafSink, optional
        Gets every leaf as well.
    """

    def __init__(self, algorithm: str, sink: LeafSink | None = None) -> None:
        self.algorithm = algorithm
        self._hasher = Hasher(algorithm)
        self._sink = sink
        self._buffer = bytearray()
        self._position = 0

    @staticmethod
    def leaf_nbytes(nbytes: int) -> int:
        """Return the bytes of the leaves of so many bytes of a disk."""
        return -(-nbytes // CHECKSUM_BLOCK_NBYTES) * CHECKSUM_NBYTES

    def leaves(self, start: int, end: int) -> memoryview:
        """Return the memory for the leaves of a batch, the same for every batch."""
        nbytes = self.leaf_nbytes(end - start)
        if len(self._buffer) < nbytes:
            self._buffer = bytearray(nbytes)
        return memoryview(self._buffer)[:nbytes]

    def add(self, start: int, end: int, leaves: memoryview) -> None:
        """Add a batch that has ended, with its leaves."""
        self._add_zeros(start - self._position)
        self._add(leaves, end - start)

    def finish(self, nbytes: int) -> bytes:
        """Return the digest of the whole disk of ``nbytes`` bytes."""
        self._add_zeros(nbytes - self._position)
        return self._hasher.digest()

    def _add(self, leaves: memoryview, nbytes: int) -> None:
        self._hasher.add_leaves(leaves, nbytes)
        self._position += nbytes
        if self._sink is not None:
            self._sink.add(leaves)

    def _add_zeros(self, nbytes: int) -> None:
        n_blocks, rest = divmod(nbytes, CHECKSUM_BLOCK_NBYTES)
        for done in range(0, nbytes - rest, _ZEROS_NBYTES):
            self._hasher.zeros(min(_ZEROS_NBYTES, nbytes - rest - done))
        self._position += nbytes - rest
        if self._sink is not None and n_blocks:
            self._sink.add_zeros(n_blocks)
        if rest:
            self._add(memoryview(self._hasher.leaf(bytes(rest))), rest)


def digest_disk(
    supply: Supply,
    nbytes: int,
    algorithm: str,
    *,
    threads: int,
    variants: Mapping[str, str],
    limit: RateLimit | None = None,
    sink: LeafSink | None = None,
    report: Callable[[int, int], None] | None = None,
) -> bytes:
    """Read a disk and return its digest.

    Parameters
    ----------
    supply : Supply
        For the geometry of `digest_geometry`.
    nbytes : int
        Bytes of the disk.
    algorithm, sink
        As for `LeafStream`.
    threads, variants, limit
        As for `Job`.
    report : callable, optional
        Called about every 50 ms with the bytes that are done, and those that are data.
    """
    stream = LeafStream(algorithm, sink)
    for _ in hash_batches(
        supply, stream, threads=threads, variants=variants, limit=limit, report=report
    ):
        pass
    return stream.finish(nbytes)


def hash_batches(
    supply: Supply,
    stream: LeafStream,
    *,
    threads: int,
    variants: Mapping[str, str],
    limit: RateLimit | None = None,
    report: Callable[[int, int], None] | None = None,
) -> Iterator[None]:
    """Read a disk, and give each batch's leaves to a stream; then yield.

    The parameters are those of `digest_disk`.  The caller finishes the stream.
    """
    job = Job(
        sources=supply.native_sources,
        threads=threads,
        batch_threads=Lease(threads).renew,
        variants=dict(variants),
        rate_limit=limit,
        checksum=stream.algorithm,
    )
    skipped_nbytes = given_nbytes = 0

    def tick() -> None:
        done, data, *_ = job.progress()
        if report is not None:
            report(skipped_nbytes + done, data)

    def end(batch: Batch, leaves: memoryview) -> None:
        job.wait(tick)
        tick()
        stream.add(batch.start, batch.end, leaves)

    pending: tuple[Batch, memoryview] | None = None
    try:
        # The next batch is prepared while the engine works on the one before it.
        for batch in supply.batches:
            if pending is not None:
                end(*pending)
                yield
            skipped_nbytes = batch.start - given_nbytes
            given_nbytes += batch.end - batch.start
            leaves = stream.leaves(batch.start, batch.end)
            job.start(batch.start, batch.end, batch.rows, leaves=leaves)
            pending = (batch, leaves)
        if pending is not None:
            end(*pending)
            yield
    finally:
        job.close()
