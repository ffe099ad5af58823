"""Names of images other than file names: QEMU's ``json:`` descriptions, and URLs.

A description that only names one local file is understood.  Everything else that QEMU
can open is rejected by name.

Source: QEMU qapi/block-core.json, "BlockdevOptions"; docs/system/images.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final, NamedTuple, overload

from imgcore.errors import OptionError, UnsupportedFeatureError
from imgcore.files.reference_gate import PROTOCOL
from imgcore.formats.registry import PLAIN_FORMAT, canonical_name

if TYPE_CHECKING:
    from imgcore.disk.open_options import OpenOptions

_JSON: Final = "json:"
_NODE: Final = "file"
# Drivers that read one local file; the second is for block devices.
_FILE_DRIVERS: Final = ("file", "host_device")
# Options that do not change what is read.
_HARMLESS: Final = frozenset(
    {
        "node-name",
        "read-only",
        "auto-read-only",
        "force-share",
        "discard",
        "detect-zeroes",
        "cache",
        "locking",
        "aio",
        "aio-max-batch",
        "drop-cache",
        "lazy-refcounts",
        "pass-discard-request",
        "pass-discard-snapshot",
        "pass-discard-other",
        "discard-no-unref",
        "overlap-check",
        "cache-size",
        "l2-cache-size",
        "l2-cache-entry-size",
        "refcount-cache-size",
        "cache-clean-interval",
    }
)


class Described(NamedTuple):
    """The local file that a description names.

    Attributes
    ----------
    filename : str
    format : str or None
        The format that its ``driver`` states, as QEMU spells it.
    without_backing : bool
        It leaves out the backing file that the image may name.
    """

    filename: str
    format: str | None
    without_backing: bool


class NotLocalError(ValueError):
    """The description is not that of one local file; the text says why."""


def is_description(name: str) -> bool:
    """Tell whether a name is a ``json:`` description."""
    return name.startswith(_JSON)


def parse_description(name: str) -> Described:
    """Return the file that a ``json:`` description names.

    Raises
    ------
    NotLocalError
        It names anything but one local file, or has an option that would change what
        is read.
    """
    import json

    try:
        options = json.loads(name[len(_JSON) :], object_pairs_hook=_without_duplicates)
        return _described(_nested(options))
    except NotLocalError:
        raise
    except (ValueError, RecursionError):
        raise NotLocalError("it is not valid JSON") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise NotLocalError("it states an option twice")
    return found


def _nested(options: Any) -> dict[str, Any]:
    """Return options with those in dotted form (``file.filename``) below their node."""
    if not isinstance(options, dict):
        raise NotLocalError("it is not a JSON object")
    found: dict[str, Any] = {}
    for key, value in options.items():
        if value is None and key != "backing":
            continue  # as if it were not there
        first, dot, rest = key.partition(".")
        if not dot:
            rest_of = _nested(value) if isinstance(value, dict) else value
        else:
            rest_of = {rest: value}
        if first in found:
            if not (isinstance(found[first], dict) and isinstance(rest_of, dict)):
                raise NotLocalError(f"it states {first!r} twice")
            rest_of = _without_duplicates([*found[first].items(), *rest_of.items()])
        found[first] = rest_of
    return {
        key: _nested(value) if isinstance(value, dict) else value for key, value in found.items()
    }


def _described(options: dict[str, Any]) -> Described:
    driver, node = options.pop("driver", None), options.pop(_NODE, None)
    if node is None and driver not in (None, *_FILE_DRIVERS):
        raise NotLocalError(f"its driver {driver!r} does not open a local file")
    filename = options.pop("filename", None)
    without_backing = options.get("backing", "") is None
    for key in options:
        if key not in _HARMLESS and not (key == "backing" and without_backing):
            raise NotLocalError(f"its option {key!r} is not supported")
    if node is None:
        return Described(_text(filename, "filename"), None, without_backing)
    if filename is not None or not isinstance(node, dict):
        raise NotLocalError(f"its {_NODE!r} is not a description of a file")
    below = _described(node)
    if driver is not None:
        driver = _text(driver, "driver")
        # A raw node passes on what is below it, so it may stand on and below a format.
        if below.format not in (None, PLAIN_FORMAT):
            if driver != PLAIN_FORMAT:
                raise NotLocalError(f"it opens {below.format!r} inside of {driver!r}")
            driver = below.format
    return Described(
        below.filename, driver or below.format, without_backing or below.without_backing
    )


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str) or not value:
        raise NotLocalError(f"it does not state a {key}")
    return value


@overload
def local_image(
    source: str | os.PathLike[str], options: OpenOptions
) -> tuple[str, OpenOptions]: ...


@overload
def local_image(
    source: str | os.PathLike[str] | int, options: OpenOptions
) -> tuple[str | int, OpenOptions]: ...


def local_image(
    source: str | os.PathLike[str] | int, options: OpenOptions
) -> tuple[str | int, OpenOptions]:
    """Return the file that the caller names, and the options with the stated format.

    A descriptor is returned as it is.

    Raises
    ------
    OptionError
        The name and ``options`` state different formats.
    UnsupportedFeatureError
        The name is a description of something else than one local file, or a URL.
    """
    if isinstance(source, int):
        return source, options
    name = os.fspath(source)
    if name == "-" and not os.path.lexists(name):
        raise UnsupportedFeatureError(
            "only convert and checksum read the standard input: save it to a file first", path=name
        )
    if is_description(name):
        return _described_image(name, options)
    if PROTOCOL.match(name) and not os.path.lexists(name):
        raise UnsupportedFeatureError(
            "URLs and protocols are not read: copy the disk to a file first "
            "(qemu-img convert reads most of them)",
            path=name,
        )
    return name, options


def refuse_foreign_target(path: str) -> None:
    """Raise UnsupportedFeatureError if a new image's name is that of no local file.

    A colon alone is part of a file's name.
    """
    if path == "-":
        raise UnsupportedFeatureError(
            "stdout is not written to: give the name of a file (./- is one of this name)",
            path=path,
        )
    folder = os.path.dirname(path)
    if is_description(path) or (PROTOCOL.match(path) and folder and not os.path.isdir(folder)):
        raise UnsupportedFeatureError(
            "URLs and protocols are not written: write a file and copy it from there "
            "(qemu-img convert writes most of them)",
            path=path,
        )


def _described_image(name: str, options: OpenOptions) -> tuple[str, OpenOptions]:
    try:
        found = parse_description(name)
    except NotLocalError as error:
        raise UnsupportedFeatureError(
            f"{error}; only descriptions of one local file are read", path=name
        ) from error
    stated, flag = found.format or options.format, options.flags.format
    if options.format is not None and canonical_name(stated or "") != canonical_name(
        options.format
    ):
        raise OptionError(
            f"{flag} is {options.format}, but the description states {stated}", path=name
        )
    return found.filename, options._replace(format=stated, without_backing=found.without_backing)
