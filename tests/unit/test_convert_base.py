"""``convert --base``: only what is above a backing file is copied."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers.chains import FORMATS, chain, content_of, disks
from tests.helpers.command import assert_one_line_error
from tests.helpers.command import imgcore as imgcore_command

import imgcore

WRITTEN = tuple(name for name in FORMATS if name != "vmdk")


@pytest.mark.parametrize("name", WRITTEN)
def test_the_target_has_what_is_above(name: str, tmp_path: Path) -> None:
    contents = disks(1, 3)
    base, mid, top = chain(tmp_path, [name] * 3, contents)
    target = tmp_path / f"new.{name}"
    imgcore.convert(top, target, base=base)
    assert imgcore.info(target)["backing-filename"] in (base.name, f"./{base.name}", str(base))
    mid.unlink()
    top.unlink()
    assert content_of(target) == contents[2]


@pytest.mark.parametrize("checksum", [None, "sha256"])
def test_what_the_base_has_is_not_read(checksum: str | None, tmp_path: Path) -> None:
    contents = disks(2, 3)
    base, _, top = chain(tmp_path, ["qcow2"] * 3, contents)
    results = [
        imgcore.convert(top, tmp_path / "a.qcow2", base=base, checksum=checksum),
        imgcore.convert(top, tmp_path / "b.qcow2", backing="0.qcow2", backing_format="qcow2"),
    ]
    assert (tmp_path / "a.qcow2").read_bytes() == (tmp_path / "b.qcow2").read_bytes()
    above = sum(area.length for area in imgcore.changes(top, since=base) if not area.is_zero)
    # What the images above have is compared with the base.
    assert results[1].bytes_read <= 2 * above
    if checksum is None:
        assert results[0].bytes_read == results[1].bytes_read
    else:
        assert results[0].checksum == imgcore.checksum(top)
        assert results[0].bytes_read > results[1].bytes_read


def test_the_name_is_relative_to_the_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = disks(3, 2)
    (tmp_path / "images").mkdir()
    (tmp_path / "new").mkdir()
    chain(tmp_path / "images", ["raw", "qcow2"], contents)
    monkeypatch.chdir(tmp_path)
    imgcore.convert("images/1.qcow2", "new/n.qcow2", base="images/0.raw")
    info = imgcore.info("new/n.qcow2")
    assert (info["backing-filename"], info["backing-filename-format"]) == ("../images/0.raw", "raw")
    with imgcore.open("new/n.qcow2", allow=["images"]) as image:
        assert image.read(0, len(contents[1])) == contents[1]


def test_refusals(tmp_path: Path) -> None:
    base, top = chain(tmp_path, ["qcow2", "qcow2"], disks(4, 2))
    for other in (top, tmp_path / "other.raw"):
        other.touch()
        with pytest.raises(imgcore.OptionError, match="not one of its backing files"):
            imgcore.convert(top, tmp_path / "n.qcow2", base=other)
    with pytest.raises(imgcore.OptionError, match="--base and -B"):
        imgcore.convert(top, tmp_path / "n.qcow2", base=base, backing=base)
    with pytest.raises(imgcore.OptionError, match="not one of its backing files"):
        imgcore.convert([top, top], tmp_path / "n.qcow2", base=base)
    done = imgcore_command("convert", "--base", top, top, tmp_path / "n.qcow2")
    assert_one_line_error(done, "not one of its backing files", code=2)
    done = imgcore_command("convert", "--base", base, top, tmp_path / "n.qcow2")
    assert (done.returncode, done.stderr) == (0, "")
