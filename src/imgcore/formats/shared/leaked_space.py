"""Counts what a file has between the blocks and tables of an image.

Holes of the file take no space, so they are not leaked.  An image that was made around
blocks of another one has them where the old tables and unused blocks were.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from imgcore.formats.shared.flat_reader import HostData

if TYPE_CHECKING:
    from imgcore.files.byte_source import ByteSource


class LeakedSpace:
    """Counts the allocation units that parts of a file take without any use.

    Parameters
    ----------
    file : ByteSource
    unit_nbytes : int
        Size of an allocation unit.
    """

    def __init__(self, file: ByteSource, unit_nbytes: int) -> None:
        self._data = HostData(file)
        self._unit_nbytes = unit_nbytes

    def n_units(self, start: int, stop: int) -> int:
        """Return how many whole units the data between two host offsets takes.

        Quick if the parts that are asked for ascend.
        """
        if stop - start < self._unit_nbytes:
            return 0
        nbytes = 0
        while start < stop:
            low, high = self._data.next(start)
            low, high = min(low, stop), min(high, stop)
            nbytes += high - low
            start = high
        return nbytes // self._unit_nbytes
