"""Areas in the JSON of ``qemu-img map``.

An array of objects, or one object after another::

    [{ "start": 0, "length": 65536, "depth": 0, "present": true, "zero": false,
       "data": true, "offset": 327680}]

Source: QEMU docs/tools/qemu-img.rst, "map".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from imgcore.areas.normal import Entry

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from imgcore.areas.area import Area
    from imgcore.areas.json_text import JsonText


def read_map(text: JsonText) -> Iterator[Entry]:
    """Yield the entries of a map, of which those that the image has are changed.

    Raises
    ------
    FormatError
        An entry is not an entry of a map, or is neither data nor zero.
    """
    for _ in text.objects():
        yield _entry(text, text.value())


def _entry(text: JsonText, value: Any) -> Entry:
    if not isinstance(value, dict):
        raise text.error(f"{value!r:.40} instead of an object of the map, which ends here")
    is_zero, is_data = (_flag(text, value, name) for name in ("zero", "data"))
    is_present = _flag(text, value, "present") if "present" in value else True
    if not is_zero and not is_data:
        # So QEMU maps what a bitmap marks (x-dirty-bitmap); the unchanged rest is data.
        raise text.error("an area that is neither data nor zero: not the map of an image")
    return Entry(
        text.whole_number(value, "start"),
        text.whole_number(value, "length"),
        is_zero=is_zero,
        is_changed=is_present or is_data,
    )


def _flag(text: JsonText, value: dict[str, Any], name: str) -> bool:
    flag = value.get(name)
    if not isinstance(flag, bool):
        raise text.error(f"the object that ends here has no {name!r} that is true or false")
    return flag


def map_lines(areas: Iterable[Area]) -> Iterator[str]:
    """Yield the lines of a map of areas only, without the rest of the disk."""
    lead = "["
    for area in areas:
        data, zero = ("false", "true") if area.is_zero else ("true", "false")
        yield (
            f'{lead}{{ "start": {area.offset}, "length": {area.length}, "data": {data}, '
            f'"zero": {zero}}}'
        )
        lead = ",\n"
    yield "[]\n" if lead == "[" else "]\n"
