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
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, Final, NamedTuple, TypeVar, cast

from imgcore.border import byte_count, integer
from imgcore.errors import OptionError
from imgcore.sizes import parse_size

_Number = TypeVar("_Number", bound="int | None")
_Text = TypeVar("_Text", bound="str | None")

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
    # The option for the size of a block, and sizes worth considering; none by default.
    block_option: ClassVar[str] = ""
    block_sizes: ClassVar[tuple[int, ...]] = ()


def byte_size(default: _Number, help: str) -> _Number:
    """Declare an option that is a size in bytes; users may write a suffix (``64k``)."""
    return cast("_Number", _option(default, help, "size", _read_size))


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


def _option(default: Any, help: str, values: str, read: Callable[[str, Any], Any]) -> Any:
    """Return a field with its help, its allowed values and their parser as metadata."""
    return field(default=default, metadata={"help": help, "values": values, "read": read})


# The parsers of values: ``where`` names the option in messages, ``value`` is as given.


def _read_size(where: str, value: Any) -> int:
    if not isinstance(value, str):
        return byte_count(value, where)
    try:
        return parse_size(value)
    except OptionError as error:
        raise OptionError(f"{where}: {error}") from None


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
