"""``imgcore commit``."""

from __future__ import annotations

import os
from typing import Any

import click

from imgcore.cli.common import (
    cache_option,
    open_options,
    output_options,
    quiet_option,
    rate_option,
    threads_option,
    verb,
)
from imgcore.cli.progress import progress_options, reporter
from imgcore.text import one_line


@verb("commit")
@open_options("format", "backing_format", "parent", "read_options", "allow", of="OVERLAY")
@click.option(
    "-b",
    "--base",
    metavar="FILE",
    help="A backing file deeper in the chain that gets the changes of all images above it; "
    "implies -d. The images between must not be used alone any more.",
)
@click.option("-d", "--drop", "keep", is_flag=True, help="Leave OVERLAY as it is afterwards.")
@click.option("--remove", is_flag=True, help="Remove OVERLAY afterwards, instead of emptying it.")
@cache_option("-t", "--cache")
@rate_option()
@threads_option()
@progress_options
@quiet_option()
@output_options
@click.argument("overlay")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    overlay: str,
    base: str | None,
    keep: bool,
    remove: bool,
    threads: int | None,
    rate: int | None,
    opening: dict[str, Any],
    progress_mode: str,
    wants_progress: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write what OVERLAY has into its backing file, and empty OVERLAY.

    OVERLAY reads the same afterwards. If it fails, it reads as before: run it again.
    """
    if remove and (keep or base is not None):
        raise click.UsageError("--remove contradicts -d and -b", ctx)
    from imgcore.verbs.commit import commit

    label = one_line(os.path.basename(overlay))
    with reporter(
        progress_mode, wanted=wants_progress, quiet=quiet, label=label, as_json=as_json, rate=rate
    ) as report:
        result = commit(
            overlay,
            base=base,
            empty=not keep,
            remove=remove,
            threads=threads,
            progress=report.callback,
            control=report.control,
            **opening,
        )
    if as_json:
        import json

        click.echo(json.dumps(result._asdict()))
    elif not quiet:
        click.echo("Image committed.")
