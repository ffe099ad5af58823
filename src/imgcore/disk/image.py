"""An open image, with its backing files: sizes, extents, random-access reads."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, SupportsIndex, TypeVar

from imgcore.border import FilePath, file_name, range_of_disk
from imgcore.disk.chain import open_chain
from imgcore.disk.open_options import OpenOptions
from imgcore.files.closable import Closable
from imgcore.formats.api import SectorSized
from imgcore.limits import CACHE_NBYTES

if TYPE_CHECKING:
    import numpy as np
    from _typeshed import WriteableBuffer

    from imgcore.disk.layer import Layer
    from imgcore.disk.overlay import Depths
    from imgcore.disk.random_access import RandomAccess
    from imgcore.disk.salvage import Salvage
    from imgcore.engine.extents import Extents
    from imgcore.engine.reflinks import ReflinkRule
    from imgcore.engine.source_file import SourceFile
    from imgcore.files.byte_source import ByteSource
    from imgcore.files.host_file import HostFile
    from imgcore.formats.api import Reader


_Item = TypeVar("_Item")


class Image(Closable):
    """A virtual disk that is open for reading; `imgcore.open` returns it.

    Several threads may use it at once, and any of them may close it: uses in progress
    end normally, every later one raises ValueError.  An image that is dropped without
    `close` is closed with a ResourceWarning.

    Attributes
    ----------
    path : str
        The image file.
    format, subformat : str
        For example ``"vmdk"`` and ``"streamOptimized"``; ``subformat`` may be None.
    virtual_size : int
        Bytes of the virtual disk.
    block_size : int
        Bytes of its allocation unit (cluster, grain).
    sources : list of SourceFile
        Every file that extents refer to by index, those of backing files included.
    paths : list of str
        Their names.
    """

    _what = "image"

    def __init__(self, chain: Sequence[Layer], *, cache_nbytes: int = CACHE_NBYTES) -> None:
        # The verbs use what is inside: each layer, its reader, and the files that were
        # opened by name, the image first.
        self.chain: list[Layer] = list(chain)
        self.path: str = self.chain[0].file.path
        self.layers: list[Reader] = [layer.reader for layer in self.chain]
        self.reader: Reader = self.layers[0]
        self.format: str = self.reader.format_name
        self.subformat: str | None = self.reader.subformat
        self.virtual_size: int = self.reader.virtual_size
        self.block_size: int = self.reader.block_nbytes
        self.sources: list[SourceFile] = []
        # The index of each layer's first file in ``sources``.
        self.first_files: list[int] = []
        self.files: list[HostFile] = [layer.file for layer in self.chain]
        for layer in self.layers:
            self.first_files.append(len(self.sources))
            self.sources.extend(layer.sources)
        self._cache_nbytes = cache_nbytes
        self._random_access: RandomAccess | None = None
        super().__init__()

    @property
    def paths(self) -> list[str]:
        """Names of the source files, by the index that extents use."""
        return [source.file.path for source in self.sources]

    @property
    def logical_sector_nbytes(self) -> int | None:
        """Bytes of a logical sector, or None if the format does not state it."""
        with self._in_use():
            reader = self.reader
            return reader.logical_sector_nbytes if isinstance(reader, SectorSized) else None

    def layer_extents(
        self, start: SupportsIndex = 0, length: SupportsIndex | None = None
    ) -> Iterator[tuple[Extents, Depths]]:
        """Yield extents as `extents` does, and for each the layer that it comes from.

        Yields
        ------
        tuple of ndarray
            The extents, and their depths (uint16): 0 for the image itself, 1 for its
            backing file, and so on.
        """
        return self._guarded(self._layer_extents(*self._range(start, length)))

    def extents(
        self, start: SupportsIndex = 0, length: SupportsIndex | None = None
    ) -> Iterator[Extents]:
        """Yield the extents of a range: where its bytes are stored.

        Parameters
        ----------
        start : int
            Byte offset in the disk, a multiple of 512.
        length : int, optional
            Bytes, a multiple of 512 unless the range ends with the disk; up to the end
            of the disk by default.

        Yields
        ------
        ndarray
            A batch of extents, shape (n,), ascending and gap-free.  Its fields include
            ``guest_offset``, ``length``, ``host_offset``, ``host_length``, ``file`` (an
            index into ``sources``) and ``kind``.

        Raises
        ------
        ValueError
            The range is not inside the disk, or the image is closed; raised at the
            call, and for an image that is closed later by the next step.
        CorruptImageError
            A table entry points outside its file.
        """
        return self._guarded(self._extents(*self._range(start, length)))

    def data_extents(
        self,
        start: SupportsIndex = 0,
        length: SupportsIndex | None = None,
        *,
        rule: ReflinkRule | None = None,
    ) -> Iterator[Extents]:
        """Yield the extents of a range, with long holes of host files as ZERO.

        What is reflinked by ``rule`` is marked, and may contain such holes.
        """
        return self._guarded(self._data_extents(*self._range(start, length), rule))

    def salvaged_extents(self, salvage: Salvage) -> Iterator[Extents]:
        """Yield the data extents of the disk; what is lost is ZERO, and listed."""
        return self._guarded(self._salvaged_extents(salvage))

    def _range(
        self, start: SupportsIndex, length: SupportsIndex | None, what: str = "start"
    ) -> tuple[int, int]:
        """Return a range of the disk as two ints; ValueError if it is not inside.

        ``what`` names the argument ``start`` in messages.
        """
        with self._in_use():
            return range_of_disk(self.path, self.virtual_size, start, length, what)

    def _guarded(self, batches: Iterator[_Item]) -> Iterator[_Item]:
        """Yield from an iterator that uses the files: only its steps keep them open."""
        while True:
            with self._in_use():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    # These are used where the image is already in use.

    def _layer_extents(self, start: int, length: int) -> Iterator[tuple[Extents, Depths]]:
        from imgcore.disk.overlay import chain_extents

        if length:
            yield from chain_extents(self.layers, self.first_files, start, length)

    def _extents(self, start: int, length: int) -> Iterator[Extents]:
        return (rows for rows, _ in self._layer_extents(start, length))

    def _data_extents(self, start: int, length: int, rule: ReflinkRule | None) -> Iterator[Extents]:
        from imgcore.disk.host_holes import HostHoles

        holes = HostHoles(self.sources)
        for rows in self._extents(start, length):
            yield from holes.cut(rows if rule is None else rule.mark(rows))

    def _salvaged_extents(self, salvage: Salvage) -> Iterator[Extents]:
        from imgcore.disk.host_holes import HostHoles

        holes = HostHoles(self.sources)
        for rows, depths in self._layer_extents(0, self.virtual_size):
            for part in salvage.take(rows, depths):
                yield from holes.cut(part)

    def read(self, offset: SupportsIndex, length: SupportsIndex) -> bytes:
        """Return ``length`` bytes of the virtual disk, starting at ``offset``.

        Raises
        ------
        ValueError
            The range is not inside the disk, or the image is closed.
        CorruptImageError, OSError
            The bytes cannot be read.
        """
        try:
            return (self._random_access or self._start_reading()).read(offset, length)
        except Exception as error:
            self._explain(error)

    def readinto(
        self,
        offset: SupportsIndex,
        buffer: WriteableBuffer | np.ndarray[Any, Any],
        *,
        threads: SupportsIndex | None = None,
    ) -> int:
        """Fill a buffer with the bytes of the virtual disk that start at ``offset``.

        Parameters
        ----------
        offset : int
            Byte offset in the disk; any alignment.
        buffer : writable bytes-like
            All of it is filled, or its content is undefined after an exception.
        threads : int, optional
            Most threads to use; one per CPU by default.  Short reads take one.

        Returns
        -------
        int
            Bytes read: the size of the buffer.

        Raises
        ------
        ValueError, CorruptImageError, OSError
            As for `read`.

        Notes
        -----
        Several threads may call this at once.
        """
        try:
            disk = self._random_access or self._start_reading()
            return disk.readinto(offset, buffer, threads)
        except Exception as error:
            self._explain(error)

    def _start_reading(self) -> RandomAccess:
        """Return what reads the image; it is a use of the image until it is closed."""
        from imgcore.disk.random_access import RandomAccess

        with self._in_use(), self._lock:
            if self._random_access is None:
                disk = RandomAccess(
                    self.path,
                    self.layers,
                    self.sources,
                    self.first_files,
                    cache_nbytes=self._cache_nbytes,
                    end_use=self._end_use,
                )
                self._n_uses += 1
                self._random_access = disk
            # A signal handler may have closed the image meanwhile.
            if self._is_closed:
                self._stop_reading()
            return self._random_access

    def _stop_reading(self) -> None:
        if self._random_access is not None and self._random_access.close():
            self._end_use()

    def close(self) -> None:
        super().close()
        self._stop_reading()

    def _explain(self, error: Exception) -> NoReturn:
        """Raise an error of a read: one of the engine's with the name of its file."""
        from imgcore.engine.job import translated_errors

        with translated_errors(self.paths):
            raise error

    def info(self) -> dict[str, Any]:
        """Describe the image, with the keys of ``qemu-img info --output=json``.

        Raises
        ------
        ValueError
            The image is closed.
        """
        from imgcore.disk.describe import describe_layer

        with self._in_use():
            return describe_layer(self.chain[0])

    def check_unchanged(self) -> None:
        """Raise ImgcoreError if a file of the chain has changed since it was opened."""
        with self._in_use():
            for file in self.every_file():
                file.check_unchanged()

    def every_file(self) -> list[ByteSource]:
        """Return the files of all layers, each once."""
        files = [*self.files, *(source.file for source in self.sources)]
        return list(dict.fromkeys(files))

    def _free(self) -> None:
        for layer in self.chain:
            layer.close()

    def __enter__(self) -> Image:
        with self._in_use():
            return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Image {self.path!r} {self.format} {self.virtual_size}>"


def open(
    path: FilePath,
    *,
    format: str | None = None,
    backing_format: str | None = None,
    parent: FilePath | Sequence[FilePath] | None = None,
    read_options: Mapping[str, Any] | Sequence[str] | None = None,
    allow: Sequence[FilePath] = (),
    share: bool = False,
) -> Image:
    """Open an image and its backing files for reading.

    Parameters
    ----------
    path : str, bytes or os.PathLike
        A regular file or a block device.
    format : str, optional
        ``raw``, ``qcow2``, ``vmdk``, ``vhd``, ``vhdx`` or ``vdi``; detected by its
        magic if None.  Raw is never guessed from content: a file is raw only if it has
        a suffix of raw disks (.raw, .img, .dd, .bin), if it is a block device, or if
        ``"raw"`` is stated here.  If the name states no format (.img, or no suffix of
        disks), the content decides; files that such an image names are opened only if
        its format is stated here.
    backing_format : str, optional
        Format of backing files whose format the image does not state; it is never
        guessed.
    parent : str, bytes or os.PathLike, or a sequence of them, optional
        The image's parent (backing file), instead of the file that the image names.
        Its identity is verified against the one that the image states.  A sequence has
        one name for each level: the parent, the parent's parent, and so on.
    read_options : mapping or sequence of str, optional
        Options for reading the image, as a mapping or as strings ``"key=value,..."``.
        VHD has ``size``, which is ``chs`` or ``current``.
    allow : sequence of str, bytes or os.PathLike
        Further folders in which files that an image names may lie.  The image's own
        folder is always allowed.
    share : bool
        Open the image even if another process (a running virtual machine) writes to it.

    Returns
    -------
    Image
        A context manager.

    Raises
    ------
    OSError
        A file cannot be opened.
    WrongFormatError, CorruptImageError, UnsupportedFeatureError, LimitExceededError
        The image cannot be read, or its parent is not the one it was created from.
    OptionError
        ``parent`` is given for an image that has none, or has more names than there are
        parents; or a read option is unknown.
    UnsafeReferenceError
        The image names a file outside the allowed folders.
    """
    options = OpenOptions.from_keywords(
        format=format,
        backing_format=backing_format,
        parent=parent,
        read_options=read_options,
        allow=allow,
        share=share,
    )
    return open_image(file_name(path), options)


def open_image(
    path: str | os.PathLike[str], options: OpenOptions, *, parents: bool = True
) -> Image:
    """Open an image; without ``parents``, only its headers can be used."""
    chain = open_chain(path, options, parents=parents)
    try:
        return Image(chain)
    except BaseException:
        for layer in chain:
            layer.close()
        raise
