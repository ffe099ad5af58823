"""``imgcore flatten``."""

from __future__ import annotations

import os
from typing import Any

import click

from imgcore.cli.common import (
    open_options,
    output_options,
    quiet_option,
    rate_option,
    threads_option,
    verb,
)
from imgcore.cli.progress import progress_options, reporter
from imgcore.text import one_line


@verb("flatten")
@open_options("format", "backing_format", "parent", "read_options", "allow", of="IMAGE")
@rate_option()
@threads_option()
@progress_options
@quiet_option()
@output_options
@click.argument("image")
def command(
    image: str,
    threads: int | None,
    rate: int | None,
    opening: dict[str, Any],
    progress_mode: str,
    wants_progress: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Copy what IMAGE has from its backing files into it, and remove the link to them.

    The disk reads the same afterwards. If it fails, IMAGE reads as before: run it
    again.
    """
    from imgcore.verbs.flatten import flatten

    label = one_line(os.path.basename(image))
    with reporter(
        progress_mode, wanted=wants_progress, quiet=quiet, label=label, as_json=as_json, rate=rate
    ) as report:
        result = flatten(
            image, threads=threads, progress=report.callback, control=report.control, **opening
        )
    if as_json:
        import json

        click.echo(json.dumps(result._asdict()))
    elif not quiet:
        click.echo("Image flattened.")
