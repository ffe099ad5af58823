"""Turns options, as users write them, into a format's record of options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, cast

from imgcore.errors import OptionError
from imgcore.formats.options import FLAG_VALUES, FormatOptions

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from imgcore.formats.api import Driver
    from imgcore.formats.options import Option

    OptionTexts = Iterable[str] | Mapping[str, Any]

_Options = TypeVar("_Options", bound=FormatOptions)


def parse_options(driver: Driver, texts: OptionTexts | None = None) -> FormatOptions:
    """Return a format's options for writing; options that are not given have defaults.

    Parameters
    ----------
    driver : Driver
    texts : iterable of str, or mapping
        Each text is ``key=value[,key=value...]``.  A comma in a value is doubled; a
        bare key switches a flag on.  A mapping may also hold values of the right type.
        If a key occurs twice, the later value counts.

    Raises
    ------
    OptionError
        A key is unknown or a value not allowed; the message lists the allowed ones.
    """
    return parse_record(driver.name, driver.options, texts)


def parse_record(name: str, record: type[_Options], texts: OptionTexts | None = None) -> _Options:
    """Return the options of the format ``name``, for reading or for writing."""
    return record(**_given(name, record, texts or ()))


def given_options(driver: Driver, texts: OptionTexts | None = None) -> dict[str, Any]:
    """Return only the options that are given, parsed as by `parse_options`."""
    return _given(driver.name, driver.options, texts or ())


def _given(name: str, record: type[FormatOptions], texts: OptionTexts) -> dict[str, Any]:
    if isinstance(texts, str):
        pairs: list[tuple[str, Any]] = list(_split_options(texts))
    elif hasattr(texts, "items"):
        pairs = list(cast("Mapping[str, Any]", texts).items())
    else:
        pairs = [pair for text in texts for pair in _split_options(text)]
    known = record.declared
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key not in known and key in record.foreign:
            given = True if value is None else value
            values |= record.foreign[key].options(f"option {key} of {name}", given)
            continue
        if key not in known:
            names = ", ".join(known) or "none"
            raise OptionError(f"unknown option {key!r} for {name}; known options: {names}")
        values[key] = _value(f"option {key} of {name}", key, known[key], value)
    return values


def _split_options(text: str) -> list[tuple[str, str | None]]:
    """Split ``k=v,k=v``; a bare key has the value None."""
    pairs: list[tuple[str, str | None]] = []
    # An argument of a command cannot hold a NUL, so it can stand for a doubled comma.
    for piece in text.replace(",,", "\0").split(","):
        key, equals, value = piece.replace("\0", ",").partition("=")
        if key or equals:
            pairs.append((key.strip(), value if equals else None))
    return pairs


def _value(where: str, key: str, option: Option, value: Any) -> Any:
    """Return an option's value in the option's type."""
    if value is None:
        if option.values != FLAG_VALUES:
            raise OptionError(f"{where} needs a value: {key}=...")
        return True
    return option.read(where, value)


def options_help(driver: Driver) -> list[tuple[str, str, str, str]]:
    """Return (name, values, default, meaning) of each option of a format."""
    rows = []
    for name, option in driver.options.declared.items():
        default = option.default
        if isinstance(default, bool):
            default = "on" if default else "off"
        text = "" if default is None else str(default)
        rows.append((name, option.values, text, option.help))
    for key, foreign in driver.options.foreign.items():
        if foreign.help:
            rows.append((key, FLAG_VALUES, "", foreign.help))
    return rows
