"""The journal of a conversion in place: damaged, cut, foreign, or of another version.

A journal that cannot be followed is an error of one line, and the image stays as it is.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.tiny import FRONT, OLD, killed_after, new_content, rewrite

import imgcore
from imgcore._core import crc32c
from imgcore.errors import ImgcoreError, TargetError, UnsupportedFeatureError
from imgcore.files import record_file
from imgcore.files.folder import Folder
from imgcore.files.in_place import InPlace, finish, recover, undo
from imgcore.files.journal import Journal

RECORDS = ("begin", "appended", "armed", "done")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.old"
    path.write_bytes(OLD)
    return path


def journal_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.imgcore-journal")


def image_in(folder: Path) -> Path:
    (image,) = (path for path in folder.iterdir() if "journal" not in path.name)
    return image


@pytest.mark.parametrize("record", RECORDS)
def test_recovered_after_each_record(record: str, disk: Path) -> None:
    killed_after(record, disk)
    state = "new" if record in ("armed", "done") else "old"
    found = recover(disk)
    assert found is not None
    assert (found.state, found.job) == (state, {"to": "new"})
    assert Path(found.path).read_bytes() == (OLD if state == "old" else new_content())
    if state == "new":
        undo(found.path)
    assert disk.read_bytes() == OLD
    assert os.listdir(disk.parent) == ["disk.old"]


@pytest.mark.parametrize("record", RECORDS)
def test_undone_after_each_record(record: str, disk: Path) -> None:
    killed_after(record, disk)
    assert undo(disk) == str(disk)
    assert disk.read_bytes() == OLD
    assert os.listdir(disk.parent) == ["disk.old"]


@pytest.mark.parametrize("record", RECORDS)
def test_not_finished_before_it_is_complete(record: str, disk: Path) -> None:
    killed_after(record, disk)
    if record == "done":
        assert Path(finish(disk)).read_bytes() == new_content()
        return
    with pytest.raises(ImgcoreError, match="interrupted and is not complete"):
        finish(disk)


def assert_sound_or_refused(disk: Path, call: Callable[[Path], Any]) -> str:
    """Return what a call has made of an image; fail if that is not whole."""
    before = image_in(disk.parent).read_bytes()
    try:
        call(disk)
    except ImgcoreError as error:
        assert len(str(error).splitlines()) == 1
        assert image_in(disk.parent).read_bytes() == before
        return "refused"
    content = image_in(disk.parent).read_bytes()
    assert content in (OLD, new_content())
    return "old" if content == OLD else "new"


def places(nbytes: int) -> list[int]:
    """Return offsets in each part of a journal, and random ones."""
    rng = random.Random(5)
    return [*range(64), *(rng.randrange(nbytes) for _ in range(40)), nbytes - 1]


@pytest.mark.parametrize("call", [recover, undo])
@pytest.mark.parametrize("record", RECORDS)
def test_damaged(record: str, call: Callable[[Path], Any], disk: Path) -> None:
    killed_after(record, disk)
    saved = {path.name: path.read_bytes() for path in disk.parent.iterdir()}
    journal = saved["disk.old.imgcore-journal"]
    seen = set()
    for offset in places(len(journal)):
        damaged = bytearray(journal)
        damaged[offset] ^= 0x41
        lay_out(disk, saved["disk.old"], bytes(damaged))
        seen.add(assert_sound_or_refused(disk, call))
    for size in (0, 1, 17, 33, 40, 41, 1000, *places(len(journal))[64:]):
        lay_out(disk, saved["disk.old"], journal[:size])
        seen.add(assert_sound_or_refused(disk, call))
        lay_out(disk, saved["disk.old"], journal[:size] + bytes(len(journal) - size))
        seen.add(assert_sound_or_refused(disk, call))
    assert "refused" in seen


def lay_out(disk: Path, image: bytes, journal: bytes) -> None:
    """Restore both files; the image keeps its inode."""
    image_in(disk.parent).rename(disk)
    for path in disk.parent.iterdir():
        if path != disk:
            path.unlink()
    disk.write_bytes(image)
    journal_of(disk).write_bytes(journal)


def test_another_version(disk: Path) -> None:
    killed_after("armed", disk)
    content = journal_of(disk).read_bytes()
    journal_of(disk).write_bytes(content.replace(b"journal 1\n", b"journal 2\n", 1))
    for call in (recover, undo, finish):
        with pytest.raises(UnsupportedFeatureError, match="journal of another version"):
            call(disk)


@pytest.mark.parametrize("record", RECORDS)
def test_another_file(record: str, disk: Path) -> None:
    """Only the file that the journal was written for is changed by it."""
    killed_after(record, disk)
    other = disk.with_name("other")
    shutil.copy(disk, other)
    other.replace(disk)
    before = disk.read_bytes()
    for call in (recover, undo, finish):
        with pytest.raises(TargetError, match=r"is the journal of another file: .* inode \d+"):
            call(disk)
    disk.unlink()
    with pytest.raises(TargetError, match="no file has that name"):
        recover(disk)
    disk.write_bytes(before)
    journal_of(disk).unlink()
    assert recover(disk) is None


def test_another_program_has_written(disk: Path) -> None:
    """What was written after an interruption is not overwritten."""
    killed_after("appended", disk)
    with disk.open("r+b") as file:
        file.write(b"guest")
    before = disk.read_bytes()
    for call in (recover, undo):
        with pytest.raises(ImgcoreError, match="another program has written to it since"):
            call(disk)
    assert disk.read_bytes() == before


def test_lost_tables_lead_back(disk: Path) -> None:
    """A disk that lies about syncs may have the record, but not what it relies on."""
    killed_after("armed", disk)
    with disk.open("r+b") as file:
        file.seek(len(OLD) + FRONT)
        file.write(bytes(4096))
    found = recover(disk)
    assert found is not None
    assert found.state == "old"
    assert disk.read_bytes() == OLD


def test_no_content_of_the_disk_passes_for_a_record(disk: Path) -> None:
    """A record that is cut inside its bytes ends the journal, whatever these are."""
    killed_after("begin", disk)
    content = journal_of(disk).read_bytes()
    head = json.dumps(
        {
            "kind": "undoing",
            "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        }
    ).encode()
    body = len(head).to_bytes(4, "little") + head
    for salt in (b"", bytes(16)):
        forged = len(body).to_bytes(4, "little") + crc32c(salt + body).to_bytes(4, "little") + body
        end = len(content.rstrip(b"\0"))
        journal_of(disk).write_bytes(content[:end] + forged)
        with Folder(str(disk.parent)) as folder:
            journal = Journal.open(folder, journal_of(disk).name)
            assert journal is not None
            assert list(journal.records) == ["begin"]
            journal.close()


# -- hostile journals ------------------------------------------------------------------


def forged(disk: Path, **changes: Any) -> None:
    """Write a journal with a sound frame and other content."""
    head = {
        "inode": disk.stat().st_ino,
        "size": len(OLD),
        "mtime_ns": 0,
        "name": disk.name,
        "new_name": disk.name,
        "ranges": [[0, 5]],
        "created": [],
        "removed": [],
        "job": {},
        **changes,
    }
    head = {key: value for key, value in head.items() if value is not ...}
    journal_of(disk).unlink(missing_ok=True)
    with Folder(str(disk.parent)) as folder:
        Journal.create(folder, journal_of(disk).name, "begin", head, [OLD[:5]]).close()


@pytest.mark.parametrize(
    "changes",
    [
        {"ranges": [[-1, 5]]}, {"ranges": [[0, -5]]}, {"ranges": [[0, 4]]}, {"ranges": [[0, 0]]},
        {"ranges": [[0, 1 << 80]]}, {"ranges": [[len(OLD) - 4, 5]]}, {"ranges": 7},
        {"ranges": [["a", 5]]}, {"ranges": ...}, {"size": "x"}, {"size": None}, {"job": ...},
        {"mtime_ns": []}, {"name": "../disk.old"}, {"new_name": "/etc/passwd"}, {"new_name": ".."},
        {"new_name": ""}, {"new_name": 5}, {"job": 5}, {"new_name": "a/b"}, {"name": "a\0b"},
        {"created": [["../x", 0, 0o644]]}, {"created": [["x", -1, 0o644]]},
        {"created": [["x", 9, 0o644]]}, {"removed": [["x"]]}, {"removed": {"a": 1}},
    ],
    ids=str,
)  # fmt: skip
def test_a_first_record_that_contradicts_itself(changes: dict[str, Any], disk: Path) -> None:
    forged(disk, **changes)
    for call in (recover, undo, finish):
        with pytest.raises(ImgcoreError, match="journal is damaged"):
            call(disk)
    assert disk.read_bytes() == OLD


def forge_armed(disk: Path, armed: dict[str, Any]) -> None:
    """Write a journal with two records, the second one with other content."""
    forged(disk)
    head = {
        "pieces": [],
        "cleared": [],
        "size": len(OLD),
        "tables": [],
        "tables_sha256": "",
        **armed,
    }
    head = {key: value for key, value in head.items() if value is not ...}
    with Folder(str(disk.parent)) as folder:
        journal = Journal.open(folder, journal_of(disk).name)
        assert journal is not None
        journal.append("armed", head, [b"12345"])
        journal.close()


def test_tables_past_the_end_are_not_there(disk: Path) -> None:
    forge_armed(disk, {"tables": [[len(OLD) + 5, 1 << 62]]})
    found = recover(disk)
    assert found is not None
    assert found.state == "old"
    assert disk.read_bytes() == OLD


def test_facts_that_are_not_there(disk: Path) -> None:
    """A journal without what the command needs to know is damaged, too."""
    killed_after("done", disk)
    for call in (imgcore.undo_rewrite, imgcore.finish_rewrite):
        with pytest.raises(ImgcoreError, match="journal is damaged: it lacks"):
            call(disk)


@pytest.mark.parametrize(
    "armed",
    [
        {"pieces": [[0, 5], [100, 5]]}, {"pieces": [[6, 2]]}, {"cleared": [[len(OLD), 5]]},
        {"cleared": [[3, 1 << 60]]}, {"size": -1}, {"size": "a"}, {"tables": [[0, -4]]},
        {"tables": ...}, {"size": 3},
    ],
    ids=str,
)  # fmt: skip
def test_a_second_record_that_contradicts_the_first(armed: dict[str, Any], disk: Path) -> None:
    forge_armed(disk, armed)
    with pytest.raises(ImgcoreError, match="journal is damaged"):
        recover(disk)
    assert disk.read_bytes() == OLD


def test_of_another_user(disk: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    killed_after("appended", disk)
    os.chown(journal_of(disk), 1234, 1234)
    with pytest.raises(TargetError, match="belongs to user 1234"):
        recover(disk)
    # The owner's own journal, when root recovers the image.
    os.chown(disk, 1234, 1234)
    assert recover(disk) is not None


def test_no_ordinary_file(disk: Path) -> None:
    killed_after("appended", disk)
    journal_of(disk).rename(disk.with_name("elsewhere"))
    journal_of(disk).symlink_to("elsewhere")
    with pytest.raises(TargetError, match="is no journal"):
        recover(disk)
    journal_of(disk).unlink()
    journal_of(disk).hardlink_to(disk.with_name("elsewhere"))
    with pytest.raises(TargetError, match="is no journal"):
        recover(disk)


def test_sizes_are_limited(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A length is believed only if it is in the file, and not above the limit."""
    killed_after("done", disk)
    content = bytearray(journal_of(disk).read_bytes())
    start = len(b"imgcore journal 1\n") + 16
    for length in (0xFFFFFFFF, len(content), 3, 0):
        content[start : start + 4] = length.to_bytes(4, "little")
        journal_of(disk).write_bytes(content)
        with pytest.raises(ImgcoreError, match="not whole"):
            recover(disk)
    for name, what in (("MAX_JOURNAL_BLOB_NBYTES", "would hold"), ("_MAX_BODY_NBYTES", "whole")):
        with monkeypatch.context() as patch:
            patch.setattr(record_file, name, FRONT - 1)
            journal_of(disk).unlink(missing_ok=True)
            image_in(disk.parent).write_bytes(OLD)
            image_in(disk.parent).rename(disk)
            with pytest.raises(ImgcoreError, match=what):
                Path(rewrite(disk))
                undo(disk.with_name("disk.new"))


def test_the_image_in_the_way_of_its_own_name(disk: Path) -> None:
    """The new name was taken while the conversion ran: it is complete all the same."""
    with InPlace(disk) as job:
        file = job.start({}, [(0, FRONT)], name="disk.new")
        file.pwrite(0, b"header")
        disk.with_name("disk.new").write_bytes(b"precious")
        with pytest.raises(FileExistsError, match="is converted; only names are missing"):
            job.commit()
    assert disk.read_bytes()[:6] == b"header"
    assert disk.with_name("disk.new").read_bytes() == b"precious"
    with pytest.raises(FileExistsError):
        recover(disk)
    disk.with_name("disk.new").unlink()
    found = recover(disk)
    assert found is not None
    assert found.path == str(disk.with_name("disk.new"))
