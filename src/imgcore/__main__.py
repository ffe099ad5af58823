"""``python -m imgcore``, and the ``imgcore`` command."""

from __future__ import annotations

import signal
from typing import NoReturn


def run() -> NoReturn:
    """Load the command and run it as the process that it is."""
    # Until it is loaded there is nothing to clean up: Ctrl-C just ends it, without a traceback.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from imgcore.cli import main

    main.run()


if __name__ == "__main__":
    run()
