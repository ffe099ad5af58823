"""Rewrite an image's file without a journal."""

from __future__ import annotations

import os
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
from imgcore.rewriting.director import Director, RewriteCost


def director_for(
    image: imgcore.Image, target: str, *options: str, name: str = "", **more: Any
) -> Director:
    """Return what directs the rewriting to a target format, with a name for it."""
    driver = get_driver(target)
    request = WriteRequest(image.virtual_size, parse_options(driver, options), target_name=name)
    return Director(image, driver, request, **more)


def open_target(path: Path) -> TargetFile:
    """Open a file for writing; the caller closes it."""
    return TargetFile(os.open(path, os.O_RDWR), str(path))


def rewritten(path: Path, source: str, target: str, *options: str, **more: Any) -> RewriteCost:
    """Rewrite a file in place, without a journal; the rehearsal must foresee it."""
    with imgcore.open(path, format=source, share=True) as image:
        director = director_for(image, target, *options, **more)
        expected = director.rehearse()
        with closing(open_target(Path(image.sources[0].file.path))) as file:
            staged = StagedFile(file, director.survey.file_nbytes, director.overwrites)
            with closing(staged):
                cost = director.write(staged, Tally(image.virtual_size, None))
                staged.apply()
    assert (cost.bytes_stayed, cost.bytes_moved) == (expected.bytes_stayed, expected.bytes_moved)
    assert (cost.bytes_written, cost.file_size) <= (expected.bytes_written, expected.file_size)
    return cost
