"""Differencing VHDs: how a parent is named, found, verified and written."""

from __future__ import annotations

import logging
import os
import struct
from pathlib import Path

import pytest
from tests.helpers import vhd
from tests.helpers.images import MIB, noise, text
from tests.helpers.reading import poke
from tests.helpers.vhd import Block, be32

import imgcore
from imgcore import CorruptImageError, LimitExceededError, OptionError, WrongFormatError
from imgcore.formats.api import BackingReference
from imgcore.formats.vhd.parent import parent_fields

BLOCK = 8192
SECTOR = vhd.SECTOR
SIZE = 2 * BLOCK
OWN = Block(noise(BLOCK, 1), frozenset({1, 2, 9}))


def utf16(text: str) -> bytes:
    return text.encode("utf-16-le")


def parent(folder: Path, name: str = "p.vhd", **fields: object) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    fields = {"uuid": vhd.PARENT_UUID} | fields
    return vhd.fixed(folder / name, noise(SIZE), **fields)


def child(folder: Path, locators: dict[bytes, bytes] | None = None, **fields: object) -> Path:
    locators = {b"W2ru": utf16(".\\p.vhd")} if locators is None else locators
    return vhd.differencing(
        folder / "c.vhd", SIZE, {0: OWN}, locators, block_nbytes=BLOCK, **fields
    )


def content() -> bytes:
    """Return the content of the child."""
    expected = bytearray(noise(SIZE))
    assert OWN.bits is not None
    for sector in OWN.bits:
        place = slice(sector * SECTOR, (sector + 1) * SECTOR)
        expected[place] = OWN.data[place]
    return bytes(expected)


def read(path: Path, **arguments: object) -> bytes:
    with imgcore.open(path, **arguments) as image:  # type: ignore[arg-type]
        return image.read(0, image.virtual_size)


@pytest.mark.parametrize(
    "locators",
    [
        {b"W2ru": utf16(".\\p.vhd")},
        {b"W2ru": utf16("p.vhd")},
        {b"W2ru": utf16("p.vhd\0\0")},
        {b"W2ku": utf16("C:\\vm\\p.vhd")},
        {b"W2ku": utf16("\\\\server\\share\\p.vhd")},
        {b"MacX": b"file://./p.vhd"},
        {b"MacX": b"file://p.vhd"},
        {b"MacX": b"file://localhost/Users/me/p.vhd"},
        {b"MacX": b"file:///Users/me/%70.vhd"},
        {b"MacX": b"file:///Users/me/", b"W2ru": utf16("p.vhd")},
        {b"W2ru": utf16(".\\gone.vhd"), b"W2ku": utf16("D:\\p.vhd")},
        {b"W2ku": utf16("C:\\vm\\gone.vhd"), b"MacX": b"file://./p.vhd"},
        {b"Mac ": b"\x01\x02", b"Wi2r": b"x", b"W2ru": utf16("p.vhd")},
    ],
    ids=lambda locators: "+".join(code.decode() for code in locators),
)
def test_locators(tmp_path: Path, locators: dict[bytes, bytes]) -> None:
    parent(tmp_path)
    assert read(child(tmp_path, locators)) == content()


@pytest.mark.parametrize("name", ["p.vhd", "C:\\vm\\p.vhd"])
def test_name_in_the_header(tmp_path: Path, name: str) -> None:
    parent(tmp_path)
    assert read(child(tmp_path, {}, parent_name=name)) == content()


def test_a_damaged_name_in_the_header(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    parent(tmp_path)
    path = vhd.poke_sound(child(tmp_path), (512 + 64, b"\xd8\x00\x00\x41"))
    assert read(path) == content()
    assert "parent's name" in caplog.text


def test_relative_name_comes_first(tmp_path: Path) -> None:
    parent(tmp_path / "disks")
    parent(tmp_path, uuid=vhd.UUID)
    locators = {b"W2ku": utf16("C:\\p.vhd"), b"W2ru": utf16(".\\disks\\p.vhd")}
    assert read(child(tmp_path, locators)) == content()


def test_letters_beyond_ascii(tmp_path: Path) -> None:
    parent(tmp_path, "größe 木.vhd")
    assert read(child(tmp_path, {b"W2ru": utf16(".\\größe 木.vhd")})) == content()
    encoded = b"file://./gr%C3%B6%C3%9Fe%20%E6%9C%A8.vhd"
    assert read(child(tmp_path, {b"MacX": encoded})) == content()


def test_absolute_url_of_an_allowed_folder(tmp_path: Path) -> None:
    path = parent(tmp_path / "elsewhere")
    folder = tmp_path / "child"
    folder.mkdir()
    made = child(folder, {b"MacX": f"file://{path}".encode()})
    with pytest.raises(imgcore.UnsafeReferenceError, match="--allow"):
        read(made)
    assert read(made, allow=[tmp_path / "elsewhere"]) == content()


def test_parent_given(tmp_path: Path) -> None:
    path = parent(tmp_path / "elsewhere", "other.vhd")
    made = child(tmp_path)
    with pytest.raises(FileNotFoundError):
        read(made)
    assert read(made, parent=path) == content()


def test_parent_of_another_uuid(tmp_path: Path) -> None:
    parent(tmp_path, uuid=vhd.UUID)
    made = child(tmp_path)
    match = "parent with UUID f0e0d0c0-b0a0-9080-7060-504030201000, .*p.vhd has 00112233-4455"
    with pytest.raises(CorruptImageError, match=match):
        read(made)
    with pytest.raises(CorruptImageError, match=match):
        read(made, parent=tmp_path / "p.vhd")


def test_parent_of_another_format(tmp_path: Path) -> None:
    (tmp_path / "p.vhd").write_bytes(noise(SIZE))
    with pytest.raises(WrongFormatError):
        read(child(tmp_path))


def test_parent_without_uuid_may_be_raw(tmp_path: Path) -> None:
    (tmp_path / "p.raw").write_bytes(noise(SIZE))
    made = child(tmp_path, {b"MacX": b"file://./p.raw"}, parent_uuid=bytes(16))
    with pytest.raises(WrongFormatError, match="without its format"):
        read(made)
    assert read(made, backing_format="raw") == content()


def test_time_of_modification(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = parent(tmp_path)
    os.utime(path, (946684800 + 500, 946684800 + 500))
    made = child(tmp_path, parent_timestamp=500)
    assert read(made) == content()
    assert caplog.records == []
    os.utime(path, (946684800 + 501, 946684800 + 501))
    with caplog.at_level(logging.WARNING, "imgcore"):
        assert read(made) == content()
    assert "the modification time of its parent" in caplog.text


def test_no_name_at_all(tmp_path: Path) -> None:
    with pytest.raises(CorruptImageError, match="does not name its parent"):
        read(child(tmp_path, {}))


@pytest.mark.parametrize(
    ("locators", "error", "match"),
    [
        ({b"W2ru": b"p\xd8."}, CorruptImageError, "W2ru locator is not valid UTF-16-LE"),
        ({b"MacX": b"file://./\xff.vhd"}, CorruptImageError, "MacX locator is not valid UTF-8"),
        (
            {b"MacX": b"file://./%FF.vhd"},
            CorruptImageError,
            "MacX parent locator is not valid UTF-8",
        ),
        ({b"MacX": b"http://host/p.vhd"}, CorruptImageError, "does not name its parent"),
        ({b"W2ru": b""}, CorruptImageError, "does not name its parent"),
    ],
)
def test_unreadable_names(
    tmp_path: Path, locators: dict[bytes, bytes], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        read(child(tmp_path, locators))


@pytest.mark.parametrize(
    "locators",
    [
        {b"W2ku": b"p\xd8."},
        {b"MacX": b"file://./\xff.vhd"},
        {b"MacX": b"file://./%FF.vhd"},
        {b"W2ru": utf16("p.vhd") + b"\0"},
    ],
)
def test_an_unreadable_name_where_another_serves(
    tmp_path: Path, locators: dict[bytes, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    parent(tmp_path)
    path = child(tmp_path, locators, parent_name="p.vhd")
    assert read(path) == content()
    assert "trying the other names of the parent" in caplog.text
    assert imgcore.info(path)["format-specific"]["data"]["parent-names"]


def test_what_follows_a_names_end_is_nobodys(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parent(tmp_path)
    path = child(tmp_path, {b"W2ru": utf16("p.vhd\0") + b"\x00\xd8x"}, parent_name="p.vhd")
    # A lone surrogate after the name in the header.
    vhd.poke_sound(path, (512 + 64 + 2 * len("p.vhd\0"), b"\xd8\x00\x00x"))
    assert read(path) == content()
    assert not caplog.records


# Offsets of the length and the place of the first locator.
LENGTH, PLACE = 512 + 576 + 8, 512 + 576 + 16


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ((LENGTH, be32(65537)), LimitExceededError, "65537 bytes, at most 65536 are allowed"),
        ((LENGTH, be32(65536)), CorruptImageError, "past the end of the file"),
        ((LENGTH, be32(0xFFFFFFFF)), LimitExceededError, "at most 65536 are allowed"),
        ((PLACE, b"\xff" * 8), CorruptImageError, "past the end of the file"),
    ],
)
def test_locator_bounds(
    tmp_path: Path, change: tuple[int, bytes], error: type[Exception], match: str
) -> None:
    parent(tmp_path)
    with pytest.raises(error, match=match):
        read(vhd.poke_sound(child(tmp_path), change))


def test_loop(tmp_path: Path) -> None:
    """Two children that name each other, each with the other's UUID."""
    for own, other, own_uuid, other_uuid in (
        ("a.vhd", "b.vhd", vhd.UUID, vhd.PARENT_UUID),
        ("b.vhd", "a.vhd", vhd.PARENT_UUID, vhd.UUID),
    ):
        vhd.differencing(
            tmp_path / own,
            SIZE,
            {},
            {b"W2ru": utf16(other)},
            parent_uuid=other_uuid,
            footer_fields={"uuid": own_uuid},
        )
    with pytest.raises(CorruptImageError, match="leads back to"):
        read(tmp_path / "a.vhd")


class TestWriting:
    def test_a_name_that_is_not_utf_8(self, tmp_path: Path) -> None:
        _, raw = self.make(tmp_path)
        name = os.fsdecode(b"p\xff.vhd")
        os.link(tmp_path / "p.vhd", tmp_path / name)
        with pytest.raises(OptionError, match="is not UTF-8"):
            self.child(raw, tmp_path / "c.vhd", name)
        assert not (tmp_path / "c.vhd").exists()

    def make(self, folder: Path, subformat: str = "dynamic") -> tuple[bytes, Path]:
        folder.mkdir(exist_ok=True, parents=True)
        old = text(5 * MIB) + bytes(2 * MIB) + noise(MIB + SECTOR)
        (folder / "old.raw").write_bytes(old)
        imgcore.convert(
            folder / "old.raw", folder / "p.vhd", options=[f"subformat={subformat}"], sync=False
        )
        new = bytearray(old)
        new[100:110] = b"something!"
        new[2 * MIB : 2 * MIB + 4096] = bytes(4096)
        new[-SECTOR:] = bytes(SECTOR)
        (folder / "new.raw").write_bytes(new)
        return bytes(new), folder / "new.raw"

    def child(self, raw: Path, target: Path, name: str = "p.vhd", **more: object) -> Path:
        imgcore.convert(
            raw,
            target,
            backing=name,
            backing_format="vhd",
            sync=False,
            force=True,
            **more,  # type: ignore[arg-type]
        )
        return target

    @pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
    def test_only_what_differs(self, tmp_path: Path, subformat: str) -> None:
        new, raw = self.make(tmp_path, subformat)
        path = self.child(raw, tmp_path / "c.vhd")
        assert read(path) == new
        report = imgcore.check(path)
        assert report.ok
        assert (report.total_clusters, report.allocated_clusters) == (5, 3)
        assert imgcore.info(path)["format-specific"]["data"]["subformat"] == "differencing"

    def test_headers(self, tmp_path: Path) -> None:
        _, raw = self.make(tmp_path)
        os.utime(tmp_path / "p.vhd", (946684800 + 77, 946684800 + 77))
        data = imgcore.info(self.child(raw, tmp_path / "c.vhd"))["format-specific"]["data"]
        theirs = imgcore.info(tmp_path / "p.vhd")["format-specific"]["data"]
        assert data["parent-uuid"] == theirs["uuid"]
        assert data["parent-timestamp"] == 946684800 + 77
        assert data["parent-names"] == [
            {"locator": "MacX", "name": "file://./p.vhd"},
            {"locator": "W2ku", "name": ".\\p.vhd"},
            {"locator": "W2ru", "name": ".\\p.vhd"},
            {"locator": "header", "name": "p.vhd"},
        ]

    def test_locators_lie_behind_the_batmap(self, tmp_path: Path) -> None:
        new, raw = self.make(tmp_path)
        path = self.child(raw, tmp_path / "c.vhd", options=["batmap=on"])
        assert read(path) == new
        assert imgcore.check(path).ok
        head = path.read_bytes()[:8192]
        assert head[2048:2056] == b"tdbatmap"
        rows = [struct.unpack_from(">4sIIIQ", head, 512 + 576 + 24 * i) for i in range(3)]
        assert [row[0] for row in rows] == [b"MacX", b"W2ku", b"W2ru"]
        assert all(row[1] == SECTOR and row[4] >= 3072 and row[4] % SECTOR == 0 for row in rows)

    @pytest.mark.parametrize("how", ["absolute", "up", "dotted"])
    def test_where_the_parent_is(self, tmp_path: Path, how: str) -> None:
        new, raw = self.make(tmp_path / "base")
        folder = tmp_path / "child" if how == "up" else tmp_path / "base"
        folder.mkdir(exist_ok=True)
        name = {
            "absolute": str(tmp_path / "base" / "p.vhd"),
            "up": "../base/p.vhd",
            "dotted": "./p.vhd",
        }[how]
        allow = [tmp_path / "base"] if how == "up" else []
        path = self.child(raw, folder / "c.vhd", name)
        assert read(path, allow=allow) == new

    def test_chain_of_three(self, tmp_path: Path) -> None:
        new, raw = self.make(tmp_path)
        self.child(raw, tmp_path / "c.vhd")
        newer = bytearray(new)
        newer[7 * MIB] ^= 0xFF
        raw.write_bytes(newer)
        path = self.child(raw, tmp_path / "d.vhd", "c.vhd")
        assert read(path) == newer
        assert imgcore.check(path).allocated_clusters == 1
        imgcore.convert(path, tmp_path / "flat.vhd", sync=False)
        assert read(tmp_path / "flat.vhd") == newer

    def test_create(self, tmp_path: Path) -> None:
        self.make(tmp_path)
        path = tmp_path / "c.vhd"
        imgcore.create(path, backing="p.vhd", backing_format="vhd", sync=False)
        assert read(path) == read(tmp_path / "p.vhd")
        assert imgcore.check(path).allocated_clusters == 0

    def test_the_parent_is_written_to_later(self, tmp_path: Path) -> None:
        _, raw = self.make(tmp_path)
        path = self.child(raw, tmp_path / "c.vhd")
        (tmp_path / "p.vhd").unlink()
        imgcore.convert(raw, tmp_path / "p.vhd", sync=False)
        with pytest.raises(CorruptImageError, match="it is another disk"):
            read(path)

    @pytest.mark.parametrize(
        ("name", "format", "options", "match"),
        [
            ("old.raw", "raw", [], "must be a VHD, not raw"),
            ("p.vhd", "vhd", ["subformat=fixed"], "a fixed VHD cannot have a parent"),
            ("a\\b.vhd", "vhd", [], "cannot be represented in a VHD"),
            ("./vm-10:00.vhd", "vhd", [], "cannot be represented in a VHD"),
            ("x" * 251 + ".vhd", "vhd", [], None),
        ],
    )
    def test_refused(
        self, tmp_path: Path, name: str, format: str, options: list[str], match: str | None
    ) -> None:
        _, raw = self.make(tmp_path)
        if not (tmp_path / name).exists():
            (tmp_path / "p.vhd").rename(tmp_path / name)
        arguments = {"backing": name, "backing_format": format, "options": options}
        if match is None:
            imgcore.convert(raw, tmp_path / "c.vhd", sync=False, **arguments)  # type: ignore[arg-type]
            return
        with pytest.raises(OptionError, match=match):
            imgcore.convert(raw, tmp_path / "c.vhd", sync=False, **arguments)  # type: ignore[arg-type]
        assert not (tmp_path / "c.vhd").exists()

    @pytest.mark.parametrize("n_sectors", [-1, 1])
    def test_parent_of_another_size(self, tmp_path: Path, n_sectors: int) -> None:
        new, raw = self.make(tmp_path)
        raw.write_bytes(new.ljust(len(new) + 512, b"x")[: len(new) + n_sectors * SECTOR])
        with pytest.raises(OptionError, match=f"the size of its parent: p.vhd has {len(new)} "):
            self.child(raw, tmp_path / "c.vhd")

    def test_a_name_too_long_for_the_header(self) -> None:
        """FUSE file systems can have such names."""
        identities = {"UUID": "12345678-1234-5678-1234-567812345678"}
        backing = BackingReference(
            "n" * 256, "vhd", identities=identities, path="/n", virtual_size=512
        )
        with pytest.raises(OptionError, match="has 256 characters, at most 255 are allowed"):
            parent_fields(backing, 512)

    def test_parent_without_uuid(self, tmp_path: Path) -> None:
        _, raw = self.make(tmp_path, "fixed")
        size = raw.stat().st_size
        poke(tmp_path / "p.vhd", (size, vhd.footer(size, vhd.FIXED, uuid=bytes(16))))
        with pytest.raises(OptionError, match="has no UUID"):
            self.child(raw, tmp_path / "c.vhd")
