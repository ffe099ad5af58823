"""Writing in place in every format, against a byte array, check and qemu-img."""

from __future__ import annotations

from pathlib import Path

import pytest

import imgcore
from tests.helpers import qemu
from tests.helpers.update_variants import VARIANTS, UpdateVariant
from tests.helpers.updates import Model, change_at_random, some_content

# qemu-img check knows these.
CHECKED_BY_QEMU = ("qcow2", "vmdk", "vhdx", "vdi")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_random_changes(variant: UpdateVariant, seed: int, tmp_path: Path) -> None:
    content = some_content(seed)
    path = variant.make(tmp_path, content)
    model = Model(content)

    def verify() -> None:
        if variant.name != "raw":
            report = imgcore.check(path)
            assert (report.corruptions, report.leaks) == (0, 0), report.problems
        if variant.qemu_format in CHECKED_BY_QEMU:
            qemu.run("check", "-f", variant.qemu_format, path)

    change_at_random(path, model, seed=seed, sizes=variant.sizes, verify=verify)
    if variant.qemu_format is not None:
        copy = tmp_path / "copy.raw"
        qemu.run("convert", "-f", variant.qemu_format, "-O", "raw", path, copy)
        model.check(0, copy.read_bytes()[: len(model.content)])
