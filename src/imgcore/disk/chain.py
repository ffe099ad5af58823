"""Opens an image with its chain of parents, and verifies the identity of each parent.

Backing files of QCOW2, base disks of VMDK and parents of VHD, VHDX and VDI are all
found in the same way.
"""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING

from imgcore.disk.layer import Layer, gate_of, open_layer
from imgcore.errors import (
    CorruptImageError,
    ImgcoreError,
    LimitExceededError,
    OptionError,
    UnsafeReferenceError,
    UnsupportedFeatureError,
    WrongFormatError,
)
from imgcore.files.host_file import HostFile
from imgcore.files.identity import same_file
from imgcore.formats.registry import canonical_name, open_reader
from imgcore.limits import MAX_CHAIN_DEPTH
from imgcore.log import log

if TYPE_CHECKING:
    from imgcore.disk.open_options import OpenOptions
    from imgcore.files.reference_gate import ReferenceGate
    from imgcore.formats.api import BackingReference


def open_chain(
    path: str | os.PathLike[str], options: OpenOptions, *, parents: bool = True
) -> list[Layer]:
    """Open an image, its parent, the parent's parent, and so on.

    Parameters
    ----------
    path : str or os.PathLike
    options : OpenOptions
    parents : bool
        If False, only the image itself is opened.

    Returns
    -------
    list of Layer
        The image first.  The caller closes them.
    """
    chain = _Chain(options)
    try:
        chain.layers.append(open_layer(path, options))
        if parents:
            chain.open_parents()
    except BaseException:
        chain.close()
        raise
    return chain.layers


class _WrongParentError(CorruptImageError):
    """The file is an image, but not the one that its child was created from."""


class _Chain:
    def __init__(self, options: OpenOptions) -> None:
        self.layers: list[Layer] = []
        self._options = options

    @property
    def _path(self) -> str:
        """The image whose parent is opened next."""
        return self.layers[-1].file.path

    def open_parents(self) -> None:
        """Open all parents; the caller may have stated the first one."""
        if self._options.parent is not None:
            self._open_stated_parent(self._options.parent)
        while (reference := self.layers[-1].reader.backing) is not None:
            self._open_parent(reference)

    def _open_stated_parent(self, path: str) -> None:
        reference = self.layers[-1].reader.backing
        if reference is None:
            raise OptionError("a parent is given, but the image has none", path=self._path)
        format = self._format_of(reference)
        file = HostFile.open(path, share=self._options.share)
        self._add(file, gate_of(file, self._options), reference, format)

    def _open_parent(self, reference: BackingReference) -> None:
        """Open the last layer's parent by the first name that leads to it."""
        gate, format = self.layers[-1].gate, self._format_of(reference)
        names = list(dict.fromkeys((reference.name, *reference.other_names)))
        refused: list[ImgcoreError] = []
        missing: list[FileNotFoundError] = []
        for name in names:
            try:
                file = gate.open(name)
            except UnsafeReferenceError as error:
                refused.append(error)
                continue
            except FileNotFoundError as error:
                missing.append(error)
                continue
            try:
                self._add(file, gate.beside(file), reference, format)
            except _WrongParentError as error:
                refused.append(error)
            else:
                return
        if refused:
            raise refused[0]
        raise self._not_found(names, missing)

    def _not_found(self, names: list[str], missing: list[FileNotFoundError]) -> FileNotFoundError:
        image = self._path
        hint = "; state it with --parent" if len(self.layers) == 1 else ""
        if len(missing) == 1:
            text = f"{os.strerror(errno.ENOENT)} (the parent of {image}{hint})"
            return FileNotFoundError(errno.ENOENT, text, missing[0].filename)
        tried = ", ".join(repr(name) for name in names)
        text = f"none of the names of its parent exists: {tried}{hint}"
        return FileNotFoundError(errno.ENOENT, text, image)

    def _format_of(self, reference: BackingReference) -> str:
        """Return the format of the next layer."""
        image = self._path
        if len(self.layers) >= MAX_CHAIN_DEPTH:
            raise LimitExceededError(
                f"more than {MAX_CHAIN_DEPTH} images in a chain of backing files", path=image
            )
        format = reference.format or self._options.backing_format
        if format is None:
            raise WrongFormatError(
                f"names the backing file {reference.name!r} without its format, which is "
                "never guessed: state it (--backing-format)",
                path=image,
            )
        try:
            return canonical_name(format)
        except OptionError as error:
            if reference.format is None:
                # The caller stated it, not the image.
                raise
            raise UnsupportedFeatureError(
                f"names a backing file of the format {format[:64]!r}, which is not supported",
                path=image,
            ) from error

    def _add(
        self, file: HostFile, gate: ReferenceGate, reference: BackingReference, format: str
    ) -> None:
        """Append an open file as the next layer; the file is closed if this raises."""
        with ExitStack() as stack:
            stack.callback(file.close)
            if any(same_file(file.identity, layer.file.identity) for layer in self.layers):
                raise CorruptImageError(
                    f"the chain of backing files leads back to {file.path}", path=self._path
                )
            reader = open_reader(file, gate, format, damage=self._options.damage)
            layer = Layer(file, gate, reader, self._options.salvage)
            stack.callback(layer.close)
            _refuse_wrong_parent(self._path, reference, layer)
            stack.pop_all()
        self.layers.append(layer)

    def close(self) -> None:
        for layer in self.layers:
            layer.close()


def _refuse_wrong_parent(image: str, reference: BackingReference, parent: Layer) -> None:
    """Raise if this is not the parent the image was created from; warn if unsure."""
    for what, wanted in reference.identities.items():
        found = parent.reader.identities.get(what)
        if found is None or found not in (wanted, reference.alternatives.get(what)):
            raise _WrongParentError(
                f"was created from a parent with {what} {wanted}, but {parent.file.path} "
                f"has {found or 'none'}: it is another disk, or was written to since",
                path=image,
            )
    if reference.modified is not None and reference.modified != parent.file.modified:
        log.warning(
            "%s: the modification time of its parent %s has changed since the image was "
            "created; unless the parent was only copied, the content may be wrong",
            image,
            parent.file.path,
        )
