"""The registry of formats: their names and suffixes, and how a file's format is found.

To register a format, add an `Entry` to `DRIVERS` and its magic to
`imgcore.formats.magic`.  A driver's module is imported when it is first needed.

A file's format is found by these rules:

1. A format that the user states is final.  Except for raw, the file must have its
   magic.
2. Otherwise the file must have the magic of exactly one format.
3. A file without a magic is raw only if its suffix says so or it is a block device.

A magic never means raw, and a file that is named like a raw disk but has a magic is
rejected: a guest can write any header into its own first sector.
"""

from __future__ import annotations

import importlib
import os
import stat
from typing import TYPE_CHECKING, Final, NamedTuple, cast

from imgcore.errors import OptionError, UnsupportedFeatureError, WrongFormatError
from imgcore.formats.magic import HEAD_NBYTES, TAIL_NBYTES, matching_formats
from imgcore.formats.shared.damage import STRICT, Damage
from imgcore.formats.shared.trailing_zeros import end_of_data
from imgcore.limits import MAX_PADDING_NBYTES
from imgcore.streams.names import CODEC_OF_SUFFIX, RAW_SUFFIXES, stream_suffix

if TYPE_CHECKING:
    from imgcore.files.byte_source import ByteSource
    from imgcore.files.reference_gate import ReferenceGate
    from imgcore.formats.api import Driver, Reader
    from imgcore.formats.option_texts import OptionTexts


class Entry(NamedTuple):
    """A format that has a driver.

    Attributes
    ----------
    name : str
        The format's name, as in ``-f`` and ``-O``.
    module : str
        Module that holds the format's `Driver` as ``DRIVER``.
    suffixes : tuple of str
        Suffixes of file names, in lower case with their dot.
    aliases : tuple of str
        Other names that users may write.
    """

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

# The format of plain guest bytes: it has neither header nor magic.
PLAIN_FORMAT: Final = "raw"

# Formats that are recognised but not supported, with the words for their images.
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


_ENTRIES: Final = {name: entry for entry in DRIVERS for name in (entry.name, *entry.aliases)}


def format_names() -> tuple[str, ...]:
    """Return the names of the formats that can be read."""
    return tuple(entry.name for entry in DRIVERS)


def canonical_name(name: str) -> str:
    """Return the name of a format that is given by its name or an alias.

    Raises
    ------
    OptionError
        There is no driver for it.
    """
    entry = _ENTRIES.get(name)
    if entry is None:
        known = ", ".join(format_names())
        if name in NOT_READ:
            raise OptionError(
                f"{NOT_READ[name]} are neither read nor written; known formats: {known}"
            )
        raise OptionError(f"unknown format {name!r}; known formats: {known}")
    return entry.name


def get_driver(name: str) -> Driver:
    """Return the driver of a format that is given by its name or an alias.

    Raises
    ------
    OptionError
        There is no driver for it.
    """
    module = importlib.import_module(_ENTRIES[canonical_name(name)].module)
    return cast("Driver", module.DRIVER)


def format_from_suffix(path: str | os.PathLike[str]) -> str | None:
    """Return the format that a file's suffix stands for, or None.

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
    """Return the format whose magic the file has, or None; never raw.

    It may also be a compression (``gzip``) or a format that is not supported
    (`NOT_READ`).

    Raises
    ------
    WrongFormatError
        The file has the magic of more than one format.
    """
    names = _matches(file)
    if len(names) > 1:
        raise WrongFormatError(
            f"has the magic of more than one format ({', '.join(names)}): "
            "state the right one with -f",
            path=file.path,
        )
    return names[0] if names else None


def open_reader(
    file: ByteSource,
    gate: ReferenceGate,
    format: str | None = None,
    options: OptionTexts | None = None,
    damage: Damage = STRICT,
) -> Reader:
    """Open an image in the stated format, or in the one that its file has.

    Parameters
    ----------
    file : ByteSource
        The image.  The caller closes it; the reader may have closed it before.
    gate : ReferenceGate
        Opens the files that the image names.
    format : str, optional
        Name or alias of the format; the module's docstring has the rules without it.
    options : iterable of str, or mapping, optional
        Options for reading, as for `parse_options`.
    damage : Damage
        If it salvages, a stated format need not have its magic.

    Raises
    ------
    OptionError
        There is no such format, or it has no such option for reading.
    WrongFormatError
        The file is not of the stated format, or its format is unknown or ambiguous.
    UnsupportedFeatureError
        The format is recognised, but not supported.
    """
    if format is None:
        name = _find_format(file)
    else:
        name = canonical_name(format)
        if not damage.salvages:
            _refuse_other_format(file, name)
    if name in CODEC_OF_SUFFIX.values():
        raise UnsupportedFeatureError(
            f"a {name} stream has no random access: only convert, info and measure read "
            "it, so decompress it first",
            path=file.path,
        )
    if name in NOT_READ:
        raise UnsupportedFeatureError(f"{NOT_READ[name]} are not read", path=file.path)
    driver = get_driver(name)
    if not options:
        return driver.open(file, gate, damage=damage)
    if driver.read_options is None:
        raise OptionError(f"{name} has no options for reading", path=file.path)
    from imgcore.formats.option_texts import parse_record

    return driver.open(file, gate, parse_record(name, driver.read_options, options), damage)


def _is_padded(file: ByteSource, name: str | None) -> bool:
    """Tell whether a format's magic is at the end of a file, before zeros."""
    if name is None or name == PLAIN_FORMAT:
        return False
    end = end_of_data(file, MAX_PADDING_NBYTES)
    if end is None:
        return False
    tail_nbytes = min(TAIL_NBYTES, end)
    return name in matching_formats(b"", file.pread(end - tail_nbytes, tail_nbytes))


def _find_format(file: ByteSource) -> str:
    found = probe(file)
    suffix_format = format_from_suffix(file.path)
    named_raw = file.is_block_device or suffix_format == PLAIN_FORMAT
    if found is None and _is_padded(file, suffix_format):
        assert suffix_format is not None
        return suffix_format
    if found is None:
        if named_raw:
            return PLAIN_FORMAT
        raise WrongFormatError(
            "no known format (no magic found): use -f raw if it is a raw disk", path=file.path
        )
    is_stream = found in CODEC_OF_SUFFIX.values() and stream_suffix(file.path) is not None
    if named_raw and not is_stream:
        what = "is a block device" if file.is_block_device else "is named like a raw disk"
        stated = f"-f {found} or -f raw" if found in format_names() else "-f raw"
        raise WrongFormatError(
            f"{what}, but has the magic of {found}: use {stated}", path=file.path
        )
    return found


def _refuse_other_format(file: ByteSource, name: str) -> None:
    # A raw disk may hold anything, another format's magic included.
    if name == PLAIN_FORMAT:
        return
    found = _matches(file)
    if name not in found and not (not found and _is_padded(file, name)):
        what = f"its magic is that of {' and '.join(found)}" if found else "no known magic found"
        raise WrongFormatError(f"not a {name} image: {what}", path=file.path)
