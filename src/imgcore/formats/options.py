"""How a format states its ``-o`` options: a frozen dataclass, one field for each option.

::

    @dataclass(frozen=True)
    class Options(FormatOptions):
        subformat: str = choice("dynamic", ("dynamic", "fixed"), "Kind of VHD")
        block_size: int | None = byte_size(None, "Block size, 512k to 2M")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeVar, cast

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

# How space is reserved ahead: not, by the file system, by writing zeros.
PREALLOCATION: Final = ("off", "falloc", "full")


@dataclass(frozen=True)
class FormatOptions:
    """The options of a format that has none; base of all others."""


def byte_size(default: _Number, help: str) -> _Number:
    """Declare an option in bytes, given with an optional suffix."""
    return cast("_Number", _option(default, help, "size", _read_size))


def number(default: _Number, help: str) -> _Number:
    """Declare an option that is a whole number."""
    return cast("_Number", _option(default, help, "int", _read_number))


def flag(help: str) -> bool:
    """Declare an option that is on or off, off unless given."""
    return cast("bool", _option(False, help, FLAG_VALUES, _read_flag))


def choice(default: _Text, choices: Sequence[str], help: str) -> _Text:
    """Declare an option with a few values."""
    return cast("_Text", _option(default, help, "|".join(choices), partial(_read_choice, choices)))


def text(default: _Text, help: str) -> _Text:
    """Declare an option that is any text."""
    return cast("_Text", _option(default, help, "text", _read_text))


def _option(default: Any, help: str, values: str, read: Callable[[str, Any], Any]) -> Any:
    """Return a field whose metadata says what its values are and how one is read."""
    return field(default=default, metadata={"help": help, "values": values, "read": read})


# Each takes where the value stands, for messages, and the value as it was given.


def _read_size(where: str, value: Any) -> int:
    if isinstance(value, int):
        if value < 0:
            raise OptionError(f"{where} is {value}: a size is not negative")
        return value
    try:
        return parse_size(str(value))
    except OptionError as error:
        raise OptionError(f"{where}: {error}") from None


def _read_number(where: str, value: Any) -> int:
    try:
        return value if isinstance(value, int) else int(str(value), 0)
    except ValueError:
        raise OptionError(f"{where} is {value!r}: a whole number is needed") from None


def _read_flag(where: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if str(value).lower() not in _FLAG_TEXTS:
        raise OptionError(f"{where} is {value!r}: allowed are on and off")
    return _FLAG_TEXTS[str(value).lower()]


def _read_choice(choices: Sequence[str], where: str, value: Any) -> str:
    if str(value) not in choices:
        raise OptionError(f"{where} is {str(value)!r}: allowed are {', '.join(choices)}")
    return str(value)


def _read_text(where: str, value: Any) -> str:
    return str(value)
