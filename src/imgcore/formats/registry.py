"""The registry of formats: names, suffixes, detection, options.

A driver's module is imported when it is first needed.  Detection is exclusive, and its outcome
is never raw: a guest can write any header into its own first sector.
"""

from __future__ import annotations

import importlib
import os
import stat
from typing import TYPE_CHECKING, Final, NamedTuple, cast

from imgcore.errors import OptionError, UnsupportedFeatureError, WrongFormatError
from imgcore.formats.magic import HEAD_NBYTES, TAIL_NBYTES, matching_formats
from imgcore.formats.option_texts import parse_values
from imgcore.streams.names import CODEC_OF_SUFFIX, RAW_SUFFIXES, stream_suffix

if TYPE_CHECKING:
    from imgcore.files.byte_source import ByteSource
    from imgcore.files.gate import ReferenceGate
    from imgcore.formats.api import Driver, Reader
    from imgcore.formats.option_texts import OptionTexts


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
    Entry("raw", "imgcore.formats.raw.driver", RAW_SUFFIXES),
)

# The format without a header: the disk's bytes and nothing else.  It has no magic.
PLAIN_FORMAT: Final = "raw"

# Formats that are told apart by their magic but not read: what their images are called.
NOT_READ: Final = {
    "qcow": "QCOW version 1 images",
    "parallels": "Parallels disks",
    "bochs": "Bochs disks",
    "qed": "QED images",
    "luks": "LUKS containers",
    "dmg": "Apple DMG images",
    "cloop": "cloop images",
    "xz": "xz streams",
}


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
    """Return the names of the formats that have a driver, and so can be read."""
    return tuple(entry.name for entry in DRIVERS)


def canonical_name(name: str) -> str:
    """Return a format's own name for a name or alias; OptionError if it has no driver."""
    entry = _ENTRIES.get(name)
    if entry is None:
        known = ", ".join(format_names())
        if name in NOT_READ:
            raise OptionError(f"{NOT_READ[name]} are neither read nor written: known are {known}")
        raise OptionError(f"unknown format {name!r}: known are {known}")
    return entry.name


def get_driver(name: str) -> Driver:
    """Return the driver of a format, by its name or alias; OptionError if it has none."""
    module = importlib.import_module(_ENTRIES[canonical_name(name)].module)
    return cast("Driver", module.DRIVER)


def format_from_suffix(path: str | os.PathLike[str]) -> str | None:
    """Return the format that a file's name stands for, or None if it stands for none.

    A block device and a compressed raw disk (``disk.raw.zst``) are raw.
    """
    name = os.fspath(path)
    if stream_suffix(name) is not None:
        return PLAIN_FORMAT
    suffix = os.path.splitext(name)[1].lower()
    for entry in DRIVERS:
        if suffix in entry.suffixes:
            return entry.name
    try:
        is_block_device = stat.S_ISBLK(os.stat(name).st_mode)
    except OSError:
        return None
    return PLAIN_FORMAT if is_block_device else None


def _matches(file: ByteSource) -> list[str]:
    head = file.pread(0, min(HEAD_NBYTES, file.nbytes))
    tail_nbytes = min(TAIL_NBYTES, file.nbytes)
    return matching_formats(head, file.pread(file.nbytes - tail_nbytes, tail_nbytes))


def probe(file: ByteSource) -> str | None:
    """Return the one format whose magic the file carries, never raw, or None.

    The answer may be a stream's, or a format's that is not read (`NOT_READ`).

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
    file: ByteSource,
    gate: ReferenceGate,
    format: str | None = None,
    options: OptionTexts | None = None,
) -> Reader:
    """Open an image in the stated format, or in the one that its magic or its name tells.

    Parameters
    ----------
    file : ByteSource
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
        The format is known by its magic, but not read.
    """
    if format is None:
        name = _find_format(file)
    else:
        name = canonical_name(format)
        _refuse_other_format(file, name)
    if name in CODEC_OF_SUFFIX.values():
        raise UnsupportedFeatureError(
            f"a {name} stream has no random access: convert, info and measure read it, "
            "for the rest decompress it first",
            path=file.path,
        )
    if name in NOT_READ:
        raise UnsupportedFeatureError(f"{NOT_READ[name]} are not read", path=file.path)
    driver = get_driver(name)
    if not options:
        return driver.open(file, gate)
    if not driver.read_options:
        raise OptionError(f"{name} has no options for reading", path=file.path)
    return driver.open(file, gate, parse_values(name, driver.read_options, options))


def _find_format(file: ByteSource) -> str:
    found = probe(file)
    named_raw = file.is_block_device or format_from_suffix(file.path) == PLAIN_FORMAT
    if found is None:
        if named_raw:
            return PLAIN_FORMAT
        raise WrongFormatError(
            "no known format (no magic found): if it is a raw disk, say -f raw", path=file.path
        )
    is_stream = found in CODEC_OF_SUFFIX.values() and stream_suffix(file.path) is not None
    if named_raw and not is_stream:
        what = "is a block device" if file.is_block_device else "is named like a raw disk"
        stated = f"-f {found} or -f raw" if found in format_names() else "-f raw"
        raise WrongFormatError(
            f"{what}, but carries the magic of {found}: say {stated}", path=file.path
        )
    return found


def _refuse_other_format(file: ByteSource, name: str) -> None:
    # What a raw disk holds is the guest's affair.
    if name == PLAIN_FORMAT:
        return
    found = _matches(file)
    if name not in found:
        what = f"its magic is that of {' and '.join(found)}" if found else "no known magic found"
        raise WrongFormatError(f"not a {name} image: {what}", path=file.path)
