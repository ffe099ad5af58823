"""Converts virtual disk images between six formats, in parallel.

Data that cannot be converted is reported, never dropped silently.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from imgcore._version import __version__
from imgcore.errors import (
    ConversionCancelled,
    CorruptImageError,
    FormatError,
    ImgcoreError,
    LimitExceededError,
    OptionError,
    TargetError,
    UnsafeReferenceError,
    UnsupportedFeatureError,
    WrongFormatError,
)

if TYPE_CHECKING:
    from imgcore.areas.area import Area
    from imgcore.border import FilePath, Readable, Writable
    from imgcore.checksums.digest import ChecksumError, Digest
    from imgcore.disk.image import Image, open
    from imgcore.engine.bad_ranges import BadRange
    from imgcore.engine.control import Control, ControlProgress
    from imgcore.engine.extents import EXTENT_DTYPE, Extents, Kind
    from imgcore.engine.progress import Progress
    from imgcore.engine.source_file import SourceFile
    from imgcore.engine.thread_budget import set_thread_budget
    from imgcore.files.byte_source import ByteSource
    from imgcore.formats.api import Measurement, SnapshotInfo
    from imgcore.formats.shared.lint import Finding
    from imgcore.rewriting.director import RewriteCost
    from imgcore.verbs.apply import ApplyResult, apply
    from imgcore.verbs.changes import changes
    from imgcore.verbs.check import CheckResult, check
    from imgcore.verbs.checksum import checksum
    from imgcore.verbs.commit import CommitResult, commit
    from imgcore.verbs.compare import CompareResult, compare, compare_trees
    from imgcore.verbs.convert import ConvertResult, convert
    from imgcore.verbs.create import CreateResult, create
    from imgcore.verbs.flatten import FlattenResult, flatten
    from imgcore.verbs.info import info
    from imgcore.verbs.jobs import UnfinishedJob, jobs
    from imgcore.verbs.lint import LintReport, lint
    from imgcore.verbs.map import MapEntry, map
    from imgcore.verbs.measure import (
        ReflinkMeasurement,
        RewriteMeasurement,
        measure,
        measure_reflink,
        measure_rewrite,
    )
    from imgcore.verbs.rebase import RebaseResult, rebase
    from imgcore.verbs.resize import ResizeResult, resize
    from imgcore.verbs.rewrite import RewriteResult, finish_rewrite, rewrite, undo_rewrite
    from imgcore.verbs.snapshot import (
        apply_snapshot,
        create_snapshot,
        delete_snapshot,
        snapshots,
    )
    from imgcore.verbs.sync import SyncResult, sync
    from imgcore.verbs.verify import VerifyResult, verify

__all__ = [
    "EXTENT_DTYPE",
    "ApplyResult",
    "Area",
    "BadRange",
    "ByteSource",
    "CheckResult",
    "ChecksumError",
    "CommitResult",
    "CompareResult",
    "Control",
    "ControlProgress",
    "ConversionCancelled",
    "ConvertResult",
    "CorruptImageError",
    "CreateResult",
    "Digest",
    "Extents",
    "FilePath",
    "Finding",
    "FlattenResult",
    "FormatError",
    "Image",
    "ImgcoreError",
    "Kind",
    "LimitExceededError",
    "LintReport",
    "MapEntry",
    "Measurement",
    "OptionError",
    "Progress",
    "Readable",
    "RebaseResult",
    "ReflinkMeasurement",
    "ResizeResult",
    "RewriteCost",
    "RewriteMeasurement",
    "RewriteResult",
    "SnapshotInfo",
    "SourceFile",
    "SyncResult",
    "TargetError",
    "UnfinishedJob",
    "UnsafeReferenceError",
    "UnsupportedFeatureError",
    "VerifyResult",
    "Writable",
    "WrongFormatError",
    "__version__",
    "apply",
    "apply_snapshot",
    "changes",
    "check",
    "checksum",
    "commit",
    "compare",
    "compare_trees",
    "convert",
    "create",
    "create_snapshot",
    "delete_snapshot",
    "finish_rewrite",
    "flatten",
    "info",
    "jobs",
    "lint",
    "map",
    "measure",
    "measure_reflink",
    "measure_rewrite",
    "open",
    "rebase",
    "resize",
    "rewrite",
    "set_thread_budget",
    "snapshots",
    "sync",
    "undo_rewrite",
    "verify",
]

# The verbs are imported on first use: NumPy alone takes longer than `imgcore info`.
_HOMES = {
    "EXTENT_DTYPE": "engine.extents",
    "ApplyResult": "verbs.apply",
    "Area": "areas.area",
    "BadRange": "engine.bad_ranges",
    "ByteSource": "files.byte_source",
    "CheckResult": "verbs.check",
    "ChecksumError": "checksums.digest",
    "CommitResult": "verbs.commit",
    "CompareResult": "verbs.compare",
    "Control": "engine.control",
    "ControlProgress": "engine.control",
    "ConvertResult": "verbs.convert",
    "CreateResult": "verbs.create",
    "Digest": "checksums.digest",
    "Extents": "engine.extents",
    "FilePath": "border",
    "Finding": "formats.shared.lint",
    "FlattenResult": "verbs.flatten",
    "Image": "disk.image",
    "Kind": "engine.extents",
    "LintReport": "verbs.lint",
    "MapEntry": "verbs.map",
    "Measurement": "formats.api",
    "Progress": "engine.progress",
    "Readable": "border",
    "Writable": "border",
    "RebaseResult": "verbs.rebase",
    "ReflinkMeasurement": "verbs.measure",
    "ResizeResult": "verbs.resize",
    "RewriteCost": "rewriting.director",
    "RewriteMeasurement": "verbs.measure",
    "RewriteResult": "verbs.rewrite",
    "SnapshotInfo": "formats.api",
    "SourceFile": "engine.source_file",
    "apply_snapshot": "verbs.snapshot",
    "SyncResult": "verbs.sync",
    "UnfinishedJob": "verbs.jobs",
    "VerifyResult": "verbs.verify",
    "apply": "verbs.apply",
    "changes": "verbs.changes",
    "check": "verbs.check",
    "checksum": "verbs.checksum",
    "commit": "verbs.commit",
    "compare": "verbs.compare",
    "compare_trees": "verbs.compare",
    "convert": "verbs.convert",
    "create": "verbs.create",
    "create_snapshot": "verbs.snapshot",
    "delete_snapshot": "verbs.snapshot",
    "finish_rewrite": "verbs.rewrite",
    "flatten": "verbs.flatten",
    "info": "verbs.info",
    "jobs": "verbs.jobs",
    "lint": "verbs.lint",
    "map": "verbs.map",
    "measure": "verbs.measure",
    "measure_reflink": "verbs.measure",
    "measure_rewrite": "verbs.measure",
    "open": "disk.image",
    "rebase": "verbs.rebase",
    "resize": "verbs.resize",
    "rewrite": "verbs.rewrite",
    "set_thread_budget": "engine.thread_budget",
    "snapshots": "verbs.snapshot",
    "sync": "verbs.sync",
    "undo_rewrite": "verbs.rewrite",
    "verify": "verbs.verify",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'imgcore' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"imgcore.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
