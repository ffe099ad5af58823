"""Real file systems that fill up: at once, in the middle, at the last block.

One claims more space than it has.  The error names the reason, the old target stays,
and no other file is left.  Mounting needs root.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.faults.harness import DISK, params
from tests.helpers import images, own, qemu
from tests.helpers.command import imgcore
from tests.helpers.mounts import leave_free, make_file_system, mounted
from tests.helpers.qemu import Variant

KIB = images.KIB


@pytest.fixture(params=["ext4", "tmpfs"])
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Give a file system of 12 MiB."""
    with ExitStack() as stack:
        folder = tmp_path / "small"
        if request.param == "ext4":
            image = make_file_system("ext4", tmp_path / "ext4.img", 12 * images.MIB)
            yield stack.enter_context(mounted(image, folder, "-o", "loop"))
        else:
            yield stack.enter_context(mounted("tmpfs", folder, "-t", "tmpfs", "-o", "size=12m"))


@pytest.mark.parametrize("cache", ["keep", "direct"])
@pytest.mark.parametrize("variant", params())
def test_full(variant: Variant, cache: str, small: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "source.raw", small / f"disk{variant.suffix}"
    DISK.write(source)
    roomy = tmp_path / f"roomy{variant.suffix}"
    own.convert(source, roomy, variant)
    need = qemu.disk_nbytes(roomy)
    target.write_bytes(b"old")
    before = images.sha256(source)
    for free in (0, 4 * KIB, need // 2, need - 64 * KIB):
        leave_free(small, free)
        names = sorted(os.listdir(small))
        try:
            own_convert_over(source, target, variant, cache)
        except OSError as error:
            assert error.errno == errno.ENOSPC, error
            assert str(target.parent) in str(error.filename)
        else:
            raise AssertionError(f"{free} bytes were enough for {need}")
        assert target.read_bytes() == b"old"
        assert sorted(os.listdir(small)) == names
    assert images.sha256(source) == before
    leave_free(small, need + 600 * KIB)
    own_convert_over(source, target, variant, cache)
    qemu.assert_same(source, target, source_format="raw", target_format=variant.format)


def own_convert_over(source: Path, target: Path, variant: Variant, cache: str) -> None:
    import imgcore as library

    library.convert(
        source,
        target,
        format="raw",
        target_format=variant.format,
        options=[*variant.options, *variant.own_options],
        compress=variant.compress,
        force=True,
        threads=2,
        target_cache=cache,
    )


@pytest.mark.parametrize("options", [(), ("preallocation=falloc",), ("preallocation=full",)])
def test_what_is_known_to_be_too_much_is_told_before(
    options: tuple[str, ...], small: Path, tmp_path: Path
) -> None:
    """Nothing is written if the request already determines a size that does not fit."""
    source = tmp_path / "source.raw"
    with open(source, "wb") as file:
        file.truncate(images.GIB)
    words = [word for option in options for word in ("-o", option)]
    if not words:
        words = ["-S", "0"]
    done = imgcore("convert", *words, source, small / "out.raw")
    assert done.returncode == 1
    assert "1 GiB needed" in done.stderr, done.stderr
    assert os.listdir(small) in ([], ["lost+found"])


@pytest.mark.parametrize("name", ["out.raw", "out.qcow2", "out.vmdk"])
def test_a_store_that_is_thinner_than_it_says(name: str, tmp_path: Path) -> None:
    """Writing to the cache succeeds; only the sync reports that the store is full."""
    source = tmp_path / "source.raw"
    source.write_bytes(images.noise(16 * images.MIB))
    with ExitStack() as stack:
        below = stack.enter_context(
            mounted("tmpfs", tmp_path / "below", "-t", "tmpfs", "-o", "size=8m")
        )
        image = make_file_system("ext4", below / "thin.img", 64 * images.MIB)
        thin = stack.enter_context(mounted(image, tmp_path / "thin", "-o", "loop"))
        done = imgcore("convert", "-q", source, thin / name)
        assert done.returncode == 1, done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert not (thin / name).exists()
