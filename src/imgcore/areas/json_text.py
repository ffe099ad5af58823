"""Reads a JSON text of any length in pieces."""

from __future__ import annotations

import codecs
import json
import re
from typing import TYPE_CHECKING, Any, Final

from imgcore import limits
from imgcore.errors import FormatError, LimitExceededError
from imgcore.sizes import MAX_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imgcore.files.byte_source import ByteSource

_PIECE_NBYTES: Final = 1 << 20
_SPACE: Final = re.compile(r"[ \t\n\r]*")


class _RepeatedKeyError(Exception):
    """An object has a key twice, and programs differ in which of them counts."""


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _RepeatedKeyError
    return found


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_members)


def encoding_of(start: bytes) -> str:
    """Return the encoding of a text by its mark; without one it is UTF-8.

    Windows PowerShell writes UTF-16 with a mark.
    """
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    return "utf-8-sig"


class JsonText:
    """A JSON text that is read from its start to its end.

    The caller walks through the large arrays and objects by `items` and `members`, and
    takes the small values in them by `value`.

    Parameters
    ----------
    file : ByteSource

    Raises
    ------
    LimitExceededError
        The file, or a value that the caller takes, is larger than a named limit.
    FormatError
        The text is not JSON, or not what the caller expects.
    """

    def __init__(self, file: ByteSource) -> None:
        if file.nbytes > limits.AREAS_MAX_JSON_NBYTES:
            raise LimitExceededError(
                f"the list has {file.nbytes} bytes, allowed up to {limits.AREAS_MAX_JSON_NBYTES}",
                path=file.path,
            )
        self._file = file
        encoding = encoding_of(file.pread(0, min(4, file.nbytes)))
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._offset = 0
        self._text = ""
        self._at = 0
        self._n_chars_before = 0

    def error(self, message: str) -> FormatError:
        """Return an error about the text at the present position."""
        return FormatError(
            f"{message}, at character {self._n_chars_before + self._at}", path=self._file.path
        )

    def _look_ahead(self) -> None:
        """Have as many characters in memory as a value may have, or the rest."""
        wanted = limits.AREAS_MAX_JSON_VALUE_CHARS
        while len(self._text) - self._at < wanted and self._offset < self._file.nbytes:
            nbytes = min(_PIECE_NBYTES, self._file.nbytes - self._offset)
            piece = self._file.pread(self._offset, nbytes)
            self._offset += nbytes
            try:
                text = self._decoder.decode(piece, final=self._offset == self._file.nbytes)
            except UnicodeDecodeError as error:
                raise FormatError(f"not a text: {error.reason}", path=self._file.path) from None
            self._n_chars_before += self._at
            self._text = self._text[self._at :] + text
            self._at = 0

    def next_char(self) -> str:
        """Return the next character that is no white space, empty at the end."""
        while True:
            self._look_ahead()
            found = _SPACE.match(self._text, self._at)
            self._at = found.end() if found else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if self._offset == self._file.nbytes:
                return ""

    def _take(self, chars: str) -> str:
        """Take one of the characters, which must come next."""
        found = self.next_char()
        if not found or found not in chars:
            raise self.error(f"{_shown(found)} instead of {' or '.join(chars)}")
        self._at += 1
        return found

    def items(self) -> Iterator[None]:
        """Walk through an array: at each step the caller takes the next item."""
        self._take("[")
        if self.next_char() == "]":
            self._at += 1
            return
        while True:
            yield
            if self._take(",]") == "]":
                return

    def members(self) -> Iterator[str]:
        """Walk through an object: at each key the caller takes its value."""
        self._take("{")
        if self.next_char() == "}":
            self._at += 1
            return
        while True:
            if self.next_char() != '"':
                raise self.error(f"{_shown(self.next_char())} instead of a key")
            key = str(self.value())
            self._take(":")
            yield key
            if self._take(",}") == "}":
                return

    def objects(self) -> Iterator[None]:
        """Walk through an array of objects, or through objects one after another."""
        if self.next_char() == "[":
            yield from self.items()
        else:
            while self.next_char() == "{":
                yield
        if found := self.next_char():
            raise self.error(f"{_shown(found)} instead of the end of the text")

    def value(self) -> Any:
        """Take a value, which must be small."""
        if not self.next_char():
            raise self.error("the text ends too early")
        try:
            value, end = _DECODER.raw_decode(self._text, self._at)
        except RecursionError:
            raise self.error("arrays or objects are nested too deeply") from None
        except _RepeatedKeyError:
            raise self.error("an object starts here that has a key twice") from None
        except ValueError as error:
            if len(self._text) - self._at >= limits.AREAS_MAX_JSON_VALUE_CHARS:
                raise self._too_large() from None
            reason = getattr(error, "msg", "a number has too many digits")
            raise self.error(f"not JSON: {reason}") from None
        if end - self._at >= limits.AREAS_MAX_JSON_VALUE_CHARS:
            raise self._too_large()
        self._at = end
        return value

    def whole_number(self, members: dict[str, Any], name: str) -> int:
        """Return a whole number from the object that was taken last."""
        found = members.get(name)
        if isinstance(found, bool) or not isinstance(found, int):
            raise self.error(f"the object that ends here has no {name!r} that is a whole number")
        if not -MAX_SIZE <= found <= MAX_SIZE:
            raise self.error(f"{name!r} in the object that ends here exceeds 2^63 - 1")
        return found

    def _too_large(self) -> LimitExceededError:
        return LimitExceededError(
            f"a value at character {self._n_chars_before + self._at} is not JSON, or has "
            f"{limits.AREAS_MAX_JSON_VALUE_CHARS} characters or more",
            path=self._file.path,
        )


def _shown(char: str) -> str:
    return repr(char) if char else "the end of the text"
