"""One image without its backing files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imgcore.files.host_file import HostFile
    from imgcore.formats.api import Reader


@contextmanager
def open_layer(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    read_options: Mapping[str, Any] | Sequence[str] | None = None,
    allow: Sequence[str | os.PathLike[str]] = (),
    share: bool = False,
) -> Iterator[tuple[HostFile, Reader]]:
    """Open one image without its backing files."""
    from imgcore.files.gate import ReferenceGate, folder_names
    from imgcore.files.host_file import HostFile
    from imgcore.formats.registry import open_reader

    with HostFile.open(path, share=share) as file:
        gate = ReferenceGate(os.path.dirname(file.path), folder_names(allow))
        reader = open_reader(file, gate, format, read_options)
        try:
            yield file, reader
        finally:
            reader.close()
