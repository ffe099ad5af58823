"""A mark beside a checksum tree: the disk has changes that the tree does not have.

A tree tells what has changed only if it suits the disk.  A run that was interrupted
leaves a disk that has some of the changes, and the old tree.  If the source goes back
to what it was before, the tree alone would call such a block equal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

from imgcore.files.mark import Mark

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from imgcore.checksums.tree import TreeFile

_SUFFIX: Final = ".imgcore-sync"

_Item = TypeVar("_Item")


class TreeMark:
    """The mark of a tree, which counts for no other tree of that name."""

    def __init__(self, tree: TreeFile) -> None:
        self._mark = Mark(tree.file, _SUFFIX)
        self._content = f"{tree.digest}\n".encode()

    def is_set(self) -> bool:
        """Tell whether a run was interrupted that began with this tree."""
        return self._mark.read() == self._content

    def before(self, changes: Iterable[_Item]) -> Iterator[_Item]:
        """Yield changes of the disk; the mark is durable before the first one."""
        is_first = True
        for change in changes:
            if is_first:
                self._mark.write(self._content)
                is_first = False
            yield change

    def remove(self) -> None:
        """Remove the mark: the disk has a tree that suits it."""
        self._mark.remove()
