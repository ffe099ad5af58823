"""``imgcore compare``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

import click

from imgcore.areas.qemu_map import map_lines
from imgcore.cli.area_lines import Counted, area_lines
from imgcore.cli.common import (
    cache_option,
    open_options_of_two,
    output_options,
    print_json,
    quiet_option,
    rate_option,
    threads_option,
    verb,
)
from imgcore.cli.progress import progress_options, reporter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imgcore.areas.area import Area
    from imgcore.verbs.compare import CompareResult

EXIT_DIFFERENT: Final = 1


@verb("compare")
@open_options_of_two("A", "B", "A and B")
@click.option("-s", "--strict", is_flag=True, help="Require equal sizes and equal allocation, too.")
@click.option(
    "--tree",
    "by_tree",
    is_flag=True,
    help="A and B are checksum trees, or one of them is: list all blocks that differ.",
)
@cache_option("-T", "--cache")
@threads_option()
@rate_option()
@progress_options
@quiet_option()
@output_options
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
def command(
    a: str,
    b: str,
    strict: bool,
    by_tree: bool,
    threads: int | None,
    opening: dict[str, Any],
    rate: int | None,
    progress_mode: str,
    wants_progress: bool,
    quiet: bool,
    as_json: bool,
) -> int:
    """Compare what a guest would read from the images A and B.

    Zeros at the end of the larger image are ignored unless -s is given.

    With --tree, one of them is a tree that `imgcore checksum --tree` has written, and
    the other an image, for which -f, --parent and --read-options are; or both are
    trees.

    Exit code: 0 identical, 1 different, 2 failed or wrong usage.
    """
    from imgcore.verbs.compare import compare, compare_trees

    show = reporter(
        progress_mode,
        wanted=wants_progress,
        quiet=quiet,
        label="compare",
        as_json=as_json,
        rate=rate,
    )
    if by_tree:
        if strict:
            raise click.UsageError("--strict compares images, and --tree a tree")
        keywords = _of_one_image(opening)
        with show as report:
            areas = compare_trees(
                a, b, threads=threads, progress=report.callback, control=report.control, **keywords
            )
            return _print_areas(areas, as_json=as_json, quiet=quiet)
    with show as report:
        result = compare(
            a,
            b,
            strict=strict,
            threads=threads,
            progress=report.callback,
            control=report.control,
            **opening,
        )
    if as_json:
        print_json(result._asdict())
    elif not quiet:
        _print_human(result, strict)
    return 0 if result.identical else EXIT_DIFFERENT


def _of_one_image(opening: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords for the only image; those for B have no meaning."""
    for keyword, value in opening.items():
        if keyword.endswith("_b") and value:
            flag = keyword.replace("_", "-")
            raise click.UsageError(f"--{flag}: with --tree, A's options are for the image")
    return {
        keyword.removesuffix("_a"): value
        for keyword, value in opening.items()
        if not keyword.endswith("_b")
    }


def _print_areas(areas: Iterator[Area], *, as_json: bool, quiet: bool) -> int:
    """Print the areas that differ, and return the exit code."""
    found = Counted(areas)
    if quiet and not as_json:
        next(found, None)  # one is enough to know
    else:
        sys.stdout.writelines(map_lines(found) if as_json else area_lines(found))
    if not found.n_areas and not quiet and not as_json:
        click.echo("Disks are identical.")
    return EXIT_DIFFERENT if found.n_areas else 0


def _print_human(result: CompareResult, strict: bool) -> None:
    """Print the result as qemu-img does, which compares the sizes last."""
    common = min(result.size_a, result.size_b)
    difference = result.first_difference
    if (
        result.size_a != result.size_b
        and not strict
        and (difference is None or difference >= common)
    ):
        click.echo("Warning: Image size mismatch!")
    click.echo("Images are identical." if result.identical else result.reason)
