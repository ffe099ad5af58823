"""The binding: arguments that it rejects, and the core's errors as exceptions."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from tests.helpers.threads import settled_counts

import imgcore
from imgcore import _core, limits
from imgcore._core import Status
from imgcore.disk.random_access import RandomAccess
from imgcore.engine.extents import EXTENT_DTYPE, PLACEMENT_DTYPE, Kind, single
from imgcore.engine.geometry import (
    Codec,
    CodecId,
    DeflateEngine,
    Geometry,
    Placing,
    ZeroPolicy,
)
from imgcore.engine.job import chosen_variants, thread_count, translated_errors
from imgcore.errors import (
    ConversionCancelled,
    CorruptImageError,
    ImgcoreError,
    LimitExceededError,
    OptionError,
)

MIB = 1 << 20

EVERY_VARIANT = [
    pytest.param(operation, row, id=f"{operation}={row['name']}")
    for operation, rows in _core.variants().items()
    for row in rows
]


def identity(nbytes: int) -> Geometry:
    return Geometry(block_nbytes=512, guest_nbytes=nbytes, placing=Placing.IDENTITY)


@pytest.mark.parametrize(("operation", "row"), EVERY_VARIANT)
def test_every_variant_can_be_demanded(operation: str, row: dict[str, object]) -> None:
    name = str(row["name"])
    if not row["runnable"]:
        with pytest.raises(OptionError, match="does not run here"):
            chosen_variants({operation: name})
        return
    data = os.urandom(MIB)
    out = bytearray(MIB)
    job = _core.Job(
        sources=[(_core.File.from_memory(data), MIB, 0, 0)],
        geometry=identity(MIB),
        target=_core.File.from_memory(out, True),
        variants=chosen_variants({operation: name}),
    )
    job.run(0, MIB, single(0, MIB, Kind.DATA))
    assert bytes(out) == data


def test_the_variants_that_this_run_expects_are_there() -> None:
    running = {
        f"{operation}={row['name']}"
        for operation, rows in _core.variants().items()
        for row in rows
        if row["runnable"]
    }
    expected = os.environ.get("IMGCORE_EXPECT_VARIANTS", "zero=portable,crc32c=portable")
    assert set(expected.split(",")) <= running


def test_a_portable_variant_always_runs() -> None:
    for operation, rows in _core.variants().items():
        assert rows[-1]["runnable"], operation
        assert sum(bool(row["default"]) for row in rows) == 1, operation


@pytest.mark.parametrize("demand", [{"zero": "sse9"}, {"sort": "quick"}, {"": ""}])
def test_an_unknown_variant_is_refused(demand: dict[str, str]) -> None:
    with pytest.raises(OptionError, match="no variant"):
        chosen_variants(demand)


def test_the_environment_chooses_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMGCORE_KERNEL", "zero=portable, inflate=isal")
    assert chosen_variants({"inflate": "libdeflate"}) == {
        "zero": "portable",
        "inflate": "libdeflate",
    }


@pytest.mark.parametrize("threads", [0, -1, 257])
def test_thread_counts_out_of_range_are_refused(threads: int) -> None:
    with pytest.raises(OptionError, match="1 to 256"):
        thread_count(threads)


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(np.zeros(1, PLACEMENT_DTYPE), id="another dtype"),
        pytest.param(np.zeros(4, EXTENT_DTYPE)[::2], id="strided"),
        pytest.param(np.zeros((1, 1), EXTENT_DTYPE), id="two dimensions"),
    ],
)
def test_arrays_of_another_shape_are_refused(rows: np.ndarray) -> None:
    job = _core.Job(sources=[], geometry=identity(512), target=_core.File.null())
    with pytest.raises(ValueError):
        job.start(0, 512, rows)


def test_read_only_extents_are_accepted() -> None:
    rows = single(0, 512, Kind.ZERO)
    rows.flags.writeable = False
    job = _core.Job(sources=[], geometry=identity(512), target=_core.File.null())
    job.run(0, 512, rows)
    assert job.progress()[:3] == (512, 0, 512)


@pytest.mark.parametrize(
    ("error", "expected", "text"),
    [
        ((Status.IO, errno.EIO, 4096, 0, "pread"), OSError, "pread at 0x1000"),
        ((Status.IO, errno.ENOSPC, 0, _core.TARGET, "pwrite"), OSError, "No space left on device"),
        ((Status.UNSUPPORTED, 0, 0, _core.NO_SOURCE, "uring"), ImgcoreError, "not available"),
        ((Status.BAD_GRAIN_MARKER, 0, 512, 0, "grain_marker"), CorruptImageError, "grain marker"),
        ((Status.CORRUPT, 0, 512, 0, "decompress"), CorruptImageError, r"a\.img: .*\(at 0x200\)"),
        ((Status.PAST_END, 0, 512, 0, "pread"), CorruptImageError, "ends before 0x200"),
        ((Status.LIMIT, 0, 0, _core.TARGET, "place"), LimitExceededError, "out.img"),
        (
            (Status.TOO_MANY_BAD_RANGES, 0, 512, 0, "salvage"),
            LimitExceededError,
            r"a\.img: more than 65536 .* at 0x200",
        ),
        ((Status.CANCELLED, 0, 0, _core.NO_SOURCE, "cancel"), ConversionCancelled, "cancelled"),
        (
            (Status.INVALID_ARGUMENT, 0, 3, _core.NO_SOURCE, "batch"),
            ImgcoreError,
            "a defect of imgcore, please report it: batch rejected row 3",
        ),
    ],
)
def test_core_errors_get_words_and_names(
    error: tuple[Status, int, int, int, str], expected: type[Exception], text: str
) -> None:
    with pytest.raises(expected, match=text) as caught, translated_errors(["a.img"], "out.img"):
        raise _core.CoreError(*error)
    if isinstance(caught.value, OSError) and error[3] == 0:
        assert caught.value.filename == "a.img"


def test_a_file_that_becomes_shorter_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(8192))
    fd = os.open(path, os.O_RDONLY)
    try:
        source = _core.File.from_fd(fd)
        job = _core.Job(
            sources=[(source, 8192, 0, 0)], geometry=identity(8192), target=_core.File.null()
        )
        os.truncate(path, 4096)
        with pytest.raises(CorruptImageError, match="ends before"), translated_errors([str(path)]):
            job.run(0, 8192, single(0, 8192, Kind.DATA))
    finally:
        os.close(fd)


def slow_job(nbytes: int) -> _core.Job:
    """A job that takes seconds."""
    data = np.random.default_rng(1).integers(0, 8, nbytes, np.uint8)
    geometry = Geometry(
        block_nbytes=65536,
        guest_nbytes=nbytes,
        placing=Placing.APPEND,
        zero_policy=ZeroPolicy.SKIP,
        codec=Codec(CodecId.ZLIB, DeflateEngine.LIBDEFLATE, 12, 15),
    )
    job = _core.Job(
        sources=[(_core.File.from_memory(data), nbytes, 0, 0)],
        geometry=geometry,
        target=_core.File.null(),
        threads=2,
    )
    placements = np.zeros(nbytes // 65536, PLACEMENT_DTYPE)
    job.start(0, nbytes, single(0, nbytes, Kind.DATA), None, placements)
    return job


def test_the_callback_may_raise() -> None:
    job = slow_job(64 * MIB)

    def tick() -> None:
        raise LookupError("enough")

    started = time.monotonic()
    with pytest.raises(LookupError, match="enough"):
        job.wait(tick)
    assert time.monotonic() - started < 2
    assert job.progress()[0] < 64 * MIB


def test_other_work_is_done_meanwhile() -> None:
    job, calls = slow_job(32 * MIB), 0
    ticks: list[int] = []

    def work() -> int:
        nonlocal calls
        calls += 1
        return calls % 3  # with and without a pause

    job.wait(lambda: ticks.append(calls), work)
    assert job.progress()[0] == 32 * MIB
    assert calls > 10 * len(ticks) > 0


def test_other_work_may_raise() -> None:
    job = slow_job(64 * MIB)

    def work() -> int:
        raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        job.wait(None, work)
    assert job.progress()[0] < 64 * MIB


def test_threads_stay_between_batches_and_end_with_the_job() -> None:
    _, before = settled_counts()
    geometry = Geometry(
        block_nbytes=512,
        guest_nbytes=4 * MIB,
        placing=Placing.IDENTITY,
        zero_policy=ZeroPolicy.SKIP,
    )
    wanted = iter([3, 3, 2, 1, 3])
    job = _core.Job(
        sources=[(_core.File.from_memory(bytes(MIB)), MIB, 0, 0)],
        geometry=geometry,
        target=_core.File.null(),
        threads=3,
        batch_threads=lambda: next(wanted),
    )
    found = []
    for _ in range(5):
        job.run(0, MIB, single(0, MIB, Kind.DATA))
        found.append(settled_counts()[1] - before)
    assert found == [3, 3, 2, 0, 3]
    job.close()
    assert settled_counts()[1] == before


def test_progress_never_decreases() -> None:
    job = slow_job(4 * MIB)
    seen: list[int] = []
    job.wait(lambda: seen.append(job.progress()[0]))
    assert seen == sorted(seen)
    assert job.progress()[0] == 4 * MIB


def test_an_interrupt_ends_the_wait() -> None:
    job = slow_job(64 * MIB)
    threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        job.wait()
    with pytest.raises(RuntimeError, match="no batch"):
        job.wait()


def test_a_job_may_be_dropped_while_it_runs() -> None:
    slow_job(64 * MIB).close()
    job = slow_job(64 * MIB)
    with pytest.raises(RuntimeError, match="not been waited for"):
        job.start(0, 512, single(0, 512, Kind.ZERO))
    del job


def test_closed_objects_say_so() -> None:
    file = _core.File.null()
    file.close()
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.next_data(0)
    with pytest.raises(TypeError, match="from_fd"):
        _core.File()
    job = _core.Job(sources=[], geometry=identity(512), target=_core.File.null())
    job.close()
    with pytest.raises(ValueError, match="closed"):
        job.progress()


def test_a_job_keeps_its_files(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(MIB))
    out = bytearray(MIB)
    with path.open("rb") as opened:
        source = _core.File.from_fd(opened.fileno())
        job = _core.Job(
            sources=[(source, MIB, 0, 0)],
            geometry=identity(MIB),
            target=_core.File.from_memory(out, True),
        )
        source.close()
        others = [_core.File.from_fd(opened.fileno()) for _ in range(100)]  # its memory, if free
        for other in others:
            other.close()
        job.run(0, MIB, single(0, MIB, Kind.DATA))
    assert bytes(out) == path.read_bytes()


def test_an_image_that_is_closed_in_the_middle_of_a_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(MIB))
    image = imgcore.open(path)
    rows = RandomAccess.rows

    def close_first(access: RandomAccess, start: int, end: int) -> np.ndarray:
        closer = threading.Thread(target=image.close)
        closer.start()
        closer.join()
        return rows(access, start, end)

    monkeypatch.setattr(RandomAccess, "rows", close_first)
    assert image.read(0, MIB) == path.read_bytes()
    assert image.files[0].fd == -1
    with pytest.raises(ValueError, match=r"disk\.raw: the image is closed"):
        image.read(0, MIB)


def test_the_next_offset_only_grows() -> None:
    geometry = Geometry(block_nbytes=512, guest_nbytes=512)
    job = _core.Job(sources=[], geometry=geometry, target=_core.File.null(), next_offset=4096)
    job.next_offset = 8192
    assert job.next_offset == 8192
    with pytest.raises(_core.CoreError):
        job.next_offset = 4096


@pytest.mark.parametrize("block_nbytes", [4096, 65536, 2 * MIB, 4 * MIB, 32 * MIB])
@pytest.mark.parametrize("threads", [1, 3])
def test_blocks_over_old_bytes(block_nbytes: int, threads: int) -> None:
    """What of a block is not data is zeroed, also past the end of the disk."""
    nbytes = 70 * MIB + 1536
    data = np.zeros(nbytes, np.uint8)
    for start, end in ((5000, 9000), (10 * MIB, 11 * MIB), (39 * MIB, 39 * MIB + 512), (-9, None)):
        data[start:end] = 0x77
    target = np.full(nbytes + 2 * block_nbytes, 0xEE, np.uint8)
    geometry = Geometry(block_nbytes=block_nbytes, guest_nbytes=nbytes).over_old_bytes
    holes = [(0, 4096), (4096, 10 * MIB), (10 * MIB, 40 * MIB), (40 * MIB, nbytes)]
    kinds = (Kind.HOLE, Kind.DATA, Kind.DATA, Kind.DATA)
    rows = np.concatenate(
        [
            single(start, end - start, kind, host_offset=start if kind is Kind.DATA else 0)
            for (start, end), kind in zip(holes, kinds, strict=True)
        ]
    )
    job = _core.Job(
        sources=[(_core.File.from_memory(data), nbytes, 0, 0)],
        geometry=geometry,
        target=_core.File.from_memory(target, writable=True),
        next_offset=0,
        threads=threads,
    )
    placements = np.zeros(-(-nbytes // block_nbytes), PLACEMENT_DTYPE)
    job.run(0, nbytes, rows, None, placements)
    whole = np.zeros(len(placements) * block_nbytes, np.uint8)
    whole[:nbytes] = data
    for number, placement in enumerate(placements.tolist()):
        block = whole[number * block_nbytes : (number + 1) * block_nbytes]
        assert bool(placement[1]) == block.any()
        if placement[1]:
            assert (target[placement[0] : placement[0] + block_nbytes] == block).all()


def test_stored_blocks_have_their_prefix_before_them() -> None:
    data = np.arange(2 * MIB, dtype=np.uint32).view(np.uint8)
    target = np.zeros(len(data) + 4 * 4096, np.uint8)
    geometry = Geometry(
        block_nbytes=2 * MIB,
        guest_nbytes=len(data),
        stored_alignment=4096,
        stored_prefix_nbytes=512,
    )
    job = _core.Job(
        sources=[(_core.File.from_memory(data), len(data), 0, 0)],
        geometry=geometry,
        target=_core.File.from_memory(target, writable=True),
        next_offset=1024,
        threads=2,
    )
    placements = np.zeros(4, PLACEMENT_DTYPE)
    job.run(0, len(data), single(0, len(data), Kind.DATA), None, placements)
    places = [4096 + k * (2 * MIB + 4096) for k in range(4)]
    assert placements["host_offset"].tolist() == places
    for k, place in enumerate(places):
        block = data[k * 2 * MIB : (k + 1) * 2 * MIB]
        assert (target[place - 512 : place] == 0xFF).all()
        assert (target[place : place + 2 * MIB] == block).all()


@pytest.mark.parametrize("nbytes", [0, 1, 15, 16, 17, 4096])
def test_is_zero(nbytes: int) -> None:
    data = bytearray(nbytes)
    assert _core.is_zero(data)
    for at in {0, nbytes // 2, nbytes - 1} & set(range(nbytes)):
        data[at] = 1
        assert not _core.is_zero(data)
        data[at] = 0


def test_crc32c_is_castagnoli() -> None:
    assert _core.crc32c(b"123456789") == 0xE3069283
    assert _core.crc32c(b"6789", _core.crc32c(b"12345")) == 0xE3069283


def test_both_sides_have_the_same_limits() -> None:
    assert limits.MAX_THREADS == _core.MAX_THREADS
