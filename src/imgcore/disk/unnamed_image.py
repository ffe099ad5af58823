"""The image of a target that has no name yet, for writing in place."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING

from imgcore.disk.image import open_image
from imgcore.disk.open_options import OpenOptions
from imgcore.files.given_files import GivenFiles
from imgcore.files.unnamed_file import UnnamedFile

if TYPE_CHECKING:
    from imgcore.disk.image import Image
    from imgcore.files.target import Target


def open_unnamed(target: Target, format: str) -> Image:
    """Return the image, without its parent; it is not synced when it is closed."""
    name = os.path.abspath(target.path)
    with ExitStack() as stack:
        held = []
        for file in target.written():
            path = name if file is target.main else os.path.abspath(file.path)
            held.append(UnnamedFile.of(file, path))
            stack.callback(held[-1].close)
        options = OpenOptions.from_keywords(format=format, chain=False)
        options = options._replace(files=GivenFiles(held=held), writable=True)
        return open_image(name, options)
