"""The file system stops making reflinks during a job: the rest is copied."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from tests.faults.harness import DISK, Calls, Mode, agent_in
from tests.helpers import images, qemu
from tests.helpers.chains import MIB, chain, check, content_of, disks
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


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSPC, errno.EIO, errno.EXDEV])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_commit_goes_on_without_the_system(
    code: int, nth: int, tmp_path: Path, shim: Path
) -> None:
    """The first call asks whether the system copies at all."""
    image = make_file_system("xfs", tmp_path / "image", 512 * images.MIB)
    with (
        mounted(image, tmp_path / "mounted", "-o", "loop") as top,
        agent_in(shim, top / "images") as agent,
    ):
        contents = disks(nth, 2, 24 * MIB)
        base, overlay = chain(agent.folder, ("raw", "qcow2"), contents)
        arm = (Calls.COPY, nth, code, Mode.FAIL_ON)
        answer = agent.do("chain", {"verb": "commit", "image": overlay}, arm=arm)
        assert answer["outcome"] == "ok"
        assert answer["hits"] == 1, "asked again after a refusal"
        assert content_of(base) == content_of(overlay) == contents[1]
        check(overlay)
