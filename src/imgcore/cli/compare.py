"""``imgcore compare``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

from imgcore.cli.common import (
    allow_option,
    backing_format_option,
    format_option,
    output_options,
    parent_option,
    print_json,
    quiet_option,
    read_options_option,
    share_option,
    threads_option,
    verb,
)
from imgcore.cli.progress import progress_options, reporter

if TYPE_CHECKING:
    from imgcore.verbs.compare import CompareResult

EXIT_DIFFERENT: Final = 1
EXIT_FAILED: Final = 2


@verb("compare")
@format_option("-f", "--format-a", of="A")
@format_option("-F", "--format-b", of="B")
@click.option("-s", "--strict", is_flag=True, help="Sizes and allocation must agree as well.")
@backing_format_option()
@parent_option("--parent", "--parent-a", "parent_a", of="A")
@parent_option("--parent-b", of="B")
@read_options_option("--read-options", "--read-options-a", "read_options_a", of="A")
@read_options_option("--read-options-b", of="B")
@share_option()
@allow_option()
@threads_option()
@progress_options
@quiet_option()
@output_options
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
def command(
    a: str,
    b: str,
    format_a: str | None,
    format_b: str | None,
    strict: bool,
    parent_a: str | None,
    parent_b: str | None,
    read_options_a: tuple[str, ...],
    read_options_b: tuple[str, ...],
    backing_format: str | None,
    share: bool,
    allow: tuple[str, ...],
    threads: int | None,
    progress_mode: str,
    wants_progress: bool,
    quiet: bool,
    as_json: bool,
) -> int:
    """Compare what a guest would read from the images A and B.

    Exit code: 0 identical, 1 different, 2 an error. Without -s, zeros at the end of the
    larger image make no difference.
    """
    from imgcore.verbs.compare import compare

    with reporter(progress_mode, wanted=wants_progress, quiet=quiet, label="compare") as report:
        result = compare(
            a,
            b,
            format_a=format_a,
            format_b=format_b,
            parent_a=parent_a,
            parent_b=parent_b,
            read_options_a=read_options_a,
            read_options_b=read_options_b,
            strict=strict,
            threads=threads,
            allow=allow,
            backing_format=backing_format,
            share=share,
            progress=report.callback,
        )
    if as_json:
        print_json(result._asdict())
    elif not quiet:
        _print_human(result, strict)
    return 0 if result.identical else EXIT_DIFFERENT


def _print_human(result: CompareResult, strict: bool) -> None:
    """Print what qemu-img would; it looks at sizes once what both disks have is the same."""
    common = min(result.size_a, result.size_b)
    difference = result.first_difference
    if (
        result.size_a != result.size_b
        and not strict
        and (difference is None or difference >= common)
    ):
        click.echo("Warning: Image size mismatch!")
    click.echo("Images are identical." if result.identical else result.reason)
