"""Areas in the JSON of ``nbdinfo --map``, of a dirty bitmap that QEMU exports.

An array of objects::

    [{ "offset": 0, "length": 65536, "type": 1, "description": "dirty" }]

Source: libnbd, nbdinfo(1), "Map"; QEMU docs/interop/nbd.txt, "qemu:dirty-bitmap".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from imgcore.areas.normal import Entry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imgcore.areas.json_text import JsonText

# Whether what nbdinfo calls so has changed.
_IS_CHANGED: Final = {"dirty": True, "clean": False}


def read_nbd_map(text: JsonText) -> Iterator[Entry]:
    """Yield the entries of a map, of which those that are dirty are changed.

    Raises
    ------
    FormatError
        An entry is not one of the map of a dirty bitmap.
    """
    for _ in text.objects():
        yield _entry(text, text.value())


def _entry(text: JsonText, value: Any) -> Entry:
    description = value.get("description") if isinstance(value, dict) else None
    if not isinstance(description, str) or description not in _IS_CHANGED:
        raise text.error(
            f"the description {description!r:.40} of an area, instead of dirty or clean: not "
            "the map of a dirty bitmap"
        )
    return Entry(
        text.whole_number(value, "offset"),
        text.whole_number(value, "length"),
        is_changed=_IS_CHANGED[description],
    )
