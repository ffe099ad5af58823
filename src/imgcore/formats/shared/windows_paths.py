"""File names out of the Windows paths by which VHD, VHDX and VMDK name their parents."""

from __future__ import annotations

import re

# C:, \\server\share, \\?\Volume{...}, \folder: a place that only the machine of origin has.
_ABSOLUTE = re.compile(r"[A-Za-z]:|[\\/]")


def names_from_windows_path(text: str) -> tuple[str, ...]:
    r"""Return the names under which a parent may be found here.

    Parameters
    ----------
    text : str
        A Windows path, absolute or relative to the child's folder.

    Returns
    -------
    tuple of str
        Names for `ReferenceGate.open`, the likeliest first: of a relative path the same with
        slashes, then, as of an absolute one, the last component, which is right where disks
        were moved together.  Empty if the path has no last component.

    Notes
    -----
    The names are the image's word: only the gate decides whether they may be opened, and
    only the identity of what is found there whether it is the parent.

    Source: [MS-VHDX] 2.6.2.6.3, "VHDX Parent Locator"; "Virtual Hard Disk Image Format
    Specification" 1.0, "Parent Locator Entries".
    """
    components = [part for part in re.split(r"[\\/]+", text) if part not in ("", ".")]
    if not components or components[-1] == "..":
        return ()
    last = re.sub(r"^[A-Za-z]:", "", components[-1])
    names = [] if _ABSOLUTE.match(text) else ["/".join(components)]
    if last and last not in names:
        names.append(last)
    return tuple(names)
