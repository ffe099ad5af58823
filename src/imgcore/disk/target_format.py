"""The format of a new disk."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from imgcore.disk.image_names import refuse_foreign_target
from imgcore.errors import OptionError
from imgcore.formats.registry import (
    PLAIN_FORMAT,
    canonical_name,
    format_from_suffix,
    format_names,
    stated_format,
    suffix_of,
)
from imgcore.streams.names import CODEC_OF_SUFFIX, stream_suffix

if TYPE_CHECKING:
    from imgcore.platforms.profiles import Profile


def target_format(path: str, stated: str | None, *, flag: str) -> str:
    """Return the format of a new disk: the stated one, or that of the suffix.

    Parameters
    ----------
    path : str
    stated : str, optional
    flag : str
        The command's option for the format, for the message.

    Raises
    ------
    OptionError
        There is neither, or a compressed stream of a format other than raw is wanted.
    UnsupportedFeatureError
        The name is a URL.
    """
    refuse_foreign_target(path)
    name = format_from_suffix(path) if stated is None else canonical_name(stated)
    if name is None:
        named = stated_format(path)
        if named is not None:
            suffixes = ", ".join(map(suffix_of, format_names()))
            what = f"the name states {named}, which is not written: end it in one of {suffixes}"
            raise OptionError(what, path=path)
        raise OptionError(
            f"the name has no suffix of a known format: state the format with {flag}", path=path
        )
    if stream_suffix(path) is not None and name != PLAIN_FORMAT:
        raise OptionError(
            f"only {PLAIN_FORMAT} can be written as a compressed stream, not {name}", path=path
        )
    return name


def stated_codec(
    path: str, stated: str | None, *, flag: str, in_order: bool
) -> tuple[str | None, str | None]:
    """Return the stated format without a codec (``raw.zst``), and the codec.

    Parameters
    ----------
    path : str
    stated : str, optional
    flag : str
        The command's option for the format, for the message.
    in_order : bool
        The target is a stream, whose name need not state the codec.

    Raises
    ------
    OptionError
        The name of the file states something else.
    """
    plain, suffix = os.path.splitext(stated or "")
    if plain != PLAIN_FORMAT or suffix not in CODEC_OF_SUFFIX:
        by_name = stream_suffix(path)
        return stated, None if by_name is None else CODEC_OF_SUFFIX[by_name]
    if not in_order and stream_suffix(path) != suffix:
        raise OptionError(f"{flag} states {stated}: end the name in .{stated}", path=path)
    return plain, CODEC_OF_SUFFIX[suffix]


def refuse_other_name(path: str, name: str, *, flag: str, profile: Profile | None = None) -> None:
    """Raise OptionError if the suffix of a new disk states another format than it has.

    A profile that writes archives has its own rule for their names.
    """
    named = stated_format(path)
    is_archive = profile is not None and profile.is_archived
    if named is None or named == name or is_archive or stream_suffix(path) is not None:
        return
    remedy = f"end it in {suffix_of(name)}"
    if name == PLAIN_FORMAT and named in CODEC_OF_SUFFIX.values():
        remedy += f", or in {suffix_of(name)}{suffix_of(named)} to compress the disk"
    if profile is None:
        statement = f"{flag} states {name}"
        remedy += f", or use {flag} {named}" if named in format_names() else ""
    else:
        statement = f"the profile {profile.name} writes {name}"
        others = _profiles_of(named)
        remedy += f", or use a profile that writes {named} ({others})" if others else ""
    raise OptionError(f"the name states {named}, but {statement}: {remedy}", path=path)


def _profiles_of(format: str) -> str:
    from imgcore.platforms.profiles import PROFILES

    return ", ".join(p.name for p in PROFILES if p.format == format and not p.is_archived)


def refuse_stream(path: str) -> None:
    """Raise OptionError if a name is that of a compressed raw disk."""
    if stream_suffix(path) is not None:
        raise OptionError("only convert writes compressed raw disks", path=path)
