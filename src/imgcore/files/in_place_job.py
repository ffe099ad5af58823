"""The steps of a conversion inside a file, forward and back, as its journal tells them.

`imgcore.files.in_place` says what the records mean.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from imgcore.errors import ImgcoreError, TargetError
from imgcore.files.descriptors import duplicate, forks_held_back, named_errors
from imgcore.files.folder import Folder
from imgcore.files.host_file import HostFile
from imgcore.files.identity import describe_file_type, file_identity
from imgcore.files.journal import SUFFIX, Journal, first_head
from imgcore.files.locks import end_lease, lease, lock_image
from imgcore.files.ranges import Range, is_inside
from imgcore.files.space import reserve
from imgcore.files.staged_file import Change, write_different
from imgcore.files.target_file import TargetFile
from imgcore.limits import MIB, SECTOR_NBYTES
from imgcore.log import log

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from typing import Self

# Blocks that are punched are of this size, or larger if there were more of them.
_BLOCK_NBYTES: Final = 4096
_MAX_BLOCKS: Final = 1 << 26


class SideFile(NamedTuple):
    """A small file beside an image: a descriptor."""

    name: str
    content: bytes
    mode: int


class Facts(dict[str, Any]):
    """What the caller has put into a journal; asking for more is an ImgcoreError."""

    def __init__(self, journal: Journal, facts: dict[str, Any]) -> None:
        super().__init__(facts)
        self._journal = journal

    def __missing__(self, key: str) -> Any:
        raise self._journal.damaged(f"it lacks {key}")


class Begin(NamedTuple):
    """What the record ``begin`` says.

    Attributes
    ----------
    inode : int or None
        The image's; None if the file system has no lasting ones.
    size, mtime_ns : int
        Of the old file.
    name, new_name : str
        Of the image, old and new; they may be equal.
    ranges : list of (offset, length)
        What may be overwritten.
    created, removed : sequence of SideFile
    job : mapping
        What the caller has put in: formats, options.
    """

    inode: int | None
    size: int
    mtime_ns: int
    name: str
    new_name: str
    ranges: list[Range]
    created: Sequence[SideFile]
    removed: Sequence[SideFile]
    job: Mapping[str, Any]


class Job:
    """An image and its journal: every step that goes forward or back."""

    def __init__(self, folder: Folder, journal: Journal, file: TargetFile, name: str) -> None:
        self.folder = folder
        self.journal = journal
        self.file = file
        self.name: str = name
        self.begin: Begin = _begin_of(journal)
        self._is_arming = False

    @property
    def path(self) -> str:
        """The image's path now."""
        return self.folder.path_of(self.name)

    def has(self, kind: str) -> bool:
        """Tell whether the journal has a record."""
        return kind in self.journal.records

    # -- forward -----------------------------------------------------------------------

    def arm(self, change: Change, tables: list[Range]) -> None:
        """Make what was appended durable, and record what will be overwritten.

        ``tables`` are the parts of what was appended that a crash must not have lost.
        """
        for offset, data in change.pieces:
            with named_errors(self.path):
                reserve(self.file.fd, offset, len(data))
        if change.file_size >= self.begin.size:
            # Also gives back what was reserved and not needed.
            self.file.truncate(change.file_size)
        if not self.is_as_before():
            raise ImgcoreError("changed while it was converted", path=self.path)
        self.file.sync()
        head = {
            "pieces": [(offset, len(data)) for offset, data in change.pieces],
            "cleared": change.cleared,
            "size": change.file_size,
            "mtime_ns": self.file.status().st_mtime_ns,
            "tables": tables,
            "tables_sha256": self._digest(tables),
        }
        self._is_arming = True
        self.journal.append("armed", head, [data for _, data in change.pieces])

    def complete(self) -> None:
        """Put the new image in the old one's place; may be called again."""
        if not self.has("done"):
            change, _ = self._armed
            change.apply(self.file, sync=True)
            status = self.file.status()
            self.journal.append("done", {"size": status.st_size, "mtime_ns": status.st_mtime_ns})
        begin, folder = self.begin, self.folder
        if begin.name != begin.new_name and self.journal.name == begin.new_name + SUFFIX:
            return  # all names are right, and a side file may have changed since
        for side in begin.removed:
            self._remove(side)
        self._rename(begin.new_name)
        for side in begin.created:
            self._put(side)
        folder.sync()
        if self.journal.name != begin.new_name + SUFFIX:
            self.journal.rename(begin.new_name + SUFFIX)
            folder.sync()

    @property
    def _armed(self) -> tuple[Change, list[Range]]:
        """What the record ``armed`` says: the change, and the tables appended."""
        head, blob = self.journal.records["armed"]
        try:
            pieces = list(_cut(blob, head["pieces"]))
            change = Change(pieces, _ranges_of(head["cleared"]), int(head["size"]))
            tables = _ranges_of(head["tables"])
            changed = [(offset, len(data)) for offset, data in pieces] + change.cleared
            if change.file_size < self.begin.size:
                changed.append((change.file_size, self.begin.size - change.file_size))
        except (KeyError, TypeError, ValueError):
            raise self.journal.damaged("a record contradicts itself") from None
        if not all(is_inside(*one, self.begin.ranges) for one in changed):
            raise self.journal.damaged("a record contradicts the one before")
        return change, tables

    def is_sure(self) -> bool:
        """Tell whether nothing is missing for the new image, and no undo was begun."""
        if self.has("undoing") or not self.has("armed"):
            return False
        return self.has("done") or (self._has_tables() and not self._was_used())

    def _was_used(self) -> bool:
        """Tell whether the old image was written to since ``armed``; not if unknown."""
        if not self.has("armed") or self.has("undoing") or not self.is_as_before():
            return False
        armed_ns = self.journal.records["armed"].head.get("mtime_ns")
        return self.file.status().st_mtime_ns != armed_ns

    def _has_tables(self) -> bool:
        """Tell whether the tables are in the file that the new image will refer to."""
        _, tables = self._armed
        digest = self._digest(tables)
        return digest is not None and digest == self.journal.records["armed"].head["tables_sha256"]

    def change_since(self) -> str | None:
        """Return what shows that the new image was changed; None if it was not."""
        done, status = self.journal.records["done"].head, self.file.status()
        if status.st_size != done["size"]:
            return "size"
        if status.st_mtime_ns != done["mtime_ns"]:
            return "time of modification"
        change, _ = self._armed
        same = all(self._pread(offset, len(data)) == data for offset, data in change.pieces)
        return None if same and self._has_tables() else "tables"

    # -- back --------------------------------------------------------------------------

    def is_as_before(self) -> bool:
        """Tell whether the bytes are still there that will be overwritten."""
        return self.file.nbytes >= self.begin.size and all(
            self._pread(offset, len(data)) == data
            for offset, data in _cut(self.journal.records["begin"].blob, self.begin.ranges)
        )

    def is_between(self) -> bool:
        """Tell whether each byte that is overwritten is the old or the new one."""
        change, _ = self._armed
        news = [*change.pieces, *((offset, bytes(length)) for offset, length in change.cleared)]
        for start, old in _cut(self.journal.records["begin"].blob, self.begin.ranges):
            # What is cut off reads as zeros once the old size is restored.
            n_left = min(max(change.file_size - start, 0), len(old))
            new = bytearray(old[:n_left].ljust(len(old), b"\0"))
            for offset, data in news:
                if start <= offset < start + len(old):
                    new[offset - start : offset - start + len(data)] = data
            now = self._pread(start, len(old)).ljust(len(old), b"\0")
            for at in range(0, len(old), SECTOR_NBYTES):
                a, b, c = (part[at : at + SECTOR_NBYTES] for part in (old, new, now))
                if c not in (a, b) and any(
                    z not in (x, y) for x, y, z in zip(a, b, c, strict=True)
                ):
                    return False
        return True

    def old_file(self) -> HostFile:
        """Return the file for reading, only as long as it was before."""
        with forks_held_back(), named_errors(self.path):
            file = HostFile(duplicate(self.file.fd), self.path, share=True)
        file.nbytes = min(file.nbytes, self.begin.size)
        return file

    def go_back(self, *, keep_end: bool = False) -> None:
        """Restore the old image and its names, and remove the journal.

        With ``keep_end``, the content stays: it is the old image, which has grown.
        """
        if not keep_end:
            self._restore()
        begin = self.begin
        for side in begin.created:
            self._remove(side)
        self._rename(begin.name)
        for side in begin.removed:
            self._put(side)
        self.folder.sync()
        self.journal.remove()

    def _restore(self) -> None:
        """Restore the old image's content, and its time if nobody has written to it."""
        begin, file = self.begin, self.file
        was_used = self._was_used()
        if (self.has("armed") or self._is_arming) and not self.has("undoing"):
            self.journal.append("undoing", {})
        # First, because what follows may need the space.
        file.truncate(begin.size)
        if self.has("undoing"):
            for offset, data in _cut(self.journal.records["begin"].blob, begin.ranges):
                write_different(file, offset, data)
        file.sync()
        if was_used:
            return
        # Only the owner may set it.
        with contextlib.suppress(PermissionError), named_errors(self.path):
            os.utime(file.fd, ns=(file.status().st_atime_ns, begin.mtime_ns))
        file.sync()

    def unreferenced(self, keep: Iterable[Range]) -> list[Range]:
        """Return whole blocks of the old file that the new image does not use."""
        change, _ = self._armed
        end, unit = min(self.begin.size, change.file_size), _BLOCK_NBYTES
        while end // unit > _MAX_BLOCKS:
            unit *= 2
        # A byte for each block: the ranges may come in any order, millions of them.
        used = bytearray(end // unit)
        own = [(offset, len(data)) for offset, data in change.pieces]
        for offset, length in chain(keep, own):
            first, last = int(offset) // unit, min(-(-int(offset + length) // unit), len(used))
            used[first:last] = b"\1" * (last - first)
        free: list[Range] = []
        start = used.find(0)
        while start >= 0:
            stop = used.find(1, start)
            stop = len(used) if stop < 0 else stop
            free.append((start * unit, (stop - start) * unit))
            start = used.find(0, stop)
        return free

    # -- small steps -------------------------------------------------------------------

    def _rename(self, name: str) -> None:
        if self.name != name:
            self.folder.rename(self.name, name)
            self.name = name

    def _put(self, side: SideFile) -> None:
        self.folder.put(*side, self.journal.temporary, like=self.file.status())

    def _remove(self, side: SideFile) -> None:
        if side.name == self.name:
            return  # gone already: the image has its name
        content = self.folder.read(side.name, len(side.content))
        if content == side.content:
            self.folder.remove(side.name)
        elif content is not None:
            log.warning("%s: was changed, and stays", self.folder.path_of(side.name))

    def _pread(self, offset: int, length: int) -> bytes:
        with named_errors(self.path):
            return os.pread(self.file.fd, length, offset)

    def _digest(self, ranges: Iterable[Range]) -> str | None:
        """Return the SHA-256 of ranges; None if the file ends before them."""
        digest = hashlib.sha256()
        nbytes = self.file.nbytes
        for offset, length in ranges:
            if offset + length > nbytes:
                return None
            for start in range(offset, offset + length, MIB):
                digest.update(self._pread(start, min(MIB, offset + length - start)))
        return digest.hexdigest()

    def close(self) -> None:
        """Close all of it."""
        self.journal.close()
        self.file.close()
        self.folder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        end_lease(self.file.fd)
        self.close()


def _cut(blob: bytes, ranges: Iterable[Sequence[int]]) -> Iterator[tuple[int, bytes]]:
    """Yield the offset and the bytes of each range; the bytes follow one another."""
    position = 0
    for offset, length in ranges:
        yield offset, blob[position : position + length]
        position += length


def _ranges_of(value: Any) -> list[Range]:
    """Return the ranges in a record; ValueError or TypeError if there are others."""
    ranges = [(int(offset), int(length)) for offset, length in value]
    if any(offset < 0 or length <= 0 for offset, length in ranges):
        raise ValueError(value)
    return ranges


def _begin_of(journal: Journal) -> Begin:
    """Return what the first record says, once it is verified."""
    try:
        head, blob = journal.records["begin"]
        ranges, size = _ranges_of(head["ranges"]), int(head["size"])
        position = sum(length for _, length in ranges)
        sides: dict[str, list[SideFile]] = {"created": [], "removed": []}
        for kind, files in sides.items():
            for name, nbytes, mode in head[kind]:
                files.append(SideFile(name, blob[position : position + nbytes], mode & 0o777))
                position += nbytes
        begin = Begin(
            inode=head["inode"],
            size=size,
            mtime_ns=int(head["mtime_ns"]),
            name=head["name"],
            new_name=head["new_name"],
            ranges=ranges,
            job=Facts(journal, dict(head["job"])),
            **sides,
        )
        names = [begin.name, begin.new_name, *(s.name for s in (*begin.created, *begin.removed))]
        is_sound = (
            position == len(blob)
            and all(offset + length <= size for offset, length in ranges)
            and all(_is_entry(name) for name in names)
        )
    except (KeyError, TypeError, ValueError):
        is_sound = False
    if not is_sound:
        raise journal.damaged("the record at its start contradicts itself")
    return begin


def _is_entry(name: str) -> bool:
    """Tell whether a name can be that of a file in the image's folder."""
    return name == os.path.basename(name) and name not in ("", ".", "..") and "\0" not in name


def open_alone(folder: Folder, name: str) -> TargetFile:
    """Open an image for writing that nobody else has open, and lock it.

    Raises
    ------
    TargetError
        It is no regular file with one name, or it is read-only or in use.
    OSError
        The system cannot open it.
    """
    path = folder.path_of(name)
    status = folder.find(name)
    if status is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    if not stat.S_ISREG(status.st_mode):
        kind = describe_file_type(status.st_mode)
        raise TargetError(f"is {kind}, not a regular file: it cannot be rewritten", path=path)
    if status.st_nlink > 1:
        raise TargetError(
            f"has {status.st_nlink} names (hard links), and all of them would change", path=path
        )
    if not status.st_mode & 0o222:
        raise TargetError("is read-only; chmod u+w permits rewriting it", path=path)
    try:
        with forks_held_back():
            file = TargetFile(folder.open(name, os.O_RDWR), path)
    except PermissionError as error:
        if error.errno != errno.EPERM:
            raise
        text = f"is immutable or append-only; chattr -i -a {path} permits rewriting it"
        raise TargetError(text, path=path) from None
    try:
        if file_identity(file.status()) != file_identity(status):
            raise TargetError("was replaced while it was opened", path=path)
        lock_image(file.fd, path)
        if not lease(file.fd, path):
            log.warning("%s: this file system cannot tell whether others have it open", path)
    except BaseException:
        file.close()
        raise
    return file


def find_journal(folder: Folder, name: str) -> Journal | None:
    """Open the journal of an image, which may have another name yet, or already.

    ``name`` may also be a file that is created or removed with the image.
    """
    journal = Journal.open(folder, name + SUFFIX)
    if journal is not None:
        return journal
    status = folder.find(name)
    for entry in folder.names():
        if not entry.endswith(SUFFIX) or (head := first_head(folder, entry)) is None:
            continue
        inode, sides = head.get("inode"), (head.get("created"), head.get("removed"))
        is_image = name in (head.get("name"), head.get("new_name"))
        is_side = any(_is_among(name, side) for side in sides)
        if is_side or (is_image and (status is None or inode in (None, status.st_ino))):
            return Journal.open(folder, entry)
    return None


def _is_among(name: str, sides: Any) -> bool:
    """Tell whether a file is among those of a record, which is not verified."""
    return isinstance(sides, list) and any(isinstance(s, list) and s[:1] == [name] for s in sides)


def open_job(path: str | os.PathLike[str]) -> Job | None:
    """Open an image with its journal, for going on or back; None without a journal."""
    parent, name = os.path.split(os.fspath(path))
    folder = Folder(parent)
    try:
        journal = find_journal(folder, name)
        if journal is None:
            folder.close()
            return None
        try:
            return _open_image(folder, journal)
        except BaseException:
            journal.close()
            raise
    except BaseException:
        folder.close()
        raise


def _open_image(folder: Folder, journal: Journal) -> Job:
    """Open the image that a journal belongs to, under its old or its new name."""
    begin = _begin_of(journal)
    names = dict.fromkeys((begin.name, begin.new_name))
    found = {name: status for name in names if (status := folder.find(name)) is not None}
    own = [name for name in found if begin.inode in (None, found[name].st_ino)]
    if not own:
        what = f"{' or '.join(names)} with inode {begin.inode}"
        there = ", ".join(f"{name} has inode {found[name].st_ino}" for name in found)
        raise TargetError(
            f"is the journal of another file: of {what}; {there or 'no file has that name'}",
            path=journal.path,
        )
    image = found[own[0]]
    owner = os.fstat(journal.fd).st_uid
    if owner not in (os.geteuid(), image.st_uid):
        raise TargetError(f"belongs to user {owner}: it is not followed", path=journal.path)
    file = open_alone(folder, own[0])
    try:
        journal.sync()
        return Job(folder, journal, file, own[0])
    except BaseException:
        file.close()
        raise
