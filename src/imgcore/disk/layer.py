"""One image of a chain: its file, its reader, and the gate for files it names."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from imgcore.disk.image_names import local_image
from imgcore.errors import UnsupportedFeatureError
from imgcore.files.reference_gate import ReferenceGate
from imgcore.files.update_file import UpdateFile
from imgcore.formats.registry import Found, find_format, get_driver, open_found
from imgcore.log import log

if TYPE_CHECKING:
    import os
    from typing import Self

    from imgcore.disk.open_options import OpenOptions
    from imgcore.files.host_file import HostFile
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
    notice : str
        If only the content states the image's format, the words of a warning.
    salvages : bool
        Whether the reader goes on after damage; see `imgcore.formats.shared.damage`.
    """

    file: HostFile
    gate: ReferenceGate
    reader: Reader
    notice: str = ""
    salvages: bool = False

    def warn(self) -> None:
        """Log the notice, if there is one: after opening, which may fail for it."""
        if self.notice:
            log.warning("%s: %s", self.file.path, self.notice)

    def close(self) -> None:
        """Close the reader and all its files; may be called more than once."""
        self.reader.close()
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_layer(
    source: str | os.PathLike[str] | int, options: OpenOptions, *, describing: bool = False
) -> Layer:
    """Open an image, without its parent, by its name or descriptor.

    With ``describing``, its format may contradict its name; see `find_format`.
    """
    source, options = local_image(source, options)
    file = options.files.open(source, share=options.share, writable=options.writable)
    try:
        flag, damage = options.flags.format, options.damage
        found = find_format(file, options.format, flag=flag, describing=describing, damage=damage)
        gate = found_gate(file, found, options)
        if isinstance(file, UpdateFile):
            get_driver(found.name).prepare(file)
        reader = open_found(file, gate, found.name, options.read_options, damage=damage, flag=flag)
        if options.without_backing:
            refuse_backing(file, reader)
        return Layer(file, gate, reader, found.notice, options.salvage)
    except BaseException:
        file.close()
        raise


def refuse_backing(file: HostFile, reader: Reader) -> None:
    """Raise if an image has a backing file, although its description leaves it out."""
    if reader.backing is not None:
        raise UnsupportedFeatureError(
            'its description leaves out its backing file ("backing": null), which is not supported',
            path=file.path,
        )


def found_gate(file: HostFile, found: Found, options: OpenOptions) -> ReferenceGate:
    """Return the gate for an image that the caller names.

    It opens nothing if only the image's content states its format.
    """
    unstated = f"{options.flags.format} {found.name}" if found.notice else ""
    return ReferenceGate(
        file.folder,
        options.allow,
        share=options.share,
        image=file.path,
        unstated=unstated,
        files=options.files,
        writable=options.writable,
    )


def gate_of(file: HostFile, options: OpenOptions) -> ReferenceGate:
    """Return the gate for an image that the caller names and whose format is stated."""
    return found_gate(file, Found(""), options)
