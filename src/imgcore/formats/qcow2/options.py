"""QCOW2: the options of a new disk, and the header and sizes that follow from them.

This module does not import NumPy.  Source: QEMU docs/interop/qcow2.rst.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, ClassVar, Final, NamedTuple

from imgcore import limits
from imgcore.engine.geometry import Codec, CodecId, Geometry, Placing, Reuse
from imgcore.errors import LimitExceededError, OptionError
from imgcore.formats.options import (
    Foreign,
    FormatOptions,
    choice,
    flag,
    number,
    size_or_auto,
    table_place,
    text,
)
from imgcore.formats.qcow2 import layout
from imgcore.formats.shared.write_checks import (
    check_block_size,
    check_virtual_size,
    zero_policy,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from imgcore.formats.api import BackingReference, WriteRequest

_WINDOW_BITS: Final = {"4k": 12, "32k": 15}
_COMPAT_VERSION: Final = {"0.10": 2, "1.1": 3, "v2": 2, "v3": 3}
_COMPRESSION_TYPES: Final = {name: number for number, name in layout.COMPRESSION_NAMES.items()}

# Lower bounds of a compressed cluster's size limit how many fit in a host cluster.
# DEFLATE compresses at best about 1032 : 1.  Zstandard needs a frame header of 6 bytes
# and 4 bytes for each block of 128 KiB.
_DEFLATE_MIN_NBYTES: Final = 3
_DEFLATE_BEST_RATIO: Final = 1032
_ZSTD_MIN_NBYTES: Final = 9
_ZSTD_BLOCK_BITS: Final = 17


_DATA_FILE: Final = "external data files are not written: leave it out"
_ENCRYPTION: Final = "encrypted images are not written: leave it out"
_ENCRYPTION_KEYS: Final = (
    "cipher-alg",
    "cipher-mode",
    "detached-header",
    "format",
    "hash-alg",
    "iter-time",
    "ivgen-alg",
    "ivgen-hash-alg",
    "key-secret",
)


class Options(FormatOptions):
    """The ``-o`` options."""

    foreign: ClassVar[Mapping[str, Foreign]] = {
        **FormatOptions.foreign,
        "data_file": Foreign(reason=_DATA_FILE),
        "data_file_raw": Foreign({False: {}}, _DATA_FILE),
        "keep_data_file": Foreign({False: {}}, _DATA_FILE),
        "extended_l2": Foreign({False: {}}, "subclusters are not written: leave it out"),
        "encryption": Foreign({False: {}}, _ENCRYPTION),
        **{f"encrypt.{key}": Foreign(reason=_ENCRYPTION) for key in _ENCRYPTION_KEYS},
    }

    cluster_size: int = size_or_auto(
        64 * limits.KIB, "Cluster size, 512 to 2M", auto=(4 * limits.KIB, 2 * limits.MIB)
    )
    compat: str = choice(
        "1.1", tuple(_COMPAT_VERSION), "Compatibility level: 0.10 (version 2) or 1.1 (version 3)"
    )
    compression_type: str = choice(
        "zlib", tuple(_COMPRESSION_TYPES), "Method for compressed clusters"
    )
    preallocation: str = choice(
        "off", ("off", "metadata", "falloc", "full"), "What to allocate in advance"
    )
    lazy_refcounts: bool = flag("Allow later writers to postpone refcount updates")
    refcount_bits: int = number(16, "Width of a refcount: 1, 2, 4, 8, 16, 32 or 64")
    level: str | None = text(
        None,
        "Compression: fastest, fast, default, best; also -7 to 19 for zstd (if not given: default, "
        "and compressed blocks of the source are reused where possible)",
    )
    window: str = choice(
        "4k",
        tuple(_WINDOW_BITS),
        "Window of zlib; some readers do not accept 32k, and 4k reuses no blocks",
    )
    tables: str | None = table_place()


class WriteOptions(NamedTuple):
    """A verified request; sizes in bytes."""

    virtual_size: int
    version: int
    cluster_bits: int
    refcount_order: int
    compression_type: int
    lazy_refcounts: bool
    preallocation: str
    codec: Codec
    reuse_blocks: bool
    backing: BackingReference | None
    sparse_nbytes: int
    target_name: str

    @classmethod
    def of(cls, request: WriteRequest[Options]) -> WriteOptions:
        """Verify a request; raises OptionError or LimitExceededError."""
        options = request.options
        low, high = limits.QCOW2_MIN_CLUSTER_BITS, limits.QCOW2_MAX_CLUSTER_BITS
        check_block_size("cluster_size", options.cluster_size, 1 << low, 1 << high)
        check_block_size("refcount_bits", options.refcount_bits, 1, 1 << layout.MAX_REFCOUNT_ORDER)
        check_virtual_size(request.virtual_size)
        result = cls(
            virtual_size=request.virtual_size,
            version=_COMPAT_VERSION[options.compat],
            cluster_bits=options.cluster_size.bit_length() - 1,
            refcount_order=options.refcount_bits.bit_length() - 1,
            compression_type=_COMPRESSION_TYPES[options.compression_type],
            lazy_refcounts=options.lazy_refcounts,
            preallocation=options.preallocation,
            codec=_codec(options) if request.compress else Codec(),
            reuse_blocks=request.compress and _reuses_blocks(options),
            backing=request.backing,
            sparse_nbytes=request.sparse_nbytes,
            target_name=request.target_name,
        )
        _check_tables(result)
        _check_together(result)
        _check_compressed_refcounts(result)
        return result

    @property
    def cluster_size(self) -> int:
        """The size of a cluster in bytes."""
        return 1 << self.cluster_bits

    @property
    def l2_entries(self) -> int:
        """The number of entries in an L2 table."""
        return self.cluster_size // layout.ENTRY_NBYTES

    @property
    def n_data_clusters(self) -> int:
        """The number of guest clusters; the last one may be short."""
        return -(-self.virtual_size // self.cluster_size)

    @property
    def l1_entries(self) -> int:
        """The number of L1 entries; at least one, as QEMU rejects an empty L1 table."""
        return max(1, -(-self.n_data_clusters // self.l2_entries))

    @property
    def l1_clusters(self) -> int:
        """The number of clusters that the L1 table takes."""
        return -(-self.l1_entries * layout.ENTRY_NBYTES // self.cluster_size)

    @property
    def max_refcount(self) -> int:
        """The largest refcount that can be written."""
        return int((1 << (1 << self.refcount_order)) - 1)

    @property
    def refcounts_per_block(self) -> int:
        """The number of host clusters that one refcount block covers."""
        return self.cluster_size * 8 >> self.refcount_order


def _codec(options: Options) -> Codec:
    from imgcore.engine.compression_levels import DEFAULT_LEVEL, deflate_codec, zstd_codec

    level = options.level or DEFAULT_LEVEL
    if options.compression_type == "zstd":
        return zstd_codec(level)
    return deflate_codec(level, _WINDOW_BITS[options.window], CodecId.DEFLATE)


def _reuses_blocks(options: Options) -> bool:
    """Tell whether compressed blocks of a source may become clusters as they are.

    A window of 4 KiB is a promise that only own blocks keep: to find out whether
    another's do costs as much as compressing them.
    """
    any_window = options.compression_type == "zstd" or options.window == "32k"
    return any_window and options.level is None


def _check_tables(options: WriteOptions) -> None:
    """Reject a disk whose L1 table would be larger than readers accept."""
    size = options.virtual_size
    l1_nbytes = options.l1_entries * layout.ENTRY_NBYTES
    if l1_nbytes <= limits.QCOW2_MAX_L1_NBYTES:
        return
    for bits in range(options.cluster_bits + 1, limits.QCOW2_MAX_CLUSTER_BITS + 1):
        if size <= _max_virtual_size(bits):
            advice = f"cluster_size={_short(1 << bits)} is enough"
            break
    else:
        most = _max_virtual_size(limits.QCOW2_MAX_CLUSTER_BITS)
        advice = f"no cluster size allows more than {most}"
    raise LimitExceededError(
        f"a qcow2 disk of {size} bytes needs an L1 table of "
        f"{l1_nbytes} bytes with clusters of {options.cluster_size}, "
        f"allowed up to {limits.QCOW2_MAX_L1_NBYTES}: {advice}"
    )


def _max_virtual_size(cluster_bits: int) -> int:
    l2_tables = limits.QCOW2_MAX_L1_NBYTES // layout.ENTRY_NBYTES
    return l2_tables * ((1 << cluster_bits) // layout.ENTRY_NBYTES) << cluster_bits


def _short(nbytes: int) -> str:
    return f"{nbytes // limits.MIB}M" if nbytes >= limits.MIB else f"{nbytes // limits.KIB}k"


def _check_together(options: WriteOptions) -> None:
    if options.version < 3:
        for name, given in (
            ("compression_type=zstd", options.compression_type != layout.COMPRESSION_ZLIB),
            ("lazy_refcounts=on", options.lazy_refcounts),
            (
                f"refcount_bits={1 << options.refcount_order}",
                options.refcount_order != layout.V2_REFCOUNT_ORDER,
            ),
        ):
            if given:
                raise OptionError(f"qcow2 option {name} needs compat=1.1")
    if options.preallocation != "off":
        if options.codec.codec is not CodecId.NONE:
            raise OptionError("qcow2: compression and preallocation cannot be combined")
        if options.backing is not None:
            raise OptionError("qcow2: a backing file and preallocation cannot be combined")
    if options.backing is not None:
        _check_backing(options, options.backing)


def check_backing_name(backing: BackingReference) -> None:
    """Raise OptionError if an image cannot name its backing file so."""
    name_nbytes = len(os.fsencode(backing.name))
    if not 0 < name_nbytes <= limits.QCOW2_MAX_BACKING_NAME_NBYTES:
        raise OptionError(
            f"the backing file's name takes {name_nbytes} bytes, allowed 1 to "
            f"{limits.QCOW2_MAX_BACKING_NAME_NBYTES}"
        )
    if ":" in backing.name.partition("/")[0]:
        raise OptionError(
            f"readers take the text before the colon in {backing.name!r} for a protocol: "
            "give the backing file's name with ./ before it"
        )


def _check_backing(options: WriteOptions, backing: BackingReference) -> None:
    check_backing_name(backing)
    nbytes = len(build_header(options, 0, 0, 0))
    if nbytes > options.cluster_size:
        raise OptionError(
            f"the header and the backing file's name take {nbytes} bytes, allowed up to the "
            f"cluster size {options.cluster_size}"
        )


def _check_compressed_refcounts(options: WriteOptions) -> None:
    """Reject refcounts that compressed clusters in one host cluster might overflow."""
    if options.codec.codec is CodecId.NONE:
        return
    cluster_size = options.cluster_size
    if options.codec.codec is CodecId.ZSTD:
        n_blocks = max(1, cluster_size >> _ZSTD_BLOCK_BITS)
        smallest = _ZSTD_MIN_NBYTES + 4 * (n_blocks - 1)
    else:
        smallest = max(_DEFLATE_MIN_NBYTES, cluster_size // _DEFLATE_BEST_RATIO)
    most = cluster_size // smallest + 2
    if most > options.max_refcount:
        raise OptionError(
            f"qcow2 option refcount_bits={1 << options.refcount_order} is too small for "
            f"compression: one cluster of {cluster_size} bytes holds up to {most} compressed ones"
        )


def build_header(
    options: WriteOptions, l1_offset: int, refcount_table_offset: int, refcount_table_clusters: int
) -> bytes:
    """Return the start of the image: header, extensions, backing file's name."""
    v3 = options.version >= 3
    extensions = b""
    if options.backing is not None and options.backing.format is not None:
        extensions += backing_format(options.backing.format)
    # In smaller clusters QEMU omits the names too: they leave no room for the backing
    # file's name.
    if v3 and options.cluster_size >= 2 * limits.KIB:
        names = b"".join(layout.FEATURE_NAME.pack(*row) for row in layout.FEATURE_NAMES)
        extensions += extension(layout.EXTENSION_FEATURE_NAMES, names)
    extensions += layout.EXTENSION.pack(layout.EXTENSION_END, 0)
    header_nbytes = layout.HEADER_V3_NBYTES if v3 else layout.HEADER_V2_NBYTES
    backing_name = b"" if options.backing is None else os.fsencode(options.backing.name)
    header = layout.HEADER_V2.pack(
        layout.MAGIC,
        options.version,
        header_nbytes + len(extensions) if backing_name else 0,
        len(backing_name),
        options.cluster_bits,
        options.virtual_size,
        layout.CRYPT_NONE,
        options.l1_entries,
        l1_offset,
        refcount_table_offset,
        refcount_table_clusters,
        0,
        0,
    )
    if v3:
        zstd = options.compression_type != layout.COMPRESSION_ZLIB
        header += layout.HEADER_V3_TAIL.pack(
            layout.INCOMPATIBLE_COMPRESSION if zstd else 0,
            layout.COMPATIBLE_LAZY_REFCOUNTS if options.lazy_refcounts else 0,
            0,
            options.refcount_order,
            header_nbytes,
        )
        header += bytes([options.compression_type]).ljust(8, b"\0")
    return header + extensions + backing_name


def backing_format(name: str) -> bytes:
    """Return the header extension that states the backing file's format."""
    data = layout.BACKING_FORMAT_NAMES.get(name, name).encode()
    return extension(layout.EXTENSION_BACKING_FORMAT, data)


def extension(kind: int, data: bytes) -> bytes:
    """Return a header extension."""
    padded = data.ljust(-(-len(data) // 8) * 8, b"\0")
    return layout.EXTENSION.pack(kind, len(data)) + padded


def growing_geometry(options: WriteOptions) -> Geometry:
    """Return the geometry of an image that grows with its data."""
    return Geometry(
        block_nbytes=options.cluster_size,
        guest_nbytes=options.virtual_size,
        placing=Placing.APPEND,
        # Version 2 has no zero flag.
        zero_policy=zero_policy(
            options.sparse_nbytes,
            has_parent=options.backing is not None,
            can_hide_parent=options.version >= 3,
        ),
        stored_alignment=options.cluster_size,
        compressed_alignment=1,
        store_incompressible=options.codec.codec is not CodecId.NONE,
        codec=options.codec,
        sparse_nbytes=options.sparse_nbytes,
        reuse=Reuse.REUSE if options.reuse_blocks else Reuse.NONE,
    )


def refcount_clusters(
    options: WriteOptions, n_clusters: int, n_written: int = 0
) -> tuple[int, int]:
    """Return how many refcount blocks and table clusters to add.

    They cover ``n_clusters`` clusters and themselves.  ``n_written`` blocks, which are
    among these clusters, already exist.
    """
    per_table_cluster = options.cluster_size // layout.ENTRY_NBYTES
    n_blocks = n_table = 0
    while True:
        total = n_clusters + n_blocks + n_table
        all_blocks = -(-total // options.refcounts_per_block)
        table = -(-all_blocks // per_table_cluster)
        if (all_blocks - n_written, table) == (n_blocks, n_table):
            return n_blocks, n_table
        n_blocks, n_table = all_blocks - n_written, table
