"""Changes the stored refcounts of many clusters at once.

Source: QEMU docs/interop/qcow2.rst, "Host cluster management".
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Final

import numpy as np

from imgcore.errors import CorruptImageError, LimitExceededError
from imgcore.files.update_file import Step
from imgcore.formats.qcow2 import layout
from imgcore.formats.qcow2.refcounts import decode_refcounts, encode_refcounts

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from imgcore.files.update_file import UpdateFile
    from imgcore.formats.qcow2.header import Qcow2Header

# Refcounts of this and more are not told apart (`decode_refcounts`).
_MAX_KNOWN: Final = (1 << 32) - 1


class CountChanges:
    """Adds to the refcounts of clusters that have one already.

    Parameters
    ----------
    file : UpdateFile
    header : Qcow2Header
    """

    def __init__(self, file: UpdateFile, header: Qcow2Header) -> None:
        self._file = file
        self._header = header
        self._most = min((1 << header.refcount_bits) - 1, _MAX_KNOWN - 1)
        self._per_block = header.cluster_size * 8 >> header.refcount_order

    def counts(self, clusters: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the stored refcounts of clusters, in their order.

        Parameters
        ----------
        clusters : ndarray, shape (n,), dtype int64
            Numbers of host clusters, in any order.
        """
        numbers, where = np.unique(clusters, return_inverse=True)
        found = np.zeros(len(numbers), dtype=np.int64)
        for part, _, _, counts, index in self._pieces(numbers):
            found[part] = counts[index]
        return found[where]

    def change(
        self, clusters: NDArray[np.int64], by: int, *, commit: bool = True
    ) -> NDArray[np.int64]:
        """Add to the refcount of each of these clusters, as often as it is named.

        Parameters
        ----------
        clusters : ndarray, shape (n,), dtype int64
            Numbers of host clusters, in any order; they may repeat.
        by : int
            1 or -1.
        commit : bool
            Without it, nothing is changed, only verified.

        Returns
        -------
        ndarray of int64
            The clusters, ascending, that nothing refers to any more.

        Raises
        ------
        CorruptImageError
            A cluster has no refcount, or one that is too low.
        LimitExceededError
            A refcount would exceed its width.
        """
        numbers, times = np.unique(clusters, return_counts=True)
        freed = []
        for part, offset, nbytes, counts, index in self._pieces(numbers):
            changed = counts[index] + times[part] * by
            self._verify(numbers[part], counts[index], changed)
            counts[index] = changed
            if commit:
                encoded = encode_refcounts(counts.astype(np.uint64), self._header.refcount_order)
                assert encoded.nbytes == nbytes
                self._file.put(offset, encoded.tobytes(), Step.NEW)
            freed.append(numbers[part][changed == 0])
        return np.concatenate(freed) if freed else np.zeros(0, dtype=np.int64)

    def _verify(
        self,
        numbers: NDArray[np.int64],
        before: NDArray[np.int64],
        after: NDArray[np.int64],
    ) -> None:
        bad = np.flatnonzero((before == 0) | (after < 0))
        if bad.size:
            number = int(numbers[bad[0]])
            raise CorruptImageError(
                f"cluster {number} has the refcount {int(before[bad[0]])}, fewer than its "
                "references: imgcore check -r all repairs that",
                path=self._file.path,
                offset=number << self._header.cluster_bits,
            )
        bad = np.flatnonzero(after > self._most)
        if bad.size:
            raise LimitExceededError(
                f"cluster {int(numbers[bad[0]])} would have {int(after[bad[0]])} references, "
                f"refcounts of {self._header.refcount_bits} bits allow {self._most}",
                path=self._file.path,
            )

    def _pieces(
        self, numbers: NDArray[np.int64]
    ) -> list[tuple[slice, int, int, NDArray[np.int64], NDArray[np.int64]]]:
        """Return parts of ascending numbers, each with the refcounts around it.

        These are: the part; host offset and bytes of the refcounts; the refcounts; and
        the index of each number among them.
        """
        order = self._header.refcount_order
        blocks = numbers // self._per_block
        edges = np.flatnonzero(np.diff(blocks, prepend=-1, append=-1)).tolist()
        pieces = []
        for first, last in pairwise(edges):
            block_offset = self._block_offset(int(blocks[first]))
            inside = numbers[first:last] - int(blocks[first]) * self._per_block
            # Whole bytes, of which narrow refcounts share one.
            low = int(inside[0]) & ~7
            high = min((int(inside[-1]) | 7) + 1, self._per_block)
            offset = block_offset + (low << order) // 8
            nbytes = (high - low << order) // 8
            raw = self._file.pread(offset, nbytes)
            counts = decode_refcounts(raw, order).astype(np.int64)
            pieces.append((slice(first, last), offset, nbytes, counts, inside - low))
        return pieces

    def _block_offset(self, block: int) -> int:
        header = self._header
        n_entries = header.refcount_table_clusters * header.l2_entries
        offset = 0
        if block < n_entries:
            raw = self._file.pread(
                header.refcount_table_offset + block * layout.ENTRY_NBYTES, layout.ENTRY_NBYTES
            )
            offset = int.from_bytes(raw, "big")
        if not offset or offset % header.cluster_size:
            raise CorruptImageError(
                f"clusters from {block * self._per_block} on have no refcounts: imgcore check "
                "-r all repairs that",
                path=self._file.path,
            )
        return offset
