"""What a format has to offer: one reader, one writer, a list of options."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, cast, runtime_checkable

from imgcore.engine.sources import SourceFile
from imgcore.errors import OptionError
from imgcore.text import without_secrets

if TYPE_CHECKING:
    from imgcore.engine.extents import Extents, Placements
    from imgcore.engine.geometry import Geometry
    from imgcore.files.byte_source import ByteSource
    from imgcore.files.gate import ReferenceGate
    from imgcore.files.target import Target
    from imgcore.files.target_file import TargetFile


class BackingReference(NamedTuple):
    """The parent that an image is made upon; in a `WriteRequest`, the one it is to get.

    Attributes
    ----------
    name : str
        File name as `ReferenceGate.open` takes it; shown, and tried first.
    format : str or None
        None if the image does not state it: it is never guessed then.
    identities : mapping of str to str
        What the parent must have in its own ``Reader.identities``, each by a name that people
        can read, such as ``{"content ID": "1a2b3c4d"}``.
    alternatives : mapping of str to str
        What the parent may have instead of the identity of the same name.
    other_names : tuple of str
        Tried in this order if nothing that fits is found under ``name``.
    modified : int or None
        Unix seconds of the parent's last change, where the format records it.  A difference is
        worth a warning only: copying a file changes it.
    path, virtual_size : str or None, int or None
        In a `WriteRequest`: the absolute path of the parent, which has been opened, and the
        bytes of its disk; its ``identities`` and ``modified`` are what it has now.
    """

    name: str
    format: str | None
    identities: Mapping[str, str] = MappingProxyType({})
    alternatives: Mapping[str, str] = MappingProxyType({})
    other_names: tuple[str, ...] = ()
    modified: int | None = None
    path: str | None = None
    virtual_size: int | None = None

    def __repr__(self) -> str:
        fields = zip(self._fields, self, strict=True)
        return without_secrets(f"BackingReference({', '.join(f'{k}={v!r}' for k, v in fields)})")


class Reader(Protocol):
    """Answers one question: where is guest range [a, b)?  It never moves guest bytes."""

    format_name: ClassVar[str]
    # The disk is its only file, byte for byte: a HOLE of it is a place in that file too.
    is_flat: ClassVar[bool]

    @property
    def subformat(self) -> str | None:
        """Kind within the format, such as ``streamOptimized``."""
        ...

    @property
    def virtual_size(self) -> int:
        """Bytes of the virtual disk."""
        ...

    @property
    def block_nbytes(self) -> int:
        """Bytes of the allocation unit."""
        ...

    @property
    def sources(self) -> Sequence[SourceFile]:
        """Files that extents refer to by index."""
        ...

    @property
    def backing(self) -> BackingReference | None:
        """The parent that the image names."""
        ...

    @property
    def identities(self) -> Mapping[str, str]:
        """What a child can recognise this image by (see `BackingReference`); often nothing."""
        ...

    def plan(self, start: int, length: int) -> Iterator[Extents]:
        """Yield extent batches that cover ``[start, start + length)`` of this layer.

        Parameters
        ----------
        start, length : int
            Bytes, multiples of 512 unless they end the disk; inside ``virtual_size``.

        Yields
        ------
        ndarray, shape (n,), dtype EXTENT_DTYPE, C-contiguous, 1 <= n <= MAX_BATCH_ROWS
            Ascending, gap-free, non-overlapping over all batches together; clipped to
            the range (a compressed row may start or end inside its block).

        Raises
        ------
        CorruptImageError
            A table entry lies outside the file.
        """
        ...

    def info(self) -> dict[str, Any]:
        """Return what is specific to the format, in the keys of ``qemu-img info``."""
        ...

    def check(self) -> CheckReport:
        """Verify the image's tables; see `Driver.has_tables`."""
        ...

    def close(self) -> None:
        """Close every file that this reader opened."""
        ...


@runtime_checkable
class SectorSized(Protocol):
    """A reader or writer of a format that states the disk's logical sector size; others lack it."""

    @property
    def logical_sector_nbytes(self) -> int:
        """Bytes of a logical sector: 512 or 4096."""
        ...


class Repair(NamedTuple):
    """One thing that is wrong with an image's file, and the bytes that put it right.

    Repairs are applied in their order to a copy of the file, which takes the image's place only
    if it then reads the same and its check finds less.  So a format states what to change and
    touches no file; it offers only what cannot lose data.

    Attributes
    ----------
    problem, action : str
        Half a line each: what is wrong and where; what is done about it.
    file_nbytes : int or None
        The size that the file gets first; None leaves it.
    writes : tuple of (int, bytes)
        Offsets and what is written there, inside the file; never where guest data is stored.
    """

    problem: str
    action: str
    file_nbytes: int | None = None
    writes: tuple[tuple[int, bytes], ...] = ()


@runtime_checkable
class Repairable(Protocol):
    """A reader of a format of which something can be repaired; others just lack the method."""

    def repairs(self) -> list[Repair]:
        """Return what can be put right safely; empty if there is nothing, or nothing safe.

        Returns
        -------
        list of Repair
            With at most MAX_REPAIR_NBYTES to write.
        """
        ...


@dataclass
class CheckReport:
    """What ``check`` found; the counts are in the format's own allocation units.

    ``problems`` holds one line each, at most ``MAX_PROBLEM_LINES``; the counters go on.
    """

    corruptions: int = 0
    leaks: int = 0
    total_clusters: int = 0
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0
    image_end_offset: int = 0
    problems: list[str] = field(default_factory=list)

    MAX_PROBLEM_LINES: ClassVar[int] = 1000

    def corruption(self, line: str) -> None:
        """Count a corruption and keep its line."""
        self.corruptions += 1
        self._keep(f"ERROR {line}")

    def corruptions_among(self, count: int, lines: Iterable[str]) -> None:
        """Count ``count`` corruptions; of their lines, no more are made than are kept."""
        self.corruptions += count
        room = self.MAX_PROBLEM_LINES - len(self.problems)
        self.problems += [f"ERROR {line}" for line in islice(lines, max(0, room))]

    def leak(self, line: str, count: int = 1) -> None:
        """Count ``count`` leaked units and keep the line about them."""
        self.leaks += count
        self._keep(f"Leaked {line}")

    def _keep(self, line: str) -> None:
        if len(self.problems) < self.MAX_PROBLEM_LINES:
            self.problems.append(line)


class WriteRequest(NamedTuple):
    """What the target has to be.

    ``options`` holds parsed ``-o`` values by name (defaults filled in by ``parse_options``),
    ``compress`` is ``-c``; ``sparse_nbytes`` is ``-S`` in bytes (0: write zeros too);
    ``logical_sector_nbytes`` is what the source states, None if it states nothing.
    """

    virtual_size: int
    options: Mapping[str, Any]
    compress: bool = False
    backing: BackingReference | None = None
    sparse_nbytes: int = 4096
    target_name: str = ""
    logical_sector_nbytes: int | None = None

    @property
    def takes_space(self) -> bool:
        """Whether all of the target's space is taken at once, and so in blocks of its own."""
        return self.options.get("preallocation") in ("falloc", "full")


class Writer(Protocol):
    """States a target geometry, then turns placements into tables.  It never moves guest bytes."""

    format_name: ClassVar[str]

    @property
    def geometry(self) -> Geometry:
        """What the engine is asked for; final after `begin`."""
        ...

    @property
    def first_offset(self) -> int:
        """First byte of the file that guest data may take."""
        ...

    def begin(self, target: Target) -> TargetFile:
        """Prepare the target's files and return the one that guest data goes to."""
        ...

    def place(self, first_block: int, placements: Placements, next_offset: int) -> int:
        """Take note of where blocks landed, in ascending order of calls.

        Parameters
        ----------
        first_block : int
            Number of the block that ``placements[0]`` is about.
        placements : ndarray, shape (n,), dtype PLACEMENT_DTYPE
            Read only; valid during the call.  Blocks never mentioned are ABSENT.
        next_offset : int
            First free byte of the file.

        Returns
        -------
        int
            The first free byte now: larger if the writer has put tables into the file
            because more than MAX_PENDING_TABLE_NBYTES had gathered.
        """
        ...

    def finish(self, next_offset: int) -> None:
        """Write the remaining tables and headers, and set the file's final size."""
        ...


class Option(NamedTuple):
    """One ``-o key=value`` of a format.

    ``kind`` is ``"size"`` (bytes with suffix), ``"int"``, ``"bool"`` (on/off), ``"choice"`` or
    ``"str"``.
    """

    name: str
    kind: str
    default: Any
    help: str
    choices: tuple[str, ...] = ()


class Measurement(NamedTuple):
    """Bytes that a target file needs: for the given data, and at the most."""

    required: int
    fully_allocated: int


@dataclass(frozen=True)
class Driver:
    """What a format offers; the module that the registry names holds it as ``DRIVER``.

    Attributes
    ----------
    name : str
        As in the registry.
    options, read_options : tuple of Option
        For writing, and for reading.
    read : callable
        Returns a `Reader` for a file, a gate for what the image names, and the values of
        ``read_options``; the parent is not opened.  Raises WrongFormatError only if the magic is
        absent.
    writing : str or None
        Module with ``writer_for(request)`` and ``measure(request, data_nbytes)``; it is imported
        when it is needed, since it imports NumPy.  None if images are read only.
    writes_in_place : bool
        Whether an image may be written into an existing file or a block device.
    has_tables : bool
        Whether images have tables, so that there is something to check.
    """

    name: str
    options: tuple[Option, ...]
    read: Callable[[ByteSource, ReferenceGate, Mapping[str, Any]], Reader]
    writing: str | None
    read_options: tuple[Option, ...] = ()
    writes_in_place: bool = False
    has_tables: bool = True

    def open(
        self, file: ByteSource, gate: ReferenceGate, values: Mapping[str, Any] | None = None
    ) -> Reader:
        """Open an image; ``values`` are the parsed ``read_options``, their defaults if None."""
        if values is None:
            values = {option.name: option.default for option in self.read_options}
        return self.read(file, gate, values)

    def writer(self, request: WriteRequest) -> Writer:
        """Return a writer; raises OptionError or LimitExceededError."""
        return cast("Writer", self._writing_module().writer_for(request))

    def measure(self, request: WriteRequest, data_nbytes: int) -> Measurement:
        """Return the file size needed for ``data_nbytes`` of allocated blocks."""
        return cast("Measurement", self._writing_module().measure(request, data_nbytes))

    def _writing_module(self) -> Any:
        if self.writing is None:
            raise OptionError(f"{self.name} images are read, not written")
        return importlib.import_module(self.writing)
