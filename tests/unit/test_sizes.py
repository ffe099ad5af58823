"""Sizes are parsed and formatted."""

from __future__ import annotations

import pytest

from imgcore.errors import OptionError
from imgcore.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        ("512", 512),
        ("512B", 512),
        ("4k", 4096),
        ("4K", 4096),
        ("64KiB", 65536),
        ("1.5G", 3 << 29),
        ("10 G", 10 << 30),
        ("2T", 2 << 40),
        ("1P", 1 << 50),
        ("7E", 7 << 60),
        ("0.1k", 102),
        ("0x200", 512),
        (" 1M ", 1 << 20),
        ("9223372036854775807", (1 << 63) - 1),
    ],
)
def test_parse(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text",
    ["", "G", "-1", "1KB", "1,5G", "1e3", "1.G", ".5G", "nan", "8E", "0x", "1" * 1000, "1\n2", "٣"],
)
def test_parse_refuses(text: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_size(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (1023, "0.999 KiB"),
        (1024, "1 KiB"),
        (65536, "64 KiB"),
        (3 << 29, "1.5 GiB"),
        ((1 << 40) - 1, "1 TiB"),
        (1 << 63, "8 EiB"),
    ],
)
def test_format(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text
