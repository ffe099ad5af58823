"""``imgcore sync``."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import click

from imgcore.checksums.digest import ALGORITHMS
from imgcore.cli.checksum_lists import print_entry
from imgcore.cli.common import open_options_of_two, verb
from imgcore.cli.copying import Copying, copying_options
from imgcore.text import one_line

if TYPE_CHECKING:
    from imgcore.verbs.sync import SyncResult


@verb("sync")
@click.option(
    "--areas",
    metavar="FILE",
    help="A list of changed areas that another program made; docs/changes.md has the kinds.",
)
@click.option("--bitmap", metavar="NAME", help="A persistent bitmap in SOURCE (qcow2).")
@click.option(
    "--since",
    metavar="BASE",
    help="An older image of the disk, which has what TARGET has: a backing file of SOURCE, or "
    "another image, which is compared.",
)
@click.option(
    "--by-checksum",
    is_flag=True,
    help="Read SOURCE and TARGET, and compare them. This is the default.",
)
@click.option(
    "--tree",
    metavar="TREE",
    help="The checksum tree of TARGET from the last run: SOURCE is read and compared with it, "
    "unless another option states what has changed. It is replaced by the new tree.",
)
@click.option(
    "--checksum",
    is_flag=False,
    flag_value=ALGORITHMS[0],
    type=click.Choice(ALGORITHMS),
    help=f"Print a digest of SOURCE's disk, as `imgcore checksum` does; {ALGORITHMS[0]} unless "
    "stated with =. Without --tree, all of SOURCE is read for it.",
)
@click.option("--resize", is_flag=True, help="Let TARGET grow to the size of SOURCE's disk.")
@open_options_of_two("SOURCE", "TARGET", "all images")
@copying_options
@click.argument("source")
@click.argument("target")
def command(
    source: str,
    target: str,
    opening: dict[str, Any],
    copying: Copying,
    **settings: Any,
) -> None:
    """Make the disk in the existing image TARGET equal to that in SOURCE, in place.

    Only what has changed is read and written. TARGET may have any format that is
    written in place. At most one of --areas, --bitmap, --since and --by-checksum states
    what has changed.

    If it fails, TARGET is a sound image with some of the changes: run it again.
    """
    from imgcore.verbs.sync import sync

    result = copying.run(target, partial(sync, source, target, **settings, **_keywords(opening)))
    if copying.as_json:
        import json

        digest = None if result.checksum is None else result.checksum.as_dict()
        click.echo(json.dumps(result._asdict() | {"checksum": digest}))
    elif copying.quiet:
        return
    elif settings["checksum"] is not None and result.checksum is not None:
        print_entry(result.checksum.hexdigest, target)
    else:
        _print(result)


def _keywords(opening: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords of `imgcore.sync` for the options of two images."""
    keywords = {}
    for name, value in opening.items():
        if name.endswith("_b"):
            keywords[f"target_{name.removesuffix('_b')}"] = value
        else:
            keywords[name.removesuffix("_a")] = value
    return keywords


def _print(result: SyncResult) -> None:
    from imgcore.sizes import format_size

    areas = "1 area" if result.areas == 1 else f"{result.areas} areas"
    click.echo(
        f"{one_line(result.target)}: {areas}, {format_size(result.bytes_read)} read, "
        f"{format_size(result.bytes_written)} written, {format_size(result.bytes_zeroed)} zeroed"
    )
