"""Prints a list of snapshots, as qemu-img does."""

from __future__ import annotations

import time
from typing import Any

import click

from imgcore.text import one_line


def print_snapshots(snapshots: list[dict[str, Any]]) -> None:
    """Print rows of `snapshot_row` as a table."""
    from imgcore.sizes import format_size

    click.echo("Snapshot list:")
    click.echo(f"{'ID':<8}{'TAG':<18}{'VM_SIZE':>7}{'DATE':>20}{'VM_CLOCK':>16}{'ICOUNT':>11}")
    for snapshot in snapshots:
        date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(snapshot.get("date-sec", 0)))
        seconds = snapshot.get("vm-clock-sec", 0)
        millis = snapshot.get("vm-clock-nsec", 0) // 1_000_000
        clock = f"{seconds // 3600:04}:{seconds // 60 % 60:02}:{seconds % 60:02}.{millis:03}"
        click.echo(
            f"{one_line(str(snapshot['id'])):<8}{one_line(str(snapshot['name'])):<18}"
            f"{format_size(snapshot.get('vm-state-size', 0)):>7}{date:>20}{clock:>16}"
            f"{snapshot.get('icount', ''):>11}"
        )
