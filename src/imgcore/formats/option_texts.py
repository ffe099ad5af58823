"""Options as people write them: texts and mappings in, typed values out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

from imgcore.errors import OptionError
from imgcore.sizes import parse_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from imgcore.formats.api import Driver, Option

    OptionTexts = Iterable[str] | Mapping[str, Any]


_BOOLS: Final = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}


def parse_options(driver: Driver, texts: OptionTexts | None = None) -> dict[str, Any]:
    """Return a format's options with their types, defaults filled in.

    Parameters
    ----------
    driver : Driver
    texts : iterable of str, or mapping
        Each text is ``key=value[,key=value...]``, a doubled comma standing for one in a value;
        a bare key switches a boolean on.  A mapping may also hold values of the right type.
        Later ones win.

    Raises
    ------
    OptionError
        An unknown key, or a value that is not allowed; the message lists what is.
    """
    return parse_values(driver.name, driver.options, texts or ())


def given_options(driver: Driver, texts: OptionTexts | None = None) -> dict[str, Any]:
    """Return the options that are given, with their types; as `parse_options` otherwise."""
    return _given(driver.name, driver.options, texts or ())


def parse_values(name: str, options: Sequence[Option], texts: OptionTexts) -> dict[str, Any]:
    """Return the values of a format's ``options``, for reading or for writing."""
    return {option.name: option.default for option in options} | _given(name, options, texts)


def _given(name: str, options: Sequence[Option], texts: OptionTexts) -> dict[str, Any]:
    if isinstance(texts, str):
        pairs: list[tuple[str, Any]] = list(_split_options(texts))
    elif hasattr(texts, "items"):
        pairs = list(cast("Mapping[str, Any]", texts).items())
    else:
        pairs = [pair for text in texts for pair in _split_options(text)]
    known = {option.name: option for option in options}
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key not in known:
            names = ", ".join(known) or "none"
            raise OptionError(f"unknown option {key!r} for {name}: known are {names}")
        values[key] = _typed(name, known[key], value)
    return values


def _split_options(text: str) -> list[tuple[str, str | None]]:
    """Split ``k=v,k=v``; a value of None stands for a bare key."""
    pairs: list[tuple[str, str | None]] = []
    # No option's text can hold a NUL: the kernel ends arguments there.
    for piece in text.replace(",,", "\0").split(","):
        key, equals, value = piece.replace("\0", ",").partition("=")
        if key or equals:
            pairs.append((key.strip(), value if equals else None))
    return pairs


def _typed(name: str, option: Option, value: Any) -> Any:
    """Return an option's value in its own type."""
    where = f"option {option.name} of {name}"
    if value is None:
        if option.kind != "bool":
            raise OptionError(f"{where} needs a value: {option.name}=...")
        return True
    if option.kind == "bool":
        if isinstance(value, bool):
            return value
        if str(value).lower() not in _BOOLS:
            raise OptionError(f"{where} is {value!r}: allowed are on and off")
        return _BOOLS[str(value).lower()]
    if option.kind == "size":
        return _typed_size(where, value)
    if option.kind == "int":
        try:
            return value if isinstance(value, int) else int(str(value), 0)
        except ValueError:
            raise OptionError(f"{where} is {value!r}: a whole number is needed") from None
    text = str(value)
    if option.kind == "choice" and text not in option.choices:
        raise OptionError(f"{where} is {text!r}: allowed are {', '.join(option.choices)}")
    return text


def _typed_size(where: str, value: Any) -> int:
    if isinstance(value, int):
        if value < 0:
            raise OptionError(f"{where} is {value}: a size is not negative")
        return value
    try:
        return parse_size(str(value))
    except OptionError as error:
        raise OptionError(f"{where}: {error}") from None


def options_help(driver: Driver) -> list[tuple[str, str, str, str]]:
    """Return a row for each option of a format: name, values, default, meaning."""
    rows = []
    for option in driver.options:
        if option.kind == "choice":
            values = "|".join(option.choices)
        else:
            values = {"bool": "on|off", "str": "text"}.get(option.kind, option.kind)
        default = option.default
        if isinstance(default, bool):
            default = "on" if default else "off"
        text = "" if default is None else str(default)
        rows.append((option.name, values, text, option.help))
    return rows
