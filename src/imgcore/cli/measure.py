"""``imgcore measure``."""

from __future__ import annotations

from typing import Any

import click

from imgcore.cli.common import (
    open_options,
    options_option,
    output_options,
    print_json,
    print_options_help,
    size_value,
    target_driver,
    verb,
    wants_options_help,
)
from imgcore.formats.registry import PLAIN_FORMAT


@verb("measure")
@open_options()
@click.option(
    "-O",
    "--target-format",
    metavar="FMT",
    default=PLAIN_FORMAT,
    help=f"Format of the target; {PLAIN_FORMAT} by default.",
)
@options_option()
@click.option(
    "-c",
    "--compress",
    is_flag=True,
    help="Measure a compressed target; the sizes are upper bounds.",
)
@click.option(
    "-s",
    "--size",
    metavar="SIZE",
    callback=size_value,
    help="Measure an empty disk of this size instead of FILE.",
)
@click.option(
    "--reflink",
    is_flag=True,
    help="Print what convert --reflink=always would reflink and what it would copy.",
)
@output_options
@click.argument("file", required=False)
@click.pass_context
def command(
    ctx: click.Context,
    file: str | None,
    target_format: str,
    options: tuple[str, ...],
    compress: bool,
    size: int | None,
    reflink: bool,
    opening: dict[str, Any],
    as_json: bool,
) -> None:
    """Compute how large a target file would be.

    The source is the image FILE, or an empty disk of --size.
    """
    from imgcore.verbs.measure import measure, measure_reflink

    if wants_options_help(options):
        print_options_help(target_driver(target_format, None))
        return
    if (file is None) == (size is None):
        raise click.UsageError("give either FILE or --size", ctx)
    if reflink:
        if file is None or compress:
            raise click.UsageError("--reflink is about FILE, and allows no -c", ctx)
        shared = measure_reflink(file, target_format, options=options, **opening)
        if as_json:
            print_json(shared._asdict())
        else:
            click.echo(f"reflinked: {shared.reflinked}\ncopied: {shared.copied}")
        return
    result = measure(
        file,
        size=size,
        target_format=target_format,
        options=options,
        compress=compress,
        **opening,
    )
    if as_json:
        print_json({"required": result.required, "fully-allocated": result.fully_allocated})
    else:
        click.echo(f"required size: {result.required}")
        click.echo(f"fully allocated size: {result.fully_allocated}")
