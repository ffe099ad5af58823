"""Free leaked clusters of QCOW2 images by setting their refcounts to 0.

Source: QEMU docs/interop/qcow2.rst, "Host cluster management".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from imgcore.errors import LimitExceededError, UnsupportedFeatureError
from imgcore.formats.api import Repair
from imgcore.formats.qcow2 import layout
from imgcore.formats.qcow2.check import Qcow2Checker
from imgcore.limits import MAX_REPAIR_NBYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from imgcore.files.byte_source import ByteSource
    from imgcore.formats.qcow2.header import Qcow2Header

_KNOWN_EXTENSIONS: Final = {
    layout.EXTENSION_BACKING_FORMAT,
    layout.EXTENSION_FEATURE_NAMES,
    layout.EXTENSION_BITMAPS,
}


def find_repairs(file: ByteSource, header: Qcow2Header) -> list[Repair]:
    """Return how to free the clusters that have a refcount but no reference.

    Raises
    ------
    UnsupportedFeatureError
        The image has features that might refer to clusters in an unknown way.
    LimitExceededError
        Too many refcount blocks would change.

    Notes
    -----
    In a corrupt image nothing is freed: a cluster that seems leaked may belong to a
    damaged entry.  Refcounts of referenced clusters stay unchanged even if too high.
    """
    _refuse_unknown(file, header)
    leaks = _LeakedClusters(file, header)
    if leaks.checker.run().corruptions or not leaks.n_clusters:
        return []
    return [
        Repair(
            f"{leaks.n_clusters} leaked clusters",
            "refcounts set to 0",
            writes=tuple((offset, bytes(block)) for offset, block in leaks.blocks.items()),
        )
    ]


def _refuse_unknown(file: ByteSource, header: Qcow2Header) -> None:
    unknown = [
        f"header extension {kind:#010x}" for kind in header.extensions.keys() - _KNOWN_EXTENSIONS
    ]
    if header.compatible & ~layout.COMPATIBLE_LAZY_REFCOUNTS:
        unknown.append(f"compatible features {header.compatible:#x}")
    if header.autoclear & ~layout.AUTOCLEAR_BITMAPS:
        unknown.append(f"autoclear features {header.autoclear:#x}")
    if unknown:
        raise UnsupportedFeatureError(
            f"not repaired: {unknown[0]} may refer to clusters in an unknown way", path=file.path
        )


class _LeakedClusters:
    """Collects refcount blocks with the refcounts of leaked clusters set to 0."""

    def __init__(self, file: ByteSource, header: Qcow2Header) -> None:
        self._file = file
        self._order = header.refcount_order
        self._cluster_size = header.cluster_size
        self.checker = Qcow2Checker(file, header, self._free)
        self._offsets = self.checker.refcount_blocks()
        self.blocks: dict[int, bytearray] = {}
        self.n_clusters = 0

    def _free(self, clusters: NDArray[np.int64]) -> None:
        per_block = self._cluster_size * 8 >> self._order
        numbers, firsts = np.unique(clusters // per_block, return_index=True)
        lasts = np.append(firsts[1:], len(clusters))
        for number, first, last in zip(
            numbers.tolist(), firsts.tolist(), lasts.tolist(), strict=True
        ):
            self._clear(int(self._offsets[number]), clusters[first:last] % per_block)
        self.n_clusters += len(clusters)

    def _clear(self, offset: int, indices: NDArray[np.int64]) -> None:
        block = self.blocks.get(offset)
        if block is None:
            if (len(self.blocks) + 1) * self._cluster_size > MAX_REPAIR_NBYTES:
                raise LimitExceededError(
                    f"leaked clusters in more than {len(self.blocks)} refcount blocks: too many "
                    "to repair at once; convert the image to free them",
                    path=self._file.path,
                )
            block = bytearray(self._file.pread(offset, self._cluster_size))
            self.blocks[offset] = block
        octets = np.frombuffer(block, np.uint8)
        if self._order >= 3:
            octets.reshape(-1, 1 << (self._order - 3))[indices] = 0
            return
        # If refcounts are narrower than a byte, the first one is in the lowest bits.
        bits = indices << self._order
        masks = np.uint8((1 << (1 << self._order)) - 1) << (bits & 7).astype(np.uint8)
        np.bitwise_and.at(octets, bits >> 3, ~masks)
