"""What a differencing VHD calls its parent.

Source: Microsoft, "Virtual Hard Disk Image Format Specification" 1.0, "Parent Locator Entries".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from imgcore.errors import CorruptImageError
from imgcore.formats.api import BackingReference
from imgcore.formats.shared.windows_paths import names_from_windows_path
from imgcore.formats.vhd import layout
from imgcore.formats.vhd.header import parent_texts, uuid_text
from imgcore.formats.vhd.layout import DiskType
from imgcore.log import log

if TYPE_CHECKING:
    from imgcore.files.byte_source import ByteSource
    from imgcore.formats.vhd.header import VhdHeader

# A relative name leads to the parent wherever the two files have been moved together.
_PREFERENCE: Final = (layout.RELATIVE_PATH, layout.FILE_URL, layout.ABSOLUTE_PATH, b"")
_NO_UUID: Final = bytes(16)


def find_parent(file: ByteSource, header: VhdHeader) -> BackingReference | None:
    """Return the reference to a differencing disk's parent, None for other disks.

    Raises
    ------
    CorruptImageError, LimitExceededError
        The disk names no parent, or not in a readable way.

    Notes
    -----
    Names that cannot be read are left out, with a warning, where another one can.
    A parent without UUID may be a raw disk (XenServer makes such); its format is not stated then.
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
        problem = "a differencing disk that names no parent, neither in a locator nor in its header"
        raise problems[0] if problems else CorruptImageError(problem, path=file.path)
    for unreadable in problems:
        log.warning(
            "%s: %s; looking for the parent by its other names", file.path, unreadable.reason
        )
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
    """Return the names that a file URL stands for; XenServer puts relative ones behind ``//``."""
    from urllib.parse import unquote

    scheme, found, path = url.partition("://")
    if not found or scheme.lower() != "file":
        return ()
    try:
        name = unquote(path, encoding="utf-8", errors="strict").removeprefix("localhost/")
    except UnicodeDecodeError:
        raise CorruptImageError("the MacX parent locator is no UTF-8", path=file.path) from None
    if path.startswith("localhost/"):
        name = f"/{name}"
    name = name.removeprefix("./")
    last = name.rpartition("/")[2]
    if not last or "\0" in name:
        return ()
    return (last, name) if name.startswith("/") else (name,)
