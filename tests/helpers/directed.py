"""Turns an image's own file into an image of another format, without a journal."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import imgcore
from imgcore.engine.progress import Tally
from imgcore.files.staged_file import StagedFile
from imgcore.files.target_file import TargetFile
from imgcore.formats.api import WriteRequest
from imgcore.formats.option_texts import parse_options
from imgcore.formats.registry import get_driver
from imgcore.rewriting.block_size import fitting_director
from imgcore.rewriting.director import Director, RewriteCost


def director(image: imgcore.Image, target_format: str, options: Mapping[str, Any]) -> Director:
    """Return the director of an open image's conversion."""
    driver = get_driver(target_format)
    request: WriteRequest[Any] = WriteRequest(
        virtual_size=image.virtual_size, options=parse_options(driver, options)
    )
    return fitting_director(image, driver, request, inflate=True)


def rewrite(
    path: Path,
    source_format: str,
    target_format: str,
    options: Mapping[str, Any] | None = None,
    *,
    data: Path | None = None,
) -> RewriteCost:
    """Rewrite the image's file, or that of its data.

    If that is refused, the file has not been changed.
    """
    name = path if data is None else data
    with imgcore.open(path, format=source_format) as image:
        directs = director(image, target_format, options or {})
        with (
            closing(TargetFile(os.open(name, os.O_RDWR), str(name))) as file,
            closing(StagedFile(file, directs.append_offset, directs.overwrites)) as staged,
        ):
            cost = directs.write(staged, Tally(image.virtual_size, None))
            staged.apply()
    return cost


def content(path: Path, image_format: str) -> bytes:
    """Return all bytes of a small image's disk."""
    with imgcore.open(path, format=image_format) as image:
        return image.read(0, image.virtual_size)
