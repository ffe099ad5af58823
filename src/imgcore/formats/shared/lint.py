"""Lint rules: the record of a rule, and the facts about an image that it examines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from imgcore.errors import ImgcoreError
from imgcore.text import one_line

if TYPE_CHECKING:
    from imgcore.files.host_file import HostFile
    from imgcore.formats.api import Reader

CHECK_REMEDY: Final = "imgcore check may tell more"


@dataclass(frozen=True)
class Finding:
    """A broken rule, in the findings of `imgcore.LintReport`; one line each.

    Attributes
    ----------
    rule : str
        Name of the rule.
    message : str
        What is wrong.
    remedy : str
        What to do.
    """

    rule: str
    message: str
    remedy: str


@dataclass
class ImageFacts(ABC):
    """Everything that a rule may examine.

    Attributes
    ----------
    file : HostFile
        The image's file, which the reader reads as well.
    format : str
        The image's format.
    reader : Reader or None
        None if the image cannot be opened; ``error`` then says why, unless imgcore
        cannot read the format.
    error : ImgcoreError or None
        Why the image cannot be opened.
    open_chain : callable
        Returns the open image with its parents.
    """

    file: HostFile
    format: str
    reader: Reader | None
    error: ImgcoreError | None
    open_chain: Callable[[], Any]

    @property
    def subformat(self) -> str | None:
        """Kind within the format."""
        return None if self.reader is None else self.reader.subformat

    @property
    def virtual_size(self) -> int | None:
        """Size of the disk in bytes; None if not known."""
        return None if self.reader is None else self.reader.virtual_size

    @property
    @abstractmethod
    def remedy(self) -> str:
        """Advice for a broken rule that has no better one."""


Facts = TypeVar("Facts", bound=ImageFacts, contravariant=True)


@dataclass(frozen=True)
class Rule(Generic[Facts]):
    """A requirement that an image meets or breaks.

    Attributes
    ----------
    name : str
        Appears in findings.
    check : callable
        Returns what is wrong, or None.  It returns None for other formats than its own:
        another rule reports a wrong format.
    remedy : str, or callable
        What to do about it; `ImageFacts.remedy` if empty.
    """

    name: str
    check: Callable[[Facts], str | None]
    remedy: str | Callable[[Facts], str] = ""

    def apply(self, facts: Facts) -> Finding | None:
        """Return a finding if the rule is broken, or cannot be verified; else None."""
        try:
            message = self.check(facts)
        except (ImgcoreError, FileNotFoundError) as error:
            return Finding(self.name, f"cannot be verified: {error}", CHECK_REMEDY)
        if message is None:
            return None
        remedy = self.remedy if isinstance(self.remedy, str) else self.remedy(facts)
        return Finding(self.name, one_line(message), remedy or facts.remedy)
