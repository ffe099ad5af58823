"""``imgcore verify``."""

from __future__ import annotations

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
    rate_option,
    say,
    threads_option,
    verb,
)
from imgcore.cli.progress import Reporting, reporting_options

EXIT_DIFFERENT: Final = 1


@verb("verify")
@open_options("backing_format", "parent", "allow", "share", of="TARGET")
@threads_option()
@reporting_options(rate_option())
@quiet_option()
@output_options
@click.argument("receipt")
@click.argument("target", required=False)
def command(
    receipt: str,
    target: str | None,
    threads: int | None,
    opening: dict[str, Any],
    reporting: Reporting,
    quiet: bool,
    as_json: bool,
) -> int:
    """Verify that an image still has the disk that its RECEIPT tells of.

    RECEIPT is a file that `imgcore convert --receipt` has written. TARGET is the image,
    if it has another name by now.

    Exit code: 0 it has, 1 it has another disk, 2 failed or wrong usage.
    """
    from imgcore.verbs.verify import verify

    status, code, failure = "ok", 0, None
    try:
        with reporting.begin(target or receipt, quiet=quiet, as_json=True) as report:
            result = verify(receipt, target, threads=threads, **report.keywords, **opening)
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
