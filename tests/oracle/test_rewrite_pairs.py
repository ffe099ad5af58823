"""Images that change their format in place, judged by QEMU, VirtualBox and imgcore.

Each goes the whole way: rewritten, undone, rewritten again, written to by a guest.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Any

import pytest

import imgcore
from tests.helpers import rewrite_pairs as pairs
from tests.helpers.images import MIB, RawImage
from tests.helpers.mounts import make_file_system, mounted
from tests.helpers.rewrite_pairs import DISK, MOVED_NBYTES, ODD_DISK, PAIRS, USUAL, Pair

ALL = [pytest.param(pair, id=pair.name) for pair in PAIRS]
A_FEW = [pytest.param(pair, id=pair.name) for pair in PAIRS if pair.name in USUAL]


@pytest.fixture(scope="module")
def ext4(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("ext4")
    image = make_file_system("ext4", folder / "image", 2048 * MIB)
    with mounted(image, folder / "mounted", "-o", "loop") as top:
        yield top


@pytest.fixture
def on_ext4(ext4: Path) -> Iterator[Path]:
    """Give an empty folder on ext4."""
    folder = ext4 / "test"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def on_tmpfs() -> Iterator[Path]:
    """Give an empty folder in memory."""
    if not Path("/dev/shm").is_dir():
        pytest.skip("needs /dev/shm")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


class Case:
    """The image of a pair in a folder with nothing else, and the disk that it holds."""

    def __init__(self, pair: Pair, disk: RawImage, folder: Path, beside: Path) -> None:
        self.target = pair.target
        self.raw = beside / "disk.raw"
        disk.write(self.raw)
        self.folder = folder / "images"
        self.folder.mkdir()
        self.path = self.folder / f"disk{pair.source.suffix}"
        pair.source.make(self.raw, self.path)
        self.before = pairs.digests(self.folder)

    def rewrite(self, **more: Any) -> imgcore.RewriteResult:
        """Make it an image of the target's format; `path` is then its new name."""
        result = imgcore.rewrite(
            self.path,
            self.target.format,
            options=list(self.target.options),
            inflate=self.target.inflate,
            format="raw" if self.path.suffix == ".raw" else None,
            # Descriptor and extent take two names of this suffix.
            name="new.vmdk" if self.path.suffix == self.target.suffix else None,
            **more,
        )
        assert result.target_format == self.target.format
        self.path = Path(result.path)
        return result

    def copied_to(self, folder: Path) -> Case:
        """Return the case of a copy of the folder."""
        other = copy(self)
        other.folder, other.path = folder, folder / self.path.name
        return other

    def assert_no_journal(self) -> None:
        assert not [path for path in self.folder.iterdir() if "journal" in path.name]

    def undo(self) -> None:
        """Go back, and compare every file with what it was."""
        self.path = Path(imgcore.undo_rewrite(self.path))
        assert pairs.digests(self.folder) == self.before

    def assert_sound(self, *, leaks: bool = True) -> None:
        """Ask all judges; the old image's tables leak until the end of the journal."""
        pairs.assert_reads_as(self.raw, self.path, self.target.format, leaks=leaks)


def go_all_the_way(case: Case) -> None:
    result = case.rewrite()
    assert result.virtual_size == case.raw.stat().st_size
    assert result.bytes_moved <= MOVED_NBYTES.get(case.target.name, 2 * MIB)
    case.assert_sound()
    case.undo()
    end_at_once(case)
    case.rewrite()
    pairs.write_as_guest(case.raw, case.path, case.target.format, n_writes=1)
    written = pairs.digests(case.folder)
    with pytest.raises(imgcore.ImgcoreError, match="written"):
        imgcore.undo_rewrite(case.path)
    assert pairs.digests(case.folder) == written
    pairs.write_as_guest(case.raw, case.path, case.target.format)
    case.assert_sound()
    imgcore.finish_rewrite(case.path)
    case.assert_no_journal()
    case.assert_sound()


def end_at_once(case: Case) -> None:
    """Rewrite a copy for good: nothing in it is left of the old tables."""
    shutil.copytree(case.folder, case.folder.with_name("copy"), copy_function=pairs.copy_sparse)
    other = case.copied_to(case.folder.with_name("copy"))
    other.rewrite(keep_undo=False)
    other.assert_no_journal()
    other.assert_sound(leaks=False)
    shutil.rmtree(other.folder)


@pytest.mark.parametrize("pair", A_FEW)
def test_usual_pairs(pair: Pair, tmp_path: Path) -> None:
    go_all_the_way(Case(pair, ODD_DISK, tmp_path, tmp_path))


@pytest.mark.slow
@pytest.mark.rewriting
@pytest.mark.parametrize("pair", ALL)
def test_every_pair_on_ext4(pair: Pair, on_ext4: Path, tmp_path: Path) -> None:
    go_all_the_way(Case(pair, DISK, on_ext4, tmp_path))


@pytest.mark.slow
@pytest.mark.rewriting
@pytest.mark.parametrize("pair", ALL)
def test_every_pair_with_odd_sectors_on_tmpfs(pair: Pair, on_tmpfs: Path, tmp_path: Path) -> None:
    go_all_the_way(Case(pair, ODD_DISK, on_tmpfs, tmp_path))


def test_the_usual_pairs_exist() -> None:
    assert sorted(USUAL) == sorted(pair.name for pair in PAIRS if pair.name in USUAL)
