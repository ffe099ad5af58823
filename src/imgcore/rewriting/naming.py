"""The name that a rewritten image gets."""

from __future__ import annotations

import os

from imgcore.disk.target_format import refuse_other_name, refuse_stream
from imgcore.errors import OptionError
from imgcore.files.journal import SUFFIX
from imgcore.formats.registry import format_from_suffix, stated_format, suffix_of


def new_name(path: str, format: str, *, name: str | None, keep_name: bool) -> str:
    """Return the new name of an image, without its folder.

    Parameters
    ----------
    path : str
        The image.
    format : str
        Its new format.
    name : str, optional
        The name that the user states.
    keep_name : bool
        The name stays.

    Returns
    -------
    str
        By default the old name with the suffix of the new format, in place of one that
        states a format.

    Raises
    ------
    OptionError
        The name is that of another folder or format.
    """
    old = os.path.basename(path)
    if name is None:
        if keep_name:
            return old
        stem, suffix = os.path.splitext(old)
        is_stated = stated_format(old) is not None or format_from_suffix(old) is not None
        return (stem if is_stated else stem + suffix) + suffix_of(format)
    if keep_name:
        raise OptionError("--name and --keep-name are both given: give one of them")
    if name in ("", ".", "..") or "/" in name:
        raise OptionError(
            f"--name {name!r}: the image stays in its folder: give a name without one"
        )
    if name.endswith(SUFFIX):
        raise OptionError(f"{name!r}: {SUFFIX} ends the names of journals")
    refuse_stream(name)
    refuse_other_name(name, format, flag="-O")
    return name
