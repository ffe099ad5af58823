"""One image of a chain: its file, its reader, and the gate for files it names."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from imgcore.files.host_file import HostFile
from imgcore.files.reference_gate import ReferenceGate
from imgcore.formats.registry import open_reader

if TYPE_CHECKING:
    from typing import Self

    from imgcore.disk.open_options import OpenOptions
    from imgcore.formats.api import Reader


class Layer(NamedTuple):
    """An open image without its parent; a context manager.

    Attributes
    ----------
    file : HostFile
        The file that was opened by name.
    gate : ReferenceGate
        Opens the files that the image names.
    reader : Reader
    salvages : bool
        Whether the reader goes on after damage; see `imgcore.formats.shared.damage`.
    """

    file: HostFile
    gate: ReferenceGate
    reader: Reader
    salvages: bool = False

    def close(self) -> None:
        """Close the reader and all its files; may be called more than once."""
        self.reader.close()
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_layer(path: str | os.PathLike[str], options: OpenOptions) -> Layer:
    """Open an image, without its parent, by the name that the caller gives."""
    file = HostFile.open(path, share=options.share)
    try:
        gate = gate_of(file, options)
        reader = open_reader(file, gate, options.format, options.read_options, options.damage)
        return Layer(file, gate, reader, options.salvage)
    except BaseException:
        file.close()
        raise


def gate_of(file: HostFile, options: OpenOptions) -> ReferenceGate:
    """Return the gate for an image that was opened by the caller's name."""
    return ReferenceGate(os.path.dirname(file.path), options.allow, share=options.share)
