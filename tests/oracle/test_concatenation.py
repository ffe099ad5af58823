"""Several sources in one target, as qemu-img concatenates them."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import imgcore
from tests.helpers import qemu
from tests.helpers.command import imgcore as command
from tests.helpers.images import noise, text

MIB = 1 << 20


def convert(source: Path, target: Path, **more: Any) -> Path:
    imgcore.convert(source, target, **more)
    return target


def overlay(source: Path, target: Path) -> Path:
    base = target.with_name(f"{target.stem}-base.raw")
    changed = bytearray(source.read_bytes())
    changed[70_000:90_000] = noise(20_000)
    base.write_bytes(changed)
    return convert(source, target, backing=base, backing_format="raw")


MAKERS: dict[str, tuple[str, Callable[[Path, Path], Path]]] = {
    "raw": ("raw", lambda source, target: convert(source, target)),
    "qcow2": ("qcow2", lambda source, target: convert(source, target)),
    "packed": ("qcow2", lambda source, target: convert(source, target, compress=True)),
    "overlay": ("qcow2", overlay),
    "vmdk": ("vmdk", lambda source, target: convert(source, target)),
    "stream": ("vmdk", lambda source, target: convert(source, target, compress=True)),
    "flat": (
        "vmdk",
        lambda source, target: convert(source, target, options={"subformat": "monolithicFlat"}),
    ),
    "vhd": ("vhd", lambda source, target: convert(source, target)),
    "vhdx": ("vhdx", lambda source, target: convert(source, target)),
    "vdi": ("vdi", lambda source, target: convert(source, target)),
}


def content(nbytes: int, seed: int) -> bytes:
    """Return text, zeros and noise; no part starts or ends at a block."""
    return (text(300_000, seed) + bytes(nbytes - 500_000) + noise(200_000, seed))[:nbytes]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, bytes]]:
    folder = tmp_path_factory.mktemp("parts")
    made = {}
    for number, (name, (suffix, make)) in enumerate(MAKERS.items()):
        data = content(MIB + 512 * (2 * number + 1), number)
        source = folder / f"{name}.source.raw"
        source.write_bytes(data)
        made[name] = make(source, folder / f"{name}.{suffix}"), data
    return made


@pytest.mark.parametrize(
    ("first", "second"), list(itertools.product(MAKERS, MAKERS)), ids=lambda name: name
)
def test_every_pair(
    tmp_path: Path, parts: dict[str, tuple[Path, bytes]], first: str, second: str
) -> None:
    sources = [parts[name] for name in (first, second, first)]
    expected = b"".join(data for _, data in sources)
    paths = [path for path, _ in sources]
    result = imgcore.convert(paths, tmp_path / "a.raw")
    assert (tmp_path / "a.raw").read_bytes() == expected
    assert result.virtual_size == result.bytes_data + result.bytes_zero == len(expected)


@pytest.mark.parametrize(
    ("target", "compress", "options"),
    [
        ("a.qcow2", False, {}),
        ("a.qcow2", True, {}),
        ("a.qcow2", False, {"preallocation": "full"}),
        ("a.vmdk", False, {}),
        ("a.vmdk", True, {}),
        ("a.vhd", False, {}),
        ("a.vhd", False, {"subformat": "fixed"}),
        ("a.vhdx", False, {}),
        ("a.vdi", False, {}),
        ("a.raw.zst", False, {}),
        ("a.raw.gz", False, {}),
    ],
)
@pytest.mark.parametrize("threads", [1, 3])
def test_every_target(
    tmp_path: Path,
    parts: dict[str, tuple[Path, bytes]],
    target: str,
    compress: bool,
    options: dict[str, str],
    threads: int,
) -> None:
    expected = b"".join(data for _, data in parts.values())
    paths = tuple(path for path, _ in parts.values())
    calls: list[imgcore.Progress] = []
    imgcore.convert(
        paths,
        tmp_path / target,
        compress=compress,
        options=options,
        threads=threads,
        progress=calls.append,
    )
    assert calls[-1].done == calls[-1].total == len(expected)
    imgcore.convert(tmp_path / target, tmp_path / "back.raw")
    assert (tmp_path / "back.raw").read_bytes() == expected


def test_as_qemu_img(tmp_path: Path, parts: dict[str, tuple[Path, bytes]]) -> None:
    """Sizes inside a sector are filled up, between the sources too."""
    for number, nbytes in enumerate((1, 65_537, 1000)):
        (tmp_path / f"{number}.raw").write_bytes(noise(nbytes, number))
    paths = [tmp_path / "0.raw", parts["stream"][0], tmp_path / "1.raw", parts["packed"][0]]
    paths += [tmp_path / "2.raw"]
    qemu.run("convert", "-O", "raw", *paths, tmp_path / "theirs.raw")
    theirs = (tmp_path / "theirs.raw").read_bytes()
    for target in ("ours.raw", "ours.qcow2", "ours.raw.gz"):
        result = imgcore.convert(paths, tmp_path / target)
        assert result.virtual_size == len(theirs)
        imgcore.convert(tmp_path / target, tmp_path / "back.raw", force=True)
        # From raw to raw the last part keeps its exact size.
        ours = (tmp_path / "back.raw").read_bytes()
        assert ours.ljust(len(theirs), b"\0") == theirs
        assert len(theirs) - len(ours) == (0 if target.endswith("qcow2") else 24)


def test_the_stated_format_is_that_of_each(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(noise(1024))
    with pytest.raises(imgcore.WrongFormatError):
        imgcore.convert([tmp_path / "a", tmp_path / "b"], tmp_path / "c.qcow2")
    imgcore.convert([tmp_path / "a", tmp_path / "b"], tmp_path / "c.qcow2", format="raw")
    assert imgcore.info(tmp_path / "c.qcow2")["virtual-size"] == 2048


def test_an_archive(tmp_path: Path, parts: dict[str, tuple[Path, bytes]]) -> None:
    paths = [parts[name][0] for name in ("stream", "raw", "vhd")]
    expected = b"".join(parts[name][1] for name in ("stream", "raw", "vhd"))
    imgcore.convert(paths, tmp_path / "a.tar.gz", profile="gce")
    qemu.checked(["tar", "-xzf", "a.tar.gz"], cwd=tmp_path)
    written = (tmp_path / "disk.raw").open("rb")
    with written:
        assert written.read(len(expected)) == expected


def test_what_is_lost_is_at_its_place_in_the_target(
    tmp_path: Path, parts: dict[str, tuple[Path, bytes]]
) -> None:
    damaged = tmp_path / "damaged.qcow2"
    image = bytearray(parts["packed"][0].read_bytes())
    with imgcore.open(parts["packed"][0]) as disk:
        rows = [row for batch in disk.extents() for row in batch.tolist()]
    packed = next(row for row in rows if row[5] > 2)
    image[packed[2] + 100 : packed[2] + 200] = b"\xff" * 100
    damaged.write_bytes(image)
    first, data = parts["raw"]
    result = imgcore.convert([first, damaged, first], tmp_path / "a.raw", salvage=True)
    (lost,) = result.bad_ranges
    assert lost.path == str(damaged)
    assert (lost.guest_offset, lost.length) == (len(data) + packed[0], packed[1])
    expected = bytearray(data + parts["packed"][1] + data)
    expected[lost.guest_offset : lost.guest_offset + lost.length] = bytes(lost.length)
    assert (tmp_path / "a.raw").read_bytes() == expected


@pytest.mark.parametrize("place", [0, 1, 2])
def test_no_source_is_overwritten(
    tmp_path: Path, parts: dict[str, tuple[Path, bytes]], place: int
) -> None:
    paths = [tmp_path / f"{number}.raw" for number in range(3)]
    for path in paths:
        path.write_bytes(b"precious" * 64)
    (tmp_path / "link.raw").hardlink_to(paths[place])
    for target in (paths[place], tmp_path / "link.raw"):
        with pytest.raises(imgcore.TargetError, match="is read by this conversion"):
            imgcore.convert(paths, target, force=True)
        with pytest.raises(imgcore.TargetError, match="is read by this conversion"):
            imgcore.convert(paths, target, in_place=True)
        assert target.read_bytes() == b"precious" * 64


def test_refused(tmp_path: Path, parts: dict[str, tuple[Path, bytes]]) -> None:
    raw, target = parts["raw"][0], tmp_path / "a.qcow2"
    for sources, more, words in (
        ([], {}, "needs a source"),
        ([raw, raw], {"backing": raw, "backing_format": "raw"}, "-B"),
        ([raw, raw], {"parent": raw}, "several sources"),
    ):
        with pytest.raises(imgcore.OptionError, match=words):
            imgcore.convert(sources, target, **more)  # type: ignore[arg-type]
        assert not target.exists()
    with pytest.raises(FileNotFoundError):
        imgcore.convert([raw, tmp_path / "gone.raw"], target)
    assert not target.exists()


def test_the_advice_for_streams_works(tmp_path: Path, parts: dict[str, tuple[Path, bytes]]) -> None:
    raw, packed = parts["raw"][0], tmp_path / "b.raw.gz"
    imgcore.convert(raw, packed)
    done = command("convert", str(raw), str(packed), str(tmp_path / "c.vdi"))
    assert done.returncode == 2
    advice = done.stderr[done.stderr.index("(imgcore ") + 1 : done.stderr.rindex(")")]
    assert command(*shlex.split(advice)[1:]).returncode == 0
    done = command("convert", str(raw), str(packed.with_suffix("")), str(tmp_path / "c.vdi"))
    assert done.returncode == 0
    assert imgcore.info(tmp_path / "c.vdi")["virtual-size"] == 2 * len(parts["raw"][1])
