"""``imgcore snapshot``."""

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
from imgcore.cli.snapshot_list import print_snapshots
from imgcore.formats.shared.snapshot_row import snapshot_row


@verb("snapshot")
@open_options("format", "backing_format", "parent", "share", "allow")
@click.option(
    "-l", "--list", "lists", is_flag=True, help="List the snapshots. This is the default."
)
@click.option("-c", "--create", metavar="NAME", help="Add a snapshot of the disk as it is.")
@click.option(
    "-a",
    "--apply",
    metavar="SNAPSHOT",
    help="Make the disk what it was when SNAPSHOT was taken; what it is now is lost.",
)
@click.option(
    "-d", "--delete", metavar="SNAPSHOT", help="Remove a snapshot; the disk stays as it is."
)
@quiet_option()
@output_options
@click.argument("file")
@click.pass_context
def command(
    ctx: click.Context,
    file: str,
    lists: bool,
    create: str | None,
    apply: str | None,
    delete: str | None,
    quiet: bool,
    opening: dict[str, Any],
    as_json: bool,
) -> None:
    """List or change the internal snapshots of the QCOW2 image FILE.

    SNAPSHOT is the identifier or the name of one. FILE is changed in place, and no
    other program may use it meanwhile.
    """
    if sum((lists, create is not None, apply is not None, delete is not None)) > 1:
        raise click.UsageError("give one of -l, -c, -a and -d", ctx)
    from imgcore.verbs import snapshot as verbs

    share = opening.pop("share")
    if create is None and apply is None and delete is None:
        found = verbs.snapshots(file, format=opening["format"], allow=opening["allow"], share=share)
        if as_json:
            print_json([snapshot_row(item) for item in found])
        elif found:
            print_snapshots([snapshot_row(item) for item in found])
        return
    if share:
        raise click.UsageError("-U is for -l: no other program may write meanwhile", ctx)
    if create is not None:
        added = verbs.create_snapshot(file, create, **opening)
        if as_json:
            print_json(snapshot_row(added))
    elif apply is not None:
        verbs.apply_snapshot(file, apply, **opening)
    elif delete is not None:
        verbs.delete_snapshot(file, delete, **opening)
