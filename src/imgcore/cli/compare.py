"""``imgcore compare``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import click

from imgcore.cli.common import (
    cache_option,
    open_options,
    output_options,
    print_json,
    quiet_option,
    threads_option,
    verb,
)
from imgcore.cli.progress import progress_options, reporter

if TYPE_CHECKING:
    from imgcore.verbs.compare import CompareResult

EXIT_DIFFERENT: Final = 1


@verb("compare")
@open_options(
    "format",
    "parent",
    "read_options",
    of="A",
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
    of="B",
    flags={
        "format": ("-F", "--b-format", "--format-b"),
        "parent": ("--parent-b",),
        "read_options": ("--read-options-b",),
    },
)
@open_options("backing_format", "share", "allow", of="A and B")
@click.option("-s", "--strict", is_flag=True, help="Require equal sizes and equal allocation, too.")
@cache_option("-T", "--cache")
@threads_option()
@progress_options
@quiet_option()
@output_options
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
def command(
    a: str,
    b: str,
    strict: bool,
    threads: int | None,
    opening: dict[str, Any],
    progress_mode: str,
    wants_progress: bool,
    quiet: bool,
    as_json: bool,
) -> int:
    """Compare what a guest would read from the images A and B.

    Zeros at the end of the larger image are ignored unless -s is given.

    Exit code: 0 identical, 1 different, 2 failed or wrong usage.
    """
    from imgcore.verbs.compare import compare

    with reporter(
        progress_mode, wanted=wants_progress, quiet=quiet, label="compare", as_json=as_json
    ) as report:
        result = compare(
            a,
            b,
            strict=strict,
            threads=threads,
            progress=report.callback,
            **opening,
        )
    if as_json:
        print_json(result._asdict())
    elif not quiet:
        _print_human(result, strict)
    return 0 if result.identical else EXIT_DIFFERENT


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
