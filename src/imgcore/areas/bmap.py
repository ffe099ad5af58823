"""Areas in the block maps of bmaptool (bmap 2.0).

A block map lists the blocks of an image that must be copied, with their checksums.

Source: bmap-tools, bmaptools/BmapCreate.py (the comments in the template).
"""

from __future__ import annotations

import hashlib
import re
from array import array
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol
from xml.parsers import expat

from imgcore import limits
from imgcore.areas.area import Area
from imgcore.areas.normal import Entry, rounded
from imgcore.errors import (
    FormatError,
    ImgcoreError,
    LimitExceededError,
    UnsupportedFeatureError,
    WrongFormatError,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from imgcore.files.byte_source import ByteSource

# Version 1.4 is 2.0 under a wrong number.
_VERSIONS: Final = re.compile(r"2\.[0-9]+|1\.4")
_NUMBER: Final = re.compile(r"\s*([0-9]{1,19})\s*")
_RANGE: Final = re.compile(r"\s*([0-9]{1,19})\s*(?:-\s*([0-9]{1,19})\s*)?")

_PIECE_NBYTES: Final = 4 * limits.MIB
_WRITTEN_BLOCK_NBYTES: Final = 4096
_CHECKSUM: Final = "sha256"


def read_bmap(file: ByteSource, virtual_size: int) -> Iterator[Entry]:
    """Yield the areas of a block map; the file's own checksum is verified first.

    Raises
    ------
    FormatError
        The file is not a block map, damaged, or of a disk of another size.
    UnsupportedFeatureError
        It has another version, or a checksum of unknown type.
    LimitExceededError
        It is larger than AREAS_MAX_XML_NBYTES.
    """
    if file.nbytes > limits.AREAS_MAX_XML_NBYTES:
        raise LimitExceededError(
            f"the XML has {file.nbytes} bytes, allowed up to {limits.AREAS_MAX_XML_NBYTES}",
            path=file.path,
        )
    content = file.pread(0, file.nbytes)
    found = _Parser(file.path).parse(content)
    _verify_checksum(found, content)
    return _entries(found, virtual_size)


class _Parser:
    """Collects the texts of the elements below the root, and the ranges of blocks.

    Attributes
    ----------
    path : str
        For messages.
    texts : dict
        The text of each element below the root.
    ranges : array of int
        First and last block of each range.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.texts: dict[str, str] = {}
        self.ranges: array[int] = array("Q")
        self._names: list[str] = []
        self._text: list[str] = []

    def parse(self, content: bytes) -> _Parser:
        parser = expat.ParserCreate()
        parser.buffer_text = True
        # Without document types there are no entities.
        parser.StartDoctypeDeclHandler = self._document_type
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._text.append
        try:
            parser.Parse(content, True)
        except ImgcoreError:
            raise
        except (expat.ExpatError, LookupError, ValueError) as error:
            raise FormatError(f"not XML: {error}", path=self.path) from None
        return self

    def _document_type(self, *_: Any) -> NoReturn:
        raise FormatError("XML with a document type, which a block map lacks", path=self.path)

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        if not self._names:
            self._check_root(name, attributes)
        elif self._names[1:] and (self._names, name) != (["bmap", "BlockMap"], "Range"):
            raise FormatError(
                f"element {name!r:.60} inside {self._names[-1]!r:.60}", path=self.path
            )
        self._names.append(name)
        self._text.clear()

    def _check_root(self, name: str, attributes: dict[str, str]) -> None:
        if name != "bmap":
            raise WrongFormatError(
                f"not a list of changed areas, but XML with the root {name!r:.60}", path=self.path
            )
        version = attributes.get("version", "")
        if not _VERSIONS.fullmatch(version):
            raise UnsupportedFeatureError(
                f"block map of version {version!r:.20}, allowed is 2.0", path=self.path
            )

    def _end(self, name: str) -> None:
        self._names.pop()
        text = "".join(self._text)
        self._text.clear()
        if self._names == ["bmap"]:
            if name in self.texts:
                raise FormatError(f"two elements {name!r:.60} in a block map", path=self.path)
            self.texts[name] = text
        elif self._names:
            self._add_range(text)

    def _add_range(self, text: str) -> None:
        found = _RANGE.fullmatch(text)
        if found is None:
            raise FormatError(f"range {text!r:.60}, allowed is FIRST-LAST", path=self.path)
        self.ranges.append(int(found[1]))
        self.ranges.append(int(found[2] or found[1]))

    def pairs(self) -> Iterator[tuple[int, int]]:
        """Yield the first and the last block of each range."""
        return zip(self.ranges[::2], self.ranges[1::2], strict=True)

    def text(self, name: str) -> str:
        """Return the text of an element that a block map must have."""
        if name not in self.texts:
            raise FormatError(f"a block map without {name}", path=self.path)
        return self.texts[name].strip()

    def number(self, name: str) -> int:
        """Return the number in an element that a block map must have."""
        text = self.text(name)
        if not _NUMBER.fullmatch(text):
            raise FormatError(f"{name} is {text!r:.60}, not a number", path=self.path)
        return int(text)


def _verify_checksum(found: _Parser, content: bytes) -> None:
    """Raise unless the file has its checksum, which is made with zeros in its place."""
    algorithm, stated = found.text("ChecksumType"), found.text("BmapFileChecksum")
    if algorithm not in hashlib.algorithms_guaranteed or algorithm.startswith("shake"):
        raise UnsupportedFeatureError(
            f"the unknown checksum type {algorithm!r:.60}", path=found.path
        )
    octets = stated.encode()
    start = content.find(octets)
    digest = hashlib.new(algorithm, content[:start], usedforsecurity=False)
    digest.update(b"0" * len(octets))
    digest.update(content[start + len(octets) :])
    if start < 0 or digest.hexdigest() != stated:
        raise FormatError(
            "the checksum of the block map is wrong: it is damaged, or was changed by hand",
            path=found.path,
        )


def _entries(found: _Parser, virtual_size: int) -> Iterator[Entry]:
    block_nbytes, n_mapped = found.number("BlockSize"), found.number("MappedBlocksCount")
    image_nbytes, n_blocks = found.number("ImageSize"), found.number("BlocksCount")
    if not block_nbytes or n_blocks != -(-image_nbytes // block_nbytes):
        raise FormatError(
            f"{n_blocks} blocks of {block_nbytes} bytes in an image of {image_nbytes}",
            path=found.path,
        )
    if image_nbytes != virtual_size:
        raise FormatError(
            f"the block map is of a disk of {image_nbytes} bytes, this one has {virtual_size}",
            path=found.path,
        )
    n_listed = sum(last + 1 - first for first, last in found.pairs())
    if n_listed != n_mapped:
        raise FormatError(
            f"{n_listed} blocks in the ranges, but MappedBlocksCount is {n_mapped}",
            path=found.path,
        )
    for first, last in found.pairs():
        start = first * block_nbytes
        end = image_nbytes if last + 1 == n_blocks else (last + 1) * block_nbytes
        yield Entry(start, end - start)


class Readable(Protocol):
    """An open image, from which a block map's checksums are calculated."""

    def readinto(self, offset: int, buffer: Any, /) -> int:
        """Fill a buffer with the disk's bytes from an offset."""
        ...


def bmap_of(areas: Iterable[Area], image: Readable, virtual_size: int) -> str:
    """Return a block map of areas: blocks of 4096 bytes, checksums by SHA-256.

    Parameters
    ----------
    areas : iterable of Area
        In normal form.  Zeros are listed like data.
    image : Readable
        The areas are read from it.
    virtual_size : int
        Size of the disk in bytes.

    Raises
    ------
    LimitExceededError
        The text would be larger than AREAS_MAX_XML_NBYTES.
    """
    block_nbytes = _WRITTEN_BLOCK_NBYTES
    data = (area._replace(is_zero=False) for area in areas)
    ranges, n_mapped, nbytes = [], 0, 0
    for area in rounded(data, block_nbytes, virtual_size):
        first, end = area.offset // block_nbytes, -(-(area.offset + area.length) // block_nbytes)
        n_mapped += end - first
        span = f"{first}" if end == first + 1 else f"{first}-{end - 1}"
        line = f'        <Range chksum="{_checksum(image, area)}"> {span} </Range>\n'
        nbytes += len(line)
        if nbytes > limits.AREAS_MAX_XML_NBYTES - len(_TEMPLATE) - 1024:
            raise LimitExceededError(
                f"the block map would have more than {limits.AREAS_MAX_XML_NBYTES} bytes: "
                "the areas are too many"
            )
        ranges.append(line)
    checksum = "0" * len(hashlib.new(_CHECKSUM).hexdigest())
    text = _TEMPLATE.format(
        image_nbytes=virtual_size,
        block_nbytes=block_nbytes,
        n_blocks=-(-virtual_size // block_nbytes),
        n_mapped=n_mapped,
        checksum_type=_CHECKSUM,
        checksum=checksum,
        ranges="".join(ranges),
    )
    return text.replace(checksum, hashlib.new(_CHECKSUM, text.encode()).hexdigest(), 1)


# The order of bmaptool.
_TEMPLATE: Final = """\
<?xml version="1.0" ?>
<bmap version="2.0">
    <ImageSize> {image_nbytes} </ImageSize>
    <BlockSize> {block_nbytes} </BlockSize>
    <BlocksCount> {n_blocks} </BlocksCount>
    <MappedBlocksCount> {n_mapped} </MappedBlocksCount>
    <ChecksumType> {checksum_type} </ChecksumType>
    <BmapFileChecksum> {checksum} </BmapFileChecksum>
    <BlockMap>
{ranges}    </BlockMap>
</bmap>
"""


def _checksum(image: Readable, area: Area) -> str:
    digest = hashlib.new(_CHECKSUM)
    buffer = memoryview(bytearray(min(area.length, _PIECE_NBYTES)))
    for done in range(0, area.length, len(buffer)):
        piece = buffer[: area.length - done]
        image.readinto(area.offset + done, piece)
        digest.update(piece)
    return digest.hexdigest()
