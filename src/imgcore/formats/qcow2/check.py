"""Check QCOW2 images: compare refcounts with references, and verify table entries.

Counts and wording follow ``qemu-img check``.
Source: QEMU docs/interop/qcow2.rst, "Host cluster management".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from imgcore.formats.qcow2 import layout
from imgcore.formats.qcow2.references import References, Window, read_structure
from imgcore.formats.shared.check_report import CheckReport

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from imgcore.files.byte_source import ByteSource
    from imgcore.formats.qcow2.header import Qcow2Header


class ConflictFinder(References):
    """Finds entries that are wrong, and clusters of which two uses exclude each other.

    Refcounts are not compared: those of an image with the dirty flag may be stale.
    """

    def __init__(self, file: ByteSource, header: Qcow2Header) -> None:
        report = CheckReport()
        super().__init__(file, header, read_structure(file, header, report), report)

    def run(self) -> CheckReport:
        """Return the report."""
        for window in self.windows():
            window.add_structure(self.structure)
            for bad, line in window.conflicts():
                self.corruptions(bad, line)
        return self.report


class Qcow2Checker(References):
    """Checks one image once."""

    def __init__(self, file: ByteSource, header: Qcow2Header) -> None:
        report = CheckReport(total_clusters=-(-header.virtual_size >> header.cluster_bits))
        if header.is_dirty:
            report.problems.append("dirty flag is set: refcounts may be stale")
        if header.is_corrupt:
            report.problems.append("corrupt flag is set: the image must not be written to")
        super().__init__(file, header, read_structure(file, header, report), report)

    def run(self) -> CheckReport:
        """Check everything and return the report."""
        highest = -1
        for window in self.windows():
            window.add_structure(self.structure)
            highest = max(highest, self._compare(window))
        self.report.image_end_offset = (highest + 1) << self.header.cluster_bits
        return self.report

    def _compare(self, window: Window) -> int:
        """Report differences; return the highest cluster in use, -1 if none is."""
        counts, stored = window.counts, window.stored

        def line(index: int) -> str:
            return (
                f"cluster {window.base + index} refcount={int(stored[index])} "
                f"reference={int(counts[index])}"
            )

        self.corruptions(stored < counts, line)
        leaks = np.flatnonzero(stored > counts)
        self.report.leaks_among(leaks.size, (line(index) for index in leaks.tolist()))
        *conflicts, _ = window.conflicts()
        for bad, conflict_line in conflicts:
            # A wrong refcount or copied flag is a corruption already.
            self.corruptions(bad & (stored == counts), conflict_line)
        used = np.flatnonzero((counts != 0) | (stored != 0))
        return window.base + int(used[-1]) if used.size else -1

    def on_active_entries(
        self,
        entries: NDArray[np.uint64],
        clusters: NDArray[np.int64],
        what: str,
        window: Window,
    ) -> None:
        """Report copied flags that contradict the stored refcounts."""
        mine = window.inside(clusters)
        entries, clusters = entries[mine], clusters[mine]
        stored = window.stored[clusters - window.base]
        wrong = (stored == 1) != ((entries & np.uint64(layout.COPIED)) != 0)
        self.corruptions(
            wrong,
            lambda index: (
                f"copied flag of {what}: entry={int(entries[index]):#x} "
                f"refcount={int(stored[index])}"
            ),
        )

    def on_compressed_copied(
        self,
        bad: NDArray[np.bool_],
        entries: NDArray[np.uint64],
        guest: NDArray[np.int64],
    ) -> None:
        """Report compressed clusters that have the copied flag."""
        self.bad_entries(bad, "is compressed and has the copied flag", entries, guest)
