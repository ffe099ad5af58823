"""The files of an open image and its parents, as they were when they were opened."""

from __future__ import annotations

from contextlib import ExitStack
from copy import copy
from typing import TYPE_CHECKING

from imgcore.files.host_file import HostFile
from imgcore.files.identity import same_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from imgcore.disk.host_holes import HostHoles
    from imgcore.disk.layer import Layer
    from imgcore.disk.overlay import Depths
    from imgcore.disk.salvage import Salvage
    from imgcore.engine.extents import Extents
    from imgcore.engine.reflinks import ReflinkRule
    from imgcore.engine.source_file import SourceFile
    from imgcore.files.byte_source import ByteSource
    from imgcore.files.identity import Identity
    from imgcore.formats.api import Reader


class DiskState:
    """The layers of an open image.  They do not change: `Image.refresh` makes another.

    The image closes it.  One that the image no longer uses is closed by the last use of
    it that ends.

    Attributes
    ----------
    chain : list of Layer
        The image first, then its parent, and so on.
    layers : list of Reader
        The reader of each.
    sources : list of SourceFile
        Every file that extents refer to by index.
    first_files : list of int
        The index of each layer's first file in ``sources``.
    files : list of HostFile
        The file of each layer that was opened by its name or descriptor.
    virtual_size : int
        Bytes of the disk.
    """

    # The state that a view keeps open.
    _viewed: DiskState | None = None

    def __init__(self, chain: Sequence[Layer]) -> None:
        self.chain: list[Layer] = list(chain)
        self.layers: list[Reader] = [layer.reader for layer in self.chain]
        self.virtual_size: int = self.layers[0].virtual_size
        self.sources: list[SourceFile] = []
        self.first_files: list[int] = []
        self.files: list[HostFile] = [layer.file for layer in self.chain]
        for layer in self.layers:
            self.first_files.append(len(self.sources))
            self.sources.extend(layer.sources)

    @property
    def path(self) -> str:
        """Name of the image."""
        return self.files[0].path

    @property
    def paths(self) -> list[str]:
        """Names of the source files, by the index that extents use."""
        return [source.file.path for source in self.sources]

    @property
    def exact_nbytes(self) -> int:
        """Bytes of the disk without the zeros that fill up its last sector."""
        return self.files[0].nbytes if self.layers[0].is_flat else self.virtual_size

    def every_file(self) -> list[ByteSource]:
        """Return the files of all layers, each once."""
        files = [*self.files, *(source.file for source in self.sources)]
        return list(dict.fromkeys(files))

    def own_files(self) -> list[ByteSource]:
        """Return the files of the image itself, each once."""
        files = [self.files[0], *(source.file for source in self.layers[0].sources)]
        return list(dict.fromkeys(files))

    def host_files(self) -> list[HostFile]:
        """Return those of them that are files of the host."""
        return [file for file in self.every_file() if isinstance(file, HostFile)]

    def layer_extents(self, start: int, length: int) -> Iterator[tuple[Extents, Depths]]:
        """Yield the extents of a range, and for each the layer that it comes from."""
        from imgcore.disk.overlay import chain_extents

        if length:
            yield from chain_extents(self.layers, self.first_files, start, length)

    def extents(self, start: int, length: int) -> Iterator[Extents]:
        """Yield the extents of a range."""
        return (rows for rows, _ in self.layer_extents(start, length))

    def extents_of_layer(self, depth: int, start: int, length: int) -> Iterator[Extents]:
        """Yield what one layer states about a range; the rest of it is holes."""
        from imgcore.disk.overlay import chain_extents, padded
        from imgcore.engine.extents import Kind

        end = start + length
        layer_end = min(end, self.layers[depth].virtual_size)
        if start < layer_end:
            one = slice(depth, depth + 1)
            pairs = chain_extents(self.layers[one], self.first_files[one], start, layer_end - start)
            yield from (rows for rows, _ in pairs)
        yield from padded(iter(()), max(start, layer_end), end, Kind.HOLE)

    def data_extents(self, start: int, length: int, rule: ReflinkRule | None) -> Iterator[Extents]:
        """Yield the extents of a range, with long holes of host files as ZERO."""
        holes = self.host_holes()
        for rows in self.extents(start, length):
            yield from holes.cut(rows if rule is None else rule.mark(rows))

    def host_holes(self) -> HostHoles:
        """Return what finds holes in the files, but for those that the extents have."""
        from imgcore.disk.host_holes import HostHoles

        known = {
            index
            for index, layer in zip(self.first_files, self.layers, strict=True)
            if layer.is_flat
        }
        return HostHoles(self.sources, known)

    def salvaged_extents(self, salvage: Salvage) -> Iterator[Extents]:
        """Yield the data extents of the disk; what is lost is ZERO, and listed."""
        holes = self.host_holes()
        for rows, depths in self.layer_extents(0, self.virtual_size):
            for part in salvage.take(rows, depths):
                yield from holes.cut(part)

    def depth_of(self, identity: Identity) -> int | None:
        """Return the number of the layer whose file it is; None if there is none."""
        for depth, file in enumerate(self.files):
            if same_file(file.identity, identity):
                return depth
        return None

    def is_part_of(self, other: DiskState, depth: int) -> bool:
        """Tell whether its layers are those of another disk from ``depth`` on."""
        return self._identities() == other._identities()[depth:]

    def _identities(self) -> list[tuple[Identity, str, int]]:
        return [
            (layer.file.identity, layer.reader.format_name, layer.reader.virtual_size)
            for layer in self.chain
        ]

    def view(self) -> DiskState:
        """Return the same state for one reader, which holds it as long as it reads."""
        view = copy(self)
        view._viewed = self
        return view

    def close(self) -> None:
        """Close all files; more than once is allowed."""
        with ExitStack() as stack:
            for layer in self.chain:
                stack.callback(layer.close)

    def __del__(self) -> None:
        if self._viewed is None:
            self.close()
