"""``imgcore rebase``."""

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


@verb("rebase")
@open_options(
    "format",
    "backing_format",
    "parent",
    "read_options",
    "allow",
    of="IMAGE",
    flags={"backing_format": ("--source-backing-format",)},
)
@click.option(
    "-b",
    "--backing",
    required=True,
    metavar="FILE",
    help="The new backing file; relative names start at the folder of IMAGE. '' is none.",
)
@click.option("-F", "-B", "--backing-format", metavar="FMT", help="Format of the new backing file.")
@click.option(
    "-u",
    "--backing-unsafe",
    "unsafe",
    is_flag=True,
    help="Only change the link, for a backing file that was moved or renamed. With another "
    "content, IMAGE reads wrong data.",
)
@cache_option("-t", "--cache")
@cache_option("-T", "--backing-cache")
@rate_option()
@threads_option()
@progress_options
@quiet_option()
@output_options
@click.argument("image")
def command(
    image: str,
    backing: str,
    backing_format: str | None,
    unsafe: bool,
    threads: int | None,
    rate: int | None,
    opening: dict[str, Any],
    progress_mode: str,
    wants_progress: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Give IMAGE another backing file, in place.

    The disk reads the same afterwards: what differs between the old and the new backing
    file is first copied into IMAGE. If it fails, IMAGE reads as before: run it again.
    """
    from imgcore.verbs.rebase import rebase

    label = one_line(os.path.basename(image))
    with reporter(
        progress_mode, wanted=wants_progress, quiet=quiet, label=label, as_json=as_json, rate=rate
    ) as report:
        result = rebase(
            image,
            backing=backing or None,
            backing_format=backing_format,
            unsafe=unsafe,
            threads=threads,
            progress=report.callback,
            control=report.control,
            **opening,
        )
    if as_json:
        import json

        click.echo(json.dumps(result._asdict()))
    elif not quiet:
        click.echo("Image rebased.")
