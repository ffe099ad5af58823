"""``imgcore flatten``."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from imgcore.cli.common import update_options, verb
from imgcore.cli.copying import Copying, copying_options


@verb("flatten")
@update_options("IMAGE")
@copying_options
@click.argument("image")
def command(image: str, opening: dict[str, Any], copying: Copying) -> None:
    """Copy what IMAGE has from its backing files into it, and remove the link to them.

    The disk reads the same afterwards. If it fails, IMAGE reads as before: run it
    again.
    """
    from imgcore.verbs.flatten import flatten

    result = copying.run(image, partial(flatten, image, **opening))
    copying.tell(result, "Image flattened.")
