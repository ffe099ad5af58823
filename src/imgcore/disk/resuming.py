"""Finds or begins the journal of a conversion that can go on after a break."""

from __future__ import annotations

import contextlib
import os
import time
import zlib
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from imgcore._version import __version__
from imgcore.border import FilePath, file_name
from imgcore.disk.checkpoints import Checkpoints
from imgcore.errors import OptionError
from imgcore.files.fingerprint import fingerprint
from imgcore.files.resume_journal import MALFORMED, SUFFIX, ResumeJournal
from imgcore.files.temporary_names import partial_name
from imgcore.formats.shared.identities import SEED_NBYTES
from imgcore.log import log

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from imgcore.disk.open_options import OpenOptions
    from imgcore.disk.sink_options import SinkOptions
    from imgcore.files.byte_source import ByteSource

# Names of the facts of a source, for messages.
_FACTS: Final = {
    "size": "size",
    "mtime_ns": "time of modification",
    "inode": "inode",
    "headers": "content of its headers",
}


class Resuming(NamedTuple):
    """How a conversion goes on after a break.

    Attributes
    ----------
    verifies_all : bool
        Whether it verifies all that was kept, or the last checkpoint.
    journal : str or None
        The journal's name; by default it is beside the target.
    """

    verifies_all: bool
    journal: str | None

    @classmethod
    def from_keywords(cls, resume: bool | str, journal: FilePath | None) -> Resuming | None:
        """Return the record, None if nothing is kept; OptionError for other words."""
        if resume is False:
            if journal is not None:
                raise OptionError("--journal is about --resume, which is not given")
            return None
        policy = "last" if resume is True else resume
        if policy not in ("last", "verify"):
            raise OptionError(f"resume={resume!r}: True, False, 'last' and 'verify' are allowed")
        return cls(policy == "verify", None if journal is None else file_name(journal))

    def refuse(self, options: SinkOptions, *, sync: bool, target: str) -> None:
        """Raise OptionError for options that rule out going on after a break."""
        if options.in_order:
            raise OptionError(
                "a stream cannot be written again after a break: name a file, or leave out --resume"
            )
        if not sync:
            raise OptionError("--resume keeps what is on stable storage: it contradicts --no-sync")
        if options.salvage:
            raise OptionError(
                "the list of what is lost cannot be kept after a break: leave out --resume"
            )
        if options.reflink.is_required:
            options.reflink.refuse("it copies nothing that a break could cost: leave out --resume")
        if options.in_place and self.journal is None and not os.path.isfile(target):
            raise OptionError(
                "a journal cannot be beside a block device: state a file with --journal",
                path=target,
            )

    def open_journal(
        self,
        target: str,
        options: SinkOptions,
        opening: OpenOptions,
        sources: Sequence[ByteSource],
        virtual_size: int,
    ) -> ResumeJournal:
        """Return the journal of an earlier run of the same conversion, or a new one.

        Parameters
        ----------
        target : str
            Its name.
        options, opening
            Those for writing and for reading.
        sources : sequence of ByteSource
            Every file that is read.
        virtual_size : int
            Bytes of the target's disk.

        Raises
        ------
        OptionError
            The earlier run had other sources or options.
        ImgcoreError, OSError
            The journal cannot be used.
        """
        path = target + SUFFIX if self.journal is None else self.journal
        facts = {
            "imgcore": __version__,
            "target": os.path.basename(target),
            "options": _options(options, opening) | {"disk": str(virtual_size)},
            "sources": [fingerprint(file) for file in sources],
        }
        if options.in_place:
            status = os.stat(target)
            facts["in_place"] = {"inode": status.st_ino}
        found = ResumeJournal.open(path)
        if found is not None:
            try:
                _refuse_differences(found, facts)
                _take_back(found, os.path.dirname(target))
                if options.in_place or os.path.lexists(_partial(target)):
                    return found
                _refuse_elsewhere(found)
                log.warning("%s: its target is gone: the conversion begins anew", path)
                found.remove()
            except BaseException:
                found.close()
                raise
            found.close()
        more = {
            "seed": _new_seed().hex(),
            "path": os.path.abspath(target),
            "began": int(time.time()),
        }
        return ResumeJournal.create(path, facts | more)

    def checkpoints(self, journal: ResumeJournal) -> Checkpoints:
        """Return what saves the checkpoints of a job, and has those of earlier runs."""
        return Checkpoints(journal, verifies_all=self.verifies_all)


def _new_seed() -> bytes:
    return os.urandom(SEED_NBYTES)


def _take_back(journal: ResumeJournal, folder: str) -> None:
    """Take the final names from files that an earlier run has completed.

    It ended before the job did.  Others keep their names: they are not those files.
    """
    for name, inode in journal.names.items():
        path, partial = os.path.join(folder, name), os.path.join(folder, partial_name(name))
        with contextlib.suppress(FileNotFoundError):
            if os.lstat(path).st_ino == inode and not os.path.lexists(partial):
                os.rename(path, partial)


def _refuse_elsewhere(journal: ResumeJournal) -> None:
    """Raise OptionError if a journal keeps the target of another folder."""
    stated = str(journal.begin_head.get("path", ""))
    if stated and os.path.lexists(_partial(stated)):
        raise OptionError(
            f"is the journal of {stated}: repeat that conversion, give it up (imgcore jobs "
            "--remove), or state another journal",
            path=journal.path,
        )


def give_up_in_place(target: str) -> None:
    """Remove the journal beside a target that is about to be overwritten without it.

    A later run would otherwise go on from what is no longer there.

    Raises
    ------
    TargetError
        Another run is at work.
    ImgcoreError, OSError
        The journal cannot be read or removed.
    """
    found = ResumeJournal.open(target + SUFFIX)
    if found is None:
        return
    with contextlib.closing(found):
        if "in_place" in found.begin_head:
            log.warning("%s: an unfinished conversion (--resume) of it is given up", target)
            found.remove()


def _partial(target: str) -> str:
    folder, name = os.path.split(target)
    return os.path.join(folder, partial_name(name))


def _options(options: SinkOptions, opening: OpenOptions) -> dict[str, str]:
    """Return everything that the bytes of the target depend on, as texts."""
    backing = options.backing
    texts = {
        "-O": _format(options),
        "compressor": _compressor(options),
        "-c": options.compress,
        "-B": None if backing is None else f"{backing.name} ({backing.format})",
        "-S": options.sparse_nbytes,
        "-n": options.in_place,
        "--target-is-zero": options.target_is_zero,
        "--trust-blocks": options.trust_blocks,
        "--profile": None if options.profile is None else options.profile.name,
        "the digest (--checksum, --verify, --receipt)": options.checksum,
        "-f": opening.format,
        "--read-options": _read_options(opening),
    }
    texts |= {f"-o {name}": value for name, value in options.options.as_dict().items()}
    return {name: str(value) for name, value in texts.items()}


def _format(options: SinkOptions) -> str:
    return options.format if options.codec is None else f"{options.format} ({options.codec})"


def _compressor(options: SinkOptions) -> str | None:
    """Return the library that compresses a stream: another may make other bytes."""
    if options.codec == "zstd":
        import zstandard

        return f"zstd {'.'.join(map(str, zstandard.ZSTD_VERSION))}"
    is_archive = options.profile is not None and options.profile.is_archived
    return f"zlib {zlib.ZLIB_RUNTIME_VERSION}" if options.codec or is_archive else None


def _read_options(opening: OpenOptions) -> str:
    given = opening.read_options or ()
    pairs = given.items() if hasattr(given, "items") else ()
    return ",".join([f"{name}={value}" for name, value in pairs] or map(str, given))


def _refuse_differences(journal: ResumeJournal, facts: Mapping[str, Any]) -> None:
    """Raise OptionError if a journal is of another conversion."""
    old = journal.begin_head
    try:
        differences = _differences(old, facts)
        bytes.fromhex(old["seed"])
        time.gmtime(int(old["began"]))
    except MALFORMED:
        raise journal.damaged("its first record is not as imgcore writes it") from None
    if differences:
        raise OptionError(
            f"is the journal of another conversion: {'; '.join(differences)}: repeat that one, or "
            "give it up (imgcore jobs --remove)",
            path=journal.path,
        )


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return what is different now, each difference in words."""
    texts = []
    if old["imgcore"] != new["imgcore"]:
        texts.append(f"imgcore {old['imgcore']} began it, this is {new['imgcore']}")
    if old["target"] != new["target"]:
        texts.append(f"its target is {old['target']}, not {new['target']}")
    if old.get("in_place") != new.get("in_place"):
        texts.append("its target is another file")
    was, now = old["options"], new["options"]
    texts += [
        f"{name} was {was.get(name, 'unknown')}, not {now.get(name, 'unknown')}"
        for name in sorted(was.keys() | now.keys())
        if was.get(name) != now.get(name)
    ]
    if len(old["sources"]) != len(new["sources"]):
        texts.append(f"it had {len(old['sources'])} source files, not {len(new['sources'])}")
    for before, after in zip(old["sources"], new["sources"], strict=False):
        changed = [text for key, text in _FACTS.items() if before.get(key) != after.get(key)]
        if changed:
            texts.append(f"{after['name']} has changed ({', '.join(changed)})")
    return texts
