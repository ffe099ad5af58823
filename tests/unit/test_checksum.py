"""The verb ``checksum``: digests, lists, and trees."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard
from tests.helpers import blkhash
from tests.helpers.command import assert_one_line_error
from tests.helpers.command import imgcore as command
from tests.helpers.images import KIB, MIB, noise

import imgcore
from imgcore.cli.checksum_lists import Entry, read_list

BLOCK = blkhash.BLOCK
DISK = noise(200 * KIB) + bytes(500 * KIB) + noise(68 * KIB, 1) + bytes(256 * KIB)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(DISK)
    return path


@pytest.mark.parametrize("disk", blkhash.VECTORS, ids=len)
@pytest.mark.parametrize("threads", [1, 3])
def test_vectors(tmp_path: Path, disk: bytes, threads: int) -> None:
    """They end within a sector as well: the exact bytes count."""
    path = tmp_path / "disk.raw"
    path.write_bytes(disk)
    digest = imgcore.checksum(path, threads=threads)
    assert digest.hexdigest == blkhash.VECTORS[disk] == blkhash.digest(disk)
    assert (digest.algorithm, digest.block_size) == ("sha256", BLOCK)
    assert digest.digest.hex() == digest.hexdigest


class TestSources:
    def test_a_descriptor(self, raw: Path) -> None:
        with open(raw, "rb") as file:
            digest = imgcore.checksum(file.fileno(), format="raw")
            assert file.tell() == 0
        assert digest.hexdigest == blkhash.digest(DISK)

    def test_an_open_image(self, raw: Path) -> None:
        with imgcore.open(raw) as image:
            assert imgcore.checksum(image).hexdigest == blkhash.digest(DISK)
            assert not image.closed
            with pytest.raises(imgcore.OptionError, match="takes no options for opening"):
                imgcore.checksum(image, share=True)
        with pytest.raises(ValueError, match="is closed"):
            imgcore.checksum(image)

    def test_an_open_image_is_closed_meanwhile(self, raw: Path) -> None:
        image = imgcore.open(raw)
        digest = imgcore.checksum(image, progress=lambda _: image.close())
        assert digest.hexdigest == blkhash.digest(DISK)
        assert image.closed

    @pytest.mark.parametrize("nbytes", [0, 1, 64 * KIB, 17 * MIB + 5])
    def test_streams(self, tmp_path: Path, nbytes: int) -> None:
        disk = (DISK * 18)[:nbytes]
        packed = {"gz": gzip.compress(disk), "zst": zstandard.compress(disk)}
        for suffix, content in packed.items():
            path = tmp_path / f"disk.raw.{suffix}"
            path.write_bytes(content)
            assert imgcore.checksum(path).hexdigest == blkhash.digest(disk)

    def test_a_stream_of_an_image(self, raw: Path, tmp_path: Path) -> None:
        imgcore.convert(raw, tmp_path / "a.qcow2")
        path = tmp_path / "disk.raw.gz"
        path.write_bytes(gzip.compress((tmp_path / "a.qcow2").read_bytes()))
        tree = tmp_path / "disk.tree"
        imgcore.checksum(path, format="raw", tree=tree)
        with pytest.raises(imgcore.WrongFormatError, match="magic of qcow2"):
            imgcore.checksum(path)
        with pytest.raises(imgcore.WrongFormatError, match="magic of qcow2"):
            list(imgcore.compare_trees(tree, path))

    def test_a_chain(self, raw: Path, tmp_path: Path) -> None:
        base, child = tmp_path / "base.qcow2", tmp_path / "child.qcow2"
        imgcore.convert(raw, base)
        changed = DISK[: 300 * KIB] + noise(KIB, 5) + DISK[301 * KIB :]
        (tmp_path / "changed.raw").write_bytes(changed)
        imgcore.convert(
            tmp_path / "changed.raw", child, backing="base.qcow2", backing_format="qcow2"
        )
        assert imgcore.checksum(child).hexdigest == blkhash.digest(changed)

    def test_a_source_that_changes(self, raw: Path) -> None:
        def change(_: imgcore.Progress) -> None:
            os.utime(raw, ns=(1, 1))

        with pytest.raises(imgcore.ImgcoreError, match="changed while it was read"):
            imgcore.checksum(raw, progress=change)

    def test_progress(self, raw: Path) -> None:
        seen: list[imgcore.Progress] = []
        imgcore.checksum(raw, progress=seen.append)
        assert seen[-1].done == seen[-1].total == len(DISK)
        assert [row.done for row in seen] == sorted(row.done for row in seen)


@pytest.mark.parametrize("algorithm", ["md5", "SHA256", ""])
def test_unknown_algorithm(raw: Path, algorithm: str) -> None:
    with pytest.raises(imgcore.OptionError, match="no checksum algorithm"):
        imgcore.checksum(raw, algorithm=algorithm)
    with pytest.raises(imgcore.OptionError, match="no checksum algorithm"):
        imgcore.convert(raw, raw.with_suffix(".qcow2"), checksum=algorithm)


class TestTree:
    def test_is_written(self, raw: Path, tmp_path: Path) -> None:
        tree = tmp_path / "disk.tree"
        digest = imgcore.checksum(raw, tree=tree)
        assert tree.read_bytes() == blkhash.tree(DISK)
        assert digest.hexdigest == blkhash.digest(DISK)

    def test_of_a_sparse_disk(self, tmp_path: Path) -> None:
        """Most of its leaves come from gaps between batches."""
        raw = tmp_path / "disk.raw"
        with open(raw, "wb") as file:
            file.truncate(300 * MIB + 7)
            file.seek(200 * MIB)
            file.write(b"data")
        imgcore.checksum(raw, tree=tmp_path / "disk.tree")
        assert (tmp_path / "disk.tree").read_bytes() == blkhash.tree(raw.read_bytes())

    def test_an_existing_one_stays(self, raw: Path, tmp_path: Path) -> None:
        tree = tmp_path / "disk.tree"
        imgcore.checksum(raw, tree=tree)
        before = (tree.read_bytes(), tree.stat().st_mtime_ns, tree.stat().st_ino)
        imgcore.convert(raw, tmp_path / "disk.qcow2")
        assert imgcore.checksum(tmp_path / "disk.qcow2", tree=tree) == imgcore.checksum(raw)
        changed = bytearray(DISK)
        changed[100 * KIB] ^= 1
        changed[-1] ^= 1
        raw.write_bytes(changed)
        with pytest.raises(imgcore.ChecksumError) as raised:
            imgcore.checksum(raw, tree=tree)
        assert "2 of its blocks of 65536 bytes are not those of" in str(raised.value)
        assert "the first at 0x10000" in str(raised.value)
        assert raised.value.first_difference == 64 * KIB
        assert raised.value.found.hexdigest == blkhash.digest(bytes(changed))
        assert (tree.read_bytes(), tree.stat().st_mtime_ns, tree.stat().st_ino) == before

    def test_of_another_disk(self, raw: Path, tmp_path: Path) -> None:
        tree = tmp_path / "disk.tree"
        imgcore.checksum(raw, tree=tree)
        raw.write_bytes(DISK + b"x")
        with pytest.raises(imgcore.OptionError, match=f"of a disk of {len(DISK)} bytes"):
            imgcore.checksum(raw, tree=tree)

    @pytest.mark.parametrize("name", ["disk.raw", "link.tree", "folder"])
    def test_is_not_written_over_something_else(self, raw: Path, tmp_path: Path, name: str) -> None:
        (tmp_path / "link.tree").symlink_to("missing")
        (tmp_path / "folder").mkdir()
        with pytest.raises((imgcore.ImgcoreError, OSError)):
            imgcore.checksum(raw, tree=tmp_path / name)
        assert raw.read_bytes() == DISK
        assert not (tmp_path / "missing").exists()

    def test_another_process_is_faster(self, raw: Path, tmp_path: Path) -> None:
        tree = tmp_path / "disk.tree"
        with pytest.raises(imgcore.TargetError, match="appeared meanwhile, and is kept$"):
            imgcore.checksum(raw, tree=tree, progress=lambda _: tree.write_bytes(b"theirs"))
        assert tree.read_bytes() == b"theirs"
        assert sorted(os.listdir(tmp_path)) == ["disk.raw", "disk.tree"]

    def test_a_failure_leaves_nothing(self, raw: Path, tmp_path: Path) -> None:
        def stop(_: imgcore.Progress) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            imgcore.checksum(raw, tree=tmp_path / "disk.tree", progress=stop)
        assert sorted(os.listdir(tmp_path)) == ["disk.raw"]


class TestCompareTrees:
    def test_every_order(self, raw: Path, tmp_path: Path) -> None:
        a, b = tmp_path / "a.tree", tmp_path / "b.tree"
        imgcore.checksum(raw, tree=a)
        changed = DISK[:BLOCK] + bytes(BLOCK) + DISK[2 * BLOCK : -1] + b"x"
        raw.write_bytes(changed)
        imgcore.checksum(raw, tree=b)
        areas = [
            imgcore.Area(BLOCK, BLOCK, True),
            imgcore.Area(15 * BLOCK, BLOCK, False),
        ]
        assert list(imgcore.compare_trees(a, b)) == areas
        assert list(imgcore.compare_trees(a, raw)) == areas
        assert list(imgcore.compare_trees(raw, a)) == areas
        assert list(imgcore.compare_trees(b, raw)) == []
        back = [area._replace(is_zero=False) for area in areas]
        assert next(imgcore.compare_trees(b, a)) == back[0]

    def test_no_tree(self, raw: Path) -> None:
        with pytest.raises(imgcore.OptionError, match="is a checksum tree"):
            list(imgcore.compare_trees(raw, raw))
        with pytest.raises(FileNotFoundError):
            list(imgcore.compare_trees(raw, raw.with_name("missing")))

    def test_other_sizes(self, raw: Path, tmp_path: Path) -> None:
        a, b = tmp_path / "a.tree", tmp_path / "b.tree"
        imgcore.checksum(raw, tree=a)
        raw.write_bytes(DISK + b"x")
        imgcore.checksum(raw, tree=b)
        for other in (raw, b):
            with pytest.raises(imgcore.OptionError, match=f"of a disk of {len(DISK)} bytes"):
                list(imgcore.compare_trees(a, other))

    def test_by_the_command(self, raw: Path, tmp_path: Path) -> None:
        a = tmp_path / "a.tree"
        assert command("checksum", "--tree", a, raw).returncode == 0
        assert command("compare", "--tree", a, raw).stdout == "Disks are identical.\n"
        raw.write_bytes(b"x" * BLOCK + DISK[BLOCK:])
        done = command("compare", "--tree", "--json", raw, a)
        assert done.returncode == 1
        assert json.loads(done.stdout) == [
            {"start": 0, "length": BLOCK, "data": True, "zero": False}
        ]
        done = command("compare", "--tree", raw, a)
        assert (done.returncode, done.stderr) == (1, "")
        assert [line.split() for line in done.stdout.splitlines()][1][:2] == ["0x0", "0x10000"]
        assert_one_line_error(command("compare", "--tree", raw, raw), "checksum tree", code=2)
        usage = command("compare", "--tree", "-F", "raw", raw, a)
        assert_one_line_error(usage, "--format-b", code=2)


# ------------------------------------------------------------------------ the command


def sums(*lines: tuple[str, str]) -> str:
    return "".join(f"{digest}  {name}\n" for digest, name in lines)


class TestCommand:
    def test_prints_what_it_checks(self, raw: Path, tmp_path: Path) -> None:
        imgcore.convert(raw, tmp_path / "b.qcow2")
        done = command("checksum", "disk.raw", "b.qcow2", cwd=tmp_path)
        digest = blkhash.digest(DISK)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == sums((digest, "disk.raw"), (digest, "b.qcow2"))
        (tmp_path / "list").write_text(done.stdout)
        done = command("checksum", "--check", "list", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (0, "disk.raw: OK\nb.qcow2: OK\n")
        done = command("checksum", "-q", "--check", "list", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (0, "")

    def test_check_finds_what_is_wrong(self, raw: Path, tmp_path: Path) -> None:
        digest, other = blkhash.digest(DISK), "0" * 64
        (tmp_path / "list").write_text(
            sums((digest, "disk.raw"), (other, "disk.raw")) + "what is this?\n\n# comment\n"
        )
        done = command("checksum", "--check", "list", cwd=tmp_path)
        assert done.returncode == 1
        assert done.stdout == "disk.raw: OK\ndisk.raw: FAILED\n"
        assert done.stderr == "imgcore: warning: list: 1 line is not a checksum and a name\n"
        (tmp_path / "list").write_text(sums((other, "disk.raw"), (digest, "missing.raw")))
        done = command("checksum", "--check", "list", cwd=tmp_path)
        assert done.returncode == 2
        assert done.stdout == "disk.raw: FAILED\nmissing.raw: FAILED open or read\n"
        assert "missing.raw: No such file" in done.stderr

    @pytest.mark.parametrize("content", ["", "nothing\n", "a" * 200_000])
    def test_a_list_without_lines(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "list").write_text(content)
        done = command("checksum", "--check", "list", cwd=tmp_path)
        assert_one_line_error(done, "list: has no line with a checksum", code=2)

    @pytest.mark.parametrize("end", ["\n", "\r\n"])
    def test_a_list_with_a_mark(self, raw: Path, tmp_path: Path, end: str) -> None:
        """The first line counts, too."""
        lines = [f"{'0' * 64}  disk.raw", f"{blkhash.digest(DISK)}  disk.raw"]
        text = "".join(line + end for line in lines)
        (tmp_path / "list").write_bytes(text.encode("utf-8-sig"))
        done = command("checksum", "--check", "list", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (1, "")
        assert done.stdout == "disk.raw: FAILED\ndisk.raw: OK\n"

    def test_a_list_on_a_closed_stdin(self, tmp_path: Path) -> None:
        words = [sys.executable, "-m", "imgcore", "checksum", "--check", "-"]
        done = subprocess.run(
            ["sh", "-c", 'exec "$@" <&-', "sh", *words], capture_output=True, text=True, check=False
        )
        assert_one_line_error(done, "stdin: Bad file descriptor", code=2)

    def test_several_of_which_one_is_missing(self, raw: Path, tmp_path: Path) -> None:
        done = command("checksum", "missing.raw", "disk.raw", cwd=tmp_path)
        assert done.returncode == 2
        assert done.stdout == sums((blkhash.digest(DISK), "disk.raw"))
        assert done.stderr == "imgcore: missing.raw: No such file or directory\n"

    def test_json(self, raw: Path, tmp_path: Path) -> None:
        done = command("checksum", "--json", "missing.raw", "disk.raw", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (2, "")
        missing, good = json.loads(done.stdout)
        assert missing["status"] == "unreadable"
        assert missing["checksum"] is None
        assert "No such file" in missing["error"]
        assert good == {
            "filename": "disk.raw",
            "status": "computed",
            "checksum": {
                "algorithm": "sha256",
                "block_size": BLOCK,
                "digest": blkhash.digest(DISK),
            },
            "error": None,
        }

    def test_tree(self, raw: Path, tmp_path: Path) -> None:
        arguments = ("checksum", "--tree", "disk.tree", "disk.raw")
        done = command(*arguments, cwd=tmp_path)
        assert done.stdout == sums((blkhash.digest(DISK), "disk.raw"))
        done = command(*arguments, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (0, "disk.raw: OK\n")
        raw.write_bytes(DISK[:-1] + b"x")
        done = command(*arguments, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (1, "disk.raw: FAILED\n")
        assert done.stderr.startswith(
            "imgcore: disk.raw: 1 of its blocks of 65536 bytes is not that of"
        )
        (tmp_path / "disk.tree").write_bytes(b"IMGCTREE")
        assert_one_line_error(command(*arguments, cwd=tmp_path), "truncated", code=2)

    @pytest.mark.parametrize(
        "arguments",
        [
            [],
            ["--check", "list", "disk.raw"],
            ["--check", "list", "--tree", "a"],
            ["--tree", "a", "disk.raw", "disk.raw"],
            ["--algorithm", "md5", "disk.raw"],
        ],
    )
    def test_usage(self, raw: Path, tmp_path: Path, arguments: list[str]) -> None:
        (tmp_path / "list").write_text("")
        assert_one_line_error(command("checksum", *arguments, cwd=tmp_path), code=2)

    def test_an_option_without_its_value(self) -> None:
        done = command("checksum", "--check")
        assert_one_line_error(done, "requires an argument; try 'imgcore checksum --help'", code=2)

    def test_names_are_escaped_as_by_sha256sum(self, raw: Path, tmp_path: Path) -> None:
        names = [b"a\\b.raw", b"a\nb.raw", b"a\rb.raw", b" two  blanks.raw", b"\xff.raw", b"*a.raw"]
        for name in names:
            (tmp_path / os.fsdecode(name)).write_bytes(b"A")
        environment = {**os.environ, "LC_ALL": "C.UTF-8"}

        def run(*words: str | bytes, **kwargs: bytes) -> bytes:
            return subprocess.run(
                words, cwd=tmp_path, capture_output=True, env=environment, check=True, **kwargs
            ).stdout

        verb = (sys.executable, "-m", "imgcore", "checksum")
        ours, theirs = run(*verb, *names), run("sha256sum", *names)
        their_digest = hashlib.sha256(b"A").hexdigest().encode()
        assert theirs.replace(their_digest, blkhash.digest(b"A").encode()) == ours
        checked = run(*verb, "--check", "-", input=ours)
        assert checked.count(b": OK\n") == len(names)

    def test_progress_leaves_stdout_alone(self, raw: Path, tmp_path: Path) -> None:
        done = command("checksum", "-p", "disk.raw", cwd=tmp_path)
        assert done.stdout == sums((blkhash.digest(DISK), "disk.raw"))
        assert "100.0%" in done.stderr


class TestLists:
    DIGEST = "ab" * 32

    @pytest.mark.parametrize(
        ("line", "name"),
        [
            (b"%s  name", "name"),
            (b"%s *name", "name"),
            (b"%s   name", " name"),
            (b"\\%s  a\\nb\\\\c\\rd", "a\nb\\c\rd"),
            (b"%s  a\\nb", "a\\nb"),
            (b"%s  name\r", "name"),
            (b"%s  \xff", "\udcff"),
        ],
    )
    def test_lines(self, tmp_path: Path, line: bytes, name: str) -> None:
        for digest in (self.DIGEST, self.DIGEST.upper()):
            (tmp_path / "list").write_bytes(line % digest.encode() + b"\n")
            assert list(read_list(str(tmp_path / "list"))) == [Entry(name, self.DIGEST)]

    @pytest.mark.parametrize(
        "line",
        [
            b"%s name",
            b"%s  ",
            b"x%s  name",
            b"\\%s  a\\tb",
            b"\\%s  a\\",
            b"%s0  name",
            b"%s  na\0me",
            b"SHA256 (name) = %s",
        ],
    )
    def test_malformed(self, tmp_path: Path, line: bytes) -> None:
        (tmp_path / "list").write_bytes(line % self.DIGEST.encode() + b"\n")
        assert list(read_list(str(tmp_path / "list"))) == [None]

    def test_a_long_line_is_one_malformed_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        good = f"{self.DIGEST}  name\n".encode()
        long = f"{self.DIGEST}  ".encode() + b"x" * (1 << 20) + b"\n"
        stdin = io.TextIOWrapper(io.BytesIO(good + long + good + long[:-1]))
        monkeypatch.setattr("sys.stdin", stdin)
        entry = Entry("name", self.DIGEST)
        assert list(read_list("-")) == [entry, None, entry, None]

    def test_a_line_at_the_limit(self, tmp_path: Path) -> None:
        from imgcore.limits import MAX_CHECKSUM_LINE_NBYTES

        for more, n_good in ((0, 1), (1, 0)):
            name = "x" * (MAX_CHECKSUM_LINE_NBYTES - 67 + more)
            (tmp_path / "list").write_text(f"{self.DIGEST}  {name}\n")
            entries = list(read_list(str(tmp_path / "list")))
            assert len(entries) == 1
            assert sum(entry is not None for entry in entries) == n_good


class TestChanges:
    @pytest.mark.parametrize("granularity", [512, "64k", "1M"])
    def test_since_a_tree(self, raw: Path, tmp_path: Path, granularity: int | str) -> None:
        tree = tmp_path / "disk.tree"
        imgcore.checksum(raw, tree=tree)
        raw.write_bytes(bytes(BLOCK) + DISK[BLOCK:-1] + b"x")
        found = list(imgcore.changes(raw, tree=tree, granularity=granularity))
        if granularity == "1M":
            assert found == [imgcore.Area(0, len(DISK), False)]
        else:
            areas = [imgcore.Area(0, BLOCK, True), imgcore.Area(15 * BLOCK, BLOCK, False)]
            assert found == areas
        with imgcore.open(raw) as image:
            assert list(imgcore.changes(image, tree=tree, granularity=granularity)) == found

    def test_of_another_size(self, raw: Path, tmp_path: Path) -> None:
        tree = tmp_path / "disk.tree"
        imgcore.checksum(raw, tree=tree)
        raw.write_bytes(DISK + bytes(512))
        with pytest.raises(imgcore.OptionError, match=f"of a disk of {len(DISK)} bytes"):
            list(imgcore.changes(raw, tree=tree))

    def test_by_the_command(self, raw: Path, tmp_path: Path) -> None:
        imgcore.checksum(raw, tree=tmp_path / "disk.tree")
        words = ("diff", "--tree", "disk.tree", "disk.raw")
        assert command(*words, cwd=tmp_path).returncode == 0
        raw.write_bytes(DISK[:-1] + b"x")
        done = command(*words, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (1, "")
        assert done.stdout.split()[-3:] == ["0xf0000", "0x10000", "data"]
