"""Writes in place to each image that a fuzzer makes, and checks the outcome."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

import imgcore
from imgcore.files.update_file import UpdateFile
from tests.fuzz.exercise import Finding, Place, attempt
from tests.fuzz.pieces import Pieces
from tests.helpers.updates import Model

N_CHANGES = 12
MAX_MODEL_NBYTES = 4 << 20
MIB = 1 << 20
# Where the first block of a VDI is may be stated anywhere in 4 GiB.
MAX_GROWTH_NBYTES = 8 << 30


class UpdatePlace(Place):
    """A folder with a family, in which images are written to one after the other."""

    def use(self, data: bytes) -> str:
        """Write to one packed image; return ``ok`` or the name of the exception.

        Raises
        ------
        Finding
            An exception that is not imgcore's, a timeout, a write to a file that is not
            the image's, damage, or wrong content.
        """
        image = Pieces.unpack(data)
        path = self.path_of(image)
        image.save(path)
        try:
            return _Update(path, image, self.files).run(data)
        finally:
            path.unlink()
            self.restore()


class _Update:
    """Changes of one image, by numbers that follow from its bytes."""

    def __init__(self, path: Path, image: Pieces, files: dict[Path, bytes]) -> None:
        self._path, self._format = path, image.format
        self._files = files
        self._own: set[Path] = set()
        self._model: Model | None = None
        self._max_allocated_nbytes = path.stat().st_blocks * 512 + 64 * MIB
        self._is_opened = False

    def run(self, data: bytes) -> str:
        self._chance = random.Random(hashlib.sha256(data).digest())
        was_sound = self._is_sound()
        before, nbytes = self._digest(), self._path.stat().st_size
        as_read = self._as_read()
        outcome = attempt(self._change, self._path, self._format)
        # What an interrupted writer has left may be completed before.
        is_same = self._digest() == before or self._as_read() == as_read
        if not self._is_opened and not is_same:
            raise Finding(f"an image that was refused has changed ({outcome})")
        self._require_others_unchanged()
        for path in self._own | {self._path}:
            status, before_nbytes = path.stat(), len(self._files.get(path, b"")) or nbytes
            if (
                status.st_size > before_nbytes + MAX_GROWTH_NBYTES
                or status.st_blocks * 512 > self._max_allocated_nbytes
            ):
                raise Finding(
                    f"{path.name} grew to {status.st_size} bytes, {status.st_blocks} blocks"
                )
        if was_sound and self._is_opened:
            self._require_sound()
        return outcome

    def _require_others_unchanged(self) -> None:
        """Find other files that were written to, made, or opened from outside."""
        for path in self._own:
            if path.parent != self._path.parent:
                raise Finding(f"{path}, which is outside the folder, was opened for writing")
        for path, content in self._files.items():
            if path not in self._own and path.read_bytes() != content:
                raise Finding(f"{path.name} was written to")
        found = {path for path in self._path.parent.parent.rglob("*") if path.is_file()}
        made = found - self._files.keys() - {self._path}
        if made:
            raise Finding(f"made other files: {sorted(map(str, made))}")

    def _digest(self) -> bytes:
        """Return a digest of the image, of whose end at most 64 MiB count."""
        with self._path.open("rb") as file:
            return hashlib.sha256(file.read(64 * MIB)).digest()

    def _as_read(self) -> str:
        """Return the start of the disk, or why it cannot be opened."""
        try:
            with imgcore.open(self._path, format=self._format) as image:
                return repr(image.read(0, min(image.virtual_size, MIB)))
        except (imgcore.ImgcoreError, OSError) as error:
            return repr(error)

    def _is_sound(self) -> bool:
        """Tell whether the image is undamaged, and small enough for a model."""
        try:
            if imgcore.check(self._path, format=self._format).corruptions:
                return False
            with imgcore.open(self._path, format=self._format) as image:
                if image.virtual_size <= MAX_MODEL_NBYTES:
                    self._model = Model(image.read(0, image.virtual_size))
        except (imgcore.ImgcoreError, OSError):
            return False
        return True

    def _require_sound(self) -> None:
        found = imgcore.check(self._path, format=self._format)
        if found.corruptions:
            raise Finding(f"damaged: {found.problems[:3]}")
        if self._model is not None:
            with imgcore.open(self._path, format=self._format) as image:
                self._model.check(0, image.read(0, image.virtual_size))

    def _change(self, path: str, format: str | None) -> None:
        errors: list[Exception] = []
        with imgcore.open(path, mode="r+", format=format) as image:
            self._is_opened = True
            reader = image.layers[0]
            own = [s.file for s in reader.sources if isinstance(s.file, UpdateFile)]
            self._own = {Path(os.path.realpath(file.path)) for file in own}
            self._max_allocated_nbytes += 2 * N_CHANGES * max(reader.block_nbytes, 65536)
            for _ in range(N_CHANGES):
                try:
                    self._change_once(image)
                except (imgcore.ImgcoreError, OSError) as error:
                    # A part may have been written.
                    self._model = None
                    errors.append(error)
        if errors:
            raise errors[0]

    def _change_once(self, image: imgcore.Image) -> None:
        chance, model, size = self._chance, self._model, image.virtual_size
        nbytes = min(chance.choice((1, 512, 4096, 70_000)), size)
        offset = chance.choice((0, size - nbytes, chance.randint(0, size - nbytes)))
        action = chance.choice(("write", "write", "zero", "discard", "flush", "resize"))
        if action == "write":
            data = chance.randbytes(nbytes)
            image.write(offset, data)
            if image.read(offset, nbytes) != data:
                raise Finding(f"{nbytes} bytes at {offset} do not read as written")
        elif action == "zero":
            data = bytes(nbytes)
            image.zero(offset, nbytes, unmap=chance.random() < 0.5)
        elif action == "discard":
            image.discard(offset, nbytes)
            if model is not None:
                model.discard(offset, nbytes)
            return
        elif action == "resize":
            if not size > MAX_MODEL_NBYTES:
                size = max(size + chance.choice((-65536, 512, 70_144)) & ~511, 512)
                image.resize(size, shrink=True)
                if model is not None:
                    model.resize(size)
            return
        else:
            image.flush()
            return
        if model is not None:
            model.write(offset, data)
