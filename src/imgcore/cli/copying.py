"""What the verbs that copy areas into an image in place have in common."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, TypeVar

from imgcore.cli.common import (
    Function,
    output_options,
    print_result,
    quiet_option,
    rate_option,
    threads_option,
)
from imgcore.cli.progress import progress_options, reporter
from imgcore.text import one_line

_Result = TypeVar("_Result")


class Copying(NamedTuple):
    """The options for how to copy, and for what is printed."""

    threads: int | None
    rate: int | None
    progress_mode: str
    wants_progress: bool
    quiet: bool
    as_json: bool

    def run(self, path: str, work: Callable[..., _Result]) -> _Result:
        """Call a verb with its keywords for copying, and report its progress.

        ``path`` is the image that is written to, which the progress names.
        """
        with reporter(
            self.progress_mode,
            wanted=self.wants_progress,
            quiet=self.quiet,
            label=one_line(os.path.basename(path)),
            as_json=self.as_json,
            rate=self.rate,
        ) as report:
            return work(threads=self.threads, progress=report.callback, control=report.control)

    def tell(self, result: Any, text: str) -> None:
        """Print the result: as JSON, or a text unless quiet."""
        print_result(result, text, quiet=self.quiet, as_json=self.as_json)


def copying_options(function: Function) -> Function:
    """Add the options of `Copying`, which become the argument ``copying``."""

    @wraps(function)
    def collected(*args: Any, **values: Any) -> Any:
        copying = Copying(**{name: values.pop(name) for name in Copying._fields})
        return function(*args, copying=copying, **values)

    decorated: Function = collected
    for add in (
        output_options,
        quiet_option(),
        progress_options,
        threads_option(),
        rate_option(),
    ):
        decorated = add(decorated)
    return decorated
