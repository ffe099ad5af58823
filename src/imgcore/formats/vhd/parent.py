"""VHD: the parent of a differencing disk, read and written.

Source: Microsoft, "Virtual Hard Disk Image Format Specification" 1.0, "Parent Locator
Entries".
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Final, NamedTuple

from imgcore.errors import CorruptImageError, OptionError
from imgcore.formats.api import BackingReference
from imgcore.formats.shared.windows_paths import names_from_windows_path
from imgcore.formats.vhd import layout
from imgcore.formats.vhd.header import parent_texts, uuid_text
from imgcore.formats.vhd.layout import DiskType
from imgcore.log import log

if TYPE_CHECKING:
    from imgcore.files.byte_source import ByteSource
    from imgcore.formats.vhd.header import VhdHeader

# A relative name still leads to the parent if both files were moved together.
_PREFERENCE: Final = (layout.RELATIVE_PATH, layout.FILE_URL, layout.ABSOLUTE_PATH, b"")
_NO_UUID: Final = bytes(16)


class ParentFields(NamedTuple):
    """A differencing disk's fields about its parent; ``timestamp`` counts from 2000."""

    uuid: bytes
    timestamp: int
    name: bytes
    locators: tuple[tuple[bytes, bytes], ...]


def find_parent(file: ByteSource, header: VhdHeader) -> BackingReference | None:
    """Return the reference to a differencing disk's parent; None for other disks.

    Raises
    ------
    CorruptImageError, LimitExceededError
        The disk does not name its parent, or only in damaged texts.

    Notes
    -----
    Damaged names cause a warning if another name can be read.  A parent without a UUID
    may be a raw disk, as XenServer makes them, so its format is not stated.
    """
    dynamic = header.dynamic
    if dynamic is None or header.disk_type is not DiskType.DIFFERENCING:
        return None
    found, problems = parent_texts(file, header)
    texts: dict[bytes, str] = {}
    for code, text in found:
        texts.setdefault(code, text)
    names: list[str] = []
    for code in _PREFERENCE:
        try:
            names += _names(code, texts.get(code, ""), file)
        except CorruptImageError as error:
            problems.append(error)
    if not names:
        problem = "a differencing disk that does not name its parent in a locator or its header"
        raise problems[0] if problems else CorruptImageError(problem, path=file.path)
    for unreadable in problems:
        log.warning("%s: %s; trying the other names of the parent", file.path, unreadable.reason)
    has_uuid = dynamic.parent_uuid != _NO_UUID
    names = list(dict.fromkeys(names))
    return BackingReference(
        names[0],
        "vhd" if has_uuid else None,
        identities={"UUID": uuid_text(dynamic.parent_uuid)} if has_uuid else {},
        other_names=tuple(names[1:]),
        modified=(
            dynamic.parent_timestamp + layout.EPOCH_UNIX_SECONDS
            if dynamic.parent_timestamp
            else None
        ),
    )


def _names(code: bytes, text: str, file: ByteSource) -> tuple[str, ...]:
    """Return the names that a locator's text stands for."""
    return _names_from_url(text, file) if code == layout.FILE_URL else names_from_windows_path(text)


def _names_from_url(url: str, file: ByteSource) -> tuple[str, ...]:
    """Return the names that a file URL stands for; XenServer writes relative ones."""
    from urllib.parse import unquote

    scheme, found, path = url.partition("://")
    if not found or scheme.lower() != "file":
        return ()
    try:
        name = unquote(path, encoding="utf-8", errors="strict").removeprefix("localhost/")
    except UnicodeDecodeError:
        raise CorruptImageError(
            "the MacX parent locator is not valid UTF-8", path=file.path
        ) from None
    if path.startswith("localhost/"):
        name = f"/{name}"
    name = name.removeprefix("./")
    last = name.rpartition("/")[2]
    if not last or "\0" in name:
        return ()
    return (last, name) if name.startswith("/") else (name,)


def parent_fields(backing: BackingReference, virtual_size: int) -> ParentFields:
    """Return the fields about a parent, with names for Windows and XenServer."""
    if backing.format != "vhd":
        raise OptionError(f"the parent of a VHD must be a VHD, not {backing.format}")
    if backing.virtual_size != virtual_size:
        raise OptionError(
            f"a differencing VHD must have the size of its parent: {backing.name} has "
            f"{backing.virtual_size} bytes, the disk has {virtual_size}"
        )
    parent_uuid = uuid.UUID(backing.identities["UUID"])
    if not parent_uuid.int:
        raise OptionError(
            f"the parent {backing.name} has no UUID, so a differencing VHD cannot identify it"
        )
    relative, windows_name = _windows_names(backing.name)
    last = windows_name.rpartition("\\")[2].encode("utf-16-be")
    # Longer names exist on some FUSE file systems only.
    if len(last) > layout.PARENT_NAME_NBYTES - 2:
        raise OptionError(
            f"the parent's name has {len(last) // 2} characters, at most 255 are allowed"
        )
    modified = (backing.modified or 0) - layout.EPOCH_UNIX_SECONDS
    return ParentFields(
        uuid=parent_uuid.bytes,
        timestamp=min(max(modified, 0), layout.MAX_TIMESTAMP),
        name=last,
        locators=(
            (layout.FILE_URL, _file_url(backing.name)),
            (layout.ABSOLUTE_PATH, windows_name.encode("utf-16-le")),
            (layout.RELATIVE_PATH, relative.encode("utf-16-le")),
        ),
    )


def _windows_names(name: str) -> tuple[str, str]:
    r"""Return a parent's relative and full Windows name, such as ``.\parent.vhd``.

    Relative names stay relative, because the folders of this host mean nothing
    elsewhere.
    """
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise OptionError(f"the parent's name {name!r} is not UTF-8") from None
    # Readers, this one included, take a prefix before a colon as a drive or a protocol.
    has_colon = ":" in name.removeprefix("./").partition("/")[0]
    if "\\" in name or has_colon or not name.rpartition("/")[2]:
        raise OptionError(f"the parent's name {name!r} cannot be represented in a VHD")
    windows_name = name.removeprefix("./").replace("/", "\\")
    if windows_name.startswith("\\"):
        return ".\\" + windows_name.rpartition("\\")[2], windows_name
    prefix = "" if windows_name.startswith("..\\") else ".\\"
    return prefix + windows_name, prefix + windows_name


def _file_url(name: str) -> bytes:
    from urllib.parse import quote

    path = name if name.startswith(("/", "./", "../")) else f"./{name}"
    return f"file://{quote(path)}".encode("ascii")
