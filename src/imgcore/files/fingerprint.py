"""What tells whether a file is the one that was read before, and unchanged."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Final

from imgcore.errors import UnsupportedFeatureError
from imgcore.files.host_file import HostFile
from imgcore.limits import KIB, MIB

if TYPE_CHECKING:
    from imgcore.files.byte_source import ByteSource

# Headers and tables are at the start of an image; some have a footer.
_FRONT_NBYTES: Final = 1 * MIB
_END_NBYTES: Final = 64 * KIB


def fingerprint(file: ByteSource) -> dict[str, Any]:
    """Return a file's size, time of modification, inode, and a digest of its ends.

    The time and the inode of a block device say nothing about its content.

    Raises
    ------
    UnsupportedFeatureError
        It is a stream, which cannot be read again.
    """
    if not isinstance(file, HostFile):
        raise UnsupportedFeatureError(
            "a stream cannot be read again after a break (--resume): save it to a file first",
            path=file.path,
        )
    digest = hashlib.sha256(file.pread(0, min(file.nbytes, _FRONT_NBYTES)))
    end_nbytes = min(file.nbytes, _END_NBYTES)
    digest.update(file.pread(file.nbytes - end_nbytes, end_nbytes))
    facts = {"name": file.path, "size": file.nbytes, "headers": digest.hexdigest()}
    if not file.is_block_device:
        status = file.status()
        facts |= {"mtime_ns": status.st_mtime_ns, "inode": status.st_ino}
    return facts
