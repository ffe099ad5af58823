"""Every flag of qemu-img 7.2 to 11: taken, without effect, or refused with a reason."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest
from tests.helpers import qemu

import imgcore
from imgcore.cli import main as cli
from imgcore.cli import progress

MIB = 1 << 20

# For each verb: flags with one meaning, and the rest of a command line in which each of
# them works.  {} stands for the flag.
TAKEN: Final = {
    "convert": {
        "-f --source-format": "{} raw d.raw o.qcow2",
        "-T --source-cache": "{} none d.raw o.qcow2",
        "--salvage": "{} d.raw o.qcow2",
        "-O --target-format": "{} qcow2 d.raw o.qcow2",
        "-o --target-format-options": "{} cluster_size=4k d.raw o.qcow2",
        "-t --target-cache": "{} writeback d.raw o.qcow2",
        "-B -b --backing": "{} base.qcow2 -F qcow2 d.raw o.qcow2",
        "-F --backing-format": "{} qcow2 -B base.qcow2 d.raw o.qcow2",
        "-S --sparse-size": "{} 64k d.raw o.qcow2",
        "-n --no-create": "{} d.raw there.raw",
        "--target-is-zero": "{} -n d.raw there.raw",
        "-c --compress": "{} d.raw o.qcow2",
        "-U --force-share": "{} d.raw o.qcow2",
        "-r --rate-limit": "{} 100M d.raw o.qcow2",
        "-m --parallel": "{} 2 d.raw o.qcow2",
        "-C --copy-range-offloading": "{} d.raw o.qcow2",
        "-W --oob-writes": "{} d.raw o.qcow2",
        "-p --progress": "{} d.raw o.qcow2",
        "-q --quiet": "{} d.raw o.qcow2",
    },
    "info": {
        "-f --format": "{} raw d.raw",
        "--backing-chain": "{} child.qcow2",
        "-t --cache": "{} none d.raw",
        "-U --force-share": "{} d.raw",
        "--output": "{} json d.raw",
    },
    "create": {
        "-f --format": "{} qcow2 o.qcow2 1M",
        "-o --options": "{} cluster_size=4k o.qcow2 1M",
        "-b --backing": "{} base.qcow2 -F qcow2 o.qcow2",
        "-B -F --backing-format": "{} qcow2 -b base.qcow2 o.qcow2",
        "-q --quiet": "{} o.qcow2 1M",
    },
    "snapshot": {
        "-f --format": "{} qcow2 kept.qcow2",
        "-l --list": "{} kept.qcow2",
        "-c --create": "{} s1 kept.qcow2",
        "-a --apply": "{} before kept.qcow2",
        "-d --delete": "{} before kept.qcow2",
        "-U --force-share": "{} -l kept.qcow2",
        "-q --quiet": "{} -c s1 kept.qcow2",
    },
    "check": {
        "-f --format": "{} qcow2 base.qcow2",
        "-T --cache": "{} directsync base.qcow2",
        "-r --repair": "{} all base.qcow2",
        "-U --force-share": "{} base.qcow2",
        "--output": "{} json base.qcow2",
        "-q --quiet": "{} base.qcow2",
    },
    "compare": {
        "-f --a-format": "{} raw d.raw d.raw",
        "-F --b-format": "{} raw d.raw d.raw",
        "-s --strict": "{} d.raw d.raw",
        "-T --cache": "{} unsafe d.raw d.raw",
        "-U --force-share": "{} d.raw d.raw",
        "-p --progress": "{} d.raw d.raw",
        "-q --quiet": "{} d.raw d.raw",
    },
    "map": {
        "-f --format": "{} raw d.raw",
        "-s --start-offset": "{} 512 d.raw",
        "-l --max-length": "{} 1M d.raw",
        "--output": "{} json d.raw",
        "-U --force-share": "{} d.raw",
    },
    "measure": {
        "-f --format": "{} raw d.raw",
        "-O --target-format": "{} qcow2 d.raw",
        "-o": "{} cluster_size=4k -O qcow2 d.raw",
        "--output": "{} json d.raw",
        "-U --force-share": "{} d.raw",
        "-s --size": "{} 1M",
    },
}

TAKEN["commit"] = {
    "-f --format": "{} qcow2 child.qcow2",
    "-t --cache": "{} none child.qcow2",
    "-b --base": "{} base.qcow2 child.qcow2",
    "-d --drop": "{} child.qcow2",
    "-r --rate-limit": "{} 100M child.qcow2",
    "-p --progress": "{} child.qcow2",
    "-q --quiet": "{} child.qcow2",
}
TAKEN["rebase"] = {
    "-f --format": "{} qcow2 -b base.qcow2 -F qcow2 child.qcow2",
    "-t --cache": "{} none -b base.qcow2 -F qcow2 child.qcow2",
    "-T --backing-cache": "{} none -b base.qcow2 -F qcow2 child.qcow2",
    "-b --backing": "{} base.qcow2 -F qcow2 child.qcow2",
    "-B -F --backing-format": "{} qcow2 -b base.qcow2 child.qcow2",
    "-u --backing-unsafe": "{} -b base.qcow2 -F qcow2 child.qcow2",
    "-p --progress": "{} -b base.qcow2 -F qcow2 child.qcow2",
    "-q --quiet": "{} -b base.qcow2 -F qcow2 child.qcow2",
}
TAKEN["resize"] = {
    "-f --format": "{} raw d.raw 2M",
    "--shrink": "{} d.raw 512k",
    "-q --quiet": "{} d.raw +1M",
}

# Flags that are refused, with a word of the reason.
REFUSED: Final = {
    "convert": {
        "--image-opts": "-f",
        "--target-image-opts": "-O",
        "--object": "objects of QEMU",
        "-l --snapshot": "snapshots",
        "--bitmaps --skip-broken-bitmaps": "without this flag",
    },
    "info": {"--image-opts": "-f", "--object": "objects", "--limits": "leave it out"},
    "create": {"--object": "objects", "-u --backing-unsafe": "make the backing file first"},
    "commit": {"--image-opts": "-f", "--object": "objects"},
    "rebase": {
        "--image-opts": "-f",
        "--object": "objects",
        "-c --compress": "leave it out",
        "-U --force-share": "leave it out",
    },
    "snapshot": {"--image-opts": "-f", "--object": "objects"},
    "resize": {
        "--image-opts": "-f",
        "--object": "objects",
        "--preallocation": "leave it out",
    },
    "check": {"--image-opts": "-f", "--object": "objects"},
    "compare": {"--image-opts": "-f", "--object": "objects"},
    "map": {"--image-opts": "-f", "--object": "objects"},
    "measure": {"--image-opts": "-f", "--object": "objects", "-l --snapshot": "snapshots"},
}

Run = Callable[[str], SimpleNamespace]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run command lines in a folder with the images that they name."""
    monkeypatch.chdir(tmp_path)
    Path("d.raw").write_bytes(b"x" * 70000 + bytes(MIB - 70000))
    Path("there.raw").write_bytes(bytes(MIB))
    imgcore.create("base.qcow2", MIB, sync=False)
    imgcore.create("kept.qcow2", MIB, sync=False)
    imgcore.create_snapshot("kept.qcow2", "before")
    imgcore.create("child.qcow2", backing="base.qcow2", backing_format="qcow2", sync=False)
    capsys.readouterr()

    def call(line: str) -> SimpleNamespace:
        code = cli.main(line.split())
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return call


def rows(table: dict[str, dict[str, str]]) -> list[tuple[str, str, str]]:
    return [
        (verb, flag, rest)
        for verb, flags in table.items()
        for names, rest in flags.items()
        for flag in names.split()
    ]


@pytest.mark.parametrize(("verb", "flag", "rest"), rows(TAKEN))
def test_flags_that_are_taken(verb: str, flag: str, rest: str, run: Run) -> None:
    done = run(f"{verb} {rest.format(flag)}")
    assert (done.code, done.err) == (0, done.err if flag in ("-p", "--progress") else "")
    if verb == "convert":
        target = rest.split()[-1]
        assert imgcore.compare("d.raw", target).identical


@pytest.mark.parametrize(("verb", "flag", "word"), rows(REFUSED))
def test_flags_that_are_refused(verb: str, flag: str, word: str, run: Run) -> None:
    before = sorted(path.name for path in Path().iterdir())
    done = run(f"{verb} {flag} d.raw o.qcow2")
    assert done.code == (1 if verb == "check" else 2)
    assert done.err.startswith(f"imgcore: {flag}: ")
    assert word in done.err
    assert done.err.count("\n") == 1
    assert sorted(path.name for path in Path().iterdir()) == before


@pytest.mark.parametrize("verb", TAKEN)
def test_no_flag_of_qemu_img_is_missing(verb: str) -> None:
    """Ask the qemu-img at hand for its flags."""
    program = qemu.require_qemu_img()
    lines: list[str] = []
    for words in ([verb, "--help"], ["--help"]):  # resize takes --help for a size before 10
        if not lines:
            listed = subprocess.run([program, *words], capture_output=True, text=True, check=False)
            lines = listed.stdout.splitlines()
    own = [line for line in lines if re.match(r" +-", line)]
    if f"qemu-img {verb}" not in "".join(lines[:2]):  # before version 10
        own = [line for line in lines if line.startswith(f"  {verb} ")]
    flags = set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", "\n".join(own))) - {"-h", "--help"}
    known = {flag for _, flag, _ in rows({verb: TAKEN[verb] | REFUSED[verb]})}
    assert flags
    assert flags <= known


def test_flags_are_joined_as_getopt_joins_them(run: Run) -> None:
    assert run("convert -Wcpfraw -Oqcow2 -tnone -m2 d.raw o.img").code == 0
    assert imgcore.info("o.img", format="qcow2")["format"] == "qcow2"
    assert run("convert -pU d.raw -O raw o.raw").code == 0
    assert run("compare -pqfraw -Fraw d.raw o.raw").code == 0
    refused = run("convert -pl one d.raw p.raw")
    assert (refused.code, refused.err[:13]) == (2, "imgcore: -l: ")


@pytest.mark.parametrize("flag", ["--bogus", "-Z"])
def test_other_flags_are_still_unknown(flag: str, run: Run) -> None:
    assert "no such option" in run(f"convert {flag} d.raw o.raw").err.lower()


# -- cache modes -----------------------------------------------------------------------

CACHED: Final = [
    "convert -t {} d.raw o.raw",
    "convert -T {} d.raw o.raw",
    "compare -T {} d.raw d.raw",
    "check -T {} base.qcow2",
    "info -t {} d.raw",
]


@pytest.mark.parametrize("line", CACHED)
def test_cache_modes(line: str, run: Run) -> None:
    for mode in ("none", "off", "writeback", "writethrough", "directsync", "unsafe"):
        Path("o.raw").unlink(missing_ok=True)
        assert run(line.format(mode)).code == 0, mode
    Path("o.raw").unlink(missing_ok=True)
    for mode in ("None", "write-back", "''", "unsafe,"):
        done = run(line.format(mode))
        assert done.code == (1 if line.startswith("check") else 2)
        assert "none, writeback, writethrough, directsync, unsafe" in done.err
        assert done.err.count("\n") == 1
        assert not Path("o.raw").exists()


def test_own_cache_modes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    received: dict[str, Any] = {}

    def stand_in(*_: Any, **keywords: Any) -> Any:
        received.update(keywords)
        return SimpleNamespace(bad_ranges=(), checksum=None)

    monkeypatch.setattr("imgcore.verbs.convert.convert", stand_in)
    assert run("convert -T drop --target-cache=keep d.raw o.raw").code == 0
    assert (received["source_cache"], received["target_cache"]) == ("drop", "keep")
    for word, mode in (
        ("none", "direct"),
        ("off", "direct"),
        ("directsync", "direct"),
        ("writeback", "keep"),
        ("writethrough", "keep"),
        ("unsafe", "keep"),
        ("auto", "auto"),
    ):
        assert run(f"convert -T {word} -t {word} d.raw o.raw").code == 0
        assert (received["source_cache"], received["target_cache"]) == (mode, mode)
    assert run("compare -T drop d.raw d.raw").code == 2


@pytest.mark.parametrize(
    ("flags", "synced"),
    [
        ("", True),
        ("-t none", True),
        ("-t writethrough", True),
        ("-t unsafe", False),
        ("-T unsafe", True),
        ("-t none --no-sync", False),
    ],
)
def test_unsafe_is_no_sync(
    flags: str, synced: bool, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    received: dict[str, Any] = {}

    def stand_in(*_: Any, **keywords: Any) -> Any:
        received.update(keywords)
        return SimpleNamespace(bad_ranges=(), checksum=None)

    monkeypatch.setattr("imgcore.verbs.convert.convert", stand_in)
    assert run(f"convert {flags} d.raw o.raw").code == 0
    assert received["sync"] is synced


# -- options of formats ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ("force_size", 10 * MIB),
        ("force_size=on", 10 * MIB),
        ("subformat=fixed,force_size", 10 * MIB),
        ("force_size,subformat=dynamic", 10 * MIB),
        ("force_size=off", 10_514_432),
        ("subformat=fixed,force_size=off", 10_514_432),
    ],
)
def test_force_size(options: str, size: int, run: Run) -> None:
    for line in (
        "create -f vpc -o {} o.vhd 10M",
        "convert -O vpc -o {} e.raw p.vhd",
        "measure -O vpc -o {} e.raw",
    ):
        with open("e.raw", "wb") as file:
            file.truncate(10 * MIB)
        assert run(line.format(options)).code == 0
    for name in ("o.vhd", "p.vhd"):
        assert imgcore.info(name)["virtual-size"] == size


@pytest.mark.parametrize("n_sectors", [2048, 20480, 20481, 1_000_000, 8_388_608])
def test_force_size_rounds_as_qemu_img(n_sectors: int, tmp_path: Path) -> None:
    size = n_sectors * 512
    for flag in ("on", "off"):
        option = f"force_size={flag}"
        own, other = tmp_path / f"own-{flag}.vhd", tmp_path / f"qemu-{flag}.vhd"
        imgcore.create(own, size, options=[option], sync=False)
        qemu.run("create", "-q", "-f", "vpc", "-o", option, other, str(size))
        expected = json.loads(qemu.run("info", "--output=json", "-f", "vpc", other).stdout)
        assert imgcore.info(own)["virtual-size"] == expected["virtual-size"]


def test_force_size_off_contradicts_a_profile_that_keeps_the_size() -> None:
    with pytest.raises(imgcore.OptionError, match="requires size=current, not size=chs"):
        imgcore.convert("a.raw", "b.vhd", profile="azure", options=["force_size=off"])


@pytest.mark.parametrize(
    ("format", "option"),
    [
        ("qcow2", "extended_l2=off"),
        ("qcow2", "nocow=on"),
        ("qcow2", "data_file_raw=off"),
        ("qcow2", "encryption=off"),
        ("raw", "nocow"),
        ("vmdk", "adapter_type=lsilogic,compat6"),
        ("vmdk", "adapter_type=ide,hwversion=10,toolsversion=1,zeroed_grain=on"),
        ("vhdx", "block_state_zero=off"),
        ("vhdx", "block_state_zero"),
        ("vdi", "static=on"),
    ],
)
def test_keys_that_are_taken(format: str, option: str, run: Run) -> None:
    assert run(f"convert -O {format} -o {option} d.raw o.{format}").code == 0
    assert run(f"compare d.raw o.{format}").code == 0


@pytest.mark.parametrize(
    ("format", "option", "word"),
    [
        ("qcow2", "extended_l2=on", "leave it out"),
        ("qcow2", "extended_l2", "leave it out"),
        ("qcow2", "data_file=x", "leave it out"),
        ("qcow2", "encrypt.format=luks,encrypt.key-secret=s", "leave it out"),
        ("qcow2", "encryption=on", "leave it out"),
        ("qcow2", "backing_file=base.qcow2", "-b FILE -F FMT"),
        ("qcow2", "backing_fmt=qcow2", "-F FMT"),
        ("vmdk", "backing_file=base.vmdk", "-b FILE -F FMT"),
        ("vhdx", "log_size=1M", "leave it out"),
        ("raw", "size=1M", "leave it out"),
        ("qcow2", "extended_l2=maybe", "on, off"),
    ],
)
def test_keys_that_are_refused(format: str, option: str, word: str, run: Run) -> None:
    key = re.split("[=,]", option)[0]
    done = run(f"convert -O {format} -o {option} d.raw o.{format}")
    assert done.code == 2
    assert done.err.startswith(f"imgcore: option {key} of {format}")
    assert word in done.err
    assert not Path(f"o.{format}").exists()
    # "leave it out"
    assert run(f"convert -O {format} d.raw o.{format}").code == 0


def test_a_backing_file_is_stated_as_advised(run: Run) -> None:
    for line in ("convert {} d.raw o.qcow2", "create {} p.qcow2"):
        assert run(line.format("-b base.qcow2 -F qcow2")).code == 0
    assert imgcore.info("o.qcow2")["backing-filename"] == "base.qcow2"
    assert imgcore.info("p.qcow2")["backing-filename"] == "base.qcow2"


# -- commands --------------------------------------------------------------------------

# The command of qemu-img, and a line that does what the message advises.
COMMANDS: Final = {
    "amend -o compat=0.10 base.qcow2": "convert -o compat=0.10 base.qcow2 o.qcow2",
    "bench base.qcow2": None,
    "bitmap --add base.qcow2 b": None,
    "dd if=d.raw of=o.raw": "convert d.raw o.raw",
}


@pytest.mark.parametrize("line", COMMANDS)
def test_other_commands_of_qemu_img(line: str, run: Run) -> None:
    done = run(line)
    assert done.code == 2
    assert done.err.startswith(f"imgcore: imgcore has no {line.split()[0]}: ")
    advice = COMMANDS[line] or "--help"
    assert advice.split()[0] in done.err
    assert run(advice).code == 0


@pytest.mark.parametrize("flag", ["-T", "--trace"])
def test_trace_is_refused(flag: str, run: Run) -> None:
    assert "leave it out" in run(f"{flag} bdrv_* info d.raw").err


# -- progress --------------------------------------------------------------------------


def states(*percents: float) -> Callable[..., Any]:
    def job(*_: Any, progress: Callable[[Any], None], **__: Any) -> Any:
        for percent in percents:
            progress(imgcore.Progress(int(percent * 100), 10000, 0, 0, 0))
        return SimpleNamespace(bad_ranges=(), checksum=None, _asdict=dict)

    return job


@pytest.mark.parametrize("flag", ["--progress=qemu", "-p", "--progress"])
def test_progress_as_qemu_img_prints_it(
    flag: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = states(0, 0.5, 1.0, 1.01, 12.34, 13.3, 99.99, 100)
    monkeypatch.setattr("imgcore.verbs.convert.convert", job)
    done = run(f"convert {flag} d.raw o.raw")
    texts = ["0.00", "1.01", "12.34", "99.99", "100.00"]
    assert done.out == "".join(f"    ({text}/100%)\r" for text in texts) + "\n"


def test_progress_of_a_failure_ends_its_line(run: Run) -> None:
    done = run("convert --progress=qemu nowhere.raw o.raw")
    assert done.code == 1
    assert done.out == "    (0.00/100%)\r\n"


@pytest.mark.parametrize("verb", ["convert", "compare"])
def test_progress_reads_like_that_of_qemu_img(verb: str, tmp_path: Path) -> None:
    disk = tmp_path / "d.raw"
    disk.write_bytes(b"abc" * MIB)
    target = tmp_path / "o.raw" if verb == "convert" else disk
    line = [verb, "-f", "raw", "-O" if verb == "convert" else "-F", "raw"]
    other = tmp_path / "q.raw" if verb == "convert" else disk
    theirs = output(qemu.require_qemu_img(), *line, "-p", disk, other)
    texts = [theirs]
    for flag in ("-p", "--progress=qemu"):
        texts.append(output(sys.executable, "-m", "imgcore", *line, flag, disk, target))
        if verb == "convert":
            target.unlink()
    for text in texts:
        assert re.match(rb"( {4}\(\d+\.\d\d/100%\)\r)+(\n|Images are identical)", text)
        assert text.startswith(b"    (0.00/100%)\r")
        assert b"    (100.00/100%)\r" in text
        assert text.endswith(b"\n")


def output(*line: str | Path) -> bytes:
    return subprocess.run(line, stdout=subprocess.PIPE, check=True).stdout


@pytest.mark.parametrize("line", ["convert --json", "compare --json", "compare --output=json"])
def test_progress_leaves_stdout_to_json(line: str, run: Run) -> None:
    images = "d.raw o.raw" if line.startswith("convert") else "d.raw d.raw"
    refused = run(f"{line} --progress=qemu {images}")
    assert refused.code == 2
    assert "use --progress=json" in refused.err
    done = run(f"{line} --progress=json {images}")
    assert done.code == 0
    json.loads(done.out)
    assert json.loads(done.err.splitlines()[-1])["percent"] == 100.0
    Path("o.raw").unlink(missing_ok=True)
    json.loads(run(f"{line} -p {images}").out)


def test_a_mode_may_follow_progress(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imgcore.verbs.convert.convert", states(0, 100))
    assert json.loads(run("convert --progress json d.raw o.raw").err.splitlines()[0])
    assert "(100.00/100%)" in run("convert d.raw o.raw --progress").out
    # What follows -- is a name.
    assert run("convert -- --progress o.raw").out == ""


@pytest.mark.parametrize("sink", ["full", "closed", "broken"])
def test_progress_on_a_stdout_that_fails_does_not_fail_the_job(sink: str, tmp_path: Path) -> None:
    disk, target = tmp_path / "d.raw", tmp_path / "o.qcow2"
    disk.write_bytes(b"abc" * MIB)
    redirection = {"full": ">/dev/full", "closed": ">&-", "broken": "| true"}[sink]
    script = f'"$0" -m imgcore convert --progress=qemu "$1" "$2" {redirection}'
    script += "; exit ${PIPESTATUS[0]}"
    done = subprocess.run(
        ["bash", "-c", script, sys.executable, disk, target],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert imgcore.compare(disk, target).identical


def test_reporters_without_a_terminal() -> None:
    def chosen(mode: str, *, as_json: bool = False, wanted: bool = True) -> type:
        return type(progress.reporter(mode, wanted=wanted, quiet=False, label="x", as_json=as_json))

    assert chosen("auto") is progress.BothReporter
    assert chosen("auto", as_json=True) is progress.PlainReporter
    assert chosen("auto", wanted=False) is progress.Reporter
    assert chosen("qemu", wanted=False) is progress.QemuReporter
