"""Finds where an image has the data of its disk, before its file is rewritten."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from imgcore import limits
from imgcore.engine.extents import EXTENT_DTYPE, Kind, join_neighbours
from imgcore.errors import LimitExceededError
from imgcore.formats.api import MaybeFlat, Survey

if TYPE_CHECKING:
    from imgcore.disk.image import Image
    from imgcore.engine.extents import Extents
    from imgcore.formats.api import Reader

_FIRST_ROWS: Final = 1 << 12


def survey_image(image: Image) -> Survey:
    """Return where the data of an image without a parent is.

    Rows of file 0 are in the file that will be rewritten.  The others are elsewhere,
    for example in a log that was replayed in memory.

    Raises
    ------
    LimitExceededError
        The data is in more than MAX_SURVEY_ROWS pieces.
    """
    rows = _Rows(image.path)
    for batch in image.extents():
        rows.add(batch[batch["kind"] >= Kind.DATA])
    return Survey(image.sources[0].file.nbytes, is_flat(image.reader), rows.taken())


def is_flat(reader: Reader) -> bool:
    """Tell whether guest byte i is byte i of the image's only file of data."""
    return reader.is_flat or (isinstance(reader, MaybeFlat) and reader.starts_with_disk)


class _Rows:
    """Rows that grow in place, so that they are in memory only once."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._rows: Extents = np.empty(_FIRST_ROWS, dtype=EXTENT_DTYPE)
        self._n = 0

    def add(self, rows: Extents) -> None:
        """Append rows; DATA that continues the row before it becomes a part of it."""
        rows = join_neighbours(np.concatenate((self._rows[max(self._n - 1, 0) : self._n], rows)))
        start = max(self._n - 1, 0)
        end = start + len(rows)
        if end > limits.MAX_SURVEY_ROWS:
            raise LimitExceededError(
                f"its data is in more than {limits.MAX_SURVEY_ROWS} pieces: imgcore convert "
                "takes any number",
                path=self._path,
            )
        if end > len(self._rows):
            self._rows.resize(max(end, 3 * len(self._rows) // 2), refcheck=False)
        self._rows[start:end] = rows
        self._n = end

    def taken(self) -> Extents:
        """Return the rows, which must not be added to afterwards."""
        self._rows.resize(self._n, refcheck=False)
        return self._rows
