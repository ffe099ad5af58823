"""The verb ``lint``: checks an image against the rules of a platform."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

from imgcore.border import FilePath, file_name
from imgcore.errors import ImgcoreError, WrongFormatError
from imgcore.formats.shared.lint import Finding
from imgcore.log import log
from imgcore.platforms.rules import Facts, find_broken
from imgcore.streams.names import CODEC_OF_SUFFIX

if TYPE_CHECKING:
    from imgcore.disk.open_options import OpenOptions
    from imgcore.files.host_file import HostFile
    from imgcore.platforms.profiles import Profile
    from imgcore.streams.tar import Member

# Files of these formats are not images, so no rule demands that they can be read.
_STREAMS: Final = frozenset({*CODEC_OF_SUFFIX.values(), "xz"})

# Enough for any gzip header and a deflated tar header.
_ARCHIVE_HEAD_NBYTES: Final = 4096


@dataclass(frozen=True)
class LintReport:
    """The result of `imgcore.lint`.

    Attributes
    ----------
    filename, format, profile : str
        The image, its format, and the profile that it was checked against.
    findings : list of Finding
        The broken rules.  Each has the attributes ``rule`` (the name of the rule),
        ``message`` (what is wrong) and ``remedy`` (what to do), one line each.
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
    path: FilePath,
    *,
    profile: str,
    format: str | None = None,
    read_options: Mapping[str, Any] | Sequence[str] | None = None,
    parent: FilePath | Sequence[FilePath] | None = None,
    allow: Sequence[FilePath] = (),
    share: bool = False,
    backing_format: str | None = None,
) -> LintReport:
    """Check an image, from any program, against the rules of a platform.

    For the other keywords see `imgcore.open`.

    Parameters
    ----------
    path : str, bytes or os.PathLike
        The image, or for Compute Engine the archive.
    profile : str
        The platform, as for `imgcore.convert`.

    Returns
    -------
    LintReport

    Raises
    ------
    OptionError
        The profile does not exist.
    WrongFormatError
        The file's format cannot be determined.
    OSError
        The operating system reported an error; ``filename`` is set.

    Notes
    -----
    A damaged or unsupported image does not raise an exception, but is a finding.  Only
    tables are read, except that VirtualBox's rules decompress a whole streamOptimized
    image.
    """
    from imgcore.disk.image import open_image
    from imgcore.disk.open_options import OpenOptions
    from imgcore.platforms.profiles import get_profile

    options = OpenOptions.from_keywords(
        format=format,
        backing_format=backing_format,
        parent=parent,
        read_options=read_options,
        allow=allow,
        share=share,
    )
    chosen = get_profile(profile)
    name = file_name(path)
    with _facts(name, chosen, options) as facts:
        facts.open_chain = lambda: open_image(name, options)
        return LintReport(
            filename=facts.file.path,
            format=facts.format,
            profile=chosen.name,
            findings=find_broken(facts),
        )


@contextmanager
def _facts(path: str, profile: Profile, options: OpenOptions) -> Iterator[Facts]:
    """Open the image, if it can be opened, and collect the facts about it."""
    from imgcore.disk.image_names import local_image
    from imgcore.disk.layer import found_gate
    from imgcore.files.host_file import HostFile
    from imgcore.formats.api import Divided
    from imgcore.formats.registry import find_format, open_found

    name, options = local_image(path, options)
    with ExitStack() as stack:
        file = stack.enter_context(HostFile.open(name, share=options.share))
        found = find_format(file, options.format)
        facts = Facts(
            file=file,
            profile=profile,
            format=found.name,
            reader=None,
            error=None,
            archive=_archive(file),
            open_chain=lambda: None,
        )
        if found.name not in _STREAMS:
            gate = found_gate(file, found, options)
            try:
                reader = open_found(file, gate, found.name, options.read_options)
            except WrongFormatError:
                raise
            except ImgcoreError as error:
                facts.error = error
            else:
                stack.callback(reader.close)
                if isinstance(reader, Divided):
                    reader.require_extents()
                facts.reader = reader
        if found.notice:
            log.warning("%s: %s", file.path, found.notice)
        yield facts


def _archive(file: HostFile) -> Member | None:
    """Return the first header of a gzip tar archive, or None for any other file."""
    from imgcore.streams.tar import BLOCK_NBYTES, parse_header

    head = file.pread(0, min(_ARCHIVE_HEAD_NBYTES, file.nbytes))
    try:
        block = zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(head, BLOCK_NBYTES)
    except zlib.error:
        return None
    return parse_header(block)
