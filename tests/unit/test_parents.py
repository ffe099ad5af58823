"""Windows paths of parent locators as names on this host."""

from __future__ import annotations

import pytest

from imgcore.formats.shared.windows_paths import names_from_windows_path

CASES = {
    "base.vhd": ("base.vhd",),
    r".\base.vhd": ("base.vhd",),
    r".\.\base.vhd": ("base.vhd",),
    r"..\base.vhd": ("../base.vhd", "base.vhd"),
    r".\disks\base.vhd": ("disks/base.vhd", "base.vhd"),
    r"disks\\base.vhd": ("disks/base.vhd", "base.vhd"),
    "disks/base.vhd": ("disks/base.vhd", "base.vhd"),
    r"C:\vm\base disk.vhd": ("base disk.vhd",),
    "C:base.vhd": ("base.vhd",),
    "c:/vm/base.vhd": ("base.vhd",),
    r"\vm\base.vhd": ("base.vhd",),
    "/etc/passwd": ("passwd",),
    r"\\server\share\base.vhd": ("base.vhd",),
    r"\\?\Volume{26a21bda-a627-11d7-9931-806e6f6e6963}\vm\base.vhdx": ("base.vhdx",),
    r"\\?\C:\base.vhdx": ("base.vhdx",),
    "[ds 1] web/base.vmdk": ("base.vmdk",),
    "[ds 1] base.vmdk": ("base.vmdk",),
    "[a]base.vmdk": ("[a]base.vmdk",),
    "größe.vhdx": ("größe.vhdx",),
    r"disks\base.vhd" + "\\": ("disks/base.vhd", "base.vhd"),
    "": (),
    ".": (),
    ".\\": (),
    "\\": (),
    "C:\\": (),
    "C:": (),
    r"C:\vm\..": (),
    r"..\..": (),
}


@pytest.mark.parametrize("text", CASES, ids=repr)
def test_names_from_windows_path(text: str) -> None:
    assert names_from_windows_path(text) == CASES[text]
