"""``imgcore commit``."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from imgcore.cli.common import cache_option, update_options, verb
from imgcore.cli.copying import Copying, copying_options


@verb("commit")
@update_options("OVERLAY")
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
@copying_options
@click.argument("overlay")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    overlay: str,
    base: str | None,
    keep: bool,
    remove: bool,
    opening: dict[str, Any],
    copying: Copying,
) -> None:
    """Write what OVERLAY has into its backing file, and empty OVERLAY.

    OVERLAY reads the same afterwards. If it fails, it reads as before: run it again.
    """
    if remove and (keep or base is not None):
        raise click.UsageError("--remove contradicts -d and -b", ctx)
    from imgcore.verbs.commit import commit

    result = copying.run(
        overlay,
        partial(commit, overlay, base=base, empty=not keep, remove=remove, **opening),
    )
    copying.tell(result, "Image committed.")
