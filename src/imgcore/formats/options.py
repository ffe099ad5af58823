"""Declares the options of a format: a frozen dataclass with a field for each option.

::

    @dataclass(frozen=True)
    class Options(FormatOptions):
        subformat: str = choice("dynamic", ("dynamic", "fixed"), "Kind of VHD")
        block_size: int | None = byte_size(None, "Block size, 512k to 2M")

A field's type, default, allowed values and help text are stated here only.  Users write
``-o subformat=fixed``; `imgcore.formats.option_texts` parses that into the record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, Final, NamedTuple, TypeVar, cast

from imgcore.border import byte_count, integer
from imgcore.errors import OptionError
from imgcore.sizes import parse_size

_Number = TypeVar("_Number", bound="int | None")
_Text = TypeVar("_Text", bound="str | None")
_Options = TypeVar("_Options", bound="FormatOptions")

_FLAG_TEXTS: Final = {
    "on": True,
    "yes": True,
    "true": True,
    "off": False,
    "no": False,
    "false": False,
}
FLAG_VALUES: Final = "on|off"

# Space is not reserved, reserved by the file system, or filled with zeros.
PREALLOCATION: Final = ("off", "falloc", "full")


# A block size that is left open.  Conversion without copying chooses it; elsewhere it
# is the default.
AUTO: Final[Any] = "auto"


class Foreign(NamedTuple):
    """A key of qemu-img's ``-o`` that is not an option here.

    Attributes
    ----------
    meanings : mapping of bool to mapping
        For a key that is on or off: the options that a value stands for; none if it
        changes nothing here.  A value that is missing is rejected.
    reason : str
        Why it is rejected, and what to do.
    help : str
        For ``-o help``, if the key has a meaning.
    """

    meanings: Mapping[bool, Mapping[str, Any]] = MappingProxyType({})
    reason: str = ""
    help: str = ""

    def options(self, where: str, value: Any) -> Mapping[str, Any]:
        """Return the options that a value stands for; OptionError if it is rejected."""
        found = self.meanings.get(_read_flag(where, value)) if self.meanings else None
        if found is None:
            raise OptionError(f"{where}: {self.reason}")
        return found


# Keys that change nothing here.
NO_EFFECT: Final = Foreign({True: {}, False: {}})
# Keys that every format of qemu-img has, or its files.
_COMMON: Final = {
    "size": Foreign(reason="the source or an argument of create states the size: leave it out"),
    "nocow": NO_EFFECT,
    "backing_file": Foreign(reason="state the backing file with -b FILE -F FMT"),
    "backing_fmt": Foreign(reason="state the format of the backing file with -F FMT"),
}


@dataclass(frozen=True)
class FormatOptions:
    """Base of all records of options; itself the record of a format without options."""

    foreign: ClassVar[Mapping[str, Foreign]] = _COMMON


def byte_size(default: _Number, help: str) -> _Number:
    """Declare an option that is a size in bytes; users may write a suffix (``64k``)."""
    return cast("_Number", _option(default, help, "size", _read_size))


def size_or_auto(default: _Number, help: str, *, auto: tuple[int, int]) -> _Number:
    """Declare the option that is the block size in bytes, or AUTO.

    ``auto`` holds the smallest and the largest size, powers of two, that AUTO may
    become.
    """
    low, high = auto
    sizes = tuple(1 << bits for bits in range(low.bit_length() - 1, high.bit_length()))
    option = _option(default, help, f"size|{AUTO}", _read_block_size, sizes=sizes)
    return cast("_Number", option)


def number(default: _Number, help: str) -> _Number:
    """Declare an option that is a whole number."""
    return cast("_Number", _option(default, help, "int", _read_number))


def flag(help: str) -> bool:
    """Declare an option that is on or off; it is off by default."""
    return cast("bool", _option(False, help, FLAG_VALUES, _read_flag))


def choice(default: _Text, choices: Sequence[str], help: str) -> _Text:
    """Declare an option that is one of a few words."""
    return cast("_Text", _option(default, help, "|".join(choices), partial(_read_choice, choices)))


def text(default: _Text, help: str) -> _Text:
    """Declare an option that is any text."""
    return cast("_Text", _option(default, help, "text", _read_text))


def _option(
    default: Any, help: str, values: str, read: Callable[[str, Any], Any], **more: Any
) -> Any:
    """Return a field with its help, its allowed values and their parser as metadata."""
    metadata = {"help": help, "values": values, "read": read, **more}
    return field(default=default, metadata=metadata)


# The block size among a format's options.


def block_sizes(options: FormatOptions) -> tuple[int, ...]:
    """Return the block sizes that AUTO may become, ascending; none without a choice."""
    option = _block_size_option(options)
    return () if option is None else option.metadata["sizes"]


def is_auto(options: FormatOptions) -> bool:
    """Tell whether the block size is left open."""
    option = _block_size_option(options)
    return option is not None and getattr(options, option.name) == AUTO


def with_block_size(options: _Options, nbytes: int) -> _Options:
    """Return the options with another block size."""
    option = _block_size_option(options)
    assert option is not None, "the format has no option for the block size"
    return replace(options, **{option.name: nbytes})


def without_auto(options: _Options) -> _Options:
    """Return the options with the default for a block size that is left open."""
    option = _block_size_option(options)
    if option is None or getattr(options, option.name) != AUTO:
        return options
    return replace(options, **{option.name: option.default})


def _block_size_option(options: FormatOptions) -> Field[Any] | None:
    return next((option for option in fields(options) if "sizes" in option.metadata), None)


# The parsers of values: ``where`` names the option in messages, ``value`` is as given.


def _read_size(where: str, value: Any) -> int:
    if not isinstance(value, str):
        return byte_count(value, where)
    try:
        return parse_size(value)
    except OptionError as error:
        raise OptionError(f"{where}: {error}") from None


def _read_block_size(where: str, value: Any) -> Any:
    return AUTO if value == AUTO else _read_size(where, value)


def _read_number(where: str, value: Any) -> int:
    try:
        return int(value, 0) if isinstance(value, str) else integer(value, where)
    except ValueError:
        raise OptionError(f"{where} is {value!r}: a whole number is needed") from None


def _read_flag(where: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if str(value).lower() not in _FLAG_TEXTS:
        raise OptionError(f"{where} is {value!r}, allowed: on, off")
    return _FLAG_TEXTS[str(value).lower()]


def _read_choice(choices: Sequence[str], where: str, value: Any) -> str:
    if str(value) not in choices:
        raise OptionError(f"{where} is {str(value)!r}, allowed: {', '.join(choices)}")
    return str(value)


def _read_text(where: str, value: Any) -> str:
    return str(value)
