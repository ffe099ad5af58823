"""imgcore's outputs for random disks and options, read by other programs.

qemu-img compares and checks all formats; VirtualBox, dissect and libyal read those that
they support.
"""

from __future__ import annotations

import hashlib
import importlib.util
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import imgcore
from tests.helpers import crosscheck, qemu
from tests.helpers.crosscheck import Case
from tests.helpers.images import KIB, MIB

Options = list[str]

# Other readers run in a separate process: they leave files open, and may crash.
_DISSECT = """
import hashlib, pathlib, sys
from dissect.hypervisor.disk.{module} import {name}
disk = {argument}
stream = disk.open() if hasattr(disk, "open") else disk
digest = hashlib.sha256()
while piece := stream.read({piece}):
    digest.update(piece)
print(stream.size, digest.hexdigest())
"""
_DISSECT_READERS = {
    "qcow2": ("qcow2", "QCow2", "QCow2(open(sys.argv[1], 'rb'))"),
    "vmdk": ("vmdk", "VMDK", "VMDK(pathlib.Path(sys.argv[1]))"),
    "vhd": ("vhd", "VHD", "VHD(open(sys.argv[1], 'rb'))"),
    "vhdx": ("vhdx", "VHDX", "VHDX(pathlib.Path(sys.argv[1]))"),
    "vdi": ("vdi", "VDI", "VDI(open(sys.argv[1], 'rb'))"),
}
_LIBYAL = """
import hashlib, sys, {module}
files = []
for path in sys.argv[1:]:
    file = {module}.{handle}()
    file.open(path)
    if {module!r} == "pyvmdk":
        file.open_extent_data_files()
    if files:
        files[-1].set_parent(file)
    files.append(file)
disk = files[0]
digest, size = hashlib.sha256(), disk.get_media_size()
for offset in range(0, size, 1 << 20):
    digest.update(disk.read_buffer_at_offset(min(1 << 20, size - offset), offset))
print(size, digest.hexdigest())
"""
_LIBYAL_READERS = {
    "qcow2": ("pyqcow", "file"),
    "vmdk": ("pyvmdk", "handle"),
    "vhd": ("pyvhdi", "file"),
    "vhdx": ("pyvhdi", "file"),
}


def _raw(rng: random.Random) -> Options:
    return _preallocation(rng)


def _preallocation(rng: random.Random) -> Options:
    return rng.choice(([], [], ["preallocation=falloc"], ["preallocation=full"]))


def _qcow2(rng: random.Random) -> Options:
    options = [f"cluster_size={512 << rng.randrange(13)}"]
    if rng.random() < 0.2:
        options.append("compat=0.10")
    else:
        options.append(f"refcount_bits={1 << rng.randrange(7)}")
        options += rng.choice(([], ["lazy_refcounts=on"]))
    return options


def _qcow2_compressed(rng: random.Random) -> Options:
    options = [f"cluster_size={512 << rng.randrange(13)}"]
    if rng.random() < 0.3:
        options.append("compression_type=zstd")
    elif rng.random() < 0.3:
        options += ["window=32k"]
    options.append(f"level={rng.choice(('fastest', 'fast', 'default', 'best'))}")
    return options


def _vmdk(rng: random.Random) -> Options:
    subformat = rng.choice(("monolithicSparse", "streamOptimized", "monolithicFlat", "vmfs"))
    options = [f"subformat={subformat}"]
    if subformat in ("monolithicSparse", "streamOptimized") and rng.random() < 0.5:
        options.append(f"grain_size={8 << rng.randrange(8)}k")
    if subformat == "monolithicSparse" and rng.random() < 0.3:
        options.append("zeroed_grain=on")
    return options


def _vhd(rng: random.Random) -> Options:
    if rng.random() < 0.3:
        return ["subformat=fixed", *_preallocation(rng)]
    options = [f"block_size={rng.choice(('512k', '1M', '2M'))}"]
    return options + rng.choice(([], ["batmap=on"]))


def _vhdx(rng: random.Random) -> Options:
    options = [f"block_size={1 << rng.randrange(6)}M"]
    return options + rng.choice(([], [], ["subformat=fixed"], ["physical_sector_size=512"]))


def _vdi(rng: random.Random) -> Options:
    if rng.random() < 0.3:
        return ["subformat=fixed", *_preallocation(rng)]
    return [f"block_size={128 << rng.randrange(5)}k"]


# ------------------------------------------------------------------------------- judges


def digest_of(content: bytes | bytearray) -> list[str]:
    return [str(len(content)), hashlib.sha256(content).hexdigest()]


def assert_qemu_agrees(raw: Path, path: Path, image_format: str, nbytes: int) -> None:
    if image_format == "vdi" and imgcore.info(path)["cluster-size"] != MIB:
        return  # it reads no other block size
    assert qemu.info(path, image_format)["virtual-size"] == nbytes
    qemu.assert_same(raw, path, source_format="raw", target_format=image_format)
    if image_format in ("qcow2", "vhdx", "vdi"):
        qemu.assert_check_clean(path, image_format)


def assert_dissect_agrees(content: bytearray, path: Path, image_format: str) -> None:
    module, name, argument = _DISSECT_READERS[image_format]
    piece = 128 * KIB if image_format == "vdi" else MIB  # of a VDI, it reads no two blocks right
    code = _DISSECT.format(module=module, name=name, argument=argument, piece=piece)
    done = qemu.checked([sys.executable, "-c", code, str(path)], cwd=path.parent)
    assert done.stdout.split() == digest_of(content), "dissect"


def assert_libyal_agrees(content: bytearray, image_format: str, *chain: Path) -> None:
    module, handle = _LIBYAL_READERS[image_format]
    code = _LIBYAL.format(module=module, handle=handle)
    done = qemu.checked([sys.executable, "-c", code, *map(str, chain)], cwd=chain[0].parent)
    assert done.stdout.split() == digest_of(content), "libyal"


def assert_virtualbox_agrees(raw: Path, path: Path, image_format: str) -> None:
    program = qemu.require_vbox_img()
    back = path.with_name("back.raw")
    words = ["convert", "--srcformat", image_format.upper(), "--dstformat", "RAW"]
    qemu.checked([program, *words, "--srcfilename", str(path), "--dstfilename", str(back)])
    qemu.assert_same(raw, back, source_format="raw", target_format="raw")
    back.unlink()


def other_readers(
    image_format: str, options: Sequence[str], nbytes: int, compress: bool
) -> list[str]:
    """Return the installed readers of such an image, besides qemu-img."""
    readers = []
    # dissect and libqcow support QEMU's zlib window of 4 KiB only, and not Zstandard.
    if not {"compression_type=zstd", "window=32k"} & set(options):
        # dissect reads a VMDK in whole pieces of 8 KiB, even at its end.
        is_odd = image_format == "vmdk" and nbytes % (8 * KIB)
        if not is_odd and image_format in _DISSECT_READERS and _is_installed("dissect.hypervisor"):
            readers.append("dissect")
        # libqcow reads compressed clusters wrongly, also those from qemu-img.
        if not compress and _is_installed(_LIBYAL_READERS.get(image_format, ("?",))[0]):
            readers.append("libyal")
    # VirtualBox opens VMDK extents of versions 1 and 3; explicit zeros make version 2.
    is_known = image_format in ("vmdk", "vhd", "vdi") and "zeroed_grain=on" not in options
    if is_known and qemu.find_program("vbox-img") is not None:
        readers.append("virtualbox")
    return readers


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


# -------------------------------------------------------------------------------- cases


def _case(
    image_format: str, make_options: Callable[[random.Random], Options], compress: bool = False
) -> Case:
    def case(rng: random.Random, folder: Path) -> None:
        content = crosscheck.random_content(rng, crosscheck.random_size(rng))
        raw = folder / "in.raw"
        crosscheck.write_sparse(raw, content, rng)
        options = make_options(rng)
        ours = folder / f"ours.{image_format}"
        print(image_format, len(content), options)
        imgcore.convert(
            raw,
            ours,
            format="raw",
            options=options,
            compress=compress,
            sparse=rng.choice((0, 512, 4096, 4096, 65536, MIB)),
            threads=rng.choice((1, 2, 3, 7)),
            sync=False,
        )
        assert_all_agree(rng, raw, content, ours, image_format, options, compress)

    return case


def assert_all_agree(
    rng: random.Random,
    raw: Path,
    content: bytearray,
    ours: Path,
    image_format: str,
    options: Options,
    compress: bool,
) -> None:
    assert_qemu_agrees(raw, ours, image_format, len(content))
    assert imgcore.compare(raw, ours, format_a="raw", format_b=image_format).identical
    if image_format != "raw":
        assert imgcore.check(ours, format=image_format).ok
    reader = rng.choice([*other_readers(image_format, options, len(content), compress), "none"])
    if reader == "dissect":
        assert_dissect_agrees(content, ours, image_format)
    elif reader == "libyal":
        assert_libyal_agrees(content, image_format, ours)
    elif reader == "virtualbox":
        assert_virtualbox_agrees(raw, ours, image_format)


def _chain_case(image_format: str, make_options: Callable[[random.Random], Options]) -> Case:
    """Write a base, then up to three children, each with changes to its parent."""

    def case(rng: random.Random, folder: Path) -> None:
        content = crosscheck.random_content(rng, crosscheck.random_size(rng))
        raw = folder / "in.raw"
        crosscheck.write_sparse(raw, content, rng)
        chain = [folder / f"0.{image_format}"]
        imgcore.convert(raw, chain[0], format="raw", options=make_options(rng), sync=False)
        for number in range(1, rng.randrange(2, 5)):
            crosscheck.random_changes(rng, content)
            raw.unlink()
            crosscheck.write_sparse(raw, content, rng)
            chain.insert(0, folder / f"{number}.{image_format}")
            options = [o for o in make_options(rng) if not o.startswith(("subformat", "prealloc"))]
            imgcore.convert(
                raw,
                chain[0],
                format="raw",
                options=options,
                backing=chain[1].name,
                backing_format=image_format,
                sparse=rng.choice((0, 512, 4096, 65536)),
                sync=False,
            )
        assert imgcore.compare(raw, chain[0], format_a="raw", format_b=image_format).identical
        assert imgcore.check(chain[0], format=image_format).ok
        if image_format == "qcow2":
            assert_qemu_agrees(raw, chain[0], image_format, len(content))
        # libvhdi takes the file's first bytes for a missing sector bitmap of a VHDX.
        elif image_format == "vhd" and _is_installed("pyvhdi"):
            assert_libyal_agrees(content, image_format, *chain)
        elif image_format == "vhdx" and _is_installed("dissect.hypervisor"):
            assert_dissect_agrees(content, chain[0], image_format)
        back = folder / "back.qcow2"
        imgcore.convert(chain[0], back, format=image_format, sync=False)
        qemu.assert_same(raw, back, source_format="raw", target_format="qcow2")

    return case


def _vhdx_child(rng: random.Random) -> Options:
    return [f"block_size={rng.choice((1, 2, 4))}M"]


CASES: dict[str, Case] = {
    "raw": _case("raw", _raw),
    "qcow2": _case("qcow2", _qcow2),
    "qcow2-compressed": _case("qcow2", _qcow2_compressed, compress=True),
    "vmdk": _case("vmdk", _vmdk),
    "vhd": _case("vhd", _vhd),
    "vhdx": _case("vhdx", _vhdx),
    "vdi": _case("vdi", _vdi),
    "chain-qcow2": _chain_case("qcow2", _qcow2),
    "chain-vhd": _chain_case("vhd", _vhd),
    "chain-vhdx": _chain_case("vhdx", _vhdx_child),
    "chain-vdi": _chain_case("vdi", _vdi),
}


@pytest.mark.parametrize("seed", crosscheck.seeds(2))
@pytest.mark.parametrize("name", CASES)
def test_others_read_what_imgcore_wrote(name: str, seed: int, tmp_path: Path) -> None:
    qemu.require_qemu_img()
    crosscheck.run(name, CASES[name], seed, tmp_path)


@pytest.mark.crosscheck
@pytest.mark.slow
def test_others_read_what_imgcore_wrote_for_a_while(tmp_path: Path) -> None:
    qemu.require_qemu_img()
    assert crosscheck.run_for_a_while(CASES, tmp_path, crosscheck.SECONDS / 3)
