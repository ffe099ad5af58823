"""A process under the shim that runs jobs from stdin, one JSON object a line.

It keeps running, so a conversion with one more fault takes milliseconds, not the start
of an interpreter.  Jobs that will be killed run in a fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import imgcore
import imgcore.disk.archive_sink
import imgcore.disk.image_batches
import imgcore.disk.image_sink
import imgcore.disk.stream_batches
import imgcore.disk.stream_sink
import imgcore.streams.reader
import imgcore.verbs.convert  # everything is loaded before anything can fail
import imgcore.verbs.rewrite
from imgcore.disk import (
    area_journal,
    batch_pieces,
    checkpoints,
    resuming,
)
from imgcore.files import in_place
from imgcore.streams import zstd
from imgcore.verbs.check import check
from tests.faults.update_history import Change
from tests.helpers.tiny import rewrite as rewrite_tiny

_SHIM = ctypes.CDLL(os.environ["FAULT_SHIM"])
_SHIM.fault_watch.argtypes = [ctypes.c_char_p]
_SHIM.fault_arm.argtypes = [ctypes.c_uint, ctypes.c_long, ctypes.c_int, ctypes.c_int]
_SHIM.fault_disarm.restype = _SHIM.fault_hits.restype = ctypes.c_long
_SHIM.fault_bad_range.argtypes = [ctypes.c_uint64] * 3
_SHIM.fault_log.argtypes = [ctypes.c_char_p]
_SHIM.fault_mark.argtypes = [ctypes.c_uint64]
_SHIM.fault_memory_of.argtypes = [ctypes.c_char_p]
_SHIM.fault_arm_memory.argtypes = [ctypes.c_long]
_SHIM.fault_memory_seen.restype = ctypes.c_long

# Prefixes of the names of the libraries whose allocations fail.
_NATIVE = b"_core.\0libzstd\0libdeflate\0libisal\0\0"
_PYTHON = b"python\0libpython\0_multiarray_umath\0\0"


def convert(arguments: dict[str, Any]) -> dict[str, Any]:
    result = imgcore.convert(**arguments)
    return {key: value for key, value in result._asdict().items() if key != "seconds"}


def resume(arguments: dict[str, Any]) -> dict[str, Any]:
    """Convert with a checkpoint after each batch, which has little data.

    A journal that is begun gets the seed ``seed``.
    """
    words = dict(arguments)
    batch_nbytes = words.pop("batch_nbytes")
    names = vars(batch_pieces)
    assert {"_MIN_NBYTES", "_MAX_NBYTES"} <= names.keys()
    names["_MIN_NBYTES"] = names["_MAX_NBYTES"] = batch_nbytes
    vars(area_journal)["_BATCH_NBYTES"] = batch_nbytes
    vars(zstd)["_JOB_NBYTES"] = 1 << 20
    vars(checkpoints)["_DUE_NBYTES"] = 0
    seed = words.pop("seed").encode().ljust(32)
    vars(resuming)["_new_seed"] = lambda: seed
    return convert({"resume": True, **words})


def repair(arguments: dict[str, Any]) -> dict[str, Any]:
    report = check(arguments["path"], repair=True)
    return {"corruptions": report.corruptions, "leaks": report.leaks}


def compare(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"identical": imgcore.compare(**arguments).identical}


def tiny(arguments: dict[str, Any]) -> dict[str, Any]:
    created = {name: text.encode() for name, text in arguments.get("created", {}).items()}
    more = {key: arguments[key] for key in ("name", "removed") if key in arguments}
    return {"path": str(rewrite_tiny(Path(arguments["path"]), created=created, **more))}


def rewrite(arguments: dict[str, Any]) -> dict[str, Any]:
    result = imgcore.rewrite(**arguments)
    return {key: value for key, value in result._asdict().items() if key != "seconds"}


def recover(arguments: dict[str, Any]) -> dict[str, Any]:
    recovered = in_place.recover(arguments["path"])
    return {"state": recovered and recovered.state}


def undo(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"path": in_place.undo(arguments["path"])}


def update(arguments: dict[str, Any]) -> dict[str, Any]:
    """Change an image in place, with marks in the log before and after each change.

    With ``again``, what fails is done once more.
    """
    changes = [Change(*change) for change in arguments["changes"]]
    path, again = arguments["path"], arguments.get("again", False)
    numbers = iter(range(len(changes)))
    is_open = True
    while is_open:
        image = twice(partial(imgcore.open, path, mode="r+"), again=again)
        is_open = False
        try:
            for number in numbers:
                _SHIM.fault_mark(2 * number)
                if is_open := changes[number].action == "reopen":
                    break
                twice(partial(changes[number].make, image), again=again)
                _SHIM.fault_mark(2 * number + 1)
        finally:
            close_image(image, again=again)
            # All that has ended is durable once the image is closed.
            _SHIM.fault_mark(2 * (number if is_open else len(changes)) + 1)
    return {}


def twice(call: Callable[[], imgcore.Image | None], *, again: bool) -> Any:
    try:
        return call()
    except OSError:
        if not again:
            raise
        return call()


def close_image(image: imgcore.Image, *, again: bool) -> None:
    """Close an image; with ``again``, flush it before, so that nothing is lost."""
    try:
        if again:
            twice(image.flush, again=True)
    finally:
        with contextlib.suppress(*([OSError] if again else [])):
            image.close()


def chain(arguments: dict[str, Any]) -> dict[str, Any]:
    """Call a verb that changes images in place."""
    words = dict(arguments)
    getattr(imgcore, words.pop("verb"))(words.pop("image"), **words)
    return {}


def snapshot(arguments: dict[str, Any]) -> dict[str, Any]:
    """Create, apply or delete a snapshot."""
    change = getattr(imgcore, f"{arguments['verb']}_snapshot")
    change(arguments["path"], arguments["name"])
    return {}


def read_ranges(arguments: dict[str, Any]) -> dict[str, Any]:
    """Read ranges of one open image in phases, each with another range that is bad.

    The answer has the SHA-256 of each range, or the words of its error.
    """
    answers = []
    with imgcore.open(arguments["path"], **arguments["keywords"]) as image:
        for bad, ranges in arguments["phases"]:
            _SHIM.fault_bad_range(*bad)
            answers.append([read_range(image, *part) for part in ranges])
            _SHIM.fault_bad_range(0, 0, 0)
    return {"phases": answers}


def read_range(image: imgcore.Image, offset: int, length: int) -> str:
    try:
        return hashlib.sha256(image.read(offset, length)).hexdigest()
    except (imgcore.ImgcoreError, OSError) as error:
        return f"{type(error).__name__}: {error}"


ACTIONS = {
    "convert": convert,
    "resume": resume,
    "repair": repair,
    "compare": compare,
    "tiny": tiny,
    "rewrite": rewrite,
    "recover": recover,
    "undo": undo,
    "update": update,
    "snapshot": snapshot,
    "chain": chain,
    "read_ranges": read_ranges,
}


def attempt(job: dict[str, Any], memory: int | None) -> dict[str, Any]:
    """Do the job, and return how it ended."""
    before = len(os.listdir("/proc/self/fd"))
    action, arguments = ACTIONS[job["do"]], job["with"]
    try:
        if memory is not None:
            _SHIM.fault_arm_memory(memory)
        try:
            result = action(arguments)
        finally:
            _SHIM.fault_arm_memory(-1)
        answer = {"outcome": "ok", "result": result}
    except (imgcore.ImgcoreError, OSError, MemoryError) as error:
        answer = {
            "outcome": "error",
            "type": type(error).__name__,
            "text": str(error),
            "errno": getattr(error, "errno", None),
            "path": getattr(error, "filename", None) or getattr(error, "path", None),
        }
    except Exception as error:  # an exception that is not promised
        answer = {"outcome": "bug", "type": type(error).__name__, "text": str(error)}
        if "MemoryError" in answer["text"]:  # ctypes wraps it
            answer |= {"outcome": "error", "type": "MemoryError"}
    answer["descriptors"] = len(os.listdir("/proc/self/fd")) - before
    return answer


def armed(job: dict[str, Any]) -> dict[str, Any]:
    """Do the job with its faults."""
    mask, nth, code, mode = job.get("arm", (0, 0, 0, 0))
    inode, start, end = job.get("bad", (0, 0, 0))
    memory = job.get("memory")
    _SHIM.fault_log(os.fsencode(job["log"]) if "log" in job else None)
    _SHIM.fault_bad_range(inode, start, end)
    _SHIM.fault_memory_of(_PYTHON if job.get("of_python") else _NATIVE)
    _SHIM.fault_arm(mask, nth, code, mode)
    try:
        answer = attempt(job, memory)
    finally:
        seen = _SHIM.fault_disarm()
        _SHIM.fault_bad_range(0, 0, 0)
        _SHIM.fault_log(None)
    answer["seen"], answer["hits"] = seen, _SHIM.fault_hits()
    answer["allocations"] = _SHIM.fault_memory_seen()
    return answer


def forked(job: dict[str, Any]) -> dict[str, Any]:
    """Do the job in a child, which the shim kills, or this process after a timeout."""
    child = os.fork()
    if not child:
        code = 99
        try:
            code = 0 if armed(job)["outcome"] == "ok" else 1
        finally:
            os._exit(code)
    if "kill_after" in job:
        time.sleep(job["kill_after"])
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return {"outcome": "killed", "signal": os.WTERMSIG(status)}
    return {"outcome": "ok" if os.WEXITSTATUS(status) == 0 else "error"}


def main() -> None:
    logging.getLogger("imgcore").addHandler(logging.NullHandler())
    _SHIM.fault_watch(os.fsencode(sys.argv[1]))
    for line in sys.stdin:
        job = json.loads(line)
        answer = (forked if job.get("fork") else armed)(job)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
