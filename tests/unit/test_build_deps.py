"""How tools/build_deps.sh downloads by curl: what is pinned, after failures again.

The script runs as it is, but for its list of sources and how they are built.
"""

from __future__ import annotations

import hashlib
import http.server
import io
import os
import re
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

SCRIPT = Path(__file__).parents[2] / "tools/build_deps.sh"
FILE = "libfake_1.0+dfsg.orig.tar.gz"
# What the script calls; apt-get is not among them.
PROGRAMS = ["bash", "cat", "cp", "curl", "gzip", "mkdir", "mktemp", "mv", "nproc", "rm"]
PROGRAMS += ["sed", "sha256sum", "sleep", "tail", "tar"]

Answer = Callable[[bytes], tuple[int, dict[str, str], bytes]]


class Mirror(NamedTuple):
    url: str
    asked: list[str]
    answers: list[Answer]


def whole(content: bytes) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Length": str(len(content))}, content


def cut(content: bytes) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Length": str(len(content))}, content[: len(content) // 2]


def cut_without_a_length(content: bytes) -> tuple[int, dict[str, str], bytes]:
    return 200, {}, content[: len(content) // 2]


def other(content: bytes) -> tuple[int, dict[str, str], bytes]:
    return whole(content[:-1] + b"?")


def missing(_: bytes) -> tuple[int, dict[str, str], bytes]:
    return 404, {"Content-Length": "9"}, b"not found"


def busy(_: bytes) -> tuple[int, dict[str, str], bytes]:
    return 503, {"Content-Length": "4"}, b"busy"


@pytest.fixture
def tarball() -> bytes:
    text = b"int fake;\n"
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        member = tarfile.TarInfo("libfake-1.0/fake.h")
        member.size = len(text)
        archive.addfile(member, io.BytesIO(text))
    return packed.getvalue()


@pytest.fixture
def mirror(tarball: bytes) -> Iterator[Mirror]:
    """Serve the tarball on the loopback device, by one answer after another."""
    asked: list[str] = []
    answers: list[Answer] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            code, headers, body = answer(tarball)
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Mirror(f"http://127.0.0.1:{server.server_port}/debian", asked, answers)
        server.shutdown()
        thread.join()


class Deps(NamedTuple):
    folder: Path

    @property
    def cached(self) -> Path:
        return self.folder / "cache" / FILE

    @property
    def built(self) -> Path:
        return self.folder / "prefix/include/fake.h"

    def run(self, mirror: str | None) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": str(self.folder / "bin"),
            "HOME": str(self.folder),
            "IMGCORE_DEPS_CACHE": str(self.folder / "cache"),
        }
        if mirror is not None:
            environment["IMGCORE_DEBIAN_MIRROR"] = mirror
        return subprocess.run(
            ["bash", self.folder / "build_deps.sh", self.folder / "prefix"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )


@pytest.fixture
def deps(tmp_path: Path, tarball: bytes) -> Deps:
    (tmp_path / "bin").mkdir()
    for name in PROGRAMS:
        program = shutil.which(name)
        if program is None:
            pytest.skip(f"there is no {name}")
        (tmp_path / "bin" / name).symlink_to(program)
    # Waiting is not what is tested.
    (tmp_path / "bin/sleep").unlink()
    (tmp_path / "bin/sleep").write_text("#!/bin/sh\n")
    os.chmod(tmp_path / "bin/sleep", 0o755)
    digest = hashlib.sha256(tarball).hexdigest()
    script, n = re.subn(
        r"^sources=\(\n.*?^\)$",
        f'sources=(\n  "libfake {FILE} {digest}"\n)\n'
        'build_libfake() { cp fake.h "$prefix/include/"; }',
        SCRIPT.read_text(),
        flags=re.MULTILINE | re.DOTALL,
    )
    assert n == 1
    (tmp_path / "build_deps.sh").write_text(script)
    return Deps(tmp_path)


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_source_comes_from_the_mirror(
    slash: str, deps: Deps, mirror: Mirror, tarball: bytes
) -> None:
    mirror.answers.append(whole)
    done = deps.run(mirror.url + slash)
    assert (done.returncode, done.stderr) == (0, "")
    assert mirror.asked == [f"/debian/pool/main/libf/libfake/{FILE}"]
    assert deps.cached.read_bytes() == tarball
    assert deps.built.exists()
    assert [path.name for path in deps.cached.parent.iterdir()] == [FILE]
    # What is built is not built again, and what is in the cache not loaded again.
    assert deps.run(None).returncode == 0
    shutil.rmtree(deps.folder / "prefix")
    assert deps.run(None).returncode == 0
    assert deps.built.exists()
    assert len(mirror.asked) == 1


@pytest.mark.parametrize("first", [cut, cut_without_a_length, other, busy, missing])
def test_a_failed_transfer_is_tried_again(
    first: Answer, deps: Deps, mirror: Mirror, tarball: bytes
) -> None:
    mirror.answers.extend([first, first, whole])
    done = deps.run(mirror.url)
    assert done.returncode == 0
    assert len(mirror.asked) == 3
    assert deps.cached.read_bytes() == tarball
    assert deps.built.exists()


@pytest.mark.parametrize("answer", [cut, cut_without_a_length, other, busy, missing])
def test_what_is_not_the_pinned_file_is_neither_kept_nor_built(
    answer: Answer, deps: Deps, mirror: Mirror
) -> None:
    old = deps.folder / "prefix/lib/libold.a"
    old.parent.mkdir(parents=True)
    old.touch()
    mirror.answers.append(answer)
    done = deps.run(mirror.url)
    assert done.returncode == 1
    assert len(mirror.asked) == 3
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"build_deps: {FILE} with SHA-256 ")
    assert "is not available: put it into" in last
    assert list(deps.cached.parent.iterdir()) == []
    # What was built before is still there.
    assert old.exists()


def test_a_mirror_that_does_not_answer(deps: Deps, mirror: Mirror) -> None:
    done = deps.run("http://127.0.0.1:9/debian")
    assert done.returncode == 1
    assert "IMGCORE_DEBIAN_MIRROR" in done.stderr.splitlines()[-1]


def test_the_advice_to_put_it_into_the_cache(deps: Deps, tarball: bytes) -> None:
    done = deps.run(None)
    assert done.returncode == 1
    assert f"put it into {deps.cached.parent}" in done.stderr
    deps.cached.write_bytes(tarball[:-1])
    assert deps.run(None).returncode == 1
    deps.cached.write_bytes(tarball)
    assert deps.run(None).returncode == 0
    assert deps.built.exists()
