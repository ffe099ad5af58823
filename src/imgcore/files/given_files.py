"""The files of an image that are open before it is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from imgcore.border import descriptor, file_name
from imgcore.errors import OptionError
from imgcore.files.given import given_name, require_open
from imgcore.files.host_file import HostFile
from imgcore.files.update_file import UpdateFile

if TYPE_CHECKING:
    from collections.abc import Iterable


class GivenFiles:
    """Descriptors that the caller gives for names, and the files of a refreshed image.

    Parameters
    ----------
    descriptors : mapping
        A descriptor for each name: the whole name that an image states for a file, or
        its last component.
    held : iterable of HostFile
        Open files, which are opened again in the place of those with their paths.
    """

    def __init__(
        self, descriptors: Mapping[str, int] | None = None, held: Iterable[HostFile] = ()
    ) -> None:
        self._descriptors = _checked({} if descriptors is None else descriptors)
        self._held = {_key(file.path, is_named=file.folder is not None): file for file in held}
        self._asked: set[str] = set()
        # The name that each key stood for, other than a parent's, which has several.
        self._meant: dict[str, str] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the given descriptors, and of the files that are held."""
        return (*self._descriptors, *(path for path, is_named in self._held if is_named))

    def holding(self, files: Iterable[HostFile]) -> GivenFiles:
        """Return open files that come before all others, under the same names.

        The numbers of the descriptors may belong to other files by now.
        """
        given = GivenFiles(held=files)
        given._descriptors = {
            name: number
            for name, number in self._descriptors.items()
            if _key(given_name(number), is_named=False) in given._held
        }
        # The image may not name them any more, which is no mistake of the caller.
        given._asked = set(given._descriptors)
        return given

    def open(self, source: str | int, *, share: bool, writable: bool = False) -> HostFile:
        """Open a file that the caller states, by its path or its descriptor.

        ``writable`` files are written in place.
        """
        kind = UpdateFile if writable else HostFile
        if isinstance(source, str):
            return self.again(source) or kind.open(source, share=share)
        held = self._held.get(_key(given_name(source), is_named=False))
        return kind.given(source, share=share) if held is None else held.again()

    def find(
        self, name: str, *, image: str, role: str, share: bool, writable: bool = False
    ) -> HostFile | None:
        """Open the file that the caller has given for a name in an image, if any.

        OptionError if two files of an image have this last component.
        """
        for key in (name, name.rpartition("/")[2], re.split(r"[/\\]", name)[-1]):
            number = self._descriptors.get(key)
            if number is not None:
                self._asked.add(key)
                meant = name if role == "parent" else self._meant.setdefault(key, name)
                if meant != name:
                    raise OptionError(
                        f"files has {key!r}, which may be {meant[:200]!r} or {name[:200]!r}: "
                        "give both whole names",
                        path=image,
                    )
                return self.open(number, share=share, writable=writable)
        return None

    def again(self, path: str) -> HostFile | None:
        """Open again the file that is held under a path; None if there is none."""
        held = self._held.get(_key(path, is_named=True))
        # Those of an image that was opened anew are closed, and this may come later.
        return None if held is None or held.closed else held.again()

    def refuse_unasked(self, image: str) -> None:
        """Raise OptionError if no image of the chain has asked for one of the names."""
        unasked = [name for name in self._descriptors if name not in self._asked]
        if unasked:
            raise OptionError(
                f"files has {', '.join(map(repr, unasked))}, which no image of the chain names",
                path=image,
            )


def _key(path: str, *, is_named: bool) -> tuple[str, bool]:
    return path, is_named


def _checked(descriptors: Mapping[str, int]) -> dict[str, int]:
    if not isinstance(descriptors, Mapping):
        raise TypeError(f"files is a mapping of names to descriptors, not {descriptors!r}")
    found = {file_name(name): descriptor(number) for name, number in descriptors.items()}
    for number in found.values():
        # Before a file of ours has the number.
        require_open(number)
    return found


NO_FILES: Final = GivenFiles()
