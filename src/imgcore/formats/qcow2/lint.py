"""Lint rules for QCOW2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from imgcore.formats.qcow2 import layout
from imgcore.formats.qcow2.header import read_incompatible_features
from imgcore.formats.shared.lint import Rule

if TYPE_CHECKING:
    from imgcore.formats.shared.lint import ImageFacts


def has_data_file(facts: ImageFacts) -> bool:
    """Tell whether the image has an external data file, even if it cannot be opened."""
    if facts.format != "qcow2":
        return False
    features = read_incompatible_features(facts.file)
    return bool(features & layout.INCOMPATIBLE_DATA_FILE)


def _is_one_file(facts: ImageFacts) -> str | None:
    return "has an external data file" if has_data_file(facts) else None


DATA_FILE: Final = Rule("qcow2-data-file", _is_one_file)
