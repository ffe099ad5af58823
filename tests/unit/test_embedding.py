"""The library as a part of another program: docs/embedding.md has the promises."""

from __future__ import annotations

import fcntl
import importlib
import inspect
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.images import MIB, noise
from tests.helpers.threads import settled_counts

import imgcore
from imgcore.engine.cpus import available_cpus

# Parameters of functions and fields of results, which later versions only add to.
_TEXT = """
changes: image since bitmap areas tree granularity threads progress format
    backing_format parent read_options allow share chain files format_since parent_since
    read_options_since
Control.progress:
Control.pause:
Control.resume:
Control.cancel:
ControlProgress: done total data zero written rate seconds eta phase
check: path format parent repair allow share
checksum: image algorithm tree threads progress format backing_format parent
    read_options allow share files
verify: receipt target threads progress backing_format parent allow share
compare_trees: a b format backing_format parent read_options threads allow share
    progress
compare: a b format_a format_b parent_a parent_b read_options_a read_options_b strict
    threads allow backing_format share progress
UnfinishedJob: target journal sources kept_nbytes is_running
jobs: folder remove
convert: source target format target_format options compress backing backing_format
    source_backing_format parent read_options sparse threads force sync in_place share
    salvage reflink allow progress kernels profile rate control checksum verify resume journal
    receipt
    source_cache target_cache
create: path virtual_size format options backing backing_format force sync allow
info: path format chain allow share backing_format parent read_options
lint: path profile format read_options parent allow share
map: path format start length backing_format parent read_options allow share
measure: source size format target_format options compress backing_format parent
    read_options allow share
measure_reflink: source target_format format options backing_format parent read_options
    allow share
set_thread_budget: threads
snapshots: image format read_options allow share
create_snapshot: image name created_ns format backing_format parent read_options allow
apply_snapshot: image key format backing_format parent read_options allow
delete_snapshot: image key format backing_format parent read_options allow
SnapshotInfo: identifier name created_ns virtual_size vm_state_nbytes vm_clock_ns icount
apply: target changes flush_every threads progress rate control format backing_format
    parent read_options allow files
sync: source target areas bitmap since by_checksum tree checksum resize threads progress
    rate control format target_format backing_format parent target_parent read_options
    target_read_options allow share format_since parent_since read_options_since
commit: overlay base empty remove threads progress rate control format backing_format
    parent read_options allow
rebase: image backing backing_format unsafe threads progress rate control format
    source_backing_format parent read_options allow
flatten: image threads progress rate control format backing_format parent read_options
    allow
resize: image size shrink format backing_format parent read_options allow
open: source mode chain cache files format backing_format parent read_options allow share
Image.read: offset length
Image.readinto: offset buffer threads
Image.readv: requests threads
Image.extents: start length layer
Image.as_file: start length
Image.refresh:
Image.info:
Image.close:
Image.write: offset data
Image.writev: requests threads
Image.zero: offset length unmap
Image.discard: offset length
Image.flush:
Image.resize: virtual_size shrink
ApplyResult: target target_format virtual_size changes bytes_written bytes_zeroed seconds
Area: offset length is_zero
BadRange: guest_offset length path reason
CheckResult: filename format corruptions leaks total_clusters allocated_clusters
    fragmented_clusters compressed_clusters image_end_offset problems repairs
    corruptions_fixed leaks_fixed not_repaired
CompareResult: identical first_difference reason size_a size_b
ConvertResult: source target source_format target_format virtual_size bytes_data
    bytes_zero bytes_read bytes_written bytes_shared file_size seconds bad_ranges
    checksum verified
Digest: digest algorithm block_size
CreateResult: path format virtual_size file_size options backing backing_format
Finding: rule message remedy
LintReport: filename format profile findings
MapEntry: start length depth present zero data compressed offset filename
Measurement: required fully_allocated
Progress: done total data zero written
ReflinkMeasurement: reflinked copied
SyncResult: source target source_format target_format virtual_size areas bytes_read
    bytes_written bytes_zeroed seconds checksum
VerifyResult: receipt target format virtual_size checksum
CommitResult: path base bytes_read bytes_written bytes_zeroed emptied removed seconds
RebaseResult: path format backing backing_format bytes_read bytes_written bytes_zeroed
    seconds
FlattenResult: path format bytes_read bytes_written bytes_zeroed seconds
ResizeResult: path format old_size virtual_size
SourceFile: file guest_base block_nbytes
"""
FORMATS = ("qcow2", "vhd", "vhdx", "vdi")
PROMISED = {
    line.partition(":")[0]: line.partition(":")[2].split()
    for line in _TEXT.strip().replace("\n    ", " ").splitlines()
}


def test_the_table_is_read() -> None:
    assert len(PROMISED) >= 35
    assert PROMISED["convert"][:2] == ["source", "target"]
    assert PROMISED["convert"][-1] == "target_cache"
    assert PROMISED["Progress"] == ["done", "total", "data", "zero", "written"]


def names_of(value: Any) -> list[str]:
    """Return the parameters of a function or the fields of a result."""
    if inspect.isclass(value):
        return list(getattr(value, "_fields", None) or value.__dataclass_fields__)
    return [name for name in inspect.signature(value).parameters if name != "self"]


@pytest.mark.parametrize("name", PROMISED)
def test_names_are_only_added(name: str) -> None:
    owner, _, member = name.rpartition(".")
    value = getattr(getattr(imgcore, owner) if owner else imgcore, member)
    promised, found = PROMISED[name], names_of(value)
    assert [one for one in found if one in promised] == promised
    # What was added can be left out, so that callers need not change.
    if inspect.isfunction(value):
        for one, parameter in inspect.signature(value).parameters.items():
            is_new = one not in (*promised, "self")
            assert not is_new or parameter.default is not inspect.Parameter.empty, one


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "disk.raw").write_bytes(noise(4 * MIB))
    imgcore.convert(tmp_path / "disk.raw", tmp_path / "base.qcow2")
    imgcore.create(tmp_path / "disk.qcow2", backing="base.qcow2", backing_format="qcow2")
    return tmp_path


def use(folder: Path) -> None:
    """Use every verb on an image with a parent."""
    raw, image = folder / "disk.raw", folder / "disk.qcow2"
    target = folder / f"out-{os.getpid()}-{threading.get_ident()}.vmdk"
    imgcore.info(image, chain=True)
    imgcore.check(image)
    assert list(imgcore.map(image))
    imgcore.measure(image)
    imgcore.lint(image, profile="openstack")
    imgcore.convert(image, target, force=True, sync=False, threads=3)
    assert imgcore.compare(raw, target, threads=3).identical
    assert not list(imgcore.changes(image, since=target, threads=3))
    packed = target.with_suffix(".raw.gz")
    imgcore.convert(image, packed, force=True, sync=False, threads=2)
    imgcore.convert(packed, target.with_suffix(".raw"), force=True, sync=False)
    with imgcore.open(image) as opened:
        assert opened.read(1, 4 * MIB - 1) == noise(4 * MIB)[1:]


def test_a_child_after_fork_may_use_what_is_open(folder: Path) -> None:
    """The script forks; the test's own process has other threads."""
    script = """
import os, sys, threading
sys.path.insert(0, os.getcwd())
from tests.unit.test_embedding import Path, imgcore, noise, use

folder = Path(sys.argv[1])
with imgcore.open(folder / "disk.qcow2") as image:
    batches = image.extents()
    next(batches)
    use(folder)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            assert image.read(0, len(noise(1 << 22))) == noise(1 << 22)
            assert image.info()["format"] == "qcow2"
            assert not list(batches)
            use(folder)
            image.close()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    # The child's close() closed its own descriptors only.
    assert image.read(0, 1 << 22) == noise(1 << 22)
    use(folder)
print("done")
"""
    assert run_script(script, folder) == (0, "done\n", "")


@pytest.mark.parametrize("name", ["disk.raw", "small.qcow2", "flat.vmdk", *FORMATS])
def test_an_open_image_imports_nothing(name: str, folder: Path) -> None:
    """A child cannot import a module that another thread was importing at the fork."""
    path = folder / name
    if name in FORMATS:
        imgcore.convert(folder / "disk.raw", folder / f"parent.{name}")
        path = folder / f"child.{name}"
        imgcore.create(path, backing=f"parent.{name}", backing_format=name)
    elif name == "small.qcow2":
        imgcore.convert(folder / "disk.raw", path, compress=True)
    elif name != "disk.raw":
        imgcore.convert(folder / "disk.raw", path, options={"subformat": "monolithicFlat"})
    script = """
import sys
import imgcore
from imgcore.engine.cpus import available_cpus
with imgcore.open(sys.argv[1]) as image:
    before = set(sys.modules)
    for _ in range(2):
        assert len(image.read(100, 1 << 20)) == len(image.read(0, 1 << 20))
        assert image.readinto(0, bytearray(700)) == 700
        image.readv([(5, bytearray(9)), (0, bytearray(1 << 20))])
        assert list(image.extents()) and list(image.extents(layer=0))
        assert image.as_file().read(5) and image.info()
        image.check_unchanged()
        image.refresh()
    assert set(sys.modules) == before, set(sys.modules) - before
print("done")
"""
    assert run_script(script, path) == (0, "done\n", "")


def run_script(script: str, *words: object) -> tuple[int, str, str]:
    """Run a program that may import the helpers of tests."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *map(str, words)],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("name", ["disk.qcow2", "small.qcow2", "disk.raw"])
def test_a_fork_while_other_threads_read(name: str, folder: Path) -> None:
    """The child reads at once what threads of the parent hold their locks on."""
    imgcore.convert(folder / "disk.raw", folder / "small.qcow2", compress=True)
    script = """
import faulthandler, os, random, sys, threading
sys.path.insert(0, os.getcwd())
from tests.unit.test_embedding import imgcore, noise

data = noise(1 << 22)
image = imgcore.open(sys.argv[1], cache="1M")
ended = threading.Event()

def work(seed):
    choose = random.Random(seed)
    while not ended.is_set():
        start, length = choose.randrange(1 << 22), choose.choice([1, 512, 5000, 100_000])
        length = min(length, (1 << 22) - start)
        assert image.read(start, length) == data[start : start + length]
        list(image.extents())
        if seed == 0:
            image.refresh()

threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(4)]
for thread in threads:
    thread.start()
for round in range(60):
    child = os.fork()
    if child == 0:
        faulthandler.dump_traceback_later(30, exit=True)
        status = 1
        try:
            work_once = random.Random(round)
            for _ in range(5):
                start = work_once.randrange((1 << 22) - 9000)
                assert image.read(start, 9000) == data[start : start + 9000]
            image.refresh()
            others = [threading.Thread(target=image.read, args=(0, 1 << 20)) for _ in range(3)]
            for other in others:
                other.start()
            for other in others:
                other.join()
            assert image.read(0, 1 << 22) == data
            image.close()
            assert all(file.fd == -1 for file in image.files)
            try:
                image.read(0, 1)
            except ValueError:
                status = 0
        finally:
            os._exit(status)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0, (round, code)
ended.set()
for thread in threads:
    thread.join()
assert image.read(0, 1 << 22) == data
image.close()
print("done")
"""
    assert run_script(script, folder / name) == (0, "done\n", "")


def test_a_subinterpreter_is_refused(folder: Path) -> None:
    """It is told why, can still describe images, and does no harm to the main one."""
    script = """
import sys
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
import imgcore
from imgcore.engine.cpus import available_cpus

path, written = sys.argv[1:]
with imgcore.open(path) as image:
    before = image.read(0, 512)
code = f'''
import sys
sys.path[:] = {sys.path!r}
import imgcore
from imgcore.engine.cpus import available_cpus
found = imgcore.info({path!r})["format"]
for use in (lambda: imgcore.open({path!r}), lambda: imgcore.convert({path!r}, "x.raw")):
    try:
        use()
    except ImportError as error:
        found += ", " + str(error)
    else:
        found += ", works"
with open({written!r}, "w") as file:
    file.write(found)
'''
one = interpreters.create()
interpreters.run_string(one, code)
interpreters.destroy(one)
with imgcore.open(path) as image:
    assert image.read(0, 512) == before
with open(written) as file:
    print(file.read())
"""
    code, printed, errors = run_script(script, folder / "disk.qcow2", folder / "found")
    assert (code, errors) == (0, "")
    assert re.fullmatch(r"qcow2(, [^,]*(one interpreter|once) per process[^,]*){2}\n", printed)


def test_the_core_asks_for_the_gil() -> None:
    """A module that can do without says so; on a build without the GIL, Python asks."""
    core = Path(__file__).resolve().parents[2] / "src" / "imgcore" / "_core.pyx"
    assert "freethreading_compatible" not in core.read_text()
    importlib.import_module("imgcore._core")
    assert getattr(sys, "_is_gil_enabled", lambda: True)()


def test_the_verbs_on_many_threads(folder: Path) -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            use(folder)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def handlers() -> dict[int, Any]:
    fixed = (signal.SIGKILL, signal.SIGSTOP)
    return {n: signal.getsignal(n) for n in signal.valid_signals() if n not in fixed}


def masks() -> list[str]:
    status = Path("/proc/self/status").read_text()
    # SigQ counts the signals that wait for all processes of the user.
    lines = (line for line in status.splitlines() if line.startswith("Sig"))
    return [line for line in lines if not line.startswith("SigQ")]


def test_no_signal_is_touched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, before_masks = handlers(), masks()

    def refuse(*_: object) -> None:
        raise AssertionError("the library changes a signal")

    for name in ("signal", "setitimer", "set_wakeup_fd", "pthread_sigmask", "siginterrupt"):
        monkeypatch.setattr(signal, name, refuse)
    seen: list[Any] = []
    imgcore.convert(
        folder / "disk.raw",
        folder / "x.qcow2",
        progress=lambda _: seen.append((handlers(), masks())),
    )
    use(folder)
    monkeypatch.undo()
    assert (handlers(), masks()) == (before, before_masks)
    assert all(found == (before, before_masks) for found in seen)


def test_a_handler_runs_during_a_job_on_the_main_thread(folder: Path) -> None:
    class StopError(Exception):
        pass

    def stop(*_: object) -> None:
        raise StopError

    previous = signal.signal(signal.SIGUSR1, stop)
    try:
        with pytest.raises(StopError):
            imgcore.convert(
                folder / "disk.raw",
                folder / "new.qcow2",
                progress=lambda _: os.kill(os.getpid(), signal.SIGUSR1),
            )
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert not (folder / "new.qcow2").exists()


class HandlerError(Exception):
    pass


@pytest.mark.parametrize("error", [HandlerError, TimeoutError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["extents", "pread", "cpus"])
def test_a_handler_that_raises_during_a_read(
    where: str, error: type[BaseException], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its exception comes out as it is, and holds no buffer."""

    def stop(*_: object) -> None:
        raise error

    def interrupting(call: Callable[..., Any]) -> Callable[..., Any]:
        def interrupted(*arguments: Any, **keywords: Any) -> Any:
            monkeypatch.undo()
            os.kill(os.getpid(), signal.SIGUSR1)
            return call(*arguments, **keywords)

        return interrupted

    previous = signal.signal(signal.SIGUSR1, stop)
    try:
        with imgcore.open(folder / "disk.qcow2") as image:
            owner, name = {
                "extents": (image.reader, "extents"),
                "pread": (os, "pread"),
                "cpus": (os, "fstat"),
            }[where]
            buffer = bytearray(MIB)
            monkeypatch.setattr(owner, name, interrupting(getattr(owner, name)))
            with pytest.raises(error) as raised:
                if where == "cpus":
                    available_cpus()
                else:
                    image.readinto(0, buffer)
            assert not raised.value.args
            raised = None
            buffer.append(1)
            assert image.read(0, MIB)
    finally:
        signal.signal(signal.SIGUSR1, previous)


def open_files() -> Iterator[tuple[int, str]]:
    for name in os.listdir("/proc/self/fd"):
        try:
            yield int(name), os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue


def test_descriptors_are_closed_on_exec(folder: Path) -> None:
    before = set(open_files())
    seen: set[str] = set()

    def look(*_: object) -> None:
        for fd, target in set(open_files()) - before:
            if str(folder) in target or "memfd" in target:
                seen.add(os.path.basename(target))
                assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC, target

    with imgcore.open(folder / "disk.qcow2") as image:
        look()
        next(image.extents())
        look()
    flat = {"subformat": "monolithicFlat"}
    imgcore.convert(folder / "disk.qcow2", folder / "f.vmdk", options=flat, progress=look)
    imgcore.compare(folder / "f.vmdk", folder / "disk.qcow2", progress=look)
    imgcore.convert(folder / "f.vmdk", folder / "f.raw.zst", progress=look)
    assert {"disk.qcow2", "base.qcow2", "f.vmdk", "f-flat.vmdk"} <= seen
    assert set(open_files()) == before


def test_importing_and_logging_configure_nothing() -> None:
    script = """
import logging, signal, sys, threading, warnings
before = (list(warnings.filters), dict(vars(logging.root)), sys.excepthook, sys.unraisablehook)
import imgcore
from imgcore.engine.cpus import available_cpus
for name in imgcore.__all__:
    getattr(imgcore, name)
assert before[0] == [f for f in warnings.filters if "numpy" not in str(f)]
assert before[1] == dict(vars(logging.root))
assert before[2:] == (sys.excepthook, sys.unraisablehook)
assert logging.getLogger("imgcore").handlers == []
assert logging.getLogger("imgcore").level == logging.NOTSET
assert logging.getLogger("imgcore").propagate
assert threading.active_count() == 1
print("done")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_warnings_are_records_of_the_logger(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="imgcore"):
        imgcore.create(folder / "parent.vhd", MIB)
        imgcore.create(folder / "child.vhd", backing="parent.vhd", backing_format="vhd")
        os.utime(folder / "parent.vhd", (10**9, 10**9))
        imgcore.open(folder / "child.vhd").close()
    assert [record.name for record in caplog.records] == ["imgcore"]
    assert "modification time" in caplog.text


def test_no_thread_outlives_a_call(folder: Path) -> None:
    before = settled_counts()
    use(folder)
    with imgcore.open(folder / "disk.qcow2") as image:
        image.read(0, 4 * MIB)
        assert settled_counts() == before
    assert settled_counts() == before
