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
    rate_option,
    size_value,
    target_driver,
    verb,
    wants_options_help,
)
from imgcore.cli.progress import Reporting, reporting_options
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
@click.option(
    "--rewrite",
    is_flag=True,
    help="Measure what imgcore rewrite would do to FILE: what stays, moves, and is written.",
)
@reporting_options(rate_option(text="Read at most so many bytes of tables a second."))
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
    rewrite: bool,
    opening: dict[str, Any],
    reporting: Reporting,
    as_json: bool,
) -> None:
    """Compute how large a target file would be.

    The source is the image FILE, or an empty disk of --size.
    """
    if wants_options_help(options):
        print_options_help(target_driver(target_format, None))
        return
    if (file is None) == (size is None):
        raise click.UsageError("give either FILE or --size", ctx)
    if reflink:
        if file is None or compress or rewrite:
            raise click.UsageError("--reflink measures FILE, without -c or --rewrite", ctx)
        _measure_reflink(file, target_format, options, opening, reporting, as_json=as_json)
        return
    if rewrite:
        _measure_rewrite(
            ctx,
            file,
            target_format,
            options,
            opening,
            reporting,
            compress=compress,
            as_json=as_json,
        )
        return
    from imgcore.verbs.measure import measure

    with reporting.begin(file or "", as_json=as_json) as report:
        result = measure(
            file,
            size=size,
            target_format=target_format,
            options=options,
            compress=compress,
            **report.keywords,
            **opening,
        )
    if as_json:
        print_json({"required": result.required, "fully-allocated": result.fully_allocated})
    else:
        click.echo(f"required size: {result.required}")
        click.echo(f"fully allocated size: {result.fully_allocated}")


def _measure_reflink(
    file: str,
    target_format: str,
    options: tuple[str, ...],
    opening: dict[str, Any],
    reporting: Reporting,
    *,
    as_json: bool,
) -> None:
    """Print what ``imgcore convert --reflink=always`` would do."""
    from imgcore.verbs.measure import measure_reflink

    with reporting.begin(file, as_json=as_json) as report:
        result = measure_reflink(file, target_format, options=options, **report.keywords, **opening)
    if as_json:
        print_json(result._asdict())
    else:
        click.echo(f"reflinked: {result.reflinked}")
        click.echo(f"copied: {result.copied}")


def _measure_rewrite(
    ctx: click.Context,
    file: str | None,
    target_format: str,
    options: tuple[str, ...],
    opening: dict[str, Any],
    reporting: Reporting,
    *,
    compress: bool,
    as_json: bool,
) -> None:
    """Print what `imgcore rewrite` would do, with different sizes of blocks."""
    from imgcore.verbs.measure import measure_rewrite

    if file is None:
        raise click.UsageError("--rewrite measures FILE, not --size", ctx)
    own = {name: opening.pop(name) for name in ("format", "allow", "share")}
    if compress or any(opening.values()):
        raise click.UsageError("--rewrite goes with -f, -O, -o, --allow and -U only", ctx)
    with reporting.begin(file, as_json=as_json) as report:
        result = measure_rewrite(file, target_format, options=options, **report.keywords, **own)
    if as_json:
        rows = [
            {name.replace("_", "-"): value for name, value in cost._asdict().items()}
            for cost in result.costs
        ]
        print_json(
            {
                "source-format": result.source_format,
                "target-format": result.target_format,
                "virtual-size": result.virtual_size,
                "costs": rows,
            }
        )
        return
    from imgcore.sizes import format_size

    click.echo(f"{'blocks':>10}{'stay':>12}{'move':>12}{'tables':>12}{'written':>12}")
    for cost in result.costs:
        sizes = (cost.bytes_stayed, cost.bytes_moved, cost.bytes_tables, cost.bytes_written)
        block = "none" if cost.block_size is None else format_size(cost.block_size)
        click.echo(f"{block:>10}" + "".join(f"{format_size(size):>12}" for size in sizes))
