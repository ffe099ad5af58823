"""``imgcore rewrite``."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, Final

import click
from click.core import ParameterSource

from imgcore.cli.common import (
    open_options,
    options_option,
    output_options,
    print_options_help,
    quiet_option,
    rate_option,
    require,
    target_driver,
    verb,
    wants_options_help,
)
from imgcore.cli.progress import progress_options, reporter
from imgcore.text import one_line

if TYPE_CHECKING:
    from imgcore.verbs.rewrite import RewriteResult

_OF_EACH_ACTION: Final = frozenset(
    {"undo", "finish", "rate", "progress_mode", "wants_progress", "quiet", "as_json"}
)


@verb("rewrite")
@open_options("format", "allow", of="IMAGE")
@click.option("-O", "--target-format", metavar="FMT", help="New format of IMAGE.")
@options_option()
@click.option(
    "--name",
    metavar="NAME",
    help="New name in the same folder; by default the suffix changes with the format.",
)
@click.option("--keep-name", is_flag=True, help="Keep the name.")
@click.option("--drop", is_flag=True, help="Rewrite IMAGE without its snapshots and bitmaps.")
@click.option(
    "--inflate", is_flag=True, help="Decompress blocks that the new format cannot refer to."
)
@click.option(
    "--trust-blocks",
    is_flag=True,
    help="Do not verify compressed blocks that stay compressed.",
)
@click.option(
    "--no-undo",
    is_flag=True,
    help="Remove the journal at the end, and give unused space back.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would stay, move and be written.")
@click.option("--undo", is_flag=True, help="Restore the image that IMAGE was before.")
@click.option(
    "--finish",
    is_flag=True,
    help="Keep IMAGE as it is: remove its journal, and give unused space back.",
)
@rate_option()
@progress_options
@quiet_option()
@output_options
@click.argument("image", required=False)
@click.pass_context
def command(
    ctx: click.Context,
    /,
    image: str | None,
    target_format: str | None,
    options: tuple[str, ...],
    undo: bool,
    finish: bool,
    no_undo: bool,
    opening: dict[str, Any],
    rate: int | None,
    progress_mode: str,
    wants_progress: bool,
    quiet: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Make IMAGE an image of another format in its own file.

    Data stays where it is in the file; only tables are new. A journal beside IMAGE
    makes each moment recoverable: after a crash, run the same command again. --undo
    goes back as long as nothing has written to IMAGE since; --finish removes the
    journal.

    Make sure that nothing else uses IMAGE, and keep a backup of what you cannot lose.
    """
    if wants_options_help(options):
        print_options_help(target_driver(target_format, None))
        return
    require(ctx, image=image)
    assert image is not None
    if undo or finish:
        _refuse_others(ctx, undo, finish)
        _end(image, undo=undo, quiet=quiet, as_json=as_json)
        return
    if target_format is None:
        raise click.UsageError("state the new format with -O", ctx)
    from imgcore.verbs.rewrite import rewrite

    label = one_line(os.path.basename(image))
    with reporter(
        progress_mode, wanted=wants_progress, quiet=quiet, label=label, as_json=as_json, rate=rate
    ) as report:
        result = rewrite(
            image,
            target_format,
            options=options,
            keep_undo=not no_undo,
            progress=report.callback,
            control=report.control,
            **settings,
            **opening,
        )
    if as_json:
        click.echo(json.dumps(result._asdict()))
    elif settings["dry_run"] or not quiet:
        _print(image, result, dry_run=settings["dry_run"])


def _refuse_others(ctx: click.Context, undo: bool, finish: bool) -> None:
    """Refuse what would be ignored: a dry run must not undo."""
    if undo and finish:
        raise click.UsageError("give either --undo or --finish", ctx)
    for option in ctx.command.params:
        if not isinstance(option, click.Option) or option.name in _OF_EACH_ACTION:
            continue
        if ctx.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE:
            flag = "--undo" if undo else "--finish"
            other = option.opts[0]
            raise click.UsageError(
                f"{flag} takes no other options: {other} is for a new conversion", ctx
            )


def _end(image: str, *, undo: bool, quiet: bool, as_json: bool) -> None:
    """Undo or finish an earlier conversion."""
    from imgcore.verbs.rewrite import finish_rewrite, undo_rewrite

    path = undo_rewrite(image) if undo else finish_rewrite(image)
    if as_json:
        click.echo(json.dumps({"path": path}))
    elif not quiet:
        click.echo(f"{one_line(path)}: {'restored' if undo else 'journal removed'}")


def _print(image: str, result: RewriteResult, *, dry_run: bool) -> None:
    from imgcore.sizes import format_size

    path = one_line(result.path)
    if result.recovered:
        click.echo(f"{path}: {result.target_format}, converted by an earlier call")
        return
    numbers = (
        f"{format_size(result.bytes_stayed)} stay, {format_size(result.bytes_moved)} move, "
        f"{format_size(result.bytes_tables)} tables, {format_size(result.bytes_written)} written"
    )
    if dry_run:
        click.echo(f"{one_line(image)} -> {path}: {numbers}")
        return
    click.echo(f"{path}: {result.target_format}, {numbers}")
