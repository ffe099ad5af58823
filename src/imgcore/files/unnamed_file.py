"""A target that is changed in place before it gets its name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from imgcore.files.descriptors import duplicate, forks_held_back, named_errors
from imgcore.files.update_file import UpdateFile

if TYPE_CHECKING:
    from typing import Self

    from imgcore.files.target_file import TargetFile


class UnnamedFile(UpdateFile):
    """A file that gets its name when it is complete.

    Until then nobody else uses it, and a crash loses all of it.  So it is not locked,
    and what is written to it is synced by whoever gives it the name.
    """

    @classmethod
    def of(cls, target: TargetFile, path: str) -> Self:
        """Return a target's file, with another name; the caller closes it."""
        with forks_held_back(), named_errors(path):
            return cls(duplicate(target.fd), path, device=target.is_block_device)

    def sync(self) -> None:
        """Do nothing."""
