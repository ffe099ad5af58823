"""VHDX: replays the log in memory.

The file is never written to.  `ReplayedFile` keeps the changes of the active sequence
of log entries beside it, and everything else reads through that.

Source: [MS-VHDX] 2.3, "Log".
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from imgcore import limits
from imgcore._core import crc32c
from imgcore.errors import CorruptImageError, LimitExceededError
from imgcore.files.host_file import HostFile
from imgcore.formats.shared.damage import STRICT, Damage
from imgcore.formats.vhdx import layout

if TYPE_CHECKING:
    import uuid

    from imgcore.files.byte_source import ByteSource

_SECTOR: Final = layout.LOG_SECTOR_NBYTES

# ``place`` of a range that the log fills with zeros.
ZEROS: Final = -1


class Patch(NamedTuple):
    """Bytes [start, end) of the file, as the log leaves them.

    ``place`` is their offset in the file of replayed sectors, or `ZEROS`.
    """

    start: int
    end: int
    place: int


class _Entry(NamedTuple):
    offset: int
    nbytes: int
    tail: int
    sequence: int
    n_descriptors: int
    flushed_file_offset: int
    last_file_offset: int


class ReplayedFile:
    """An image file as it would be after its log was replayed.

    Attributes
    ----------
    path : str
    nbytes : int
        The size that the log states.  If the file is shorter, the rest reads as zeros.
    n_entries : int
        Number of entries in the active sequence.
    store : HostFile
        Sectors from the log, in an anonymous file.
    patches : list of Patch
        Ascending and disjoint.
    """

    def __init__(
        self, file: ByteSource, nbytes: int, n_entries: int, writes: list[Patch], sectors: bytearray
    ) -> None:
        self._file = file
        self.path: str = file.path
        self.nbytes = nbytes
        self.n_entries = n_entries
        grown = [Patch(file.nbytes, nbytes, ZEROS)] if nbytes > file.nbytes else []
        self.patches: list[Patch] = _flatten([*grown, *writes])
        self._starts = [patch.start for patch in self.patches]
        self.store: HostFile = HostFile.in_memory(sectors, f"{file.path} (log)")

    def pread(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes; see `ByteSource.pread`."""
        if length > self.nbytes or offset > self.nbytes - length:
            raise CorruptImageError(
                f"{length} bytes at 0x{offset:x} end at 0x{offset + length:x}, "
                f"past the end of the file (0x{self.nbytes:x})",
                path=self.path,
                offset=offset,
            )
        buffer = bytearray(length)
        end = offset + length
        inside = min(end, self._file.nbytes) - offset
        if inside > 0:
            self._file.pread_into(offset, memoryview(buffer)[:inside])
        for index in range(max(0, bisect_right(self._starts, offset) - 1), len(self.patches)):
            start, stop, place = self.patches[index]
            if start >= end:
                break
            low, high = max(start, offset), min(stop, end)
            if low < high:
                piece = (
                    bytes(high - low)
                    if place == ZEROS
                    else self.store.pread(place + low - start, high - low)
                )
                buffer[low - offset : high - offset] = piece
        return bytes(buffer)

    def pread_into(self, offset: int, buffer: Any) -> None:
        """Fill a writable buffer; see `ByteSource.pread_into`."""
        with memoryview(buffer) as view, view.cast("B") as octets:
            octets[:] = self.pread(offset, len(octets))


def replay(
    file: ByteSource,
    guid: uuid.UUID,
    log_offset: int,
    log_nbytes: int,
    damage: Damage = STRICT,
) -> ReplayedFile:
    """Return a file with its log replayed; the file itself does not change.

    Parameters
    ----------
    file : ByteSource
        The caller closes it.
    guid : UUID
        The header's LogGuid, not nil.
    log_offset, log_nbytes : int
        Host offset and size of the log in bytes, multiples of 1 MiB.
    damage : Damage
        When salvaging, the file may be shorter than the log states.

    Raises
    ------
    CorruptImageError
        The log has no valid sequence of entries, or the file is shorter than the log
        states.
    LimitExceededError
        The log is larger than ``VHDX_MAX_LOG_NBYTES``, or it is over another limit.

    Notes
    -----
    Memory: twice the log.
    """
    if log_nbytes > limits.VHDX_MAX_LOG_NBYTES:
        raise LimitExceededError(
            f"a log of {log_nbytes} bytes must be replayed, at most {limits.VHDX_MAX_LOG_NBYTES} "
            "are allowed",
            path=file.path,
            offset=log_offset,
        )
    log = _Log(file.path, file.pread(log_offset, log_nbytes), log_offset, guid)
    sequence = log.active_sequence()
    head = sequence[-1]
    if file.nbytes < head.flushed_file_offset:
        damage.report(
            CorruptImageError(
                f"the file has {file.nbytes:#x} bytes, but its log states that "
                f"{head.flushed_file_offset:#x} were written: the file is truncated",
                path=file.path,
            )
        )
    sectors = bytearray()
    writes = [write for entry in sequence for write in log.writes(entry, sectors)]
    if file.nbytes < head.flushed_file_offset:
        # What the file has lost must not become zeros.
        kept = [write for write in writes if write.end <= file.nbytes]
        return ReplayedFile(file, file.nbytes, len(sequence), kept, sectors)
    nbytes = max([file.nbytes, head.last_file_offset, *(write.end for write in writes)])
    if nbytes > limits.VHDX_MAX_FILE_NBYTES:
        raise LimitExceededError(
            f"its log makes the file {nbytes} bytes long, at most {limits.VHDX_MAX_FILE_NBYTES} "
            "are allowed",
            path=file.path,
            offset=log_offset,
        )
    return ReplayedFile(file, nbytes, len(sequence), writes, sectors)


class _Log:
    """The ring of log entries; each offset is examined once."""

    def __init__(self, path: str, ring: bytes, ring_offset: int, guid: uuid.UUID) -> None:
        self._path = path
        self._ring = ring
        self._ring_offset = ring_offset
        self._guid = guid.bytes_le
        self._n_checksummed = 0
        self._n_descriptors = 0

    def _bytes(self, offset: int, nbytes: int) -> bytes:
        """Return bytes of the ring, which continues at its start after its end."""
        offset %= len(self._ring)
        piece = self._ring[offset : offset + nbytes]
        return piece + self._ring[: nbytes - len(piece)]

    def active_sequence(self) -> list[_Entry]:
        """Return the newest valid and complete sequence of entries, the oldest first.

        Notes
        -----
        The specification follows entries from each offset to the last one of an
        unbroken run, and requires that the run contains the last one's tail.  The same
        is verified here from the other side: the run that starts at the tail must lead
        to the last entry.
        """
        entries = {}
        for offset in range(0, len(self._ring), _SECTOR):
            entry = self._entry_at(offset)
            if entry is not None:
                entries[offset] = entry
        best: list[_Entry] = []
        for head in entries.values():
            if self._successor(entries, head) is None:
                sequence = self._run(entries, head)
                if sequence and (not best or head.sequence > best[-1].sequence):
                    best = sequence
        if not best:
            raise CorruptImageError(
                "its log must be replayed, but has no valid sequence of entries",
                path=self._path,
                offset=self._ring_offset,
            )
        return best

    def _successor(self, entries: dict[int, _Entry], entry: _Entry) -> _Entry | None:
        after = entries.get((entry.offset + entry.nbytes) % len(self._ring))
        return after if after is not None and after.sequence == entry.sequence + 1 else None

    def _run(self, entries: dict[int, _Entry], head: _Entry) -> list[_Entry]:
        """Return the entries from a head's tail to the head; empty if broken."""
        run: list[_Entry] = []
        entry = entries.get(head.tail)
        while entry is not None:
            run.append(entry)
            if entry is head:
                return run
            entry = self._successor(entries, entry)
        return []

    def _entry_at(self, offset: int) -> _Entry | None:
        """Return the valid entry at an offset of the ring, or None."""
        ring_nbytes = len(self._ring)
        raw = self._bytes(offset, layout.LOG_ENTRY.size)
        if not raw.startswith(layout.LOG_ENTRY_SIGNATURE):
            return None
        (_, checksum, nbytes, tail, sequence, n_descriptors, _, guid, flushed, last) = (
            layout.LOG_ENTRY.unpack(raw)
        )
        entry = _Entry(offset, nbytes, tail, sequence, n_descriptors, flushed, last)
        is_sane = (
            guid == self._guid
            and sequence > 0
            and nbytes % _SECTOR == 0
            and 0 < nbytes <= ring_nbytes
            and tail % _SECTOR == 0
            and tail < ring_nbytes
            and self._descriptors_nbytes(entry) <= nbytes
        )
        if not is_sane or self._checksum(entry) != checksum or not self._is_whole(entry):
            return None
        return entry

    def _checksum(self, entry: _Entry) -> int:
        self._n_checksummed += entry.nbytes
        if self._n_checksummed > limits.VHDX_MAX_LOG_PASSES * len(self._ring):
            raise CorruptImageError(
                "the entries of its log overlap", path=self._path, offset=self._ring_offset
            )
        raw = self._bytes(entry.offset, entry.nbytes)
        crc = crc32c(raw[: layout.CHECKSUM_OFFSET])
        crc = crc32c(bytes(layout.CHECKSUM.size), crc)
        return crc32c(raw[layout.CHECKSUM_OFFSET + layout.CHECKSUM.size :], crc)

    @staticmethod
    def _descriptors_nbytes(entry: _Entry) -> int:
        """Return the bytes of the header and the descriptors, in whole sectors."""
        nbytes = layout.LOG_ENTRY.size + entry.n_descriptors * layout.LOG_DESCRIPTOR.size
        return -(-nbytes // _SECTOR) * _SECTOR

    def _descriptors(self, entry: _Entry) -> Iterator[tuple[bytes, bytes, bytes, int, int]]:
        nbytes = entry.n_descriptors * layout.LOG_DESCRIPTOR.size
        return layout.LOG_DESCRIPTOR.iter_unpack(
            self._bytes(entry.offset + layout.LOG_ENTRY.size, nbytes)
        )

    def _is_whole(self, entry: _Entry) -> bool:
        """Tell whether descriptors and data sectors belong to the entry's header."""
        self._n_descriptors += entry.n_descriptors
        if self._n_descriptors > limits.VHDX_MAX_LOG_DESCRIPTORS:
            raise LimitExceededError(
                f"its log has more than {limits.VHDX_MAX_LOG_DESCRIPTORS} descriptors",
                path=self._path,
                offset=self._ring_offset,
            )
        data_offset = self._descriptors_nbytes(entry)
        for signature, _, leading, file_offset, sequence in self._descriptors(entry):
            if sequence != entry.sequence or file_offset % _SECTOR:
                return False
            if signature == layout.LOG_ZERO_SIGNATURE:
                if int.from_bytes(leading, "little") % _SECTOR:
                    return False
            elif signature == layout.LOG_DATA_SIGNATURE:
                if data_offset >= entry.nbytes or not self._is_data(entry, data_offset):
                    return False
                data_offset += _SECTOR
            else:
                return False
        return True

    def _is_data(self, entry: _Entry, data_offset: int) -> bool:
        sector = self._bytes(entry.offset + data_offset, _SECTOR)
        signature, high = layout.LOG_SECTOR_HEAD.unpack_from(sector)
        (low,) = layout.LOG_SECTOR_TAIL.unpack_from(sector, _SECTOR - layout.LOG_SECTOR_TAIL.size)
        return bool(signature == layout.LOG_SECTOR_SIGNATURE and high << 32 | low == entry.sequence)

    def writes(self, entry: _Entry, sectors: bytearray) -> Iterator[Patch]:
        """Yield the writes of an entry, and append its sectors to ``sectors``."""
        data_offset = self._descriptors_nbytes(entry)
        for signature, trailing, leading, file_offset, _ in self._descriptors(entry):
            if signature == layout.LOG_ZERO_SIGNATURE:
                nbytes = int.from_bytes(leading, "little")
                if nbytes:
                    yield Patch(file_offset, file_offset + nbytes, ZEROS)
                continue
            sector = self._bytes(entry.offset + data_offset, _SECTOR)
            data_offset += _SECTOR
            yield Patch(file_offset, file_offset + _SECTOR, len(sectors))
            sectors += leading + sector[len(leading) : -len(trailing)] + trailing


def _flatten(writes: list[Patch]) -> list[Patch]:
    """Return disjoint, ascending ranges; if writes overlap, the later one counts."""
    by_start = sorted(range(len(writes)), key=lambda index: writes[index].start)
    bounds = sorted({bound for write in writes for bound in write[:2]})
    open_writes: list[int] = []  # a heap of negated indices: the latest write on top
    flat: list[Patch] = []
    n_opened = 0
    for low, high in pairwise(bounds):
        while n_opened < len(by_start) and writes[by_start[n_opened]].start <= low:
            heapq.heappush(open_writes, -by_start[n_opened])
            n_opened += 1
        while open_writes and writes[-open_writes[0]].end <= low:
            heapq.heappop(open_writes)
        if open_writes:
            start, _, place = writes[-open_writes[0]]
            _append(flat, Patch(low, high, ZEROS if place == ZEROS else place + low - start))
    return flat


def _append(flat: list[Patch], patch: Patch) -> None:
    """Append a range; join it with the last one if it continues that."""
    if flat and flat[-1].end == patch.start:
        start, end, place = flat[-1]
        goes_on = place == ZEROS if patch.place == ZEROS else place + end - start == patch.place
        if goes_on and (place == ZEROS) == (patch.place == ZEROS):
            flat[-1] = Patch(start, patch.end, place)
            return
    flat.append(patch)
