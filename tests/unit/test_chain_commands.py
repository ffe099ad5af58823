"""The commands commit, rebase and flatten: output, exit codes, wrong usage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.helpers.chains import chain, content_of, disks
from tests.helpers.command import assert_one_line_error
from tests.helpers.command import imgcore as imgcore_command

import imgcore


@pytest.fixture
def images(tmp_path: Path) -> tuple[Path, Path, bytes]:
    contents = disks(1, 2)
    base, top = chain(tmp_path, ("qcow2", "qcow2"), contents)
    return base, top, contents[1]


def test_commit(images: tuple[Path, Path, bytes]) -> None:
    base, top, content = images
    done = imgcore_command("commit", top)
    assert (done.returncode, done.stdout, done.stderr) == (0, "Image committed.\n", "")
    assert content_of(base) == content
    done = imgcore_command("commit", "-d", "--json", top)
    answer = json.loads(done.stdout)
    assert (answer["path"], answer["base"]) == (str(top), str(base))
    assert (answer["emptied"], answer["removed"], answer["bytes_read"]) == (False, False, 0)
    done = imgcore_command("commit", "-q", "--remove", top)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not top.exists()
    assert_one_line_error(imgcore_command("commit", base), "no backing file", code=2)
    for other in (["-d"], ["-b", base]):
        done = imgcore_command("commit", "--remove", *other, base)
        assert_one_line_error(done, "--remove contradicts -d and -b", code=2)
    assert_one_line_error(imgcore_command("commit", top), "no such file")


def test_rebase(images: tuple[Path, Path, bytes]) -> None:
    base, top, content = images
    words = ["rebase", "-b", base.name, "-F", "qcow2", top]
    done = imgcore_command(*words)
    assert (done.returncode, done.stdout, done.stderr) == (0, "Image rebased.\n", "")
    answer = json.loads(imgcore_command(*words, "--json").stdout)
    assert (answer["backing"], answer["backing_format"]) == (base.name, "qcow2")
    done = imgcore_command("rebase", "-b", base.name, top)
    assert_one_line_error(done, "state it with -F", code=2)
    assert imgcore_command("rebase", top).returncode == 2
    done = imgcore_command("rebase", "-q", "-b", "", top)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    base.unlink()
    assert content_of(top) == content


def test_flatten(images: tuple[Path, Path, bytes]) -> None:
    base, top, content = images
    done = imgcore_command("flatten", "-p", "--progress=json", top)
    assert (done.returncode, done.stdout) == (0, "Image flattened.\n")
    assert json.loads(done.stderr.splitlines()[-1])["percent"] == 100
    base.unlink()
    assert content_of(top) == content
    answer = json.loads(imgcore_command("flatten", "--json", top).stdout)
    assert (answer["format"], answer["bytes_written"]) == ("qcow2", 0)


def test_progress_ends_with_all(images: tuple[Path, Path, bytes]) -> None:
    _, top, content = images
    for verb in (imgcore.commit, imgcore.flatten):
        reports: list[imgcore.Progress] = []
        verb(top, progress=reports.append)
        assert [one.done for one in reports] == sorted(one.done for one in reports)
        assert reports[-1].done == reports[-1].total == len(content)


def test_a_callback_that_raises(images: tuple[Path, Path, bytes]) -> None:
    base, top, content = images

    def refuse(_: imgcore.Progress) -> None:
        raise KeyError("enough")

    for verb in (imgcore.commit, imgcore.flatten):
        with pytest.raises(KeyError, match="enough"):
            verb(top, progress=refuse)
        assert content_of(top) == content
    with pytest.raises(KeyError, match="enough"):
        imgcore.rebase(top, backing=base.name, backing_format="qcow2", progress=refuse)
    assert content_of(top) == content
