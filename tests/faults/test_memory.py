"""Every allocation of the native core and its codecs fails once, with MemoryError."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest

from tests.faults.harness import Place, Source
from tests.helpers import qemu
from tests.helpers.qemu import Variant


@pytest.mark.parametrize(
    "variant",
    [
        qemu.RAW,
        qemu.QCOW2,
        qemu.QCOW2_ZLIB,
        qemu.QCOW2_ZSTD,
        qemu.VMDK_STREAM,
        qemu.VHD_DYNAMIC,
        qemu.VHDX_DYNAMIC,
        qemu.VDI,
    ],
    ids=lambda v: v.name,
)
def test_writing(variant: Variant, place: Callable[[Variant], Place]) -> None:
    here = place(variant)
    here.reset()
    n_failed = 0
    for nth in range(1, 5000):
        answer = here.convert(memory=nth, more={"sync": False})
        if answer["allocations"] < nth:
            assert answer["outcome"] == "ok"
            assert n_failed > 5
            return
        if answer["outcome"] == "ok":  # not needed
            assert here.files() == here.new
            here.reset()
            continue
        n_failed += 1
        assert answer["type"] == "MemoryError", answer
        assert here.files() == here.old
    raise AssertionError("no end of the allocations")


@pytest.mark.parametrize(
    "variant", [qemu.QCOW2_ZLIB, qemu.QCOW2_ZSTD, qemu.VMDK_STREAM], ids=lambda v: v.name
)
def test_reading(variant: Variant, place: Callable[[Variant], Place]) -> None:
    here = place(variant)
    out = here.agent.folder.parent / "out.raw"
    more = {"format": variant.format, "sync": False}
    for nth in range(1, 5000):
        answer = here.agent.convert(here.target, out, qemu.RAW, more=more, memory=nth)
        if answer["allocations"] < nth:
            assert out.read_bytes() == here.source.read_bytes()
            assert nth > 5
            return
        if answer["outcome"] == "ok":
            assert out.read_bytes() == here.source.read_bytes()
            out.unlink()
            continue
        assert answer["type"] == "MemoryError", answer
        assert not out.exists()
    raise AssertionError("no end of the allocations")


@pytest.mark.parametrize(
    "variant",
    [qemu.RAW, qemu.QCOW2, qemu.QCOW2_ZSTD, qemu.VMDK_STREAM],
    ids=lambda v: v.name,
)
def test_reading_ranges(variant: Variant, source: Callable[[Variant], Source]) -> None:
    """A short read, one by several threads, and the short one again."""
    here = source(variant)
    ranges = [[5, 3000], [1, 3_000_000], [5, 3000]]
    right = [hashlib.sha256(here.content[at : at + n]).hexdigest() for at, n in ranges]
    reads = {
        "path": here.image,
        "keywords": {"format": variant.format, "cache": "1M"},
        "phases": [((0, 0, 0), ranges)],
    }
    for nth in range(1, 1000):
        answer = here.place.agent.do("read_ranges", reads, memory=nth)
        assert answer["descriptors"] == 0
        if answer["outcome"] == "ok":  # not needed, or not reached
            assert answer["result"]["phases"] == [right]
            if answer["allocations"] < nth:
                assert nth > 5
                return
        else:
            assert answer["type"] == "MemoryError", answer
    raise AssertionError("no end of the allocations")


@pytest.mark.parametrize("variant", [qemu.QCOW2_ZLIB, qemu.VHDX_DYNAMIC], ids=lambda v: v.name)
def test_allocations_of_the_interpreter(variant: Variant, place: Callable[..., Place]) -> None:
    """A sample of the allocations of Python and NumPy fails.

    NumPy does not survive every failure, so the job runs in a child.  The target is
    never broken, and a run that succeeds has written the new image.
    """
    here = place(variant, PYTHONMALLOC="malloc")
    here.reset()
    total = here.convert(memory=0, of_python=True, more={"sync": False})["allocations"]
    assert total > 100
    n_failed = 0
    for nth in range(1, total, max(1, total // 100)):
        here.reset()
        answer = here.convert(memory=nth, of_python=True, fork=True, more={"sync": False})
        state = here.state(here.files())
        # After the rename only the report can fail.
        assert state == "new" or (state == "old" and answer["outcome"] != "ok"), answer
        n_failed += state == "old"
    assert n_failed > 10
