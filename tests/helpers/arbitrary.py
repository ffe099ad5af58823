"""Uses images of random bytes, and checks the outcome."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

from hypothesis import HealthCheck, settings

import imgcore

# Processor time, so that other processes of a busy machine do not count.
MAX_SECONDS = 2.0
HANG_SECONDS = 20
MAX_READ_NBYTES = 1 << 20
CHECKED_FORMATS = ("qcow2", "vhd", "vhdx", "vdi")

relaxed = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


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
    assert time.monotonic() - begun < HANG_SECONDS
