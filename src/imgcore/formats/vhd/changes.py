"""VHD: changes of footers and headers, for writing in place.

Nothing here imports NumPy.

Source: Microsoft, "Virtual Hard Disk Image Format Specification" 1.0, "Hard Disk Footer
Format" and "Dynamic Disk Header Format".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from imgcore.errors import OptionError, UnsupportedFeatureError
from imgcore.formats.vhd import layout
from imgcore.formats.vhd.header import checksum, chs_nbytes, footer_of, stated_size
from imgcore.formats.vhd.layout import DynamicHeader, Footer
from imgcore.formats.vhd.options import geometry_of, rounded_to_chs
from imgcore.limits import VHD_MAX_DYNAMIC_NBYTES

if TYPE_CHECKING:
    from imgcore.formats.vhd.header import VhdHeader


def with_footer(raw: bytes, footer: Footer) -> bytes:
    """Return a footer with these fields, and its checksum."""
    packed = layout.FOOTER.pack(*footer)
    return with_checksum(packed + raw[len(packed) :], layout.FOOTER_CHECKSUM_OFFSET)


def with_header(raw: bytes, header: DynamicHeader) -> bytes:
    """Return a dynamic disk header with these fields, and its checksum."""
    packed = layout.HEADER.pack(*header)
    return with_checksum(packed + raw[len(packed) :], layout.HEADER_CHECKSUM_OFFSET)


def with_checksum(raw: bytes, offset: int) -> bytes:
    """Return a structure with the checksum of its bytes."""
    value = checksum(raw, offset).to_bytes(4, "big")
    return raw[:offset] + value + raw[offset + 4 :]


def resized_footer(raw: bytes, header: VhdHeader, virtual_size: int, path: str) -> bytes:
    """Return an image's footer for another size of its disk.

    Raises
    ------
    OptionError
        The image cannot state the size.
    UnsupportedFeatureError
        What its footer states now is not the size that counts.
    """
    if header.size.because in ("file", "option"):
        raise UnsupportedFeatureError(
            "programs read different sizes from the footer of this VHD, so it is not resized in "
            "place: imgcore convert writes one whose size is clear",
            path=path,
        )
    if header.dynamic is not None and virtual_size > VHD_MAX_DYNAMIC_NBYTES:
        raise OptionError(
            f"a dynamic VHD of {virtual_size} bytes, at most {VHD_MAX_DYNAMIC_NBYTES} "
            "(2040 GiB) are allowed",
            path=path,
        )
    old = footer_of(raw)
    chs = geometry_of(virtual_size) if chs_nbytes(old) else (0, 0, 0)
    new = old._replace(
        current_size=virtual_size,
        cylinders=chs[0],
        heads=chs[1],
        sectors_per_track=chs[2],
    )
    if stated_size(new).nbytes != virtual_size:
        raise OptionError(
            f"this VHD states its size as a geometry, which cannot be {virtual_size} bytes: "
            f"{rounded_to_chs(virtual_size)} is the next size that it can be",
            path=path,
        )
    return with_footer(raw, new)
