"""The registry of formats: their names and suffixes, and how a file's format is found.

To register a format, add an `Entry` to `DRIVERS` and its magic to
`imgcore.formats.magic`.  A driver's module is imported when it is first needed.

A file's format is found by these rules:

1. A format that the user states is final.  Except for raw, the file must have its
   magic.
2. Otherwise the file must have the magic of exactly one format.
3. A file without a magic is raw only if its suffix says so or it is a block device.

A magic never means raw.  A guest can write any header into its own first sector, so a
magic is believed only as far as the file's name allows:

- A suffix of images (``.qcow2``) states that the file is one.
- A block device or a suffix of raw disks alone (``.raw``) states the opposite: a magic
  is rejected.
- Other names, ``.img`` among them, state nothing.  The content decides, but no file
  that the image names is opened until the user has stated the format.

A stated format is that of the disk.  The suffixes .zst and .gz after a raw disk's state
that the file is a stream of it, whether or not raw is stated as well.
"""

from __future__ import annotations

import importlib
import os
import stat
from typing import TYPE_CHECKING, Final, NamedTuple, cast

from imgcore.errors import ImgcoreError, OptionError, UnsupportedFeatureError, WrongFormatError
from imgcore.formats.magic import HEAD_NBYTES, TAIL_NBYTES, matching_formats, raw_content
from imgcore.formats.shared.damage import STRICT, Damage
from imgcore.formats.shared.trailing_zeros import end_of_data
from imgcore.limits import MAX_PADDING_NBYTES
from imgcore.streams.names import CODEC_OF_FORMAT, CODEC_OF_SUFFIX, RAW_SUFFIXES, stream_suffix

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
        Other names that users may write; QEMU's comes first.
    other_suffixes : tuple of str
        Suffixes of images that are found, but are not given to new ones.
    """

    name: str
    module: str
    suffixes: tuple[str, ...]
    aliases: tuple[str, ...] = ()
    other_suffixes: tuple[str, ...] = ()


DRIVERS: Final = (
    Entry("qcow2", "imgcore.formats.qcow2.driver", (".qcow2",), (), (".qcow",)),
    Entry("vmdk", "imgcore.formats.vmdk.driver", (".vmdk",)),
    # Hyper-V names its checkpoints .avhd and .avhdx.
    Entry("vhd", "imgcore.formats.vhd.driver", (".vhd", ".vpc"), ("vpc",), (".avhd",)),
    Entry("vhdx", "imgcore.formats.vhdx.driver", (".vhdx",), (), (".avhdx",)),
    Entry("vdi", "imgcore.formats.vdi.driver", (".vdi",)),
    Entry("raw", "imgcore.formats.raw.driver", RAW_SUFFIXES),
)

# The format of plain guest bytes: it has neither header nor magic.
PLAIN_FORMAT: Final = "raw"

# A suffix of raw disks that images in other formats often have, too.
_UNCERTAIN_SUFFIX: Final = ".img"

# Suffixes of files that no driver reads.
_FOREIGN_SUFFIXES: Final = {
    **CODEC_OF_SUFFIX,
    ".tgz": "gzip",
    ".xz": "xz",
    ".bz2": "bzip2",
    ".lz4": "lz4",
    ".7z": "7z",
    ".tar": "tar",
    ".ova": "ova",
    ".zip": "zip",
    ".wim": "wim",
    ".vma": "vma",
    ".qed": "qed",
    ".dmg": "dmg",
    ".hdd": "parallels",
    ".e01": "ewf",
}


class NotRead(NamedTuple):
    """A format that is recognised but not supported: what its files are, what to do."""

    words: str
    remedy: str


_QEMU_READS: Final = "qemu-img convert reads them"
_UNPACK: Final = "extract the disk first"
_DECOMPRESS: Final = "decompress it first"

NOT_READ: Final = {
    "qcow": NotRead("QCOW version 1 images", _QEMU_READS),
    "parallels": NotRead("Parallels disks", _QEMU_READS),
    "bochs": NotRead("Bochs disks", _QEMU_READS),
    "qed": NotRead("QED images", _QEMU_READS),
    "luks": NotRead("LUKS containers", "open it with cryptsetup first"),
    "dmg": NotRead("Apple DMG images", _QEMU_READS),
    "cloop": NotRead("cloop images", _QEMU_READS),
    "vmware-encrypted": NotRead("encrypted VMware disks", "decrypt the machine in VMware first"),
    "android-sparse": NotRead("Android sparse images", "simg2img makes a raw disk of one"),
    "ewf": NotRead("EWF (EnCase) images", "ewfexport makes a raw disk of one"),
    "vma": NotRead("Proxmox VMA archives", "vma extract unpacks their disks"),
    "partclone": NotRead("partclone images", "partclone.restore makes a raw disk of one"),
    "wim": NotRead("WIM archives", "they hold files, not a disk"),
    "zip": NotRead("zip archives", _UNPACK),
    "7z": NotRead("7z archives", _UNPACK),
    "tar": NotRead("tar archives (an OVA is one)", f"{_UNPACK} (tar -xf)"),
    "xz": NotRead("xz streams", f"{_DECOMPRESS} (xz -d)"),
    "bzip2": NotRead("bzip2 streams", f"{_DECOMPRESS} (bzip2 -d)"),
    "lz4": NotRead("lz4 streams", f"{_DECOMPRESS} (lz4 -d)"),
}


class Found(NamedTuple):
    """A file's format.

    Attributes
    ----------
    name : str
    notice : str
        If only the content states the format, the words of a warning; otherwise empty.
    """

    name: str
    notice: str = ""


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
                f"{NOT_READ[name].words} are neither read nor written; known formats: {known}"
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
    """Return the format of a new file with this name, or None.

    A block device and a compressed raw disk (``disk.raw.zst``) are raw.
    """
    name = os.fspath(path)
    if stream_suffix(name) is not None:
        return PLAIN_FORMAT
    suffix = _suffix(name)
    found = next((entry.name for entry in DRIVERS if suffix in entry.suffixes), None)
    return PLAIN_FORMAT if found is None and _is_block_device(name) else found


def stated_format(path: str | os.PathLike[str]) -> str | None:
    """Return the format that the suffix of a name states; it may have no driver.

    ``.img``, an unknown suffix and none at all state no format, and neither does the
    name of a block device.
    """
    suffix = _suffix(os.fspath(path))
    if suffix == _UNCERTAIN_SUFFIX:
        return None
    found = _FOREIGN_SUFFIXES.get(suffix)
    for entry in DRIVERS:
        if suffix in (*entry.suffixes, *entry.other_suffixes):
            found = entry.name
    return None if found is None or _is_block_device(path) else found


def suffix_of(format: str) -> str:
    """Return the usual suffix of a format."""
    for entry in DRIVERS:
        if entry.name == format:
            return entry.suffixes[0]
    foreign = (suffix for suffix, name in _FOREIGN_SUFFIXES.items() if name == format)
    return next(foreign, f".{format}")


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _is_vhd_set(file: ByteSource) -> bool:
    return _suffix(file.path) == ".vhds"


def _is_block_device(path: str | os.PathLike[str]) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False


def qemu_name(name: str) -> str:
    """Return QEMU's name for a format; a name that is unknown here stays as it is."""
    entry = _ENTRIES.get(name)
    return entry.aliases[0] if entry is not None and entry.aliases else name


def _matches(file: ByteSource) -> list[str]:
    head = file.pread(0, min(HEAD_NBYTES, file.nbytes))
    tail_nbytes = min(TAIL_NBYTES, file.nbytes)
    return matching_formats(head, file.pread(file.nbytes - tail_nbytes, tail_nbytes))


def probe(file: ByteSource, *, flag: str = "-f") -> str | None:
    """Return the format whose magic the file has, or None; never raw.

    It may also be a compression (``gzip``) or a format that is not supported
    (`NOT_READ`).  ``flag`` is the command's option for the format, for messages.

    Raises
    ------
    WrongFormatError
        The file has the magic of more than one format.
    """
    names = _matches(file)
    if len(names) > 1:
        read = [name for name in names if name in format_names()]
        stated = ", ".join(f"{flag} {name}" for name in (*read, PLAIN_FORMAT))
        raise WrongFormatError(
            f"has the magic of more than one format ({', '.join(names)}): "
            f"state the right one with {stated}",
            path=file.path,
        )
    return names[0] if names else None


def find_format(
    file: ByteSource,
    stated: str | None = None,
    *,
    flag: str = "-f",
    describing: bool = False,
    damage: Damage = STRICT,
) -> Found:
    """Return a file's format by the rules of this module.

    Parameters
    ----------
    file : ByteSource
    stated : str, optional
        Name or alias of the format that the user states.
    flag : str
        The command's option for it, for messages.
    describing : bool
        The file is only described.  Then the magic of a format that is read is believed
        against a name that states a raw disk, and a file without a magic is raw if its
        name states nothing.
    damage : Damage
        When salvaging, a stated format need not have its magic.

    Raises
    ------
    OptionError
        There is no such format.
    WrongFormatError
        The file is not of the stated format, or its format is unknown or ambiguous.
    """
    name = None if stated is None else canonical_name(stated)
    if is_named_stream(file.path, name):
        return Found(_codec_of(file) or PLAIN_FORMAT)
    if name is not None:
        if not damage.salvages:
            _refuse_other_format(file, name, flag)
        return Found(name)
    found = probe(file, flag=flag)
    named = PLAIN_FORMAT if file.is_block_device else stated_format(file.path)
    if found is None:
        if named == PLAIN_FORMAT or _suffix(file.path) == _UNCERTAIN_SUFFIX:
            return Found(PLAIN_FORMAT)
        if named is not None and _is_padded(file, named):
            return Found(named)
        if describing and named is None and file.nbytes and not _is_vhd_set(file):
            return Found(PLAIN_FORMAT, _no_magic(file, flag))
        raise WrongFormatError(_no_magic(file, flag), path=file.path)
    is_read = found in format_names()
    if named == PLAIN_FORMAT:
        what = "is a block device" if file.is_block_device else "is named like a raw disk"
        advice = f"{flag} {found} or {flag} raw" if is_read else f"{flag} raw"
        problem = f"{what}, but has the magic of {found}: use {advice}"
        if describing:
            return Found(found if is_read else PLAIN_FORMAT, f"{problem} to read it")
        raise WrongFormatError(problem, path=file.path)
    if named in format_names() or not is_read:
        return Found(found)
    return Found(
        found,
        f"the name does not state the format; the content is that of {found} "
        f"({flag} {found} states it)",
    )


def streamed_format(
    path: str, head: bytes, stated: str | None, *, flag: str = "-f"
) -> tuple[str, bool]:
    """Return the format of an image of which only the first bytes are known.

    Parameters
    ----------
    path : str
        Its name in messages.
    head : bytes
        The first `HEAD_NBYTES`, or all of it.
    stated : str, optional
        The canonical name of the format that the user states; not raw.
    flag : str
        The command's option for it, for messages.

    Returns
    -------
    name : str
    has_magic : bool
        False if an image of the stated format may begin with its disk, as this does.

    Raises
    ------
    WrongFormatError
        It is not of the stated format, or its format is unknown or ambiguous.
    UnsupportedFeatureError
        The format is recognised, but not read.
    """
    if not head:
        raise WrongFormatError("no known format: the stream is empty", path=path)
    found = matching_formats(head, b"")
    if stated is not None:
        if stated in found:
            return stated, True
        if not found and get_driver(stated).flat_tail_nbytes:
            return stated, False
        what = f"its magic is that of {' and '.join(found)}" if found else "no known magic found"
        raise WrongFormatError(f"not a {stated} image: {what}", path=path)
    if len(found) > 1:
        choices = ", ".join(f"{flag} {name}" for name in (*found, PLAIN_FORMAT))
        raise WrongFormatError(
            f"has the magic of more than one format ({', '.join(found)}): state the right one "
            f"with {choices}",
            path=path,
        )
    if not found:
        raise WrongFormatError(
            f"no known format (no magic found): use {flag} raw if it is a raw disk", path=path
        )
    if found[0] not in format_names():
        raise UnsupportedFeatureError(_not_streamed(found[0], path, flag), path=path)
    return found[0], True


def _not_streamed(name: str, path: str, flag: str) -> str:
    for stated, codec in CODEC_OF_FORMAT.items():
        if codec == name:
            return (
                f"a {name} stream: use {flag} {stated} if it holds a raw disk, or decompress it "
                f"first ({name} -dc)"
            )
    return _not_read(name, path, flag)


def _codec_of(file: ByteSource) -> str | None:
    """Return the codec of a stream, as those that read it decide."""
    from imgcore.streams.codecs import CODECS

    head = file.pread(0, min(HEAD_NBYTES, file.nbytes))
    return next((name for name, codec in CODECS.items() if codec.matches(head)), None)


def _no_magic(file: ByteSource, flag: str) -> str:
    if not file.nbytes:
        return "no known format: the file is empty"
    content = raw_content(file.pread(0, min(HEAD_NBYTES, file.nbytes)))
    if content is not None:
        return f"has {content}: use {flag} raw if it is a raw disk"
    if _is_vhd_set(file):
        return (
            "a VHD set holds no disk, it names those of its checkpoints: "
            "open the .avhdx file that belongs to it"
        )
    return f"no known format (no magic found): use {flag} raw if it is a raw disk"


def open_reader(
    file: ByteSource,
    gate: ReferenceGate,
    format: str | None = None,
    options: OptionTexts | None = None,
    damage: Damage = STRICT,
    *,
    flag: str = "-f",
) -> Reader:
    """Open an image in the stated format, or in the one that its file has.

    Parameters
    ----------
    file : ByteSource
        The image.  The caller closes it; the reader may have closed it before.
    gate : ReferenceGate
        Opens the files that the image names.
    format : str, optional
        Name or alias of the format; `find_format` has the rules without it.
    options : iterable of str, or mapping, optional
        Options for reading, as for `parse_options`.
    damage : Damage
        What the reader does about damage.
    flag : str
        The command's option for the format, for messages.

    Raises
    ------
    OptionError
        There is no such format, or it has no such option for reading.
    WrongFormatError
        The file is not of the stated format, or its format is unknown or ambiguous.
    UnsupportedFeatureError
        The format is recognised, but not supported.
    """
    name = find_format(file, format, flag=flag, damage=damage).name
    return open_found(file, gate, name, options, damage=damage, flag=flag)


def open_found(
    file: ByteSource,
    gate: ReferenceGate,
    name: str,
    options: OptionTexts | None = None,
    *,
    damage: Damage = STRICT,
    flag: str = "-f",
) -> Reader:
    """Open an image in the format that `find_format` has found; see `open_reader`."""
    if stream_suffix(file.path) is not None and name in (PLAIN_FORMAT, *CODEC_OF_SUFFIX.values()):
        raise _not_random(name, file.path)
    if name not in format_names():
        raise UnsupportedFeatureError(_not_read(name, file.path, flag), path=file.path)
    driver = get_driver(name)
    if not options:
        return driver.open(file, gate, damage=damage)
    if driver.read_options is None:
        raise OptionError(f"{name} has no options for reading", path=file.path)
    from imgcore.formats.option_texts import parse_record

    return driver.open(file, gate, parse_record(name, driver.read_options, options), damage)


def _is_padded(file: ByteSource, name: str) -> bool:
    """Tell whether a format's magic is at the end of a file, before zeros."""
    end = end_of_data(file, MAX_PADDING_NBYTES)
    if end is None:
        return False
    tail_nbytes = min(TAIL_NBYTES, end)
    return name in matching_formats(b"", file.pread(end - tail_nbytes, tail_nbytes))


def _not_read(name: str, path: str, flag: str) -> str:
    """Return that a format is not read, and what to do.

    The format of a parent cannot be stated, so ``flag`` is empty.
    """
    if name in NOT_READ:
        words, remedy = NOT_READ[name]
        text = f"{words} are not read: {remedy}"
        return f"{text}, or copy it as it is with {flag} raw" if name == "luks" and flag else text
    return _no_random_access(name)


def is_named_stream(path: str, format: str | None) -> bool:
    """Tell whether name and stated format are those of a compressed raw disk."""
    return format in (None, PLAIN_FORMAT) and stream_suffix(path) is not None


def _not_random(name: str, path: str) -> ImgcoreError:
    """Return the error for a file that is named like a compressed raw disk."""
    codecs = tuple(CODEC_OF_SUFFIX.values())
    if name not in codecs:
        return WrongFormatError(
            f"is named like a compressed raw disk, but is neither a {' nor a '.join(codecs)} "
            "stream: rename it if it is an image",
            path=path,
        )
    return UnsupportedFeatureError(
        f"a {name} stream has no random access: only convert, info and measure read it, "
        "so decompress it first",
        path=path,
    )


def _no_random_access(codec: str) -> str:
    suffix = next(suffix for suffix, name in CODEC_OF_SUFFIX.items() if name == codec)
    return (
        f"a {codec} stream: only raw disks are read compressed, by names such as "
        f"disk.raw{suffix}; {_DECOMPRESS} ({codec} -d)"
    )


def _refuse_other_format(file: ByteSource, name: str, flag: str) -> None:
    # A raw disk may hold anything, another format's magic included.
    if name == PLAIN_FORMAT:
        return
    found = _matches(file)
    if name not in found and not (not found and _is_padded(file, name)):
        what = f"its magic is that of {' and '.join(found)}" if found else "no known magic found"
        if len(found) == 1 and found[0] not in format_names():
            what += f": {_not_read(found[0], file.path, flag)}"
        raise WrongFormatError(f"not a {name} image: {what}", path=file.path)
