"""Finding the parents of an image, and rejecting wrong ones."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from imgcore.disk import chain
from imgcore.disk import layer as layers_module
from imgcore.disk.chain import open_chain
from imgcore.disk.open_options import OpenOptions
from imgcore.errors import (
    CorruptImageError,
    LimitExceededError,
    OptionError,
    UnsafeReferenceError,
    UnsupportedFeatureError,
    WrongFormatError,
)
from imgcore.files.host_file import HostFile
from imgcore.files.reference_gate import ReferenceGate
from imgcore.formats.api import BackingReference
from imgcore.formats.registry import Found
from imgcore.limits import MAX_CHAIN_DEPTH

UUID = "{00000000-0000-0000-0000-0000000000aa}"


@pytest.fixture(autouse=True)
def _fake_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the formats by one whose files describe reader and parent as JSON."""

    def open_fake(
        file: HostFile,
        gate: ReferenceGate,
        name: str | None = None,
        options: object = None,
        damage: object = None,
        *,
        flag: str = "-f",
    ) -> Any:
        content = json.loads(file.pread(0, file.nbytes))
        backing = content.get("backing")
        reference = None if backing is None else BackingReference(**backing)
        return SimpleNamespace(
            backing=reference, identities=content.get("identities", {}), close=lambda: None
        )

    monkeypatch.setattr(layers_module, "find_format", lambda *_, **__: Found("raw"))
    monkeypatch.setattr(layers_module, "open_found", open_fake)
    monkeypatch.setattr(chain, "open_reader", open_fake)


def put(path: Path, backing: Mapping[str, Any] | None = None, **identities: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"backing": backing, "identities": identities}))
    return path


def paths(child: Path, **arguments: Any) -> list[str]:
    layers = open_chain(child, OpenOptions.from_keywords(**arguments))
    found = [layer.file.path for layer in layers]
    for layer in layers:
        layer.close()
    return found


def child_of(tmp_path: Path, **reference: Any) -> Path:
    return put(tmp_path / "child", {"format": "raw", **reference})


def n_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_the_first_name_that_exists(tmp_path: Path) -> None:
    child = child_of(tmp_path, name="gone", other_names=["also-gone", "base", "second"])
    base = put(tmp_path / "base")
    put(tmp_path / "second")
    assert paths(child) == [str(child), str(base)]


def test_a_chain_goes_on_to_its_end(tmp_path: Path) -> None:
    child = child_of(tmp_path, name="middle")
    put(tmp_path / "middle", {"name": "base", "format": "raw"})
    put(tmp_path / "base")
    assert [Path(path).name for path in paths(child)] == ["child", "middle", "base"]


def test_the_right_identity_goes_before_the_first_name(tmp_path: Path) -> None:
    wanted = {"UUID": UUID}
    child = child_of(tmp_path, name="other", other_names=["base"], identities=wanted)
    put(tmp_path / "other", UUID="{another}")
    base = put(tmp_path / "base", UUID=UUID)
    assert paths(child)[1] == str(base)


@pytest.mark.parametrize(
    ("identities", "found"), [({"UUID": "{other}"}, "has {other}"), ({}, "has none")]
)
def test_a_wrong_parent_is_refused(tmp_path: Path, identities: dict[str, str], found: str) -> None:
    child = child_of(tmp_path, name="base", identities={"UUID": UUID})
    base = put(tmp_path / "base", **identities)
    before = n_open_files()
    with pytest.raises(CorruptImageError) as info:
        paths(child)
    assert str(info.value) == (
        f"{child}: was created from a parent with UUID {UUID}, but {base} {found}: "
        "it is another disk, or was written to since"
    )
    assert n_open_files() == before


def test_every_identity_must_agree(tmp_path: Path) -> None:
    child = child_of(tmp_path, name="base", identities={"UUID": UUID, "write GUID": "1"})
    put(tmp_path / "base", **{"UUID": UUID, "write GUID": "2"})
    with pytest.raises(CorruptImageError, match="with write GUID 1"):
        paths(child)


def test_no_name_exists(tmp_path: Path) -> None:
    child = child_of(tmp_path, name="a", other_names=["b", "a"])
    with pytest.raises(FileNotFoundError) as info:
        paths(child)
    assert info.value.filename == str(child)
    tried = "none of the names of its parent exists: 'a', 'b'"
    assert info.value.strerror == f"{tried}; state it with --parent"
    with pytest.raises(FileNotFoundError) as info:
        paths(child_of(tmp_path, name="a"))
    assert info.value.filename == str(tmp_path / "a")
    assert info.value.strerror.endswith(f"(the parent of {child}; state it with --parent)")
    put(tmp_path / "a", {"name": "b", "format": "raw"})
    with pytest.raises(FileNotFoundError) as info:
        paths(child)
    assert f"(the parent of {tmp_path / 'a'}; state it with --parent, given" in info.value.strerror


def test_a_name_outside_does_not_hide_one_inside(tmp_path: Path) -> None:
    folder = tmp_path / "vm"
    put(tmp_path / "base")
    child = put(folder / "child", {"name": "../base", "other_names": ["base"], "format": "raw"})
    with pytest.raises(UnsafeReferenceError, match="--allow"):
        paths(child)
    base = put(folder / "base")
    assert paths(child)[1] == str(base)
    assert paths(child, allow=[str(tmp_path)])[1] == str(tmp_path / "base")


def test_a_given_parent(tmp_path: Path) -> None:
    child = child_of(tmp_path, name="gone", identities={"UUID": UUID})
    base = put(tmp_path / "elsewhere" / "b", {"name": "c", "format": "raw"}, UUID=UUID)
    last = put(tmp_path / "elsewhere" / "c")
    assert paths(child, parent=str(base)) == [str(child), str(base), str(last)]
    with pytest.raises(CorruptImageError, match="another disk"):
        paths(child, parent=str(last))
    with pytest.raises(FileNotFoundError):
        paths(child, parent=str(tmp_path / "absent"))
    with pytest.raises(OptionError, match="the image has none"):
        paths(last, parent=str(base))


def test_a_parents_format_is_never_guessed(tmp_path: Path) -> None:
    child = child_of(tmp_path, name="base", format=None)
    base = put(tmp_path / "base")
    for arguments in ({}, {"parent": str(base)}):
        with pytest.raises(WrongFormatError, match="--backing-format"):
            paths(child, **arguments)
        assert len(paths(child, backing_format="raw", **arguments)) == 2


def test_a_parent_of_an_unknown_format(tmp_path: Path) -> None:
    put(tmp_path / "base.img")
    child = put(tmp_path / "a.img", backing={"name": "base.img", "format": "qed"})
    with pytest.raises(UnsupportedFeatureError, match=r"a\.img: .* format 'qed', which is not"):
        paths(child)


def test_loops_and_depth(tmp_path: Path) -> None:
    child = child_of(tmp_path, name="base")
    put(tmp_path / "base", {"name": "child", "format": "raw"})
    with pytest.raises(CorruptImageError, match="leads back to"):
        paths(child)
    for depth in range(MAX_CHAIN_DEPTH):
        put(tmp_path / str(depth), {"name": str(depth + 1), "format": "raw"})
    before = n_open_files()
    with pytest.raises(LimitExceededError, match=f"more than {MAX_CHAIN_DEPTH}"):
        paths(tmp_path / "0")
    assert n_open_files() == before
    put(tmp_path / str(MAX_CHAIN_DEPTH - 1))
    assert len(paths(tmp_path / "0")) == MAX_CHAIN_DEPTH


@pytest.mark.parametrize("difference", [0, 1])
def test_another_time_of_modification_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, difference: int
) -> None:
    base = put(tmp_path / "base")
    os.utime(base, (1_700_000_000, 1_700_000_000))
    child = child_of(tmp_path, name="base", modified=1_700_000_000 + difference)
    assert len(paths(child)) == 2
    assert len(caplog.messages) == difference
    if difference:
        assert f"the modification time of its parent {base} has changed" in caplog.text


def test_a_format_that_does_not_exist(tmp_path: Path) -> None:
    """If the caller stated it, the option is wrong; otherwise the image is."""
    put(tmp_path / "base")
    with pytest.raises(OptionError, match="floppy"):
        paths(child_of(tmp_path, name="base", format=None), backing_format="floppy")
    with pytest.raises(UnsupportedFeatureError, match="of the format 'floppy'"):
        paths(child_of(tmp_path, name="base", format="floppy"))
