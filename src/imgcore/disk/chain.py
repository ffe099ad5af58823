"""Opens an image with its chain of parents, and verifies the identity of each parent.

Backing files of QCOW2, base disks of VMDK and parents of VHD, VHDX and VDI are all
found in the same way.
"""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from imgcore.disk.image_names import NotLocalError, is_description, parse_description
from imgcore.disk.layer import Layer, gate_of, open_layer, refuse_backing
from imgcore.errors import (
    CorruptImageError,
    LimitExceededError,
    OptionError,
    UnsafeReferenceError,
    UnsupportedFeatureError,
    WrongFormatError,
)
from imgcore.files.identity import same_file
from imgcore.formats.api import Divided
from imgcore.formats.registry import NOT_READ, canonical_name, open_reader
from imgcore.formats.shared.windows_paths import names_from_windows_path
from imgcore.limits import MAX_CHAIN_DEPTH
from imgcore.log import log

if TYPE_CHECKING:
    from imgcore.disk.open_options import OpenOptions
    from imgcore.files.host_file import HostFile
    from imgcore.files.reference_gate import ReferenceGate
    from imgcore.formats.api import BackingReference


def open_chain(
    source: str | os.PathLike[str] | int, options: OpenOptions, *, parents: bool = True
) -> list[Layer]:
    """Open an image, its parent, the parent's parent, and so on.

    Parameters
    ----------
    source : str, os.PathLike or int
        Its path, or a descriptor.
    options : OpenOptions
        Without ``chain``, only the image itself is opened.
    parents : bool
        If False, only the image itself is opened, to be described.

    Returns
    -------
    list of Layer
        The image first.  The caller closes them.
    """
    chain = _Chain(options)
    try:
        chain.layers.append(open_layer(source, options, describing=not parents))
        if parents:
            chain.open_parents()
            options.files.refuse_unasked(chain.layers[0].file.path)
        chain.layers[0].warn()
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
        """Open all parents; the caller may have stated the first ones."""
        reader = self.layers[0].reader
        if isinstance(reader, Divided):
            reader.require_extents()
        if not self._options.chain:
            self._refuse_stated_parents()
            return
        for path in self._options.parents:
            self._open_stated_parent(path)
        while (reference := self.layers[-1].reader.backing) is not None:
            self._open_parent(reference)

    def _refuse_stated_parents(self) -> None:
        if self._options.parents:
            raise OptionError(
                "a parent is given, but the image is opened without its chain", path=self._path
            )

    def _open_stated_parent(self, path: str) -> None:
        reference = self.layers[-1].reader.backing
        if reference is None:
            n_given, n_used = len(self._options.parents), len(self.layers) - 1
            text = "a parent is given, but the image has none"
            if n_used:
                text = f"{n_given} parents are given, but the chain has {n_used}: {text}"
            raise OptionError(text, path=self._path)
        # The image may name what cannot be followed, such as a URL.
        with suppress(UnsafeReferenceError):
            reference = self._described(reference)
        format = self._format_of(reference)
        file = self._options.files.open(path, share=self._options.share)
        gate = gate_of(file, self._options._replace(writable=False))
        self._add(file, gate, reference, format)

    def _described(self, reference: BackingReference) -> BackingReference:
        """Return a reference whose name is that of a file, if it is a description."""
        if not is_description(reference.name):
            return reference
        try:
            found = parse_description(reference.name)
        except NotLocalError as error:
            raise UnsafeReferenceError(
                f"names {reference.name[:200]!r} as its parent: {error}; only descriptions of "
                f"one local file are followed; {self._remedy()}".removesuffix("; "),
                path=self._path,
            ) from error
        if found.format is not None:
            stated = self._format_of(reference) if reference.format is not None else None
            described = self._format_of(reference._replace(format=found.format))
            if stated not in (None, described):
                raise CorruptImageError(
                    f"states the format {stated} of its parent, whose description states "
                    f"{described}",
                    path=self._path,
                )
        return reference._replace(
            name=found.filename,
            format=found.format or reference.format,
            without_backing=found.without_backing,
        )

    def _remedy(self) -> str:
        """Return how to state the next parent; empty if no option does."""
        flag, n_parents = self._options.flags.parent, len(self.layers) - 1
        if not flag:
            return ""
        if not n_parents:
            return f"state it with {flag}"
        return f"state it with {flag}, given once for each level from the first parent on"

    def _open_parent(self, reference: BackingReference) -> None:
        """Open the last layer's parent by the first name that leads to it."""
        reference = self._described(reference)
        gate, format = self.layers[-1].gate, self._format_of(reference)
        names = list(dict.fromkeys((reference.name, *reference.other_names)))
        refused: list[Exception] = []
        missing: list[Exception] = []
        for name in names:
            try:
                file = gate.open(name, role="parent", remedy=self._remedy())
            except (FileNotFoundError, NotADirectoryError) as error:
                missing.append(error)
                continue
            except UnsafeReferenceError as error:
                if gate.unstated:
                    raise
                (missing if gate.is_foreign(name) else refused).append(error)
                continue
            try:
                self._add(file, gate.beside(file), reference, format)
            except _WrongParentError as error:
                refused.append(error)
            else:
                return
        if refused:
            raise refused[0]
        raise self._not_found(reference, names, missing)

    def _not_found(
        self,
        reference: BackingReference,
        names: list[str],
        missing: list[Exception],
    ) -> Exception:
        image = self._path
        candidate = self._candidate(reference)
        if candidate is not None:
            text = (
                f"names {reference.name[:200]!r} as its parent, which is not on this host; if it "
                f"is {candidate}, which nothing but the name tells, {self._remedy()}: {candidate}"
            )
            return UnsafeReferenceError(text, path=image)
        if len(missing) == 1 or self.layers[-1].file.folder is None:
            return missing[0]
        tried = ", ".join(repr(name) for name in names)
        text = f"none of the names of its parent exists: {tried}; {self._remedy()}"
        return FileNotFoundError(errno.ENOENT, text.removesuffix("; "), image)

    def _candidate(self, reference: BackingReference) -> str | None:
        """Return a file that may be a parent without an identity, which was moved.

        Only its name tells so: it may be another disk, so the user must state it.
        """
        folder = self.layers[-1].file.folder
        if folder is None or reference.identities or not self._options.flags.parent:
            return None
        for name in names_from_windows_path(reference.name):
            path = os.path.join(folder, name)
            if os.path.isfile(path):
                return path
        return None

    def _format_of(self, reference: BackingReference) -> str:
        """Return the format of the next layer."""
        image = self._path
        if len(self.layers) >= MAX_CHAIN_DEPTH:
            raise LimitExceededError(
                f"more than {MAX_CHAIN_DEPTH} images in a chain of backing files", path=image
            )
        format = reference.format or self._options.backing_format
        if format is None:
            flag = self._options.flags.backing_format
            advice = f"state it ({flag})" if flag else "qemu-img rebase -u -F FORMAT stores it"
            raise WrongFormatError(
                f"names the backing file {reference.name!r} without its format, which is "
                f"never guessed: {advice}",
                path=image,
            )
        try:
            return canonical_name(format)
        except OptionError as error:
            if reference.format is None:
                # The caller stated it, not the image.
                raise
            remedy = ": qemu-img convert reads the whole chain" if format in NOT_READ else ""
            raise UnsupportedFeatureError(
                f"names a backing file of the format {format[:64]!r}, which is not supported"
                f"{remedy}",
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
            reader = open_reader(file, gate, format, damage=self._options.damage, flag="")
            layer = Layer(file, gate, reader, salvages=self._options.salvage)
            stack.callback(layer.close)
            if reference.without_backing:
                refuse_backing(file, layer.reader)
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
