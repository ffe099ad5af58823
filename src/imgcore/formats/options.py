"""Declares the options of a format: a record with a field for each option.

::

    class Options(FormatOptions):
        subformat: str = choice("dynamic", ("dynamic", "fixed"), "Kind of VHD")
        block_size: int | None = byte_size(None, "Block size, 512k to 2M")

A field's type, default, allowed values and help text are stated here only.  Users write
``-o subformat=fixed``; `imgcore.formats.option_texts` parses that into the record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, Final, NamedTuple, Self, TypeVar, cast, dataclass_transform

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


# The one place of tables that can be asked for.
_FRONT: Final = "front"


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


class Option(NamedTuple):
    """One option: its default, and what users see of it.

    ``values`` are the allowed values in words.  ``read`` takes the name of the option
    for messages and a value as given, and returns it in the option's type.  ``sizes``
    are those that AUTO may become.
    """

    default: Any
    help: str
    values: str
    read: Callable[[str, Any], Any]
    sizes: tuple[int, ...] = ()


@dataclass_transform(frozen_default=True, kw_only_default=True)
class FormatOptions:
    """Base of all records of options; itself the record of a format without options.

    Records are immutable, and equal if their options are.  They are no dataclasses,
    since making one takes longer than opening an image.

    Attributes
    ----------
    foreign : mapping of str to Foreign
        Keys of qemu-img that are no options here.
    declared : mapping of str to Option
        The options by name, in the order of their fields.
    """

    foreign: ClassVar[Mapping[str, Foreign]] = _COMMON
    declared: ClassVar[Mapping[str, Option]] = MappingProxyType({})

    def __init_subclass__(cls) -> None:
        own = {name: value for name, value in vars(cls).items() if isinstance(value, Option)}
        cls.declared = MappingProxyType({**cls.declared, **own})
        for name, option in own.items():
            setattr(cls, name, option.default)

    def __init__(self, **values: Any) -> None:
        unknown = values.keys() - self.declared.keys()
        if unknown:
            raise TypeError(f"{type(self).__qualname__} has no option {min(unknown)!r}")
        vars(self).update(values)

    def as_dict(self) -> dict[str, Any]:
        """Return the value of every option by its name."""
        return {name: getattr(self, name) for name in self.declared}

    def replace(self, **values: Any) -> Self:
        """Return a record with other values for some options."""
        return type(self)(**self.as_dict() | values)

    def __setattr__(self, name: str, _value: object) -> None:
        raise AttributeError(f"options cannot be changed: {name}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"options cannot be changed: {name}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FormatOptions) or type(self) is not type(other):
            return NotImplemented
        return self.as_dict() == other.as_dict()

    def __hash__(self) -> int:
        return hash((type(self), *self.as_dict().items()))

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in self.as_dict().items())
        return f"{type(self).__qualname__}({values})"


def byte_size(default: _Number, help: str) -> _Number:
    """Declare an option that is a size in bytes; users may write a suffix (``64k``)."""
    return cast("_Number", Option(default, help, "size", _read_size))


def size_or_auto(default: _Number, help: str, *, auto: tuple[int, int]) -> _Number:
    """Declare the option that is the block size in bytes, or AUTO.

    ``auto`` holds the smallest and the largest size, powers of two, that AUTO may
    become.
    """
    low, high = auto
    sizes = tuple(1 << bits for bits in range(low.bit_length() - 1, high.bit_length()))
    return cast("_Number", Option(default, help, f"size|{AUTO}", _read_block_size, sizes))


def number(default: _Number, help: str) -> _Number:
    """Declare an option that is a whole number."""
    return cast("_Number", Option(default, help, "int", _read_number))


def flag(help: str) -> bool:
    """Declare an option that is on or off; it is off by default."""
    return cast("bool", Option(False, help, FLAG_VALUES, _read_flag))


def choice(default: _Text, choices: Sequence[str], help: str) -> _Text:
    """Declare an option that is one of a few words."""
    return cast("_Text", Option(default, help, "|".join(choices), partial(_read_choice, choices)))


def table_place() -> str | None:
    """Declare the option that says where an image's tables go."""
    return choice(
        None,
        (_FRONT,),
        "front: tables precede all data, as in streams; data is what the source's tables state, "
        "zeros included",
    )


def has_tables_in_front(options: FormatOptions) -> bool:
    """Tell whether the option `table_place` says so."""
    return getattr(options, "tables", None) == _FRONT


def text(default: _Text, help: str) -> _Text:
    """Declare an option that is any text."""
    return cast("_Text", Option(default, help, "text", _read_text))


# The block size among a format's options.


def block_sizes(options: FormatOptions) -> tuple[int, ...]:
    """Return the block sizes that AUTO may become, ascending; none without a choice."""
    key = _block_size_key(options)
    return () if key is None else options.declared[key].sizes


def block_size(options: FormatOptions) -> int | str | None:
    """Return the block size: AUTO if it is left open, None if the format decides."""
    key = _block_size_key(options)
    return None if key is None else cast("int | str | None", getattr(options, key))


def with_block_size(options: _Options, nbytes: int) -> _Options:
    """Return the options with another block size."""
    key = _block_size_key(options)
    assert key is not None, "the format has no option for the block size"
    return options.replace(**{key: nbytes})


def without_auto(options: _Options) -> _Options:
    """Return the options with the default for a block size that is left open."""
    key = _block_size_key(options)
    if key is None or block_size(options) != AUTO:
        return options
    return options.replace(**{key: options.declared[key].default})


def _block_size_key(options: FormatOptions) -> str | None:
    return next((key for key, option in options.declared.items() if option.sizes), None)


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
