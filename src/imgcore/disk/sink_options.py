"""The options for writing a disk, as one record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, NamedTuple, SupportsIndex

from imgcore.border import integer
from imgcore.disk.backing import backing_reference
from imgcore.disk.profile_fitting import fitting_format, fitting_options, refuse_against_profile
from imgcore.disk.reflinks import Reflink
from imgcore.disk.target_format import stated_codec, target_format
from imgcore.engine.job import chosen_variants, thread_count
from imgcore.errors import OptionError
from imgcore.formats.registry import PLAIN_FORMAT
from imgcore.limits import MIB, SECTOR_NBYTES
from imgcore.sizes import parse_size

if TYPE_CHECKING:
    from imgcore._core import RateLimit
    from imgcore.border import FilePath
    from imgcore.disk.checkpoints import Checkpoints
    from imgcore.formats.api import BackingReference
    from imgcore.formats.option_texts import OptionTexts
    from imgcore.formats.options import FormatOptions
    from imgcore.platforms.profiles import Profile

_MAX_SPARSE_NBYTES: Final = 1 * MIB


class SinkOptions(NamedTuple):
    """The keywords of `imgcore.convert` that are about the target."""

    format: str
    options: FormatOptions
    compress: bool
    backing: BackingReference | None
    sparse_nbytes: int
    threads: int
    in_place: bool
    target_is_zero: bool
    salvage: bool
    reflink: Reflink
    trust_blocks: bool
    variants: Mapping[str, str]
    profile: Profile | None
    limit: RateLimit | None
    checksum: str | None = None
    checkpoints: Checkpoints | None = None
    codec: str | None = None
    in_order: bool = False

    @classmethod
    def from_keywords(
        cls,
        target: str,
        *,
        format: str | None,
        options: OptionTexts | None,
        compress: bool,
        backing: FilePath | None,
        backing_format: str | None,
        sparse: SupportsIndex | str,
        threads: SupportsIndex | None,
        in_place: bool,
        target_is_zero: bool,
        salvage: bool,
        reflink: bool | str,
        trust_blocks: bool,
        kernels: Mapping[str, str] | None,
        profile: str | None,
        limit: RateLimit | None,
        checksum: str | None = None,
        in_order: bool = False,
    ) -> SinkOptions:
        """Return the record; OptionError if the keywords contradict each other.

        ``in_order``: the target is a stream, and ``target`` its name in messages.
        """
        if checksum is not None:
            from imgcore.engine.hashing import require_algorithm

            require_algorithm(checksum)
        platform = None if profile is None else _profile(profile)
        format, codec = stated_codec(target, format, flag="-O", in_order=in_order)
        name = target_format(target, fitting_format(platform, format) or None, flag="-O")
        if target_is_zero and not in_place:
            raise OptionError("--target-is-zero is about an existing target: it needs -n")
        if target_is_zero and backing is not None:
            raise OptionError("--target-is-zero: with a parent (-B) the target's disk is not zeros")
        if salvage and backing is not None:
            raise OptionError("salvaged data cannot be compared with a parent (-B)")
        policy = Reflink.from_keyword(reflink)
        if in_order:
            _refuse_in_order(in_place=in_place, has_backing=backing is not None, reflink=policy)
        sparse_nbytes = _sparse_nbytes(sparse)
        if policy.is_required:
            _refuse_with_reflinks(
                policy,
                {
                    "-c": compress,
                    "-B": backing is not None,
                    "-S 0": not sparse_nbytes,
                    "-n": in_place,
                    "--salvage": salvage,
                },
            )
        if salvage and trust_blocks:
            raise OptionError("blocks that are salvaged cannot be trusted (--trust-blocks)")
        if platform is not None:
            refuse_against_profile(
                platform,
                None if in_order else target,
                with_backing=backing is not None,
                in_place=in_place,
                compress=compress,
            )
        return cls(
            format=name,
            options=fitting_options(platform, name, options),
            compress=compress,
            backing=backing_reference(target, backing, backing_format),
            sparse_nbytes=sparse_nbytes,
            threads=thread_count(threads),
            in_place=in_place,
            target_is_zero=target_is_zero,
            salvage=salvage,
            reflink=policy,
            trust_blocks=trust_blocks,
            variants=chosen_variants(kernels),
            profile=platform,
            limit=limit,
            checksum=checksum,
            codec=codec,
            in_order=in_order,
        )

    @property
    def pauses(self) -> RateLimit | None:
        """The limit for reading that the rate is not about: only its pauses count."""
        from imgcore._core import RateLimit

        return None if self.limit is None else RateLimit(pauses_of=self.limit)

    @property
    def could_be_in_place(self) -> bool:
        """Whether these options allow that the disk is written over an existing one."""
        is_plain = self.format == PLAIN_FORMAT and self.backing is None and not self.compress
        return is_plain and self.profile is None


def _profile(name: str) -> Profile:
    from imgcore.platforms.profiles import get_profile

    return get_profile(name)


def _refuse_in_order(*, in_place: bool, has_backing: bool, reflink: Reflink) -> None:
    """Raise OptionError for options that a stream of bytes in order cannot have."""
    if in_place:
        raise OptionError("a stream is not written in place (-n): name a file or a block device")
    if has_backing:
        raise OptionError("a stream has no folder, in which its parent (-B) could be found")
    if reflink.is_required:
        reflink.refuse("a stream has no blocks that could be reflinked")


def _refuse_with_reflinks(policy: Reflink, given: Mapping[str, bool]) -> None:
    """Raise OptionError for an option that gives the target blocks of its own."""
    for flag, is_given in given.items():
        if is_given:
            policy.refuse(f"with {flag} the target needs its own blocks")


def _sparse_nbytes(sparse: SupportsIndex | str) -> int:
    nbytes = parse_size(sparse) if isinstance(sparse, str) else integer(sparse, "sparse")
    if nbytes < 0 or nbytes % SECTOR_NBYTES or nbytes > _MAX_SPARSE_NBYTES:
        raise OptionError(
            f"-S {nbytes}: it must be a multiple of {SECTOR_NBYTES}, at most {_MAX_SPARSE_NBYTES}"
        )
    return nbytes
