"""The records of options: defaults, equality, and what they reject."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

from imgcore.formats.options import FormatOptions, byte_size, flag
from imgcore.formats.qcow2.options import Options as Qcow2Options


class Options(FormatOptions):
    """Two options."""

    size: int | None = byte_size(None, "A size")
    is_fast: bool = flag("Whether it is fast")


class MoreOptions(Options):
    """One more."""

    count: int = byte_size(3, "A count")


def test_defaults_and_values() -> None:
    assert Options().as_dict() == {"size": None, "is_fast": False}
    assert Options(size=5).as_dict() == {"size": 5, "is_fast": False}
    assert Options.is_fast is False, "the class has the default, as for a dataclass"
    assert list(MoreOptions.declared) == ["size", "is_fast", "count"]
    assert list(Options.declared) == ["size", "is_fast"]
    assert list(FormatOptions.declared) == []


def test_equality_and_hash() -> None:
    assert Options(size=5) == Options(is_fast=False, size=5) != Options()
    assert hash(Options(size=5)) == hash(Options(is_fast=False, size=5))
    assert Options() != MoreOptions() and Options() != {"size": None, "is_fast": False}
    assert repr(Options(size=5)) == "Options(size=5, is_fast=False)"


def test_unknown_options() -> None:
    values: dict[str, Any] = {"sise": 5}
    with pytest.raises(TypeError, match="Options has no option 'sise'"):
        Options(**values)


def test_records_do_not_change() -> None:
    options = Options(size=5)
    with pytest.raises(AttributeError, match="size"):
        setattr(options, "size", 6)  # noqa: B010 (mypy rejects the assignment)
    with pytest.raises(AttributeError, match="size"):
        del options.size
    assert options.size == 5


def test_copies() -> None:
    options = Qcow2Options(cluster_size=4096)
    assert copy.deepcopy(options) == pickle.loads(pickle.dumps(options)) == options
