"""check --repair: repairs, refusals, and that the image is complete at any moment."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
from tests.helpers import qemu
from tests.helpers.command import assert_one_line_error
from tests.helpers.command import imgcore as run
from tests.helpers.mounts import loop_device, make_file_system, mounted
from tests.helpers.qcow2 import create, qemu_io
from tests.helpers.reading import poke

import imgcore
from imgcore.disk import repair as check_repair
from imgcore.formats.api import Repair
from imgcore.formats.qcow2.reader import Qcow2Reader

MIB = 1 << 20
COPIED = 1 << 63

# In the image below the refcount block is at 0x20000, L1 at 0x30000, L2 at 0x40000 and
# data from 0x50000 to 0x80000.
REFCOUNTS, L2 = 0x20000, 0x40000


def digest(path: Path) -> bytes:
    with imgcore.open(path) as image:
        return image.read(0, image.virtual_size)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = create(tmp_path / "a.qcow2", MIB)
    qemu_io(path, "write -P 7 0 192k")
    return path


@pytest.fixture
def leaky(image: Path) -> Path:
    """An image with three clusters, of which the second is leaked."""
    poke(image, (L2 + 8, struct.pack(">Q", 0)))
    assert imgcore.check(image).leaks == 1
    return image


@pytest.mark.parametrize("refcount_bits", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("cluster_size", [512, 65536])
def test_leaked_clusters_are_freed(tmp_path: Path, cluster_size: int, refcount_bits: int) -> None:
    path = create(
        tmp_path / "a.qcow2",
        4 * MIB,
        f"cluster_size={cluster_size}",
        f"refcount_bits={refcount_bits}",
    )
    qemu_io(path, "write -P 1 0 3M")
    raw = path.read_bytes()
    l1 = int.from_bytes(raw[40:48], "big")
    l2 = int.from_bytes(raw[l1 : l1 + 8], "big") & ~COPIED
    # Every third entry of the first L2 table is cleared.
    entries = min(cluster_size // 8, 3 * MIB // cluster_size)
    poke(path, *((l2 + 8 * index, bytes(8)) for index in range(1, entries, 3)))
    before, content = imgcore.check(path), digest(path)
    assert before.leaks > 5
    assert before.corruptions == 0
    result = imgcore.check(path, repair=True)
    assert (result.corruptions, result.leaks, result.problems) == (0, 0, [])
    assert (result.leaks_fixed, result.corruptions_fixed) == (before.leaks, 0)
    assert result.repairs == [f"{before.leaks} leaked clusters: refcounts set to 0"]
    qemu.assert_check_clean(path)
    assert digest(path) == content
    assert names(tmp_path) == ["a.qcow2"]


def test_a_sound_image_is_not_touched(image: Path) -> None:
    before = image.stat()
    result = imgcore.check(image, repair=True)
    assert result.ok
    assert result.repairs == []
    # Reading may change the time of access.
    after = image.stat()
    for name in ("st_ino", "st_size", "st_mode", "st_mtime_ns", "st_ctime_ns"):
        assert getattr(after, name) == getattr(before, name), name


def test_nothing_is_freed_beside_a_corruption(leaky: Path) -> None:
    poke(leaky, (L2, struct.pack(">Q", COPIED | 0x50000 | 1 << 56)))
    before = leaky.read_bytes()
    result = imgcore.check(leaky, repair=True)
    assert result.corruptions == 1
    assert result.leaks >= 1
    assert result.repairs == []
    assert leaky.read_bytes() == before


def test_a_refcount_that_is_too_high_is_lowered(image: Path) -> None:
    poke(image, (REFCOUNTS + 2 * 9, struct.pack(">H", 1)), (L2, struct.pack(">Q", 0x50000)))
    poke(image, (REFCOUNTS + 2 * 5, struct.pack(">H", 2)))
    with image.open("r+b") as file:
        file.truncate(10 * 65536)
    assert imgcore.check(image).leaks == 2
    result = imgcore.check(image, repair=True)
    assert (result.corruptions, result.leaks, result.leaks_fixed) == (0, 0, 2)
    qemu.assert_check_clean(image)


def test_an_unknown_extension_may_own_clusters(leaky: Path) -> None:
    raw = bytearray(leaky.read_bytes())
    header_nbytes = int.from_bytes(raw[100:104], "big")
    at = raw.index(struct.pack(">I", 0x6803F857), header_nbytes)
    poke(leaky, (at, struct.pack(">I", 0x12345678)))
    with pytest.raises(imgcore.UnsupportedFeatureError, match="header extension 0x12345678"):
        imgcore.check(leaky, repair=True)


def test_an_unknown_feature_may_own_clusters(leaky: Path) -> None:
    poke(leaky, (80, struct.pack(">Q", 0x20)))
    with pytest.raises(imgcore.UnsupportedFeatureError, match="compatible features 0x20"):
        imgcore.check(leaky, repair=True)


def test_unknown_autoclear_features_are_cleared(leaky: Path) -> None:
    """As the specification requires of every program that writes to the image."""
    poke(leaky, (88, struct.pack(">Q", 4)))
    result = imgcore.check(leaky, repair=True)
    assert result.ok
    assert "unknown autoclear features 0x4: cleared" in result.repairs
    assert leaky.read_bytes()[88:96] == bytes(8)
    qemu.assert_check_clean(leaky)


def test_blocks_are_shared_with_the_copy(leaky: Path, tmp_path: Path) -> None:
    """The copy does not take space if the file system supports reflinks."""
    image = make_file_system("btrfs", tmp_path / "image", 256 * MIB)
    with mounted(image, tmp_path / "mounted", "-o", "loop") as folder:
        path = folder / "a.qcow2"
        shutil.copyfile(leaky, path)
        assert imgcore.check(path, repair=True).leaks_fixed == 1
        qemu.assert_check_clean(path)


def test_the_owner_stays(
    leaky: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may give files away")
    os.chown(leaky, 1234, 5678)

    def refuse(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    copy = leaky.with_name("copy.qcow2")
    shutil.copy(leaky, copy)
    assert imgcore.check(leaky, repair=True).leaks_fixed == 1
    assert (leaky.stat().st_uid, leaky.stat().st_gid) == (1234, 5678)
    os.chown(copy, 1234, 5678)
    monkeypatch.setattr(os, "fchown", refuse)
    assert imgcore.check(copy, repair=True).leaks_fixed == 1
    assert f"{copy}: its owner 1234 could not be kept: Operation not permitted" in caplog.text


def test_attributes_stay(leaky: Path) -> None:
    leaky.chmod(0o640)
    os.utime(leaky, ns=(1_600_000_000_000_000_000, 1_700_000_000_123_456_789))
    before = leaky.stat()
    imgcore.check(leaky, repair=True)
    after = leaky.stat()
    assert after.st_mode == before.st_mode
    assert after.st_mtime_ns == before.st_mtime_ns
    assert after.st_ino != before.st_ino


def test_a_link_stays_a_link(leaky: Path) -> None:
    link = leaky.with_name("link.qcow2")
    link.symlink_to(leaky.name)
    assert imgcore.check(link, repair=True).leaks_fixed == 1
    assert link.is_symlink()
    assert imgcore.check(leaky).ok


def test_holes_stay_holes(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", 64 * MIB, "preallocation=metadata")
    qemu_io(path, "write -P 5 32M 64k")
    raw = path.read_bytes()
    l1 = int.from_bytes(raw[40:48], "big")
    l2 = int.from_bytes(raw[l1 : l1 + 8], "big") & ~COPIED
    poke(path, (l2 + 8, bytes(8)))
    content, before = digest(path), path.stat()
    assert imgcore.check(path, repair=True).leaks_fixed == 1
    assert digest(path) == content
    assert path.stat().st_size == before.st_size
    assert path.stat().st_blocks < before.st_blocks + 4096


@pytest.mark.parametrize("way", ["clone", "copy_file_range", "read and write"])
def test_ways_to_copy(leaky: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    def unsupported(*_: object) -> int:
        raise OSError(95, "Operation not supported")

    if way != "clone":
        monkeypatch.setattr(fcntl, "ioctl", unsupported)
    if way == "read and write":
        monkeypatch.setattr(os, "copy_file_range", unsupported)
    content = digest(leaky)
    assert imgcore.check(leaky, repair=True).leaks_fixed == 1
    assert digest(leaky) == content
    qemu.assert_check_clean(leaky)


class TestRefused:
    """After a failure the image is unchanged, and nothing remains beside it."""

    @pytest.fixture(autouse=True)
    def _unchanged(self, leaky: Path) -> object:
        before = leaky.read_bytes()
        yield
        assert leaky.read_bytes() == before
        assert [name for name in names(leaky.parent) if "imgcore" in name] == []

    def test_hard_links(self, leaky: Path) -> None:
        os.link(leaky, leaky.with_name("second"))
        with pytest.raises(imgcore.UnsupportedFeatureError, match="2 names"):
            imgcore.check(leaky, repair=True)

    def test_a_block_device(self, leaky: Path) -> None:
        with loop_device(leaky) as device:
            with pytest.raises(imgcore.UnsupportedFeatureError, match="on a block device"):
                imgcore.check(device, format="qcow2", repair=True)

    @pytest.mark.parametrize("call", ["ioctl", "copy_file_range"])
    def test_a_copy_that_fails(
        self, leaky: Path, monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        """A disk error ends the repair; it is not taken for missing reflink support."""

        def answer(code: int) -> Callable[..., int]:
            def fail(*_: object) -> int:
                raise OSError(code, os.strerror(code))

            return fail

        code = errno.EIO if call == "ioctl" else errno.EOPNOTSUPP
        monkeypatch.setattr(fcntl, "ioctl", answer(code))
        monkeypatch.setattr(os, "copy_file_range", answer(errno.EIO))
        with pytest.raises(OSError, match="Input/output error") as caught:
            imgcore.check(leaky, repair=True)
        assert caught.value.filename == str(leaky)

    def test_shared(self, leaky: Path) -> None:
        with pytest.raises(imgcore.OptionError, match="-U"):
            imgcore.check(leaky, repair=True, share=True)

    def test_a_format_without_repairs(self, leaky: Path) -> None:
        vmdk = leaky.with_name("a.vmdk")
        imgcore.convert(leaky, vmdk)
        with pytest.raises(imgcore.UnsupportedFeatureError, match="vmdk images cannot be repaired"):
            imgcore.check(vmdk, repair=True)

    @pytest.mark.parametrize("step", ["copy_content", "_apply", "_verify", "copy_attributes"])
    def test_a_failure_at_any_step(
        self, leaky: Path, monkeypatch: pytest.MonkeyPatch, step: str
    ) -> None:
        def fail(*_: object) -> None:
            raise OSError(28, "No space left on device", "a.qcow2")

        monkeypatch.setattr(check_repair, step, fail)
        with pytest.raises(OSError, match="No space"):
            imgcore.check(leaky, repair=True)

    BAD_REPAIRS = (
        ("data", Repair("p", "a", writes=((0x5FFFF, b"x"),)), "would change guest data"),
        ("cut", Repair("p", "a", file_nbytes=0x70001), "would change guest data"),
        ("grown and cut", Repair("p", "a", file_nbytes=0x60000), "would change guest data"),
        ("worse", Repair("p", "a", writes=((REFCOUNTS, b"\0\0"),)), "do not help"),
        ("other content", Repair("p", "a", writes=((L2, bytes(8)),)), "read differently"),
        ("other size", Repair("p", "a", writes=((24, struct.pack(">Q", 512)),)), "differently"),
    )

    @pytest.mark.parametrize(
        ("bad", "words"), [case[1:] for case in BAD_REPAIRS], ids=[case[0] for case in BAD_REPAIRS]
    )
    def test_a_repair_that_is_wrong(
        self, leaky: Path, monkeypatch: pytest.MonkeyPatch, bad: Repair, words: str
    ) -> None:
        """The repairs that a format proposes are not trusted either."""
        monkeypatch.setattr(Qcow2Reader, "repairs", lambda *_, **__: [bad])
        with pytest.raises(imgcore.ImgcoreError, match=words):
            imgcore.check(leaky, repair=True)

    def test_a_repair_outside_the_file(self, leaky: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        bad = Repair("p", "a", writes=((leaky.stat().st_size, b"x"),))
        monkeypatch.setattr(Qcow2Reader, "repairs", lambda *_, **__: [bad])
        with pytest.raises(ValueError, match="outside the file"):
            imgcore.check(leaky, repair=True)

    def test_an_image_that_changes_meanwhile(
        self, leaky: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real: Callable[..., None] = check_repair.copy_content

        def copy(*arguments: object) -> None:
            real(*arguments)
            os.utime(leaky)

        monkeypatch.setattr(check_repair, "copy_content", copy)
        with pytest.raises(imgcore.ImgcoreError, match="changed while it was read"):
            imgcore.check(leaky, repair=True)


def test_the_command(leaky: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.qcow2"
    shutil.copyfile(leaky, copy)
    done = run("check", "-r", leaky)
    assert (done.returncode, done.stderr) == (
        0,
        "Repaired 1 leaked clusters: refcounts set to 0\n",
    )
    assert done.stdout.startswith("No errors were found")
    report = json.loads(run("check", "--repair", "--json", copy).stdout)
    assert report["leaks-fixed"] == 1
    assert report["repairs"]
    assert "leaks" not in report
    assert subprocess.run(["cmp", leaky, copy], check=False).returncode == 0
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(512))
    assert_one_line_error(run("check", "-r", raw), "no tables", code=63)


def test_an_image_of_an_empty_disk(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", 0)
    n_clusters = -(-path.stat().st_size // 65536)
    os.truncate(path, (n_clusters + 1) * 65536)
    poke(path, (REFCOUNTS + 2 * n_clusters, struct.pack(">H", 1)))
    result = imgcore.check(path, repair=True)
    assert (result.leaks_fixed, result.leaks, result.corruptions) == (1, 0, 0)


# What follows -r: leaks, all, a file, another flag.
SYNTAX = {
    "bare": (["-r", "FILE"], "all"),
    "long": (["--repair", "FILE"], "all"),
    "last": (["FILE", "-r"], "all"),
    "all": (["-r", "all", "FILE"], "all"),
    "leaks": (["-r", "leaks", "FILE"], "leaks"),
    "long leaks": (["--repair", "leaks", "FILE"], "leaks"),
    "equals": (["--repair=leaks", "FILE"], "leaks"),
    "joined": (["-rleaks", "FILE"], "leaks"),
    "after the file": (["FILE", "-r", "leaks"], "leaks"),
    "with -q": (["-qr", "FILE"], "all"),
    "before -q": (["-rq", "FILE"], "all"),
    "with -p": (["-pr", "FILE"], "all"),
    "with -q and a value": (["-qr", "leaks", "FILE"], "leaks"),
    "dashes": (["-r", "--", "FILE"], "all"),
    "none": (["FILE"], None),
}


@pytest.mark.parametrize("case", SYNTAX)
def test_the_syntax(leaky: Path, case: str) -> None:
    arguments, mode = SYNTAX[case]
    # A refcount that is too low, beside the leak.
    poke(leaky, (REFCOUNTS + 2 * 3, bytes(2)))
    words = [str(leaky) if word == "FILE" else word for word in arguments]
    done = run("check", "--json", *words)
    report = json.loads(done.stdout)
    assert ("leaks-fixed" in report) == (mode is not None)
    assert ("corruptions-fixed" in report) == (mode == "all")
    assert done.returncode == (0 if mode == "all" else 2)
    assert ("not-repaired" in report) == (mode == "leaks")


def test_a_file_named_all(leaky: Path) -> None:
    shutil.copyfile(leaky, leaky.with_name("all"))
    assert run("check", "-r", "--", "all", cwd=leaky.parent).returncode == 0
    assert_one_line_error(run("check", "-r", "some", leaky, cwd=leaky.parent), "extra argument")
    assert_one_line_error(run("check", "--repair=some", leaky), "not one of 'leaks', 'all'")


def test_values_of_the_keyword(leaky: Path) -> None:
    with pytest.raises(imgcore.OptionError, match="repair is 'some', allowed are 'leaks', 'all'"):
        imgcore.check(leaky, repair="some")  # type: ignore[arg-type]
    assert imgcore.check(leaky, repair=False).leaks == 1
    assert imgcore.check(leaky, repair="leaks").leaks_fixed == 1


def test_an_image_in_use(leaky: Path) -> None:
    with qemu.held_open("-f", "qcow2", leaky):
        assert_one_line_error(run("check", "-r", "all", leaky), "in use by process")


# Changes to the image above, and why it is not repaired.
CONFLICTS: dict[str, tuple[tuple[tuple[int, bytes], ...], str]] = {
    "two guest clusters": (
        ((L2, struct.pack(">Q", COPIED | 0x70000)),),
        "cluster 7 is used twice, though a copied flag says that it is used once",
    ),
    "data in L1": (((L2, struct.pack(">Q", COPIED | 0x30000)),), "cluster 3 holds both"),
    "data in L2": (((L2, struct.pack(">Q", COPIED | 0x40000)),), "cluster 4 holds both"),
    "data in the header": (((0x30000, struct.pack(">Q", COPIED)),), "has flags but no L2 table"),
    "L2 in L1": (((0x30000, struct.pack(">Q", COPIED | 0x30000)),), "cluster 3 holds"),
    "outside": (((L2, struct.pack(">Q", COPIED | 1 << 40)),), "points past the end of the file"),
    "unaligned": (((L2, struct.pack(">Q", COPIED | 0x50200)),), "is not cluster aligned"),
    "reserved": (((L2, struct.pack(">Q", COPIED | 0x50002)),), "has reserved bits set"),
}


@pytest.mark.parametrize("mode", ["leaks", "all"])
@pytest.mark.parametrize("case", CONFLICTS)
def test_damaged_tables_are_not_repaired(
    image: Path, case: str, mode: Literal["leaks", "all"]
) -> None:
    changes, words = CONFLICTS[case]
    poke(image, *changes, (REFCOUNTS + 2 * 6, bytes(2)), (72, struct.pack(">Q", 3)))
    before = image.read_bytes()
    result = imgcore.check(image, repair=mode)
    assert result.corruptions > 0
    assert result.repairs == []
    assert result.not_repaired[0] == (
        "refcounts are counted from the tables, which are damaged: nothing is changed"
    )
    assert any(words in line for line in result.not_repaired)
    assert image.read_bytes() == before
    done = run("check", "-r", mode, image)
    assert done.returncode == 2
    assert f"Not repaired: {result.not_repaired[1]}" in done.stderr.splitlines()


def test_a_copied_flag_of_a_compressed_cluster(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", MIB)
    qemu_io(path, "write -c -P 7 0 64k")
    l2 = int.from_bytes(path.read_bytes()[0x30000:0x30008], "big") & ~COPIED
    entry = int.from_bytes(path.read_bytes()[l2 : l2 + 8], "big")
    poke(path, (l2, struct.pack(">Q", entry | COPIED)))
    content = digest(path)
    result = imgcore.check(path, repair="leaks")
    assert result.not_repaired == [
        "1 compressed clusters have a copied flag: -r all repairs this, -r leaks does not"
    ]
    assert imgcore.check(path, repair="all").corruptions_fixed == 1
    assert digest(path) == content
    qemu.assert_check_clean(path)


def test_refcounts_that_are_too_narrow(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", MIB, "refcount_bits=1", "cluster_size=512")
    qemu_io(path, "write 0 1k")
    raw = path.read_bytes()
    l1 = int.from_bytes(raw[40:48], "big")
    l2 = int.from_bytes(raw[l1 : l1 + 8], "big") & ~COPIED
    place = int.from_bytes(raw[l2 : l2 + 8], "big") & ~COPIED
    poke(path, (l2, struct.pack(">QQ", place, place)))
    result = imgcore.check(path, repair=True)
    assert result.repairs == []
    assert "has 2 references, refcounts of 1 bits allow 1" in result.not_repaired[1]


def test_the_refcount_table_moves_if_it_is_too_small(tmp_path: Path) -> None:
    """64 tables of 512 bytes cover 32 KiB * 64; the file grows past that."""
    path = create(tmp_path / "a.qcow2", 8 * MIB, "cluster_size=512", "refcount_bits=64")
    qemu_io(path, "write -P 3 0 3M")
    raw = path.read_bytes()
    content = digest(path)
    n_clusters = int.from_bytes(raw[56:60], "big")
    assert n_clusters > 1
    poke(path, (56, struct.pack(">I", 1)))
    result = imgcore.check(path, repair=True)
    assert result.ok
    assert digest(path) == content
    qemu.assert_check_clean(path)


def test_a_sparse_file_of_many_tebibytes(tmp_path: Path) -> None:
    """One cluster far away needs one block, not one for each 2 GiB before it."""
    path = create(tmp_path / "a.qcow2", MIB)
    qemu_io(path, "write -P 7 0 192k")
    far = (15 << 40) + 0x10000
    with path.open("r+b") as file:
        file.truncate(far + 0x10000)
    poke(path, (L2, struct.pack(">Q", COPIED | far)))
    result = imgcore.check(path, repair=True)
    assert result.ok
    assert path.stat().st_size < far + 20 * 0x10000
    assert path.stat().st_blocks * 512 < 4 * MIB
    qemu.assert_check_clean(path)


def test_new_refcounts_are_limited(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poke(image, (0x10000, bytes(8)))
    monkeypatch.setattr("imgcore.limits.QCOW2_MAX_NEW_REFCOUNTS_NBYTES", 0xFFFF)
    result = imgcore.check(image, repair=True)
    assert result.repairs == []
    assert "1 new clusters for refcounts take 65536 bytes" in result.not_repaired[1]
    monkeypatch.setattr("imgcore.limits.QCOW2_MAX_NEW_REFCOUNTS_NBYTES", 0x10000)
    assert imgcore.check(image, repair=True).ok


def test_ranges_are_joined(leaky: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Repairs are compared with guest data, however many ranges they write."""
    monkeypatch.setattr(check_repair, "MAX_REPAIR_RANGES", 2)
    writes = tuple((REFCOUNTS + 2 * n, b"\0\1") for n in (8, 3, 4, 0, 2, 1))
    bad = Repair("p", "a", writes=(*writes, (0x5FFFF, b"x")))
    monkeypatch.setattr(Qcow2Reader, "repairs", lambda *_, **__: [bad])
    with pytest.raises(imgcore.ImgcoreError, match="0x5ffff would change guest data"):
        imgcore.check(leaky, repair=True)


def test_a_vmdk_with_problems(leaky: Path) -> None:
    """Its problems are listed, and one line says that they stay."""
    path = leaky.with_name("a.vmdk")
    imgcore.convert(leaky, path)
    raw = path.read_bytes()
    directory = int.from_bytes(raw[56:64], "little") * 512
    table = int.from_bytes(raw[directory : directory + 4], "little") * 512
    poke(path, (table, struct.pack("<I", 1 << 30)))
    before = path.read_bytes()
    assert imgcore.check(path).corruptions > 0
    for mode in ("leaks", "all"):
        done = run("check", "-r", mode, path)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1] == "Not repaired: vmdk images cannot be repaired"
    assert path.read_bytes() == before
