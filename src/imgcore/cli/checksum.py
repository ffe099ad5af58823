"""``imgcore checksum``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click

from imgcore.checksums.digest import ALGORITHMS, ChecksumError, Digest
from imgcore.cli.checksum_lists import print_entry, print_status, read_list
from imgcore.cli.common import (
    error_text,
    open_options,
    output_options,
    print_json,
    quiet_option,
    rate_option,
    require,
    say,
    threads_option,
    verb,
)
from imgcore.cli.progress import progress_options, reporter
from imgcore.errors import (
    ConversionCancelled,
    FormatError,
    ImgcoreError,
    OptionError,
)
from imgcore.log import log
from imgcore.text import one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

EXIT_DIFFERENT: Final = 1
EXIT_UNREADABLE: Final = 2
_EXIT_CODES: Final = {"failed": EXIT_DIFFERENT, "unreadable": EXIT_UNREADABLE}
# The words of sha256sum.
_WORDS: Final = {"failed": "FAILED", "unreadable": "FAILED open or read"}


class _Outcome(NamedTuple):
    """The result for one file.

    ``status`` is computed, ok, failed or unreadable.
    """

    name: str
    status: str
    digest: Digest | None = None
    error: str | None = None

    def print(self, *, is_check: bool, quiet: bool) -> None:
        if self.error is not None:
            say(f"imgcore: {self.error}")
        if self.status == "computed":
            assert self.digest is not None
            print_entry(self.digest.hexdigest, self.name)
        elif self.status == "ok" and not quiet:
            print_status(self.name, "OK")
        elif self.status in _WORDS and is_check:
            print_status(self.name, _WORDS[self.status])

    def as_json(self) -> dict[str, Any]:
        return {
            "filename": self.name,
            "status": self.status,
            "checksum": None if self.digest is None else self.digest.as_dict(),
            "error": self.error,
        }


@verb("checksum")
@open_options(of="FILE")
@click.option(
    "-a",
    "--algorithm",
    type=click.Choice(ALGORITHMS),
    default=ALGORITHMS[0],
    help=f"Algorithm of the digests; {ALGORITHMS[0]} by default.",
)
@click.option(
    "-c",
    "--check",
    "lists",
    metavar="LIST",
    multiple=True,
    help="Verify the images that LIST names, a file of lines as this verb prints them; - is stdin.",
)
@click.option(
    "--tree",
    metavar="TREE",
    help="Write the checksum of each block of FILE to TREE, or verify FILE against TREE if it "
    "exists.",
)
@threads_option()
@rate_option()
@progress_options
@quiet_option()
@output_options
@click.argument("files", nargs=-1, metavar="FILE...")
@click.pass_context
def command(
    ctx: click.Context,
    files: tuple[str, ...],
    algorithm: str,
    lists: tuple[str, ...],
    tree: str | None,
    threads: int | None,
    opening: dict[str, Any],
    rate: int | None,
    progress_mode: str,
    wants_progress: bool,
    quiet: bool,
    as_json: bool,
) -> int:
    """Print a digest of the disk in each image FILE, as a guest reads it.

    It does not depend on the format, nor on what of the disk is allocated.  The lines
    have the form of sha256sum, but the digest is another: blkhash, over blocks of 64
    KiB.

    Exit code: 0 done, 1 a digest is not the expected one, 2 failed or wrong usage.
    """
    if lists and (files or tree is not None):
        raise click.UsageError("--check takes the names of the images from LIST", ctx)
    if not lists:
        require(ctx, file=files or None)
    if tree is not None and len(files) > 1:
        raise click.UsageError("--tree is the tree of one FILE", ctx)
    from imgcore.verbs.checksum import checksum

    def digest_of(name: str) -> Digest:
        label = one_line(os.path.basename(name))
        # The digests are on stdout, so that progress is not printed there.
        with reporter(
            progress_mode, wanted=wants_progress, quiet=quiet, label=label, as_json=True, rate=rate
        ) as report:
            return checksum(
                name,
                algorithm=algorithm,
                tree=tree,
                threads=threads,
                progress=report.callback,
                control=report.control,
                **opening,
            )

    rows: list[dict[str, Any]] = []
    code = 0
    for outcome in _checked(lists, digest_of) if lists else _computed(files, tree, digest_of):
        code = max(code, _EXIT_CODES.get(outcome.status, 0))
        if as_json:
            rows.append(outcome.as_json())
        else:
            outcome.print(is_check=bool(lists or tree is not None), quiet=quiet)
    if as_json:
        print_json(rows)
    return code


def _computed(
    names: Sequence[str], tree: str | None, digest_of: Callable[[str], Digest]
) -> Iterator[_Outcome]:
    """Yield the digest of each image, or whether it suits the tree that exists."""
    done = "ok" if tree is not None and os.path.lexists(tree) else "computed"
    for name in names:
        try:
            yield _Outcome(name, done, digest_of(name))
        except ChecksumError as error:
            yield _Outcome(name, "failed", error.found, error=str(error))
        except (ImgcoreError, OSError) as error:
            if len(names) == 1:
                raise
            yield _unreadable(name, error)


def _checked(lists: Sequence[str], digest_of: Callable[[str], Digest]) -> Iterator[_Outcome]:
    """Yield the result for each line of the lists."""
    for path in lists:
        n_lines = n_malformed = 0
        for entry in read_list(path):
            n_lines += 1
            if entry is None:
                n_malformed += 1
                continue
            try:
                digest = digest_of(entry.name)
            except (ImgcoreError, OSError) as error:
                yield _unreadable(entry.name, error)
            else:
                status = "ok" if digest.hexdigest == entry.hexdigest else "failed"
                yield _Outcome(entry.name, status, digest)
        if n_malformed == n_lines:
            raise FormatError("has no line with a checksum and a name", path=path)
        if n_malformed:
            text = "1 line is" if n_malformed == 1 else f"{n_malformed} lines are"
            log.warning("%s: %s not a checksum and a name", path, text)


def _unreadable(name: str, error: Exception) -> _Outcome:
    if isinstance(error, (ConversionCancelled, OptionError)):
        raise error
    return _Outcome(name, "unreadable", error=error_text(error))
