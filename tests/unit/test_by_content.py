"""Images whose name states no format: the content decides, and opens nothing else."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
from tests.helpers import openings, qemu
from tests.helpers.command import assert_one_line_error
from tests.helpers.command import imgcore as imgcore_command
from tests.helpers.mounts import loop_device
from tests.helpers.openings import CHILD_SUFFIXES, READING, VERBS, use

import imgcore
from imgcore.errors import ImgcoreError, UnsafeReferenceError, WrongFormatError
from imgcore.files import reference_gate

NAMES = ("disk.img", "DISK.IMG", "disk", "web01.example.com")
ONE_FILE = [variant for variant in qemu.VARIANTS if variant not in (qemu.RAW, qemu.VMDK_FLAT)]


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if a file that an image names is opened."""

    def refuse(_folder_fd: int, rest: str, path: str, _flags: int) -> int:
        raise AssertionError(f"{path} is opened")

    monkeypatch.setattr(reference_gate, "open_beneath", refuse)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("variant", ONE_FILE, ids=lambda variant: variant.name)
def test_the_content_decides(
    variant: qemu.Variant,
    name: str,
    tmp_path: Path,
    closed: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    raw = openings.disk(tmp_path / "disk.raw")
    image = tmp_path / name
    qemu.convert(raw, image, variant)
    assert imgcore.compare(image, raw).identical
    assert f"content is that of {variant.format}" in caplog.text
    for verb in VERBS:
        caplog.clear()
        use(verb, image, raw)
        assert f"-F {variant.format}" in caplog.text or f"-f {variant.format}" in caplog.text
    assert imgcore.info(image)["format"] == variant.format
    caplog.clear()
    with imgcore.open(image, format=variant.format):
        assert not caplog.messages


def test_a_file_without_a_magic(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """.img is raw, as it was; without a suffix, nothing says so."""
    assert imgcore.info(openings.disk(tmp_path / "disk.img"))["format"] == "raw"
    with pytest.raises(WrongFormatError, match="use -f raw"):
        imgcore.open(openings.disk(tmp_path / "disk"))
    assert not caplog.messages


@pytest.mark.parametrize("suffix", [".qcow2", ".qcow", ".vmdk", ".vhd", ".avhd", ".avhdx", ".vdi"])
def test_a_suffix_of_images_is_a_statement(suffix: str, tmp_path: Path) -> None:
    images, raw = openings.chain(tmp_path, "qcow2", 2)
    assert imgcore.compare(openings.renamed(images[1], f"child{suffix}"), raw).identical


# ------------------------------------------------------------- nothing else is opened


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", ["disk.img", "disk"])
@pytest.mark.parametrize("image_format", CHILD_SUFFIXES)
def test_parents_stay_closed(
    image_format: str, name: str, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, raw = openings.chain(tmp_path, image_format, 2)
    image = openings.renamed(images[1], name)
    with monkeypatch.context() as patch:
        patch.setattr(reference_gate, "open_beneath", None)
        if verb not in READING:
            answer = use(verb, image, raw)
            if verb == "info":
                assert answer["format"] == image_format
                # A VDI names its parent by a UUID only.
                assert image_format == "vdi" or answer["backing-filename"] == images[0].name
        else:
            with pytest.raises(UnsafeReferenceError) as caught:
                use(verb, image, raw)
            flag = "-F" if verb == "compare-b" else "-f"
            assert str(caught.value).startswith(f"{image}: names ")
            assert f"({flag} {image_format})" in str(caught.value)
    if verb in READING:
        done = imgcore_command(*openings.command(verb, image, raw))
        assert done.returncode, done.stderr
        advice = re.findall(r"-[fF] \w+", done.stderr.splitlines()[-1])[-1].split()
        done = imgcore_command(*openings.command(verb, image, raw, *advice))
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", ["disk.img", "disk"])
def test_extents_stay_closed(
    name: str, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    descriptor, _, raw = openings.flat_vmdk(tmp_path)
    image = openings.renamed(descriptor, name)
    with monkeypatch.context() as patch:
        patch.setattr(reference_gate, "open_beneath", None)
        if verb == "info":
            answer = use(verb, image, raw)
            assert (answer["format"], answer["virtual-size"]) == ("vmdk", openings.SIZE)
        else:
            with pytest.raises(UnsafeReferenceError, match=r"as its extent.*-[fF] vmdk"):
                use(verb, image, raw)
    keywords = {"format": "vmdk"}
    use(verb, image, raw, **keywords)


def test_a_whole_chain_by_the_command(tmp_path: Path) -> None:
    images, _ = openings.chain(tmp_path, "qcow2", 2)
    image = openings.renamed(images[1], "disk.img")
    target = tmp_path / "out.raw"
    done = imgcore_command("convert", image, target)
    assert done.returncode == 1
    assert_one_line_error(done, f"{image}: names '{images[0].name}'", "(-f qcow2)")
    assert not target.exists()
    # As the backing file of another image, its format is stated there.
    top = openings.child(tmp_path, "qcow2", "top.qcow2", image)
    assert imgcore.compare(top, tmp_path / "disk.raw").identical


def test_a_stated_parent_is_opened(tmp_path: Path) -> None:
    """The user names it, not the image."""
    images, raw = openings.chain(tmp_path, "qcow2", 2)
    image = openings.renamed(images[1], "disk.img")
    assert imgcore.compare(image, raw, parent_a=images[0]).identical


def test_lint_says_so_once(tmp_path: Path) -> None:
    images, _ = openings.chain(tmp_path, "vhdx", 2)
    image = openings.renamed(images[1], "disk.img")
    done = imgcore_command("lint", "--profile", "hyperv", image)
    assert done.returncode == 1
    assert done.stderr.count("warning") == 1
    assert "-f vhdx" in done.stdout
    assert "--parent" not in done.stdout
    done = imgcore_command("lint", "--profile", "hyperv", "-f", "vhdx", image)
    assert "parents" not in done.stdout


# ------------------------------------------------------- names that state a raw disk


@pytest.mark.parametrize("suffix", [".raw", ".dd", ".bin"])
@pytest.mark.parametrize("image_format", CHILD_SUFFIXES)
def test_info_answers_against_the_name(
    image_format: str, suffix: str, tmp_path: Path, closed: None
) -> None:
    raw = openings.disk(tmp_path / "disk.raw")
    made = tmp_path / f"image.{image_format}"
    imgcore.convert(raw, made, sync=False)
    image = openings.renamed(made, f"image{suffix}")
    done = imgcore_command("info", "--json", image)
    assert json.loads(done.stdout)["format"] == qemu._name(image_format)
    assert f"-f {image_format} or -f raw" in done.stderr
    for verb in VERBS:
        if verb != "info":
            with pytest.raises(WrongFormatError, match=f"magic of {image_format}: use"):
                use(verb, image, raw)


@pytest.mark.parametrize("name", ["disk", "disk.bak", "web01.example.com"])
def test_info_of_a_raw_disk_whose_name_states_nothing(name: str, tmp_path: Path) -> None:
    disk = openings.renamed(openings.disk(tmp_path / "a.raw"), name)
    done = imgcore_command("info", "--json", disk)
    assert done.returncode == 0, done.stderr
    ours = json.loads(done.stdout)
    theirs = qemu.info(disk, "raw")
    assert (ours["format"], ours["virtual-size"]) == ("raw", theirs["virtual-size"])
    assert "use -f raw if it is a raw disk" in done.stderr
    other = openings.disk(tmp_path / "other.raw")
    for verb in VERBS:
        if verb not in ("info", "lint"):
            with pytest.raises(WrongFormatError, match="no known format"):
                use(verb, disk, other)


@pytest.mark.parametrize("as_device", [False, True], ids=["file", "device"])
@pytest.mark.parametrize("magic", [b"LUKS\xba\xbe", b"QED\0", b"\x1f\x8b\x08\0"])
def test_info_of_a_raw_disk_with_the_magic_of_what_is_not_read(
    magic: bytes, as_device: bool, tmp_path: Path
) -> None:
    disk = openings.disk(tmp_path / "disk.raw")
    with disk.open("r+b") as file:
        file.write(magic)
        file.truncate(1 << 20)
    with loop_device(disk) if as_device else nullcontext(disk) as name:
        done = imgcore_command("info", "--json", name)
        assert done.returncode == 0, done.stderr
        ours = json.loads(done.stdout)
        assert (ours["format"], ours["virtual-size"]) == ("raw", 1 << 20)
        assert "use -f raw to read it" in done.stderr
        with pytest.raises(WrongFormatError, match="use -f raw"):
            imgcore.open(name)
        # The advice.
        imgcore.open(name, format="raw").close()


def test_info_of_a_block_device(tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    qemu.run("create", "-q", "-f", "qcow2", image, "4M")
    with image.open("r+b") as file:
        file.truncate(1 << 20)  # devices have whole sectors
    with loop_device(image) as device:
        done = imgcore_command("info", "--json", device)
        assert json.loads(done.stdout)["format"] == "qcow2"
        with pytest.raises(WrongFormatError, match="is a block device, but has the magic of"):
            imgcore.open(device)


# ---------------------------------------------------------------- what is not read


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", ["disk.img", "disk", "disk.raw.qed"])
def test_a_format_that_is_not_read(name: str, verb: str, tmp_path: Path) -> None:
    raw = openings.disk(tmp_path / "other.raw")
    image = tmp_path / name
    qemu.run("convert", "-f", "raw", "-O", "qed", raw, image)
    line = "QED images are not read: qemu-img convert reads them"
    if verb == "lint":
        (first, *_) = use(verb, image, raw).findings
        assert line in first.message
        return
    with pytest.raises(ImgcoreError) as caught:
        use(verb, image, raw)
    assert str(caught.value) == f"{image}: {line}"
    code = 2 if verb.startswith(("compare", "diff")) else 1
    assert_one_line_error(imgcore_command(*openings.command(verb, image, raw)), line, code=code)
    qemu.run("convert", "-O", "raw", image, tmp_path / "copy.raw")
    assert (tmp_path / "copy.raw").read_bytes() == raw.read_bytes()
