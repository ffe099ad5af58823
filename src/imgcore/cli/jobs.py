"""``imgcore jobs``."""

from __future__ import annotations

import click

from imgcore.cli.common import output_options, verb
from imgcore.sizes import format_size
from imgcore.text import one_line


@verb("jobs")
@click.option(
    "--remove", is_flag=True, help="Give them up: remove what they have kept of their targets."
)
@output_options
@click.argument("folder", default=".")
def command(folder: str, remove: bool, as_json: bool) -> None:
    """List the conversions with --resume in FOLDER that have ended early.

    FOLDER has their journals, or is one of them; it is the current one by default.
    """
    from imgcore.verbs.jobs import jobs

    found = jobs(folder, remove=remove)
    if as_json:
        import json

        click.echo(json.dumps([job._asdict() for job in found]))
        return
    for job in found:
        state = f"{format_size(job.kept_nbytes)} kept"
        if job.is_running:
            state = "at work"
        elif remove:
            state = "given up"
        click.echo(f"{one_line(job.target)}: {state}")
