"""Change single lines of a VMDK descriptor, and keep all others as they are.

Source: VMware "Virtual Disk Format 5.0", section "The Descriptor File".
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from imgcore.errors import CorruptImageError, OptionError
from imgcore.formats.vmdk.descriptor import disk_geometry, encoding_of, parse_descriptor
from imgcore.formats.vmdk.layout import NO_PARENT_CID, RESERVED_CIDS
from imgcore.limits import SECTOR_NBYTES

if TYPE_CHECKING:
    from collections.abc import Callable

_LINE_END: Final = re.compile(rb"(\r\n|\n|\r)")
_CID: Final = re.compile(rb'(?:^|[\r\n])[ \t]*CID[ \t]*=[ \t]*"?(?:0x)?([0-9a-f]{1,8})', re.I)
_LONG_CID: Final = re.compile(
    rb'(?:^|[\r\n])[ \t]*ddb\.longContentID[ \t]*=[ \t]*"[0-9a-f]{24}([0-9a-f]{8})"', re.I
)
_EXTENT: Final = re.compile(rb"([ \t]*RW[ \t]+)\d+(.*)", re.I)
_GEOMETRY: Final = re.compile(rb'([ \t]*ddb\.geometry\.(\w+)[ \t]*=[ \t]*)"?\d+"?[ \t]*', re.I)


def text_of(raw: bytes) -> bytes:
    """Return a descriptor without its padding."""
    return raw.split(b"\0", 1)[0]


def with_new_content_id(raw: bytes, path: str) -> bytes:
    """Return a descriptor of the same length with another, random content ID.

    A long content ID ends with it, as VMware's do.  A descriptor without a content ID
    stays as it is.

    Parameters
    ----------
    raw : bytes
        Padding may follow the text.
    path : str
        For messages.
    """
    import secrets

    text = text_of(raw)
    old = parse_descriptor(text, path).cid
    places = [match.span(1) for match in _CID.finditer(text)]
    if not places:
        return raw
    width = min(end - start for start, end in places)
    new = old
    # 0 is taken for none by some software.
    while new in (old, 0, *RESERVED_CIDS):
        new = secrets.randbelow(1 << 4 * width)
    places += [
        match.span(1) for match in _LONG_CID.finditer(text) if match[1].lower() == b"%08x" % old
    ]
    changed = bytearray(raw)
    for start, end in places:
        changed[start:end] = b"%0*x" % (end - start, new)
    if parse_descriptor(bytes(changed), path).cid != new:
        raise CorruptImageError("the descriptor states its content ID in an odd way", path=path)
    return bytes(changed)


def with_parent(text: bytes, cid: int | None, name: str, path: str) -> bytes:
    """Return a descriptor with another parent, or without one.

    Parameters
    ----------
    text : bytes
    cid : int or None
        The parent's content ID; None for no parent.
    name : str
        The parent's file name.
    path : str
        For messages.
    """
    wanted = [b"parentCID=%08x" % (NO_PARENT_CID if cid is None else cid)]
    if cid is not None:
        wanted.append(b'parentFileNameHint="%s"' % _encoded(text, name, path))
    lines, newline = _lines(text)
    kept = [line for line in lines if _key(line) not in (b"parentcid", b"parentfilenamehint")]
    after = next((i for i, line in enumerate(kept) if _key(line) == b"cid"), None)
    if after is None:
        raise OptionError("its descriptor states no content ID, so no parent either", path=path)
    kept[after + 1 : after + 1] = wanted
    return newline.join(kept)


def with_size(text: bytes, n_sectors: int, adapter_type: str, path: str) -> bytes:
    """Return the descriptor of a disk of one extent with another size and geometry."""
    numbers = dict(
        zip(
            (b"cylinders", b"heads", b"sectors"),
            disk_geometry(n_sectors, adapter_type),
            strict=True,
        )
    )

    def resized(line: bytes) -> bytes:
        if match := _EXTENT.fullmatch(line):
            return b"%s%d%s" % (match[1], n_sectors, match[2])
        if (match := _GEOMETRY.fullmatch(line)) and match[2].lower() in numbers:
            return b'%s"%d"' % (match[1], numbers[match[2].lower()])
        return line

    changed = _each_line(text, resized)
    if sum(line.nbytes for line in parse_descriptor(changed, path).extents) != (
        n_sectors * SECTOR_NBYTES
    ):
        raise OptionError("the descriptor states the disk's size in an odd way", path=path)
    return changed


def _encoded(text: bytes, name: str, path: str) -> bytes:
    if not name or '"' in name or not name.isprintable():
        raise OptionError(f"a VMDK descriptor cannot hold the name {name[:200]!r}", path=path)
    try:
        return name.encode(encoding_of(text), "surrogateescape")
    except UnicodeEncodeError:
        raise OptionError(
            f"the descriptor's encoding lacks characters of {name[:200]!r}", path=path
        ) from None


def _lines(text: bytes) -> tuple[list[bytes], bytes]:
    """Return the lines, and what ends them."""
    parts = _LINE_END.split(text)
    return parts[::2], parts[1] if len(parts) > 1 else b"\n"


def _each_line(text: bytes, change: Callable[[bytes], bytes]) -> bytes:
    parts = _LINE_END.split(text)
    parts[::2] = [change(line) for line in parts[::2]]
    return b"".join(parts)


def _key(line: bytes) -> bytes:
    return line.partition(b"=")[0].strip().lower()
