"""Settings of native jobs (threads, variants), and their errors as exceptions."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, SupportsIndex

from imgcore import _core
from imgcore._core import Status
from imgcore.border import integer
from imgcore.engine.cpus import available_cpus
from imgcore.errors import (
    ConversionCancelled,
    CorruptImageError,
    ImgcoreError,
    LimitExceededError,
    OptionError,
    UnsupportedFeatureError,
)
from imgcore.limits import MAX_THREADS


def thread_count(threads: SupportsIndex | None) -> int:
    """Return the number of workers: as requested, or one for each CPU we may use."""
    if threads is None:
        return min(available_cpus(), MAX_THREADS)
    threads = integer(threads, "threads")
    if not 1 <= threads <= MAX_THREADS:
        raise OptionError(f"{threads} threads requested, 1 to {MAX_THREADS} allowed")
    return threads


def chosen_variants(kernels: Mapping[str, str] | None) -> dict[str, str]:
    """Return the variants chosen by ``kernels``, or else by ``IMGCORE_KERNEL``.

    The environment variable has ``operation=variant`` pairs, separated by commas:
    ``zero=avx2,io=uring``.
    """
    chosen = dict(kernels or {})
    for pair in filter(None, os.environ.get("IMGCORE_KERNEL", "").split(",")):
        operation, _, variant = pair.partition("=")
        chosen.setdefault(operation.strip(), variant.strip())
    if not chosen:
        return chosen  # detecting what runs here takes system calls
    known = _core.variants()
    for operation, variant in chosen.items():
        rows = {row["name"]: row for row in known.get(operation, ())}
        if variant not in rows:
            raise OptionError(f"no variant {variant!r} of operation {operation!r}")
        if not rows[variant]["runnable"]:
            raise OptionError(f"variant {variant!r} of {operation!r} does not run here")
    return chosen


@contextmanager
def translated_errors(paths: Sequence[str], target: str | None = None) -> Iterator[None]:
    """Turn CoreError into ImgcoreError or OSError with the name of the file.

    Parameters
    ----------
    paths : sequence of str
        Names of the job's sources, in the job's order.
    target : str, optional
        Name of the target.
    """
    try:
        yield
    except _core.CoreError as error:
        # An error that is not about one file, for example of a thread: name the result.
        path = target or next(iter(paths), None)
        if error.source < len(paths):
            path = paths[error.source]
        raise _translate(error, path) from error


def _translate(error: _core.CoreError, path: str | None) -> Exception:
    where: dict[str, Any] = {"path": path, "offset": error.offset}
    at = f"0x{error.offset:x}"
    match error.status:
        case Status.IO:
            text = os.strerror(error.os_errno)
            if error.os_errno not in (errno.ENOSPC, errno.EDQUOT):
                text += f" ({error.op} at {at})"
            return OSError(error.os_errno, text, path)
        case Status.CANCELLED:
            return ConversionCancelled("cancelled")
        case Status.CORRUPT:
            what = "compressed block does not decompress to a whole block"
            return CorruptImageError(f"{what} (at {at})", **where)
        case Status.BAD_GRAIN_MARKER:
            return CorruptImageError(f"grain marker does not match its grain (at {at})", **where)
        case Status.PAST_END:
            return CorruptImageError(f"the file ends before {at}", **where)
        case Status.TOO_MANY_BAD_RANGES:
            what = f"more than {_core.MAX_BAD_RANGES} separate ranges cannot be read"
            return LimitExceededError(f"{what}, the last at {at} of the disk", path=path)
        case Status.LIMIT:
            what = "grows past what the format can address"
            return LimitExceededError(f"{what} ({error.op})", **where)
        case Status.UNSUPPORTED:
            return UnsupportedFeatureError(f"{error.op} is not available here", **where)
    # No image leads here: the reader or the writer has broken the engine's contract.
    what = f"a defect of imgcore, please report it: {error.op} rejected row {error.offset}"
    return ImgcoreError(what, path=path)
