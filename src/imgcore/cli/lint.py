"""``imgcore lint``."""

from __future__ import annotations

from typing import Any

import click

from imgcore.cli.common import (
    open_options,
    output_options,
    print_json,
    quiet_option,
    verb,
)
from imgcore.platforms.profiles import get_profile, profile_names
from imgcore.text import one_line

EXIT_BROKEN = 1


@verb("lint")
@click.option(
    "--profile",
    metavar="NAME",
    required=True,
    help=f"Platform: {', '.join(profile_names())}.",
)
@open_options("format", "backing_format", "parent", "read_options", "share", "allow")
@quiet_option()
@output_options
@click.argument("image")
def command(
    image: str,
    profile: str,
    quiet: bool,
    opening: dict[str, Any],
    as_json: bool,
) -> int:
    """Check IMAGE against the rules of a platform.

    Each broken rule is a line of output, with the remedy.

    Exit code: 0 no rule is broken, 1 some are, 2 IMAGE could not be examined.
    """
    from imgcore.verbs.lint import lint

    report = lint(
        image,
        profile=profile,
        **opening,
    )
    if as_json:
        print_json(report.as_dict())
    else:
        for finding in report.findings:
            click.echo(one_line(f"{finding.rule}: {finding.message}: {finding.remedy}"))
        if report.ok and not quiet:
            click.echo(f"No rule of {get_profile(profile).platform} is broken.")
    return 0 if report.ok else EXIT_BROKEN
