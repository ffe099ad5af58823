"""The magic of each format: how its files start or end.

Formats that cannot be read are listed too, so that an error can name them.  Nothing
here ever means raw.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, NamedTuple

HEAD_NBYTES: Final = 64 * 1024
TAIL_NBYTES: Final = 1024


class Magic(NamedTuple):
    """Bytes that only files of one format have at an offset.

    A negative offset counts from the end of the file.
    """

    format_name: str
    offset: int
    value: bytes


MAGICS: Final = (
    # QEMU docs/interop/qcow2.rst, "Header"; version 1 is another format.
    Magic("qcow", 0, b"QFI\xfb\x00\x00\x00\x01"),
    # VMware Virtual Disk Format 1.1, "Hosted Sparse Extents", "ESX Server Sparse
    # Extents".
    Magic("vmdk", 0, b"KDMV"),
    Magic("vmdk", 0, b"COWD"),
    # The seSparse extent of newer ESXi versions (QEMU block/vmdk.c).
    Magic("vmdk", 0, b"\xbe\xba\xfe\xca\x00\x00\x00\x00"),
    # Virtual Hard Disk Image Format Specification, "Hard Disk Footer Format"; old
    # versions of Virtual PC wrote footers of 511 bytes.
    Magic("vhd", 0, b"conectix"),
    Magic("vhd", -512, b"conectix"),
    Magic("vhd", -511, b"conectix"),
    # [MS-VHDX] 2.2.1, "File Type Identifier".
    Magic("vhdx", 0, b"vhdxfile"),
    # VirtualBox src/VBox/Storage/VDICore.h: the image signature follows 64 bytes of
    # text.
    Magic("vdi", 0x40, b"\x7f\x10\xda\xbe"),
    # QEMU block/: parallels.c, bochs.c, qed.c, luks (cryptsetup's LUKS on-disk format),
    # dmg.c.
    Magic("parallels", 0, b"WithoutFreeSpace"),
    Magic("parallels", 0, b"WithouFreSpacExt"),
    Magic("bochs", 0, b"Bochs Virtual HD Image"),
    Magic("qed", 0, b"QED\x00"),
    Magic("luks", 0, b"LUKS\xba\xbe"),
    Magic("dmg", -512, b"koly"),
    Magic("cloop", 0, b"#!/bin/sh\n#V2.0 Format\n"),
    # Other containers of disks and files: Android's libsparse (sparse_format.h), libewf
    # (EWF-E01), Proxmox's VMA, partclone's image format 2, [MS-WIM].
    Magic("android-sparse", 0, b"\x3a\xff\x26\xed"),
    Magic("ewf", 0, b"EVF\x09\r\n\xff\x00"),
    Magic("vma", 0, b"VMA\x00"),
    Magic("partclone", 0, b"partclone-image"),
    Magic("wim", 0, b"MSWIM\x00\x00\x00"),
    # Archives and compressed streams: APPNOTE.TXT 4.3.7, 7zFormat.txt, RFC 1952, RFC
    # 8878, the .xz file format, LZ4's frame format.
    Magic("zip", 0, b"PK\x03\x04"),
    Magic("7z", 0, b"7z\xbc\xaf\x27\x1c"),
    Magic("gzip", 0, b"\x1f\x8b\x08"),
    Magic("zstd", 0, b"\x28\xb5\x2f\xfd"),
    Magic("xz", 0, b"\xfd7zXZ\x00"),
    Magic("lz4", 0, b"\x04\x22\x4d\x18"),
)

# Content of raw disks that a message may name.  It is no magic: the disk is raw.
_RAW_CONTENT: Final = (
    # ECMA-119, 8.1.2: the descriptor of the volume in sector 16 of 2048 bytes.
    (0x8001, b"CD001", "an ISO 9660 file system (a CD or DVD)"),
    # libbde, "BitLocker Drive Encryption (BDE) format".
    (3, b"-FVE-FS-", "a BitLocker volume, which stays encrypted"),
)

# A VMDK descriptor may begin with comments and blank lines.  Then come version=1, 2 or
# 3 (QEMU block/vmdk.c, vmdk_probe).
_VMDK_TEXT: Final = (
    rb"(?:[ \t]*(?:#[^\n\0]{0,4096})?\r?\n){0,256}version[ \t]*=[ \t]*[123][ \t]*\r?\n"
)
_VMDK_FIRST_LINE: Final = rb"(?i:(?:\xef\xbb\xbf)?#[ \t]*Disk[ \t]*DescriptorFile)"
# The text that stands for a disk or machine which VMware Workstation has encrypted.
_VMWARE_ENCRYPTED: Final = (
    rb"(?:[ \t]*(?:#[^\n]{0,4096}|\.encoding[^\n]{0,200})?\r?\n){0,64}"
    rb"[ \t]*encryption\.keySafe[ \t]*="
)
_BZIP2: Final = rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"
# What the patterns above can start with.
_FIRST_BYTES: Final = b" \t\r\n#.BEev\xef"
# POSIX.1-1988 and GNU tar, "Basic Tar Format".
_TAR_MAGIC: Final = slice(257, 262)
_TAR_CHECKSUM: Final = slice(148, 156)
_TAR_HEADER_NBYTES: Final = 512


def _matches(pattern: bytes, head: bytes) -> bool:
    """Match a pattern; most files do not start like one, so it need not be compiled."""
    return head[:1] in _FIRST_BYTES and re.match(pattern, head) is not None


def _is_qcow2(head: bytes) -> bool:
    return head[:4] == b"QFI\xfb" and head[4:8] != b"\x00\x00\x00\x01"


def _is_tar(head: bytes) -> bool:
    """Tell whether a file starts with a tar header whose checksum is right."""
    header = head[:_TAR_HEADER_NBYTES]
    stated = header[_TAR_CHECKSUM].strip(b" \0")
    if header[_TAR_MAGIC] != b"ustar" or not re.fullmatch(rb"[0-7]{1,8}", stated):
        return False
    others = sum(header) - sum(header[_TAR_CHECKSUM])
    return others + 8 * ord(" ") == int(stated, 8)


def is_vmdk_descriptor(head: bytes) -> bool:
    """Tell whether a file starts as a VMDK descriptor does."""
    return _matches(_VMDK_FIRST_LINE, head) or _matches(_VMDK_TEXT, head)


_TESTS: Final[tuple[tuple[str, Callable[[bytes], bool]], ...]] = (
    ("qcow2", _is_qcow2),
    ("vmdk", is_vmdk_descriptor),
    ("vmware-encrypted", lambda head: _matches(_VMWARE_ENCRYPTED, head)),
    ("bzip2", lambda head: _matches(_BZIP2, head)),
    ("tar", _is_tar),
)


def matching_formats(head: bytes, tail: bytes) -> list[str]:
    """Return the formats whose magic a file has, each once.

    Parameters
    ----------
    head, tail : bytes
        The file's first `HEAD_NBYTES` and last `TAIL_NBYTES`, or all of a shorter file.
    """
    names = [name for name, test in _TESTS if test(head)]
    for magic in MAGICS:
        text, start = (head, magic.offset) if magic.offset >= 0 else (tail, len(tail))
        if magic.offset < 0:
            start += magic.offset
        if start >= 0 and text.startswith(magic.value, start):
            names.append(magic.format_name)
    return list(dict.fromkeys(names))


def raw_content(head: bytes) -> str | None:
    """Return words for content that only a raw disk has, such as a file system."""
    for offset, value, words in _RAW_CONTENT:
        if head.startswith(value, offset):
            return words
    return None
