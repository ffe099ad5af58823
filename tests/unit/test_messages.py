"""Messages: one bounded line, only by the logger ``imgcore``, without secrets."""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.helpers import qemu, vhd
from tests.helpers.command import assert_one_line_error
from tests.helpers.command import imgcore as imgcore_command

import imgcore
from imgcore.formats.api import BackingReference
from imgcore.formats.registry import DRIVERS
from imgcore.log import log
from imgcore.text import HIDDEN, MAX_TEXT_CHARS, one_line, without_secrets

PACKAGE = Path(imgcore.__file__).parent
HOSTILE = "a\nimgcore: error: \x1b[2J\r\x07\u202e\u2028\x9b31m"
LEVELS = ("debug", "info", "warning", "error", "critical", "exception", "log")
# Each character may become an escape of ten.
LONGEST_CHARS = 10 * MAX_TEXT_CHARS


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def is_harmless(text: str) -> bool:
    return text.isprintable() and len(text) <= LONGEST_CHARS


# ------------------------------------------------------------------------ by the source


def test_no_module_prints() -> None:
    """Only the command prints; the library logs and raises.

    Dropped owners of descriptors cause a ResourceWarning, as Python's own files do.
    """
    may_warn = PACKAGE / "files" / "closable.py"
    for path in modules():
        if path.parent.name == "cli":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                where = f"{path}:{node.lineno}"
                assert node.func.id not in ("print", "breakpoint"), where
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                name, where = f"{node.value.id}.{node.attr}", f"{path}:{node.lineno}"
                assert name not in ("sys.stdout", "sys.stderr"), where
                assert name != "warnings.warn" or path == may_warn, where


def test_no_message_is_called_internal() -> None:
    """A line is about the user's files, or asks for a report of a defect."""
    for path in modules():
        tree = ast.parse(path.read_text())
        texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in texts:
            if isinstance(node.value, str) and id(node) not in bare:
                text = node.value.lower().replace("internal snapshots", "")
                assert "internal" not in text, f"{path}:{node.lineno}"


def test_there_is_one_logger() -> None:
    for path in modules():
        if path.name == "log.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import) and path.parent.name != "cli":
                assert "logging" not in [alias.name for alias in node.names], path
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "logging.getLogger":
                assert [ast.unparse(argument) for argument in node.args] == ["'imgcore'"], path


def test_messages_are_templates() -> None:
    """Values reach the logger's filter as arguments, not as part of the text."""
    for path in modules():
        if path.name == "log.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and ast.unparse(node.func.value) == "log"
                and node.func.attr in LEVELS
            ):
                assert isinstance(node.args[0], ast.Constant), f"{path}:{node.lineno}"


# ----------------------------------------------------------------------------- one line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain ünïcödé 磁盘.vhd", "plain ünïcödé 磁盘.vhd"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x1b[31m\x9b\x00", r"\x1b[31m\x9b\x00"),
        ("\u2028\u202e\udc80", r"\u2028\u202e\udc80"),
    ],
)
def test_escapes(text: str, expected: str) -> None:
    assert one_line(text) == expected


def test_long_texts_lose_their_middle() -> None:
    text = one_line("a" * 100_000 + "end")
    assert len(text) == MAX_TEXT_CHARS
    assert text.startswith("aaa")
    assert text.endswith("end")
    assert " ... " in text
    assert one_line("b" * MAX_TEXT_CHARS) == "b" * MAX_TEXT_CHARS
    assert len(one_line("\x00" * 100_000)) <= LONGEST_CHARS


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://user:hunter2@host/disk.vhd", f"https://{HIDDEN}@host/disk.vhd"),
        ("ssh://hunter2@host/disk", f"ssh://{HIDDEN}@host/disk"),
        ("https://u:hunt@er2@host/disk", f"https://{HIDDEN}@host/disk"),
        ("https://host/d?sv=1&sig=hunter2&se=2", f"https://host/d?sv=1&sig={HIDDEN}&se=2"),
        ("X-Amz-Signature=hunter2&a=b", f"X-Amz-Signature={HIDDEN}&a=b"),
        ('json:{"password": "hunter2", "a": 1}', f'json:{{"password": "{HIDDEN}", "a": 1}}'),
        ("json:{'token':'hunter2'}", f"json:{{'token':'{HIDDEN}'}}"),
        ("rbd:pool/disk:id=me:key=hunter2==:conf=x", f"rbd:pool/disk:id=me:key={HIDDEN}"),
        ("https://host/d?apikey=hunter2&a=b", f"https://host/d?apikey={HIDDEN}&a=b"),
        ('json:{"file.cookie": "hunter2"}', f'json:{{"file.cookie": "{HIDDEN}"}}'),
        ("someone@example.vhd", "someone@example.vhd"),
        ("donkey.vhd", "donkey.vhd"),
        ("signature 0x12", "signature 0x12"),
    ],
)
def test_secrets_are_hidden(text: str, expected: str) -> None:
    assert without_secrets(text) == expected
    assert one_line(text) == expected


# ----------------------------------------------------------------------------- messages


@pytest.fixture
def log_lines() -> Iterator[io.StringIO]:
    """Collect the output of a plain handler."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(name)s %(message)s"))
    logging.getLogger("imgcore").addHandler(handler)
    yield stream
    logging.getLogger("imgcore").removeHandler(handler)


def test_log_of_an_image_with_a_hostile_name(tmp_path: Path, log_lines: io.StringIO) -> None:
    path = tmp_path / f"{HOSTILE}.vhd"
    vhd.dynamic(path, 1 << 20, {})
    raw = bytearray(path.read_bytes())
    raw[16] ^= 1
    path.write_bytes(raw)
    assert imgcore.info(path)["virtual-size"] == 1 << 20
    (line,) = log_lines.getvalue().splitlines()
    assert line.startswith("imgcore ")
    assert is_harmless(line)


def test_log_arguments_are_cleaned(log_lines: io.StringIO) -> None:
    log.warning("%s has %d of %#x: %s", HOSTILE, 5, 255, OSError("https://u:hunter2@h/" + HOSTILE))
    (line,) = log_lines.getvalue().splitlines()
    assert is_harmless(line)
    assert "has 5 of 0xff" in line
    assert "hunter2" not in line


def test_errors_with_hostile_names(tmp_path: Path) -> None:
    path = tmp_path / f"{HOSTILE}.vhdx"
    path.write_bytes(b"vhdxfile" + bytes(400_000))
    with pytest.raises(imgcore.CorruptImageError) as caught:
        imgcore.info(path)
    assert is_harmless(str(caught.value))
    assert caught.value.path == str(path)
    assert str(caught.value).endswith(caught.value.reason)
    assert_one_line_error(imgcore_command("info", path), "header 1")


def test_an_error_of_any_length(tmp_path: Path) -> None:
    error = imgcore.CorruptImageError("x" * 10**6 + "\n", path="y\n" * 10**6)
    assert is_harmless(str(error))


def test_info_has_no_control_characters_but_in_json(tmp_path: Path) -> None:
    path, base = tmp_path / "child.qcow2", tmp_path / f"{HOSTILE}.qcow2"
    imgcore.create(base, 1 << 20, sync=False)
    imgcore.create(path, backing=f"./{base.name}", backing_format="qcow2", sync=False)
    done = imgcore_command("info", path)
    assert done.returncode == 0, done.stderr
    assert all(line.isprintable() for line in done.stdout.splitlines())
    done = imgcore_command("info", "--json", path)
    assert json.loads(done.stdout)["backing-filename"] == f"./{base.name}"


# ------------------------------------------------------------------ content and secrets

CANARY = b"SQUEAMISH"


def _forms_of(canary: bytes) -> Iterator[str]:
    for start in range(len(canary) - 3):
        piece = canary[start : start + 4]
        yield piece.decode()
        yield piece.hex()
        yield piece[::-1].hex()


@pytest.mark.parametrize("name", [driver.name for driver in DRIVERS if driver.name != "raw"])
def test_a_file_of_another_kind_is_refused_without_its_content(name: str, tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(CANARY * 40_000)
    with pytest.raises(imgcore.ImgcoreError) as caught:
        imgcore.open(path, format=name)
    told = "".join(traceback.format_exception(caught.value))
    for form in _forms_of(CANARY):
        assert form not in told


def test_a_backing_file_with_credentials(tmp_path: Path) -> None:
    """The name is rejected, and shown without its credentials."""
    name = "https://user:hunter2@host/base.qcow2?sig=hunter2"
    path = tmp_path / "child.qcow2"
    qemu.run("create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "qcow2", path, "1M")
    with pytest.raises(imgcore.ImgcoreError) as caught:
        imgcore.open(path)
    told = "".join(traceback.format_exception(caught.value))
    assert "hunter2" not in told
    assert f"https://{HIDDEN}@host/base.qcow2" in told
    for words in (
        ("info", "--json"),
        ("check", "--json"),
        ("lint", "--json", "--profile=openstack"),
        ("lint", "--json", "--profile=hyperv"),
    ):
        done = imgcore_command(*words, path)
        assert json.loads(done.stdout)["format"] == "qcow2"
        assert "hunter2" not in done.stdout + done.stderr
    for finding in imgcore.lint(path, profile="openstack").findings:
        assert "hunter2" not in repr(finding)
    assert "hunter2" not in repr(BackingReference(name, "qcow2", other_names=(name,)))


def test_a_library_that_only_reads_prints_nothing(tmp_path: Path) -> None:
    """Without a handler, Python prints the warnings, and nothing else is printed."""
    path = tmp_path / "disk.vhd"
    vhd.dynamic(path, 1 << 20, {})
    code = "import imgcore, sys; imgcore.info(sys.argv[1]); imgcore.check(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ),
    )
    assert (done.stdout, done.stderr) == ("", "")
