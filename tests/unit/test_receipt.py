"""``convert --receipt`` and ``imgcore verify``."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from tests.helpers import blkhash
from tests.helpers.command import assert_one_line_error
from tests.helpers.command import imgcore as command
from tests.helpers.images import KIB, MIB, noise, text
from tests.helpers.mounts import loop_device, make_file_system, mounted
from tests.helpers.targets import TARGETS

import imgcore
from imgcore import limits
from imgcore.files.target import Target

DISK = text(1 * MIB + 64 * KIB) + bytes(2 * MIB) + noise(900 * KIB) + bytes(124 * KIB)
SCHEMA = json.loads((Path(__file__).parents[2] / "docs/receipt.schema.json").read_text())


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(DISK)
    return path


def content(path: Path) -> dict[str, Any]:
    """Return a receipt that suits the schema."""
    found: dict[str, Any] = json.loads(path.read_text())
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(found, SCHEMA)
    return found


def known(value: Any, schema: Any) -> None:
    """Fail for a member that the schema does not describe."""
    schema = schema.get("oneOf", [schema])[0]
    if "$ref" in schema:
        schema = SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]]
    if isinstance(value, list):
        for item in value:
            known(item, schema["items"])
    elif isinstance(value, dict) and "properties" in schema:
        assert value.keys() == schema["properties"].keys()
        for name, item in value.items():
            known(item, schema["properties"][name])


@pytest.mark.parametrize("name", TARGETS)
def test_every_target(raw: Path, tmp_path: Path, name: str) -> None:
    target, receipt = tmp_path / name, tmp_path / "receipt.json"
    result = imgcore.convert(raw, target, receipt=receipt, **TARGETS[name])
    found = content(receipt)
    known(found, SCHEMA)
    nbytes = found["source"]["checksum"]["disk_size"]
    assert found["source"]["checksum"]["digest"] == blkhash.digest(DISK.ljust(nbytes, b"\0"))
    assert found["target"]["checksum"] is None
    assert found["target"]["format"] == result.target_format
    names = [file["name"] for file in found["target"]["files"]]
    assert names[0] == str(target)
    for file in found["target"]["files"]:
        status = os.stat(file["name"])
        assert (file["size"], file["device"], file["inode"]) == (
            status.st_size,
            status.st_dev,
            status.st_ino,
        )
    (source,) = found["source"]["files"]
    assert (source["name"], source["inode"]) == (str(raw), raw.stat().st_ino)
    verified = imgcore.verify(receipt)
    assert verified.checksum == result.checksum
    assert (verified.target, verified.virtual_size) == (str(target), nbytes)


@pytest.mark.parametrize("name", ["a.qcow2", "c.vmdk", "a.raw.gz", "a.tar.gz"])
def test_a_target_that_has_changed(raw: Path, tmp_path: Path, name: str) -> None:
    target, receipt = tmp_path / name, tmp_path / "receipt.json"
    imgcore.convert(raw, target, receipt=receipt, **TARGETS[name])
    changed = bytearray(DISK)
    changed[5000] ^= 1
    raw.write_bytes(changed)
    imgcore.convert(raw, target, force=True, **TARGETS[name])
    with pytest.raises(imgcore.ChecksumError, match=r"is not what .*receipt\.json tells of"):
        imgcore.verify(receipt)
    assert command("verify", receipt).returncode == 1


def test_read_back(raw: Path, tmp_path: Path) -> None:
    receipt = tmp_path / "receipt.json"
    imgcore.convert(raw, tmp_path / "a.vhdx", receipt=receipt, verify=True)
    found = content(receipt)
    assert found["target"]["checksum"] == found["source"]["checksum"]
    assert found["source"]["checksum"]["digest"] == blkhash.digest(DISK)


def test_a_chain(raw: Path, tmp_path: Path) -> None:
    """All files of the source are in it, and a child is verified with its parent."""
    base, top, child = (tmp_path / name for name in ("base.qcow2", "top.qcow2", "child.qcow2"))
    imgcore.convert(raw, base)
    imgcore.create(top, backing=base, backing_format="qcow2")
    receipt = tmp_path / "receipt.json"
    imgcore.convert(top, child, backing=base, backing_format="qcow2", receipt=receipt)
    found = content(receipt)
    assert [file["name"] for file in found["source"]["files"]] == [str(top), str(base)]
    assert found["target"]["backing_format"] == "qcow2"
    assert imgcore.verify(receipt).checksum.hexdigest == blkhash.digest(DISK)


def test_bad_ranges_and_warnings(tmp_path: Path) -> None:
    image, receipt = tmp_path / "a.vdi", tmp_path / "receipt.json"
    raw = tmp_path / "odd.raw"
    raw.write_bytes(noise(3 * MIB + 5))
    imgcore.convert(raw, image, receipt=receipt)
    assert "not a multiple of 512" in "".join(content(receipt)["warnings"])
    with image.open("r+b") as file:
        file.truncate(2 * MIB)
    result = imgcore.convert(image, tmp_path / "b.raw", salvage=True, receipt=receipt, force=True)
    assert result.bad_ranges
    assert content(receipt)["bad_ranges"] == [
        {"offset": offset, "length": length, "file": path, "reason": reason}
        for offset, length, path, reason in result.bad_ranges
    ]
    imgcore.verify(receipt)


def test_warnings_of_other_jobs_are_not_in_it(raw: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd.raw"
    odd.write_bytes(DISK + b"1")
    imgcore.convert(odd, tmp_path / "a.vhdx")
    receipt = tmp_path / "receipt.json"
    imgcore.convert(raw, tmp_path / "b.vhdx", receipt=receipt)
    assert content(receipt)["warnings"] == []


def test_in_place(raw: Path, tmp_path: Path) -> None:
    """What follows the disk in the file is not a part of it."""
    target, receipt = tmp_path / "a.raw", tmp_path / "receipt.json"
    target.write_bytes(noise(6 * MIB))
    imgcore.convert(raw, target, in_place=True, receipt=receipt)
    assert imgcore.verify(receipt).virtual_size == len(DISK)


@pytest.mark.skipif(os.geteuid() != 0, reason="loop devices need root")
def test_a_block_device(raw: Path, tmp_path: Path) -> None:
    backing, receipt = tmp_path / "device", tmp_path / "receipt.json"
    backing.write_bytes(noise(6 * MIB))
    with loop_device(backing) as device:
        imgcore.convert(raw, device, in_place=True, target_format="raw", receipt=receipt)
        (file,) = content(receipt)["target"]["files"]
        assert (file["size"], file["inode"]) == (6 * MIB, None)
        assert file["device"] == os.stat(device).st_rdev
        imgcore.verify(receipt)


def test_a_stream(raw: Path, tmp_path: Path) -> None:
    receipt, taken = tmp_path / "receipt.json", tmp_path / "taken"
    with taken.open("wb") as file:
        imgcore.convert(raw, file, target_format="raw.zst", receipt=receipt)
    assert content(receipt)["target"]["files"] == []
    with pytest.raises(imgcore.OptionError, match="was a stream: name the file"):
        imgcore.verify(receipt)
    assert imgcore.verify(receipt, taken).checksum.hexdigest == blkhash.digest(DISK)


def test_a_stream_as_source(raw: Path, tmp_path: Path) -> None:
    receipt = tmp_path / "receipt.json"
    with subprocess.Popen(["cat", raw], stdout=subprocess.PIPE) as cat:
        assert cat.stdout is not None
        imgcore.convert(cat.stdout, tmp_path / "a.raw", format="raw", receipt=receipt)
    (file_read,) = content(receipt)["source"]["files"]
    assert not file_read["name"].startswith("/")
    assert file_read["modified"] is None
    imgcore.verify(receipt)


def test_moved(raw: Path, tmp_path: Path) -> None:
    """The format is that of the receipt, whatever the new name says."""
    receipt = tmp_path / "receipt.json"
    imgcore.convert(raw, tmp_path / "a.vdi", receipt=receipt)
    (tmp_path / "a.vdi").rename(tmp_path / "b.raw")
    with pytest.raises(FileNotFoundError):
        imgcore.verify(receipt)
    assert imgcore.verify(receipt, tmp_path / "b.raw").format == "vdi"


def test_names_that_are_not_utf_8(raw: Path, tmp_path: Path) -> None:
    target, receipt = os.fsencode(tmp_path) + b"/\xff.raw", os.fsencode(tmp_path) + b"/\xfe.json"
    imgcore.convert(raw, target, receipt=receipt)
    assert imgcore.verify(receipt).target == os.fsdecode(target)


class TestCommand:
    def test_output(self, raw: Path, tmp_path: Path) -> None:
        target = tmp_path / "a.qcow2"
        done = command("convert", "--receipt", "r.json", raw, target, cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        done = command("verify", tmp_path / "r.json")
        assert (done.returncode, done.stdout) == (0, f"{target}: OK\n")
        answer = json.loads(command("verify", "--json", tmp_path / "r.json").stdout)
        assert (answer["status"], answer["error"]) == ("ok", None)
        assert answer["checksum"]["digest"] == blkhash.digest(DISK)
        subprocess.run(
            ["qemu-io", "-f", "qcow2", "-c", "write 1M 512", target], check=True, stdout=-3
        )
        assert_one_line_error(command("verify", "-q", tmp_path / "r.json"), "tells of", code=1)
        done = command("verify", "--json", tmp_path / "r.json")
        answer = json.loads(done.stdout)
        assert (done.returncode, answer["status"]) == (1, "failed")

    def test_it_cannot_be_read(self, tmp_path: Path) -> None:
        assert_one_line_error(command("verify", tmp_path / "none"), "no such file", code=2)


class TestItsName:
    def test_taken(self, raw: Path, tmp_path: Path) -> None:
        receipt, target = tmp_path / "r.json", tmp_path / "a.qcow2"
        receipt.write_text("old")
        with pytest.raises(imgcore.TargetError, match="exists already"):
            imgcore.convert(raw, target, receipt=receipt)
        assert (receipt.read_text(), target.exists()) == ("old", False)
        imgcore.convert(raw, target, receipt=receipt, force=True)
        content(receipt)

    @pytest.mark.parametrize("name", ["a.vmdk", "../x/a.vmdk", "a-flat.vmdk"])
    def test_that_of_the_target(self, raw: Path, tmp_path: Path, name: str) -> None:
        folder = tmp_path / "x"
        folder.mkdir()
        target = folder / "a.vmdk"
        with pytest.raises(imgcore.OptionError, match="cannot have the name of the target"):
            imgcore.convert(
                raw,
                target,
                options={"subformat": "monolithicFlat"},
                receipt=folder / name,
                force=True,
            )
        assert os.listdir(folder) == []

    def test_that_of_the_source(self, raw: Path, tmp_path: Path) -> None:
        with pytest.raises(imgcore.TargetError, match="is read by this conversion"):
            imgcore.convert(raw, tmp_path / "a.vdi", receipt=raw, force=True)
        assert raw.read_bytes() == DISK

    def test_a_missing_folder(self, raw: Path, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            imgcore.convert(raw, tmp_path / "a.vdi", receipt=tmp_path / "none" / "r.json")
        assert not (tmp_path / "a.vdi").exists()


class TestFailure:
    """Neither of the two files, or the target alone: never the receipt alone."""

    def test_the_conversion_fails(self, raw: Path, tmp_path: Path) -> None:
        image = tmp_path / "a.qcow2"
        imgcore.convert(raw, image, compress=True)
        with image.open("r+b") as file:
            file.truncate(600 * KIB)
        folder = tmp_path / "x"
        folder.mkdir()
        with pytest.raises(imgcore.ImgcoreError):
            imgcore.convert(image, folder / "a.raw", receipt=folder / "r.json")
        assert os.listdir(folder) == []

    @pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
    def test_no_room_for_the_receipt(self, raw: Path, tmp_path: Path) -> None:
        image = make_file_system("ext4", tmp_path / "small.img", 4 * MIB)
        target = tmp_path / "a.raw"
        with mounted(image, tmp_path / "small", "-o", "loop") as folder:
            with (folder / "ballast").open("wb", buffering=0) as ballast:
                for nbytes in (64 * KIB, 1 * KIB):
                    while True:
                        try:
                            ballast.write(bytes(nbytes))
                        except OSError:
                            break
            with pytest.raises(OSError, match=r"No space left.*r\.json"):
                imgcore.convert(raw, target, receipt=folder / "r.json")
            assert not target.exists()
            assert not (folder / "r.json").exists()

    @pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError(5, "I/O error")])
    def test_after_the_commit(
        self,
        raw: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        interruption: Any,
    ) -> None:
        """A signal does not keep the receipt away, and a refusal is an error."""
        commit: Callable[[Target], None] = Target.commit
        failures = []

        def failing(target: Target) -> None:
            if target.path.endswith(".json") and not failures:
                failures.append(target)
                raise interruption
            commit(target)

        monkeypatch.setattr(Target, "commit", failing)
        target, receipt = tmp_path / "a.raw", tmp_path / "r.json"
        if interruption is KeyboardInterrupt:
            imgcore.convert(raw, target, receipt=receipt)
            content(receipt)
        else:
            with pytest.raises(OSError, match="I/O error"):
                imgcore.convert(raw, target, receipt=receipt)
            assert not receipt.exists()
        assert failures
        assert target.read_bytes() == DISK
        assert sorted(os.listdir(tmp_path)) == ["a.raw", "disk.raw"] + (
            ["r.json"] if interruption is KeyboardInterrupt else []
        )


class TestMalformed:
    @pytest.fixture
    def receipt(self, raw: Path, tmp_path: Path) -> Path:
        path = tmp_path / "r.json"
        imgcore.convert(raw, tmp_path / "a.raw", receipt=path)
        return path

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            (b"", "not JSON"),
            (b"{", "not JSON"),
            (b"\xff\xfe", "not JSON"),
            (b"[" * 100_000, "not JSON"),
            (b'{"version": 1' + b"0" * 10_000 + b"}", "not JSON"),
            (b'{"type": 1, "type": "imgcore-receipt"}', "key twice"),
            (b"[]", "is not a receipt"),
            (b"{}", "is not a receipt"),
            (b'{"type": "imgcore-receipt"}', '"version" is missing'),
            (b'{"type": "imgcore-receipt", "version": true}', '"version" is missing'),
            (b'{"type": "imgcore-receipt", "version": 1}', '"target" is missing'),
        ],
    )
    def test_other_files(self, tmp_path: Path, text: bytes, words: str) -> None:
        path = tmp_path / "r.json"
        path.write_bytes(text)
        with pytest.raises(imgcore.FormatError, match=words):
            imgcore.verify(path)
        assert_one_line_error(command("verify", path), words, code=2)

    @pytest.mark.parametrize(
        ("path", "value"),
        [
            ("target/files", None),
            ("target/files", [1]),
            ("target/format", 7),
            ("target/profile", "nowhere"),
            ("source/checksum", []),
            ("source/checksum/algorithm", "md5"),
            ("source/checksum/block_size", 4096),
            ("source/checksum/digest", "00"),
            ("source/checksum/digest", "zz"),
            ("source/checksum/disk_size", -1),
            ("source/checksum/disk_size", 1.5),
            ("source/checksum/disk_size", 1 << 70),
        ],
    )
    def test_members(self, receipt: Path, path: str, value: Any) -> None:
        found = json.loads(receipt.read_text())
        *parents, last = path.split("/")
        part = found
        for name in parents:
            part = part[name]
        part[last] = value
        receipt.write_text(json.dumps(found))
        with pytest.raises(imgcore.FormatError, match="malformed receipt"):
            imgcore.verify(receipt)

    def test_another_version(self, receipt: Path) -> None:
        found = json.loads(receipt.read_text())
        receipt.write_text(json.dumps(found | {"version": 2}))
        with pytest.raises(imgcore.UnsupportedFeatureError, match="of version 2, only version 1"):
            imgcore.verify(receipt)

    def test_unknown_members(self, receipt: Path) -> None:
        found = json.loads(receipt.read_text())
        receipt.write_text(json.dumps(found | {"new": [1]}))
        imgcore.verify(receipt)

    def test_too_large(self, receipt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        nbytes = receipt.stat().st_size
        monkeypatch.setattr("imgcore.disk.receipt.MAX_RECEIPT_NBYTES", nbytes)
        imgcore.verify(receipt)
        monkeypatch.setattr("imgcore.disk.receipt.MAX_RECEIPT_NBYTES", nbytes - 1)
        with pytest.raises(imgcore.LimitExceededError, match="a receipt at most"):
            imgcore.verify(receipt)
        assert limits.MAX_RECEIPT_NBYTES == 64 * MIB
