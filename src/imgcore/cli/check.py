"""``imgcore check``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, Literal

import click

from imgcore.cli.common import (
    Verb,
    cache_option,
    open_options,
    output_options,
    print_json,
    quiet_option,
    rate_option,
    say,
    verb,
    with_qemu_names,
)
from imgcore.cli.progress import Reporting, reporting_options

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imgcore.verbs.check import CheckResult

# The exit codes of `qemu-img check`.
EXIT_CORRUPT: Final = 2
EXIT_LEAKS: Final = 3
EXIT_UNSUPPORTED: Final = 63


class _CheckCommand(Verb):
    """Makes the value of ``-r`` optional, without taking FILE for it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Give ``-r`` its default value where ``leaks`` or ``all`` does not follow."""
        return super().parse_args(ctx, list(_with_values(args)))


def _with_values(args: list[str]) -> Iterator[str]:
    for index, arg in enumerate(args):
        if arg == "--":
            yield from args[index:]
            return
        flags = re.fullmatch("-([pqU]*)r([pqU]*)", arg)
        if flags is not None and flags[2]:
            yield from (f"-{flags[1]}{flags[2]}", "--repair=all")
            continue
        yield arg
        takes_value = flags is not None or arg == "--repair"
        if takes_value and args[index + 1 : index + 2] not in (["leaks"], ["all"]):
            yield "all"


@verb("check", _CheckCommand)
@open_options("format", "backing_format", "parent", "share", "allow")
@quiet_option()
@cache_option("-T", "--cache")
@reporting_options(rate_option(short=False, text="Read at most so many bytes a second."))
@output_options
@click.option(
    "-r",
    "--repair",
    type=click.Choice(["leaks", "all"]),
    metavar="[leaks|all]",
    help="Repair leaks only, or (by default) everything that can be repaired safely.",
)
@click.argument("file")
def command(
    file: str,
    quiet: bool,
    opening: dict[str, Any],
    reporting: Reporting,
    as_json: bool,
    repair: Literal["leaks", "all"] | None,
) -> int:
    """Verify the tables of the image FILE.

    With --repair, a repaired and verified copy replaces FILE, and the report is about
    that copy: what was repaired, what was not, and why.

    Exit code: 0 clean, 1 the check failed or wrong usage, 2 corrupt, 3 leaked clusters
    only, 63 the format has no tables to check.
    """
    from imgcore.verbs.check import CheckNotSupportedError, check

    try:
        with reporting.begin(file, quiet=quiet, as_json=as_json) as report:
            result = check(file, repair=repair or False, **report.keywords, **opening)
    except CheckNotSupportedError as error:
        say(f"imgcore: {error}")
        return EXIT_UNSUPPORTED
    if as_json:
        print_json(with_qemu_names(result.as_dict()))
    else:
        for line in result.problems:
            say(line)
        for line in result.repairs:
            say(f"Repaired {line}")
        for line in result.not_repaired:
            say(f"Not repaired: {line}")
        if not quiet:
            _print_human(result)
    if result.corruptions:
        return EXIT_CORRUPT
    return EXIT_LEAKS if result.leaks else 0


def _print_human(result: CheckResult) -> None:
    if result.ok:
        click.echo("No errors were found on the image.")
    if result.corruptions:
        click.echo(
            f"\n{result.corruptions} errors were found on the image.\n"
            "Data may be corrupted, or further writes to the image may corrupt it."
        )
    if result.leaks:
        click.echo(
            f"\n{result.leaks} leaked clusters were found on the image.\n"
            "This means waste of disk space, but no harm to data."
        )
    allocated = result.allocated_clusters
    if result.total_clusters and allocated:
        click.echo(
            f"{allocated}/{result.total_clusters} = "
            f"{allocated / result.total_clusters:.2%} allocated, "
            f"{result.fragmented_clusters / allocated:.2%} fragmented, "
            f"{result.compressed_clusters / allocated:.2%} compressed clusters"
        )
    if result.image_end_offset:
        click.echo(f"Image end offset: {result.image_end_offset}")
