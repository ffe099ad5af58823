"""Finds and opens the parent that a new image shall have."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from imgcore.disk.backing import backing_path
from imgcore.disk.image import open_image
from imgcore.disk.open_options import Flags, OpenOptions
from imgcore.errors import OptionError
from imgcore.files.identity import named_identity

if TYPE_CHECKING:
    from collections.abc import Sequence

    from imgcore.disk.image import Image
    from imgcore.disk.sink_options import SinkOptions
    from imgcore.formats.api import BackingReference


def layer_of_source(
    sources: Sequence[Any], base: str, target: str, opening: OpenOptions
) -> tuple[str, str]:
    """Return a backing file of the source as the target names it, and its format.

    Parameters
    ----------
    sources : sequence
        The image whose backing file is meant.
    base : str
        The backing file.
    target : str
        The new image; the name is relative to its folder.
    opening : OpenOptions
        How to open the image.

    Raises
    ------
    OptionError
        The image has no such backing file.
    """
    if len(sources) == 1 and isinstance(sources[0], str):
        with open_image(sources[0], opening) as image:
            depth = image.depth_of(named_identity(base))
            if depth:
                folder, name = os.path.split(base)
                start = os.path.realpath(os.path.dirname(target))
                name = os.path.relpath(os.path.join(os.path.realpath(folder), name), start)
                return name, image.layers[depth].format_name
    raise OptionError(f"{base} is not one of its backing files", path=str(sources[0]))


def parent_options(writing: SinkOptions, opening: OpenOptions) -> OpenOptions:
    """Return the options for opening a parent, given those for the source."""
    return OpenOptions(
        format=None if writing.backing is None else writing.backing.format,
        allow=opening.allow,
        share=opening.share,
        flags=Flags(format="-F", backing_format="", parent=""),
    )


def open_parent(target: str, reference: BackingReference, options: OpenOptions) -> Image:
    """Open the parent that the image ``target`` will name."""
    return open_image(backing_path(target, reference), options)
