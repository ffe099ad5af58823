"""Two open images that are compared with each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from imgcore.engine.extents import Kind
from imgcore.engine.source_file import native_sources

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from imgcore._core import Job
    from imgcore.disk.image import Image
    from imgcore.engine.extents import Extents
    from imgcore.engine.source_file import SourceFile


class ImagePair:
    """Two images, and their files under common numbers.

    Attributes
    ----------
    first, second : Image
    sources : list of SourceFile
        The files of the first image, and then those of the second one.
    paths : list of str
        Their names.
    """

    def __init__(self, first: Image, second: Image) -> None:
        self.first, self.second = first, second
        self.sources: list[SourceFile] = [*first.sources, *second.sources]
        self.paths: list[str] = [source.file.path for source in self.sources]
        self._n_first = len(first.sources)

    def renumbered(self, batches: Iterable[Extents]) -> Iterator[Extents]:
        """Yield extents of the second image with the common numbers of its files."""
        for rows in batches:
            shifted = rows.copy()
            shifted["file"][shifted["kind"] >= Kind.DATA] += np.uint32(self._n_first)
            yield shifted

    def job(self, threads: int, variants: Mapping[str, str], granule_nbytes: int = 0) -> Job:
        """Return a native comparison; see `imgcore._core.Job`."""
        from imgcore._core import Job

        return Job(
            sources=native_sources(self.sources),
            threads=threads,
            variants=dict(variants),
            granule_nbytes=granule_nbytes,
        )
