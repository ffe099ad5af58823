"""Targets of `imgcore.convert` of every kind, by their names."""

from __future__ import annotations

from typing import Any

TARGETS: dict[str, dict[str, Any]] = {
    "a.raw": {},
    "b.raw": {"sparse": 0},
    "a.qcow2": {},
    "b.qcow2": {"compress": True},
    "c.qcow2": {"options": {"cluster_size": "512"}},
    "d.qcow2": {"options": {"cluster_size": "2M"}},
    "a.vmdk": {},
    "b.vmdk": {"options": {"subformat": "streamOptimized"}},
    "c.vmdk": {"options": {"subformat": "monolithicFlat"}},
    "a.vhd": {},
    "b.vhd": {"options": {"subformat": "fixed"}},
    "a.vhdx": {},
    "a.vdi": {},
    "a.raw.zst": {},
    "a.raw.gz": {},
    "azure.vhd": {"profile": "azure"},
    "a.tar.gz": {"profile": "gce"},
}
