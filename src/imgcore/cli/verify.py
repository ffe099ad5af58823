"""``imgcore verify``."""

from __future__ import annotations

import os
from typing import Any, Final

import click

from imgcore.checksums.digest import ChecksumError
from imgcore.cli.checksum_lists import print_status
from imgcore.cli.common import (
    error_text,
    open_options,
    output_options,
    print_json,
    quiet_option,
    say,
    threads_option,
    verb,
)
from imgcore.cli.progress import progress_options, reporter
from imgcore.text import one_line

EXIT_DIFFERENT: Final = 1


@verb("verify")
@open_options("backing_format", "parent", "allow", "share", of="TARGET")
@threads_option()
@progress_options
@quiet_option()
@output_options
@click.argument("receipt")
@click.argument("target", required=False)
def command(
    receipt: str,
    target: str | None,
    threads: int | None,
    opening: dict[str, Any],
    progress_mode: str,
    wants_progress: bool,
    quiet: bool,
    as_json: bool,
) -> int:
    """Verify that an image still has the disk that its RECEIPT tells of.

    RECEIPT is a file that `imgcore convert --receipt` has written. TARGET is the image,
    if it has another name by now.

    Exit code: 0 it has, 1 it has another disk, 2 failed or wrong usage.
    """
    from imgcore.verbs.verify import verify

    label = one_line(os.path.basename(target or receipt))
    status, code, failure = "ok", 0, None
    try:
        with reporter(
            progress_mode, wanted=wants_progress, quiet=quiet, label=label, as_json=True
        ) as report:
            result = verify(receipt, target, threads=threads, progress=report.callback, **opening)
        name, found = result.target, result.checksum
    except ChecksumError as error:
        status, code, failure = "failed", EXIT_DIFFERENT, error_text(error)
        name, found = error.path or receipt, error.found
        say(f"imgcore: {failure}")
    if as_json:
        print_json(
            {
                "receipt": receipt,
                "target": name,
                "status": status,
                "checksum": found.as_dict(),
                "error": failure,
            }
        )
    elif code or not quiet:
        print_status(name, "FAILED" if code else "OK")
    return code
