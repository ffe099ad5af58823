"""The image that a verb works on: opened by the verb, or open already."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from imgcore.border import source_name
from imgcore.disk.image import Image, open_image
from imgcore.disk.open_options import OpenOptions
from imgcore.errors import ImgcoreError, OptionError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imgcore.border import FilePath


@contextmanager
def opened_for_update(image: FilePath | int | Image, options: OpenOptions) -> Iterator[Image]:
    """Yield an image that is written in place.

    Parameters
    ----------
    image : str, bytes, os.PathLike, int or Image
        A path or a descriptor, which is opened and closed; or an image that is open
        with the mode "r+", which stays open.
    options : OpenOptions
        How to open it.

    Raises
    ------
    OptionError
        There are options for an image that is open already.
    ImgcoreError
        It is open for reading only.
    """
    if isinstance(image, Image):
        require_no_options(image, options)
        if image.mode != "r+":
            raise ImgcoreError("the image is open for reading only", path=image.path)
        yield image
        return
    with open_image(source_name(image), options._replace(writable=True)) as opened:
        yield opened


def require_no_options(image: Image, options: OpenOptions) -> None:
    """Raise OptionError if there are options for opening an image that is open."""
    if options != OpenOptions.from_keywords():
        raise OptionError("an open image takes no options for opening", path=image.path)
