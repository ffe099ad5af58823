"""The format of a new disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from imgcore.errors import OptionError
from imgcore.formats.registry import (
    PLAIN_FORMAT,
    canonical_name,
    format_from_suffix,
    format_names,
)
from imgcore.formats.suffixes import stated_format, suffix_of
from imgcore.streams.names import stream_suffix

if TYPE_CHECKING:
    from imgcore.platforms.profiles import Profile


def target_format(
    path: str, stated: str | None, *, flag: str, profile: Profile | None = None
) -> str:
    """Return the format of a new disk: the stated one, or that of the suffix.

    Parameters
    ----------
    path : str
    stated : str, optional
    flag : str
        The command's option for the format, for the message.
    profile : Profile, optional
        The platform that states the format; it has its own rule for archives.

    Raises
    ------
    OptionError
        There is neither, or the suffix states another format, or a compressed stream of
        a format other than raw is wanted.
    """
    name = format_from_suffix(path) if stated is None else canonical_name(stated)
    if profile is not None and profile.is_archived:
        return canonical_name(profile.format)
    is_stream = stream_suffix(path) is not None
    if is_stream and name not in (None, PLAIN_FORMAT):
        raise OptionError(
            f"only {PLAIN_FORMAT} can be written as a compressed stream, not {name}", path=path
        )
    named = PLAIN_FORMAT if is_stream else stated_format(path)
    if named not in (None, name):
        raise OptionError(_contradiction(named or "", name, flag, profile), path=path)
    if name is None:
        raise OptionError(
            f"the name has no suffix of a known format: state the format with {flag}", path=path
        )
    return name


def _contradiction(named: str, name: str | None, flag: str, profile: Profile | None) -> str:
    """Return the message for a suffix that states another format than is written."""
    if name is None:
        suffixes = ", ".join(map(suffix_of, format_names()))
        return f"the name states {named}, which is not written: end it in one of {suffixes}"
    remedy = f"end it in {suffix_of(name)}"
    if name == PLAIN_FORMAT and named in ("gzip", "zstd"):
        remedy += f", or in {suffix_of(name)}{suffix_of(named)} to compress the disk"
    if profile is None:
        remedy += f", or use {flag} {named}" if named in format_names() else ""
        return f"the name states {named}, but {flag} states {name}: {remedy}"
    others = _profiles_of(named)
    remedy += f", or use a profile that writes {named} ({others})" if others else ""
    return f"the name states {named}, but the profile {profile.name} writes {name}: {remedy}"


def _profiles_of(format: str) -> str:
    from imgcore.platforms.profiles import PROFILES

    return ", ".join(p.name for p in PROFILES if p.format == format and not p.is_archived)


def refuse_stream(path: str) -> None:
    """Raise OptionError if a name is that of a compressed raw disk."""
    if stream_suffix(path) is not None:
        raise OptionError("only convert writes compressed raw disks", path=path)
