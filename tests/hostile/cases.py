"""All cases of the hostile set."""

from __future__ import annotations

from tests.hostile import chains, qcow2, raw, vdi, vhd, vhdx, vmdk

CASES = (
    *qcow2.cases(),
    *vmdk.cases(),
    *vhd.cases(),
    *vhdx.cases(),
    *vdi.cases(),
    *raw.cases(),
    *chains.cases(),
)
