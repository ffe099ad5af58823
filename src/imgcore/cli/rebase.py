"""``imgcore rebase``."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from imgcore.cli.common import cache_option, update_options, verb
from imgcore.cli.copying import Copying, copying_options


@verb("rebase")
@update_options("IMAGE", flags={"backing_format": ("--source-backing-format",)})
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
@copying_options
@click.argument("image")
def command(
    image: str,
    backing: str,
    backing_format: str | None,
    unsafe: bool,
    opening: dict[str, Any],
    copying: Copying,
) -> None:
    """Give IMAGE another backing file, in place.

    The disk reads the same afterwards: what differs between the old and the new backing
    file is first copied into IMAGE. If it fails, IMAGE reads as before: run it again.
    """
    from imgcore.verbs.rebase import rebase

    work = partial(
        rebase,
        image,
        backing=backing or None,
        backing_format=backing_format,
        unsafe=unsafe,
        **opening,
    )
    copying.tell(copying.run(image, work), "Image rebased.")
