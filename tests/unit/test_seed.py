"""Random identities that are drawn again from the seed of a request."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from imgcore.formats.api import WriteRequest
from imgcore.formats.registry import get_driver
from imgcore.formats.shared.identities import random_octets, random_uuid

_FORMATS = ("vhd", "vhdx", "vdi", "vmdk")


def _verified(name: str, seed: bytes | None) -> Any:
    driver = get_driver(name)
    request = WriteRequest(1 << 20, driver.options(), seed=seed)
    return importlib.import_module(driver.options_module).WriteOptions.of(request)


@pytest.mark.parametrize("name", _FORMATS)
def test_the_same_seed_gives_the_same_image(name: str) -> None:
    assert _verified(name, b"a" * 32) == _verified(name, b"a" * 32)
    assert _verified(name, b"a" * 32) != _verified(name, b"b" * 32)
    assert _verified(name, None) != _verified(name, None)


def test_purposes_do_not_share_bytes() -> None:
    request = WriteRequest(0, get_driver("raw").options(), seed=b"a" * 32)
    assert random_uuid(request, "uuid") != random_uuid(request, "modification")
    assert random_uuid(request, "uuid").version == 4
    assert len(random_octets(request, "cid", 12)) == 12
