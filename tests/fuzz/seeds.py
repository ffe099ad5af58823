"""Small valid images of every format and kind, from which a fuzzer starts.

``python -m tests.fuzz.seeds FOLDER`` writes them, packed.
"""

from __future__ import annotations

import gzip
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import zstandard

from tests.fuzz.pieces import Pieces
from tests.helpers import vdi, vhd, vhdx, vmdk
from tests.helpers.vhd import Block
from tests.hostile import chains, qcow2
from tests.hostile.case import pattern

Make = Callable[[Path], Path]
THIN = pattern(96)
CLUSTER = THIN + bytes(qcow2.CLUSTER - len(THIN))


def _qcow2() -> Iterator[tuple[str, bytes]]:
    small = {"data": CLUSTER * 2}
    yield "plain", qcow2.build(**small)
    yield "v2", qcow2.build(**small, version=2)
    yield "zeros", qcow2.build({0: 1, 1: qcow2.DATA | 1 << 63 | 1}, data=CLUSTER)
    stream = qcow2.deflate(CLUSTER)
    yield "deflate", qcow2.build({0: qcow2.packed(qcow2.DATA, len(stream))}, data=stream)
    frame = zstandard.compress(CLUSTER)
    entry = {0: qcow2.packed(qcow2.DATA, len(frame))}
    yield "zstd", qcow2.build(entry, data=frame, incompatible=8, compression=1)
    yield "backed", qcow2.build({}, data=b"", extensions=chains.RAW, backing=b"base.raw")
    yield "upon-qcow2", qcow2.build({}, data=b"", extensions=chains.QCOW2, backing=b"base.qcow2")
    row = struct.pack(">QIHHIIQII", qcow2.L1, 1, 1, 4, 1, 2, 3, 0, 24) + bytes(24) + b"1name"
    at = qcow2.DATA + 2 * qcow2.CLUSTER
    yield "snapshot", qcow2.build(**small, tail=row, n_snapshots=1, snapshots_offset=at)
    row = struct.pack(">QIIBBHI", qcow2.DATA, 1, 2, 1, 16, 4, 0) + b"bits"
    bitmaps = qcow2.extension(0x23852875, 24, struct.pack(">IIQQ", 1, 0, len(row), at))
    yield "bitmaps", qcow2.build(**small, tail=row, extensions=bitmaps, autoclear=1)
    table, bits = at + qcow2.CLUSTER, at + 2 * qcow2.CLUSTER
    row = struct.pack(">QIIBBHI", table, 1, 2, 1, 9, 4, 0) + b"bits"
    bitmaps = qcow2.extension(0x23852875, 24, struct.pack(">IIQQ", 1, 0, len(row), at))
    tail = b"".join(
        part.ljust(qcow2.CLUSTER, b"\0") for part in (row, bits.to_bytes(8, "big"), b"\x5a\xf0")
    )
    yield "marked", qcow2.build(**small, tail=tail, extensions=bitmaps, autoclear=1)


def _vmdk() -> Iterator[tuple[str, Make]]:
    grains = {0: THIN, 2: THIN}
    yield "hosted", lambda folder: vmdk.hosted(folder / "a", 512, grains)
    yield "zeroed", lambda folder: vmdk.hosted(folder / "a", 512, {0: THIN, 1: 1}, flags=7)
    for kind in ("footer", "patched", "front"):
        yield (
            kind,
            lambda folder, kind=kind: vmdk.stream(
                folder / "a",
                500,
                {n: g.ljust(vmdk.GRAIN, b"\0") for n, g in grains.items()},
                layout=kind,
            ),
        )

    def text(*lines: str, extra: str = "", parent: str = "ffffffff") -> Make:
        def make(folder: Path) -> Path:
            (folder / "a").write_bytes(
                vmdk.descriptor("custom", *lines, extra=extra, parent=parent)
            )
            return folder / "a"

        return make

    yield "flat", text('RW 8 FLAT "flat.bin" 0', "RW 9 ZERO", 'RW 4 VMFS "flat.bin" 4')
    yield "sparse", text('RW 256 SPARSE "base.vmdk"')
    yield "delta", text("RW 256 ZERO", extra='parentFileNameHint="base.vmdk"', parent="12345678")
    yield "encoding", text('RW 8 FLAT "flat.bin" 0', extra='encoding="windows-1252"')


def _vhd() -> Iterator[tuple[str, Make]]:
    blocks = {0: Block(THIN), 1: Block(THIN, frozenset({0, 3}))}
    name = "p.vhd".encode("utf-16-le")
    yield "dynamic", lambda folder: vhd.dynamic(folder / "a", 16384, blocks)
    yield "fixed", lambda folder: vhd.fixed(folder / "a", THIN + bytes(16384 - len(THIN)))
    yield "child", lambda folder: vhd.differencing(folder / "a", 16384, blocks, {b"W2ru": name})
    url = {b"MacX": b"file://./p.vhd", b"W2ku": "C:\\p.vhd".encode("utf-16-le")}
    yield "child-url", lambda folder: vhd.differencing(folder / "a", 16384, blocks, url)


def _vhdx() -> Iterator[tuple[str, Make]]:
    block = THIN + bytes(vhdx.MIB - len(THIN))
    blocks = {0: (vhdx.FULL, block), 1: (vhdx.ZERO, b"")}
    guid = vhdx.guid(9)
    sector = THIN + bytes(4096 - len(THIN))
    entry = vhdx.log_entry(
        5, 0, [(4 * vhdx.MIB, sector), (4 * vhdx.MIB + 8192, 4096)], log_guid=guid
    )
    second = vhdx.log_entry(6, 0, [(4 * vhdx.MIB + 4096, sector)], log_guid=guid)
    images = {
        "dynamic": vhdx.Vhdx(2 * vhdx.MIB, blocks=blocks),
        "sectors-4096": vhdx.Vhdx(vhdx.MIB, blocks={0: (vhdx.FULL, block)}, logical=4096),
        "child": vhdx.Vhdx(
            vhdx.MIB,
            blocks={0: (vhdx.PARTIAL, block)},
            own_sectors={0: {0, 9}},
            locator=vhdx.child_locator(),
            data_guid=vhdx.guid(7),
        ),
        "log": vhdx.Vhdx(vhdx.MIB, blocks={0: (vhdx.FULL, block)}, log_guid=guid, log=entry),
        "log-of-two": vhdx.Vhdx(
            vhdx.MIB, blocks={0: (vhdx.FULL, block)}, log_guid=guid, log=entry + second
        ),
    }
    for name, image in images.items():
        yield name, lambda folder, image=image: image.write(folder / "a")


def _vdi() -> Iterator[tuple[str, Make]]:
    def thin(*entries: int, **fields: object) -> Make:
        def make(folder: Path) -> Path:
            path = vdi.make(folder / "a", entries, block=65536, **fields)  # type: ignore[arg-type]
            head, data = path.read_bytes()[: vdi.DATA_OFFSET], path.read_bytes()[vdi.DATA_OFFSET :]
            path.write_bytes(head + (THIN + bytes(len(data)))[: len(data)])
            return path

        return make

    yield "dynamic", thin(0, vdi.FREE, 1, vdi.ZERO)
    yield "fixed", thin(0, 1, image_type=2)
    yield "child", thin(vdi.FREE, image_type=4, uuids=vdi.IDS[:4])


def seeds() -> Iterator[tuple[str, Pieces]]:
    """Yield (name, image)."""
    for name, content in _qcow2():
        yield f"qcow2-{name}", Pieces.of(content, "qcow2")
    made = {"vmdk": _vmdk(), "vhd": _vhd(), "vhdx": _vhdx(), "vdi": _vdi()}
    for format, images in made.items():
        for name, make in images:
            with tempfile.TemporaryDirectory() as folder:
                yield f"{format}-{name}", Pieces.of(make(Path(folder)).read_bytes(), format)
    yield "raw", Pieces.of(THIN + bytes(4000), "raw")
    yield "any-qcow2", Pieces.of(qcow2.build(data=CLUSTER * 2), None)
    yield "any-gzip", Pieces.of(gzip.compress(THIN, mtime=0), None)
    yield "any-zstd", Pieces.of(zstandard.compress(THIN), None)


def main(folder: Path) -> None:
    """Write the seeds."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in seeds():
        (folder / name).write_bytes(image.pack())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
