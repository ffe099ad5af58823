"""Fixtures for every test; they do not import imgcore before a test needs it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.helpers import images

# For slow runs: emulated or sanitized.
settings.register_profile("slow", deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="session")
def raw_images(tmp_path_factory: pytest.TempPathFactory) -> Callable[[images.RawImage], Path]:
    """Return a function for the path of a generated raw image, which is read-only."""
    folder = tmp_path_factory.mktemp("raw")

    def get(image: images.RawImage) -> Path:
        path = folder / f"{image.name}.raw"
        if not path.exists():
            image.write(path)
            path.chmod(0o444)
        return path

    return get


@pytest.fixture(autouse=True)
def close_readers() -> Iterator[None]:
    """Close the readers that a helper of the test has opened."""
    yield
    if (reading := sys.modules.get("tests.helpers.reading")) is not None:
        reading.close_opened()


def pytest_configure() -> None:
    """Reset signal handlers: a runner in the background may ignore the signals."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)


def pytest_report_header() -> list[str]:
    """State the settings of this run."""
    required = "yes" if os.environ.get("IMGCORE_REQUIRE_QEMU") else "no"
    line = (
        f"imgcore: seed {images.SEED} (IMGCORE_TEST_SEED), qemu-img required: {required}, "
        f"peers: {os.environ.get('IMGCORE_PEERS', 'none')}"
    )
    return [line]
