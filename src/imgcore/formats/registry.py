"""The registry of formats: names, suffixes, detection, options.

A driver's module is imported when it is first needed.  Detection is exclusive, and its outcome
is never raw: a guest can write any header into its own first sector.
"""

from __future__ import annotations

import importlib
import os
import stat
from dataclasses import fields
from typing import TYPE_CHECKING, Final, NamedTuple, cast

from imgcore.errors import OptionError, UnsupportedFeatureError, WrongFormatError
from imgcore.formats.magic import HEAD_NBYTES, TAIL_NBYTES, matching_formats
from imgcore.formats.option_texts import parse_record

if TYPE_CHECKING:
    from imgcore.files.gate import ReferenceGate
    from imgcore.files.host_file import HostFile
    from imgcore.formats.api import Driver, Reader
    from imgcore.formats.option_texts import OptionTexts
    from imgcore.streams.source import StreamSource


class Entry(NamedTuple):
    """A format's line in the registry."""

    name: str
    module: str
    suffixes: tuple[str, ...]
    aliases: tuple[str, ...] = ()


DRIVERS: Final = (
    Entry("qcow2", "imgcore.formats.qcow2.driver", (".qcow2",)),
    Entry("vmdk", "imgcore.formats.vmdk.driver", (".vmdk",)),
    Entry("vhd", "imgcore.formats.vhd.driver", (".vhd", ".vpc"), ("vpc",)),
    Entry("vhdx", "imgcore.formats.vhdx.driver", (".vhdx",)),
    Entry("vdi", "imgcore.formats.vdi.driver", (".vdi",)),
    Entry("raw", "imgcore.formats.raw.driver", (".raw", ".img", ".dd", ".bin")),
)

STREAM_SUFFIXES: Final = (".zst", ".gz")
STREAM_MAGICS: Final = ("zstd", "gzip")


def _index() -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for entry in DRIVERS:
        for name in (entry.name, *entry.aliases):
            if name in entries:
                raise RuntimeError(f"two formats are named {name}")
            entries[name] = entry
    return entries


_ENTRIES: Final = _index()


def format_names() -> tuple[str, ...]:
    """Return the names of the formats that can be read and written."""
    return tuple(entry.name for entry in DRIVERS)


def canonical_name(name: str) -> str:
    """Return a format's own name for a name or alias; OptionError if there is none such."""
    entry = _ENTRIES.get(name)
    if entry is None:
        known = ", ".join(entry.name for entry in DRIVERS)
        raise OptionError(f"unknown format {name!r}: known are {known}")
    return entry.name


def get_driver(name: str) -> Driver:
    """Return the driver of a format, by its name or alias; OptionError if there is none such."""
    module = importlib.import_module(_ENTRIES[canonical_name(name)].module)
    return cast("Driver", module.DRIVER)


def stream_suffix(path: str) -> str | None:
    """Return ``.zst`` or ``.gz`` if the name is that of a compressed raw disk, else None."""
    stem, suffix = os.path.splitext(path.lower())
    if suffix in STREAM_SUFFIXES and os.path.splitext(stem)[1] in _ENTRIES["raw"].suffixes:
        return suffix
    return None


def format_from_suffix(path: str | os.PathLike[str]) -> str | None:
    """Return the format that a file's name stands for, or None if it stands for none.

    A block device and a compressed raw disk (``disk.raw.zst``) are raw.
    """
    name = os.fspath(path)
    if stream_suffix(name) is not None:
        return "raw"
    suffix = os.path.splitext(name)[1].lower()
    for entry in DRIVERS:
        if suffix in entry.suffixes:
            return entry.name
    try:
        is_block_device = stat.S_ISBLK(os.stat(name).st_mode)
    except OSError:
        return None
    return "raw" if is_block_device else None


def _matches(file: HostFile) -> list[str]:
    head = file.pread(0, min(HEAD_NBYTES, file.nbytes))
    tail_nbytes = min(TAIL_NBYTES, file.nbytes)
    return matching_formats(head, file.pread(file.nbytes - tail_nbytes, tail_nbytes))


def probe(file: HostFile) -> str | None:
    """Return the one format whose magic the file carries, never raw, or None.

    The answer may be a format that imgcore knows by its magic alone.

    Raises
    ------
    WrongFormatError
        The file carries the magic of more than one format.
    """
    names = _matches(file)
    if len(names) > 1:
        raise WrongFormatError(
            f"carries the magic of more than one format ({', '.join(names)}): "
            "say with -f which one it is",
            path=file.path,
        )
    return names[0] if names else None


def open_reader(
    file: HostFile,
    gate: ReferenceGate,
    format: str | None = None,
    options: OptionTexts | None = None,
) -> Reader:
    """Open an image in the stated format, or in the one that its magic or its name tells.

    Parameters
    ----------
    file : HostFile
        Stays the caller's to close if this raises; closing the reader is enough otherwise
        for raw, and both may be closed in any order.
    gate : ReferenceGate
        What the image names is opened through it.
    format : str, optional
        Final if stated.  If not, raw follows only from the file's suffix or from its being a
        block device, and only if it carries no other format's magic.
    options : iterable of str, or mapping, optional
        How to read it, as `parse_options` takes them.

    Raises
    ------
    OptionError
        The format has no such option for reading.
    WrongFormatError
        The file is not of the stated format, or its format cannot be told safely.
    UnsupportedFeatureError
        The format is known but not supported.
    """
    if format is None:
        name = _find_format(file)
    else:
        name = canonical_name(format)
        _refuse_other_format(file, name)
    if name in STREAM_MAGICS:
        raise UnsupportedFeatureError(
            f"a {name} stream has no random access: convert, info and measure read it, "
            "for the rest decompress it first",
            path=file.path,
        )
    if name not in format_names():
        raise UnsupportedFeatureError(f"the format {name} is not supported", path=file.path)
    driver = get_driver(name)
    if not options:
        return driver.open(file, gate)
    if not fields(driver.read_options):
        raise OptionError(f"{name} has no options for reading", path=file.path)
    return driver.open(file, gate, parse_record(name, driver.read_options, options))


def refuse_stream_options(path: str, options: OptionTexts | None, parent: object) -> None:
    """Raise OptionError if a compressed raw disk is given options or a parent: it has none."""
    if options:
        raise OptionError("raw has no options for reading", path=path)
    if parent is not None:
        raise OptionError("a parent is given, but raw disks have none", path=path)


def _find_format(file: HostFile) -> str:
    found = probe(file)
    named_raw = file.is_block_device or format_from_suffix(file.path) == "raw"
    if stream_suffix(file.path) is not None and found in STREAM_MAGICS:
        return found
    if found is None and named_raw:
        return "raw"
    if found is None:
        raise WrongFormatError(
            "no known format (no magic found): if it is a raw disk, say -f raw", path=file.path
        )
    if named_raw:
        what = "is a block device" if file.is_block_device else "is named like a raw disk"
        raise WrongFormatError(
            f"{what}, but carries the magic of {found}: say -f {found} or -f raw", path=file.path
        )
    return found


def refuse_image_in_stream(stream: StreamSource) -> None:
    """Raise WrongFormatError if a compressed disk, not stated to be raw, holds an image.

    Only its first bytes are looked at.
    """
    found = matching_formats(stream.head(HEAD_NBYTES), b"")
    if found:
        raise WrongFormatError(
            f"its content carries the magic of {' and '.join(found)}: decompress it first, "
            "or say -f raw",
            path=stream.path,
        )


def _refuse_other_format(file: HostFile, name: str) -> None:
    # What a raw disk holds is the guest's affair.
    if name == "raw":
        return
    found = _matches(file)
    if name not in found:
        what = f"its magic is that of {' and '.join(found)}" if found else "no known magic found"
        raise WrongFormatError(f"not a {name} image: {what}", path=file.path)
