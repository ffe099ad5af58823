"""Fits what a caller asks for to a platform's profile, or refuses it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from imgcore.errors import LimitExceededError, OptionError
from imgcore.formats.option_texts import given_options, parse_options
from imgcore.formats.registry import canonical_name, get_driver
from imgcore.log import log
from imgcore.platforms.profiles import GCE_SUFFIXES, Container, apply_options, rounded_size

if TYPE_CHECKING:
    from imgcore.disk.source import Source
    from imgcore.formats.option_texts import OptionTexts
    from imgcore.platforms.profiles import Profile


def fitting_format(profile: Profile | None, stated: str | None) -> str | None:
    """Return the format that is to be written, None if neither says it."""
    if profile is None:
        return stated
    if stated is not None and canonical_name(stated) != profile.format:
        raise OptionError(
            f"the profile {profile.name} writes {profile.format}, not {canonical_name(stated)}"
        )
    return profile.format


def fitting_options(
    profile: Profile | None, format: str, options: OptionTexts | None
) -> dict[str, Any]:
    """Return the options of the format, with those that the profile asks for."""
    driver = get_driver(format)
    if profile is None:
        return parse_options(driver, options)
    return parse_options(driver, apply_options(profile, given_options(driver, options)))


def refuse_against_profile(
    profile: Profile, target: str, *, with_backing: bool, in_place: bool, compress: bool
) -> None:
    """Raise OptionError for what the profile rules out, beside format and options."""
    if with_backing and not profile.allows_backing:
        raise OptionError(f"the profile {profile.name} takes no parent (-B)")
    if profile.container is not Container.GCE_TAR:
        return
    if not target.lower().endswith(GCE_SUFFIXES):
        raise OptionError(
            f"the profile {profile.name} writes an archive, name it {' or '.join(GCE_SUFFIXES)}",
            path=target,
        )
    if in_place or compress:
        raise OptionError(f"the profile {profile.name} takes no -n and no -c")


def fitting_size(profile: Profile | None, source: Source) -> int:
    """Return the size that the target's disk gets: rounded up to what the platform takes."""
    if profile is None:
        return source.virtual_size
    nbytes = rounded_size(profile, source.virtual_size)
    if nbytes > profile.max_virtual_nbytes:
        raise LimitExceededError(
            f"{profile.platform} takes no disk of {nbytes} bytes, "
            f"{profile.max_virtual_nbytes} at most",
            path=source.path,
        )
    if nbytes < profile.min_virtual_nbytes:
        log.warning(
            "%s: %s takes no disk of %d bytes, %d at least",
            source.path,
            profile.platform,
            nbytes,
            profile.min_virtual_nbytes,
        )
    return nbytes
