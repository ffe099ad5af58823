"""The verb ``lint``: which rules of a platform an image breaks."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

from imgcore.errors import ImgcoreError, WrongFormatError
from imgcore.formats.shared.lint import Finding
from imgcore.platforms.rules import Facts, find_broken

if TYPE_CHECKING:
    from imgcore.files.host_file import HostFile
    from imgcore.platforms.profiles import Profile
    from imgcore.streams.tar import Member

# More than any gzip header and a deflated tar header need.
_ARCHIVE_HEAD_NBYTES: Final = 4096


@dataclass(frozen=True)
class LintReport:
    """What ``lint`` found.

    Attributes
    ----------
    filename, format, profile : str
        The image, what it is, and the profile it was held against.
    findings : list of Finding
        One for each broken rule: its name (``rule``), what is wrong (``message``), what to do
        (``remedy``), a line each.
    """

    filename: str
    format: str
    profile: str
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True if no rule is broken."""
        return not self.findings

    def as_dict(self) -> dict[str, Any]:
        """Return the report as values for JSON."""
        return asdict(self)


def lint(
    path: str | os.PathLike[str],
    *,
    profile: str,
    format: str | None = None,
    read_options: Mapping[str, Any] | Sequence[str] | None = None,
    parent: str | os.PathLike[str] | None = None,
    allow: Sequence[str | os.PathLike[str]] = (),
    share: bool = False,
) -> LintReport:
    """Tell which rules of a platform an image breaks, whichever program made it.

    Parameters
    ----------
    path : path-like
        The image, or for Compute Engine the archive.
    profile : str
        The platform, as for :func:`imgcore.convert`.
    format : str, optional
        The image's format; found by its magic, or for raw by its suffix, if None.
    read_options : mapping or sequence of str, optional
        How to read the image; see :func:`imgcore.open`.
    parent : path-like, optional
        The image's parent, in place of what the image calls it.
    allow : sequence of path-like
        Folders, besides the image's own, in which files named inside it may lie.
    share : bool
        Open the image even if another process writes to it.

    Returns
    -------
    LintReport

    Raises
    ------
    OptionError
        There is no such profile.
    WrongFormatError
        What the file is cannot be told.
    OSError
        The operating system refused; ``filename`` is set.

    Notes
    -----
    An image that is damaged or not supported is no exception but a finding.  Time: the tables
    are read; for VirtualBox a streamOptimized image is decompressed as a whole.
    """
    from imgcore.disk.image import open as open_image
    from imgcore.platforms.profiles import get_profile

    def open_chain() -> Any:
        return open_image(
            path, format=format, read_options=read_options, parent=parent, allow=allow, share=share
        )

    chosen = get_profile(profile)
    with _facts(path, chosen, format, read_options, allow, share) as facts:
        facts.open_chain = open_chain
        return LintReport(
            filename=facts.file.path,
            format=facts.format,
            profile=chosen.name,
            findings=find_broken(facts),
        )


@contextmanager
def _facts(
    path: str | os.PathLike[str],
    profile: Profile,
    format: str | None,
    read_options: Mapping[str, Any] | Sequence[str] | None,
    allow: Sequence[str | os.PathLike[str]],
    share: bool,
) -> Iterator[Facts]:
    """Open the image as far as it can be opened."""
    from imgcore.files.gate import ReferenceGate, folder_names
    from imgcore.files.host_file import HostFile
    from imgcore.formats.registry import canonical_name, open_reader, probe

    with ExitStack() as stack:
        file = stack.enter_context(HostFile.open(path, share=share))
        facts = Facts(
            file=file,
            profile=profile,
            format=canonical_name(format) if format is not None else probe(file) or "raw",
            reader=None,
            error=None,
            archive=_archive(file),
            open_chain=lambda: None,
        )
        if facts.format in _NO_IMAGES:
            yield facts
            return
        gate = ReferenceGate(os.path.dirname(file.path), folder_names(allow))
        try:
            # A reader closes its file, also where it refuses it.
            own = stack.enter_context(HostFile.open(path, share=share))
            facts.reader = open_reader(own, gate, format, read_options)
            stack.callback(facts.reader.close)
        except WrongFormatError:
            raise
        except ImgcoreError as error:
            facts.error = error
        yield facts


# What is known by its magic and holds no disk that could be read here.
_NO_IMAGES: Final = frozenset({"gzip", "zstd", "xz"})


def _archive(file: HostFile) -> Member | None:
    """Return what the first header of a gzip tar says, None for any other file."""
    from imgcore.streams.tar import BLOCK_NBYTES, parse_header

    head = file.pread(0, min(_ARCHIVE_HEAD_NBYTES, file.nbytes))
    try:
        block = zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(head, BLOCK_NBYTES)
    except zlib.error:
        return None
    return parse_header(block)
