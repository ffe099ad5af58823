"""Children of VHD and VHDX hold what differs from their parents, and no more."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.other_readers import assert_libvhdi_reads

import imgcore
from imgcore.errors import ImgcoreError

KIB, MIB = 1 << 10, 1 << 20
UUID = "8b2c6a52-5c0e-4c5e-9d53-0f3a1c3f9f0b"
OPTIONS: dict[str, dict[str, Any]] = {
    "vhd": {"uuid": UUID},
    "vhdx": {"virtual_disk_id": UUID, "data_write_guid": UUID, "file_write_guid": UUID},
}
SIZE = 512 * MIB + 1536
FORMATS = pytest.mark.parametrize("image_format", ["vhd", "vhdx"])


class Disks:
    """A raw disk, its image, and the same disk with changes in many places."""

    def __init__(self, folder: Path, image_format: str) -> None:
        chance = random.Random(1)
        self.format = image_format
        self.old, self.new = folder / "old.raw", folder / "new.raw"
        self.base, self.child = folder / f"base.{image_format}", folder / f"child.{image_format}"
        pieces = [(0, b"start")]
        pieces += [(chance.randrange(SIZE - MIB), chance.randbytes(MIB)) for _ in range(40)]
        changes = []
        for number in range(64):
            nbytes = chance.choice((4 * KIB, 20 * KIB, 32 * KIB))
            content = chance.randbytes(nbytes) if number % 4 else bytes(nbytes)
            changes.append((chance.randrange(0, SIZE - nbytes, 4 * KIB), content))
        # In the data of the parent, zeros hide it.
        changes += [(pieces[5][0] + 64 * KIB, bytes(128 * KIB)), (SIZE - 3, b"end")]
        self.n_changed = sum(len(content) for _, content in changes)
        for path, parts in ((self.old, pieces), (self.new, pieces + changes)):
            with path.open("wb") as file:
                file.truncate(SIZE)
                for offset, content in parts:
                    file.seek(offset)
                    file.write(content)
        imgcore.convert(self.old, self.base, options=OPTIONS[image_format], sync=False)

    def convert(self, child: Path | None = None, **keywords: Any) -> Any:
        return imgcore.convert(
            self.new,
            self.child if child is None else child,
            backing=self.base.name,
            backing_format=self.format,
            options=OPTIONS[self.format],
            sync=keywords.pop("sync", False),
            **keywords,
        )


@FORMATS
class TestChildren:
    def test_small_changes_make_a_small_file(self, tmp_path: Path, image_format: str) -> None:
        disks = Disks(tmp_path, image_format)
        result = disks.convert()
        assert imgcore.compare(disks.new, disks.child).identical
        report = imgcore.check(disks.child)
        assert (report.corruptions, report.leaks) == (0, 0), report.problems
        assert result.bytes_written <= disks.n_changed + 8 * KIB
        assert disks.child.stat().st_blocks * 512 <= 1.5 * disks.n_changed

    def test_threads_do_not_change_the_bytes(self, tmp_path: Path, image_format: str) -> None:
        disks = Disks(tmp_path, image_format)
        others = [tmp_path / f"{n}.{image_format}" for n in (1, 3)]
        for number, path in enumerate(others):
            disks.convert(path, threads=1 + 2 * number)
        assert others[0].read_bytes() == others[1].read_bytes()

    def test_checksum_and_verify(self, tmp_path: Path, image_format: str) -> None:
        disks = Disks(tmp_path, image_format)
        result = disks.convert(verify=True, sync=True)
        assert result.verified
        assert result.checksum == imgcore.checksum(disks.new)

    def test_progress_and_cancel(self, tmp_path: Path, image_format: str) -> None:
        disks = Disks(tmp_path, image_format)
        seen: list[imgcore.Progress] = []
        disks.convert(progress=seen.append)
        assert [state.done for state in seen] == sorted(state.done for state in seen)
        assert (seen[-1].done, seen[-1].total) == (SIZE, SIZE)

        def stop(_state: imgcore.Progress) -> None:
            raise KeyError("stop")

        other = tmp_path / f"other.{image_format}"
        with pytest.raises(KeyError):
            disks.convert(other, progress=stop)
        assert not other.exists()
        assert not list(tmp_path.glob(".*"))

    def test_equal_disks(self, tmp_path: Path, image_format: str) -> None:
        disks = Disks(tmp_path, image_format)
        disks.new = disks.old
        assert disks.convert().bytes_written == 0
        assert imgcore.compare(disks.old, disks.child).identical

    def test_all_zeros_stored(self, tmp_path: Path, image_format: str) -> None:
        """Then the engine stores whole blocks."""
        disks = Disks(tmp_path, image_format)
        disks.convert(sparse=0)
        assert imgcore.compare(disks.new, disks.child).identical

    def test_a_child_of_another_size(self, tmp_path: Path, image_format: str) -> None:
        disks = Disks(tmp_path, image_format)
        with disks.new.open("r+b") as file:
            file.truncate(SIZE - 64 * KIB)
        if image_format == "vhd":
            with pytest.raises(ImgcoreError, match="size of its parent"):
                disks.convert()
        else:
            disks.convert()
            assert imgcore.compare(disks.new, disks.child).identical


def test_libvhdi_reads_a_child(tmp_path: Path) -> None:
    disks = Disks(tmp_path, "vhdx")
    disks.convert()
    assert_libvhdi_reads(disks.new, disks.child, disks.base, piece_nbytes=4 * KIB)
