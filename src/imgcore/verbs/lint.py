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
    from imgcore.disk.options import OpenOptions
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
    format, parent, read_options, allow, share
        See :func:`imgcore.open`.

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
    from imgcore.disk.image import open_image
    from imgcore.disk.options import OpenOptions
    from imgcore.platforms.profiles import get_profile

    options = OpenOptions.from_keywords(
        format=format, parent=parent, read_options=read_options, allow=allow, share=share
    )
    chosen = get_profile(profile)
    with _facts(path, chosen, options) as facts:
        facts.open_chain = lambda: open_image(path, options)
        return LintReport(
            filename=facts.file.path,
            format=facts.format,
            profile=chosen.name,
            findings=find_broken(facts),
        )


@contextmanager
def _facts(path: str | os.PathLike[str], profile: Profile, options: OpenOptions) -> Iterator[Facts]:
    """Open the image as far as it can be opened."""
    from imgcore.disk.layer import gate_of
    from imgcore.files.host_file import HostFile
    from imgcore.formats.registry import open_reader

    with ExitStack() as stack:
        file = stack.enter_context(HostFile.open(path, share=options.share))
        facts = Facts(
            file=file,
            profile=profile,
            format=_format_of(file, options),
            reader=None,
            error=None,
            archive=_archive(file),
            open_chain=lambda: None,
        )
        if facts.format in _NO_IMAGES:
            yield facts
            return
        gate = gate_of(file, options)
        try:
            # A reader closes its file, also where it refuses it.
            own = stack.enter_context(HostFile.open(path, share=options.share))
            facts.reader = open_reader(own, gate, options.format, options.read_options)
            stack.callback(facts.reader.close)
        except WrongFormatError:
            raise
        except ImgcoreError as error:
            facts.error = error
        yield facts


def _format_of(file: HostFile, options: OpenOptions) -> str:
    from imgcore.formats.registry import PLAIN_FORMAT, canonical_name, probe

    if options.format is not None:
        return canonical_name(options.format)
    return probe(file) or PLAIN_FORMAT


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
