"""Areas in the JSON of VMware's QueryChangedDiskAreas.

An array of responses, one response after another, or only one::

    {"startOffset": 0, "length": 1048576,
     "changedArea": [{"start": 65536, "length": 512}]}

A response may cover only a part of the disk: then there are several, and a missing one
would hide changes.  Programs differ in how they write responses: pyVmomi adds keys, and
PowerCLI writes keys with capitals.

Source: vSphere Web Services API, VirtualMachine.QueryChangedDiskAreas, DiskChangeInfo.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from imgcore.areas.normal import Entry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imgcore.areas.json_text import JsonText

_DECIMAL: Final = re.compile("[0-9]{1,19}")


def read_responses(text: JsonText, virtual_size: int) -> Iterator[Entry]:
    """Yield the areas of all responses.

    Raises
    ------
    FormatError
        The text is not that of responses, or together they do not cover the disk.
    """
    covered = 0
    for _ in text.objects():
        response = _Response(text)
        yield from response.areas()
        start, end = response.bounds()
        if start != covered:
            raise text.error(
                f"the response that ends here starts at {start} of the disk, not at {covered}: "
                "a response is missing, or they are not in order"
            )
        covered = end
    if covered != virtual_size:
        raise text.error(
            f"the responses cover {covered} bytes, the disk has {virtual_size}: a response is "
            "missing, or they are of another disk"
        )


class _Response:
    """One response, whose members may come in any order."""

    def __init__(self, text: JsonText) -> None:
        self._text = text
        self._facts: dict[str, Any] = {}
        # Where the areas start and end.
        self._first: int | None = None
        self._end = 0

    def areas(self) -> Iterator[Entry]:
        """Yield the changed areas, and take the response from the text."""
        for name in map(str.lower, self._text.members()):
            if name in self._facts:
                raise self._text.error(f"the response has {name!r:.40} twice")
            self._facts[name] = None
            if name == "changedarea" and self._text.next_char() == "[":
                for _ in self._text.items():
                    yield self._area()
            else:
                self._facts[name] = self._text.value()
        # Null stands for no areas.  ConvertTo-Json of PowerShell writes a text in place
        # of what is nested deeper than its -Depth.
        other = self._facts.get("changedarea")
        if other is not None:
            raise self._text.error(f"{other!r:.40} instead of the areas of the response")

    def _area(self) -> Entry:
        value = self._text.value()
        if not isinstance(value, dict):
            raise self._text.error(f"{value!r:.40} instead of an area, which ends here")
        members = {key.lower(): member for key, member in value.items()}
        if len(members) < len(value):
            raise self._text.error("an area, which ends here, has a key twice")
        start, length = (self._number(members, name) for name in ("start", "length"))
        self._first = start if self._first is None else self._first
        self._end = start + length
        return Entry(start, length)

    def bounds(self) -> tuple[int, int]:
        """Return the start and the end of the part of the disk that it covers."""
        start, length = (self._number(self._facts, name) for name in ("startoffset", "length"))
        if self._first is not None and not start <= self._first <= self._end <= start + length:
            raise self._text.error(
                f"the response that ends here is of {length} bytes from {start}, but has areas "
                f"from {self._first} to {self._end}"
            )
        return start, start + length

    def _number(self, members: dict[str, Any], name: str) -> int:
        found = members.get(name)
        if isinstance(found, str) and _DECIMAL.fullmatch(found):
            members = {name: int(found)}
        return self._text.whole_number(members, name)
