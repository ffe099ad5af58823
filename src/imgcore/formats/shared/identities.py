"""The random identities of new images: UUIDs, GUIDs, content IDs.

A request with a seed draws them from that, so that a conversion which goes on after a
break writes the same ones again.
"""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

if TYPE_CHECKING:
    from imgcore.formats.api import WriteRequest

SEED_NBYTES: Final = 32
_UUID_NBYTES: Final = 16


def random_octets(request: WriteRequest[Any], purpose: str, nbytes: int) -> bytes:
    """Return random bytes, at most 32; for each purpose others."""
    seed = os.urandom(SEED_NBYTES) if request.seed is None else request.seed
    return hashlib.sha256(seed + purpose.encode()).digest()[:nbytes]


def random_uuid(request: WriteRequest[Any], purpose: str) -> UUID:
    """Return a UUID of version 4; for each purpose another."""
    return UUID(bytes=random_octets(request, purpose, _UUID_NBYTES), version=4)
