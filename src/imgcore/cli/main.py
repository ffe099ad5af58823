"""The ``imgcore`` command: the group of verbs, errors, exit codes and signals.

Exit codes: 0 done, 1 failed, 2 wrong usage, 128 + n ended by signal n (130 SIGINT, 143
SIGTERM), 141 if the reader of the output has closed it.  ``compare``, ``diff``,
``checksum``, ``verify``, ``check``, ``lint`` and ``convert --salvage`` have more: see
their help.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Final, NoReturn

import click

from imgcore.cli.common import (
    CONTEXT_SETTINGS,
    discard_stdout,
    error_text,
    raise_for_flag,
    say,
)
from imgcore.cli.qemu_flags import command_refusal
from imgcore.cli.signals import EndingSignals, Terminated, signal_name
from imgcore.cli.signals import handled_signals as _signals
from imgcore.errors import OptionError
from imgcore.files.descriptors import named_errors
from imgcore.log import log

_VERBS: Final = {
    "convert": "Convert an image to another format.",
    "info": "Describe an image.",
    "map": "List where the parts of a disk are stored.",
    "compare": "Compare the content of two images.",
    "diff": "List the areas of a disk that have changed.",
    "checksum": "Print or verify a digest of the disk in an image.",
    "verify": "Compare an image with the receipt of its conversion.",
    "check": "Verify the tables of an image.",
    "lint": "Check an image against the rules of a platform.",
    "measure": "Compute how large a target file would be.",
    "create": "Create an empty image.",
    "snapshot": "List or change the snapshots inside an image.",
    "sync": "Bring an image up to date in place, by its changed areas.",
    "commit": "Merge an image into its backing file.",
    "rebase": "Change the backing file of an image.",
    "flatten": "Make an image independent of its backing files.",
    "resize": "Change the size of a disk in place.",
    "rewrite": "Change an image's format in its own file, without copying.",
    "jobs": "List conversions that ended early and can go on.",
}

EXIT_FAILURE: Final = 1
EXIT_USAGE: Final = 2
# For verbs in which 1 has another meaning.
_FAILURE_CODES: Final = {"compare": 2, "diff": 2, "checksum": 2, "lint": 2, "verify": 2}
# For verbs in which 2 has another meaning.
_USAGE_CODES: Final = {"check": 1}
# Plus the number of the signal, as shells report it.
_EXIT_SIGNAL: Final = 128

# If set, unexpected exceptions are not caught, so that their traceback is printed.
_DEBUG_VARIABLE: Final = "IMGCORE_DEBUG"


class _LazyGroup(click.Group):
    """A group that imports the module of a verb when the verb is called."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            raise_for_flag("", error)
            raise

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        reason = command_refusal(args[0])
        if reason is not None:
            raise OptionError(reason)
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _VERBS:
            return None
        command: click.Command = import_module(f"imgcore.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(_VERBS.items()))


def _print_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from imgcore._version import __version__

        click.echo(f"imgcore {__version__}")
        ctx.exit()


@click.group(
    cls=_LazyGroup,
    context_settings=CONTEXT_SETTINGS,
    no_args_is_help=False,
    invoke_without_command=False,
    subcommand_metavar="VERB ...",
)
@click.option(
    "-V",
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_print_version,
    help="Show the version and exit.",
)
def group() -> None:
    """Convert, compare and inspect virtual disk images.

    The formats are raw, QCOW2, VMDK, VHD, VHDX and VDI.

    SIGUSR1 prints one line on stderr that tells how far a verb is.

    Exit code: 0 done, 1 failed, 2 wrong usage, 128 + n ended by signal n, for example
    130 by SIGINT and 143 by SIGTERM.  A signal that comes when the target has its name
    already does not change the exit code.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    with _signals() as signals:
        return _ended(sys.argv[1:] if argv is None else argv, signals)


def run() -> NoReturn:
    """Run the command and end the process."""
    with _signals() as signals:
        code = _ended(sys.argv[1:], signals)
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        # The handlers stay: a signal that comes now does not change the exit code.
        # Everything is closed and written, and finalizing would take 15 ms.
        os._exit(code)


def _ended(argv: Sequence[str], signals: EndingSignals) -> int:
    """Run the command and return its exit code, also if a signal ends it."""
    # NumPy's BLAS starts a thread per core on import, and imgcore uses none of them.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        _prepare_streams()
        with _warnings():
            code = _run(list(argv), signals)
        signals.ignore()
        return code
    except KeyboardInterrupt:
        return _ended_by(signal.SIGINT)
    except Terminated as error:
        return _ended_by(error.signal_number)


class _NamedStdout(io.TextIOWrapper):
    """The process's stdout, whose errors say that it is stdout."""

    def write(self, text: str) -> int:
        with named_errors("stdout"):
            return super().write(text)

    def flush(self) -> None:
        with named_errors("stdout"):
            super().flush()


def _prepare_streams() -> None:
    """Keep printing from failing on closed streams and unencodable characters."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (stays open)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if type(sys.stdout) is io.TextIOWrapper:
        old = sys.stdout
        encoding, buffers_lines = old.encoding, old.line_buffering
        sys.stdout = _NamedStdout(
            old.detach(), encoding, "backslashreplace", line_buffering=buffers_lines
        )


def _run(arguments: list[str], signals: EndingSignals) -> int:
    """Run the verb; turn an exception into one line and an exit code.

    Exceptions that signals raise pass through.
    """
    ctx: click.Context | None = None
    try:
        try:
            with group.make_context("imgcore", arguments) as ctx:
                result = group.invoke(ctx)
        finally:
            sys.stdout.flush()
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.UsageError as error:
        return _fail_usage(error, _code(_USAGE_CODES, ctx, EXIT_USAGE))
    except BrokenPipeError:
        discard_stdout()
        return _EXIT_SIGNAL + signal.SIGPIPE
    except OptionError as error:
        return _fail(str(error), _code(_USAGE_CODES, ctx, EXIT_USAGE))
    except Exception as error:
        if os.environ.get(_DEBUG_VARIABLE):
            raise
        text = error_text(error) + ("; the target is complete" if signals.is_late else "")
        return _fail(text, _code(_FAILURE_CODES, ctx, EXIT_FAILURE))
    return result if isinstance(result, int) else 0


def _code(codes: Mapping[str, int], ctx: click.Context | None, usual: int) -> int:
    """Return the exit code for the verb that was called."""
    verb = ctx.invoked_subcommand if ctx is not None else None
    return codes.get(verb or "", usual)


def _fail(message: str, code: int = EXIT_FAILURE) -> int:
    say(f"imgcore: {message}")
    return code


def _fail_usage(error: click.UsageError, code: int) -> int:
    path = error.ctx.command_path if error.ctx is not None else "imgcore"
    message = error.format_message().rstrip(".")
    return _fail(f"{message[:1].lower()}{message[1:]}; try '{path} --help'", code)


def _ended_by(number: int) -> int:
    return _fail(f"ended by {signal_name(number)}", _EXIT_SIGNAL + number)


@contextmanager
def _warnings() -> Iterator[None]:
    """Print each of the library's warnings once, one a line; ``-q`` drops them.

    Verbs that open an image twice would repeat them.
    """
    printed: set[str] = set()

    def show(warning: str) -> None:
        if warning not in printed:
            printed.add(warning)
            say(f"imgcore: warning: {warning}")

    before, log.receiver = log.receiver, show
    try:
        yield
    finally:
        log.receiver = before
