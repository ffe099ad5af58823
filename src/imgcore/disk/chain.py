"""Opens an image and what it is made upon: finding parents, and telling the right from the wrong.

One mechanism for QCOW2's backing files, VMDK's deltas and the parents of VHD, VHDX and VDI.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from imgcore.errors import (
    CorruptImageError,
    ImgcoreError,
    LimitExceededError,
    OptionError,
    UnsafeReferenceError,
    UnsupportedFeatureError,
    WrongFormatError,
)
from imgcore.files.gate import ReferenceGate
from imgcore.files.host_file import HostFile
from imgcore.files.identity import same_file
from imgcore.formats.registry import canonical_name, open_reader
from imgcore.limits import MAX_CHAIN_DEPTH
from imgcore.log import log

if TYPE_CHECKING:
    from imgcore.formats.api import BackingReference, Reader
    from imgcore.formats.option_texts import OptionTexts


def open_chain(
    path: str,
    *,
    format: str | None = None,
    backing_format: str | None = None,
    parent: str | None = None,
    read_options: OptionTexts | None = None,
    allow: Sequence[str] = (),
    share: bool = False,
) -> tuple[list[Reader], list[HostFile]]:
    """Open an image, its parent, the parent's parent, and so on.

    Parameters are those of :func:`imgcore.open`.

    Returns
    -------
    tuple of two lists
        The layers and their files, the image first.  Closing both is the caller's.
    """
    chain = _Chain(backing_format, allow, share)
    try:
        chain.open_image(path, format, read_options)
        if parent is not None:
            chain.open_stated_parent(parent)
        while (reference := chain.layers[-1].backing) is not None:
            chain.open_parent(reference)
    except BaseException:
        chain.close()
        raise
    return chain.layers, chain.files


def opened_reference(
    reference: BackingReference, file: HostFile, parent: Reader
) -> BackingReference:
    """Return the reference that a new child of an opened image stores."""
    return reference._replace(
        identities=dict(parent.identities),
        modified=file.modified,
        path=os.path.abspath(file.path),
        virtual_size=parent.virtual_size,
    )


class _WrongParentError(CorruptImageError):
    """The file is an image, but not the one that its child was made upon."""


class _Chain:
    def __init__(self, backing_format: str | None, allow: Sequence[str], share: bool) -> None:
        self.layers: list[Reader] = []
        self.files: list[HostFile] = []
        self._backing_format = backing_format
        self._allow = allow
        self._share = share
        self._gates: list[ReferenceGate] = []

    def open_image(self, path: str, format: str | None, options: OptionTexts | None) -> None:
        file = HostFile.open(path, share=self._share)
        self.files.append(file)
        self._gates.append(self._gate_of(file))
        self.layers.append(open_reader(file, self._gates[-1], format, options))

    def _gate_of(self, file: HostFile) -> ReferenceGate:
        return ReferenceGate(os.path.dirname(file.path), self._allow, share=self._share)

    def open_stated_parent(self, path: str) -> None:
        """Open the image's parent under the name that the caller gives for it."""
        reference = self.layers[-1].backing
        if reference is None:
            raise OptionError("a parent is given, but the image has none", path=self.files[-1].path)
        format = self._format_of(reference)
        file = HostFile.open(path, share=self._share)
        self._add(file, reference, format, self._gate_of(file))

    def open_parent(self, reference: BackingReference) -> None:
        """Open the last layer's parent under the first of its names where the right one lies."""
        gate, format = self._gates[-1], self._format_of(reference)
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
                self._add(file, reference, format, gate.beside(file))
            except _WrongParentError as error:
                refused.append(error)
            else:
                return
        if refused:
            raise refused[0]
        raise self._not_found(names, missing)

    def _not_found(self, names: list[str], missing: list[FileNotFoundError]) -> FileNotFoundError:
        image = self.files[-1].path
        hint = "; --parent says where it is" if len(self.files) == 1 else ""
        if len(missing) == 1:
            text = f"{os.strerror(errno.ENOENT)} (the parent of {image}{hint})"
            return FileNotFoundError(errno.ENOENT, text, missing[0].filename)
        tried = ", ".join(repr(name) for name in names)
        text = f"none of the names of its parent exists: {tried}{hint}"
        return FileNotFoundError(errno.ENOENT, text, image)

    def _format_of(self, reference: BackingReference) -> str:
        """Return the format that the next layer is read in."""
        image = self.files[-1].path
        if len(self.files) >= MAX_CHAIN_DEPTH:
            raise LimitExceededError(
                f"more than {MAX_CHAIN_DEPTH} images in a chain of backing files", path=image
            )
        format = reference.format or self._backing_format
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
                raise  # the caller's word, not the image's
            raise UnsupportedFeatureError(
                f"names a backing file of the format {format[:64]!r}, which is not supported",
                path=image,
            ) from error

    def _add(
        self, file: HostFile, reference: BackingReference, format: str, gate: ReferenceGate
    ) -> None:
        """Make a file that was just opened the next layer; it is closed if this raises."""
        with ExitStack() as stack:
            stack.callback(file.close)
            image = self.files[-1].path
            if any(same_file(file.identity, other.identity) for other in self.files):
                raise CorruptImageError(
                    f"the chain of backing files comes back to {file.path}", path=image
                )
            layer = open_reader(file, gate, format)
            stack.callback(layer.close)
            _refuse_wrong_parent(image, reference, layer, file)
            stack.pop_all()
        self.files.append(file)
        self._gates.append(gate)
        self.layers.append(layer)

    def close(self) -> None:
        for layer in self.layers:
            layer.close()
        for file in self.files:
            file.close()


def _refuse_wrong_parent(
    image: str, reference: BackingReference, parent: Reader, file: HostFile
) -> None:
    """Raise if the parent is not the one that the image was made upon; warn if it may not be."""
    for what, wanted in reference.identities.items():
        found = parent.identities.get(what)
        if found is None or found not in (wanted, reference.alternatives.get(what)):
            raise _WrongParentError(
                f"was made upon a parent with {what} {wanted}, {file.path} has {found or 'none'}: "
                "it is another disk, or was written to since",
                path=image,
            )
    if reference.modified is not None and reference.modified != file.modified:
        log.warning(
            "%s: its parent %s has another time of modification than when the image was made; "
            "if it was not merely copied, the content may be wrong",
            image,
            file.path,
        )
