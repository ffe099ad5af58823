"""The readers under a coverage-guided fuzzer (atheris): ``make fuzz`` runs it.

``python -m tests.fuzz.fuzz_readers [libFuzzer's options] CORPUS...``
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
import resource
import sys
import warnings

import atheris  # type: ignore[import-not-found]
from atheris.import_hook import HookManager  # type: ignore[import-not-found]

# As `atheris.instrument_imports`, but without its hooks in comparisons: in atheris 3.0
# these never free a result that is not a bool, such as an array, so that memory would
# grow to its limit.
with HookManager({"imgcore"}, set(), True, trace_dataflow=False):
    import imgcore

    # The modules that a reader imports lazily must be instrumented as well.
    for module in pkgutil.walk_packages(imgcore.__path__, "imgcore."):
        if not module.name.startswith(("imgcore.cli", "imgcore.__main__")):
            importlib.import_module(module.name)
    from tests.fuzz import exercise, structure

HEADROOM_NBYTES = 1 << 30


def main() -> None:
    """Fuzz until told to stop."""
    warnings.simplefilter("error")
    logging.getLogger("imgcore").addHandler(logging.NullHandler())
    logging.getLogger("imgcore").propagate = False
    place = exercise.Place()

    def one_input(data: bytes) -> None:
        place.use(data)

    def limit_memory() -> None:
        with open("/proc/self/statm") as file:
            held_nbytes = int(file.read().split()[0]) * resource.getpagesize()
        limit = held_nbytes + HEADROOM_NBYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    atheris.Setup(sys.argv, one_input, custom_mutator=structure.mutate)
    limit_memory()
    try:
        atheris.Fuzz()
    finally:
        place.close()


if __name__ == "__main__":
    main()
