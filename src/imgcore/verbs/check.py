"""The verb ``check``: whether an image's tables are consistent."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from imgcore.errors import OptionError, UnsupportedFeatureError

if TYPE_CHECKING:
    from imgcore.disk.layer import Layer
    from imgcore.formats.api import CheckReport


class CheckNotSupportedError(UnsupportedFeatureError):
    """The format has no tables that could be checked."""


@dataclass(frozen=True)
class CheckResult:
    """The findings of ``check``.

    Attributes
    ----------
    filename, format : str
        The image.
    corruptions, leaks : int
        Entries that contradict each other; clusters that nothing refers to (space is
        lost, no data).
    total_clusters, allocated_clusters, fragmented_clusters, compressed_clusters : int
        In the format's own allocation units.
    image_end_offset : int
        Bytes; 0 if the format has no such notion.
    problems : list of str
        One line each, the first 1000.
    repairs : list of str
        What was repaired, one line each.
    corruptions_fixed, leaks_fixed : int
        How many that were.
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

    @property
    def ok(self) -> bool:
        """True if nothing was found."""
        return not (self.corruptions or self.leaks)

    def as_dict(self) -> dict[str, Any]:
        """Return the result in the keys of ``qemu-img check --output=json``.

        Counts of 0 are left out; ``check-errors`` is always 0, as a file that cannot be
        read is an exception.
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
        return result


def check(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    parent: str | os.PathLike[str] | None = None,
    repair: bool = False,
    allow: Sequence[str | os.PathLike[str]] = (),
    share: bool = False,
) -> CheckResult:
    """Verify the tables of an image, and repair on request what can be repaired safely.

    Backing files are not opened unless ``parent`` is given.

    Parameters
    ----------
    path : path-like
        The image.
    format, allow, share
        See :func:`imgcore.open`.
    parent : path-like, optional
        The image's parent: its whole chain of parents is opened, and each must be the one that
        the image was made on.
    repair : bool
        Put right what is safe to put right.  A complete copy with the repairs, verified to read
        the same, takes the image's place; whatever goes wrong, the image stays as it was.

    Returns
    -------
    CheckResult
        After repairs, what is still wrong.

    Raises
    ------
    CheckNotSupportedError
        The format has no tables to check (raw).
    UnsupportedFeatureError
        ``repair``: nothing in this format can be repaired, or not where the image lies.
    CorruptImageError
        The headers alone are beyond use, or ``parent`` is another one.
    OSError
        The operating system refused; ``filename`` is set.
    """
    from imgcore.disk.chain import open_chain
    from imgcore.disk.layer import open_layer
    from imgcore.disk.options import OpenOptions
    from imgcore.formats.registry import get_driver

    if repair and share:
        raise OptionError("an image that another process may write to is not repaired (-U)")
    options = OpenOptions.from_keywords(format=format, parent=parent, allow=allow, share=share)
    if parent is not None:
        for layer in open_chain(path, options):
            layer.close()
    with open_layer(path, options) as layer:
        format_name = layer.reader.format_name
        if not get_driver(format_name).has_tables:
            raise CheckNotSupportedError(
                f"a {format_name} image has no tables to check", path=layer.file.path
            )
        report = layer.reader.check()
        if not repair:
            return _result(layer, report)
        from imgcore.disk.repair import repair as repair_image

        after, repairs = repair_image(layer, report)
        return replace(
            _result(layer, after),
            repairs=[f"{item.problem}: {item.action}" for item in repairs],
            corruptions_fixed=report.corruptions - after.corruptions,
            leaks_fixed=report.leaks - after.leaks,
        )


def _result(layer: Layer, report: CheckReport) -> CheckResult:
    return CheckResult(
        filename=layer.file.path,
        format=layer.reader.format_name,
        corruptions=report.corruptions,
        leaks=report.leaks,
        total_clusters=report.total_clusters,
        allocated_clusters=report.allocated_clusters,
        fragmented_clusters=report.fragmented_clusters,
        compressed_clusters=report.compressed_clusters,
        image_end_offset=report.image_end_offset,
        problems=list(report.problems),
    )
