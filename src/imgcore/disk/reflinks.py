"""How much a target has in common with its source: the keyword ``reflink``."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from imgcore.errors import OptionError, UnsupportedFeatureError
from imgcore.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from imgcore.disk.source import Source
    from imgcore.engine.reflinks import ReflinkCount
    from imgcore.engine.source_file import SourceFile
    from imgcore.files.byte_source import ByteSource
    from imgcore.files.target_file import TargetFile
    from imgcore.formats.api import Writer


class Reflink(Enum):
    """Whether data is reflinked (``convert --reflink``).

    Attributes
    ----------
    NEVER
        All data is copied.
    AUTO
        Data is read and tested for zeros; then it is reflinked where that is possible.
    ALWAYS
        Data is reflinked without being read, and copied where that is not possible.
    STRICT
        As ALWAYS, but data that would have to be copied is an error.
    """

    NEVER = "never"
    AUTO = "auto"
    ALWAYS = "always"
    STRICT = "strict"

    @classmethod
    def from_keyword(cls, value: bool | str) -> Reflink:
        """Return the member for a keyword; True is AUTO, False is NEVER."""
        if not isinstance(value, str):
            return cls.AUTO if value else cls.NEVER
        names = [member.value for member in cls]
        if value not in names:
            raise OptionError(f"reflink={value!r}: one of {', '.join(names)} is needed")
        return cls(value)

    @property
    def is_required(self) -> bool:
        """Whether the file system must support reflinks."""
        return self in (Reflink.ALWAYS, Reflink.STRICT)

    def refuse(self, reason: str, path: str | None = None) -> None:
        """Raise OptionError: another option rules out reflinks."""
        raise OptionError(f"--reflink={self.value}: {reason}", path=path)

    def refuse_copies(self, count: ReflinkCount, path: str) -> None:
        """Raise UnsupportedFeatureError if data would have to be copied, for STRICT.

        The end of a disk that does not fill a block of the file system is copied.
        """
        nbytes = count.copied - count.unaligned_end
        if self is Reflink.STRICT and nbytes:
            raise UnsupportedFeatureError(
                f"--reflink=strict: {format_size(nbytes)} of "
                f"{format_size(count.copied + count.reflinked)} would have to be copied; "
                "--reflink=always copies them",
                path=path,
            )


def refuse_own_blocks(reflink: Reflink, source: Source, writer: Writer) -> None:
    """Raise OptionError if the target's blocks cannot be those of the source."""
    from imgcore.engine.geometry import CodecId

    if not source.sources:
        reflink.refuse("a stream has no blocks that could be reflinked", source.path)
    if writer.geometry.codec.codec is not CodecId.NONE:
        reflink.refuse("compressed blocks cannot be reflinked")
    if writer.needs_own_blocks:
        reflink.refuse("preallocated space cannot be reflinked")


def reflinkable_units(
    reflink: Reflink, sources: Sequence[SourceFile], target: TargetFile
) -> list[int]:
    """Return the file system's block size for each source file.

    It is 0 for a file that the target cannot be reflinked to.  The data of all files
    is written back, so that their holes are certain.  The first file that fits decides
    the target's flag "no copy on write".

    Raises
    ------
    UnsupportedFeatureError
        No file can be reflinked.
    """
    from imgcore.files.reflinks import prepare_reflinks, reflink_block_nbytes

    errors: dict[ByteSource, OSError | None] = {}
    for source in sources:
        if source.file not in errors:
            none_fits = all(errors.values())
            errors[source.file] = prepare_reflinks(source.file, target, may_change_flag=none_fits)
    if errors and all(errors.values()):
        error = next(iter(errors.values()))
        assert error is not None
        raise UnsupportedFeatureError(
            f"--reflink={reflink.value}: its blocks cannot be reflinked to {target.path} "
            f"({error.strerror}); --reflink=auto copies what cannot be reflinked",
            path=sources[0].file.path,
        )
    return [
        0 if errors[source.file] is not None else reflink_block_nbytes(source.file)
        for source in sources
    ]
