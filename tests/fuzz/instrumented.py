"""Runs a fuzz target under atheris, which watches the branches of all of `imgcore`.

A target imports this module before it imports `imgcore`.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
import resource
import sys
import warnings
from collections.abc import Callable

import atheris  # type: ignore[import-not-found]
from atheris.import_hook import HookManager  # type: ignore[import-not-found]

# As `atheris.instrument_imports`, but without its hooks in comparisons: in atheris 3.0
# these never free a result that is not a bool, such as an array, so that memory would
# grow to its limit.
with HookManager({"imgcore"}, set(), True, trace_dataflow=False):
    import imgcore

    # The modules that are imported lazily must be instrumented as well.
    for module in pkgutil.walk_packages(imgcore.__path__, "imgcore."):
        if not module.name.startswith(("imgcore.cli", "imgcore.__main__")):
            importlib.import_module(module.name)

HEADROOM_NBYTES = 1 << 30


def fuzz(
    use: Callable[[bytes], object], mutate: Callable[[bytes, int, int], bytes] | None = None
) -> None:
    """Use one input after another, until told to stop."""
    warnings.simplefilter("error")
    logging.getLogger("imgcore").addHandler(logging.NullHandler())
    logging.getLogger("imgcore").propagate = False

    def one_input(data: bytes) -> None:
        use(data)

    if mutate is None:
        atheris.Setup(sys.argv, one_input)
    else:
        atheris.Setup(sys.argv, one_input, custom_mutator=mutate)
    with open("/proc/self/statm") as file:
        held_nbytes = int(file.read().split()[0]) * resource.getpagesize()
    limit = held_nbytes + HEADROOM_NBYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    atheris.Fuzz()
