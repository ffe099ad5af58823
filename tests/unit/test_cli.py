"""The command itself: usage, exit codes, help, one-line errors, reports.

The verbs are replaced by stand-ins; they have their own tests.
"""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner

from imgcore.checksums.digest import Digest
from imgcore.cli import main as cli
from imgcore.cli import progress
from imgcore.engine.bad_ranges import BadRange
from imgcore.errors import (
    CorruptImageError,
    OptionError,
    TargetError,
    UnsupportedFeatureError,
)
from imgcore.log import log

VERBS = ("convert", "info", "map", "compare", "check", "measure", "create")

# For each verb its module, its function and the arguments that it requires.
CALLS = {
    "convert": ("imgcore.verbs.convert", "convert", ("a.raw", "b.raw")),
    "info": ("imgcore.verbs.info", "info", ("a.raw",)),
    "map": ("imgcore.verbs.map", "map", ("a.raw",)),
    "compare": ("imgcore.verbs.compare", "compare", ("a.raw", "b.raw")),
    "check": ("imgcore.verbs.check", "check", ("a.raw",)),
    "measure": ("imgcore.verbs.measure", "measure", ("a.raw",)),
    "create": ("imgcore.verbs.create", "create", ("a.raw", "1M")),
}


@dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str


RunMain = Callable[..., Run]
Fake = Callable[..., dict[str, Any]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> RunMain:
    """Give a function that runs the command in this process."""

    def call(*arguments: str) -> Run:
        code = cli.main(arguments)
        captured = capsys.readouterr()
        return Run(code, captured.out, captured.err)

    return call


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Give a function that replaces a verb and returns a dict with its arguments."""

    def replace(
        verb: str, result: Any = None, error: BaseException | None = None
    ) -> dict[str, Any]:
        received: dict[str, Any] = {}

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            received.update(kwargs, args=args)
            if error is not None:
                raise error
            return result(**kwargs) if callable(result) else result

        module, name, _ = CALLS[verb]
        monkeypatch.setattr(f"{module}.{name}", stand_in)
        return received

    return replace


class Outcome(NamedTuple):
    """Stands in for ConvertResult and CompareResult."""

    identical: bool = True
    first_difference: int | None = None
    reason: str | None = None
    size_a: int = 512
    size_b: int = 512
    bad_ranges: tuple[BadRange, ...] = ()
    checksum: Digest | None = None


def assert_one_line(done: Run, code: int, *words: str) -> None:
    assert done.code == code, done
    assert done.out == ""
    assert len(done.err.splitlines()) == 1, done.err
    assert done.err.startswith("imgcore: ")
    for word in words:
        assert word in done.err


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help(verb: str, flag: str) -> None:
    done = CliRunner().invoke(cli.group, [verb, flag])
    assert done.exit_code == 0
    assert done.output.startswith(f"Usage: imgcore {verb} [OPTIONS]") or "Usage:" in done.output


def test_help_lists_the_verbs(run: RunMain) -> None:
    done = run("--help")
    assert done.code == 0
    for verb in VERBS:
        assert f"  {verb} " in done.out


@pytest.mark.parametrize("flag", ["-V", "--version"])
def test_version(flag: str, run: RunMain) -> None:
    import imgcore

    assert run(flag) == Run(0, f"imgcore {imgcore.__version__}\n", "")


USAGE_ERRORS = {
    "no-verb": (),
    "unknown-verb": ("konvert",),
    "unknown-flag": ("info", "--nonsense", "a"),
    "no-source": ("convert",),
    "no-target": ("convert", "a"),
    "too-many": ("info", "a", "b"),
    "threads-0": ("convert", "-m", "0", "a", "b"),
    "threads-text": ("convert", "-m", "all", "a", "b"),
    "sparse-text": ("convert", "-S", "4x", "a", "b"),
    "output-text": ("info", "--output=xml", "a"),
    "progress-text": ("convert", "--progress=loud", "a", "b"),
    "size-text": ("create", "a.raw", "1Q"),
    "measure-both": ("measure", "--size", "1M", "a"),
    "measure-neither": ("measure",),
    "no-file": ("create",),
    "compare-one": ("compare", "a"),
    "offset-negative": ("map", "--start-offset=-1", "a"),
    "options-without-format": ("convert", "-o", "help"),
}


@pytest.mark.parametrize("case", USAGE_ERRORS)
def test_usage_errors(case: str, run: RunMain) -> None:
    assert_one_line(run(*USAGE_ERRORS[case]), 2)


CHECK_USAGE = {
    "no-file": (),
    "as-qemu-img-has-it": ("-r", "all", "a.qcow2"),
    "unknown-flag": ("--nonsense", "a.qcow2"),
    "unknown-format": ("-f", "floppy", __file__),
}


@pytest.mark.parametrize("case", CHECK_USAGE)
def test_wrong_usage_of_check_is_not_taken_for_corruption(case: str, run: RunMain) -> None:
    assert_one_line(run("check", *CHECK_USAGE[case]), 1)


ERRORS = {
    "image": (CorruptImageError("L1 table is broken", path="a.raw"), 1, "a.raw: L1 table"),
    "target": (TargetError("exists already", path="b.raw"), 1, "b.raw: exists already"),
    "option": (OptionError("unknown option 'x'"), 2, "unknown option"),
    "os": (FileNotFoundError(errno.ENOENT, "No such file", "a.raw"), 1, "a.raw: No such file"),
    "os-nameless": (OSError(errno.ENOSPC, "No space left"), 1, "imgcore: No space left"),
    "memory": (MemoryError(), 1, "out of memory"),
    "bug": (
        ZeroDivisionError("division by zero"),
        1,
        "a defect of imgcore, please report it: ZeroDivisionError",
    ),
    "control-characters": (OSError(errno.EIO, "bad", "a\n\x1b[31mb"), 1, "a\\n\\x1b[31mb: bad"),
    "not-encodable": (OSError(errno.EIO, "bad", "a\udc80"), 1, "a\\udc80: bad"),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str, verb: str, run: RunMain, fake: Fake) -> None:
    error, code, text = ERRORS[case]
    fake(verb, error=error)
    # For compare, 1 means "different"; for check, 2 means "corrupt".
    code = {"compare": 2, "check": 1}.get(verb, code)
    assert_one_line(run(verb, *CALLS[verb][2]), code, text)


def test_debug_shows_where_a_bug_is(
    run: RunMain, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMGCORE_DEBUG", "1")
    fake("info", error=ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        run("info", "a.raw")


def test_a_closed_pipe_says_nothing(run: RunMain, fake: Fake) -> None:
    fake("info", error=BrokenPipeError(errno.EPIPE, "Broken pipe"))
    assert run("info", "a.raw") == Run(141, "", "")


@pytest.mark.parametrize("verb", VERBS)
def test_interrupt(verb: str, run: RunMain, fake: Fake) -> None:
    fake(verb, error=KeyboardInterrupt())
    assert_one_line(run(verb, *CALLS[verb][2]), 130, "SIGINT")


def test_a_second_signal_does_not_interrupt_cleaning_up(run: RunMain, fake: Fake) -> None:
    def job(**_: Any) -> Outcome:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGHUP)
        raise AssertionError

    fake("convert", result=job)
    assert_one_line(run("convert", "a.raw", "b.raw"), 143, "SIGTERM")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_a_finalizer_is_not_lost(
    number: int, code: int, run: RunMain, fake: Fake
) -> None:
    class Finalized:
        def __del__(self) -> None:
            signal.raise_signal(number)

    def job(**_: Any) -> Outcome:
        Finalized()
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            time.sleep(0.001)
        return Outcome()

    fake("convert", result=job)
    assert_one_line(run("convert", "a.raw", "b.raw"), code, signal.Signals(number).name)


def test_an_interrupt_while_the_command_is_loaded_says_nothing() -> None:
    script = """if True:
        import os, signal, sys
        class Finder:
            def find_spec(self, name, path=None, target=None):
                if name == "imgcore.cli.main":
                    os.kill(os.getpid(), signal.SIGINT)
        sys.meta_path.insert(0, Finder())
        from imgcore.__main__ import run
        run()
    """
    done = subprocess.run(
        [sys.executable, "-c", script, "--version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize(("flags", "text"), [((), "imgcore: warning: a\\n: odd\n"), (("-q",), "")])
def test_warnings(flags: tuple[str, ...], text: str, run: RunMain, fake: Fake) -> None:
    def warn(**_: Any) -> Outcome:
        log.warning("%s: odd", "a\n")
        return Outcome()

    fake("convert", result=warn)
    assert run("convert", *flags, "a", "b") == Run(0, "", text)


def test_convert_passes_every_flag_on(run: RunMain, fake: Fake) -> None:
    received = fake("convert", result=Outcome())
    line = "convert -f raw -O qcow2 -F raw -B base.raw -o a=1,b=2 -o c=3 -c -S 64k -m 3 -n -W -q -U"
    line += " --force --no-sync --allow /x --allow /y --source-backing-format qcow2"
    line += " --target-is-zero --parent p --read-options size=chs --profile azure --salvage"
    line += " --no-reflink --trust-blocks -r 50M -t none -T none -C --checksum --verify"
    line += " --resume=verify --journal j --receipt r src dst"
    assert run(*line.split()) == Run(0, "", "")
    assert received.pop("args") == ("src", "dst")
    assert received == {
        "format": "raw",
        "target_format": "qcow2",
        "backing": "base.raw",
        "backing_format": "raw",
        "source_backing_format": "qcow2",
        "parent": ("p",),
        "read_options": ("size=chs",),
        "options": ("a=1,b=2", "c=3"),
        "profile": "azure",
        "compress": True,
        "sparse": 65536,
        "threads": 3,
        "in_place": True,
        "target_is_zero": True,
        "force": True,
        "sync": False,
        "share": True,
        "salvage": True,
        "reflink": False,
        "trust_blocks": True,
        "allow": ("/x", "/y"),
        "progress": received["progress"],
        "control": received["control"],
        "checksum": "sha256",
        "verify": True,
        "resume": "verify",
        "journal": "j",
        "base": None,
        "size": None,
        "receipt": "r",
        "source_cache": "direct",
        "target_cache": "direct",
    }
    assert received["control"].rate == 50 << 20


@pytest.mark.parametrize("word", ["auto", "always", "strict", "never"])
def test_convert_passes_reflink_on(word: str, run: RunMain, fake: Fake) -> None:
    received = fake("convert", result=Outcome())
    assert run("convert", f"--reflink={word}", "src", "dst").code == 0
    assert received["reflink"] == word


def test_no_reflink_allows_no_other_reflink(run: RunMain) -> None:
    done = run("convert", "--reflink=always", "--no-reflink", "src", "dst")
    assert done.code == 2
    assert "--no-reflink contradicts --reflink=always" in done.err


def test_convert_defaults(run: RunMain, fake: Fake) -> None:
    received = fake("convert", result=Outcome())
    assert run("convert", "src", "dst").code == 0
    assert received["sparse"] == 4096
    assert received["sync"] is True
    assert received["salvage"] is False
    assert received["reflink"] is True
    assert received["trust_blocks"] is False
    assert received["threads"] is None
    assert received["options"] == ()
    assert received["control"].rate is None


def test_convert_lists_what_was_lost(run: RunMain, fake: Fake) -> None:
    lost = BadRange(0x2000, 4096, "src\n", "Input/output error")
    fake("convert", result=Outcome(bad_ranges=(lost,)))
    done = run("convert", "--salvage", "--json", "src", "dst")
    assert done.code == 3
    assert json.loads(done.out)["bad_ranges"] == [lost._asdict()]
    (line,) = done.err.splitlines()
    assert "lost: 4096 bytes of the disk at 0x2000 (Input/output error)" in line


def test_convert_json(run: RunMain, fake: Fake) -> None:
    fake("convert", result=Outcome())
    done = run("convert", "--json", "src", "dst")
    assert json.loads(done.out)["size_a"] == 512
    assert done.out.count("\n") == 1


@pytest.mark.parametrize(
    "line",
    [
        "convert -O raw -o help",
        "convert -o help a b.raw",
        "convert -o preallocation=off,help a b.raw",
        "create -f raw -o help",
        "create -o ? b.raw",
        "measure -O raw -o help",
    ],
)
def test_options_help(line: str, run: RunMain) -> None:
    done = run(*line.split())
    assert done.code == 0, done.err
    assert "preallocation=off|falloc|full" in done.out


COMPARISONS = {
    "identical": (Outcome(), 0, "Images are identical.\n"),
    "sizes": (Outcome(size_b=1024), 0, "Warning: Image size mismatch!\nImages are identical.\n"),
    "different": (
        Outcome(False, 4096, "Content mismatch at offset 4096!"),
        1,
        "Content mismatch at offset 4096!\n",
    ),
}


@pytest.mark.parametrize("case", COMPARISONS)
def test_compare(case: str, run: RunMain, fake: Fake) -> None:
    result, code, out = COMPARISONS[case]
    fake("compare", result=result)
    assert run("compare", "a", "b") == Run(code, out, "")
    assert run("compare", "-q", "a", "b") == Run(code, "", "")
    done = run("compare", "--json", "a", "b")
    assert done.code == code
    assert json.loads(done.out)["identical"] is result.identical


CHECKS = {
    "clean": ({}, 0, "No errors were found on the image.\n"),
    "corrupt": ({"corruptions": 2, "leaks": 1}, 2, "\n2 errors were found on the image.\n"),
    "leaks": ({"leaks": 5}, 3, "\n5 leaked clusters were found on the image.\n"),
}


@pytest.mark.parametrize("case", CHECKS)
def test_check(case: str, run: RunMain, fake: Fake) -> None:
    from imgcore.verbs.check import CheckResult

    counts, code, text = CHECKS[case]
    result = CheckResult("a.qcow2", "qcow2", problems=["ERROR x\x1b"] if counts else [], **counts)
    fake("check", result=result)
    done = run("check", "a.qcow2")
    assert done.code == code
    assert done.out.startswith(text)
    assert done.err == ("ERROR x\\x1b\n" if counts else "")
    assert run("check", "-q", "a.qcow2").out == ""
    report = json.loads(run("check", "--output=json", "a.qcow2").out)
    assert report["check-errors"] == 0
    assert report.get("corruptions", 0) == counts.get("corruptions", 0)


def test_check_of_a_format_without_tables(run: RunMain, fake: Fake) -> None:
    from imgcore.verbs.check import CheckNotSupportedError

    fake("check", error=CheckNotSupportedError("nothing to check", path="a.raw"))
    assert_one_line(run("check", "a.raw"), 63, "nothing to check")
    fake("check", error=UnsupportedFeatureError("encrypted", path="a.qcow2"))
    assert_one_line(run("check", "a.qcow2"), 1, "encrypted")


def progress_of(*states: tuple[int, int]) -> Callable[..., Outcome]:
    """Return a stand-in for a job that reports these states."""

    def job(progress: Callable[[Any], None] | None, **_: Any) -> Outcome:
        assert progress is not None
        for done, total in states:
            progress(SimpleNamespace(done=done, total=total, data=done, zero=0, written=done))
        return Outcome()

    return job


def test_progress_json(run: RunMain, fake: Fake) -> None:
    fake("convert", result=progress_of((0, 1000), (250, 1000), (1000, 1000)))
    done = run("convert", "--progress=json", "a", "b")
    lines = [json.loads(line) for line in done.err.splitlines()]
    # The middle state comes too soon after the first.
    assert [line["percent"] for line in lines] == [0.0, 100.0]
    assert lines[-1] == {**lines[-1], "done": 1000, "total": 1000, "eta": 0.0}
    counters = {"done", "total", "data", "zero", "written"}
    assert set(lines[0]) == counters | {"percent", "rate", "eta", "phase"}
    assert done.out == ""


def test_progress_plain(run: RunMain, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    gib = 1 << 30

    def job(progress: Callable[[Any], None], **_: Any) -> Outcome:
        for second in range(11):
            clock[0] = float(second)
            progress(SimpleNamespace(done=second * gib // 10, total=gib))
        return Outcome()

    fake("convert", result=job)
    done = run("convert", "-p", "a", "b")
    assert done.err.splitlines() == [
        "50.0% of 1 GiB, 102 MiB/s, 0:05 left",
        "100.0% of 1 GiB",
        "100.0% of 1 GiB in 10.0 s, 102 MiB/s",
    ]


def test_progress_bar(run: RunMain, fake: Fake) -> None:
    fake("compare", result=progress_of((0, 1 << 30), (1 << 30, 1 << 30)))
    done = run("compare", "--progress=bar", "a", "b")
    assert done.code == 0
    assert "100.0%" in done.err
    assert "/s" in done.err


def test_progress_bar_leaves_the_terminal_in_order(run: RunMain, fake: Fake) -> None:
    def job(progress: Callable[[Any], None], **_: Any) -> Outcome:
        progress(SimpleNamespace(done=1, total=10))
        raise CorruptImageError("ends here", path="a")

    fake("convert", result=job)
    done = run("convert", "--progress=bar", "a", "b")
    assert done.code == 1
    assert done.err.endswith("imgcore: a: ends here\n")


@pytest.mark.parametrize(
    "flags", [(), ("-q", "-p"), ("-q", "--progress=bar"), ("--progress=none",)]
)
def test_no_progress(flags: tuple[str, ...], run: RunMain, fake: Fake) -> None:
    def job(progress: Callable[[Any], None], **_: Any) -> Outcome:
        for done in range(11):
            progress(SimpleNamespace(done=done, total=10))
        return Outcome()

    fake("convert", result=job)
    assert run("convert", *flags, "a", "b") == Run(0, "", "")


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "--:--"), (0, "0:00"), (61.4, "1:01"), (3723, "1:02:03")]
)
def test_time_text(seconds: float | None, text: str) -> None:
    assert progress.time_text(seconds) == text


def test_rate_is_that_of_the_last_seconds() -> None:
    rate = progress.Rate()
    for second in range(100):
        rate.note(float(second), 1000 * min(second, 50) + 10 * max(second - 50, 0))
    assert rate.per_second(99.0, 50_490) == pytest.approx(10, rel=0.01)
    # A job that waits becomes slower, and one that has waited for long is at zero.
    assert rate.per_second(103.0, 50_490) == pytest.approx(6, rel=0.1)
    assert rate.per_second(1000.0, 50_490) == 0.0


def test_info_loads_neither_numpy_nor_rich(tmp_path: Any) -> None:
    image = tmp_path / "a.raw"
    image.write_bytes(bytes(1024))
    code = (
        "import sys; from imgcore.cli.main import main; code = main(['info', sys.argv[1]]);"
        "heavy = {'numpy', 'rich', 'zstandard', 'logging', 'dataclasses', 'imgcore._core'};"
        "heavy &= set(sys.modules);"
        "sys.exit(code or (f'loaded: {heavy}' if heavy else 0))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(image)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for wanted in (False, True):
        chosen = progress.reporter(
            "auto", wanted=wanted, quiet=False, label="convert", as_json=False
        )
        assert isinstance(chosen, progress.BarReporter)
        assert chosen.is_due(0.0) is wanted


def test_no_rate_without_two_samples() -> None:
    rate = progress.Rate()
    assert rate.per_second(1.0, 5) == 0.0
    rate.note(1.0, 5)
    assert rate.per_second(1.0, 5) == 0.0


def test_other_lost_exceptions_are_still_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    lost = SimpleNamespace(exc_value=ValueError("lost"))
    with cli._signals():
        sys.unraisablehook(lost)  # type: ignore[arg-type]
    assert shown == [lost]
