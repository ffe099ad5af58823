"""The ``imgcore`` command, also as ``python -m imgcore``."""

from __future__ import annotations

import gc
import signal
from typing import Final, NoReturn

from imgcore.cli.process import occupy_standard_numbers, raise_open_files_limit

# Allocations between two garbage collections.  Loading modules leaves no garbage: the
# default of 700 makes start-up 6 % slower.
_GC_THRESHOLD: Final = 100_000


def run() -> NoReturn:
    """Load the command, run it and end the process."""
    gc.set_threshold(_GC_THRESHOLD)
    # A caller may ask for progress at any time; there is none to tell yet.
    if signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
        signal.signal(signal.SIGUSR1, lambda _number, _frame: None)
    occupy_standard_numbers()
    raise_open_files_limit()
    # Nothing needs cleaning up before the command is loaded: Ctrl-C may end the process
    # at once, without a traceback.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from imgcore.cli import main

    main.run()


if __name__ == "__main__":
    run()
