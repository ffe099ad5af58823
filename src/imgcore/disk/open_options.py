"""The options for opening an image, as one record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, SupportsIndex

from imgcore.border import FilePath, byte_count, file_names
from imgcore.errors import OptionError
from imgcore.files.given_files import NO_FILES, GivenFiles
from imgcore.files.page_cache import CacheMode
from imgcore.files.reference_gate import folder_names
from imgcore.formats.shared.damage import SALVAGING, STRICT, Damage
from imgcore.limits import DEFAULT_CACHE_NBYTES, MAX_CACHE_NBYTES
from imgcore.sizes import format_size, parse_size

if TYPE_CHECKING:
    from collections.abc import Iterable

    from imgcore.formats.option_texts import OptionTexts


class Flags(NamedTuple):
    """The command's options for opening one image, for the advice in messages.

    An empty text means that the image that is opened has no such option.
    """

    format: str = "-f"
    backing_format: str = "--backing-format"
    parent: str = "--parent"


FLAGS: Final = Flags()


class OpenOptions(NamedTuple):
    """The keywords of `imgcore.open`, which documents them, and further facts.

    ``page_cache`` is the ``source_cache`` of `imgcore.convert`.

    ``files`` also has those that are open already when an image is refreshed.

    ``writable`` is set by the mode "r+": the image, but not its parents, is written in
    place.

    ``flags`` are the command's options for these keywords.  ``without_backing`` is set
    if the image's name says that its backing file is left out.  ``salvage`` is that of
    `imgcore.convert`.

    ``stream_nbytes`` is the size of the disk in a stream, if it is stated; ``on_wait``
    is called several times a second while a stream has nothing to read.
    """

    format: str | None = None
    backing_format: str | None = None
    parents: tuple[str, ...] = ()
    read_options: OptionTexts | None = None
    allow: tuple[str, ...] = ()
    share: bool = False
    flags: Flags = FLAGS
    without_backing: bool = False
    salvage: bool = False
    chain: bool = True
    cache_nbytes: int = DEFAULT_CACHE_NBYTES
    files: GivenFiles = NO_FILES
    writable: bool = False
    stream_nbytes: int | None = None
    on_wait: Callable[[], None] | None = None
    page_cache: CacheMode = CacheMode.KEEP

    @property
    def damage(self) -> Damage:
        """What the readers of the image and its parents do about damage."""
        return SALVAGING if self.salvage else STRICT

    @property
    def interprets(self) -> bool:
        """Whether they state how the image is read, beyond what its files state."""
        return bool(
            self.format is not None or self.parents or self.read_options or self.without_backing
        )

    @classmethod
    def from_keywords(
        cls,
        *,
        format: str | None = None,
        backing_format: str | None = None,
        parent: FilePath | Sequence[FilePath] | None = None,
        read_options: OptionTexts | None = None,
        allow: Iterable[FilePath] = (),
        share: bool = False,
        flags: Flags = FLAGS,
        salvage: bool = False,
        chain: bool = True,
        cache: SupportsIndex | str = DEFAULT_CACHE_NBYTES,
        files: Mapping[str, int] | None = None,
        writable: bool = False,
        size: SupportsIndex | str | None = None,
    ) -> OpenOptions:
        """Return the record.

        OptionError if ``allow`` is a lone string, or the cache too large.
        """
        return cls(
            format=format,
            backing_format=backing_format,
            parents=() if parent is None else file_names(parent),
            read_options=read_options,
            allow=tuple(folder_names(allow)),
            share=share,
            flags=flags,
            salvage=salvage,
            chain=chain,
            cache_nbytes=_cache_nbytes(cache),
            files=NO_FILES if files is None else GivenFiles(files),
            writable=writable,
            stream_nbytes=None if size is None else _stream_nbytes(size),
        )


def _stream_nbytes(size: SupportsIndex | str) -> int:
    return parse_size(size) if isinstance(size, str) else byte_count(size, "size")


def _cache_nbytes(cache: SupportsIndex | str) -> int:
    nbytes = parse_size(cache) if isinstance(cache, str) else byte_count(cache, "cache")
    if nbytes > MAX_CACHE_NBYTES:
        raise OptionError(f"cache is {nbytes} bytes, allowed up to {format_size(MAX_CACHE_NBYTES)}")
    return nbytes
