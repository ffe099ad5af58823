"""Digests of disks: of one that is open, and of bytes that come in order."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple

from imgcore._core import Hasher
from imgcore.checksums.digest import Digest
from imgcore.engine.hashing import (
    LeafStream,
    digest_disk,
    digest_geometry,
    hash_batches,
    require_algorithm,
)
from imgcore.engine.job import chosen_variants, translated_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from _typeshed import ReadableBuffer

    from imgcore._core import RateLimit
    from imgcore.areas.area import Area
    from imgcore.checksums.tree import TreeFile
    from imgcore.disk.disk_state import DiskState
    from imgcore.disk.source import Source
    from imgcore.engine.geometry import Geometry
    from imgcore.engine.hashing import LeafSink
    from imgcore.engine.supply import Supply
    from imgcore.files.byte_source import ByteSource


class DigestedDisk(NamedTuple):
    """A disk that is open, as far as checksums need it.

    Attributes
    ----------
    path : str
        Its name in messages.
    nbytes : int
        Bytes whose checksum is made.
    files : sequence of ByteSource
        Every file that is read.
    supply : callable
        Returns what the engine reads, for a geometry.
    """

    path: str
    nbytes: int
    files: Sequence[ByteSource]
    supply: Callable[[Geometry], AbstractContextManager[Supply]]

    @classmethod
    def of_source(cls, source: Source) -> DigestedDisk:
        """Return the whole disk of a source."""
        if not source.layers:
            # A compressed raw disk, which may turn out to be an image.
            source.refuse_conversion(with_base=False)
        return cls(
            source.path,
            source.exact_nbytes,
            source.files,
            lambda geometry: source.supply(geometry, None),
        )

    @classmethod
    def of_state(cls, disk: DiskState) -> DigestedDisk:
        """Return the whole disk of an open image, which stays in this state."""
        from imgcore.disk.image_batches import disk_batches
        from imgcore.engine.source_file import native_sources
        from imgcore.engine.supply import Supply

        def supply(geometry: Geometry) -> AbstractContextManager[Supply]:
            extents = disk.data_extents(0, disk.virtual_size, None)
            batches = disk_batches(extents, disk.virtual_size, geometry)
            return nullcontext(Supply(disk.paths, native_sources(disk.sources), batches))

        return cls(disk.files[0].path, disk.exact_nbytes, disk.every_file(), supply)

    def digest(
        self,
        algorithm: str,
        *,
        threads: int,
        variants: Mapping[str, str] | None = None,
        limit: RateLimit | None = None,
        sink: LeafSink | None = None,
        report: Callable[[int, int], None] | None = None,
    ) -> Digest:
        """Read the disk and return its digest.

        The parameters are those of `imgcore.engine.hashing.digest_disk`.
        """
        with (
            self.supply(digest_geometry(self.nbytes)) as supply,
            translated_errors(supply.paths),
        ):
            digest = digest_disk(
                supply,
                self.nbytes,
                algorithm,
                threads=threads,
                variants=chosen_variants(None) if variants is None else variants,
                limit=limit,
                sink=sink,
                report=report,
            )
        return Digest(digest, algorithm)

    def changed_since(
        self,
        tree: TreeFile,
        *,
        threads: int,
        limit: RateLimit | None = None,
        sink: LeafSink | None = None,
        report: Callable[[int, int], None] | None = None,
    ) -> Generator[Area, None, None]:
        """Read the disk, and yield the areas in which it is not that of a tree.

        ``sink`` gets all leaves of the disk.

        Raises
        ------
        OptionError
            The disk has another size than that of the tree.
        """
        from imgcore.checksums.differences import TreeDifferences

        require_algorithm(tree.digest.algorithm)
        tree.refuse_other(self.path, tree.digest.algorithm, self.nbytes)
        areas: list[Area] = []
        differences = TreeDifferences(tree, areas.append)
        both = differences if sink is None else _BothSinks(differences, sink)
        stream = LeafStream(tree.digest.algorithm, both)
        with (
            self.supply(digest_geometry(self.nbytes)) as supply,
            translated_errors(supply.paths),
        ):
            for _ in hash_batches(
                supply,
                stream,
                threads=threads,
                variants=chosen_variants(None),
                limit=limit,
                report=report,
            ):
                yield from areas
                areas.clear()
        stream.finish(self.nbytes)
        differences.finish()
        yield from areas
        tree.check_unchanged()

    def check_unchanged(self) -> None:
        """Raise ImgcoreError if a file has changed since it was opened."""
        for file in self.files:
            file.check_unchanged()


class _BothSinks(NamedTuple):
    """Gives leaves to two sinks; a `LeafSink`."""

    first: LeafSink
    second: LeafSink

    def add(self, leaves: memoryview) -> None:
        self.first.add(leaves)
        self.second.add(leaves)

    def add_zeros(self, n_blocks: int) -> None:
        self.first.add_zeros(n_blocks)
        self.second.add_zeros(n_blocks)


class DiskHasher:
    """The digest of a disk whose bytes come in order; without an algorithm, nothing."""

    def __init__(self, algorithm: str | None) -> None:
        self._algorithm = algorithm
        self._hasher = None if algorithm is None else Hasher(algorithm)

    def update(self, content: ReadableBuffer) -> None:
        """Add the next bytes."""
        if self._hasher is not None:
            self._hasher.update(content)

    def zeros(self, nbytes: int) -> None:
        """Add zeros."""
        if self._hasher is not None:
            self._hasher.zeros(nbytes)

    def digest(self) -> Digest | None:
        """Return the digest of what was added."""
        if self._hasher is None or self._algorithm is None:
            return None
        return Digest(self._hasher.digest(), self._algorithm)
