"""The verb ``jobs``: lists conversions that ended early and can go on."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, NamedTuple

from imgcore.border import FilePath, file_name
from imgcore.errors import ImgcoreError, TargetError
from imgcore.files.folder import Folder
from imgcore.files.resume_journal import (
    MALFORMED,
    SUFFIX,
    JournalInUseError,
    ResumeJournal,
    give_up_unreadable,
)
from imgcore.files.temporary_names import partial_name
from imgcore.log import log

if TYPE_CHECKING:
    from collections.abc import Iterator


class UnfinishedJob(NamedTuple):
    """A conversion with ``resume`` that is not complete; sizes in bytes.

    Attributes
    ----------
    target : str
        The target's name.
    journal : str
        The name of its journal.
    sources : tuple of str
        The names of the files that it reads.
    kept_nbytes : int
        Bytes of the target that are kept; 0 if it will begin anew.  A child of VHD or
        VHDX does, but its journal has where it differs from its parent.
    is_running : bool
        Whether a process is at work on it.  Nothing else is known of it then.
    """

    target: str
    journal: str
    sources: tuple[str, ...]
    kept_nbytes: int
    is_running: bool


def jobs(folder: FilePath, *, remove: bool = False) -> list[UnfinishedJob]:
    """List the conversions with ``resume`` that ended early.

    Parameters
    ----------
    folder : str, bytes or os.PathLike
        The folder of their journals, or one journal.
    remove : bool
        Give them up: remove what they have kept of their targets, and their journals.
        Files and devices that are written in place stay as they are.  Jobs that are
        running go on.

    Returns
    -------
    list of UnfinishedJob
        In the order of their journals' names; with ``remove``, those that were given
        up.

    Raises
    ------
    OSError
        The folder cannot be read, or a file cannot be removed.

    Notes
    -----
    A journal that is damaged, or of another version, is a warning; ``remove`` removes
    it, and the first file of its target.
    """
    path = file_name(folder)
    found = []
    for journal in _journals(path):
        try:
            job = _job(journal, remove=remove)
        except ImgcoreError as error:
            if isinstance(error, TargetError) or not (remove and give_up_unreadable(journal)):
                log.warning("%s", error)
                continue
            job = UnfinishedJob(journal.removesuffix(SUFFIX), journal, (), 0, is_running=False)
        if job is not None and not (remove and job.is_running):
            found.append(job)
    return found


def _journals(path: str) -> Iterator[str]:
    if not os.path.isdir(path):
        os.stat(path)
        yield path
        return
    for name in sorted(os.listdir(path)):
        if name.endswith(SUFFIX):
            yield os.path.join(path, name)


def _job(path: str, *, remove: bool) -> UnfinishedJob | None:
    try:
        journal = ResumeJournal.open(path)
    except JournalInUseError:
        return UnfinishedJob(path.removesuffix(SUFFIX), path, (), 0, is_running=True)
    if journal is None:
        return None
    with contextlib.closing(journal):
        head = journal.begin_head
        try:
            target = _target(path, str(head["path"]))
            sources = tuple(str(source["name"]) for source in head["sources"])
        except MALFORMED:
            raise journal.damaged("its first record is not as imgcore writes it") from None
        if remove:
            _remove(journal, target)
    return UnfinishedJob(target, path, sources, journal.kept_nbytes, is_running=False)


def _target(journal: str, stated: str) -> str:
    """Return the target's path; its folder may have got another name."""
    beside = journal.removesuffix(SUFFIX)
    if os.path.basename(beside) != os.path.basename(stated):
        return stated
    is_stated = not _has_files(beside) and _has_files(stated)
    return stated if is_stated else beside


def _has_files(target: str) -> bool:
    """Tell whether there is a target in place, or what was kept of another one."""
    folder, name = os.path.split(target)
    return any(os.path.lexists(path) for path in (target, os.path.join(folder, partial_name(name))))


def _remove(journal: ResumeJournal, target: str) -> None:
    folder_path, name = os.path.split(target)
    with contextlib.suppress(FileNotFoundError), Folder(folder_path) as folder:
        for file in (name, *journal.companions):
            folder.remove(partial_name(file))
    journal.remove()
