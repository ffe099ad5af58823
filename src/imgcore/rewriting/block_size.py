"""Chooses the new image's block size by how much of the old one could stay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from imgcore.errors import LimitExceededError, OptionError, UnsupportedFeatureError
from imgcore.formats.options import AUTO, block_size, block_sizes, with_block_size
from imgcore.rewriting.director import Director
from imgcore.rewriting.survey import survey_image

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imgcore.disk.image import Image
    from imgcore.formats.api import Driver, Survey, WriteRequest


def fitting_director(
    image: Image, driver: Driver, request: WriteRequest[Any], **how: bool
) -> Director:
    """Return the director for a request; see `Director`, also for ``how``.

    If the request leaves the block size open (``auto``), it is the one at which least
    of the disk moves: of several, the largest.  If the format decides, its usual size
    is preferred to others at which as much moves.
    """
    size = block_size(request.options)
    sizes = block_sizes(request.options)
    if not sizes or size not in (None, AUTO):
        return Director(image, driver, request, survey=None, **how)
    survey = survey_image(image)
    best = None
    if size is None:
        best = Director(image, driver, request, survey=survey, **how)
        survey = best.survey
    for director in candidates(image, driver, request, survey, **how):
        if best is None or director.moved_nbytes < best.moved_nbytes:
            best = director
    return best or Director(image, driver, request, survey=survey, **how)


def candidates(
    image: Image,
    driver: Driver,
    request: WriteRequest[Any],
    survey: Survey,
    **how: bool,
) -> Iterator[Director]:
    """Yield a director for each block size that may be worth it, largest first.

    The last one is the first at which nothing moves: smaller blocks only need larger
    tables.  There is none for sizes that the disk is too large for, for example, nor
    for a format that has no choice.
    """
    for nbytes in sorted(block_sizes(request.options), reverse=True):
        sized = request._replace(options=with_block_size(request.options, nbytes))
        try:
            director = Director(image, driver, sized, survey=survey, **how)
        except (OptionError, LimitExceededError, UnsupportedFeatureError):
            continue
        # Its compressed blocks are verified once.
        survey = director.survey
        yield director
        if not director.moved_nbytes:
            return
