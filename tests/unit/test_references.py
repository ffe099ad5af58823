"""Files that images name: missing ones, paths of other hosts, parents of each level."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.helpers import openings, qemu, vmdk
from tests.helpers.command import assert_one_line_error
from tests.helpers.command import imgcore as imgcore_command
from tests.helpers.openings import CHILD_SUFFIXES, READING, command, use

import imgcore
from imgcore.errors import CorruptImageError, ImgcoreError, OptionError, UnsafeReferenceError

# VDI names no file: it searches for its parent.
NAMED = [name for name in CHILD_SUFFIXES if name != "vdi"]


def break_with(code: int, path: Path) -> None:
    """Make opening a file fail in this way."""
    path.unlink()
    if code == errno.ELOOP:
        path.symlink_to(path.name)
    elif code == errno.EISDIR:
        path.mkdir()
    elif code == errno.ENOTDIR:
        path.parent.rmdir()
        path.parent.write_bytes(b"")
    elif code == errno.ENXIO:
        os.mkfifo(path)


BREAKS = [errno.ENOENT, errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.ENXIO]


# ----------------------------------------------------------------------- missing parts


@pytest.mark.parametrize("code", BREAKS, ids=errno.errorcode.get)
@pytest.mark.parametrize("image_format", ["vmdk-extent", *NAMED])
def test_who_asked_for_the_file(image_format: str, code: int, tmp_path: Path) -> None:
    """The line names the file, the image that names it, as what, and what would do."""
    below = tmp_path / "below"
    below.mkdir()
    if image_format == "vmdk-extent":
        source, extent, _ = openings.flat_vmdk(tmp_path)
        part = openings.renamed(extent, "below/part.bin")
        text = source.read_text().replace('"web01-flat.vmdk"', '"below/part.bin"')
        source.write_text(text)
        role, remedy = "extent", "copy it there"
    else:
        raw = openings.disk(tmp_path / "disk.raw")
        part = below / f"base{CHILD_SUFFIXES[image_format]}"
        imgcore.convert(raw, part, target_format=image_format, sync=False)
        source = openings.child(tmp_path, image_format, "child", part)
        source = openings.renamed(source, f"child{CHILD_SUFFIXES[image_format]}")
        role, remedy = "parent", "--parent"
    kept = tmp_path / "kept"
    shutil.copy2(part, kept)
    break_with(code, part)
    done = imgcore_command("convert", source, tmp_path / "out.raw")
    assert_one_line_error(done, part.name, role, source.name, remedy)
    assert not (tmp_path / "out.raw").exists()
    if role == "parent":
        done = imgcore_command("convert", "--parent", kept, source, tmp_path / "out.raw")
    else:
        shutil.rmtree(below) if below.is_dir() else below.unlink()
        below.mkdir()
        shutil.move(kept, part)
        done = imgcore_command("convert", source, tmp_path / "out.raw")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM])
@pytest.mark.parametrize("image_format", ["vmdk-extent", *NAMED])
def test_a_file_that_may_not_be_read(
    image_format: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if image_format == "vmdk-extent":
        source, part, _ = openings.flat_vmdk(tmp_path)
    else:
        (part, source), _ = openings.chain(tmp_path, image_format, 2)

    def refuse(_folder: int, _rest: str, path: str, _flags: int) -> int:
        raise OSError(code, os.strerror(code), path)

    monkeypatch.setattr("imgcore.files.reference_gate.open_beneath", refuse)
    with pytest.raises(PermissionError) as caught:
        imgcore.open(source)
    assert caught.value.filename == str(part)
    role = "extent" if image_format == "vmdk-extent" else "parent"
    assert caught.value.strerror == (
        f"{os.strerror(code)} (the {role} of {source}; make it and its folders readable)"
    )


@pytest.mark.parametrize("verb", READING)
@pytest.mark.parametrize("image_format", CHILD_SUFFIXES)
def test_the_advice_for_a_missing_parent_works(
    image_format: str, verb: str, tmp_path: Path
) -> None:
    images, raw = openings.chain(tmp_path, image_format, 3)
    moved = tmp_path / "moved"
    moved.mkdir()
    for image in images[:2]:
        shutil.move(image, moved / f"x-{image.name}")
    done = imgcore_command(*command(verb, images[2], raw))
    code = 2 if verb.startswith(("compare", "diff")) else 1
    assert_one_line_error(done, "parent of", "state it with --parent", code=code)
    (flag,) = re.findall(r"state it with (--[\w-]+)", done.stderr)
    stated = [flag, str(moved / f"x-{images[1].name}")]
    if image_format != "vdi":  # which searches in the parent's folder
        done = imgcore_command(*command(verb, images[2], raw, *stated))
        assert_one_line_error(done, f"{flag}, given once for each level", code=code)
    stated += [flag, str(moved / f"x-{images[0].name}")]
    done = imgcore_command(*command(verb, images[2], raw, *stated))
    assert done.returncode == 0, done.stderr


def test_a_missing_parent_of_the_targets_parent(tmp_path: Path) -> None:
    """No option states it, so none is advised."""
    images, raw = openings.chain(tmp_path, "qcow2", 2)
    images[0].unlink()
    done = imgcore_command(
        "convert", "-B", images[1], "-F", "qcow2", raw, tmp_path / "target.qcow2"
    )
    assert_one_line_error(done, f"the parent of {images[1]}")
    assert "--parent" not in done.stderr


# -------------------------------------------------------------------- levels of parents


@pytest.mark.parametrize("verb", [*READING, "info", "check", "lint"])
@pytest.mark.parametrize("image_format", CHILD_SUFFIXES)
def test_a_parent_for_each_level(image_format: str, verb: str, tmp_path: Path) -> None:
    images, raw = openings.chain(tmp_path, image_format, 4)
    away = tmp_path / "away"
    away.mkdir()
    parents = [Path(shutil.move(image, away / f"x{image.name}")) for image in images[2::-1]]
    answer = use(verb, images[3], raw, parent=parents)
    if verb.startswith("compare"):
        assert answer.identical
    if verb == "info":
        assert [Path(image["filename"]) for image in answer] == [images[3], *parents]
    flag = "--parent-b" if verb == "compare-b" else "--parent"
    stated = [word for parent in parents for word in (flag, str(parent))]
    extra = ["--backing-chain"] if verb == "info" else []
    done = imgcore_command(*command(verb, images[3], raw, *stated, *extra))
    assert done.returncode in (0, 1) if verb == "lint" else done.returncode == 0, done.stderr
    # One too many, and one that is another disk.
    too_many = [*parents, parents[-1]]
    expected = pytest.raises(OptionError, match="4 parents are given, but the chain has 3")
    if verb == "lint":
        (found,) = [
            finding
            for finding in imgcore.lint(images[3], profile="hyperv", parent=too_many).findings
            if finding.rule == "parents"
        ]
        assert "4 parents are given" in found.message
        return
    with expected:
        use(verb, images[3], raw, parent=too_many)
    if image_format != "qcow2":
        other = openings.disk(tmp_path / "other.raw", seed=9)
        wrong = away / f"wrong{CHILD_SUFFIXES[image_format]}"
        imgcore.convert(other, wrong, target_format=image_format, sync=False)
        for level in range(3):
            mixed = [*parents[:level], wrong, *parents[level + 1 :]]
            with pytest.raises(CorruptImageError, match="was created from a parent with"):
                use(verb, images[3], raw, parent=mixed)


def test_some_levels_only(tmp_path: Path) -> None:
    images, raw = openings.chain(tmp_path, "vhd", 4)
    away = tmp_path / "away"
    away.mkdir()
    moved = [shutil.move(image, away / image.name) for image in images[2::-1]]
    assert imgcore.compare(images[3], raw, parent_a=moved[:1]).identical
    assert imgcore.compare(images[3], raw, parent_a=moved[0]).identical
    with pytest.raises(OptionError, match="a parent is given, but the image has none"):
        imgcore.open(images[3], parent=[*moved, *moved])


# ----------------------------------------------------------------- paths of other hosts

FOREIGN: dict[str, Callable[[str], str]] = {
    "drive": lambda name: rf"C:\vms\{name}",
    "drive-slashes": lambda name: f"D:/vms/{name}",
    "drive-mixed": lambda name: rf"C:\vms/web\{name}",
    "drive-relative": lambda name: f"C:{name}",
    "datastore": lambda name: f"[datastore1] web01/{name}",
    "datastore-root": lambda name: f"[datastore1] {name}",
    "server": lambda name: rf"\\server\share\{name}",
    "volume": lambda name: rf"\\?\Volume{{26a21bda-a627-11d7-9931-806e6f6e6963}}\{name}",
    "relative": lambda name: rf"..\base\{name}",
    "beside": lambda name: rf".\{name}",
    "esx": lambda name: f"/vmfs/volumes/5f-ds/web01/{name}",
    "libvirt": lambda name: f"/var/lib/libvirt/no-such-images/{name}",
}


def put_text(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("form", FOREIGN)
@pytest.mark.parametrize("kind", ["FLAT", "SPARSE"])
def test_an_extent_of_another_host(
    kind: str, form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw = openings.disk(tmp_path / "disk.raw")
    folder = tmp_path / "vm"
    folder.mkdir()
    image = folder / "web.vmdk"
    subformat = {"FLAT": "monolithicFlat", "SPARSE": "twoGbMaxExtentSparse"}[kind]
    qemu.run("convert", "-O", "vmdk", "-o", f"subformat={subformat}", raw, image)
    (extent,) = [path for path in folder.iterdir() if path != image]
    put_text(image, f'"{extent.name}"', f'"{FOREIGN[form](extent.name)}"')
    assert imgcore.compare(image, raw).identical
    assert f"is not on this host, {extent} is used" in caplog.text
    extent.unlink()
    with pytest.raises((OSError, UnsafeReferenceError), match=r"(?i)extent.*copy it there"):
        imgcore.open(image)


def test_an_extent_elsewhere_is_not_replaced(tmp_path: Path) -> None:
    """If the path leads to a file of this host, no other one is used for it."""
    image, extent, raw = openings.flat_vmdk(tmp_path)
    outside = tmp_path.parent / f"{tmp_path.name}-outside.vmdk"
    shutil.copy(extent, outside)
    shutil.copy(extent, tmp_path / outside.name)
    put_text(image, f'"{extent.name}"', f'"{outside}"')
    with pytest.raises(UnsafeReferenceError) as caught:
        imgcore.open(image)
    (folder,) = re.findall(r"--allow (\S+) permits", str(caught.value))
    assert imgcore.compare(image, raw, allow=[folder]).identical
    outside.unlink()


def test_two_extents_of_one_name(tmp_path: Path) -> None:
    """A file stands for one of them only."""
    (tmp_path / "x.bin").write_bytes(bytes(1024))
    image = tmp_path / "d.vmdk"
    lines = ('RW 2 FLAT "/vmfs/a/x.bin" 0', 'RW 2 FLAT "/vmfs/b/x.bin" 0')
    image.write_bytes(vmdk.descriptor("custom", *lines))
    with pytest.raises(UnsafeReferenceError, match=r"/vmfs/b/x\.bin"):
        imgcore.open(image)


@pytest.mark.parametrize("form", FOREIGN)
def test_a_delta_of_another_host(form: str, tmp_path: Path) -> None:
    """The content ID tells the right file from a wrong one of the same name."""
    (base, delta), raw = openings.chain(tmp_path, "vmdk", 2)
    content = delta.read_bytes()
    old = f'parentFileNameHint="{base.name}"'.encode()
    new = f'parentFileNameHint="{FOREIGN[form](base.name)}"'.encode()
    start = content.index(b"# Disk DescriptorFile")
    text = content[start:].split(b"\0", 1)[0]
    changed = text.replace(old, new)
    assert changed != text
    room = content[start : start + 20 * 512]
    delta.write_bytes(
        content[:start]
        + changed.ljust(len(room), b"\0")[: len(room)]
        + content[start + len(room) :]
    )
    assert imgcore.compare(delta, raw).identical
    qemu.run("create", "-q", "-f", "vmdk", base, "4M")
    with pytest.raises(CorruptImageError, match="content ID"):
        imgcore.open(delta)


@pytest.mark.parametrize(
    ("form", "verb"),
    [*((form, "convert") for form in FOREIGN), *(("esx", verb) for verb in READING[1:])],
)
def test_a_backing_file_of_another_host(form: str, verb: str, tmp_path: Path) -> None:
    """QCOW2 does not identify its backing file, so the user must state it."""
    raw = openings.disk(tmp_path / "disk.raw")
    folder = tmp_path / "images"
    folder.mkdir()
    base, image = folder / "base.qcow2", folder / "o.qcow2"
    imgcore.convert(raw, base, sync=False)
    name = FOREIGN[form](base.name)
    qemu.run("create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", name, image, "4M")
    done = imgcore_command(*command(verb, image, raw))
    code = 2 if verb.startswith(("compare", "diff")) else 1
    assert_one_line_error(done, f"if it is {base}", code=code)
    advice = re.findall(r"state it with (--[\w-]+): (\S+)$", done.stderr.strip())
    done = imgcore_command(*command(verb, image, raw, *advice[0]))
    assert done.returncode == 0, done.stderr
    base.unlink()
    done = imgcore_command(*command(verb, image, raw))
    assert_one_line_error(done, "state it with --parent", code=code)
    assert "--allow" not in done.stderr


def test_allow_is_not_advised_for_a_folder_that_is_gone(tmp_path: Path) -> None:
    for name, word in (("/gone/base.qcow2", "--parent"), ("../base.qcow2", "--allow")):
        image = tmp_path / "vm" / "o.qcow2"
        image.parent.mkdir(exist_ok=True)
        (tmp_path / "base.qcow2").touch()
        qemu.run("create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", name, image, "4M")
        with pytest.raises(UnsafeReferenceError) as caught:
            imgcore.open(image)
        assert re.findall("--[a-z]+", str(caught.value)) == [word]


def test_the_folder_to_allow_is_that_of_the_file(tmp_path: Path) -> None:
    """Not the folder of a link to it."""
    folder, elsewhere = tmp_path / "vm", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    raw = openings.disk(tmp_path / "disk.raw")
    imgcore.convert(raw, elsewhere / "base.qcow2", sync=False)
    (folder / "link.qcow2").symlink_to(elsewhere / "base.qcow2")
    image = openings.child(folder, "qcow2", "o.qcow2", folder / "link.qcow2")
    with pytest.raises(ImgcoreError) as caught:
        imgcore.open(image)
    (allowed,) = re.findall(r"--allow (\S+) permits", str(caught.value))
    assert imgcore.compare(image, raw, allow=[allowed]).identical
