"""Receipts: JSON that says what a job has done, so that it can be verified later.

docs/receipts.md describes them, and docs/receipt.schema.json is their schema.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from imgcore._version import __version__
from imgcore.checksums.digest import ALGORITHMS, BLOCK_NBYTES, Digest
from imgcore.errors import FormatError, LimitExceededError, OptionError, UnsupportedFeatureError
from imgcore.files.host_file import HostFile
from imgcore.files.identity import BLOCK_DEVICE, Identity, file_identity
from imgcore.files.target import Target
from imgcore.limits import MAX_RECEIPT_NBYTES
from imgcore.log import recorded
from imgcore.sizes import MAX_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Self

    from imgcore.disk.checkpoints import Checkpoints
    from imgcore.disk.sink_options import SinkOptions
    from imgcore.disk.source import Source
    from imgcore.engine.bad_ranges import BadRange
    from imgcore.files.byte_source import ByteSource
    from imgcore.files.target_file import TargetFile

_TYPE: Final = "imgcore-receipt"
_VERSION: Final = 1
_DIGEST_NBYTES: Final = 32


class NewReceipt:
    """A receipt that is being made; it gets its name after the target of the job.

    Attributes
    ----------
    target : Target
        Its file, which is committed with the job.
    """

    def __init__(self, target: Target, warnings: Sequence[str]) -> None:
        self.target: Target = target
        self._warnings = warnings
        self._started = time.time()

    @classmethod
    @contextmanager
    def open(cls, path: str, *, force: bool, job_target: str) -> Iterator[Self]:
        """Create the file, so that what would fail at the end fails at the start.

        Raises
        ------
        OptionError
            It has the name of the job's target.
        TargetError
            The name is taken.
        """
        _refuse_same_name(path, job_target)
        with recorded() as warnings, Target(path, force=force) as target:
            yield cls(target, warnings)

    def protect(self, files: Sequence[ByteSource]) -> None:
        """Refuse to replace any of these files, which the job reads."""
        self.target.protect(files)

    def write(
        self,
        source: Source,
        target: Target,
        options: SinkOptions,
        disk_nbytes: int,
        result: Mapping[str, Any],
    ) -> None:
        """Write what a conversion has done, durably; only the name is missing then.

        ``result`` are the fields of its result, with a checksum.
        """
        digest: Digest = result["checksum"]
        bad_ranges: Sequence[BadRange] = result["bad_ranges"]
        files = target.written()
        for file in files:
            _refuse_same_name(self.target.path, file.path)
        checksum = digest.as_dict() | {"disk_size": disk_nbytes}
        backing = options.backing
        content = {
            "type": _TYPE,
            "version": _VERSION,
            "job": "convert",
            "imgcore": __version__,
            "host": os.uname().nodename,
            "started": _time_text(self._started),
            "ended": _time_text(time.time()),
            "resumed": _resumed(options.checkpoints),
            "source": {
                "name": source.path,
                "format": source.format,
                "disk_size": source.virtual_size,
                "files": [_read_file(file) for file in source.files],
                "checksum": checksum,
            },
            "target": {
                "name": target.path,
                "format": options.format,
                "codec": options.codec,
                "options": _stated(options.options.as_dict()),
                "profile": None if options.profile is None else options.profile.name,
                "compressed": options.compress,
                "in_place": options.in_place,
                "synced": target.sync,
                "backing": None if backing is None else backing.path,
                "backing_format": None if backing is None else backing.format,
                "disk_size": disk_nbytes,
                "files": [_written_file(file) for file in files],
                "checksum": checksum if result["verified"] else None,
            },
            "counts": {name: value for name, value in result.items() if name.startswith("bytes_")},
            "bad_ranges": [
                {
                    "offset": row.guest_offset,
                    "length": row.length,
                    "file": row.path,
                    "reason": row.reason,
                }
                for row in bad_ranges
            ],
            "warnings": list(self._warnings),
        }
        text = json.dumps(content, indent=2) + "\n"
        self.target.main.pwrite(0, text.encode("ascii"))
        self.target.prepare()


def _resumed(checkpoints: Checkpoints | None) -> dict[str, Any] | None:
    """Return what earlier runs have to do with the target."""
    if checkpoints is None or not checkpoints.resumes:
        return None
    return {"started": _time_text(checkpoints.began), "kept": checkpoints.kept_nbytes}


def _refuse_same_name(path: str, job_target: str) -> None:
    if _real_name(path) == _real_name(job_target):
        raise OptionError("the receipt cannot have the name of the target", path=path)


def _real_name(path: str) -> str:
    folder, name = os.path.split(path)
    return os.path.join(os.path.realpath(folder), name)


def _time_text(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _stated(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _read_file(file: ByteSource) -> dict[str, Any]:
    is_named = isinstance(file, HostFile) and file.folder is not None
    path = os.path.abspath(file.path) if is_named else file.path
    return _file(path, file.nbytes, file.modified, file.identity)


def _written_file(file: TargetFile) -> dict[str, Any]:
    status = file.status()
    return _file(
        os.path.abspath(file.path), file.nbytes, int(status.st_mtime), file_identity(status)
    )


def _file(path: str, nbytes: int, modified: int, identity: Identity) -> dict[str, Any]:
    is_device = identity[0] == BLOCK_DEVICE
    return {
        "name": path,
        "size": nbytes,
        "modified": _time_text(modified) if modified else None,
        "device": identity[1] if is_device else identity[0],
        "inode": None if is_device else identity[1],
    }


class Receipt(NamedTuple):
    """What a receipt says about the target, as far as it is needed to verify it.

    Attributes
    ----------
    path : str
        The receipt.
    target : str or None
        The name of the target; None of a stream.
    format : str
        The format's name; raw for a compressed raw disk.
    codec : str or None
        How a raw disk is compressed.
    is_archive : bool
        The target is an archive that a profile asks for.
    in_place : bool
        The target may go on after the disk.
    digest : Digest
        That of its disk.
    disk_nbytes : int
        Bytes of the disk.
    """

    path: str
    target: str | None
    format: str
    codec: str | None
    is_archive: bool
    in_place: bool
    digest: Digest
    disk_nbytes: int

    @classmethod
    def read(cls, path: str) -> Receipt:
        """Read a receipt.

        Raises
        ------
        FormatError
            The file is not a receipt.
        UnsupportedFeatureError
            It has another version.
        LimitExceededError, OSError
            It is too large, or cannot be read.
        """
        parts = _Parts(path, _content(path))
        if parts.get("type") != _TYPE:
            raise FormatError('is not a receipt: it has no "type" that says so', path=path)
        if parts.number("version") != _VERSION:
            raise UnsupportedFeatureError(
                f"is a receipt of version {parts.number('version')}, only version {_VERSION} is "
                "known: verify it with a newer imgcore",
                path=path,
            )
        target = parts.part("target")
        files = target.get("files")
        if not isinstance(files, list):
            raise target.error("files")
        profile = target.get("profile")
        checksum = parts.part("source").part("checksum")
        return cls(
            path=path,
            target=_Parts(path, files[0]).text("name") if files else None,
            format=target.text("format"),
            codec=None if target.get("codec") is None else target.text("codec"),
            is_archive=profile is not None and _is_archived(path, target.text("profile")),
            in_place=target.get("in_place") is True,
            digest=_digest(checksum),
            disk_nbytes=checksum.number("disk_size"),
        )


def _content(path: str) -> Any:
    with HostFile.open(path, share=True) as file:
        if file.nbytes > MAX_RECEIPT_NBYTES:
            raise LimitExceededError(
                f"has {file.nbytes} bytes, a receipt at most {MAX_RECEIPT_NBYTES}", path=path
            )
        data = file.pread(0, file.nbytes)
    try:
        return json.loads(data, object_pairs_hook=_members)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "a text, a number or its nesting is malformed")
        raise FormatError(f"is not a receipt: not JSON: {reason}", path=path) from None


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise json.JSONDecodeError("an object has a key twice", "", 0)
    return found


class _Parts:
    """An object of the receipt, whose parts have the types that are asked for."""

    def __init__(self, path: str, content: Any) -> None:
        self._path = path
        self._content = content if isinstance(content, dict) else {}

    def get(self, name: str) -> Any:
        return self._content.get(name)

    def error(self, name: str) -> FormatError:
        return FormatError(f'is a malformed receipt: "{name}" is missing or wrong', path=self._path)

    def part(self, name: str) -> _Parts:
        if not isinstance(self.get(name), dict):
            raise self.error(name)
        return _Parts(self._path, self.get(name))

    def text(self, name: str) -> str:
        found = self.get(name)
        if not isinstance(found, str) or not found or "\0" in found:
            raise self.error(name)
        return found

    def number(self, name: str) -> int:
        found = self.get(name)
        if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found <= MAX_SIZE:
            raise self.error(name)
        return found


def _digest(parts: _Parts) -> Digest:
    algorithm = parts.text("algorithm")
    if algorithm not in ALGORITHMS or parts.number("block_size") != BLOCK_NBYTES:
        raise parts.error("algorithm")
    try:
        digest = bytes.fromhex(parts.text("digest"))
    except ValueError:
        raise parts.error("digest") from None
    if len(digest) != _DIGEST_NBYTES:
        raise parts.error("digest")
    return Digest(digest, algorithm)


def _is_archived(path: str, profile: str) -> bool:
    from imgcore.platforms.profiles import get_profile

    try:
        return get_profile(profile).is_archived
    except OptionError as error:
        raise FormatError(f"is a malformed receipt: {error}", path=path) from None
