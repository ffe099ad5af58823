"""Raw: the options for writing."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from imgcore.errors import OptionError
from imgcore.formats.options import PREALLOCATION, FormatOptions, choice
from imgcore.formats.shared.write_checks import check_virtual_size
from imgcore.limits import MAX_VIRTUAL_NBYTES, SECTOR_NBYTES

if TYPE_CHECKING:
    from imgcore.formats.api import WriteRequest


class Options(FormatOptions):
    """The ``-o`` options."""

    preallocation: str = choice(
        "off",
        PREALLOCATION,
        "Reserve the whole file: by the file system (falloc) or by writing zeros (full)",
    )


class WriteOptions(NamedTuple):
    """A verified request; sizes in bytes.

    The file has ``exact_nbytes``, which may end inside the disk's last sector.
    """

    virtual_size: int
    exact_nbytes: int
    sparse_nbytes: int
    preallocation: str

    @classmethod
    def of(cls, request: WriteRequest[Options]) -> WriteOptions:
        """Verify a request; raises OptionError."""
        if request.compress:
            raise OptionError("raw cannot be compressed (-c): name the target .raw.zst instead")
        if request.backing is not None:
            raise OptionError("raw cannot have a backing file (-B)")
        check_virtual_size(request.virtual_size, at_most=MAX_VIRTUAL_NBYTES)
        if request.sparse_nbytes % SECTOR_NBYTES or request.sparse_nbytes < 0:
            raise OptionError(
                f"-S is {request.sparse_nbytes}: a multiple of {SECTOR_NBYTES} bytes is needed"
            )
        nbytes, exact_nbytes = request.virtual_size, request.exact_nbytes
        return cls(
            virtual_size=nbytes,
            exact_nbytes=nbytes if exact_nbytes is None else exact_nbytes,
            sparse_nbytes=request.sparse_nbytes,
            preallocation=request.options.preallocation,
        )
