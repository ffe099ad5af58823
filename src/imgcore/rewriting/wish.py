"""The wish to make an image one of another format, and who fulfils it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from imgcore.disk.image import Image
from imgcore.disk.layer import open_layer
from imgcore.disk.sink import warn_about_sectors
from imgcore.errors import UnsupportedFeatureError
from imgcore.formats.api import SectorSized, WriteRequest
from imgcore.formats.option_texts import parse_options
from imgcore.formats.registry import PLAIN_FORMAT, get_driver
from imgcore.rewriting.block_size import candidates, fitting_director
from imgcore.rewriting.director import Director, RewriteCost
from imgcore.rewriting.refusals import refuse_image, refuse_parent, refuse_same_kind

if TYPE_CHECKING:
    from imgcore.disk.open_options import OpenOptions
    from imgcore.formats.api import Driver
    from imgcore.formats.options import FormatOptions


class Wish(NamedTuple):
    """What an image shall become.

    Attributes
    ----------
    driver : Driver
        That of the new format.
    options : FormatOptions
    drop : bool
        Leave out what else than the disk is in the image.
    inflate : bool
        Decompress blocks that the new format cannot refer to.
    trust_blocks : bool
        Do not verify compressed blocks that stay compressed.
    """

    driver: Driver
    options: FormatOptions
    drop: bool = False
    inflate: bool = False
    trust_blocks: bool = False

    @classmethod
    def from_keywords(
        cls,
        target_format: str,
        options: Mapping[str, Any] | Sequence[str] | None,
        **flags: bool,
    ) -> Wish:
        """Return the record; OptionError if the format or an option is unknown."""
        driver = get_driver(target_format)
        return cls(driver, parse_options(driver, options), **flags)

    @property
    def _how(self) -> dict[str, bool]:
        return {"inflate": self.inflate, "trust_blocks": self.trust_blocks}

    def refuse(self, image: Image) -> None:
        """Raise UnsupportedFeatureError if an image cannot be rewritten at all."""
        refuse_image(image, self.driver, drop=self.drop)

    def director(self, image: Image, name: str) -> Director:
        """Return who makes an image one of this kind, with a new name.

        Raises
        ------
        ImgcoreError
            It cannot be rewritten.
        """
        self.refuse(image)
        request = WriteRequest(
            image.virtual_size,
            self.options,
            target_name=name,
            logical_sector_nbytes=image.logical_sector_nbytes,
        )
        try:
            director = fitting_director(image, self.driver, request, **self._how)
        except UnsupportedFeatureError as error:
            # A rewriter does not know the image's name.
            raise UnsupportedFeatureError(error.reason, path=image.path) from error
        refuse_same_kind(image, director.rewriter)
        return director

    def costs(self, image: Image, name: str) -> list[RewriteCost]:
        """Return what this wish costs, then what it would with other block sizes.

        Sizes that the format cannot have here are left out.
        """
        first = self.director(image, name)
        costs = [first.rehearse()]
        others = candidates(image, self.driver, first.request, first.survey, **self._how)
        costs += (other.rehearse() for other in others)
        return [cost for at, cost in enumerate(costs) if cost not in costs[:at]]


@contextmanager
def open_alone(path: str, opening: OpenOptions) -> Iterator[Image]:
    """Open an image that has no parent.

    Raises
    ------
    UnsupportedFeatureError
        It has one, which is not opened.
    """
    with open_layer(path, opening) as layer:
        refuse_parent(layer)
        layer.warn()
        with Image([layer], path, opening) as image:
            yield image


def warn_about_disk(image: Image, director: Director, name: str) -> None:
    """Log a warning if the guest will see other sectors than before."""
    rewriter = director.rewriter
    warn_about_sectors(
        os.path.join(os.path.dirname(image.path), name),
        rewriter.logical_sector_nbytes if isinstance(rewriter, SectorSized) else None,
        image.path,
        image.logical_sector_nbytes,
        is_plain=rewriter.format_name == PLAIN_FORMAT,
    )
