"""Lint rules for VMDK."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from imgcore.errors import CorruptImageError
from imgcore.formats.shared.lint import Rule
from imgcore.formats.vmdk.reader import VmdkReader
from imgcore.limits import MIB

if TYPE_CHECKING:
    from imgcore.formats.shared.lint import ImageFacts
    from imgcore.formats.vmdk.stream_layout import StreamLayout

# Keys in descriptors by VMware.
_STREAM_KEYS: Final = (
    "encoding",
    "ddb.adapterType",
    "ddb.longContentID",
    "ddb.toolsInstallType",
    "ddb.toolsVersion",
    "ddb.virtualHWVersion",
)
_STREAM_VERSION: Final = 3
_VERSIONS: Final = (1, 3)
_NULL_UUID: Final = "00000000-0000-0000-0000-000000000000"
_READ_NBYTES: Final = 16 * MIB


def _stream(facts: ImageFacts) -> VmdkReader | None:
    """Return the reader if the disk is streamOptimized, which has one extent."""
    reader = facts.reader
    if isinstance(reader, VmdkReader) and reader.subformat == "streamOptimized":
        return reader
    return None


def _layout(facts: ImageFacts) -> StreamLayout | None:
    stream = _stream(facts)
    return None if stream is None else stream.stream_layout


def _stream_is_version_3(facts: ImageFacts) -> str | None:
    stream = _stream(facts)
    sparse = None if stream is None else stream.disk_extents[0].sparse
    if sparse is None or sparse.version == _STREAM_VERSION:
        return None
    return f"the header has version {sparse.version}, not {_STREAM_VERSION}"


def _stream_has_type(facts: ImageFacts) -> str | None:
    stream = _stream(facts)
    if stream is None or stream.descriptor.create_type == "streamOptimized":
        return None
    return f"is streamOptimized, but its descriptor says {stream.descriptor.create_type!r}"


def _stream_has_keys(facts: ImageFacts) -> str | None:
    stream = _stream(facts)
    if stream is None:
        return None
    missing = [key for key in _STREAM_KEYS if key.lower() not in stream.descriptor.values]
    return f"the descriptor lacks {', '.join(missing)}" if missing else None


def _stream_ascends(facts: ImageFacts) -> str | None:
    layout = _layout(facts)
    if layout is None or layout.disorder is None:
        return None
    return f"the grain of guest offset {layout.disorder:#x} is stored before its predecessor"


def _stream_ends_at_its_end(facts: ImageFacts) -> str | None:
    layout = _layout(facts)
    if layout is None or layout.end is None or layout.end == facts.file.nbytes:
        return None
    if layout.end > facts.file.nbytes:
        return "the file ends without an end-of-stream marker"
    return (
        f"{facts.file.nbytes - layout.end} bytes follow the end-of-stream marker, which ends at "
        f"{layout.end:#x}"
    )


def _end_stream(facts: ImageFacts) -> str:
    """Return how to cut off bytes after the stream; empty if none follow."""
    layout = _layout(facts)
    if layout is None or layout.end is None or layout.end > facts.file.nbytes:
        return ""
    return f"truncate -s {layout.end} fixes it"


def _stream_inflates(facts: ImageFacts) -> str | None:
    if _stream(facts) is None:
        return None
    buffer = memoryview(bytearray(_READ_NBYTES))
    try:
        with facts.open_chain() as image:
            for offset in range(0, image.virtual_size, _READ_NBYTES):
                image.readinto(offset, buffer[: min(_READ_NBYTES, image.virtual_size - offset)])
    except CorruptImageError as error:
        return f"a grain does not inflate: {error}"
    return None


def _stream_ends_in_whole_grain(facts: ImageFacts) -> str | None:
    stream = _stream(facts)
    extent = None if stream is None else stream.disk_extents[0]
    if extent is None or extent.sparse is None or not extent.short_nbytes:
        return None
    return (
        f"the last grain holds {extent.short_nbytes} bytes, VirtualBox requires all "
        f"{extent.sparse.grain_nbytes}"
    )


def _uuid_is_none(facts: ImageFacts) -> str | None:
    if not isinstance(facts.reader, VmdkReader):
        return None
    is_zero = facts.reader.descriptor.values.get("ddb.uuid.image") == _NULL_UUID
    return "ddb.uuid.image is zero" if is_zero else None


def _version_is_known(facts: ImageFacts) -> str | None:
    if not isinstance(facts.reader, VmdkReader):
        return None
    sparse = [item.sparse for item in facts.reader.disk_extents]
    odd = [item.version for item in sparse if item is not None and item.version not in _VERSIONS]
    return f"an extent of version {odd[0]}, allowed are 1 and 3" if odd else None


def _is_one_file(facts: ImageFacts) -> str | None:
    if not isinstance(facts.reader, VmdkReader):
        return None
    files = {source.file.identity for source in facts.reader.sources} | {facts.file.identity}
    return f"consists of {len(files)} files" if len(files) > 1 else None


STREAM_VERSION: Final = Rule("stream-version", _stream_is_version_3)
STREAM_TYPE: Final = Rule("stream-type", _stream_has_type)
STREAM_KEYS: Final = Rule("stream-keys", _stream_has_keys)
STREAM_ORDER: Final = Rule("stream-order", _stream_ascends)
STREAM_END: Final = Rule("stream-end", _stream_ends_at_its_end, _end_stream)
STREAM_LAST_GRAIN: Final = Rule("stream-last-grain", _stream_ends_in_whole_grain)
STREAM_GRAINS: Final = Rule(
    "stream-grains", _stream_inflates, "the data of these grains is lost: copy the image again"
)
UUID: Final = Rule("vmdk-uuid", _uuid_is_none, "remove ddb.uuid.image, or give it a new value")
VERSION: Final = Rule("vmdk-version", _version_is_known)
ONE_FILE: Final = Rule("vmdk-files", _is_one_file)
