"""``imgcore convert``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import click

from imgcore.checksums.digest import ALGORITHMS
from imgcore.cli.checksum_lists import print_entry
from imgcore.cli.common import (
    cache_option,
    open_options,
    options_option,
    own_cache_mode,
    print_options_help,
    quiet_option,
    rate_option,
    require,
    say,
    size_value,
    target_driver,
    threads_option,
    verb,
    wants_options_help,
)
from imgcore.cli.progress import progress_options, reporter
from imgcore.errors import TargetError
from imgcore.platforms.profiles import get_profile, profile_names
from imgcore.text import one_line

if TYPE_CHECKING:
    from imgcore.engine.bad_ranges import BadRange

# Done, but some data could not be read.
EXIT_SALVAGED: Final = 3


@verb("convert")
@open_options(
    of="SOURCE",
    flags={
        "format": ("-f", "--source-format", "--format"),
        "backing_format": ("--source-backing-format",),
    },
)
@click.option(
    "-O",
    "--target-format",
    metavar="FMT",
    help="Format of TARGET; taken from its suffix by default.  A stream may also be raw.zst or "
    "raw.gz.",
)
@options_option("--target-format-options")
@click.option(
    "--profile",
    metavar="NAME",
    help=f"Write an image for a platform: {', '.join(profile_names())}.",
)
@click.option("-c", "--compress", is_flag=True, help="Compress TARGET.")
@click.option(
    "--base",
    metavar="FILE",
    help="A backing file of SOURCE, which becomes that of TARGET: only what the images above it "
    "have is copied.",
)
@click.option("-B", "-b", "--backing", metavar="FILE", help="Backing file of TARGET.")
@click.option("-F", "--backing-format", metavar="FMT", help="Format of the backing file of TARGET.")
@click.option(
    "-S",
    "--sparse-size",
    callback=size_value,
    metavar="SIZE",
    default="4096",
    help="Skip runs of zeros of this length; 0 writes all zeros.  [default: 4k]",
)
@click.option(
    "-n",
    "--no-create",
    "--in-place",
    "in_place",
    is_flag=True,
    help="Write into an existing TARGET.",
)
@click.option(
    "--target-is-zero",
    is_flag=True,
    help="With -n: TARGET reads as zeros, so write none of a raw disk's zeros.",
)
@click.option(
    "--size",
    "stream_size",
    callback=size_value,
    metavar="SIZE",
    help="Size of the disk, if SOURCE is a stream: some targets need it from the start.",
)
@click.option("--force", is_flag=True, help="Replace an existing TARGET.")
@click.option("--no-sync", is_flag=True, help="Do not wait until TARGET is on stable storage.")
@click.option(
    "--salvage",
    is_flag=True,
    help="Save what is left of a damaged SOURCE: lost data is listed and becomes zeros; "
    "exit code 3 if there is any.",
)
@click.option(
    "--reflink",
    type=click.Choice(("auto", "always", "strict", "never")),
    help="Share blocks with SOURCE (XFS, Btrfs): wherever possible after reading them; "
    "always, without reading; strict, or else fail; never.  [default: auto]",
)
@click.option(
    "--no-reflink",
    is_flag=True,
    help="Copy every block, as --reflink=never does.",
)
@click.option(
    "--trust-blocks",
    is_flag=True,
    help="Do not decompress the compressed blocks that TARGET takes over from SOURCE.",
)
@rate_option()
@click.option(
    "--checksum",
    is_flag=False,
    flag_value=ALGORITHMS[0],
    type=click.Choice(ALGORITHMS),
    help=f"Print a digest of TARGET's disk, as `imgcore checksum` does; {ALGORITHMS[0]} unless "
    "stated with =.",
)
@click.option(
    "--verify",
    is_flag=True,
    help="Read TARGET back before it gets its name, and compare digests.",
)
@click.option(
    "--resume",
    is_flag=False,
    flag_value="last",
    type=click.Choice(("last", "verify")),
    help="Keep what is done if the conversion ends early, and go on from there; =verify reads back "
    "all of it before.",
)
@click.option(
    "--journal",
    metavar="FILE",
    help="With --resume: the journal; needed if TARGET is a block device.",
)
@click.option(
    "--receipt",
    metavar="FILE",
    help="Write what was done to FILE, as JSON with a digest, for `imgcore verify`.",
)
@cache_option(
    "-t",
    "--target-cache",
    keep=True,
    help="What of TARGET stays in the page cache: keep; drop what this command has brought there; "
    "direct goes past it; auto decides by size and file system. Of qemu-img's modes, none and "
    "directsync are direct, unsafe is --no-sync, the others are keep.  [default: keep]",
)
@cache_option(
    "-T",
    "--source-cache",
    keep=True,
    help="The same for SOURCE.  [default: keep]",
)
@threads_option("--parallel")
@click.option(
    "-W",
    "--oob-writes",
    is_flag=True,
    expose_value=False,
    help="Ignored: blocks are always written in parallel.",
)
@click.option(
    "-C",
    "--copy-range-offloading",
    is_flag=True,
    expose_value=False,
    help="Ignored: blocks are reflinked wherever they can be.",
)
@progress_options
@quiet_option()
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
@click.argument("files", nargs=-1, metavar="SOURCE... TARGET")
@click.pass_context
def command(
    ctx: click.Context,
    files: tuple[str, ...],
    target_format: str | None,
    options: tuple[str, ...],
    profile: str | None,
    compress: bool,
    base: str | None,
    backing: str | None,
    backing_format: str | None,
    sparse_size: int,
    in_place: bool,
    target_is_zero: bool,
    stream_size: int | None,
    force: bool,
    no_sync: bool,
    salvage: bool,
    reflink: str | None,
    no_reflink: bool,
    trust_blocks: bool,
    rate: int | None,
    checksum: str | None,
    verify: bool,
    resume: str | None,
    journal: str | None,
    receipt: str | None,
    target_cache: str | None,
    source_cache: str | None,
    threads: int | None,
    opening: dict[str, Any],
    progress_mode: str,
    wants_progress: bool,
    quiet: bool,
    as_json: bool,
) -> int | None:
    """Convert the image SOURCE to TARGET.

    The disks of several SOURCEs follow each other in TARGET.

    TARGET appears under its name only when it is complete.  If it is - or a pipe, it is
    written as a stream: in order, and incomplete after a failure.  With - the result of
    --checksum and --json is printed on stderr.

    Exit code: 0 done, 1 failed, 2 wrong usage, 3 done with --salvage, but data was
    lost.
    """
    sources, target = files[: max(1, len(files) - 1)], files[-1] if len(files) > 1 else None
    if wants_options_help(options):
        stated = get_profile(profile).format if profile is not None else target_format
        print_options_help(target_driver(stated, target))
        return None
    require(ctx, source=sources or None, target=target)
    if no_reflink and reflink not in (None, "never"):
        raise click.UsageError(f"--no-reflink contradicts --reflink={reflink}", ctx)
    from imgcore.verbs.convert import convert

    assert target is not None
    label = one_line(os.path.basename(target))
    from imgcore.files.stream_target import is_stdout

    # The results must not get among the bytes of the image.
    to_stdout = is_stdout(target)
    with (
        _broken_pipe_is_failure(),
        reporter(
            progress_mode,
            wanted=wants_progress,
            quiet=quiet,
            label=label,
            as_json=as_json or to_stdout,
            rate=rate,
        ) as report,
    ):
        result = convert(
            sources[0] if len(sources) == 1 else sources,
            target,
            target_format=target_format,
            options=options,
            compress=compress,
            base=base,
            backing=backing,
            backing_format=backing_format,
            sparse=sparse_size,
            threads=threads,
            force=force,
            sync=not no_sync and target_cache != "unsafe",
            in_place=in_place,
            target_is_zero=target_is_zero,
            salvage=salvage,
            reflink=reflink or not no_reflink,
            trust_blocks=trust_blocks,
            progress=report.callback,
            control=report.control,
            profile=profile,
            checksum=checksum,
            verify=verify,
            resume=resume or False,
            journal=journal,
            size=stream_size,
            receipt=receipt,
            source_cache=own_cache_mode(source_cache),
            target_cache=own_cache_mode(target_cache),
            **opening,
        )
    if as_json:
        import json

        ranges = [row._asdict() for row in result.bad_ranges]
        digest = None if result.checksum is None else result.checksum.as_dict()
        fields = result._asdict() | {"bad_ranges": ranges, "checksum": digest}
        click.echo(json.dumps(fields), err=to_stdout)
    elif (checksum is not None or verify) and result.checksum is not None and not quiet:
        print_entry(result.checksum.hexdigest, target, on_stderr=to_stdout)
    for row in result.bad_ranges:
        _print_lost(row)
    return EXIT_SALVAGED if result.bad_ranges else None


@contextmanager
def _broken_pipe_is_failure() -> Iterator[None]:
    """Fail if the reader of a target has gone.

    The command ends silently if that of the results has.
    """
    try:
        yield
    except BrokenPipeError as error:
        raise TargetError(
            f"the reader has closed it: {error.strerror}", path=os.fsdecode(error.filename or "")
        ) from error


def _print_lost(row: BadRange) -> None:
    text = f"{row.path}: lost: {row.length} bytes of the disk at 0x{row.guest_offset:x}"
    say(f"imgcore: {text} ({row.reason}), zeros in their place")
