"""Find what can be repaired in a QCOW2 image: refcounts and copied flags.

They are set to what the tables require, as ``qemu-img check -r`` does.
Source: QEMU docs/interop/qcow2.rst, "Header", "Host cluster management".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import numpy as np

from imgcore.errors import LimitExceededError, UnsupportedFeatureError
from imgcore.formats.api import Repair
from imgcore.formats.qcow2 import layout
from imgcore.formats.qcow2.rebuild import (
    MAX_BLOCKS,
    Placement,
    Rewrite,
    place_structure,
    structure_writes,
    wrong_flags,
)
from imgcore.formats.qcow2.references import (
    RefcountStructure,
    References,
    Window,
    read_structure,
)
from imgcore.formats.shared.check_report import CheckReport

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from imgcore.files.byte_source import ByteSource
    from imgcore.formats.qcow2.header import Qcow2Header

_KNOWN_EXTENSIONS: Final = {
    layout.EXTENSION_BACKING_FORMAT,
    layout.EXTENSION_FEATURE_NAMES,
    layout.EXTENSION_BITMAPS,
}
_KNOWN_AUTOCLEAR: Final = layout.AUTOCLEAR_BITMAPS | layout.AUTOCLEAR_RAW_DATA
_FEATURES: Final = struct.Struct(">Q")


class RefcountRepair(References):
    """Compares an image's refcounts with its references, and says what to repair.

    Parameters
    ----------
    file, header
        The image.
    leaks_only : bool
        Only lower refcounts that are too high.

    Notes
    -----
    Nothing is repaired if the tables are damaged or claim a cluster twice: what seems
    to be a leaked cluster may belong to the damaged entry.  If refcount blocks overlap
    other clusters, leaks alone cannot be repaired.
    """

    def __init__(self, file: ByteSource, header: Qcow2Header, *, leaks_only: bool) -> None:
        bad_blocks = CheckReport()
        super().__init__(file, header, read_structure(file, header, bad_blocks), CheckReport())
        self._leaks_only = leaks_only
        self._n_bad_blocks = bad_blocks.corruptions
        self._n_unused = self._n_high = self._n_low = 0
        self._n_flags = self._n_compressed_copied = 0
        self._needed = np.zeros(MAX_BLOCKS, dtype=bool)
        self._first_free = 0
        self._kept = self._without_overlaps()
        for window in self.windows():
            self._examine(window)
        self._placement: Placement | None = None
        if not leaks_only and not self.report.corruptions:
            self._place()

    def on_compressed_copied(
        self, bad: NDArray[np.bool_], entries: NDArray[np.uint64], guest: NDArray[np.int64]
    ) -> None:
        """Count compressed entries with a copied flag, which can be cleared."""
        self._n_compressed_copied += int(bad.sum())

    # ------------------------------------------------------------------ examination

    def _without_overlaps(self) -> RefcountStructure:
        """Return the structure without blocks that overlap each other or the table."""
        offset, nbytes, blocks = self.structure
        _, where, counts = np.unique(blocks, return_inverse=True, return_counts=True)
        bad = (counts[where] > 1) | ((blocks >= offset) & (blocks < offset + nbytes))
        return RefcountStructure(offset, nbytes, np.where(bad, 0, blocks))

    def _examine(self, window: Window) -> None:
        for bad, line in window.conflicts():
            self.corruptions(bad, line)
        most = (1 << self.header.refcount_bits) - 1
        self.corruptions(
            window.counts > min(most, (1 << 32) - 1),
            lambda index: (
                f"cluster {window.base + index} has {int(window.counts[index])} references, "
                f"refcounts of {self.header.refcount_bits} bits allow {most}"
            ),
        )
        self._keep_free_blocks(window)
        used = np.flatnonzero(window.counts)
        if used.size:
            self._first_free = window.base + int(used[-1]) + 1
            per_block = self.header.cluster_size * 8 >> self.header.refcount_order
            numbers = np.unique((used + window.base) // per_block)
            if int(numbers[-1]) >= MAX_BLOCKS:
                self.report.corruption(
                    f"cluster {self._first_free - 1} is further away than refcounts reach"
                )
            self._needed[numbers[numbers < MAX_BLOCKS]] = True
        if not self._leaks_only:
            self._n_flags += int(wrong_flags(window, window.counts == 1).sum())
        window.add_structure(self.structure)
        counts, stored = window.counts, window.stored
        if self._leaks_only:
            wrong = wrong_flags(window, counts == 1) & (stored >= counts)
            self._n_flags += int(wrong.sum())
        self._n_low += int((stored < counts).sum())
        self._n_unused += int(((stored != 0) & (counts == 0)).sum())
        self._n_high += int(((stored > counts) & (counts != 0)).sum())

    def _keep_free_blocks(self, window: Window) -> None:
        """Give up blocks, and the table, in clusters that other tables or data use."""
        offset, nbytes, blocks = self._kept
        clusters = blocks >> self.header.cluster_bits
        mine = np.flatnonzero((blocks != 0) & window.inside(clusters))
        taken = mine[window.counts[clusters[mine] - window.base] != 0]
        blocks[taken] = 0
        first = max((offset >> self.header.cluster_bits) - window.base, 0)
        end = max(((offset + nbytes) >> self.header.cluster_bits) - window.base, 0)
        if window.counts[first:end].any():
            self._kept = RefcountStructure(offset, 0, blocks)

    def _place(self) -> None:
        after_reach = -(-self.reach >> self.header.cluster_bits)
        first_free = max(self._first_free, after_reach)
        try:
            placement = place_structure(self.header, self._kept, self._needed, first_free)
        except LimitExceededError as error:
            self.report.corruption(str(error))
            return
        if placement.n_new or self._n_bad_blocks or self._n_overlaps:
            self._placement = placement

    @property
    def _n_overlaps(self) -> int:
        """Refcount blocks that overlap something else; the table counts as one."""
        lost = self.structure.blocks != self._kept.blocks
        return int(lost.sum()) + (not self._kept.table_nbytes)

    # ---------------------------------------------------------------------- results

    def repairs(self) -> list[Repair]:
        """Return the repairs, of which the last one does all the writing.

        Raises
        ------
        UnsupportedFeatureError
            The image has features that might refer to clusters in an unknown way.
        """
        if self.report.corruptions or (self._leaks_only and self._n_overlaps):
            return []
        repairs = [*self._refcount_repairs(), *self._flag_repairs()]
        if not repairs:
            return []
        self._refuse_unknown()
        unknown = self.header.autoclear & ~_KNOWN_AUTOCLEAR
        if unknown:
            repairs.append(Repair(f"unknown autoclear features {unknown:#x}", "cleared"))
        repairs[0] = repairs[0]._replace(file_nbytes=self._new_file_nbytes())
        repairs[-1] = repairs[-1]._replace(stream=self._writes)
        return repairs

    def _refcount_repairs(self) -> Iterator[Repair]:
        if self._placement is not None:
            yield Repair(
                "damaged refcount table or blocks",
                f"rebuilt, with {self._placement.n_new} new clusters",
            )
        if self._n_low and not self._leaks_only:
            yield Repair(f"{self._n_low} refcounts too low", "raised to the number of references")
        if self._n_unused:
            yield Repair(f"{self._n_unused} leaked clusters", "refcounts set to 0")
        if self._n_high:
            yield Repair(
                f"{self._n_high} refcounts too high", "lowered to the number of references"
            )

    def _flag_repairs(self) -> Iterator[Repair]:
        n_flags = self._n_flags + (0 if self._leaks_only else self._n_compressed_copied)
        if n_flags:
            yield Repair(f"wrong copied flags of {n_flags} clusters", "corrected")
        if self._is_clean_afterwards:
            if self.header.is_dirty:
                yield Repair("dirty flag", "cleared")
            if self.header.is_corrupt:
                yield Repair("corrupt flag", "cleared")

    def obstacles(self) -> list[str]:
        """Return why nothing, or not everything, can be repaired; a line each."""
        damages = [line.removeprefix("ERROR ") for line in self.report.problems]
        if damages:
            n_more = self.report.corruptions - len(damages)
            more = [f"{n_more} more problems of this kind"] if n_more else []
            return [
                "refcounts are counted from the tables, which are damaged: nothing is changed",
                *damages,
                *more,
            ]
        counts = (
            (self._n_bad_blocks, "entries of the refcount table are damaged"),
            (self._n_overlaps, "refcount blocks overlap other clusters"),
            (self._n_low, "refcounts are too low"),
            (self._n_compressed_copied, "compressed clusters have a copied flag"),
        )
        if not self._leaks_only:
            return []
        return [f"{n} {what}: -r all repairs this, -r leaks does not" for n, what in counts if n]

    @property
    def _is_clean_afterwards(self) -> bool:
        return not self.obstacles()

    def _refuse_unknown(self) -> None:
        header = self.header
        unknown = [
            f"header extension {kind:#010x}"
            for kind in header.extensions.keys() - _KNOWN_EXTENSIONS
        ]
        if header.compatible & ~layout.COMPATIBLE_LAZY_REFCOUNTS:
            unknown.append(f"compatible features {header.compatible:#x}")
        if unknown:
            raise UnsupportedFeatureError(
                f"not repaired: {unknown[0]} may refer to clusters in an unknown way",
                path=self.file.path,
            )

    # ----------------------------------------------------------------------- writes

    def _new_file_nbytes(self) -> int | None:
        placement = self._placement
        if placement is None or not placement.n_new:
            return None
        end = (placement.first_new + placement.n_new) << self.header.cluster_bits
        return max(end, self.file.nbytes)

    def _writes(self, copy: ByteSource) -> Iterator[tuple[int, bytes]]:
        """Yield what changes in the copy; the file's size has been set."""
        header, structure = self.header, self.structure
        if self._placement is not None:
            structure = self._placement.structure
            yield from structure_writes(header, self._placement, self.file.nbytes)
        rewrite = Rewrite(copy, header, structure, only_lower=self._leaks_only)
        yield from rewrite.writes()
        if self.header.version < 3:
            return
        incompatible = header.incompatible
        if self._is_clean_afterwards:
            incompatible &= ~(layout.INCOMPATIBLE_DIRTY | layout.INCOMPATIBLE_CORRUPT)
        yield layout.INCOMPATIBLE_FIELD_OFFSET, _FEATURES.pack(incompatible)
        autoclear = header.autoclear & _KNOWN_AUTOCLEAR
        yield layout.AUTOCLEAR_FIELD_OFFSET, _FEATURES.pack(autoclear)
