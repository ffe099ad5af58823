"""``imgcore map``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click

from imgcore.cli.common import (
    open_options,
    output_options,
    size_value,
    verb,
)
from imgcore.text import one_line

if TYPE_CHECKING:
    from imgcore.verbs.map import MapEntry


@verb("map")
@open_options(flags={"read_options": ("-o", "--read-options")})
@click.option(
    "-s",
    "--start-offset",
    callback=size_value,
    default="0",
    metavar="OFFSET",
    help="First byte to map.",
)
@click.option(
    "-l", "--max-length", callback=size_value, metavar="LENGTH", help="Number of bytes to map."
)
@output_options
@click.argument("file")
def command(
    file: str,
    start_offset: int,
    max_length: int | None,
    opening: dict[str, Any],
    as_json: bool,
) -> None:
    """List where each part of the disk in the image FILE is stored.

    Backing files are included.  The table lists only stored data; JSON output also
    lists holes and zeros.
    """
    from imgcore.verbs.map import StartPastEndError, map

    entries = map(
        file,
        start=start_offset,
        length=max_length,
        **opening,
    )
    lines = _json_lines if as_json else _table_lines
    try:
        sys.stdout.writelines(lines(entries))
    except StartPastEndError:  # qemu-img lists nothing
        sys.stdout.writelines(lines(()))


def _json_lines(entries: Iterable[MapEntry]) -> Iterator[str]:
    """Yield the JSON array row by row, in the layout of qemu-img."""
    words = {False: "false", True: "true"}
    lead = "["
    for entry in entries:
        offset = "" if entry.offset is None else f', "offset": {entry.offset}'
        yield (
            f'{lead}{{ "start": {entry.start}, "length": {entry.length}, "depth": {entry.depth},'
            f' "present": {words[entry.present]}, "zero": {words[entry.zero]},'
            f' "data": {words[entry.data]}, "compressed": {words[entry.compressed]}{offset}}}'
        )
        lead = ",\n"
    yield "[]\n" if lead == "[" else "]\n"


def _table_lines(entries: Iterable[MapEntry]) -> Iterator[str]:
    header = f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File\n"
    for entry in entries:
        if header:
            yield header
            header = ""
        if not entry.data or entry.zero:
            continue
        place = "compressed" if entry.offset is None else _hex(entry.offset)
        name = one_line(entry.filename or "")
        yield f"{_hex(entry.start):<16}{_hex(entry.length):<16}{place:<16}{name}\n"
    yield header


def _hex(value: int) -> str:
    return f"{value:#x}" if value else "0"
