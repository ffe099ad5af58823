"""Writing VMDK disks: options, the choice of the kind, and the kinds with flat extents."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, ClassVar, Final

from imgcore.errors import OptionError
from imgcore.formats.api import Measurement
from imgcore.formats.shared.flat import flat_geometry
from imgcore.formats.vmdk.descriptor import compose_descriptor
from imgcore.formats.vmdk.options import (
    FLAT_KINDS,
    VmdkPlan,
    is_plain_name,
    plan_request,
    refuse_in_place,
)

if TYPE_CHECKING:
    from imgcore.engine.extents import Placements
    from imgcore.files.target import Target
    from imgcore.files.target_file import TargetFile
    from imgcore.formats.api import Writer, WriteRequest

_DESCRIPTOR_NBYTES: Final = 1024


def writer_for(request: WriteRequest) -> Writer:
    """Return the writer for the request's subformat.

    Raises
    ------
    OptionError
        An option's value is not allowed, or does not go with the others.
    LimitExceededError
        The disk is too large for the subformat.
    UnsupportedFeatureError
        The request has a backing file.
    """
    from imgcore.formats.vmdk.sparse_writer import SparseWriter, StreamWriter

    plan = plan_request(request)
    if plan.subformat == "streamOptimized":
        return StreamWriter(plan)
    if plan.subformat == "monolithicSparse":
        return SparseWriter(plan)
    return FlatWriter(plan)


def measure(request: WriteRequest, data_nbytes: int) -> Measurement:
    """Return the bytes of all files with ``data_nbytes`` of data, and with a full disk.

    Of streamOptimized both are upper bounds, as if nothing could be compressed.
    """
    from imgcore.formats.vmdk import sparse_writer as sparse

    plan = plan_request(request)
    if plan.subformat == "streamOptimized":
        nbytes = sparse.stream_bound_nbytes
        return Measurement(nbytes(plan, data_nbytes), nbytes(plan, plan.virtual_size))
    if plan.subformat == "monolithicSparse":
        nbytes = sparse.sparse_file_nbytes
        return Measurement(nbytes(plan, data_nbytes), nbytes(plan, plan.virtual_size))
    full = _DESCRIPTOR_NBYTES + plan.virtual_size
    if plan.preallocation != "off":
        return Measurement(full, full)
    return Measurement(_DESCRIPTOR_NBYTES + min(data_nbytes, plan.virtual_size), full)


class FlatWriter:
    """Writes monolithicFlat and vmfs: a descriptor, and beside it the disk as it is."""

    format_name: ClassVar[str] = "vmdk"

    def __init__(self, plan: VmdkPlan) -> None:
        self._plan = plan
        self._target: Target | None = None
        self._companion: TargetFile | None = None
        self.logical_sector_nbytes = plan.database.logical_sector_nbytes
        self.first_offset = 0
        self.geometry = flat_geometry(plan.virtual_size, plan.sparse_nbytes)

    @property
    def companion_name(self) -> str:
        """Name of the file with the data."""
        stem, suffix = os.path.splitext(self._plan.name)
        return f"{stem if suffix.lower() == '.vmdk' else self._plan.name}-flat.vmdk"

    def begin(self, target: Target) -> TargetFile:
        """Make the file for the data at its full size and return it."""
        refuse_in_place(target)
        _refuse_odd_name(self._plan.name, target.path)
        companion = target.companion(self.companion_name)
        if self._plan.preallocation != "off":
            target.require_space(self._plan.virtual_size)
        companion.truncate(self._plan.virtual_size)
        companion.preallocate(self._plan.preallocation, self._plan.virtual_size)
        self._target, self._companion = target, companion
        return companion

    def place(self, first_block: int, placements: Placements, next_offset: int) -> int:
        """Do nothing: every block has its place."""
        return next_offset

    def finish(self, next_offset: int) -> None:
        """Write the descriptor."""
        assert self._target is not None
        assert self._companion is not None
        kind = FLAT_KINDS[self._plan.subformat]
        line = f'RW {self._plan.n_sectors} {kind} "{self.companion_name}"'
        if kind == "FLAT":
            line += " 0"
        text = compose_descriptor(
            self._plan.subformat, line, self._plan.n_sectors, self._plan.database
        )
        self._companion.truncate(self._plan.virtual_size)
        self._target.main.pwrite(0, text)
        self._target.main.truncate(len(text))


def _refuse_odd_name(name: str, path: str) -> None:
    if not is_plain_name(name):
        raise OptionError(
            "a name with quotes, colons, control characters or bytes that are not UTF-8 cannot "
            "stand in a VMDK descriptor",
            path=path,
        )
