"""``imgcore resize``."""

from __future__ import annotations

import re
from typing import Any, Final

import click

from imgcore.cli.common import (
    Verb,
    output_options,
    print_result,
    quiet_option,
    update_options,
    verb,
)

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
@update_options("IMAGE")
@quiet_option()
@output_options
@click.argument("image")
@click.argument("size", metavar="[+|-]SIZE")
def command(
    image: str, size: str, shrink: bool, opening: dict[str, Any], quiet: bool, as_json: bool
) -> None:
    """Make the disk in IMAGE SIZE bytes large, or SIZE bytes larger or smaller.

    SIZE may end with K, M, G, T, P or E. What is new reads as zeros. Partitions and
    file systems in the disk stay as they are.
    """
    from imgcore.verbs.resize import resize

    result = resize(image, size.replace(_MINUS, "-", 1), shrink=shrink, **opening)
    print_result(result, "Image resized.", quiet=quiet, as_json=as_json)
