"""Copies into an image, in place, what it has from its parents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from imgcore.disk.block_copy import Copied, copy_areas
from imgcore.disk.children import warn_about_new_identity
from imgcore.disk.own_areas import missing_areas
from imgcore.errors import OptionError, UnsupportedFeatureError
from imgcore.limits import KIB

if TYPE_CHECKING:
    from collections.abc import Sequence

    from imgcore.disk.copy_job import CopyJob
    from imgcore.disk.image import Image

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


def flatten_image(image: Image, job: CopyJob, allow: Sequence[str]) -> Copied:
    """Copy everything from the parents into an image, and then remove its link.

    Without a parent, nothing is done.  ``allow`` has further folders with children.

    Raises
    ------
    OSError, ImgcoreError
        An image cannot be read, or this one cannot be written.  It reads as before.
    """
    if image.reader.backing is None:
        return Copied()
    require_rebasable(image)
    warn_about_new_identity(image, allow)
    with image.kept_open() as state:
        copied = copy_areas(
            image,
            image,
            missing_areas(state, image.block_size),
            threads=job.threads,
            report=job.note_copied,
            control=job.control,
            grain=max(image.block_size, _MIN_GRAIN_NBYTES),
            skip_zeros=True,
        )
    job.run.phase = "syncing"
    image.flush()
    job.run.keep()
    image.set_backing(None)
    return copied
