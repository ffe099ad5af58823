"""Uses each list of changed areas that a fuzzer makes, and checks the outcome."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from imgcore.areas.area import Area
from imgcore.areas.bmap import bmap_of
from imgcore.areas.normal import rounded
from imgcore.areas.qemu_map import map_lines
from imgcore.areas.reading import read_areas
from tests.fuzz.exercise import Finding, attempt

DISK_NBYTES = 1 << 20
_CHECKSUM = re.compile(rb"BmapFileChecksum>\s*([0-9a-f]{64})")


class Folder:
    """A folder in which files are used one after the other."""

    def __init__(self) -> None:
        memory = Path("/dev/shm")
        self._path = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))

    def close(self) -> None:
        """Remove everything."""
        shutil.rmtree(self._path)

    def use(self, data: bytes) -> str:
        """Use one file; return ``ok`` or the name of the exception; see `Place.use`."""
        path = self._path / "areas"
        path.write_bytes(with_checksum(data))
        return attempt(_read, path, None)


def with_checksum(data: bytes) -> bytes:
    """Correct the checksum of a block map, without which a fuzzer gets no further."""
    found = _CHECKSUM.search(data)
    if found is None:
        return data
    zeroed = data.replace(found[1], b"0" * 64)
    return zeroed.replace(b"0" * 64, hashlib.sha256(zeroed).hexdigest().encode(), 1)


def _read(path: str, _: str | None) -> None:
    areas = list(read_areas(path, DISK_NBYTES))
    _require_normal(areas)
    blocks = list(rounded(areas, 4096, DISK_NBYTES))
    _require_normal(blocks)
    if any(area.offset % 4096 or area.length % 4096 for area in blocks):
        raise Finding("areas that are not whole blocks")
    Path(path).write_text("".join(map_lines(areas)))
    if list(read_areas(path, DISK_NBYTES)) != areas:
        raise Finding("a map that was written is not read back")


def _require_normal(areas: list[Area]) -> None:
    if areas and not 0 <= areas[0].offset <= areas[-1].offset + areas[-1].length <= DISK_NBYTES:
        raise Finding("areas outside the disk")
    for area, following in pairwise([*areas, Area(DISK_NBYTES + 1, 1, is_zero=False)]):
        end = area.offset + area.length
        if area.length <= 0 or end > following.offset:
            raise Finding("an empty area, or one inside the next")
        if end == following.offset and area.is_zero == following.is_zero:
            raise Finding("areas that are not joined")


class _Zeros:
    """A disk of zeros, for the checksums of a block map."""

    def readinto(self, offset: int, buffer: memoryview) -> int:
        return len(buffer)


def seeds() -> Iterator[tuple[str, bytes]]:
    """Yield a small list of each kind."""
    areas = [Area(0, 4096, is_zero=False), Area(8192, 4096, is_zero=True)]
    full = '{ "start": 0, "length": 512, "depth": 0, "present": true, "zero": false, "data": true}'
    yield "map", "".join(map_lines(areas)).encode()
    yield "map-lines", f"{full}\n{full.replace(': 0,', ': 512,', 1)}\n".encode()
    yield "map-utf-16", "".join(map_lines(areas)).encode("utf-16")
    yield "empty", b"[]"
    yield "bmap", bmap_of(areas, _Zeros(), DISK_NBYTES).encode()
    half = {"startOffset": 0, "length": 1 << 19, "changedArea": [{"start": 512, "length": 512}]}
    rest = {"_vimtype": "x", "Length": str(1 << 19), "StartOffset": 1 << 19, "ChangedArea": None}
    yield "vmware", json.dumps([half, rest]).encode()
    yield "vmware-lines", f"{json.dumps(half)}\n{json.dumps(rest)}".encode()
    yield "ctk", b"\xa2\x72\x19\xf6\1\0\0\0" + bytes(56)
