"""The examples in the documents run, and print the output that the documents show.

A block runs in a folder with the files that it reads.  Shell and console blocks run
line by line, without a shell; Python blocks run as a whole.
"""

from __future__ import annotations

import ast
import doctest
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import imgcore
from tests.docs.documents import DOCUMENTS, ROOT
from tests.helpers.command import imgcore as run_imgcore

KIB = 1024
MIB = 1024 * KIB

# Commands that are not run, by their start, and the reason.
NOT_RUN = {
    "apt-get install": "changes the system",
    "pip install": "changes the environment, and builds the extension",
    "make": "builds or tests the whole project",
    "pytest": "runs tests inside a test",
    "python -m tests.hostile.peer": "takes minutes",
    ".venv/bin/python -m pytest": "measures for minutes",
    ".venv/bin/python -m benchmarks": "measures for minutes",
}

# Words of examples that change the files that they name.
CHANGING = re.compile(
    r"imgcore[ .](rewrite|sync|commit|rebase|flatten|resize|snapshot|apply)|_snapshot|\"r\+"
)

# Files that examples read, and the options for creating them from disk.raw.
INPUTS: dict[str, dict[str, Any]] = {
    "disk.raw": {},
    "old.raw": {},
    "disk.qcow2": {},
    "base.qcow2": {},
    "copy.qcow2": {},
    "disk.vhdx": {"options": {"block_size": "1M"}},
    "base.vhd": {},
    "base.vhdx": {},
    "base.vdi": {},
    "disk.vmdk": {"options": {"subformat": "streamOptimized"}},
}


SITE = "https://example.org/"
PACKED = re.compile(r"\.(zst|gz|xz)$")


class Block(NamedTuple):
    """A fenced block of code."""

    document: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


class Command(NamedTuple):
    """A line of a shell or console block, and the output below it."""

    text: str
    output: str | None

    @property
    def why_not(self) -> str | None:
        """Return the reason why the command is not run, if there is one."""
        return next((why for start, why in NOT_RUN.items() if self.starts_with(start)), None)

    def starts_with(self, start: str) -> bool:
        return f"{self.text} ".startswith((f"{start} ", f"{start}."))

    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)

    def inputs(self) -> Iterator[str]:
        """Yield the files that the command reads; ``convert`` has its target last."""
        words = self.words()
        if "|" in words:
            words = words[: words.index("|")]
        if "convert" in words:
            words.pop()
        # What is downloaded is made from a file of the same name.
        names = (PACKED.sub("", word.removeprefix(SITE)) for word in words)
        yield from (name for name in names if name in INPUTS)


def blocks(*languages: str) -> list[Block]:
    """Return the blocks of all documents in these languages."""
    fence = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
    found = []
    for document in DOCUMENTS:
        content = (ROOT / document).read_text()
        for match in fence.finditer(content):
            line = content.count("\n", 0, match.start()) + 1
            text = textwrap.dedent(match[3])
            found.append(Block(document, line, match[2], text))
    return [block for block in found if block.language in languages]


def commands(block: Block) -> list[Command]:
    """Return the commands of a block, those of a console block with their output."""
    text = block.text.replace("\\\n", " ")
    if block.language == "sh":
        lines = (line.strip() for line in text.splitlines())
        return [Command(line, None) for line in lines if line and not line.startswith("#")]
    parts = re.split(r"^\$ ", text, flags=re.MULTILINE)
    assert parts[0] == "", f"{block}: a console block starts with a command"
    pairs = (part.partition("\n") for part in parts[1:])
    return [Command(command, output) for command, _, output in pairs]


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function for the path of an input, which is created once."""
    folder = tmp_path_factory.mktemp("inputs")
    raw = folder / "disk.raw"
    with raw.open("wb") as file:
        file.truncate(24 * MIB)
        for start in (0, 8 * MIB):  # text, which compresses
            file.seek(start)
            file.write(b"".join(b"%d bottles of beer\n" % i for i in range(60000))[:MIB])
    # The disk at an earlier time.
    old = folder / "old.raw"
    shutil.copyfile(raw, old)
    with old.open("r+b") as file:
        for start in (64 * KIB, 2 * MIB):
            file.seek(start)
            file.write(b"Take one down, pass it around")

    def get(name: str) -> Path:
        path = folder / name
        if not path.exists():
            imgcore.convert(raw, path, sync=False, **INPUTS[name])
        return path

    return get


@pytest.mark.parametrize("block", blocks("sh", "console"), ids=str)
def test_shell(block: Block, tmp_path: Path, image: Callable[[str], Path]) -> None:
    reasons = []
    for command in commands(block):
        if command.why_not is not None:
            reasons.append(command.why_not)
            continue
        for name in command.inputs():
            if not (tmp_path / name).exists():
                # A file with two names is not rewritten.
                put = shutil.copyfile if CHANGING.search(block.text) else os.link
                put(image(name), tmp_path / name)
        if "|" in command.words():
            run_pipeline(command, tmp_path)
            continue
        program, *arguments = command.words()
        assert program == "imgcore", f"{block}: {command.text}"
        done = run_imgcore(*arguments, cwd=tmp_path)
        codes = (0, 1) if "diff" in arguments[:1] else (0,)
        assert done.returncode in codes, f"{block}: {command.text}\n{done.stdout}{done.stderr}"
        if command.output is not None:
            assert_output(command, done.stdout)
    if reasons and len(reasons) == len(commands(block)):
        pytest.skip(", ".join(dict.fromkeys(reasons)))


# Programs of pipelines that take the place of others: what they do here.
STAND_INS = {
    "imgcore": f'exec "{sys.executable}" -m imgcore "$@"',
    "curl": """for name; do :; done; name=${name##*/}; case "$name" in
*.zst) exec zstd -qc "${name%.zst}";; *.xz) exec xz -0c "${name%.xz}";; *) exec cat "$name";;
esac""",
    # On the other host, devices are files.
    "ssh": """shift; exec sh -c "$(echo "$*" | sed 's,/dev/,,')" """,
}


def run_pipeline(command: Command, folder: Path) -> None:
    """Run a pipeline in a shell; each of its programs must succeed."""
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    for name, text in STAND_INS.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command.text],
        cwd=folder,
        env=os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, f"{command.text}\n{done.stdout}{done.stderr}"


def assert_output(command: Command, got: str) -> None:
    """Compare with the document's output, in which ``...`` matches anything."""
    assert command.output is not None
    same = doctest.OutputChecker().check_output(command.output, got, doctest.ELLIPSIS)
    assert same, f"{command.text}\n-- the document says\n{command.output}-- printed\n{got}"


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python(
    block: Block,
    tmp_path: Path,
    image: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in python_inputs(block.text):
        put = shutil.copyfile if CHANGING.search(block.text) else os.link
        put(image(name), tmp_path / name)
    exec(compile(block.text, str(block), "exec"), {"__name__": "example"})


def python_inputs(text: str) -> set[str]:
    """Return the files that Python code names, but not targets of conversions."""
    tree = ast.parse(text)
    constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    targets = {
        ast.literal_eval(node.args[1])
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "imgcore.convert"
        and isinstance(node.args[1], ast.Constant)
    }
    return {value for value in constants if isinstance(value, str) and value in INPUTS} - targets


def test_what_is_not_run_exists() -> None:
    """The examples need every row of the tables of exceptions and inputs."""
    all_commands = [command for block in blocks("sh", "console") for command in commands(block)]
    unused = [start for start in NOT_RUN if not any(c.starts_with(start) for c in all_commands)]
    assert unused == []
    named = {name for command in all_commands for name in command.inputs()}
    named |= {name for block in blocks("python") for name in python_inputs(block.text)}
    assert sorted(set(INPUTS) - named) == []


def test_blocks_name_their_language() -> None:
    """The language of a block decides whether it is run."""
    known = {"sh", "console", "python", "json", "text"}
    for document in DOCUMENTS:
        fences = re.findall(r"^ *```(.*)$", (ROOT / document).read_text(), re.MULTILINE)
        assert set(fences[::2]) <= known, document
        assert set(fences[1::2]) <= {""}, document
