"""An open image, with its backing files: sizes, extents, random-access reads."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from imgcore.disk.chain import open_chain
from imgcore.disk.open_options import OpenOptions
from imgcore.formats.api import SectorSized
from imgcore.limits import SECTOR_NBYTES

if TYPE_CHECKING:
    from imgcore.disk.layer import Layer
    from imgcore.disk.open_options import Parents
    from imgcore.disk.overlay import Depths
    from imgcore.disk.salvage import Salvage
    from imgcore.engine.extents import Extents
    from imgcore.engine.source_file import SourceFile
    from imgcore.files.byte_source import ByteSource


class Image:
    """A virtual disk that is open for reading; `imgcore.open` returns it.

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
    chain : list of Layer
        The image, then its backing file, and so on.
    layers : list of Reader
        The reader of each.
    sources : list of SourceFile
        Every file that extents refer to by index.
    files : list of HostFile
        Every file that was opened by name, the image first.
    """

    def __init__(self, chain: Sequence[Layer]) -> None:
        self.chain = list(chain)
        self.path = self.chain[0].file.path
        self.layers = [layer.reader for layer in self.chain]
        self.reader = self.layers[0]
        self.format = self.reader.format_name
        self.subformat = self.reader.subformat
        self.virtual_size = self.reader.virtual_size
        self.block_size = self.reader.block_nbytes
        self.sources: list[SourceFile] = []
        # The index of each layer's first file in ``sources``.
        self.first_files: list[int] = []
        self.files = [layer.file for layer in self.chain]
        # Reentrant: a signal handler may close the image in the middle of a read.
        self._lock = threading.RLock()
        # The opener, and each read in progress.
        self._n_users = 1
        self._is_closed = False
        for layer in self.layers:
            self.first_files.append(len(self.sources))
            self.sources.extend(layer.sources)

    @property
    def paths(self) -> list[str]:
        """Names of the source files, by the index that extents use."""
        return [source.file.path for source in self.sources]

    @property
    def logical_sector_nbytes(self) -> int | None:
        """Bytes of a logical sector, or None if the format does not state it."""
        return self.reader.logical_sector_nbytes if isinstance(self.reader, SectorSized) else None

    def layer_extents(
        self, start: int = 0, length: int | None = None
    ) -> Iterator[tuple[Extents, Depths]]:
        """Yield extents as `extents` does, and for each the layer that it comes from.

        Yields
        ------
        tuple of ndarray
            The extents, and their depths (uint16): 0 for the image itself, 1 for its
            backing file, and so on.
        """
        from imgcore.disk.overlay import chain_extents

        length = self.virtual_size - start if length is None else length
        if start < 0 or length < 0 or start + length > self.virtual_size:
            raise ValueError(f"[{start}, {start + length}) is not inside the disk")
        if length:
            yield from chain_extents(self.layers, self.first_files, start, length)

    def extents(self, start: int = 0, length: int | None = None) -> Iterator[Extents]:
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
        CorruptImageError
            A table entry points outside its file.
        """
        for rows, _ in self.layer_extents(start, length):
            yield rows

    def data_extents(
        self, start: int = 0, length: int | None = None, *, salvage: Salvage | None = None
    ) -> Iterator[Extents]:
        """Yield the extents of a range, with long holes of host files as ZERO.

        With ``salvage``, what is lost is ZERO, too, and listed there.
        """
        from imgcore.disk.host_holes import HostHoles

        holes = HostHoles(self.sources)
        for rows, depths in self.layer_extents(start, length):
            known = [rows] if salvage is None else salvage.take(rows, depths)
            for part in known:
                yield from holes.cut(part)

    def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes of the virtual disk, starting at ``offset``.

        Raises
        ------
        ValueError
            The range does not lie inside the disk.
        CorruptImageError, OSError
            The bytes cannot be read.
        """
        buffer = bytearray(length)
        self.readinto(offset, buffer)
        return bytes(buffer)

    def readinto(self, offset: int, buffer: Any, *, threads: int | None = None) -> None:
        """Fill a buffer with the bytes of the virtual disk that start at ``offset``.

        Parameters
        ----------
        offset : int
            Byte offset in the disk; any alignment.
        buffer : writable bytes-like
            All of it is filled, or its content is undefined after an exception.
        threads : int, optional
            Number of worker threads; one per CPU by default, fewer for short reads.

        Notes
        -----
        Several threads may call this at once.  Reads of whole sectors avoid a copy.
        """
        with memoryview(buffer) as view, view.cast("B") as octets:
            end = offset + len(octets)
            if offset < 0 or end > self.virtual_size:
                raise ValueError(f"[{offset}, {end}) is not inside the disk")
            if not len(octets):
                return
            first = offset - offset % SECTOR_NBYTES
            last = min(end + -end % SECTOR_NBYTES, self.virtual_size)
            with self._reading():
                if (first, last) == (offset, end):
                    self._read_sectors(first, octets, threads)
                    return
                whole = bytearray(last - first)
                self._read_sectors(first, memoryview(whole), threads)
            octets[:] = whole[offset - first : end - first]

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Keep the files open during a read."""
        with self._lock:
            if self._is_closed:
                raise ValueError(f"{self.path}: the image is closed")
            self._n_users += 1
        try:
            yield
        finally:
            self._release()

    def _read_sectors(self, start: int, view: memoryview, threads: int | None) -> None:
        from imgcore._core import File, Job
        from imgcore.engine.geometry import Geometry, Placing, ZeroPolicy
        from imgcore.engine.job import chosen_variants, thread_count, translated_errors
        from imgcore.engine.source_file import native_sources
        from imgcore.limits import MIB

        if threads is None:
            threads = min(thread_count(None), 1 + len(view) // MIB)
        geometry = Geometry(
            block_nbytes=SECTOR_NBYTES,
            guest_nbytes=start + len(view),
            placing=Placing.IDENTITY,
            zero_policy=ZeroPolicy.EXPLICIT,
            guest_base=start,
            sparse_nbytes=0,
        )
        target = File.from_memory(view, writable=True)
        try:
            with translated_errors(self.paths):
                job = Job(
                    sources=native_sources(self.sources),
                    geometry=geometry,
                    target=target,
                    threads=thread_count(threads),
                    variants=chosen_variants(None),
                )
                try:
                    for rows in self.extents(start, len(view)):
                        first = int(rows["guest_offset"][0])
                        job.run(first, first + int(rows["length"].sum()), rows)
                finally:
                    job.close()
        finally:
            target.close()

    def info(self) -> dict[str, Any]:
        """Describe the image, with the keys of ``qemu-img info --output=json``."""
        from imgcore.disk.describe import describe_layer

        return describe_layer(self.chain[0])

    def check_unchanged(self) -> None:
        """Raise ImgcoreError if a file of the chain has changed since it was opened."""
        for file in self.every_file():
            file.check_unchanged()

    def every_file(self) -> list[ByteSource]:
        """Return the files of all layers, each once."""
        files = [*self.files, *(source.file for source in self.sources)]
        return list(dict.fromkeys(files))

    def close(self) -> None:
        """Close every file; may be called more than once.

        Reads in progress on other threads finish first; the last one closes the files.
        """
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._release()

    def _release(self) -> None:
        with self._lock:
            self._n_users -= 1
            if self._n_users:
                return
            for layer in self.chain:
                layer.close()

    def __enter__(self) -> Image:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Image {self.path!r} {self.format} {self.virtual_size}>"


def open(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    backing_format: str | None = None,
    parent: Parents = None,
    read_options: Mapping[str, Any] | Sequence[str] | None = None,
    allow: Sequence[str | os.PathLike[str]] = (),
    share: bool = False,
) -> Image:
    """Open an image and its backing files for reading.

    Parameters
    ----------
    path : str or os.PathLike
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
    parent : str, os.PathLike or sequence of them, optional
        The image's parent (backing file), instead of the file that the image names.
        Its identity is verified against the one that the image states.  A sequence has
        one name for each level: the parent, the parent's parent, and so on.
    read_options : mapping or sequence of str, optional
        Options for reading the image, as a mapping or as strings ``"key=value,..."``.
        VHD has ``size``, which is ``chs`` or ``current``.
    allow : sequence of str or os.PathLike
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
    return open_image(path, options)


def open_image(
    path: str | os.PathLike[str], options: OpenOptions, *, parents: bool = True
) -> Image:
    """Open an image; without ``parents``, only its headers can be used."""
    return Image(open_chain(path, options, parents=parents))
