"""``imgcore create``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from imgcore.cli.common import (
    open_options,
    options_option,
    output_options,
    plain_value,
    print_json,
    print_options_help,
    quiet_option,
    require,
    size_value,
    target_driver,
    verb,
    wants_options_help,
)
from imgcore.text import one_line


@verb("create")
@click.option(
    "-f", "--format", metavar="FMT", help="Format of FILE; taken from its suffix by default."
)
@options_option()
@click.option(
    "-b",
    "--backing",
    metavar="FILE",
    help="Backing file; a relative name starts at the folder of FILE.",
)
@click.option("-F", "-B", "--backing-format", metavar="FMT", help="Format of the backing file.")
@quiet_option()
@click.option("--force", is_flag=True, help="Replace an existing FILE.")
@click.option("--no-sync", is_flag=True, help="Do not wait until FILE is on stable storage.")
@open_options("allow", of="the backing file")
@output_options
@click.argument("file", required=False, metavar="FILE")
@click.argument("size", required=False, metavar="[SIZE]", callback=size_value)
@click.pass_context
def command(
    ctx: click.Context,
    file: str | None,
    size: int | None,
    format: str | None,
    options: tuple[str, ...],
    backing: str | None,
    backing_format: str | None,
    quiet: bool,
    force: bool,
    no_sync: bool,
    opening: dict[str, Any],
    as_json: bool,
) -> None:
    """Create the image FILE with a disk of SIZE bytes (suffixes k M G T P E).

    The disk is empty, or reads as its backing file, whose size is the default for SIZE.
    """
    if wants_options_help(options):
        print_options_help(target_driver(format, file, flag="-f"))
        return
    require(ctx, file=file)
    from imgcore.verbs.create import create

    result = create(
        file or "",
        size,
        format=format,
        options=options,
        backing=backing,
        backing_format=backing_format,
        force=force,
        sync=not no_sync,
        **opening,
    )
    if as_json:
        print_json(asdict(result))
    elif not quiet:
        words = [f"Formatting '{one_line(result.path)}', fmt={result.format}"]
        words.append(f"size={result.virtual_size}")
        if result.backing is not None:
            words.append(f"backing_file={one_line(result.backing)}")
            words.append(f"backing_fmt={result.backing_format}")
        words += [
            f"{name}={one_line(plain_value(value))}"
            for name, value in result.options.items()
            if value is not None
        ]
        click.echo(" ".join(words))
