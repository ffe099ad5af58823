"""The format of a new disk."""

from __future__ import annotations

from imgcore.disk.image_names import refuse_foreign_target
from imgcore.errors import OptionError
from imgcore.formats.registry import PLAIN_FORMAT, canonical_name, format_from_suffix
from imgcore.streams.names import stream_suffix


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
    name = format_from_suffix(path) if stated is None else stated
    if name is None:
        raise OptionError(
            f"the name has no suffix of a known format: state the format with {flag}", path=path
        )
    name = canonical_name(name)
    if stream_suffix(path) is not None and name != PLAIN_FORMAT:
        raise OptionError(
            f"only {PLAIN_FORMAT} can be written as a compressed stream, not {name}", path=path
        )
    return name


def refuse_stream(path: str) -> None:
    """Raise OptionError if a name is that of a compressed raw disk."""
    if stream_suffix(path) is not None:
        raise OptionError("only convert writes compressed raw disks", path=path)
