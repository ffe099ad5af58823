"""The verb ``check``: verifies that an image's tables are consistent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from imgcore.border import FilePath, file_name
from imgcore.errors import OptionError, UnsupportedFeatureError

if TYPE_CHECKING:
    from imgcore.disk.layer import Layer
    from imgcore.disk.repair import Outcome
    from imgcore.disk.table_reads import TableReads
    from imgcore.engine.control import Control
    from imgcore.engine.progress import Progress
    from imgcore.files.commitment import Commitment
    from imgcore.files.target import Target
    from imgcore.formats.shared.check_report import CheckReport


class CheckNotSupportedError(UnsupportedFeatureError):
    """The format has no tables to check."""


@dataclass(frozen=True)
class CheckResult:
    """The result of `imgcore.check`.

    Attributes
    ----------
    filename, format : str
        The image and its format.
    corruptions : int
        Number of errors that may damage data.
    leaks : int
        Number of clusters that nothing refers to: they waste space, but harm no data.
    total_clusters, allocated_clusters, fragmented_clusters, compressed_clusters : int
        Numbers of the format's allocation units.
    image_end_offset : int
        Byte offset after the last cluster in use; 0 if the format does not have one.
    problems : list of str
        The first 1000 problems, one line each.
    repairs : list of str
        The repairs that were made, one line each.
    corruptions_fixed, leaks_fixed : int
        Numbers of corruptions and leaks that were repaired.
    not_repaired : list of str
        Why the remaining problems were not repaired, one line each; empty without
        ``repair``.
    """

    filename: str
    format: str
    corruptions: int = 0
    leaks: int = 0
    total_clusters: int = 0
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0
    image_end_offset: int = 0
    problems: list[str] = field(default_factory=list)
    repairs: list[str] = field(default_factory=list)
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    not_repaired: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True if there are no corruptions and no leaks."""
        return not (self.corruptions or self.leaks)

    def as_dict(self) -> dict[str, Any]:
        """Return the result with the keys of ``qemu-img check --output=json``.

        Counts of 0 are left out.  ``check-errors`` is always 0, since a file that
        cannot be read raises an exception.
        """
        counts = {
            "image-end-offset": self.image_end_offset,
            "total-clusters": self.total_clusters,
            "allocated-clusters": self.allocated_clusters,
            "fragmented-clusters": self.fragmented_clusters,
            "compressed-clusters": self.compressed_clusters,
            "corruptions": self.corruptions,
            "leaks": self.leaks,
            "corruptions-fixed": self.corruptions_fixed,
            "leaks-fixed": self.leaks_fixed,
        }
        result: dict[str, Any] = {
            "filename": self.filename,
            "format": self.format,
            "check-errors": 0,
            **{key: count for key, count in counts.items() if count},
        }
        if self.problems:
            result["problems"] = self.problems
        if self.repairs:
            result["repairs"] = self.repairs
        if self.not_repaired:
            result["not-repaired"] = self.not_repaired
        return result


def check(
    path: FilePath,
    *,
    format: str | None = None,
    parent: FilePath | Sequence[FilePath] | None = None,
    repair: bool | Literal["leaks", "all"] = False,
    allow: Sequence[FilePath] = (),
    share: bool = False,
    backing_format: str | None = None,
    progress: Callable[[Progress], None] | None = None,
    control: Control | None = None,
) -> CheckResult:
    """Verify the tables of an image, and optionally repair them.

    Backing files are not opened unless ``parent`` is given.  For ``format``, ``allow``,
    ``share`` and ``backing_format`` see `imgcore.open`.

    Parameters
    ----------
    path : str, bytes or os.PathLike
        The image.
    parent : str, bytes or os.PathLike, or a sequence of them, optional
        The image's parent, and further ones in order.  The whole chain of parents is
        opened, and the identity of each is verified.
    repair : bool or {"leaks", "all"}
        ``"all"`` or True repairs everything that can be repaired safely, ``"leaks"``
        only frees space that nothing uses.  A repaired copy replaces the image once it
        is complete and verified to hold the same disk.  If anything fails, the image
        remains unchanged.
    progress : callable, optional
        Called with a `Progress` on the calling thread, at most every 50 ms and once at
        the end.  ``done`` are the bytes that were read, ``total`` is 0 until the end.
    control : Control, optional
        Steers the check from other threads.  Its rate is about what is read.

    Returns
    -------
    CheckResult
        After a repair, the counts and problems are those that remain.

    Raises
    ------
    OptionError
        ``repair`` has another value, or is combined with ``share``.
    UnsupportedFeatureError
        The format has no tables to check (raw); or ``repair`` is given, but images of
        this format or in this place cannot be repaired.
    CorruptImageError
        The headers cannot be read, or ``parent`` is not the image's parent.
    OSError
        The operating system reported an error; ``filename`` is set.
    """
    from imgcore.disk.chain import open_chain
    from imgcore.disk.image_names import local_image
    from imgcore.disk.layer import open_layer
    from imgcore.disk.open_options import OpenOptions
    from imgcore.disk.stream_source import is_stream
    from imgcore.disk.table_reads import TableReads
    from imgcore.engine.control import Run
    from imgcore.files.commitment import until_committed
    from imgcore.files.host_file import HostFile
    from imgcore.formats.registry import get_driver

    if repair not in (False, True, "leaks", "all"):
        raise OptionError(f"repair is {repair!r}, allowed are 'leaks', 'all', True and False")
    if repair and share:
        raise OptionError("an image that another process may write to cannot be repaired (-U)")
    options = OpenOptions.from_keywords(
        format=format, backing_format=backing_format, parent=parent, allow=allow, share=share
    )
    name, options = local_image(file_name(path), options)
    if is_stream(name, options):
        with HostFile.open(name, share=share) as file:
            raise CheckNotSupportedError(
                "a raw disk in a stream has no tables to check", path=file.path
            )
    if options.parents:
        for layer in open_chain(name, options):
            layer.close()

    run = Run(control, progress)

    def job(commitment: Commitment[CheckResult]) -> None:
        with run, open_layer(name, options) as layer:
            layer.warn()
            format_name = layer.reader.format_name
            if not get_driver(format_name).has_tables:
                raise CheckNotSupportedError(
                    f"a {format_name} image has no tables to check", path=layer.file.path
                )
            reads = TableReads(run)
            reads.watch((layer.file, *(source.file for source in layer.reader.sources)))
            report = layer.reader.check()
            if repair:
                _repair(layer, report, reads, commitment, leaks_only=repair == "leaks")
            else:
                commitment.result = _result(layer, report)
                reads.finish()

    return until_committed(job)


def _repair(
    layer: Layer,
    report: CheckReport,
    reads: TableReads,
    commitment: Commitment[CheckResult],
    *,
    leaks_only: bool,
) -> None:
    from imgcore.disk.repair import repair

    def result_of(outcome: Outcome) -> CheckResult:
        after = outcome.report
        return replace(
            _result(layer, after),
            repairs=[f"{item.problem}: {item.action}" for item in outcome.repairs],
            corruptions_fixed=report.corruptions - after.corruptions,
            leaks_fixed=report.leaks - after.leaks,
            not_repaired=outcome.obstacles,
        )

    def commit(target: Target, outcome: Outcome) -> None:
        result = result_of(outcome)
        reads.finish()
        reads.run.keep()
        commitment.commit(target, result)

    outcome = repair(layer, report, commit, reads, leaks_only=leaks_only)
    if not outcome.repairs:
        commitment.result = result_of(outcome)
        reads.finish()


def _result(layer: Layer, report: CheckReport) -> CheckResult:
    return CheckResult(
        filename=layer.file.path,
        format=layer.reader.format_name,
        **vars(report),
    )
