"""Fixtures that every test may use; no product code is imported before a test needs it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.helpers import images

# For runs in which time says nothing: emulated, sanitized.
settings.register_profile("slow", deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="session")
def raw_images(tmp_path_factory: pytest.TempPathFactory) -> Callable[[images.RawImage], Path]:
    """Give the path of a generated raw image, each made once in a session; never write to it."""
    folder = tmp_path_factory.mktemp("raw")

    def get(image: images.RawImage) -> Path:
        path = folder / f"{image.name}.raw"
        if not path.exists():
            image.write(path)
            path.chmod(0o444)
        return path

    return get


def pytest_configure() -> None:
    """Let signals mean what they mean: a runner in the background may have them ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def pytest_report_header() -> list[str]:
    """State what makes a run differ from another."""
    required = "yes" if os.environ.get("IMGCORE_REQUIRE_QEMU") else "no"
    line = (
        f"imgcore: seed {images.SEED} (IMGCORE_TEST_SEED), qemu-img required: {required}, "
        f"peers: {os.environ.get('IMGCORE_PEERS', 'none')}"
    )
    return [line]
