"""Refuses images that cannot be rewritten, before anything is changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from imgcore.errors import CorruptImageError, UnsupportedFeatureError
from imgcore.formats.api import Divided, KnowsConflicts, LeavesOut, RefusesRewriting
from imgcore.formats.registry import get_driver
from imgcore.limits import SECTOR_NBYTES
from imgcore.log import log
from imgcore.rewriting.survey import is_flat

if TYPE_CHECKING:
    from imgcore.disk.image import Image
    from imgcore.disk.layer import Layer
    from imgcore.formats.api import Driver, Reader, Rewriter


def refuse_parent(layer: Layer) -> None:
    """Raise UnsupportedFeatureError if an image has a parent."""
    if layer.reader.backing is not None:
        raise UnsupportedFeatureError(
            "has a parent, which an image of another format cannot name: imgcore convert makes "
            "one image of both",
            path=layer.file.path,
        )
    if isinstance(layer.reader, Divided):
        layer.reader.require_extents()


def refuse_image(image: Image, driver: Driver, *, drop: bool) -> None:
    """Raise UnsupportedFeatureError if an image cannot be rewritten.

    Parameters
    ----------
    image : Image
        Without a parent.
    driver : Driver
        That of the new format.
    drop : bool
        Leave out what else than the disk is in the image.
    """
    refuse_layout(image, driver)
    reader = image.reader
    refuse_damaged(reader, image.path)
    for text in reader.left_out() if isinstance(reader, LeavesOut) else ():
        if not drop:
            raise UnsupportedFeatureError(f"{text}; --drop rewrites it without", path=image.path)
        log.warning("%s: %s", image.path, text)


def refuse_layout(image: Image, driver: Driver) -> None:
    """Raise UnsupportedFeatureError if the disk cannot stay in its file."""
    reader = image.reader
    if driver.name == image.format and not is_flat(reader):
        raise _is_already(image)
    own = {source.file.identity for source in image.sources}
    if not own or (isinstance(reader, Divided) and len(own) > 1):
        raise UnsupportedFeatureError(
            "its disk is not in one file: imgcore convert writes it to one", path=image.path
        )
    file = image.sources[0].file
    if file.is_block_device:
        raise UnsupportedFeatureError(
            "is a block device, which stays what it is: imgcore convert writes an image of it",
            path=image.path,
        )
    if reader.is_flat and file.nbytes % SECTOR_NBYTES:
        raise UnsupportedFeatureError(
            f"its {file.nbytes} bytes are not whole sectors of {SECTOR_NBYTES}: imgcore convert "
            "fills up the last one",
            path=image.path,
        )


def refuse_damaged(reader: Reader, path: str) -> None:
    """Raise ImgcoreError if an image's tables cannot be relied on.

    Where guest data is not read, blocks that overlap each other or a table would stay
    unnoticed.
    """
    if isinstance(reader, RefusesRewriting):
        reader.refuse_rewriting()
    if not get_driver(reader.format_name).has_tables:
        return
    report = reader.conflicts() if isinstance(reader, KnowsConflicts) else reader.check()
    if report.corruptions:
        raise CorruptImageError(
            f"its tables contradict each other ({report.first_corruption}): imgcore check -r all "
            "mends some images, and imgcore convert makes a new one of what it reads",
            path=path,
        )


def refuse_same_kind(image: Image, rewriter: Rewriter) -> None:
    """Raise UnsupportedFeatureError if nothing would change."""
    if rewriter.format_name == image.format and rewriter.rule is None:
        raise _is_already(image)


def _is_already(image: Image) -> UnsupportedFeatureError:
    return UnsupportedFeatureError(
        f"is {image.format} already: imgcore convert writes it with other options",
        path=image.path,
    )
