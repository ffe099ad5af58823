"""The description of a snapshot, with the keys of ``qemu-img info``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from imgcore.formats.api import SnapshotInfo

_NANOSECONDS: Final = 1_000_000_000


def snapshot_row(snapshot: SnapshotInfo) -> dict[str, Any]:
    """Return what ``qemu-img info --output=json`` says of a snapshot."""
    seconds, nanoseconds = divmod(snapshot.created_ns, _NANOSECONDS)
    clock_seconds, clock_nanoseconds = divmod(snapshot.vm_clock_ns, _NANOSECONDS)
    row: dict[str, Any] = {
        "id": snapshot.identifier,
        "name": snapshot.name,
        "vm-state-size": snapshot.vm_state_nbytes,
        "date-sec": seconds,
        "date-nsec": nanoseconds,
        "vm-clock-sec": clock_seconds,
        "vm-clock-nsec": clock_nanoseconds,
    }
    if snapshot.icount is not None:
        row["icount"] = snapshot.icount
    return row
