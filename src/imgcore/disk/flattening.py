"""Copies into an image, in place, what it has from its parents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from imgcore.disk.block_copy import Copied, copy_areas
from imgcore.disk.own_areas import missing_areas
from imgcore.errors import OptionError, UnsupportedFeatureError
from imgcore.limits import KIB

if TYPE_CHECKING:
    from imgcore.disk.copy_meter import CopyMeter
    from imgcore.disk.image import Image
    from imgcore.engine.control import Run

_MIN_GRAIN_NBYTES: Final = 64 * KIB


def require_rebasable(image: Image) -> None:
    """Raise unless the image's parent is open, and the format can change it."""
    if image.reader.backing is not None and len(image.layers) == 1:
        raise OptionError("the image is open without its backing files", path=image.path)
    if not image.is_rebasable():
        raise UnsupportedFeatureError(
            f"the backing file of {image.format} images is not changed in place: imgcore convert "
            "writes a new image",
            path=image.path,
        )


def flatten_image(image: Image, *, threads: int, run: Run, meter: CopyMeter) -> Copied:
    """Copy everything from the parents into an image, and then remove its link.

    Raises
    ------
    OSError, ImgcoreError
        An image cannot be read, or this one cannot be written.  It reads as before.
    """
    with image.kept_open() as state:
        copied = copy_areas(
            image,
            image,
            missing_areas(state, image.block_size),
            threads=threads,
            report=meter.copy,
            control=run.control,
            grain=max(image.block_size, _MIN_GRAIN_NBYTES),
            skip_zeros=True,
        )
    run.phase = "syncing"
    image.flush()
    run.keep()
    image.set_backing(None)
    return copied
