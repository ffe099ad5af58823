"""``imgcore map``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import click

from imgcore.cli.common import (
    allow_option,
    backing_format_option,
    format_option,
    output_options,
    parent_option,
    read_options_option,
    share_option,
    size_value,
    verb,
)
from imgcore.text import one_line

if TYPE_CHECKING:
    from imgcore.verbs.map import MapEntry


@verb("map")
@format_option()
@click.option(
    "--start-offset", callback=size_value, default="0", metavar="OFFSET", help="Where to start."
)
@click.option("--max-length", callback=size_value, metavar="LENGTH", help="How much to map.")
@backing_format_option()
@parent_option()
@read_options_option("-o", "--read-options")
@share_option()
@allow_option()
@output_options
@click.argument("file")
def command(
    file: str,
    format: str | None,
    start_offset: int,
    max_length: int | None,
    backing_format: str | None,
    parent: str | None,
    read_options: tuple[str, ...],
    share: bool,
    allow: tuple[str, ...],
    as_json: bool,
) -> None:
    """List where each part of the disk in the image FILE is stored, backing files included.

    The table shows stored data only, the JSON form everything.
    """
    from imgcore.verbs.map import map

    entries = map(
        file,
        format=format,
        start=start_offset,
        length=max_length,
        backing_format=backing_format,
        parent=parent,
        read_options=read_options,
        allow=allow,
        share=share,
    )
    lines = _json_lines(entries) if as_json else _table_lines(entries)
    sys.stdout.writelines(lines)


def _json_lines(entries: Iterable[MapEntry]) -> Iterator[str]:
    """Yield the array row by row, in qemu-img's layout, without holding it."""
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
