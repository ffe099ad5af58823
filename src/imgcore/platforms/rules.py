"""The rules of platforms: those that concern any format, and a table per profile.

Rules about one format are in the ``lint`` module of that format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from imgcore.errors import ImgcoreError
from imgcore.formats.qcow2 import lint as qcow2
from imgcore.formats.registry import stated_format, suffix_of
from imgcore.formats.shared.lint import CHECK_REMEDY, Finding, ImageFacts, Rule
from imgcore.formats.vdi import lint as vdi
from imgcore.formats.vhd import lint as vhd
from imgcore.formats.vmdk import lint as vmdk
from imgcore.limits import GIB, MIB
from imgcore.platforms.profiles import (
    GCE_MEMBER_NAME,
    GCE_SUFFIXES,
    XENSERVER_MAX_VHD_NBYTES,
    Profile,
)

if TYPE_CHECKING:
    from imgcore.streams.tar import Member

# FILE_ATTRIBUTE_SPARSE_FILE and _COMPRESSED ([MS-FSCC] 2.6), as Linux shows them.
_NTFS_ATTRIBUTES: Final = "system.ntfs_attrib_be"
_NTFS_SPARSE, _NTFS_COMPRESSED = 0x200, 0x800


@dataclass
class Facts(ImageFacts):
    """The facts about an image, and the profile to check it against.

    Attributes
    ----------
    profile : Profile
    archive : Member or None
        The first header of a gzip tar archive.
    """

    profile: Profile
    archive: Member | None

    @property
    def virtual_size(self) -> int | None:
        """Bytes of the disk, or of the file in an archive; None if unknown."""
        return super().virtual_size if self.archive is None else self.archive.nbytes

    @property
    def remedy(self) -> str:
        """Convert the image with the profile."""
        return f"convert it with imgcore convert --profile {self.profile.name}"


Check = Callable[[Facts], str | None]


def find_broken(facts: Facts) -> list[Finding]:
    """Return a finding for each rule of the profile that the image breaks."""
    found = (rule.apply(facts) for rule in (*RULES[facts.profile.name], _NAME))
    return [finding for finding in found if finding is not None]


# -- any format ------------------------------------------------------------------------


def _is_readable(facts: Facts) -> str | None:
    # Another rule covers data files.
    if facts.error is None or qcow2.has_data_file(facts):
        return None
    text, path = str(facts.error), facts.file.path
    return f"cannot be read: {text.removeprefix(f'{path}: ')}"


def _takes(allowed: Mapping[str, tuple[str, ...]], words: Mapping[str, str] | None = None) -> Check:
    """Return a check of format and subformat; an empty tuple allows any subformat."""

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
        return f"is {what}{why}; {facts.profile.platform} accepts {', '.join(listed)}"

    return check


def _fits_unit(facts: Facts) -> str | None:
    size, unit = facts.virtual_size, facts.profile.size_unit
    if size is None or size % unit == 0:
        return None
    name = {MIB: "MiB", 2 * MIB: "2 MiB", GIB: "GiB"}.get(unit, f"{unit} bytes")
    return (
        f"the virtual size, {size} bytes, is not a whole number of {name}{vhd.size_source(facts)}"
    )


def _fits_range(facts: Facts) -> str | None:
    size, profile = facts.virtual_size, facts.profile
    if size is None or profile.min_virtual_nbytes <= size <= profile.max_virtual_nbytes:
        return None
    return (
        f"the virtual size, {size} bytes, is not between {profile.min_virtual_nbytes} and "
        f"{profile.max_virtual_nbytes} bytes"
    )


def _only_of(format: str, check: Check) -> Check:
    """Return a check that applies only to images of one format."""
    return lambda facts: check(facts) if facts.format == format else None


def _is_too_large_for_vhd(facts: Facts) -> str | None:
    size = facts.virtual_size
    if size is None or size > XENSERVER_MAX_VHD_NBYTES:
        return None
    return "is qcow2, which is accepted only if the disk is too large for a VHD (2040 GiB)"


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


def _is_named_as_it_is(facts: Facts) -> str | None:
    path = facts.file.path
    if facts.archive is not None and facts.profile.is_archived:
        is_right = path.lower().endswith(GCE_SUFFIXES)
        return None if is_right else f"the name does not end in {' or '.join(GCE_SUFFIXES)}"
    named = stated_format(path)
    if named in (None, facts.format):
        return None
    return f"is {facts.format}, but the name states {named}"


def _usual_name(facts: Facts) -> str:
    is_archive = facts.archive is not None and facts.profile.is_archived
    suffix = GCE_SUFFIXES[0] if is_archive else suffix_of(facts.format)
    return f"rename it: end the name in {suffix}"


# -- the file --------------------------------------------------------------------------


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
    return f"is {facts.format}, not a gzip tar archive with {GCE_MEMBER_NAME} in it"


def _archive_holds_disk(facts: Facts) -> str | None:
    if facts.archive is None or facts.archive.name == GCE_MEMBER_NAME:
        return None
    return f"the first file is named {facts.archive.name[:80]!r}, not {GCE_MEMBER_NAME}"


def _archive_is_old_gnu(facts: Facts) -> str | None:
    if facts.archive is None or facts.archive.is_old_gnu:
        return None
    return "the tar archive is not in the old GNU format"


def _archive_is_sparse(facts: Facts) -> str | None:
    if facts.archive is None or facts.archive.is_sparse or not facts.archive.is_old_gnu:
        return None
    return f"{facts.archive.name[:80]} is not stored as a sparse file"


_TAR: Final = "pack it with tar --format=oldgnu -Sczf IMAGE.tar.gz disk.raw"
_FLATTEN: Final = "imgcore convert merges the whole chain into one image"
_NAME: Final = Rule("name", _is_named_as_it_is, _usual_name)
_READABLE: Final = Rule("readable", _is_readable, CHECK_REMEDY)
_PARENTS: Final = Rule("parents", _parents_open, "without its parents the disk is incomplete")
_UNIT: Final = Rule("size-unit", _fits_unit)
_OTHER_SIZE: Final = "a disk of another size is needed"
_RANGE: Final = Rule("size-range", _fits_range, _OTHER_SIZE)
_NO_PARENT: Final = Rule("no-parent", _has_no_parent, _FLATTEN)

_ESXI_REFUSALS: Final = {
    "monolithicSparse": ", which hosts reject (disk type 2)",
    "twoGbMaxExtentSparse": ", which hosts reject (disk type 7)",
}

RULES: Final[Mapping[str, tuple[Rule[Facts], ...]]] = {
    "azure": (
        _READABLE,
        Rule("format", _takes({"vhd": ("fixed",)})),
        _UNIT,
        _RANGE,
        vhd.SIZE,
        vhd.FILE_SIZE,
        vhd.FOOTER,
        vhd.CHECKSUMS,
    ),
    "hyperv": (
        _READABLE,
        Rule("format", _takes({"vhdx": (), "vhd": ()})),
        _RANGE,
        vhd.LIMIT,
        vhd.CHECKSUMS,
        Rule("plain-file", _is_plain_on_ntfs, "copy it to a file that is neither"),
        _PARENTS,
    ),
    "xenserver": (
        _READABLE,
        Rule("format", _takes({"vhd": ("dynamic", "differencing"), "qcow2": ()})),
        Rule("qcow2", _only_of("qcow2", _is_too_large_for_vhd)),
        _UNIT,
        Rule("size-range", _only_of("vhd", _fits_range), _OTHER_SIZE),
        vhd.UUID,
        vhd.BLOCK_SIZE,
        vhd.CHECKSUMS,
        vhd.HEADER,
        vhd.LOCATORS,
        vhd.FOOTER,
        _PARENTS,
    ),
    "esxi": (
        _READABLE,
        Rule("format", _takes({"vmdk": ("streamOptimized", "vmfs")}, _ESXI_REFUSALS)),
        _NO_PARENT,
        vmdk.STREAM_VERSION,
        vmdk.STREAM_TYPE,
        vmdk.STREAM_KEYS,
        vmdk.STREAM_ORDER,
        vmdk.STREAM_END,
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
        vdi.UUIDS,
        vdi.BLOCK_SIZE,
        vmdk.UUID,
        vmdk.VERSION,
        vmdk.STREAM_LAST_GRAIN,
        vmdk.STREAM_GRAINS,
        _PARENTS,
    ),
    "openstack": (
        _READABLE,
        # A fixed VHD has its magic only at its end, so inspectors take it for raw.
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
        qcow2.DATA_FILE,
        vmdk.ONE_FILE,
    ),
}
