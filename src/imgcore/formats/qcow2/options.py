"""QCOW2: the options of a new image, checked, and the sizes that follow from them.

No NumPy here.  Source: QEMU docs/interop/qcow2.rst.
"""

from __future__ import annotations

import os
from typing import Any, Final, NamedTuple

from imgcore import limits
from imgcore.engine.geometry import Codec, CodecId
from imgcore.errors import LimitExceededError, OptionError
from imgcore.formats.api import BackingReference, Option, WriteRequest
from imgcore.formats.qcow2 import layout

DEFAULT_CLUSTER_NBYTES: Final = 64 * limits.KIB
DEFAULT_REFCOUNT_BITS: Final = 16
_WINDOW_BITS: Final = {"4k": 12, "32k": 15}
_COMPAT_VERSION: Final = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}

# Smaller than anything DEFLATE (at best about 1032 : 1) or Zstandard (a frame header of 6 bytes,
# 4 bytes for each block of 128 KiB) make of a block: bounds how many share a host cluster.
_DEFLATE_MIN_NBYTES: Final = 3
_DEFLATE_BEST_RATIO: Final = 1032
_ZSTD_MIN_NBYTES: Final = 9
_ZSTD_BLOCK_BITS: Final = 17

OPTIONS: Final = (
    Option("cluster_size", "size", DEFAULT_CLUSTER_NBYTES, "cluster size, 512 to 2M"),
    Option(
        "compat",
        "choice",
        "1.1",
        "compatibility level: 0.10 (version 2) or 1.1 (version 3)",
        ("0.10", "1.1", "v2", "v3"),
    ),
    Option("compression_type", "choice", "zlib", "method of compressed clusters", ("zlib", "zstd")),
    Option(
        "preallocation",
        "choice",
        "off",
        "what is allocated ahead",
        ("off", "metadata", "falloc", "full"),
    ),
    Option("lazy_refcounts", "bool", False, "let writers postpone refcount updates"),
    Option("refcount_bits", "int", DEFAULT_REFCOUNT_BITS, "width of a refcount: 1, 2, 4 to 64"),
    Option(
        "level", "str", "default", "compression: fastest, fast, default, best; zstd also -7 to 19"
    ),
    Option("window", "choice", "4k", "zlib window; not all readers take 32k", ("4k", "32k")),
)

_REFUSED: Final = ("encryption", "encrypt.format", "extended_l2", "data_file", "data_file_raw")


class Qcow2Params(NamedTuple):
    """What a new image has to be, checked; sizes in bytes."""

    virtual_size: int
    version: int
    cluster_bits: int
    refcount_order: int
    compression_type: int
    lazy_refcounts: bool
    preallocation: str
    codec: Codec
    backing: BackingReference | None
    target_name: str

    @property
    def cluster_size(self) -> int:
        """Bytes of a cluster."""
        return 1 << self.cluster_bits

    @property
    def l2_entries(self) -> int:
        """Entries of one L2 table."""
        return self.cluster_size // layout.ENTRY_NBYTES

    @property
    def n_data_clusters(self) -> int:
        """Guest clusters, the last one may be short."""
        return -(-self.virtual_size // self.cluster_size)

    @property
    def l1_entries(self) -> int:
        """L2 tables that the disk needs; at least one, as QEMU takes no empty L1 table."""
        return max(1, -(-self.n_data_clusters // self.l2_entries))

    @property
    def l1_clusters(self) -> int:
        """Clusters that the L1 table takes."""
        return -(-self.l1_entries * layout.ENTRY_NBYTES // self.cluster_size)

    @property
    def max_refcount(self) -> int:
        """The largest refcount that can be written."""
        return int((1 << (1 << self.refcount_order)) - 1)

    @property
    def refcounts_per_block(self) -> int:
        """Host clusters that one refcount block covers."""
        return self.cluster_size * 8 >> self.refcount_order


def check_request(request: WriteRequest) -> Qcow2Params:
    """Turn a request into checked parameters.

    Raises
    ------
    OptionError
        A value is not allowed, or two do not go together.
    LimitExceededError
        The disk is too large for the cluster size.
    """
    options = {option.name: option.default for option in OPTIONS} | dict(request.options)
    for name in _REFUSED:
        if options.get(name) not in (None, False, "off", ""):
            raise OptionError(f"qcow2 option {name} is not supported")
    version = _COMPAT_VERSION.get(str(options["compat"]))
    if version is None:
        raise OptionError(f"qcow2 option compat is {options['compat']!r}, allowed 0.10 and 1.1")
    params = Qcow2Params(
        virtual_size=request.virtual_size,
        version=version,
        cluster_bits=_cluster_bits(int(options["cluster_size"])),
        refcount_order=_refcount_order(int(options["refcount_bits"])),
        compression_type=_compression_type(str(options["compression_type"])),
        lazy_refcounts=bool(options["lazy_refcounts"]),
        preallocation=_preallocation(str(options["preallocation"])),
        codec=_codec(options) if request.compress else Codec(),
        backing=request.backing,
        target_name=request.target_name,
    )
    _check_size(params)
    _check_together(params)
    _check_sharing(params)
    return params


def _cluster_bits(cluster_size: int) -> int:
    bits = cluster_size.bit_length() - 1
    low, high = limits.QCOW2_MIN_CLUSTER_BITS, limits.QCOW2_MAX_CLUSTER_BITS
    if cluster_size != 1 << max(bits, 0) or not low <= bits <= high:
        raise OptionError(
            f"qcow2 option cluster_size is {cluster_size}, allowed are powers of two from "
            f"{1 << low} to {1 << high}"
        )
    return bits


def _refcount_order(bits: int) -> int:
    order = bits.bit_length() - 1
    if order < 0 or bits != 1 << order or order > layout.MAX_REFCOUNT_ORDER:
        raise OptionError(
            f"qcow2 option refcount_bits is {bits}, allowed are powers of two from 1 to 64"
        )
    return order


def _compression_type(name: str) -> int:
    for number, known in layout.COMPRESSION_NAMES.items():
        if name == known:
            return number
    raise OptionError(f"qcow2 option compression_type is {name!r}, allowed zlib and zstd")


def _preallocation(mode: str) -> str:
    if mode not in ("off", "metadata", "falloc", "full"):
        raise OptionError(
            f"qcow2 option preallocation is {mode!r}, allowed off, metadata, falloc and full"
        )
    return mode


def _codec(options: dict[str, Any]) -> Codec:
    from imgcore.engine.levels import deflate_codec, zstd_codec

    level = options["level"]
    if options["compression_type"] == "zstd":
        return zstd_codec(level)
    window = _WINDOW_BITS.get(str(options["window"]))
    if window is None:
        raise OptionError(f"qcow2 option window is {options['window']!r}, allowed 4k and 32k")
    return deflate_codec(str(level), window, CodecId.DEFLATE)


def _check_size(params: Qcow2Params) -> None:
    size = params.virtual_size
    if size % limits.SECTOR_NBYTES or size < 0:
        raise OptionError(
            f"a qcow2 disk of {size} bytes is not possible, allowed are multiples of "
            f"{limits.SECTOR_NBYTES}"
        )
    if params.l1_entries * layout.ENTRY_NBYTES <= limits.QCOW2_MAX_L1_NBYTES:
        return
    for bits in range(params.cluster_bits + 1, limits.QCOW2_MAX_CLUSTER_BITS + 1):
        if size <= _max_virtual_size(bits):
            advice = f"cluster_size={_short(1 << bits)} is enough"
            break
    else:
        advice = (
            f"no cluster size allows more than {_max_virtual_size(limits.QCOW2_MAX_CLUSTER_BITS)}"
        )
    raise LimitExceededError(
        f"a qcow2 disk of {size} bytes needs an L1 table of "
        f"{params.l1_entries * layout.ENTRY_NBYTES} bytes with clusters of {params.cluster_size}, "
        f"allowed up to {limits.QCOW2_MAX_L1_NBYTES}: {advice}"
    )


def _max_virtual_size(cluster_bits: int) -> int:
    l2_tables = limits.QCOW2_MAX_L1_NBYTES // layout.ENTRY_NBYTES
    return l2_tables * ((1 << cluster_bits) // layout.ENTRY_NBYTES) << cluster_bits


def _short(nbytes: int) -> str:
    return f"{nbytes // limits.MIB}M" if nbytes >= limits.MIB else f"{nbytes // limits.KIB}k"


def _check_together(params: Qcow2Params) -> None:
    if params.version < 3:
        for name, given in (
            ("compression_type=zstd", params.compression_type != layout.COMPRESSION_ZLIB),
            ("lazy_refcounts=on", params.lazy_refcounts),
            (
                f"refcount_bits={1 << params.refcount_order}",
                params.refcount_order != layout.V2_REFCOUNT_ORDER,
            ),
        ):
            if given:
                raise OptionError(f"qcow2 option {name} needs compat=1.1")
    if params.preallocation != "off":
        if params.codec.codec is not CodecId.NONE:
            raise OptionError("qcow2: compression and preallocation do not go together")
        if params.backing is not None:
            raise OptionError("qcow2: a backing file and preallocation do not go together")
    if params.backing is not None:
        _check_backing(params, params.backing)


def _check_backing(params: Qcow2Params, backing: BackingReference) -> None:
    name_nbytes = len(os.fsencode(backing.name))
    if not 0 < name_nbytes <= limits.QCOW2_MAX_BACKING_NAME_NBYTES:
        raise OptionError(
            f"the backing file's name takes {name_nbytes} bytes, allowed 1 to "
            f"{limits.QCOW2_MAX_BACKING_NAME_NBYTES}"
        )
    if ":" in backing.name.partition("/")[0]:
        raise OptionError(
            f"readers take what stands before the colon in {backing.name!r} for a protocol: "
            "give the backing file's name with ./ before it"
        )
    nbytes = len(build_header(params, 0, 0, 0))
    if nbytes > params.cluster_size:
        raise OptionError(
            f"header and backing file's name take {nbytes} bytes, a cluster has "
            f"{params.cluster_size}"
        )


def _check_sharing(params: Qcow2Params) -> None:
    """Refuse refcounts that the number of compressed clusters in a host cluster may overflow."""
    if params.codec.codec is CodecId.NONE:
        return
    cluster_size = params.cluster_size
    if params.codec.codec is CodecId.ZSTD:
        n_blocks = max(1, cluster_size >> _ZSTD_BLOCK_BITS)
        smallest = _ZSTD_MIN_NBYTES + 4 * (n_blocks - 1)
    else:
        smallest = max(_DEFLATE_MIN_NBYTES, cluster_size // _DEFLATE_BEST_RATIO)
    sharers = cluster_size // smallest + 2
    if sharers > params.max_refcount:
        raise OptionError(
            f"qcow2 option refcount_bits={1 << params.refcount_order} is too small for "
            f"compression: up to {sharers} compressed clusters share one of {cluster_size} bytes"
        )


def build_header(
    params: Qcow2Params, l1_offset: int, refcount_table_offset: int, refcount_table_clusters: int
) -> bytes:
    """Return the first bytes of the image: header, extensions and the backing file's name."""
    v3 = params.version >= 3
    extensions = b""
    if params.backing is not None and params.backing.format is not None:
        name = params.backing.format
        data = layout.BACKING_FORMAT_NAMES.get(name, name).encode()
        extensions += _extension(layout.EXTENSION_BACKING_FORMAT, data)
    # In clusters smaller than this QEMU leaves the names out too, for the backing file's sake.
    if v3 and params.cluster_size >= 2 * limits.KIB:
        names = b"".join(layout.FEATURE_NAME.pack(*row) for row in layout.FEATURE_NAMES)
        extensions += _extension(layout.EXTENSION_FEATURE_NAMES, names)
    extensions += layout.EXTENSION.pack(layout.EXTENSION_END, 0)
    header_nbytes = layout.HEADER_V3_NBYTES if v3 else layout.HEADER_V2_NBYTES
    backing_name = b"" if params.backing is None else os.fsencode(params.backing.name)
    header = layout.HEADER_V2.pack(
        layout.MAGIC,
        params.version,
        header_nbytes + len(extensions) if backing_name else 0,
        len(backing_name),
        params.cluster_bits,
        params.virtual_size,
        layout.CRYPT_NONE,
        params.l1_entries,
        l1_offset,
        refcount_table_offset,
        refcount_table_clusters,
        0,
        0,
    )
    if v3:
        zstd = params.compression_type != layout.COMPRESSION_ZLIB
        header += layout.HEADER_V3_TAIL.pack(
            layout.INCOMPATIBLE_COMPRESSION if zstd else 0,
            layout.COMPATIBLE_LAZY_REFCOUNTS if params.lazy_refcounts else 0,
            0,
            params.refcount_order,
            header_nbytes,
        )
        header += bytes([params.compression_type]).ljust(8, b"\0")
    return header + extensions + backing_name


def _extension(kind: int, data: bytes) -> bytes:
    padded = data.ljust(-(-len(data) // 8) * 8, b"\0")
    return layout.EXTENSION.pack(kind, len(data)) + padded


def refcount_clusters(params: Qcow2Params, n_clusters: int) -> tuple[int, int]:
    """Return how many refcount blocks and table clusters cover ``n_clusters`` and themselves."""
    per_table_cluster = params.cluster_size // layout.ENTRY_NBYTES
    n_blocks = n_table = 0
    while True:
        total = n_clusters + n_blocks + n_table
        blocks = -(-total // params.refcounts_per_block)
        table = -(-blocks // per_table_cluster)
        if (blocks, table) == (n_blocks, n_table):
            return blocks, table
        n_blocks, n_table = blocks, table
