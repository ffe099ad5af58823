"""``imgcore resize``."""

from __future__ import annotations

import re
from typing import Any, Final

import click

from imgcore.cli.common import Verb, open_options, output_options, quiet_option, verb

# Stands for the minus of a size, which would be taken for an option.
_MINUS: Final = "\N{MINUS SIGN}"


class _Resize(Verb):
    """A verb whose last argument may start with a minus."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(
            ctx, [_MINUS + arg[1:] if re.match(r"-\d", arg) else arg for arg in args]
        )


@verb("resize", _Resize)
@click.option(
    "--shrink", is_flag=True, help="Let the disk become smaller, which loses what is at its end."
)
@open_options("format", "backing_format", "parent", "read_options", "allow", of="IMAGE")
@quiet_option()
@output_options
@click.argument("image")
@click.argument("size", metavar="[+|-]SIZE")
def command(
    image: str, size: str, shrink: bool, opening: dict[str, Any], quiet: bool, as_json: bool
) -> None:
    """Make the disk in IMAGE SIZE bytes large, or SIZE bytes larger or smaller.

    What is new reads as zeros. Partitions and file systems in the disk stay as they
    are.
    """
    from imgcore.verbs.resize import resize

    result = resize(image, size.replace(_MINUS, "-", 1), shrink=shrink, **opening)
    if as_json:
        import json

        click.echo(json.dumps(result._asdict()))
    elif not quiet:
        click.echo("Image resized.")
