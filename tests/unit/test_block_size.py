"""A block size of ``auto``: the one at which least moves, of several the largest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.helpers.directed import content, rewrite
from tests.helpers.reading import poke
from tests.helpers.vhdx import MIB, pattern

import imgcore
from imgcore.errors import OptionError
from imgcore.formats.option_texts import options_help, parse_options
from imgcore.formats.options import AUTO, block_sizes
from imgcore.formats.registry import get_driver

KIB = 1024
OPTIONS = {
    "qcow2": "cluster_size",
    "vmdk": "grain_size",
    "vhdx": "block_size",
    "vdi": "block_size",
}


@pytest.mark.parametrize(
    ("source", "options", "target", "expected"),
    [
        # Of a raw disk, the first block moves: 1 MiB always does.
        ("raw", {}, "qcow2", MIB),
        ("raw", {}, "vhdx", MIB),
        ("raw", {}, "vdi", MIB),
        ("vhdx", {"block_size": "2M"}, "vdi", MIB),
        ("vdi", {}, "qcow2", MIB),
        ("vdi", {}, "vhdx", MIB),
        ("vdi", {"block_size": "4M"}, "vhdx", 4 * MIB),
        ("qcow2", {"cluster_size": "2M"}, "vhdx", 2 * MIB),
        ("vhd", {}, "qcow2", 4 * KIB),
    ],
)
def test_most_stays(
    tmp_path: Path, source: str, options: dict[str, str], target: str, expected: int
) -> None:
    raw, path = tmp_path / "d.raw", tmp_path / "a"
    with raw.open("wb") as file:
        file.truncate(40 * MIB)
    poke(raw, *((at, pattern(at, 4 * MIB)) for at in range(0, 32 * MIB, 8 * MIB)))
    poke(raw, (37 * MIB, pattern(1, MIB)))
    imgcore.convert(raw, path, target_format=source, options=options, sync=False)
    cost = rewrite(path, source, target, {OPTIONS[target]: AUTO})
    assert cost.block_size == expected
    assert cost.bytes_moved == (MIB if source == "raw" else 0)
    assert content(path, target) == raw.read_bytes()
    assert imgcore.check(path, format=target).ok


@pytest.mark.parametrize(
    ("source", "options", "expected"),
    [
        ("vdi", {}, MIB),
        ("vhd", {"subformat": "fixed"}, MIB),
        ("qcow2", {"cluster_size": "2M"}, 2 * MIB),
        ("vdi", {"block_size": "32M"}, 32 * MIB),
        ("vdi", {"block_size": "64M"}, 32 * MIB),
    ],
)
def test_the_format_decides(
    tmp_path: Path, source: str, options: dict[str, str], expected: int
) -> None:
    """VHDX blocks are usually of 32 MiB, but not if then more would move."""
    raw, path = tmp_path / "d.raw", tmp_path / "a"
    with raw.open("wb") as file:
        file.truncate(128 * MIB)
    poke(raw, (0, pattern(1, 7 * MIB)), (19 * MIB, pattern(2, MIB)))
    imgcore.convert(raw, path, target_format=source, options=options, sync=False)
    cost = rewrite(path, source, "vhdx")
    assert cost.block_size == expected
    assert content(path, "vhdx") == raw.read_bytes()


@pytest.mark.parametrize("name", OPTIONS)
def test_elsewhere_it_is_the_default(tmp_path: Path, name: str) -> None:
    raw = tmp_path / "d.raw"
    raw.write_bytes(pattern(1, 100 * KIB))
    images = []
    for number, options in enumerate(({OPTIONS[name]: AUTO}, {})):
        path = tmp_path / f"{number}.{name}"
        imgcore.convert(raw, path, options=options, sync=False)
        images.append(imgcore.info(path)["cluster-size"])
        imgcore.create(tmp_path / f"empty-{number}.{name}", MIB, options=options)
    assert images[0] == images[1]
    measured = [
        imgcore.measure(raw, target_format=name, options=options)
        for options in ({OPTIONS[name]: AUTO}, {})
    ]
    assert measured[0] == measured[1]


def test_values(tmp_path: Path) -> None:
    for name, option in OPTIONS.items():
        driver = get_driver(name)
        assert (option, "size|auto") in {row[:2] for row in options_help(driver)}
        options: Any = parse_options(driver, [f"{option}=auto"])
        assert getattr(options, option) == AUTO
        assert MIB in block_sizes(options)
        with pytest.raises(OptionError, match="atuo"):
            parse_options(driver, {option: "atuo"})
    assert block_sizes(parse_options(get_driver("raw"))) == ()
