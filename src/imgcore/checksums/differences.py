"""Areas of a disk that have other leaves than its tree."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from imgcore.areas.area import Area
from imgcore.checksums.digest import BLOCK_NBYTES
from imgcore.checksums.tree import LEAF_NBYTES, PIECE_NBLOCKS, zero_leaf

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from _typeshed import ReadableBuffer

    from imgcore.checksums.tree import TreeFile

_SAME: Final = 0
_CHANGED: Final = 1
_ZEROED: Final = 2


class TreeDifferences:
    """Finds where leaves, which come in order, differ from those of a tree.

    It is a `LeafSink`.

    Parameters
    ----------
    tree : TreeFile
        The older state of the disk.
    receive : callable
        Gets the areas that differ, joined and ascending.
    """

    def __init__(self, tree: TreeFile, receive: Callable[[Area], None]) -> None:
        self._tree = tree
        self._receive = receive
        leaf = zero_leaf(tree.digest.algorithm)
        self._zero = np.frombuffer(leaf, np.uint64)
        self._zeros = leaf * PIECE_NBLOCKS
        self._position = 0
        # The run that may go on: its first block, and its state.
        self._start = 0
        self._state = _SAME

    def add(self, leaves: ReadableBuffer) -> None:
        """Compare the next leaves."""
        view = memoryview(leaves)
        n_blocks = view.nbytes // LEAF_NBYTES
        for first in range(0, n_blocks, PIECE_NBLOCKS):
            end = min(first + PIECE_NBLOCKS, n_blocks)
            self._compare(view[first * LEAF_NBYTES : end * LEAF_NBYTES], end - first)

    def add_zeros(self, n_blocks: int) -> None:
        """Compare the next blocks, which are zeros."""
        for first in range(0, n_blocks, PIECE_NBLOCKS):
            n = min(PIECE_NBLOCKS, n_blocks - first)
            self._compare(memoryview(self._zeros)[: n * LEAF_NBYTES], n)

    def finish(self) -> None:
        """End the last area: all leaves have been added."""
        self._begin(self._position, _SAME)

    def _compare(self, new: memoryview, n_blocks: int) -> None:
        old = self._tree.read(self._position, n_blocks)
        if old == new:
            self._begin(self._position, _SAME)
        else:
            before, after = (
                np.frombuffer(leaves, np.uint64).reshape(n_blocks, -1) for leaves in (old, new)
            )
            is_zero = (after == self._zero).all(axis=1)
            states = (before != after).any(axis=1) * np.where(is_zero, _ZEROED, _CHANGED)
            firsts = np.concatenate(([0], np.flatnonzero(np.diff(states)) + 1))
            for first, state in zip(firsts.tolist(), states[firsts].tolist(), strict=True):
                self._begin(self._position + first, state)
        self._position += n_blocks

    def _begin(self, block: int, state: int) -> None:
        """End the run before a block, if the block has another state."""
        if state == self._state:
            return
        if self._state != _SAME:
            offset = self._start * BLOCK_NBYTES
            end = min(block * BLOCK_NBYTES, self._tree.virtual_size)
            self._receive(Area(offset, end - offset, self._state == _ZEROED))
        self._start, self._state = block, state


def tree_differences(old: TreeFile, new: TreeFile) -> Iterator[Area]:
    """Yield the areas in which two trees of one disk differ, ascending and joined."""
    areas: list[Area] = []
    differences = TreeDifferences(old, areas.append)
    for leaves in new.leaves():
        differences.add(leaves)
        yield from areas
        areas.clear()
    differences.finish()
    yield from areas
