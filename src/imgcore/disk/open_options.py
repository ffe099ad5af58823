"""The options for opening an image, as one record."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from imgcore.border import FilePath, file_name
from imgcore.files.reference_gate import folder_names

if TYPE_CHECKING:
    from collections.abc import Iterable

    from imgcore.formats.option_texts import OptionTexts


class OpenOptions(NamedTuple):
    """The keywords of `imgcore.open`, which documents them."""

    format: str | None = None
    backing_format: str | None = None
    parent: str | None = None
    read_options: OptionTexts | None = None
    allow: tuple[str, ...] = ()
    share: bool = False

    @classmethod
    def from_keywords(
        cls,
        *,
        format: str | None = None,
        backing_format: str | None = None,
        parent: FilePath | None = None,
        read_options: OptionTexts | None = None,
        allow: Iterable[FilePath] = (),
        share: bool = False,
    ) -> OpenOptions:
        """Return the record; OptionError if ``allow`` is a lone string."""
        return cls(
            format=format,
            backing_format=backing_format,
            parent=None if parent is None else file_name(parent),
            read_options=read_options,
            allow=tuple(folder_names(allow)),
            share=share,
        )
