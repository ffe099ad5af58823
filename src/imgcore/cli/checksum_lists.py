"""Lists of checksums, a line for each file, in the form of ``sha256sum``.

A line is the digest, a space, a space or ``*``, and the name.  If the name has a
backslash or an end of a line in it, these are escaped, and the line begins with a
backslash.

Source: GNU Coreutils manual, "md5sum invocation".
"""

from __future__ import annotations

import codecs
import errno
import os
import re
import sys
from typing import IO, TYPE_CHECKING, Final, NamedTuple

import click

from imgcore.files.descriptors import named_errors
from imgcore.limits import MAX_CHECKSUM_LINE_NBYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

_LINE: Final = re.compile(rb"(\\?)([0-9a-fA-F]{64}) [ *]([^\0]+)", re.DOTALL)
_ESCAPES: Final = {b"\\": b"\\\\", b"\n": b"\\n", b"\r": b"\\r"}
_ESCAPED: Final = {escape: char for char, escape in _ESCAPES.items()}


class Entry(NamedTuple):
    """One line of a list: the file's name, and its digest in hexadecimal."""

    name: str
    hexdigest: str


def print_entry(hexdigest: str, name: str, *, on_stderr: bool = False) -> None:
    """Print one line of a list."""
    escaped, lead = _escaped(name)
    print_bytes(lead + hexdigest.encode() + b"  " + escaped, on_stderr=on_stderr)


def print_status(name: str, status: str) -> None:
    """Print a file's name and whether its digest is the one of the list."""
    escaped, lead = _escaped(name)
    print_bytes(lead + escaped + b": " + status.encode())


def print_bytes(line: bytes, *, on_stderr: bool = False) -> None:
    """Print a line, in which a name need not be UTF-8."""
    with named_errors("stderr" if on_stderr else "stdout"):
        click.echo(line, err=on_stderr)


def _escaped(name: str) -> tuple[bytes, bytes]:
    """Return a name as it appears in a line, and what the line begins with."""
    raw = os.fsencode(name)
    escaped = re.sub(rb"[\\\n\r]", lambda found: _ESCAPES[found[0]], raw)
    return escaped, b"" if escaped == raw else b"\\"


def read_list(path: str) -> Iterator[Entry | None]:
    """Yield the entries of a list, None for a line that is not one; ``-`` is stdin.

    Empty lines, those that begin with ``#``, and a byte order mark are skipped.
    """
    if path == "-":
        if sys.stdin is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF), "stdin")
        with named_errors("stdin"):
            yield from _entries(sys.stdin.buffer)
        return
    with named_errors(path), open(path, "rb") as file:
        yield from _entries(file)


def _entries(file: IO[bytes]) -> Iterator[Entry | None]:
    mark = codecs.BOM_UTF8
    while line := file.readline(MAX_CHECKSUM_LINE_NBYTES):
        is_whole = line.endswith(b"\n") or len(line) < MAX_CHECKSUM_LINE_NBYTES
        while not is_whole:
            rest = file.readline(MAX_CHECKSUM_LINE_NBYTES)
            is_whole = rest.endswith(b"\n") or not rest
            line = b"?"
        text = line.removeprefix(mark).rstrip(b"\r\n")
        mark = b""  # only the first line may have it
        if text and not text.startswith(b"#"):
            yield _entry(text)


def _entry(line: bytes) -> Entry | None:
    found = _LINE.fullmatch(line)
    if found is None:
        return None
    lead, digest, name = found.groups()
    if lead:
        parts = re.findall(rb"\\[\\nr]|[^\\]+", name)
        if b"".join(parts) != name:
            return None
        name = b"".join(_ESCAPED.get(part, part) for part in parts)
    return Entry(os.fsdecode(name), digest.decode().lower())
