"""``imgcore lint``."""

from __future__ import annotations

import click

from imgcore.cli.common import (
    allow_option,
    format_option,
    output_options,
    parent_option,
    print_json,
    quiet_option,
    read_options_option,
    share_option,
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
    help=f"The platform: {', '.join(profile_names())}.",
)
@format_option()
@read_options_option()
@parent_option()
@quiet_option()
@share_option()
@allow_option()
@output_options
@click.argument("image")
def command(
    image: str,
    profile: str,
    format: str | None,
    read_options: tuple[str, ...],
    parent: str | None,
    quiet: bool,
    share: bool,
    allow: tuple[str, ...],
    as_json: bool,
) -> int:
    """Tell which rules of a platform IMAGE breaks, one line each with the remedy.

    Exit code: 0 none, 1 some, 2 it could not be looked at.
    """
    from imgcore.verbs.lint import lint

    report = lint(
        image,
        profile=profile,
        format=format,
        read_options=read_options,
        parent=parent,
        allow=allow,
        share=share,
    )
    if as_json:
        print_json(report.as_dict())
    else:
        for finding in report.findings:
            click.echo(one_line(f"{finding.rule}: {finding.message}: {finding.remedy}"))
        if report.ok and not quiet:
            click.echo(f"No rule of {get_profile(profile).platform} is broken.")
    return 0 if report.ok else EXIT_BROKEN
