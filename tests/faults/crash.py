"""The states of a disk after a power cut, from the recorded log of a process's writes.

Contents are durable when their file has been synced since, and names when their folder
has been.  Everything else may be there, in part, or not at all.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator, Mapping
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

_HEAD = struct.Struct("@IIIIQQQ")


class Event(IntEnum):
    """The kind of a row (``enum record_kind``)."""

    CREATE = 1
    WRITE = 2
    ZERO = 3
    TRUNCATE = 4
    SYNC = 5
    RENAME = 6
    UNLINK = 7
    MARK = 8


class Row(NamedTuple):
    """One call that succeeded."""

    event: Event
    inode: int
    is_folder: bool
    name: str
    new_name: str
    offset: int
    data: bytes
    length: int


def read_log(path: Path) -> list[Row]:
    """Return the rows of a log that the shim wrote.

    The process may have been killed while it wrote the last one.
    """
    rows: list[Row] = []
    log = path.read_bytes()
    at = 0
    while at + _HEAD.size <= len(log):
        kind, n_name, n_new, is_folder, inode, offset, length = _HEAD.unpack_from(log, at)
        event = Event(kind)
        n_data = length if event is Event.WRITE else 0
        at += _HEAD.size
        if at + n_name + n_new + n_data > len(log):
            break
        name, at = log[at : at + n_name], at + n_name
        new_name, at = log[at : at + n_new], at + n_new
        data, at = log[at : at + n_data], at + n_data
        if event is Event.ZERO:
            (length,) = struct.unpack("@Q", name)
            name = b""
        text, new_text = name.decode(), new_name.decode()
        rows.append(Row(event, inode, bool(is_folder), text, new_text, offset, data, length))
    return rows


def _apply(content: bytearray, row: Row, keep: int | None = None) -> None:
    """Change a file's content; ``keep`` limits the bytes of a write."""
    if row.event is Event.TRUNCATE:
        del content[row.offset :]
        content.extend(bytes(row.offset - len(content)))
    elif row.event is Event.ZERO:
        end = min(row.offset + row.length, len(content))
        content[row.offset : end] = bytes(max(end - row.offset, 0))
    elif row.event is Event.WRITE:
        data = row.data[:keep]
        if len(content) < row.offset:
            content.extend(bytes(row.offset - len(content)))
        content[row.offset : row.offset + len(data)] = data


def after_crashes(
    before: Mapping[str, bytes], rows: list[Row], rng: random.Random
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the possible contents of the folder after each row, and a description."""
    for cut in range(len(rows) + 1):
        for how in ("all unsynced lost", "names kept", "some torn", "all kept"):
            yield f"cut after {cut} of {len(rows)}, {how}", _crash(before, rows[:cut], how, rng)


def _crash(
    before: Mapping[str, bytes], rows: list[Row], how: str, rng: random.Random
) -> dict[str, bytes]:
    synced_until: dict[int, int] = {}
    folder_synced_until = 0
    for index, row in enumerate(rows):
        if row.event is Event.SYNC and row.is_folder:
            folder_synced_until = index
        elif row.event is Event.SYNC:
            synced_until[row.inode] = index
    # Old files, which are durable, have negative numbers.
    contents: dict[int, bytearray] = {}
    names: dict[str, int] = {}
    for number, (name, data) in enumerate(before.items()):
        contents[-1 - number] = bytearray(data)
        names[name] = -1 - number
    # A journal keeps the order of names, but may hold any number of unsynced ones.
    last_name = len(rows)
    if how == "all unsynced lost":
        last_name = folder_synced_until
    elif how == "some torn":
        last_name = rng.randint(folder_synced_until, len(rows))
    for index, row in enumerate(rows):
        if row.event in (Event.CREATE, Event.RENAME, Event.UNLINK):
            if row.event is Event.CREATE:
                contents.setdefault(row.inode, bytearray())
            if index <= last_name:
                _apply_name(names, row)
        elif row.event is not Event.SYNC:
            durable = index < synced_until.get(row.inode, -1)
            content = contents.setdefault(row.inode, bytearray())
            if durable or how == "all kept":
                _apply(content, row)
            elif how == "some torn" and rng.random() < 0.5:
                _apply(content, row, rng.randint(0, len(row.data)))
    return {name: bytes(contents[inode]) for name, inode in names.items()}


def _apply_name(names: dict[str, int], row: Row) -> None:
    if row.event is Event.CREATE:
        names[row.name] = row.inode
    elif row.event is Event.UNLINK:
        names.pop(row.name, None)
    elif row.name in names:
        names[row.new_name] = names.pop(row.name)


# -- one state at random, sector by sector ---------------------------------------------

_SECTOR = 512


class Disk(NamedTuple):
    """The durable state of a folder: names and contents by inode."""

    names: dict[str, int]
    contents: dict[int, bytes]


def random_crash(before: Disk, rows: list[Row], rng: random.Random) -> Disk:
    """Return what a disk may hold when the power fails after these rows.

    Of each file, writes since its last sync are kept or lost sector by sector, in any
    order, and its size is one that it has had since.  Names change in their order, but
    any number of changes since the folder's last sync may be lost.
    """
    names = random_names(before.names, rows, rng)
    contents = {
        inode: _random_content(before.contents.get(inode, b""), rows, inode, rng)
        for inode in names.values()
    }
    return Disk(names, contents)


def random_names(before: Mapping[str, int], rows: list[Row], rng: random.Random) -> dict[str, int]:
    """Return the names that a folder may have after a cut, and their inodes."""
    names = dict(before)
    first_unsure = 1 + max(
        (at for at, row in enumerate(rows) if row.event is Event.SYNC and row.is_folder), default=-1
    )
    n_kept = rng.choice((first_unsure, len(rows), rng.randint(first_unsure, len(rows))))
    for row in rows[:n_kept]:
        if row.event in (Event.CREATE, Event.RENAME, Event.UNLINK):
            _apply_name(names, row)
    return names


def _random_content(old: bytes, rows: list[Row], inode: int, rng: random.Random) -> bytes:
    events = [row for row in rows if row.inode == inode and row.event is not Event.CREATE]
    n_sure = 1 + max((at for at, row in enumerate(events) if row.event is Event.SYNC), default=-1)
    content = bytearray(old)
    for row in events[:n_sure]:
        _apply(content, row)
    unsure = events[n_sure:]
    if not unsure:
        return bytes(content)
    sizes, latest = [len(content)], bytearray(content)
    for row in unsure:
        _apply(latest, row)
        sizes.append(len(latest))
    kept = rng.choice((0.0, 1.0, rng.random(), rng.random()))
    for row in unsure:
        if row.event is Event.WRITE:
            _apply_sectors(content, row, kept, rng)
        elif rng.random() < kept:
            _apply(content, row)
    size = sizes[0] if kept == 0 else sizes[-1] if kept == 1 else rng.choice(sizes)
    del content[size:]
    return bytes(content.ljust(size, b"\0"))


def _apply_sectors(content: bytearray, row: Row, kept: float, rng: random.Random) -> None:
    """Keep each sector of a write, or one run of all, with a probability."""
    start, end = row.offset, row.offset + len(row.data)
    whole = rng.random() < 0.5 and rng.random() < kept
    for at in range(start - start % _SECTOR, end, _SECTOR):
        if whole or rng.random() < kept:
            first, last = max(at, start), min(at + _SECTOR, end)
            piece = row.data[first - start : last - start]
            _apply(content, row._replace(offset=first, data=piece))
