"""Uses images of random bytes, and checks the outcome."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

from hypothesis import HealthCheck, settings

import imgcore
from imgcore.disk.image import open_image
from imgcore.disk.open_options import OpenOptions
from imgcore.disk.salvage import Salvage
from imgcore.engine.extents import Kind

# Processor time, so that other processes of a busy machine do not count.
MAX_SECONDS = 2.0
HANG_SECONDS = 20
MAX_READ_NBYTES = 1 << 20
# All tables of a disk are read.
MAX_SALVAGED_NBYTES = 1 << 45
CHECKED_FORMATS = ("qcow2", "vhd", "vhdx", "vdi")

relaxed = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def salvage(path: Path, image_format: str | None) -> None:
    """Open an image, whatever its damage is, and read the first of its tables."""
    try:
        options = OpenOptions.from_keywords(format=image_format, salvage=True)
        with open_image(str(path), options) as image:
            if not 0 < image.virtual_size <= MAX_SALVAGED_NBYTES:
                return
            lost = Salvage(image.chain, image.first_files)
            end = 0
            for rows in itertools.islice(image.salvaged_extents(lost), 8):
                assert int(rows["guest_offset"][0]) == end
                end += int(rows["length"].sum())
                assert (rows["kind"] < Kind.LOST).all()
    except imgcore.ImgcoreError as error:
        assert "\n" not in str(error)
    except OSError as error:
        assert error.filename is not None


def use(path: Path, image_format: str | None) -> None:
    """Open, describe, map and read an image.

    Only ImgcoreError, or an OSError with a file's name, may be raised.
    """
    begun, cpu_begun = time.monotonic(), time.process_time()
    try:
        with imgcore.open(str(path), format=image_format) as image:
            image.info()
            length = min(image.virtual_size, MAX_READ_NBYTES)
            for _ in itertools.islice(image.extents(0, image.virtual_size), 8):
                pass
            if length:
                image.read(0, length)
                image.read(image.virtual_size - length, length)
        if image_format in CHECKED_FORMATS:
            imgcore.check(str(path), format=image_format)
    except imgcore.ImgcoreError as error:
        assert str(error)
        assert "\n" not in str(error)
    except OSError as error:  # a damaged name of another file
        assert error.filename is not None
    assert time.process_time() - cpu_begun < MAX_SECONDS
    salvage(path, image_format)
    assert time.process_time() - cpu_begun < 2 * MAX_SECONDS
    assert time.monotonic() - begun < HANG_SECONDS
