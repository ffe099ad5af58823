"""Runs the command with checkpoints after little data: ``python -m`` this, then a verb.

IMGCORE_TEST_BATCH_NBYTES states how much data a batch has; each is a checkpoint.
"""

from __future__ import annotations

import os
import sys

from imgcore.cli.main import main
from imgcore.disk import batch_journal, checkpoints


def _lower_bounds() -> None:
    nbytes = int(os.environ["IMGCORE_TEST_BATCH_NBYTES"])
    vars(batch_journal)["_MAX_DATA_NBYTES"] = nbytes
    vars(checkpoints)["_DUE_SECONDS"] = 0.0


if __name__ == "__main__":
    _lower_bounds()
    sys.exit(main())
