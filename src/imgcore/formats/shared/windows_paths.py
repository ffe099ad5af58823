"""Turns paths of Windows and other hosts in VHD, VHDX and VMDK into file names."""

from __future__ import annotations

import re

# C: and VMware's [datastore], which may stand before a file's name.
_VOLUME = r"[A-Za-z]:|\[[^\]]+\] "
# Also \\server\share, \\?\Volume{...}, \folder: paths that only the machine of origin
# has.
_ABSOLUTE = re.compile(rf"{_VOLUME}|[\\/]")


def names_from_windows_path(text: str) -> tuple[str, ...]:
    r"""Return the names under which a parent may be found on this host.

    Parameters
    ----------
    text : str
        A Windows path, absolute or relative to the child's folder.

    Returns
    -------
    tuple of str
        Names for `ReferenceGate.open`, the likeliest first: a relative path with
        slashes, then the path's last component, which fits if the disks were moved
        together.  Only the last component of an absolute path is returned.  Empty if
        there is no last component.

    Notes
    -----
    The names are not trusted.  The gate decides whether they may be opened, and the
    identity of the file decides whether it is the parent.

    Source: [MS-VHDX] 2.6.2.6.3, "VHDX Parent Locator"; "Virtual Hard Disk Image Format
    Specification" 1.0, "Parent Locator Entries".
    """
    components = [part for part in re.split(r"[\\/]+", text) if part not in ("", ".")]
    if not components or components[-1] == "..":
        return ()
    last = re.sub(rf"^({_VOLUME})", "", components[-1])
    names = [] if _ABSOLUTE.match(text) else ["/".join(components)]
    if last and last not in names:
        names.append(last)
    return tuple(names)


def names_beside(text: str) -> tuple[str, ...]:
    r"""Return the names, as `names_from_windows_path`, for a path of another host.

    Empty for a relative path of this host: it leads to a file here, or to none.
    """
    is_foreign = "\\" in text or _ABSOLUTE.match(text) is not None
    return names_from_windows_path(text) if is_foreign else ()
