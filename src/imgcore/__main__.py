"""``python -m imgcore``: the same as the ``imgcore`` command."""

from __future__ import annotations

import sys

from imgcore.cli import main

if __name__ == "__main__":
    sys.exit(main())
