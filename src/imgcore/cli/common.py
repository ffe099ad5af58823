"""Options that several verbs share, and functions that print results."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import wraps
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click

from imgcore.limits import MAX_THREADS
from imgcore.log import log
from imgcore.text import one_line

if TYPE_CHECKING:
    from imgcore.formats.api import Driver

CONTEXT_SETTINGS: Final = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

_HELP_WORDS: Final = frozenset({"help", "?"})

Function = Callable[..., Any]
Decorator = Callable[[Function], Function]


def say(text: str) -> None:
    """Print one line on stderr; a closed or full stderr is not an error."""
    with suppress(OSError):
        print(one_line(text), file=sys.stderr, flush=True)


def error_text(error: Exception) -> str:
    """Return an exception as one line; the caller puts ``imgcore:`` in front."""
    from imgcore.errors import ImgcoreError

    if isinstance(error, ImgcoreError):
        return str(error)
    if isinstance(error, OSError):
        text = error.strerror or str(error) or type(error).__name__
        return text if error.filename is None else f"{os.fsdecode(error.filename)}: {text}"
    if isinstance(error, MemoryError):
        return "out of memory"
    return f"a defect of imgcore, please report it: {type(error).__name__}: {error}"


def size_value(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Parse a number of bytes with an optional suffix; a callback for click."""
    if value is None:
        return None
    from imgcore.errors import OptionError
    from imgcore.sizes import parse_size

    try:
        return parse_size(value)
    except OptionError as error:
        raise click.BadParameter(str(error), ctx, param) from error


def discard_stdout() -> None:
    """Redirect stdout, so that the flush at exit does not fail again."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
    except (OSError, ValueError):
        pass  # stdout has no descriptor: nothing to flush


class Verb(click.Command):
    """A verb whose errors explain the flags of qemu-img that it does not have."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, self._rewritten(args))
        except click.NoSuchOption as error:
            raise_for_flag(self.name or "", error)
            raise
        except click.UsageError as error:
            error.ctx = error.ctx or ctx  # so that the message names the verb
            raise

    def _rewritten(self, args: list[str]) -> list[str]:
        """Replace options without their optional values.

        ``--progress`` without a mode, as qemu-img has it, is ``-p``.  The value of
        others follows ``=``, so that the next word is never taken for one.
        """
        modes = next((found for p in self.params if (found := _choices(p, "--progress"))), ())
        usual = {flag: value for p in self.params for flag, value in _usual_value(p)}
        rewritten = list(args)
        for index, arg in enumerate(args):
            if arg == "--":
                break
            if arg in usual:
                rewritten[index] = f"{arg}={usual[arg]}"
            elif (
                modes and arg == "--progress" and "".join(args[index + 1 : index + 2]) not in modes
            ):
                rewritten[index] = "-p"
        return rewritten


def _choices(param: click.Parameter, flag: str) -> Sequence[str]:
    if flag in param.opts and isinstance(param.type, click.Choice):
        return param.type.choices
    return ()


def _usual_value(param: click.Parameter) -> Iterator[tuple[str, str]]:
    """Yield each flag of an option with an optional value, and the usual value."""
    if isinstance(param, click.Option) and not param.is_flag:
        value = param.flag_value
        yield from ((flag, value) for flag in param.opts if isinstance(value, str))


def raise_for_flag(verb_name: str, error: click.NoSuchOption) -> None:
    """Raise OptionError with the reason if the unknown option is one of qemu-img's."""
    from imgcore.cli.qemu_flags import flag_refusal
    from imgcore.errors import OptionError

    reason = flag_refusal(verb_name, error.option_name)
    if reason is not None:
        raise OptionError(f"{error.option_name}: {reason}") from error


def verb(name: str, cls: type[Verb] = Verb) -> Callable[[Function], click.Command]:
    """Return a decorator that makes a function a verb of the command."""
    return click.command(
        name,
        cls,
        context_settings=CONTEXT_SETTINGS,
        options_metavar="[OPTIONS]",
        no_args_is_help=False,
    )


# The names that QEMU gives to ways of caching; "off" is an old one of "none".
CACHE_MODES: Final = ("none", "writeback", "writethrough", "directsync", "unsafe")
# Our own, of verbs that have them.
OWN_CACHE_MODES: Final = ("keep", "drop", "direct", "auto")
# QEMU opens a file with O_DIRECT for these.
_DIRECT_CACHE_MODES: Final = ("none", "off", "directsync")


def cache_option(*flags: str, help: str = "", keep: bool = False) -> Decorator:
    """Add qemu-img's flag for a cache mode; its value is dropped unless ``keep``."""
    modes = (*OWN_CACHE_MODES, *CACHE_MODES) if keep else CACHE_MODES

    def check(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
        if value not in (None, "off", *modes):
            allowed = ", ".join(modes)
            raise click.BadParameter(f"{value!r} is no cache mode: {allowed}", ctx, param)
        return value

    return click.option(
        *flags,
        metavar="MODE",
        callback=check,
        expose_value=keep,
        help=help or "Cache mode of qemu-img; images are always read through the page cache.",
    )


def own_cache_mode(value: str | None) -> str:
    """Return our mode for the value of such a flag."""
    if value in _DIRECT_CACHE_MODES:
        return "direct"
    return value if value in OWN_CACHE_MODES else "keep"


class _Flag(NamedTuple):
    flags: tuple[str, ...]
    settings: dict[str, Any]


# The keywords of `imgcore.open` as flags; {} stands for the image that is opened.
_OPEN_FLAGS: Final = {
    "format": _Flag(
        ("-f", "--format"),
        {"metavar": "FMT", "help": "Format of {}; detected from its content by default."},
    ),
    "backing_format": _Flag(
        ("--backing-format",),
        {
            "metavar": "FMT",
            "help": "Format of the backing files of {} if the images do not state it.",
        },
    ),
    "parent": _Flag(
        ("--parent",),
        {
            "metavar": "FILE",
            "multiple": True,
            "help": "Parent of {}, instead of the file that it names; its identity is verified. "
            "May be repeated: the parent's parent follows.",
        },
    ),
    "read_options": _Flag(
        ("--read-options",),
        {
            "metavar": "KEY=VALUE[,...]",
            "multiple": True,
            "help": "Options for reading {}; for VHD size=chs or size=current.",
        },
    ),
    "share": _Flag(
        ("-U", "--force-share"),
        {"is_flag": True, "help": "Open images even if another process writes to them."},
    ),
    "allow": _Flag(
        ("--allow",),
        {
            "metavar": "DIR",
            "multiple": True,
            "help": "Allow images to refer to files in DIR, as well as in their own folder.",
        },
    ),
}


def open_options(
    *names: str, of: str = "the image", flags: Mapping[str, tuple[str, ...]] | None = None
) -> Decorator:
    """Add flags for keywords of `imgcore.open`, which become the argument ``opening``.

    Parameters
    ----------
    names : str
        The keywords; all by default.
    of : str
        The image that is opened, in words for the help.
    flags : mapping of str to tuple of str, optional
        Other flags for some of the keywords.  The last flag of a keyword then also
        renames it: ``--format-a`` makes it ``format_a``.
    """
    keywords: list[str] = []
    added: list[Decorator] = []
    for name in names or _OPEN_FLAGS:
        usual, settings = _OPEN_FLAGS[name]
        own = (flags or {}).get(name)
        keyword = name if own is None else own[-1].removeprefix("--").replace("-", "_")
        text = settings["help"].format(of)
        keywords.append(keyword)
        added.append(click.option(*(own or usual), keyword, **settings | {"help": text}))

    def decorate(function: Function) -> Function:
        @wraps(function)
        def collected(*args: Any, opening: dict[str, Any] | None = None, **values: Any) -> Any:
            own = {keyword: values.pop(keyword) for keyword in keywords}
            return function(*args, opening=(opening or {}) | own, **values)

        decorated: Function = collected
        for add in reversed(added):
            decorated = add(decorated)
        return decorated

    return decorate


def update_options(of: str, flags: Mapping[str, tuple[str, ...]] | None = None) -> Decorator:
    """Add the flags for an image that is written in place, as `open_options` does."""
    names = ("format", "backing_format", "parent", "read_options", "allow")
    return open_options(*names, of=of, flags=flags)


def open_options_of_two(a: str, b: str, both: str) -> Decorator:
    """Add the flags for opening two images, which `open_options` adds for one.

    ``a``, ``b`` and ``both`` are the images, in words for the help.
    """
    of_a = open_options(
        "format",
        "parent",
        "read_options",
        of=a,
        flags={
            "format": ("-f", "--a-format", "--format-a"),
            "parent": ("--parent", "--parent-a"),
            "read_options": ("--read-options", "--read-options-a"),
        },
    )
    of_b = open_options(
        "format",
        "parent",
        "read_options",
        of=b,
        flags={
            "format": ("-F", "--b-format", "--format-b"),
            "parent": ("--parent-b",),
            "read_options": ("--read-options-b",),
        },
    )
    of_both = open_options("backing_format", "share", "allow", of=both)
    return lambda function: of_a(of_b(of_both(function)))


def output_options(function: Function) -> Function:
    """Add ``--output=human|json`` and ``--json``; the function receives ``as_json``."""

    def choose(_ctx: click.Context, _param: click.Parameter, value: str) -> bool:
        return value == "json"

    decorated = click.option(
        "--output",
        "as_json",
        type=click.Choice(["human", "json"]),
        default="human",
        callback=choose,
        help="Output format; human by default.",
    )(function)
    return click.option(
        "--json", "as_json", flag_value="json", default=None, help="Same as --output=json."
    )(decorated)


def options_option(*flags: str) -> Decorator:
    return click.option(
        "-o",
        "--options",
        *flags,
        "options",
        metavar="KEY=VALUE[,...]",
        multiple=True,
        help="Options of the target format; 'help' lists them.",
    )


def _drop(_warning: str) -> None:
    """Print nothing."""


def quiet_option() -> Decorator:
    def silence(_ctx: click.Context, _param: click.Parameter, value: bool) -> bool:
        if value:
            log.receiver = _drop
        return value

    return click.option("-q", "--quiet", is_flag=True, callback=silence, help="Print errors only.")


def rate_option(*, text: str = "", short: bool = True) -> Decorator:
    return click.option(
        *(["-r"] if short else []),
        "--rate",
        "--rate-limit",
        "rate",
        callback=size_value,
        metavar="RATE",
        help=text or "Move at most so many bytes of the disk a second; 0 is no limit.",
    )


def threads_option(*flags: str) -> Decorator:
    return click.option(
        "-m",
        "--threads",
        *flags,
        "threads",
        type=click.IntRange(1, MAX_THREADS),
        metavar="N",
        help="Number of threads; one per processor by default. The result does not depend on it.",
    )


def wants_options_help(options: Sequence[str]) -> bool:
    """Tell whether ``-o help`` is among the options."""
    return any(item in _HELP_WORDS for group in options for item in group.split(","))


def require(ctx: click.Context, **arguments: object) -> None:
    """Fail for the first positional argument that is missing.

    Click's own check would also reject ``-o help``, which needs no arguments.
    """
    for name, value in arguments.items():
        if value is None:
            raise click.UsageError(f"missing argument '{name.upper()}'", ctx)


def target_driver(format: str | None, path: str | None, *, flag: str = "-O") -> Driver:
    """Return the driver for ``format``, or for the suffix of ``path`` if it is None.

    ``flag`` is the option for the format, for the message.
    """
    from imgcore.errors import OptionError
    from imgcore.formats.registry import format_from_suffix, get_driver

    found = format or (format_from_suffix(path) if path is not None else None)
    if found is None:
        raise OptionError(f"the target's format cannot be told from its name: state it with {flag}")
    return get_driver(found)


def print_options_help(driver: Driver) -> None:
    """Print the options of a format, for ``-o help``."""
    from imgcore.formats.option_texts import options_help

    rows = options_help(driver)
    click.echo(f"Options of the {driver.name} format:")
    width = max(len(f"{name}={values}") for name, values, _, _ in rows)
    for name, values, default, text in rows:
        note = f" (default: {default})" if default else ""
        click.echo(f"  {f'{name}={values}':<{width}}  {text}{note}")


def plain_value(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def with_qemu_names(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``info`` or ``check`` says, with QEMU's names for the formats."""
    from imgcore.formats.registry import qemu_name

    result = dict(description)
    for key in ("format", "backing-filename-format"):
        if key in result:
            result[key] = qemu_name(result[key])
    if "format-specific" in result:
        specific = result["format-specific"]
        result["format-specific"] = specific | {"type": qemu_name(specific["type"])}
    return result


def print_json(value: object) -> None:
    """Print one JSON document, indented as qemu-img does."""
    import json

    click.echo(json.dumps(value, indent=4))


def print_result(result: Any, text: str, *, quiet: bool, as_json: bool) -> None:
    """Print the record of a result on one line of JSON, or a text unless quiet."""
    if as_json:
        import json

        click.echo(json.dumps(result._asdict()))
    elif not quiet:
        click.echo(text)


def size_text(n_bytes: int) -> str:
    """Return ``1 GiB (1073741824 bytes)``."""
    from imgcore.sizes import format_size

    return f"{format_size(n_bytes)} ({n_bytes} bytes)"


def print_tree(values: Mapping[str, Any], indent: int) -> None:
    """Print nested values, one a line, as qemu-img prints format-specific ones."""
    for key, value in values.items():
        _print_item(key.replace("-", " "), value, indent)


def _print_item(label: str, value: Any, indent: int) -> None:
    margin = " " * indent
    if isinstance(value, Mapping):
        click.echo(f"{margin}{one_line(label)}:")
        print_tree(value, indent + 4)
    elif isinstance(value, (list, tuple)):
        click.echo(f"{margin}{one_line(label)}:")
        for index, item in enumerate(value):
            _print_item(f"[{index}]", item, indent + 4)
    else:
        text = str(value).lower() if isinstance(value, bool) else str(value)
        click.echo(f"{margin}{one_line(label)}: {one_line(text)}")
