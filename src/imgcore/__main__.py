"""``python -m imgcore``: the same as the ``imgcore`` command."""

from __future__ import annotations

from imgcore.cli import run

if __name__ == "__main__":
    run()
