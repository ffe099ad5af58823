"""The file system stops making reflinks during a job: the rest is copied."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from tests.faults.harness import DISK, Calls, Mode, agent_in
from tests.helpers import images, qemu
from tests.helpers.mounts import make_file_system, mounted


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSPC, errno.EIO, errno.EINVAL])
@pytest.mark.parametrize("nth", [1, 2])
def test_what_is_refused_is_copied(code: int, nth: int, tmp_path: Path, shim: Path) -> None:
    image = make_file_system("xfs", tmp_path / "image", 512 * images.MIB)
    with mounted(image, tmp_path / "mounted", "-o", "loop") as top:
        raw, target = top / "disk.raw", top / "target" / "out.qcow2"
        DISK.write(raw)
        with agent_in(shim, target.parent) as agent:
            arm = (Calls.REFLINK, nth, code, Mode.FAIL_ON)
            answer = agent.convert(raw, target, qemu.QCOW2, arm=arm)
        assert answer["outcome"] == "ok"
        assert answer["hits"] == 1, "asked again after a refusal"
        assert (answer["result"]["bytes_shared"] > 0) is (nth > 1)
        qemu.assert_same(raw, target, source_format="raw", target_format="qcow2")
        qemu.assert_check_clean(target, "qcow2")
