"""``imgcore diff``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

import click

from imgcore.areas.qemu_map import map_lines
from imgcore.cli.common import (
    open_options,
    output_options,
    quiet_option,
    size_value,
    threads_option,
    verb,
)
from imgcore.cli.progress import progress_options, reporter
from imgcore.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from imgcore.areas.area import Area

EXIT_DIFFERENT: Final = 1


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
@open_options(
    "format",
    "parent",
    "read_options",
    of="A or IMAGE",
    flags={
        "format": ("-f", "--a-format", "--format-a"),
        "parent": ("--parent", "--parent-a"),
        "read_options": ("--read-options", "--read-options-a"),
    },
)
@open_options(
    "format",
    "parent",
    "read_options",
    of="B or OLD",
    flags={
        "format": ("-F", "--b-format", "--format-b"),
        "parent": ("--parent-b",),
        "read_options": ("--read-options-b",),
    },
)
@open_options("backing_format", "share", "allow", of="all images")
@threads_option()
@progress_options
@quiet_option()
@output_options
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
    progress_mode: str,
    wants_progress: bool,
    quiet: bool,
    as_json: bool,
    **states: str | None,
) -> int:
    """List the areas in which the image B differs from A.

    With --since, --bitmap, --areas or --tree: list the areas of the disk in IMAGE that
    have changed since the earlier state that the option names.

    All areas are listed, with the end of the larger disk. What is stored nowhere, or in
    one place for both images, is not read.

    Exit code: 0 no changes, 1 changes, 2 failed or wrong usage.
    """
    earlier = {name: value for name, value in states.items() if value is not None}
    if (b is None) != (len(earlier) == 1) or len(earlier) > 1:
        raise click.UsageError(
            "give two images, or one image and one of --since, --bitmap, --areas and --tree", ctx
        )
    with reporter(
        progress_mode, wanted=wants_progress, quiet=quiet, label="diff", as_json=True
    ) as report:
        how = {"granularity": granularity, "threads": threads, "progress": report.callback}
        found = _Counted(_areas(image, b, earlier, opening, how))
        if quiet and not as_json:
            next(found, None)  # one is enough to know
        else:
            sys.stdout.writelines(map_lines(found) if as_json else _table_lines(found))
    return EXIT_DIFFERENT if found.n_areas else 0


class _Counted:
    """Areas, and their number so far."""

    def __init__(self, areas: Iterator[Area]) -> None:
        self._areas = areas
        self.n_areas = 0

    def __iter__(self) -> Iterator[Area]:
        return self

    def __next__(self) -> Area:
        area = next(self._areas)
        self.n_areas += 1
        return area


def _areas(
    image: str,
    b: str | None,
    earlier: dict[str, Any],
    opening: dict[str, Any],
    how: dict[str, Any],
) -> Iterator[Area]:
    from imgcore.verbs.changes import changes, differences

    if b is not None:
        return differences(image, b, **opening, **how)
    keywords = {name.removesuffix("_a"): value for name, value in opening.items()}
    for name in ("format", "parent", "read_options"):
        value = keywords.pop(f"{name}_b")
        if "since" in earlier:
            keywords[f"{name}_since"] = value
        elif value:
            raise OptionError(f"the options of a second image are given, but there is none: {name}")
    keywords["parent"] = keywords["parent"] or None
    return changes(image, **earlier, **keywords, **how)


def _table_lines(areas: Iterable[Area]) -> Iterator[str]:
    header = f"{'Offset':<16}{'Length':<16}Content\n"
    for area in areas:
        content = "zeros" if area.is_zero else "data"
        yield f"{header}{area.offset:<#16x}{area.length:<#16x}{content}\n"
        header = ""
