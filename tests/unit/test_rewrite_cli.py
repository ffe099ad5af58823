"""``imgcore rewrite``: what it changes, what it refuses, and that its advice works."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.helpers import qcow2
from tests.helpers.command import imgcore as command

import imgcore
from imgcore import limits
from imgcore.engine.progress import Progress
from imgcore.errors import CorruptImageError

KIB, MIB = limits.KIB, limits.MIB
NBYTES = 3 * MIB + 5 * 512


def make_disk(path: Path, nbytes: int = NBYTES) -> Path:
    """Write a raw disk with data at its ends and holes between."""
    rng = random.Random(5)
    with path.open("wb") as file:
        file.truncate(nbytes)
        for offset in (0, 70 * KIB, nbytes // 2, nbytes - 9 * KIB):
            file.seek(offset)
            file.write(rng.randbytes(9 * KIB))
    return path


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk.raw")


@pytest.fixture
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_disk(tmp_path_factory.mktemp("original") / "disk.raw")


def done(*words: object, cwd: Path | None = None) -> str:
    """Run imgcore, which must succeed, and return what it prints."""
    result = command(*map(str, words), cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


TARGETS = {
    "qcow2": ("qcow2", []),
    "vmdk": ("vmdk", []),
    "flat": ("vmdk", ["-o", "subformat=monolithicFlat"]),
    "vhdx": ("vhdx", ["-o", "block_size=1M"]),
    "vdi": ("vdi", []),
    "fixed": ("vhd", ["-o", "subformat=fixed"]),
}


@pytest.mark.parametrize("kind", TARGETS)
def test_there_and_back(kind: str, raw: Path, original: Path) -> None:
    """The image has the new format and name; undo restores the file byte for byte."""
    target, options = TARGETS[kind]
    old, times = raw.read_bytes(), raw.stat().st_mtime_ns
    printed = json.loads(done("rewrite", "--json", "-O", target, *options, raw))
    new = Path(printed["path"])
    assert new == raw.with_suffix(f".{target}")
    assert not raw.exists()
    assert printed["target_format"] == target
    assert Path(printed["journal"]).exists()
    assert imgcore.compare(original, new, format_b=target).identical
    if imgcore.info(new)["format"] != "vhd":
        assert imgcore.check(new).corruptions == 0
    assert done("rewrite", "--undo", new) == f"{raw}: restored\n"
    assert names(raw.parent) == {"disk.raw"}
    assert (raw.read_bytes(), raw.stat().st_mtime_ns) == (old, times)


@pytest.mark.parametrize("kind", TARGETS)
def test_finish(kind: str, raw: Path, original: Path) -> None:
    target, options = TARGETS[kind]
    done("rewrite", "-O", target, *options, raw)
    new = raw.with_suffix(f".{target}")
    assert done("rewrite", "--finish", new) == f"{new}: journal removed\n"
    assert not any(name.endswith("journal") for name in names(raw.parent))
    assert imgcore.compare(original, new).identical
    assert command("rewrite", "--undo", str(new)).returncode == 1


def test_no_undo_gives_space_back(raw: Path, original: Path) -> None:
    """The old tables are no longer allocated."""
    imgcore.convert(raw, raw.with_suffix(".qcow2"))
    raw.unlink()
    first = imgcore.rewrite(raw.with_suffix(".qcow2"), "vmdk")
    with_tables = os.stat(first.path).st_blocks
    second = imgcore.rewrite(imgcore.undo_rewrite(first.path), "vmdk", keep_undo=False)
    assert second.journal is None
    assert names(raw.parent) == {"disk.vmdk"}
    assert os.stat(second.path).st_blocks * 512 <= with_tables * 512 - 3 * 64 * KIB
    assert imgcore.compare(original, second.path).identical


@pytest.mark.parametrize(
    ("old", "format", "more", "new"),
    [
        ("disk.img", "raw", [], "disk.qcow2"),
        ("disk", "raw", [], "disk.qcow2"),
        ("disk.v2", "raw", [], "disk.v2.qcow2"),
        ("disk.raw", "raw", ["--keep-name"], "disk.raw"),
        ("disk.raw", "raw", ["--name", "web.qcow2"], "web.qcow2"),
        ("disk.raw", "raw", ["--name", "web"], "web"),
    ],
)
def test_names(old: str, format: str, more: list[str], new: str, tmp_path: Path) -> None:
    make_disk(tmp_path / old)
    done("rewrite", "-f", format, "-O", "qcow2", *more, old, cwd=tmp_path)
    assert names(tmp_path) == {new, f"{new}.imgcore-journal"}


def test_flat_vmdk_to_others(raw: Path, original: Path) -> None:
    """The descriptor goes, and comes back with undo."""
    vmdk = raw.with_suffix(".vmdk")
    imgcore.convert(raw, vmdk, options=["subformat=monolithicFlat"])
    raw.unlink()
    before = {path: path.read_bytes() for path in raw.parent.iterdir()}
    assert len(before) == 2
    result = imgcore.rewrite(vmdk, "qcow2")
    assert names(raw.parent) == {"disk.qcow2", "disk.qcow2.imgcore-journal"}
    assert imgcore.compare(original, result.path).identical
    assert imgcore.undo_rewrite(result.path) == str(vmdk)
    assert {path: path.read_bytes() for path in raw.parent.iterdir()} == before
    sparse = imgcore.rewrite(vmdk, "vmdk", name="sparse.vmdk")
    assert imgcore.compare(original, sparse.path).identical


def test_dry_run_changes_nothing(raw: Path) -> None:
    before = raw.stat()
    printed = json.loads(done("rewrite", "--json", "--dry-run", "-O", "vhdx", raw))
    assert names(raw.parent) == {"disk.raw"}
    assert (raw.stat().st_mtime_ns, raw.stat().st_size) == (before.st_mtime_ns, before.st_size)
    assert printed["journal"] is None
    real = imgcore.rewrite(raw, "vhdx")
    for key in ("bytes_stayed", "bytes_moved", "bytes_tables", "bytes_overwritten", "file_size"):
        assert printed[key] == getattr(real, key), key


def test_measure(raw: Path) -> None:
    """The first row is what rewrite does; the others have other block sizes."""
    printed = json.loads(done("measure", "--rewrite", "--json", "-O", "qcow2", raw))
    sizes = [row["block-size"] for row in printed["costs"]]
    assert sizes[0] == 64 * KIB
    assert {4 * KIB, MIB, 2 * MIB} < set(sizes)
    assert len(set(sizes)) == len(sizes)
    real = imgcore.rewrite(raw, "qcow2")
    row = printed["costs"][0]
    assert (row["bytes-stayed"], row["bytes-tables"]) == (real.bytes_stayed, real.bytes_tables)
    lines = done("measure", "--rewrite", "-O", "vdi", real.path, "-o", "block_size=1M").splitlines()
    assert lines[0].split() == ["blocks", "stay", "move", "tables", "written"]
    assert lines[1].split()[:2] == ["1", "MiB"]


@pytest.mark.parametrize("action", ["--undo", "--finish"])
@pytest.mark.parametrize(
    "option",
    [["--dry-run"], ["--name", "a.raw"], ["-o", "cluster_size=4k"], ["-f", "qcow2"],
     ["--allow", "."], ["--no-undo"], ["--keep-name"]],
    ids=lambda words: words[0],
)  # fmt: skip
def test_undo_and_finish_refuse_what_they_would_ignore(
    action: str, option: list[str], raw: Path
) -> None:
    done("rewrite", "-O", "qcow2", raw)
    before = state_of(raw.parent)
    refused = command("rewrite", action, *option, raw.with_suffix(".qcow2"))
    assert refused.returncode == 2
    assert f"{action} takes no other options: {option[0]} is for" in refused.stderr
    assert state_of(raw.parent) == before
    assert json.loads(done("rewrite", action, "-p", "-q", "--json", raw.with_suffix(".qcow2")))


def test_the_same_command_goes_on(raw: Path, original: Path) -> None:
    """After an interruption it completes the new image, and says so."""
    result = imgcore.rewrite(raw, "qcow2", keep_name=True)
    again = json.loads(done("rewrite", "--json", "--keep-name", "-O", "qcow2", raw))
    assert again["recovered"] is True
    assert again["path"] == result.path
    assert imgcore.compare(original, raw, format_b="qcow2").identical


@pytest.mark.parametrize("name", [b"web\xff.qcow2", Path("web.qcow2")])
def test_names_of_each_type(name: bytes | Path, raw: Path) -> None:
    result = imgcore.rewrite(os.fsencode(raw), "qcow2", name=name)
    assert os.fsencode(result.path) == os.path.join(os.fsencode(raw.parent), os.fsencode(name))
    assert imgcore.undo_rewrite(os.fsencode(result.path)) == str(raw)


def test_a_journals_name_is_refused(raw: Path) -> None:
    with pytest.raises(imgcore.OptionError, match="ends the names of journals"):
        imgcore.rewrite(raw, "qcow2", name="disk.imgcore-journal")


def test_an_exception_restores_the_old_image(raw: Path) -> None:
    old = raw.read_bytes()

    class Stop(Exception):
        pass

    def stop(_: Progress) -> None:
        raise Stop

    with pytest.raises(Stop):
        imgcore.rewrite(raw, "qcow2", progress=stop)
    assert names(raw.parent) == {"disk.raw"}
    assert raw.read_bytes() == old


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_signals_restore_the_old_image(number: signal.Signals, raw: Path) -> None:
    """The command stops itself at its first report, in the middle of the work."""
    code = (
        "import os, sys\n"
        "from imgcore.engine import progress\n"
        "number = int(sys.argv.pop(1))\n"
        "progress.Tally.count = lambda *_, **__: os.kill(os.getpid(), number)\n"
        "from imgcore.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    old = raw.read_bytes()
    words = [str(int(number)), "rewrite", "-O", "qcow2", str(raw)]
    stopped = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert stopped.returncode == 128 + number, stopped.stderr
    assert names(raw.parent) == {"disk.raw"}
    assert raw.read_bytes() == old


def test_progress(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It never decreases, although blocks move before others are placed."""
    monkeypatch.setattr("imgcore.engine.progress._REPORT_SECONDS", 0)
    imgcore.convert(raw, raw.with_suffix(".qcow2"))
    seen: list[Progress] = []
    # Nothing stays, so the last block moves before the first is placed.
    imgcore.rewrite(raw.with_suffix(".qcow2"), "vhdx", progress=seen.append)
    assert (seen[-1].done, seen[-1].total) == (NBYTES, NBYTES)
    assert len(seen) > 2
    for a, b in pairwise(seen):
        assert all(x <= y for x, y in zip(a, b, strict=True))
    assert all(min(one) >= 0 for one in seen)


def _with_second_entry(folder: Path, where: str, *, flags: int = 1 << 63) -> Path:
    """Return a QCOW2 image whose second cluster of data is somewhere else."""
    raw, image = folder / "disk.raw", folder / "disk.qcow2"
    raw.write_bytes(b"a" * (64 * KIB) + b"b" * (64 * KIB) + b"c" * (128 * KIB))
    imgcore.convert(raw, image)
    qcow2.put_second_cluster(image, where, flags)
    return image


@pytest.mark.parametrize(
    "where", ["another cluster", "the L1 table", "the L2 table", "the refcount table"]
)
def test_clusters_upon_others(where: str, tmp_path: Path) -> None:
    """They are refused, by whichever flags they are stated, and nothing changes."""
    image = _with_second_entry(tmp_path, where)
    before = state_of(tmp_path)
    with pytest.raises(CorruptImageError, match="its tables contradict each other"):
        imgcore.rewrite(image, "vmdk")
    assert state_of(tmp_path) == before


def test_clusters_in_common(tmp_path: Path) -> None:
    """An image that states it (refcount 2) is sound: the first one stays."""
    image = _with_second_entry(tmp_path, "another cluster", flags=0)
    expected = tmp_path / "expected.raw"
    imgcore.convert(image, expected)
    result = imgcore.rewrite(image, "vmdk", keep_undo=False)
    assert imgcore.compare(expected, result.path).identical
    if shutil.which("qemu-io") is not None:
        write = ("qemu-io", "-f", "vmdk", "-c", "write -P 88 0 64k", result.path)
        subprocess.run(write, check=True, capture_output=True)
        with imgcore.open(result.path) as disk:
            content = disk.read(0, disk.virtual_size)
        assert content == b"X" * (64 * KIB) + expected.read_bytes()[64 * KIB :]


# -- refusals --------------------------------------------------------------------------


class Refusal(NamedTuple):
    """An image that is refused with ``words``, and the commands that help."""

    image: str
    options: Sequence[str]
    words: str
    advised: Sequence[Sequence[str]] = ()


OUT = ("convert", "disk.raw", "out.qcow2")


def convert_to(image: str, target: str = "out.qcow2") -> list[str]:
    return ["convert", image, target]


def qemu_img(folder: Path, *words: str) -> None:
    subprocess.run(("qemu-img", *words), cwd=folder, check=True, capture_output=True)


def _raw(folder: Path) -> None:
    make_disk(folder / "disk.raw")


def _qcow2(folder: Path, *options: str) -> None:
    _raw(folder)
    done("convert", "disk.raw", "disk.qcow2", *options, cwd=folder)


def child_of_qcow2(folder: Path) -> Refusal:
    _qcow2(folder)
    qemu_img(folder, "create", "-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2", "child.qcow2")
    return Refusal("child.qcow2", ["-O", "vmdk"], "has a parent", [convert_to("child.qcow2")])


def parent_of_qcow2(folder: Path) -> Refusal:
    child_of_qcow2(folder)
    return Refusal(
        "disk.qcow2", ["-O", "vmdk"], "is the parent of child.qcow2", [convert_to("child.qcow2")]
    )


def parent_by_description(folder: Path) -> Refusal:
    _raw(folder)
    name = 'json:{"driver":"raw","file":{"driver":"file","filename":"disk.raw"}}'
    qemu_img(folder, "create", "-f", "qcow2", "-b", name, "-F", "raw", "child.qcow2")
    return Refusal("disk.raw", ["-O", "vmdk"], "is the parent of child.qcow2")


def parent_by_absolute_name(folder: Path) -> Refusal:
    _raw(folder)
    qemu_img(
        folder, "create", "-f", "qcow2", "-b", str(folder / "disk.raw"), "-F", "raw", "child.qcow2"
    )
    return Refusal("disk.raw", ["-O", "vmdk"], "is the parent of child.qcow2")


def parent_in_another_folder(folder: Path) -> Refusal:
    _raw(folder)
    (folder / "other").mkdir()
    name = "../disk.raw"
    qemu_img(folder / "other", "create", "-f", "qcow2", "-b", name, "-F", "raw", "child.qcow2")
    allow = ["-O", "vmdk", "--allow", "other"]
    return Refusal("disk.raw", allow, "is the parent of other/child.qcow2")


def parent_through_a_link(folder: Path) -> Refusal:
    _raw(folder)
    (folder / "base.img").symlink_to("disk.raw")
    qemu_img(folder, "create", "-f", "qcow2", "-b", "base.img", "-F", "raw", "child.qcow2")
    return Refusal("disk.raw", ["-O", "vmdk"], "is the parent of child.qcow2")


def parent_of_what_is_not_read(folder: Path) -> Refusal:
    """The child has an extended L2, which imgcore does not read, but QEMU does."""
    _raw(folder)
    options = ["-o", "extended_l2=on", "-b", "disk.raw", "-F", "raw"]
    qemu_img(folder, "create", "-f", "qcow2", *options, "child.qcow2")
    return Refusal("disk.raw", ["-O", "vmdk"], "is the parent of child.qcow2")


def parent_of(target: str) -> Callable[[Path], Refusal]:
    def make(folder: Path) -> Refusal:
        _raw(folder)
        done("convert", "disk.raw", f"disk.{target}", cwd=folder)
        backing = ("-b", f"disk.{target}", "-F", target)
        done("create", *backing, f"child.{target}", cwd=folder)
        return Refusal(f"disk.{target}", ["-O", "qcow2"], f"is the parent of child.{target}")

    return make


def extent_of_vmdk(folder: Path) -> Refusal:
    """The descriptor would take the new image's tables for the disk."""
    _raw(folder)
    flat = ["-o", "subformat=monolithicFlat"]
    done("convert", "-O", "vmdk", *flat, "disk.raw", "web.vmdk", cwd=folder)
    (folder / "disk.raw").unlink()
    named = ["-f", "raw", "-O", "qcow2", "--keep-name"]
    advised = [convert_to("web.vmdk")]
    return Refusal("web-flat.vmdk", named, "is the parent of web.vmdk, or holds", advised)


def parent_of_vmdk(folder: Path) -> Refusal:
    _raw(folder)
    qemu_img(folder, "convert", "-O", "vmdk", "disk.raw", "disk.vmdk")
    qemu_img(folder, "create", "-f", "vmdk", "-b", "disk.vmdk", "-F", "vmdk", "child.vmdk")
    return Refusal("disk.vmdk", ["-O", "qcow2"], "is the parent of child.vmdk")


def snapshots(folder: Path) -> Refusal:
    _qcow2(folder)
    qemu_img(folder, "snapshot", "-c", "before", "disk.qcow2")
    drop = ["rewrite", "-O", "vmdk", "--drop", "disk.qcow2"]
    return Refusal("disk.qcow2", ["-O", "vmdk"], "--drop rewrites it without", [drop])


def bitmaps(folder: Path) -> Refusal:
    _qcow2(folder)
    qemu_img(folder, "bitmap", "--add", "disk.qcow2", "changed")
    drop = ["rewrite", "-O", "vmdk", "--drop", "disk.qcow2"]
    return Refusal("disk.qcow2", ["-O", "vmdk"], "persistent bitmaps (1)", [drop])


def marked_corrupt(folder: Path) -> Refusal:
    _qcow2(folder)
    with (folder / "disk.qcow2").open("r+b") as file:
        file.seek(79)
        file.write(b"\x02")
    return Refusal("disk.qcow2", ["-O", "vmdk"], "is marked as corrupt", [convert_to("disk.qcow2")])


def tables_that_contradict(folder: Path) -> Refusal:
    """A VDI that states fewer allocated blocks than its map has."""
    make_disk(folder / "disk.raw")
    done("convert", "disk.raw", "disk.vdi", cwd=folder)
    with (folder / "disk.vdi").open("r+b") as file:
        file.seek(0x184)
        file.write(bytes(4))
    rewrite = ["rewrite", "-O", "qcow2", "disk.vdi"]
    advised = [convert_to("disk.vdi"), ["check", "-r", "all", "disk.vdi"], rewrite]
    return Refusal("disk.vdi", ["-O", "qcow2"], "its tables contradict each other (", advised)


def compressed(folder: Path) -> Refusal:
    _qcow2(folder, "-c")
    inflate = ["rewrite", "-O", "vmdk", "--inflate", "disk.qcow2"]
    words = "--inflate stores them decompressed"
    return Refusal("disk.qcow2", ["-O", "vmdk"], words, [convert_to("disk.qcow2"), inflate])


def several_files(folder: Path) -> Refusal:
    _raw(folder)
    options = ["-o", "subformat=twoGbMaxExtentFlat"]
    make_disk(folder / "large.raw", 5 << 30)
    qemu_img(folder, "convert", "-O", "vmdk", *options, "large.raw", "disk.vmdk")
    (folder / "large.raw").unlink()
    return Refusal(
        "disk.vmdk", ["-O", "qcow2"], "its disk is not in one file", [convert_to("disk.vmdk")]
    )


def odd_length(folder: Path) -> Refusal:
    make_disk(folder / "disk.raw", NBYTES + 100)
    words = "are not whole sectors of 512"
    return Refusal("disk.raw", ["-O", "qcow2"], words, [convert_to("disk.raw")])


def same_format(folder: Path) -> Refusal:
    _qcow2(folder)
    return Refusal("disk.qcow2", ["-O", "qcow2"], "is qcow2 already", [convert_to("disk.qcow2")])


def raw_to_raw(folder: Path) -> Refusal:
    _raw(folder)
    return Refusal("disk.raw", ["-O", "raw"], "is raw already", [convert_to("disk.raw")])


def to_dynamic_vhd(folder: Path) -> Refusal:
    _raw(folder)
    fixed = ["rewrite", "-O", "vhd", "-o", "subformat=fixed", "disk.raw"]
    return Refusal("disk.raw", ["-O", "vhd"], "-o subformat=fixed makes a fixed one", [fixed])


def blocks_to_dynamic_vhd(folder: Path) -> Refusal:
    _qcow2(folder)
    advised = [convert_to("disk.qcow2", "out.vhd")]
    return Refusal("disk.qcow2", ["-O", "vhd"], "imgcore convert writes one", advised)


def blocks_to_raw(folder: Path) -> Refusal:
    _qcow2(folder)
    advised = [convert_to("disk.qcow2", "out.raw")]
    return Refusal("disk.qcow2", ["-O", "raw"], "this image has blocks: imgcore convert", advised)


def fixed_vhdx(folder: Path) -> Refusal:
    _raw(folder)
    dynamic = ["rewrite", "-O", "vhdx", "disk.raw"]
    fixed = ["-O", "vhdx", "-o", "subformat=fixed"]
    return Refusal("disk.raw", fixed, "leave subformat out, or use imgcore convert", [dynamic])


def little_stays(folder: Path) -> Refusal:
    """The clusters are not where blocks of 1 MiB could be."""
    (folder / "disk.raw").write_bytes(random.Random(1).randbytes(70 * MIB))
    done("convert", "disk.raw", "disk.qcow2", cwd=folder)
    (folder / "disk.raw").unlink()
    measure = ["measure", "--rewrite", "-O", "vhdx", "disk.qcow2"]
    advised = [measure, convert_to("disk.qcow2", "out.vhdx")]
    return Refusal("disk.qcow2", ["-O", "vhdx"], "could stay in place", advised)


def other_suffix(folder: Path) -> Refusal:
    _raw(folder)
    advised = [["rewrite", "-O", "qcow2", "--name", "web.qcow2", "disk.raw"]]
    named = ["-O", "qcow2", "--name", "web.vmdk"]
    return Refusal("disk.raw", named, "end it in .qcow2", advised)


def name_with_folder(folder: Path) -> Refusal:
    _raw(folder)
    advised = [["rewrite", "-O", "qcow2", "--name", "web.qcow2", "disk.raw"]]
    named = ["-O", "qcow2", "--name", "a/web.qcow2"]
    return Refusal("disk.raw", named, "give a name without one", advised)


def two_names(folder: Path) -> Refusal:
    _raw(folder)
    named = ["-O", "qcow2", "--name", "a.qcow2", "--keep-name"]
    advised = [["rewrite", "-O", "qcow2", "--keep-name", "disk.raw"]]
    return Refusal("disk.raw", named, "give one of them", advised)


def two_files_of_one_name(folder: Path) -> Refusal:
    _raw(folder)
    flat = ["-O", "vmdk", "-o", "subformat=monolithicFlat"]
    advised = [["rewrite", *flat, "--name", "web.vmdk", "disk.raw"]]
    return Refusal("disk.raw", [*flat, "--keep-name"], "--name states another name", advised)


def taken_name(folder: Path) -> Refusal:
    _raw(folder)
    (folder / "disk.vdi").write_text("mine")
    advised = [["rewrite", "-O", "vdi", "--name", "web.vdi", "disk.raw"]]
    return Refusal("disk.raw", ["-O", "vdi"], "disk.vdi: exists already", advised)


def link(folder: Path) -> Refusal:
    _raw(folder)
    (folder / "link.raw").symlink_to("disk.raw")
    advised = [["rewrite", "-O", "qcow2", "disk.raw"]]
    return Refusal("link.raw", ["-O", "qcow2"], "is a symbolic link", advised)


def hard_link(folder: Path) -> Refusal:
    _raw(folder)
    os.link(folder / "disk.raw", folder / "more.raw")
    return Refusal("disk.raw", ["-O", "qcow2"], "has 2 names (hard links)")


def no_format(folder: Path) -> Refusal:
    _raw(folder)
    advised = [["rewrite", "-O", "qcow2", "disk.raw"]]
    return Refusal("disk.raw", [], "state the new format with -O", advised)


def undo_and_finish(folder: Path) -> Refusal:
    _raw(folder)
    done("rewrite", "-O", "qcow2", "disk.raw", cwd=folder)
    advised = [["rewrite", "--undo", "disk.qcow2"]]
    return Refusal("disk.qcow2", ["--undo", "--finish"], "give either --undo or", advised)


def undo_with_a_format(folder: Path) -> Refusal:
    _raw(folder)
    done("rewrite", "-O", "qcow2", "disk.raw", cwd=folder)
    advised = [["rewrite", "--undo", "disk.qcow2"]]
    words = "--undo takes no other options"
    return Refusal("disk.qcow2", ["--undo", "-O", "raw"], words, advised)


def converted_before(folder: Path) -> Refusal:
    _raw(folder)
    done("rewrite", "-O", "qcow2", "disk.raw", cwd=folder)
    advised = [["rewrite", "--finish", "disk.qcow2"], ["rewrite", "-O", "vmdk", "disk.qcow2"]]
    words = "its last conversion can still be undone"
    return Refusal("disk.qcow2", ["-O", "vmdk"], words, advised)


REFUSALS = {
    made.__name__: made
    for made in (
        child_of_qcow2, parent_of_qcow2, parent_by_description, parent_by_absolute_name,
        parent_in_another_folder, parent_through_a_link, parent_of_what_is_not_read,
        parent_of_vmdk, extent_of_vmdk, snapshots,
        bitmaps, marked_corrupt, compressed, several_files,
        tables_that_contradict,
        odd_length, same_format, raw_to_raw, to_dynamic_vhd, blocks_to_dynamic_vhd,
        blocks_to_raw, fixed_vhdx, little_stays, other_suffix, name_with_folder, two_names,
        two_files_of_one_name, taken_name, link, hard_link, no_format, undo_and_finish,
        undo_with_a_format, converted_before,
    )
} | {f"parent_of_{target}": parent_of(target) for target in ("vhd", "vhdx", "vdi")}  # fmt: skip


def state_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = [path for path in folder.iterdir() if path.is_file() and path.stat().st_size < 1 << 28]
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


# Those that only an attempt meets, and those of other actions.
NOT_REHEARSED = {
    "taken_name", "link", "hard_link", "undo_and_finish", "undo_with_a_format",
    "converted_before",
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str, tmp_path: Path) -> None:
    """Each is one line; no file is changed, nothing is left, and what helps helps."""
    if shutil.which("qemu-img") is None:
        pytest.skip("no qemu-img")
    refusal = REFUSALS[name](tmp_path)
    before = state_of(tmp_path)
    if name not in NOT_REHEARSED:
        rehearsed = command("rewrite", "--dry-run", *refusal.options, refusal.image, cwd=tmp_path)
        assert refusal.words in rehearsed.stderr
    result = command("rewrite", *refusal.options, refusal.image, cwd=tmp_path)
    assert result.returncode in (1, 2), result.stdout
    lines = [line for line in result.stderr.splitlines() if ": warning: " not in line]
    assert len(lines) == 1, lines
    assert refusal.words in lines[0]
    assert state_of(tmp_path) == before
    for words in refusal.advised:
        for path in tmp_path.glob("out.*"):
            path.unlink()
        done(*words, cwd=tmp_path)


def test_other_disks_of_the_same_name_are_no_parents(tmp_path: Path) -> None:
    """A child of a disk with this name in another folder is not a child of this one."""
    if shutil.which("qemu-img") is None:
        pytest.skip("no qemu-img")
    (tmp_path / "base").mkdir()
    make_disk(tmp_path / "base" / "disk.raw")
    qemu_img(tmp_path, "create", "-f", "qcow2", "-b", "base/disk.raw", "-F", "raw", "child.qcow2")
    make_disk(tmp_path / "disk.raw")
    imgcore.rewrite(tmp_path / "disk.raw", "vmdk")


def test_too_many_files(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for k in range(3):
        (raw.parent / str(k)).touch()
    monkeypatch.setattr("imgcore.disk.children.MAX_SEARCHED_FILES", 2)
    with pytest.raises(imgcore.LimitExceededError, match="move it to another folder first"):
        imgcore.rewrite(raw, "vmdk")
    (raw.parent / "alone").mkdir()
    raw.rename(raw.parent / "alone" / "disk.raw")
    imgcore.rewrite(raw.parent / "alone" / "disk.raw", "vmdk")


def test_space_is_required_before_anything(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imgcore.files.space.free_nbytes", lambda _: 4096)
    before = state_of(raw.parent)
    with pytest.raises(OSError, match=r"No space left on device: .* needed, 4 KiB free"):
        imgcore.rewrite(raw, "qcow2")
    assert state_of(raw.parent) == before


def test_a_file_that_changes_is_noticed(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody writes to it between the survey and the journal."""
    from imgcore.verbs import rewrite as verb

    def write_late(*_: object) -> int:
        with raw.open("r+b") as file:
            file.write(b"late")
        return 0

    monkeypatch.setattr(verb, "_needed_nbytes", write_late)
    with pytest.raises(imgcore.ImgcoreError, match="changed while it was read"):
        imgcore.rewrite(raw, "qcow2")
    assert names(raw.parent) == {"disk.raw"}
    assert raw.read_bytes().startswith(b"late")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("-s", "1G"), "--rewrite measures FILE, not --size"),
        (("-c", "disk.raw"), "--rewrite goes with -f, -O, -o, --allow and -U only"),
        (("--parent", "a", "disk.raw"), "--rewrite goes with"),
    ],
)
def test_measure_rewrite_has_its_own_options(raw: Path, words: Sequence[str], error: str) -> None:
    result = command("measure", "--rewrite", "-O", "qcow2", *words, cwd=raw.parent)
    assert (result.returncode, error in result.stderr) == (2, True)
