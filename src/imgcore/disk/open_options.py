"""The options for opening an image, as one record."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from imgcore.files.reference_gate import folder_names
from imgcore.formats.shared.damage import SALVAGING, STRICT, Damage

if TYPE_CHECKING:
    from collections.abc import Iterable

    from imgcore.formats.option_texts import OptionTexts


class OpenOptions(NamedTuple):
    """The keywords of `imgcore.open`, which documents them, and ``salvage``."""

    format: str | None = None
    backing_format: str | None = None
    parent: str | None = None
    read_options: OptionTexts | None = None
    allow: tuple[str, ...] = ()
    share: bool = False
    salvage: bool = False

    @property
    def damage(self) -> Damage:
        """What the readers of the image and its parents do about damage."""
        return SALVAGING if self.salvage else STRICT

    @classmethod
    def from_keywords(
        cls,
        *,
        format: str | None = None,
        backing_format: str | None = None,
        parent: str | os.PathLike[str] | None = None,
        read_options: OptionTexts | None = None,
        allow: Iterable[str | os.PathLike[str]] = (),
        share: bool = False,
        salvage: bool = False,
    ) -> OpenOptions:
        """Return the record; OptionError if ``allow`` is a lone string."""
        return cls(
            format=format,
            backing_format=backing_format,
            parent=None if parent is None else os.fspath(parent),
            read_options=read_options,
            allow=tuple(folder_names(allow)),
            share=share,
            salvage=salvage,
        )
