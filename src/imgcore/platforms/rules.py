"""What a platform's profile demands of an image: small functions, and a table of which apply where.

A rule looks at facts and returns what is wrong, or None.  It says nothing of images of other
formats than its own: that they are of another format is a rule of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, cast

from imgcore.errors import CorruptImageError, ImgcoreError
from imgcore.limits import (
    GIB,
    MIB,
    VDI_MAX_WRITTEN_BLOCK_NBYTES,
    VDI_MIN_WRITTEN_BLOCK_NBYTES,
)
from imgcore.platforms.profiles import GCE_MEMBER_NAME, XENSERVER_MAX_VHD_NBYTES, Profile
from imgcore.text import one_line

if TYPE_CHECKING:
    from imgcore.files.host_file import HostFile
    from imgcore.formats.api import Reader
    from imgcore.formats.vhd.header import FooterPlace
    from imgcore.formats.vhd.layout import DynamicHeader
    from imgcore.formats.vmdk.lint import StreamLayout
    from imgcore.formats.vmdk.reader import VmdkReader
    from imgcore.streams.tar import Member

_MAX_VHD_BLOCK_NBYTES: Final = 2 * MIB
_NULL_UUID: Final = "00000000-0000-0000-0000-000000000000"
_READ_NBYTES: Final = 16 * MIB
# NTFS as Linux shows it: FILE_ATTRIBUTE_SPARSE_FILE and _COMPRESSED ([MS-FSCC] 2.6).
_NTFS_ATTRIBUTES: Final = "system.ntfs_attrib_be"
_NTFS_SPARSE, _NTFS_COMPRESSED = 0x200, 0x800
_CHECK_REMEDY: Final = "imgcore check may tell more"


@dataclass(frozen=True)
class Finding:
    """A broken rule: its name, what is wrong, what to do about it; one line each."""

    rule: str
    message: str
    remedy: str


@dataclass
class Facts:
    """What rules look at.

    ``reader`` is None if the image cannot be opened: ``error`` says why, unless ``format`` is none
    that has a reader.  ``archive`` is what a gzip file's first tar header says.
    """

    file: HostFile
    profile: Profile
    format: str
    reader: Reader | None
    error: ImgcoreError | None
    archive: Member | None
    open_chain: Callable[[], Any]

    @property
    def subformat(self) -> str | None:
        """Kind within the format."""
        return None if self.reader is None else self.reader.subformat

    @property
    def virtual_size(self) -> int | None:
        """Bytes of the disk, of an archive those of its file; None if not known."""
        if self.archive is not None:
            return self.archive.nbytes
        return None if self.reader is None else self.reader.virtual_size

    @cached_property
    def specific(self) -> Mapping[str, Any]:
        """What `info` says about the format in particular."""
        if self.reader is None:
            return {}
        info = self.reader.info()
        return cast("Mapping[str, Any]", info.get("format-specific", {}).get("data", info))

    @cached_property
    def vhd_footers(self) -> tuple[FooterPlace | None, FooterPlace | None]:
        """The footer at the end of a VHD and its copy at the start."""
        from imgcore.formats.vhd.header import find_footers

        return find_footers(self.file)

    @cached_property
    def vhd_header(self) -> DynamicHeader | None:
        """The dynamic disk header of a readable VHD, None for a fixed one."""
        from imgcore.formats.vhd import layout

        sound = [place for place in self.vhd_footers if place is not None and not place.problem]
        if self.subformat not in ("dynamic", "differencing") or not sound:
            return None
        raw = self.file.pread(sound[0].footer.data_offset, layout.HEADER_NBYTES)
        return layout.DynamicHeader._make(layout.HEADER.unpack_from(raw))

    @property
    def stream(self) -> VmdkReader | None:
        """The reader of a streamOptimized VMDK."""
        is_stream = self.format == "vmdk" and self.subformat == "streamOptimized"
        return cast("VmdkReader", self.reader) if is_stream else None

    @cached_property
    def stream_layout(self) -> StreamLayout | None:
        """Where the grains of a streamOptimized VMDK lie."""
        from imgcore.formats.vmdk.lint import stream_layout

        return None if self.stream is None else stream_layout(self.file, self.stream)


Check = Callable[[Facts], str | None]


@dataclass(frozen=True)
class Rule:
    """One demand; ``remedy`` is a text, empty for converting with the profile."""

    name: str
    check: Check
    remedy: str | Callable[[Facts], str] = ""

    def apply(self, facts: Facts) -> Finding | None:
        """Return what is wrong, or None; damage or a missing parent in the way is a finding too."""
        try:
            message = self.check(facts)
        except (ImgcoreError, FileNotFoundError) as error:
            return Finding(self.name, f"cannot be verified: {error}", _CHECK_REMEDY)
        if message is None:
            return None
        remedy = self.remedy if isinstance(self.remedy, str) else self.remedy(facts)
        return Finding(self.name, one_line(message), remedy or _convert(facts))


def _convert(facts: Facts) -> str:
    return f"imgcore convert --profile {facts.profile.name} makes one that is right"


# -- any format --------------------------------------------------------------------------


def _is_readable(facts: Facts) -> str | None:
    if facts.error is None or _has_data_file(facts):
        return None
    text, path = str(facts.error), facts.file.path
    return f"cannot be read: {text.removeprefix(f'{path}: ')}"


def _takes(allowed: Mapping[str, tuple[str, ...]], words: Mapping[str, str] | None = None) -> Check:
    """Return a check of format and subformat; an empty tuple allows all of the latter."""

    def check(facts: Facts) -> str | None:
        subformats = allowed.get(facts.format)
        is_taken = subformats is not None and (
            facts.reader is None or not subformats or facts.subformat in subformats
        )
        if is_taken:
            return None
        what = " ".join(filter(None, (facts.subformat, facts.format)))
        why = (words or {}).get(facts.subformat or "", "")
        listed = (
            " or ".join(kinds) + f" {name}" if kinds else name for name, kinds in allowed.items()
        )
        return f"is {what}{why}; {facts.profile.platform} takes {', '.join(listed)}"

    return check


def _fits_unit(facts: Facts) -> str | None:
    size, unit = facts.virtual_size, facts.profile.size_unit
    if size is None or size % unit == 0:
        return None
    note = ""
    if facts.format == "vhd" and facts.specific["size"]["chs"] == size:
        note = ", but what its geometry says (cylinders, heads and sectors)"
    name = {MIB: "MiB", 2 * MIB: "2 MiB", GIB: "GiB"}.get(unit, f"{unit} bytes")
    return f"the virtual size, {size} bytes, is no whole number of {name}{note}"


def _fits_range(facts: Facts) -> str | None:
    size, profile = facts.virtual_size, facts.profile
    if size is None or profile.min_virtual_nbytes <= size <= profile.max_virtual_nbytes:
        return None
    if profile.name == "xenserver" and facts.format != "vhd":
        return None
    return (
        f"the virtual size, {size} bytes, is not between {profile.min_virtual_nbytes} and "
        f"{profile.max_virtual_nbytes} bytes"
    )


def _has_no_parent(facts: Facts) -> str | None:
    if facts.reader is None or facts.reader.backing is None:
        return None
    return f"has a parent (backing file), {facts.reader.backing.name!r}"


def _parents_open(facts: Facts) -> str | None:
    if facts.reader is None or facts.reader.backing is None:
        return None
    try:
        facts.open_chain().close()
    except (ImgcoreError, OSError) as error:
        return f"its parent cannot be opened: {error}"
    return None


# -- VHD ---------------------------------------------------------------------------------


def _vhd_size_is_one(facts: Facts) -> str | None:
    from imgcore.formats.vhd.layout import CHS_CREATORS

    footer = facts.vhd_footers[0] if facts.format == "vhd" else None
    if facts.reader is None or footer is None or footer.footer.creator not in CHS_CREATORS:
        return None
    size = facts.specific["size"]
    if size["current"] == size["chs"]:
        return None
    return (
        f"its geometry says {size['chs']} bytes and its current size {size['current']}; of a disk "
        f"created by {facts.specific['creator']!r} some take the one, some the other"
    )


def _vhd_file_is_exact(facts: Facts) -> str | None:
    from imgcore.formats.vhd.layout import FOOTER_NBYTES

    if facts.format != "vhd" or facts.subformat != "fixed" or facts.virtual_size is None:
        return None
    expected = facts.virtual_size + FOOTER_NBYTES
    if facts.file.nbytes == expected:
        return None
    return f"the file has {facts.file.nbytes} bytes, disk and footer are {expected}"


def _vhd_footer_is_last(facts: Facts) -> str | None:
    from imgcore.formats.vhd.layout import FOOTER_NBYTES

    if facts.format != "vhd":
        return None
    end = facts.vhd_footers[0]
    if end is not None and end.offset == facts.file.nbytes - FOOTER_NBYTES:
        return None
    return f"the last {FOOTER_NBYTES} bytes are no footer"


def _vhd_footers_are_sound(facts: Facts) -> str | None:
    if facts.format != "vhd":
        return None
    for place in facts.vhd_footers:
        if place is not None and place.problem is not None:
            return str(place.problem).removeprefix(f"{facts.file.path}: ")
    if facts.vhd_header is not None and facts.vhd_footers[1] is None:
        return "the copy of the footer at the start is missing"
    return None


def _vhd_header_is_strict(facts: Facts) -> str | None:
    from imgcore.formats.vhd import layout

    header = facts.vhd_header
    if header is None:
        return None
    if header.version != layout.VERSION:
        return f"the dynamic disk header has version {header.version:#010x}, not 0x00010000"
    if header.data_offset != layout.NO_OFFSET:
        return f"the dynamic disk header has data offset {header.data_offset:#x}, not all ones"
    return None


def _vhd_locators_are_sound(facts: Facts) -> str | None:
    from imgcore.formats.vhd.header import parent_texts, read_header

    if facts.format != "vhd" or facts.subformat != "differencing":
        return None
    _, problems = parent_texts(facts.file, read_header(facts.file))
    return problems[0].reason if problems else None


def _vhd_blocks_are_small(facts: Facts) -> str | None:
    header = facts.vhd_header
    if header is None or header.block_nbytes <= _MAX_VHD_BLOCK_NBYTES:
        return None
    return f"blocks of {header.block_nbytes} bytes, at most {_MAX_VHD_BLOCK_NBYTES} are read"


def _vhd_has_uuid(facts: Facts) -> str | None:
    if facts.format != "vhd" or facts.specific.get("uuid") != _NULL_UUID:
        return None
    return "its UUID is zero"


def _vhd_is_small(facts: Facts) -> str | None:
    size = facts.virtual_size
    if facts.format != "vhd" or size is None or size <= XENSERVER_MAX_VHD_NBYTES:
        return None
    return f"a VHD of {size} bytes, at most {XENSERVER_MAX_VHD_NBYTES} (2040 GiB) are read"


def _qcow2_is_needed(facts: Facts) -> str | None:
    size = facts.virtual_size
    if facts.format != "qcow2" or size is None or size > XENSERVER_MAX_VHD_NBYTES:
        return None
    return "is qcow2, which is taken only where the disk is too large for a VHD (2040 GiB)"


# -- VMDK --------------------------------------------------------------------------------

# Keys of the descriptor, as VMware writes them.
_STREAM_KEYS: Final = (
    "encoding",
    "ddb.adapterType",
    "ddb.longContentID",
    "ddb.toolsInstallType",
    "ddb.toolsVersion",
    "ddb.virtualHWVersion",
)
_STREAM_VERSION: Final = 3


def _stream_is_version_3(facts: Facts) -> str | None:
    sparse = facts.stream.disk_extents[0].sparse if facts.stream is not None else None
    if sparse is None or sparse.version == _STREAM_VERSION:
        return None
    return f"the header has version {sparse.version}, not {_STREAM_VERSION}"


def _stream_says_so(facts: Facts) -> str | None:
    if facts.stream is None or facts.stream.descriptor.create_type == "streamOptimized":
        return None
    return f"is streamOptimized, but its descriptor says {facts.stream.descriptor.create_type!r}"


def _stream_has_keys(facts: Facts) -> str | None:
    if facts.stream is None:
        return None
    missing = [key for key in _STREAM_KEYS if key.lower() not in facts.stream.descriptor.values]
    return f"the descriptor lacks {', '.join(missing)}" if missing else None


def _stream_ends_at_its_end(facts: Facts) -> str | None:
    layout = facts.stream_layout
    if layout is None or layout.end is None or layout.end == facts.file.nbytes:
        return None
    if layout.end > facts.file.nbytes:
        return "the file ends without an end-of-stream marker"
    return (
        f"{facts.file.nbytes - layout.end} bytes follow the end-of-stream marker, which ends at "
        f"{layout.end:#x}"
    )


def _end_stream(facts: Facts) -> str:
    assert facts.stream_layout is not None
    assert facts.stream_layout.end is not None
    if facts.stream_layout.end > facts.file.nbytes:
        return _convert(facts)
    return f"truncate -s {facts.stream_layout.end} puts it right"


def _stream_ascends(facts: Facts) -> str | None:
    layout = facts.stream_layout
    if layout is None or layout.disorder is None:
        return None
    return f"the grain of guest offset {layout.disorder:#x} lies before the one before it"


def _stream_inflates(facts: Facts) -> str | None:
    if facts.stream is None:
        return None
    buffer = memoryview(bytearray(_READ_NBYTES))
    try:
        with facts.open_chain() as image:
            for offset in range(0, image.virtual_size, _READ_NBYTES):
                image.readinto(offset, buffer[: min(_READ_NBYTES, image.virtual_size - offset)])
    except CorruptImageError as error:
        return f"not every grain inflates: {error}"
    return None


def _stream_ends_in_whole_grain(facts: Facts) -> str | None:
    extent = facts.stream.disk_extents[0] if facts.stream is not None else None
    if extent is None or extent.sparse is None or not extent.short_nbytes:
        return None
    return (
        f"the last grain holds {extent.short_nbytes} bytes, where VirtualBox wants all "
        f"{extent.sparse.grain_nbytes}"
    )


def _vmdk_uuid_is_none(facts: Facts) -> str | None:
    if facts.format != "vmdk" or facts.reader is None:
        return None
    values = cast("VmdkReader", facts.reader).descriptor.values
    if values.get("ddb.uuid.image") != _NULL_UUID:
        return None
    return "ddb.uuid.image is zero"


def _vmdk_version_is_known(facts: Facts) -> str | None:
    if facts.format != "vmdk" or facts.reader is None:
        return None
    sparse = [item.sparse for item in cast("VmdkReader", facts.reader).disk_extents]
    odd = [item.version for item in sparse if item is not None and item.version not in (1, 3)]
    return f"an extent of version {odd[0]}, read are 1 and 3" if odd else None


def _vmdk_is_one_file(facts: Facts) -> str | None:
    if facts.format != "vmdk" or facts.reader is None:
        return None
    files = {source.file.identity for source in facts.reader.sources} | {facts.file.identity}
    return f"consists of {len(files)} files" if len(files) > 1 else None


# -- the others --------------------------------------------------------------------------


def _has_data_file(facts: Facts) -> bool:
    from imgcore.formats.qcow2 import layout

    if facts.format != "qcow2" or facts.file.nbytes < layout.HEADER_V3_MIN_NBYTES:
        return False
    head = facts.file.pread(0, layout.HEADER_V3_MIN_NBYTES)
    features = int.from_bytes(head[layout.HEADER_V2_NBYTES : layout.HEADER_V2_NBYTES + 8], "big")
    is_version_3 = int.from_bytes(head[4:8], "big") >= 3
    return is_version_3 and bool(features & layout.INCOMPATIBLE_DATA_FILE)


def _qcow2_is_one_file(facts: Facts) -> str | None:
    return "has an external data file" if _has_data_file(facts) else None


def _vdi_has_uuids(facts: Facts) -> str | None:
    if facts.format != "vdi" or facts.reader is None:
        return None
    names = [name for name in ("uuid", "modification-uuid") if facts.specific[name] == _NULL_UUID]
    return f"zero where VirtualBox wants a UUID: {', '.join(names)}" if names else None


def _vdi_blocks_fit(facts: Facts) -> str | None:
    if facts.format != "vdi" or facts.reader is None:
        return None
    low, high = VDI_MIN_WRITTEN_BLOCK_NBYTES, VDI_MAX_WRITTEN_BLOCK_NBYTES
    nbytes = facts.reader.block_nbytes
    return None if low <= nbytes <= high else f"blocks of {nbytes} bytes, read are {low} to {high}"


def _is_plain_on_ntfs(facts: Facts) -> str | None:
    try:
        attributes = int.from_bytes(facts.file.attribute(_NTFS_ATTRIBUTES), "big")
    except OSError:
        return None  # not on NTFS
    kinds = [("sparse", _NTFS_SPARSE), ("compressed", _NTFS_COMPRESSED)]
    found = [name for name, bit in kinds if attributes & bit]
    return f"the file is {' and '.join(found)} on NTFS (error 0xC03A001A)" if found else None


def _is_archive(facts: Facts) -> str | None:
    if facts.archive is not None:
        return None
    return f"is {facts.format}, no gzip tar with {GCE_MEMBER_NAME} in it"


def _archive_holds_disk(facts: Facts) -> str | None:
    if facts.archive is None or facts.archive.name == GCE_MEMBER_NAME:
        return None
    return f"the first file is named {facts.archive.name[:80]!r}, not {GCE_MEMBER_NAME}"


def _archive_is_old_gnu(facts: Facts) -> str | None:
    if facts.archive is None or facts.archive.is_old_gnu:
        return None
    return "the tar archive is not of the old GNU format"


def _archive_is_sparse(facts: Facts) -> str | None:
    if facts.archive is None or facts.archive.is_sparse or not facts.archive.is_old_gnu:
        return None
    return f"{facts.archive.name[:80]} is not stored as a sparse file"


_TAR: Final = "tar --format=oldgnu -Sczf IMAGE.tar.gz disk.raw packs it right"
_FLATTEN: Final = "imgcore convert makes one image of the whole chain"
_READABLE: Final = Rule("readable", _is_readable, _CHECK_REMEDY)
_PARENTS: Final = Rule("parents", _parents_open, "--parent names it, --allow permits its folder")
_UNIT: Final = Rule("size-unit", _fits_unit)
_RANGE: Final = Rule("size-range", _fits_range, "a disk of another size is needed")
_NO_PARENT: Final = Rule("no-parent", _has_no_parent, _FLATTEN)
_VHD_FOOTERS: Final = Rule(
    "vhd-checksums", _vhd_footers_are_sound, "imgcore check --repair, or convert"
)

_ESXI_REFUSALS: Final = {
    "monolithicSparse": ", which hosts refuse (disk type 2)",
    "twoGbMaxExtentSparse": ", which hosts refuse (disk type 7)",
}

RULES: Final[Mapping[str, tuple[Rule, ...]]] = {
    "azure": (
        _READABLE,
        Rule("format", _takes({"vhd": ("fixed",)})),
        _UNIT,
        _RANGE,
        Rule("vhd-size", _vhd_size_is_one),
        Rule("vhd-file-size", _vhd_file_is_exact),
        Rule("vhd-footer", _vhd_footer_is_last),
        _VHD_FOOTERS,
    ),
    "hyperv": (
        _READABLE,
        Rule("format", _takes({"vhdx": (), "vhd": ()})),
        _RANGE,
        Rule("vhd-limit", _vhd_is_small),
        _VHD_FOOTERS,
        Rule("plain-file", _is_plain_on_ntfs, "copy it to a file that is neither"),
        _PARENTS,
    ),
    "xenserver": (
        _READABLE,
        Rule("format", _takes({"vhd": ("dynamic", "differencing"), "qcow2": ()})),
        Rule("qcow2", _qcow2_is_needed),
        _UNIT,
        _RANGE,
        Rule("vhd-uuid", _vhd_has_uuid),
        Rule("vhd-block-size", _vhd_blocks_are_small),
        _VHD_FOOTERS,
        Rule("vhd-header", _vhd_header_is_strict),
        Rule("vhd-locators", _vhd_locators_are_sound),
        Rule("vhd-footer", _vhd_footer_is_last),
        _PARENTS,
    ),
    "esxi": (
        _READABLE,
        Rule("format", _takes({"vmdk": ("streamOptimized", "vmfs")}, _ESXI_REFUSALS)),
        _NO_PARENT,
        Rule("stream-version", _stream_is_version_3),
        Rule("stream-type", _stream_says_so),
        Rule("stream-keys", _stream_has_keys),
        Rule("stream-order", _stream_ascends),
        Rule("stream-end", _stream_ends_at_its_end, _end_stream),
    ),
    "aws": (
        _READABLE,
        Rule(
            "format",
            _takes(
                {
                    "vmdk": ("streamOptimized",),
                    "vhd": ("fixed", "dynamic"),
                    "vhdx": ("fixed", "dynamic"),
                    "raw": (),
                }
            ),
        ),
        _NO_PARENT,
    ),
    "gce": (
        Rule("archive", _is_archive),
        Rule("archive-name", _archive_holds_disk, _TAR),
        Rule("archive-format", _archive_is_old_gnu, _TAR),
        Rule("archive-sparse", _archive_is_sparse, _TAR),
        _UNIT,
    ),
    "virtualbox": (
        _READABLE,
        Rule("format", _takes({"vdi": (), "vmdk": (), "vhd": ()})),
        Rule("vdi-uuid", _vdi_has_uuids),
        Rule("vdi-block-size", _vdi_blocks_fit),
        Rule("vmdk-uuid", _vmdk_uuid_is_none, "take ddb.uuid.image out, or give it a new value"),
        Rule("vmdk-version", _vmdk_version_is_known),
        Rule("stream-last-grain", _stream_ends_in_whole_grain),
        Rule("stream-grains", _stream_inflates, "the data of these grains is lost: copy it again"),
        _PARENTS,
    ),
    "openstack": (
        _READABLE,
        # A fixed VHD has its magic at the end only: their inspectors take it for raw.
        Rule(
            "format",
            _takes(
                {
                    "qcow2": (),
                    "raw": (),
                    "vmdk": (),
                    "vhd": ("dynamic", "differencing"),
                    "vhdx": (),
                    "vdi": (),
                }
            ),
        ),
        _NO_PARENT,
        Rule("qcow2-data-file", _qcow2_is_one_file),
        Rule("vmdk-files", _vmdk_is_one_file),
    ),
}
