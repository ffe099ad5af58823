"""Images of 1 TiB change their format in place, by writing tables only.

The cost is counted: bytes written, bytes of guest data read, and memory.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

import imgcore
from tests.helpers import qemu
from tests.helpers.images import GIB, KIB, MIB
from tests.helpers.mounts import make_file_system, mounted
from tests.helpers.rewrite_pairs import (
    TO_QCOW2,
    TO_VDI,
    TO_VHDX,
    TO_VMDK,
    Becomes,
    qemu_imgs,
    qemu_name,
)
from tests.helpers.stand_ins import TIB, StandIn, assert_marks

TO_QCOW2_1M: Final = Becomes("qcow2-1M", "qcow2", ("cluster_size=1M",))
TO_VHDX_2M: Final = Becomes("vhdx-2M", "vhdx", ("block_size=2M",))
TO_VHDX_32M: Final = Becomes("vhdx-32M", "vhdx", ("block_size=32M",))
MEMORY_NBYTES: Final = 256 * MIB

# The tables of 1 TiB that is allocated in full, in bytes.  VHDX has three regions of 1
# MiB at least; the map of a VDI is not appended, but overwrites the front.
TABLES_NBYTES: Final = {
    "qcow2-64k": 161 * MIB,
    "qcow2-1M": 13 * MIB,
    "vmdk": 129 * MIB,
    "vhdx-1M": 11 * MIB,
    "vhdx-2M": 7 * MIB,
    "vhdx-32M": 4 * MIB,
    "vdi": 0,
}


class Job(NamedTuple):
    """An image and what becomes of it; what has to move, at most."""

    source: StandIn
    target: Becomes
    moved_nbytes: int = 0

    @property
    def name(self) -> str:
        return f"{self.source.name}-to-{self.target.name}"


_RAW: Final = StandIn("raw", 32 * MIB)
_VHDX_32M: Final = StandIn("vhdx", 32 * MIB, True, 32 * MIB)
_VHDX_1M: Final = StandIn("vhdx", MIB, True, MIB)
_QCOW2_PIECES_64K: Final = StandIn("qcow2", 64 * KIB, True, 64 * KIB)
_QCOW2_PIECES_1M: Final = StandIn("qcow2", MIB, True, 64 * KIB)
_QCOW2_1M: Final = StandIn("qcow2", MIB, True, MIB)
_QCOW2_2M: Final = StandIn("qcow2", 32 * MIB, True, 2 * MIB)
_VMDK_PIECES_64K: Final = StandIn("vmdk", 64 * KIB, True, 64 * KIB)
_VMDK_PIECES_1M: Final = StandIn("vmdk", MIB, True, 64 * KIB)
_VDI: Final = StandIn("vdi", MIB, True, MIB)

JOBS: Final = (
    *(Job(_VHDX_32M, to) for to in (TO_QCOW2, TO_QCOW2_1M, TO_VMDK)),
    *(Job(_VHDX_1M, to) for to in (TO_QCOW2, TO_QCOW2_1M, TO_VMDK)),
    # The map of a VDI takes 5 MiB in front.
    *(Job(source, TO_VDI, 5 * MIB) for source in (_VHDX_32M, _VHDX_1M, _QCOW2_1M)),
    Job(_QCOW2_PIECES_64K, TO_VMDK),
    Job(_QCOW2_PIECES_1M, TO_VMDK),
    Job(StandIn("qcow2", 64 * KIB, False, 64 * KIB), TO_VMDK),
    *(Job(_QCOW2_1M, to) for to in (TO_VHDX, TO_VMDK)),
    Job(_QCOW2_2M, TO_VHDX_2M),
    Job(_VMDK_PIECES_64K, TO_QCOW2),
    Job(_VMDK_PIECES_1M, TO_QCOW2),
    *(Job(_VDI, to) for to in (TO_QCOW2, TO_QCOW2_1M, TO_VHDX, TO_VMDK)),
)
RAW_JOBS: Final = (
    Job(_RAW, TO_QCOW2, MIB),
    Job(_RAW, TO_QCOW2_1M, MIB),
    Job(_RAW, TO_VMDK, MIB),
    Job(_RAW, TO_VHDX, MIB),
    Job(_RAW, TO_VHDX_32M, 32 * MIB),
    Job(_RAW, TO_VDI, 5 * MIB),
)


def _params(jobs: tuple[Job, ...]) -> list[Any]:
    return [pytest.param(job, id=job.name) for job in jobs]


@pytest.fixture(scope="module", params=["ext4", "xfs"])
def file_system(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp(request.param)
    image = make_file_system(request.param, folder / "image", 200 * GIB)
    with mounted(image, folder / "mounted", "-o", "loop") as top:
        yield top


# Prints the result, and the largest memory of this process alone.
_REWRITE: Final = """
import json, sys, imgcore
path, form, options = sys.argv[1], sys.argv[2], sys.argv[3:]
is_raw = path.endswith(".raw")
result = imgcore.rewrite(path, form, options=options, format="raw" if is_raw else None)
with open("/proc/self/status") as status:
    peak = next(line.split()[1] for line in status if line.startswith("VmHWM:"))
print(json.dumps({**result._asdict(), "peak": int(peak) * 1024}))
"""

_CALLS: Final = "read,pread64,readv,preadv,preadv2,write,pwrite64,writev,pwritev,pwritev2,"
_COPIES: Final = "copy_file_range,sendfile,splice,io_uring_setup"
_TRACED: Final = re.compile(r"^(?P<call>\w+)\(\d+<(?P<path>[^>]*)>(?P<rest>.*)\) += (?P<n>\d+)$")


class Traffic(NamedTuple):
    """What a command read and wrote of an image and its journal, in bytes."""

    data_read: int
    written: int


def traffic(trace: str, folder: Path, data_start: int, data_end: int) -> Traffic:
    """Count calls; reads count where they touch the old image's data."""
    data_read = written = 0
    for line in trace.splitlines():
        call = _TRACED.match(line)
        if call is None or not call["path"].startswith(str(folder)):
            continue
        nbytes = int(call["n"])
        kind = call["call"].removeprefix("p").rstrip("v264")
        assert kind in ("read", "write"), line
        if kind == "write":
            written += nbytes
        elif call["call"].startswith("p"):
            # The offset is last, but for the flags of preadv2.
            words = call["rest"].split(", ")
            low = int(words[-2 if call["call"] == "preadv2" else -1])
            data_read += max(0, min(low + nbytes, data_end) - max(low, data_start))
        else:
            assert "journal" in call["path"], f"a read without an offset: {line}"
    return Traffic(data_read, written)


def rewrite(path: Path, job: Job, data_start: int) -> tuple[dict[str, Any], Traffic]:
    """Rewrite an image in a process of its own, and count what it reads and writes."""
    words = [sys.executable, "-c", _REWRITE, str(path), job.target.format, *job.target.options]
    strace, folder = shutil.which("strace"), path.parent.parent / "traces"
    if strace is None:
        pytest.skip("strace is not installed")
    folder.mkdir()
    strace_words = [strace, "-ff", "--seccomp-bpf", "-y", "-s", "0", "-o", str(folder / "trace")]
    done = qemu.checked([*strace_words, "-e", f"trace={_CALLS}{_COPIES}", *words])
    result: dict[str, Any] = json.loads(done.stdout)
    text = "".join(trace.read_text() for trace in sorted(folder.iterdir()))
    shutil.rmtree(folder)
    assert "io_uring_setup" not in text, "reads by io_uring are not in the trace"
    return result, traffic(text, path.parent, data_start, data_start + job.source.data_nbytes)


def data_start(path: Path, source: StandIn) -> int:
    """Return where the first piece of a stand-in is."""
    if source.format == "raw":
        return 0
    with imgcore.open(path) as image:
        rows = next(iter(image.extents(0, source.piece_nbytes)))
        return int(rows["host_offset"][0]) - source.host_offset(0, 0)


def stays_in_place(job: Job, folder: Path) -> None:
    path = job.source.make(folder / f"disk.{job.source.format}")
    marks = job.source.marks()
    start, old_nbytes = data_start(path, job.source), path.stat().st_size
    result, counted = rewrite(path, job, start)
    print(
        f"\n{job.name}: {result['seconds']:.2f} s, written {counted.written / MIB:.1f} MiB, "
        f"moved {result['bytes_moved'] / MIB:.2f}, data read {counted.data_read / MIB:.2f}, "
        f"tables {result['bytes_tables'] / MIB:.1f}, overwritten "
        f"{result['bytes_overwritten'] / MIB:.2f}, peak {result['peak'] / MIB:.0f} MiB"
    )
    target = Path(result["path"])
    assert_marks(target, qemu_name(job.target.format), marks)
    assert result["virtual_size"] == TIB
    assert result["bytes_moved"] <= job.moved_nbytes
    assert result["bytes_stayed"] + result["bytes_moved"] >= job.source.data_nbytes
    assert result["bytes_tables"] <= TABLES_NBYTES[job.target.name]
    overwritten = result["bytes_overwritten"]
    # The journal has what is overwritten twice, before and after.
    allowed = TABLES_NBYTES[job.target.name] + result["bytes_moved"] + 3 * overwritten + MIB
    assert counted.written <= allowed
    # The journal reads what is overwritten, which may be where data was.
    assert counted.data_read <= result["bytes_moved"] + 3 * overwritten
    assert result["peak"] <= MEMORY_NBYTES
    assert target.stat().st_size <= old_nbytes + allowed
    assert imgcore.check(target, format=job.target.format).corruptions == 0
    qemu.checked([qemu_imgs()[0], "check", "-f", qemu_name(job.target.format), str(target)])
    assert Path(imgcore.undo_rewrite(target)) == path
    assert path.stat().st_size == old_nbytes
    assert_marks(path, job.source.format, marks)


@pytest.mark.slow
@pytest.mark.rewriting
@pytest.mark.parametrize("job", _params(JOBS))
def test_data_stays(job: Job, here: Path) -> None:
    stays_in_place(job, here)


@pytest.mark.slow
@pytest.mark.rewriting
@pytest.mark.parametrize("job", _params(RAW_JOBS))
def test_data_of_a_raw_disk_stays(job: Job, here: Path) -> None:
    stays_in_place(job, here)


@pytest.mark.parametrize("job", _params((Job(_VHDX_32M, TO_VDI, 5 * MIB), Job(_VDI, TO_VHDX))))
def test_a_few_stay(job: Job, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    stays_in_place(job, tmp_path / "images")
