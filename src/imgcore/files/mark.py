"""A small file beside another one, which says what a crash has interrupted."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from imgcore.files.folder import Folder
from imgcore.files.temporary_names import new_token, temporary_name

if TYPE_CHECKING:
    from imgcore.files.host_file import HostFile

_MAX_NBYTES: Final = 4096


class Mark:
    """The mark of a file; each change of it is durable when the call returns.

    Parameters
    ----------
    file : HostFile
        It has a name.
    suffix : str
        Follows the name of the file.
    """

    def __init__(self, file: HostFile, suffix: str) -> None:
        folder, name = os.path.split(file.path)
        self._folder = folder if file.folder is None else file.folder
        self._name = name + suffix
        self._owner = file.status()

    def read(self) -> bytes | None:
        """Return the content; None without a mark."""
        with Folder(self._folder) as folder:
            return folder.read(self._name, _MAX_NBYTES)

    def write(self, content: bytes) -> None:
        """Replace the mark."""
        with Folder(self._folder) as folder:
            folder.remove(self._name)
            temporary = temporary_name(self._name, new_token())
            folder.put(self._name, content, 0o600, temporary, like=self._owner)
            folder.sync()

    def remove(self) -> None:
        """Remove the mark, if there is one."""
        with Folder(self._folder) as folder:
            folder.remove(self._name)
            folder.sync()


def remove_file(file: HostFile) -> None:
    """Remove an open file by its name, durably, unless another file has the name."""
    folder_path, name = os.path.split(file.path)
    with Folder(folder_path if file.folder is None else file.folder) as folder:
        found, own = folder.find(name), file.status()
        if found is not None and (found.st_dev, found.st_ino) == (own.st_dev, own.st_ino):
            folder.remove(name)
            folder.sync()
