"""Text that came out of images and names, made fit for messages.

Whoever made an image chose the names in it: they could span lines, act on a terminal, fill a log,
or carry a password.
"""

from __future__ import annotations

import re
from typing import Final

# Longer texts lose their middle; a path of the usual length keeps all of it.
MAX_TEXT_CHARS: Final = 1200
_TAIL_CHARS: Final = 300
_GAP: Final = " ... "
HIDDEN: Final = "***"

# Of a URL's authority, what stands before the last @; values of such names in queries and JSON.
_USER_INFO: Final = re.compile(r"(?<=://)[^/?#\s]*@")
_SECRET_VALUE: Final = re.compile(
    r"(?i)((?:password|passwd|passphrase|secret|token|key|cookie|credential|signature|sig)"
    r"(?:=|[\"']\s*:\s*[\"']))[^&\"'\s,}]+"
)


def one_line(text: str) -> str:
    """Return a text on one line, bounded, without control characters and without secrets.

    Control and format characters and lone surrogates appear as Python escapes.
    """
    if len(text) > MAX_TEXT_CHARS:
        head = MAX_TEXT_CHARS - _TAIL_CHARS - len(_GAP)
        text = text[:head] + _GAP + text[-_TAIL_CHARS:]
    text = without_secrets(text)
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


def without_secrets(text: str) -> str:
    """Return a name with the credentials hidden that a URL or options in it carry."""
    if "@" in text:
        text = _USER_INFO.sub(f"{HIDDEN}@", text)
    return _SECRET_VALUE.sub(rf"\1{HIDDEN}", text)
