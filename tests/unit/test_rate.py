"""The limit of bytes a second: it holds, changes at once, and delays no ending.

native/tests/test_rate.c tests the arithmetic by a clock of its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.images import noise

import imgcore

MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """1 MiB of data in a disk of 64 MiB."""
    path = tmp_path / "disk.raw"
    path.write_bytes(noise(MIB))
    os.truncate(path, 64 * MIB)
    return path


def seconds(run: Callable[[], object]) -> float:
    started = time.monotonic()
    run()
    return time.monotonic() - started


TARGETS: dict[str, dict[str, Any]] = {
    "o.raw": {},
    "o.qcow2": {},
    "o.vmdk": {},
    "o.vhd": {},
    "o.vhdx": {},
    "o.vdi": {},
    "fixed.vhd": {"options": ["subformat=fixed"]},
    "small.qcow2": {"compress": True},
    "one.qcow2": {"threads": 1},
    "many.qcow2": {"threads": 8},
    "stream.vmdk": {"options": ["subformat=streamOptimized"]},
    "o.raw.gz": {},
    "o.raw.zst": {},
    "o.tar.gz": {"profile": "gce"},
    "salvaged.raw": {"salvage": True},
}


@pytest.mark.parametrize("target", TARGETS)
def test_a_conversion_takes_as_long_as_its_rate_demands(
    target: str, disk: Path, tmp_path: Path
) -> None:
    """Holes are free: the whole disk would take 16 seconds."""
    path = tmp_path / target
    taken = seconds(lambda: imgcore.convert(disk, path, rate="4M", sync=False, **TARGETS[target]))
    assert taken >= 0.25
    if not target.endswith(("gz", "zst")):
        assert imgcore.compare(disk, path).identical


@pytest.mark.parametrize("target", ["o.qcow2", "o.raw.zst", "o.tar.gz"])
def test_a_compressed_source_counts_whole(target: str, tmp_path: Path) -> None:
    packed = tmp_path / "disk.raw.gz"
    plain = tmp_path / "disk.raw"
    plain.write_bytes(noise(MIB // 2) + bytes(MIB // 2))
    imgcore.convert(plain, packed, sync=False)
    profile = "gce" if target == "o.tar.gz" else None
    path = tmp_path / target
    taken = seconds(
        lambda: imgcore.convert(packed, path, rate=4 * MIB, profile=profile, sync=False)
    )
    assert taken >= 0.25


def test_a_child_counts_what_is_read_of_it_and_its_parent(disk: Path, tmp_path: Path) -> None:
    base = tmp_path / "base.qcow2"
    imgcore.convert(disk, base, sync=False)
    keywords = {"backing": base, "backing_format": "qcow2", "rate": "4M", "sync": False}
    taken = seconds(lambda: imgcore.convert(disk, tmp_path / "o.qcow2", **keywords))
    assert taken >= 0.25
    empty = tmp_path / "empty.raw"
    empty.touch()
    os.truncate(empty, 64 * MIB)
    taken = seconds(lambda: imgcore.convert(empty, tmp_path / "p.qcow2", **keywords))
    assert taken >= 0.25


def test_zeros_that_are_written_count(tmp_path: Path) -> None:
    empty = tmp_path / "empty.raw"
    empty.touch()
    os.truncate(empty, MIB)
    for target in ("o.raw", "o.qcow2"):
        path = tmp_path / target
        taken = seconds(lambda p=path: imgcore.convert(empty, p, rate="4M", sparse=0, sync=False))
        assert taken >= 0.25


def test_holes_are_free(tmp_path: Path) -> None:
    """One byte a second, and 64 TiB of nothing."""
    empty = tmp_path / "empty.vhdx"
    imgcore.create(empty, 64 << 40, sync=False)
    for target in ("o.qcow2", "o.vhdx"):
        imgcore.convert(empty, tmp_path / target, rate=1, sync=False)


@pytest.mark.parametrize("target", ["o.raw", "o.qcow2", "o.raw.gz", "o.raw.zst", "o.tar.gz"])
def test_a_rate_does_not_change_the_bytes(target: str, tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(noise(3 * MIB + 512) + b"text " * MIB + bytes(3 * MIB - 512))
    profile = "gce" if target == "o.tar.gz" else None
    path = tmp_path / target
    texts = []
    for rate in (None, "64M"):
        imgcore.convert(disk, path, rate=rate, profile=profile, force=True, sync=False)
        texts.append(path.read_bytes())
    assert texts[0] == texts[1]


TARGET_NAMES = ["o.qcow2", "o.raw", "o.raw.gz", "o.raw.zst", "o.tar.gz"]


def profile_of(target: str) -> str | None:
    return "gce" if target.endswith(".tar.gz") else None


@pytest.mark.parametrize("target", TARGET_NAMES)
def test_a_running_conversion_is_released_at_once(target: str, disk: Path, tmp_path: Path) -> None:
    control = imgcore.Control(rate=1)
    thread = threading.Thread(
        target=lambda: imgcore.convert(
            disk, tmp_path / target, control=control, profile=profile_of(target), sync=False
        )
    )
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    control.rate = "2k"
    assert control.rate == 2048
    thread.join(0.1)
    assert thread.is_alive()
    control.rate = None
    thread.join(60)
    assert not thread.is_alive()
    assert (tmp_path / target).exists()


def test_a_new_rate_holds_for_what_runs_already(disk: Path, tmp_path: Path) -> None:
    control = imgcore.Control(rate=1)
    times: list[float] = []

    def change(_: imgcore.Progress) -> None:
        if not times:
            control.rate = "2M"
            times.append(time.monotonic())

    imgcore.convert(disk, tmp_path / "o.raw", control=control, progress=change, sync=False)
    assert time.monotonic() - times[0] >= 0.49


def test_conversions_share_a_control(tmp_path: Path) -> None:
    control = imgcore.Control(rate="2M")
    sources = [tmp_path / "a.raw", tmp_path / "b.raw"]
    for source in sources:
        source.write_bytes(noise(MIB))
    threads = [
        threading.Thread(
            target=imgcore.convert,
            args=(source, source.with_suffix(".qcow2")),
            kwargs={"control": control, "sync": False},
        )
        for source in sources
    ]

    def run() -> None:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert seconds(run) >= 1.0
    # It can be used again, and a pause has not saved up more than one window.
    time.sleep(0.5)
    target = tmp_path / "again.qcow2"
    assert seconds(lambda: imgcore.convert(sources[0], target, control=control)) >= 0.25


@pytest.mark.parametrize("target", TARGET_NAMES)
def test_an_exception_of_the_callback_ends_the_waiting(
    target: str, disk: Path, tmp_path: Path
) -> None:
    class Enough(Exception):
        pass

    def stop(_: imgcore.Progress) -> None:
        raise Enough

    with pytest.raises(Enough):
        imgcore.convert(disk, tmp_path / target, rate=1, progress=stop, profile=profile_of(target))
    assert sorted(tmp_path.iterdir()) == [disk]


@pytest.mark.parametrize(
    ("target", "number"),
    [*((name, signal.SIGTERM) for name in TARGET_NAMES), ("o.qcow2", signal.SIGINT)],
)
def test_a_signal_ends_the_waiting(
    target: str, number: signal.Signals, disk: Path, tmp_path: Path
) -> None:
    line = [sys.executable, "-m", "imgcore", "convert", "-r", "1", "--progress=json"]
    profile = profile_of(target)
    line += ["--profile", profile] if profile else []
    process = subprocess.Popen([*line, disk, tmp_path / target], stderr=subprocess.PIPE)
    assert process.stderr is not None
    process.stderr.readline()  # it waits for its first byte
    process.send_signal(number)
    assert process.wait(30) == 128 + number
    process.stderr.close()
    assert sorted(tmp_path.iterdir()) == [disk]


@pytest.mark.parametrize("rate", [0, -1, "0", "fast", "", 1 << 63, "-5M"])
def test_rates_that_are_refused(rate: int | str, disk: Path, tmp_path: Path) -> None:
    control = imgcore.Control(rate=5)
    with pytest.raises(imgcore.OptionError):
        control.rate = rate
    assert control.rate == 5
    with pytest.raises(imgcore.OptionError):
        imgcore.convert(disk, tmp_path / "o.raw", rate=rate)
    assert sorted(tmp_path.iterdir()) == [disk]


def test_rates_that_are_taken(disk: Path, tmp_path: Path) -> None:
    for rate, nbytes in {
        "1": 1,
        "64k": 65536,
        "1.5M": 3 * MIB // 2,
        7: 7,
        2**63 - 1: 2**63 - 1,
    }.items():
        assert imgcore.Control(rate=rate).rate == nbytes
    assert imgcore.Control().rate is None
    with pytest.raises(TypeError):
        imgcore.Control(rate=1.5)  # type: ignore[arg-type]
    imgcore.convert(disk, tmp_path / "o.raw", rate=2**63 - 1)


def test_a_rate_and_a_control_contradict_each_other(disk: Path, tmp_path: Path) -> None:
    control = imgcore.Control()
    with pytest.raises(imgcore.OptionError, match="set the rate of the control"):
        imgcore.convert(disk, tmp_path / "o.raw", rate="1M", control=control)
    control.rate = "1G"
    imgcore.convert(disk, tmp_path / "o.raw", control=control)
