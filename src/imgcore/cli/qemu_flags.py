"""Flags and commands of qemu-img (7.2 to 11) that imgcore does not have, and why.

A flag that has a meaning here, or may be ignored, is an option of its verb.  The others
are listed here, so that the error says what to do.  tests/unit/test_qemu_flags.py has
the whole table.
"""

from __future__ import annotations

from typing import Final

_IMAGE_OPTS: Final = (
    "a disk is named by its file: give the file's name, and its format with -f "
    '(or as json:{"driver":...})'
)
_TARGET_IMAGE_OPTS: Final = (
    "a target is named by its file: give the file's name, and its format with -O"
)
_OBJECT: Final = (
    "objects of QEMU (keys, throttle groups) do not exist here: -r limits the rate, and "
    "encrypted images are not read: qemu-img convert decrypts them"
)
_SNAPSHOT: Final = (
    "snapshots inside images are listed and changed by snapshot, but not read: qemu-img convert "
    "-l NAME makes an image of one"
)
_BITMAPS: Final = (
    "bitmaps are not copied: without this flag the disk is converted; "
    "qemu-img convert --bitmaps copies both"
)
_LIMITS: Final = "limits of block drivers do not exist here: leave it out"

# For every verb.
_ANYWHERE: Final = {
    "--image-opts": _IMAGE_OPTS,
    "--object": _OBJECT,
    "-T": "imgcore has no trace points: leave it out",
    "--trace": "imgcore has no trace points: leave it out",
}

_OF_VERB: Final = {
    "convert": {
        "--target-image-opts": _TARGET_IMAGE_OPTS,
        "-l": _SNAPSHOT,
        "--snapshot": _SNAPSHOT,
        "--bitmaps": _BITMAPS,
        "--skip-broken-bitmaps": _BITMAPS,
    },
    "measure": {"-l": _SNAPSHOT, "--snapshot": _SNAPSHOT},
    "info": {"--limits": _LIMITS},
    "rebase": {
        "-c": "what is copied into an image in place is not compressed: leave it out",
        "--compress": "what is copied into an image in place is not compressed: leave it out",
        "-U": "an image that is written to is not used by others: leave it out",
        "--force-share": "an image that is written to is not used by others: leave it out",
    },
    "resize": {
        "--preallocation": "what is new is allocated once it is written to: leave it out",
    },
    "create": {
        "-u": "the backing file is opened to verify it: make the backing file first",
        "--backing-unsafe": "the backing file is opened to verify it: make the backing file first",
    },
}

_COMMANDS: Final = {
    "amend": "convert writes a new image with other options (-o)",
    "bench": "it measures QEMU",
    "bitmap": "bitmaps are neither read nor written",
    "dd": "convert writes the whole disk",
}


def flag_refusal(verb: str, flag: str) -> str | None:
    """Return why a verb does not take a flag of qemu-img, and what to do."""
    return _OF_VERB.get(verb, {}).get(flag) or _ANYWHERE.get(flag)


def command_refusal(name: str) -> str | None:
    """Return why a command of qemu-img does not exist here, and what to do."""
    reason = _COMMANDS.get(name)
    return None if reason is None else f"imgcore has no {name}: {reason}; see imgcore --help"
