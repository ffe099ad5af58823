"""``imgcore diff``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

import click

from imgcore.areas.qemu_map import map_lines
from imgcore.cli.area_lines import Counted, area_lines
from imgcore.cli.common import (
    open_options_of_two,
    output_options,
    quiet_option,
    rate_option,
    size_value,
    threads_option,
    verb,
)
from imgcore.cli.progress import progress_options, reporter
from imgcore.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from imgcore.areas.area import Area
    from imgcore.disk.image import Image
    from imgcore.disk.open_options import OpenOptions

EXIT_DIFFERENT: Final = 1

# The keywords that each of two images has.
_OF_EACH: Final = ("format", "parent", "read_options")


@verb("diff")
@click.option(
    "--since",
    metavar="OLD",
    help="An older image of the disk. If it is a backing file of IMAGE, what the layers above "
    "it state is listed, and no content is read; else the images are compared.",
)
@click.option("--bitmap", metavar="NAME", help="A persistent bitmap in IMAGE (qcow2).")
@click.option(
    "--areas",
    metavar="FILE",
    help="A list of changed areas that another program made; docs/changes.md has the kinds.",
)
@click.option("--tree", metavar="TREE", help="A checksum tree of an earlier state of the disk.")
@click.option(
    "--granularity",
    callback=size_value,
    default="64k",
    metavar="SIZE",
    help="Areas are listed in blocks of SIZE, a power of two; 64k by default.",
)
@open_options_of_two("A or IMAGE", "B or OLD", "all images")
@threads_option()
@rate_option()
@progress_options
@quiet_option()
@output_options
@click.option("--bmap", "as_bmap", is_flag=True, help="Print a block map of bmaptool (bmap 2.0).")
@click.argument("image", metavar="A|IMAGE")
@click.argument("b", metavar="[B]", required=False)
@click.pass_context
def command(
    ctx: click.Context,
    /,
    image: str,
    b: str | None,
    granularity: int,
    threads: int | None,
    opening: dict[str, Any],
    rate: int | None,
    progress_mode: str,
    wants_progress: bool,
    quiet: bool,
    as_json: bool,
    as_bmap: bool,
    **states: str | None,
) -> int:
    """List the areas in which the image B differs from A.

    With --since, --bitmap, --areas or --tree: list the areas of the disk in IMAGE that
    have changed since the earlier state that the option names.

    All areas are listed, with the end of the larger disk. What is stored nowhere, or in
    one place for both images, is not read.

    Exit code: 0 no changes, 1 changes, 2 failed or wrong usage.
    """
    earlier: dict[str, Any] = {name: value for name, value in states.items() if value is not None}
    if (b is None) != (len(earlier) == 1) or len(earlier) > 1:
        raise click.UsageError(
            "give two images, or one image and one of --since, --bitmap, --areas and --tree", ctx
        )
    if as_json and as_bmap:
        raise click.UsageError("--json and --bmap are two kinds of output", ctx)
    from imgcore.disk.image import open_image
    from imgcore.verbs.changes import changes, differences

    with reporter(
        progress_mode, wanted=wants_progress, quiet=quiet, label="diff", as_json=True, rate=rate
    ) as report:
        how = {
            "granularity": granularity,
            "threads": threads,
            "progress": report.callback,
            "control": report.control,
        }
        first, second = _options(opening, "_a"), _options(opening, "_b")
        with open_image(b or image, second if b else first) as disk:
            if b is not None:
                areas = differences(disk, image, first, **how)
            else:
                areas = changes(disk, **earlier, **_since(opening, earlier), **how)
            found = Counted(areas)
            if as_bmap:
                sys.stdout.write(_bmap(found, disk))
            elif as_json:
                sys.stdout.writelines(map_lines(found))
            elif not quiet:
                sys.stdout.writelines(area_lines(found))
            else:
                next(found, None)  # one is enough to know
    return EXIT_DIFFERENT if found.n_areas else 0


def _options(opening: Mapping[str, Any], suffix: str) -> OpenOptions:
    """Return how to open the first or the second image that is named."""
    from imgcore.disk.open_options import FLAGS, Flags, OpenOptions

    return OpenOptions.from_keywords(
        **{name: opening[name] for name in ("backing_format", "share", "allow")},
        **{name: opening[name + suffix] for name in _OF_EACH},
        flags=FLAGS if suffix == "_a" else Flags(format="-F", parent="--parent-b"),
    )


def _since(opening: Mapping[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords for the image of ``--since``."""
    if "since" in earlier:
        common = {name: opening[name] for name in ("backing_format", "share", "allow")}
        return common | {f"{name}_since": opening[f"{name}_b"] for name in _OF_EACH}
    if any(opening[f"{name}_b"] for name in _OF_EACH):
        raise OptionError("-F, --parent-b and --read-options-b are for a second image")
    return {}


def _bmap(areas: Iterable[Area], disk: Image) -> str:
    from imgcore.areas.bmap import bmap_of

    size = disk.virtual_size
    inside = (area for area in areas if area.offset < size)
    cut = (area._replace(length=min(area.length, size - area.offset)) for area in inside)
    return bmap_of(cut, disk, size)
