"""Combines the caller's options with a platform's profile, or rejects them.

Most conversions have no profile: the profiles are imported only where there is one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from imgcore.errors import LimitExceededError, OptionError
from imgcore.formats.option_texts import given_options, parse_options
from imgcore.formats.registry import canonical_name, get_driver
from imgcore.log import log

if TYPE_CHECKING:
    from imgcore.disk.source import Source
    from imgcore.formats.option_texts import OptionTexts
    from imgcore.formats.options import FormatOptions
    from imgcore.platforms.profiles import Profile


def fitting_format(profile: Profile | None, stated: str | None) -> str | None:
    """Return the format to write, or None if neither states one."""
    if profile is None:
        return stated
    if stated is not None and canonical_name(stated) != profile.format:
        raise OptionError(
            f"the profile {profile.name} writes {profile.format}, not {canonical_name(stated)}"
        )
    return profile.format


def fitting_options(
    profile: Profile | None, format: str, options: OptionTexts | None
) -> FormatOptions:
    """Return the options of the format, including those that the profile requires."""
    driver = get_driver(format)
    if profile is None:
        return parse_options(driver, options)
    from imgcore.platforms.profiles import apply_options

    return parse_options(driver, apply_options(profile, given_options(driver, options)))


def refuse_against_profile(
    profile: Profile, target: str | None, *, with_backing: bool, in_place: bool, compress: bool
) -> None:
    """Raise OptionError for requests that contradict the profile in other ways.

    A stream has no name, so ``target`` is None.
    """
    if with_backing and not profile.allows_backing:
        raise OptionError(f"the profile {profile.name} does not allow a parent (-B)")
    if not profile.is_archived:
        return
    from imgcore.platforms.profiles import GCE_SUFFIXES

    if target is not None and not target.lower().endswith(GCE_SUFFIXES):
        raise OptionError(
            f"the profile {profile.name} writes an archive, whose name must end in "
            f"{' or '.join(GCE_SUFFIXES)}",
            path=target,
        )
    if in_place or compress:
        raise OptionError(f"the profile {profile.name} does not allow -n or -c")


def fitting_size(profile: Profile | None, source: Source) -> int:
    """Return the size of the target's disk, rounded up to the platform's unit.

    It is 0 as long as the source's is not known.
    """
    if profile is None or not (source.size_is_known or source.virtual_size):
        return source.virtual_size
    from imgcore.platforms.profiles import rounded_size

    nbytes = rounded_size(profile, source.virtual_size)
    if nbytes > profile.max_virtual_nbytes:
        raise LimitExceededError(
            f"a disk of {nbytes} bytes is too large for {profile.platform}: at most "
            f"{profile.max_virtual_nbytes} are allowed",
            path=source.path,
        )
    return nbytes


def warn_about_size(profile: Profile | None, source: Source, nbytes: int) -> None:
    """Warn if a target's disk of ``nbytes`` bytes is too small for its platform."""
    is_known = source.size_is_known or source.virtual_size
    if profile is not None and is_known and nbytes < profile.min_virtual_nbytes:
        log.warning(
            "%s: a disk of %d bytes is too small for %s: at least %d are needed",
            source.path,
            nbytes,
            profile.platform,
            profile.min_virtual_nbytes,
        )
