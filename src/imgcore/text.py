"""Makes text from images and names safe for messages.

The maker of an image chose the names in it.  They could span lines, control a
terminal, fill a log, or contain a password.
"""

from __future__ import annotations

import re
from typing import Final

# Longer texts lose their middle; the usual path is shorter.
MAX_TEXT_CHARS: Final = 1200
_TAIL_CHARS: Final = 300
_GAP: Final = " ... "
HIDDEN: Final = "***"

# The part of a URL's authority before the last @, and the values of secret fields in
# queries and JSON.
_USER_INFO: Final = r"(?<=://)[^/?#\s]*@"
_SECRET_VALUE: Final = (
    r"(?i)((?:password|passwd|passphrase|secret|token|key|cookie|credential|signature|sig)"
    r"(?:=|[\"']\s*:\s*[\"']))[^&\"'\s,}]+"
)


def one_line(text: str) -> str:
    """Return a text as one line of bounded length, without its secrets.

    Control and format characters and lone surrogates become Python escapes.
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
    """Return a name with the credentials of URLs and options in it hidden."""
    if "@" in text:
        text = re.sub(_USER_INFO, f"{HIDDEN}@", text)
    if "=" in text or ":" in text:
        text = re.sub(_SECRET_VALUE, rf"\1{HIDDEN}", text)
    return text
