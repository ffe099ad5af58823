"""Whether two files can have blocks in common is found out without changing them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers.mounts import make_file_system, mounted

from imgcore.files.host_file import HostFile
from imgcore.files.reflinks import takes_reflinks
from imgcore.files.update_file import UpdateFile


@pytest.mark.parametrize(("kind", "expected"), [("xfs", True), ("btrfs", True), ("ext4", False)])
@pytest.mark.parametrize("nbytes", [0, 1, 4096, 100_000])
def test_a_file_system(kind: str, expected: bool, nbytes: int, tmp_path: Path) -> None:
    image = make_file_system(kind, tmp_path / "image", 512 << 20)
    with mounted(image, tmp_path / "mounted", "-o", "loop") as top:
        one, other = top / "one", top / "other"
        one.write_bytes(b"1" * nbytes)
        other.write_bytes(b"2" * nbytes)
        with HostFile.open(one) as source, UpdateFile.open(other) as target:
            assert takes_reflinks(source, target) is expected
            assert target.takes_copies_of(source) is expected
        assert one.read_bytes() == b"1" * nbytes
        assert other.read_bytes() == b"2" * nbytes


def test_another_file_system(tmp_path: Path) -> None:
    image = make_file_system("xfs", tmp_path / "image", 512 << 20)
    one = tmp_path / "one"
    one.write_bytes(bytes(4096))
    with mounted(image, tmp_path / "mounted", "-o", "loop") as top:
        other = top / "other"
        other.write_bytes(bytes(4096))
        with HostFile.open(one) as source, UpdateFile.open(other) as target:
            assert not takes_reflinks(source, target)
