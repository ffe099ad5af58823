"""The formats, options and sizes that platforms accept, as data.

Source: the platforms' own documents, named with each profile.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from imgcore.errors import OptionError
from imgcore.limits import GIB, MAX_VIRTUAL_NBYTES, MIB, SECTOR_NBYTES, TIB


class Profile(NamedTuple):
    """The image that `convert` writes for a platform.

    Attributes
    ----------
    name, platform : str
        The name of the profile, and that of the platform in words.
    format : str
        The format to write.
    options : mapping of str to tuple
        The allowed values of options; the first one is the default.
    size_unit : int
        Bytes; the virtual size is rounded up to a multiple of it.
    min_virtual_nbytes, max_virtual_nbytes : int
        The sizes of disks that the platform accepts.
    allows_backing : bool
        Whether the image may have a parent.
    is_archived : bool
        Whether the image is put into an archive.
    note : str
        Why this format was chosen, if the platform accepts several.
    """

    name: str
    platform: str
    format: str
    options: Mapping[str, tuple[Any, ...]] = MappingProxyType({})
    size_unit: int = SECTOR_NBYTES
    min_virtual_nbytes: int = 0
    max_virtual_nbytes: int = MAX_VIRTUAL_NBYTES
    allows_backing: bool = False
    is_archived: bool = False
    note: str = ""


# The only file in an archive for Compute Engine, and the suffixes of such archives.
GCE_MEMBER_NAME: Final = "disk.raw"
GCE_SUFFIXES: Final = (".tar.gz", ".tgz")

# XenServer's limit for VHDs: the largest size of a dynamic VHD.
XENSERVER_MAX_VHD_NBYTES: Final = 2040 * GIB

PROFILES: Final = (
    # Microsoft Learn, "Prepare a Windows VHD or VHDX to upload to Azure", "Create and
    # upload a generalized Linux VHD": fixed, whole MiB, 20 MiB to 32 TiB.
    Profile(
        name="azure",
        platform="Microsoft Azure",
        format="vhd",
        options={"subformat": ("fixed",), "size": ("current",)},
        size_unit=MIB,
        min_virtual_nbytes=20 * MIB,
        max_virtual_nbytes=32 * TIB,
    ),
    # Microsoft Learn, "Hyper-V virtual hard disk format overview".
    Profile(
        name="hyperv",
        platform="Hyper-V and Windows",
        format="vhdx",
        options={"subformat": ("dynamic",)},
        max_virtual_nbytes=64 * TIB,
        allows_backing=True,
        note="virtual machines of generation 2 take VHDX only",
    ),
    # XenServer SDK guide, "VHD disk format"; xapi-project, storage.
    Profile(
        name="xenserver",
        platform="XenServer and XCP-ng",
        format="vhd",
        options={
            "subformat": ("dynamic",),
            "size": ("current",),
            "block_size": (2 * MIB,),
            "batmap": (False, True),
        },
        size_unit=2 * MIB,
        max_virtual_nbytes=XENSERVER_MAX_VHD_NBYTES,
        allows_backing=True,
    ),
    # VMware, "Virtual Disk Format 5.0", "Virtual Disk Development Kit Programming
    # Guide".
    Profile(
        name="esxi",
        platform="VMware ESXi and vCenter",
        format="vmdk",
        options={"subformat": ("streamOptimized", "vmfs")},
        note="streamOptimized is for imports (vCenter, ovftool); a disk that is copied to a "
        "datastore and attached directly must be vmfs",
    ),
    # AWS, "VM Import/Export User Guide", image formats.
    Profile(
        name="aws",
        platform="AWS VM Import",
        format="vmdk",
        options={"subformat": ("streamOptimized",)},
    ),
    # Google Cloud, "Manually import boot disks": disk.raw, whole GiB, tar in old GNU
    # format.
    Profile(
        name="gce",
        platform="Google Compute Engine",
        format="raw",
        options={"preallocation": ("off",)},
        size_unit=GIB,
        is_archived=True,
    ),
    # VirtualBox manual, "Disk image files".
    Profile(
        name="virtualbox",
        platform="VirtualBox",
        format="vdi",
        allows_backing=True,
    ),
    # OpenStack Glance, "Disk and container formats"; OSSA-2024-001 forbids backing
    # files and data files.
    Profile(
        name="openstack",
        platform="OpenStack and KubeVirt",
        format="qcow2",
    ),
)


def profile_names() -> tuple[str, ...]:
    """Return the names of all profiles."""
    return tuple(profile.name for profile in PROFILES)


def get_profile(name: str) -> Profile:
    """Return a profile by its name; OptionError if it does not exist."""
    for profile in PROFILES:
        if profile.name == name:
            return profile
    raise OptionError(f"unknown profile {name!r}; known profiles: {', '.join(profile_names())}")


def apply_options(profile: Profile, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options to write with; OptionError if the profile forbids one.

    Parameters
    ----------
    profile : Profile
    given : mapping
        The caller's options, with values of their types.
    """
    chosen = {key: values[0] for key, values in profile.options.items()}
    for key, value in given.items():
        allowed = profile.options.get(key)
        if allowed is not None and value not in allowed:
            texts = " or ".join(f"{key}={_text(item)}" for item in allowed)
            raise OptionError(
                f"the profile {profile.name} requires {texts}, not {key}={_text(value)}"
            )
        chosen[key] = value
    return chosen


def _text(value: object) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def rounded_size(profile: Profile, virtual_size: int) -> int:
    """Return the size of a disk in bytes, rounded up to the platform's unit."""
    return -(-virtual_size // profile.size_unit) * profile.size_unit
