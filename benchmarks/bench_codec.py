"""The engine from memory to a null sink, for each level.

``pytest benchmarks/bench_codec.py`` measures reading memory, the zero test and the
codec, on one thread.
"""

from __future__ import annotations

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from tests.helpers import images

from imgcore import _core
from imgcore.engine import compression_levels as levels_module
from imgcore.engine import extents as extents_module
from imgcore.engine.geometry import Codec, CodecId, Geometry

BLOCK_NBYTES = 64 << 10
NBYTES = 32 << 20

CODECS = {
    "none": Codec(),
    **{
        f"deflate-{level}-{bits}": levels_module.deflate_codec(level, bits, CodecId.DEFLATE)
        for level in ("fastest", "fast", "default", "best")
        for bits in (12, 15)
    },
    **{
        f"zstd-{level}": levels_module.zstd_codec(level)
        for level in ("fastest", "fast", "default", "best")
    },
}


@pytest.fixture(scope="module")
def source() -> bytes:
    return images.text(NBYTES)


@pytest.mark.parametrize("name", CODECS)
def test_compress(benchmark: BenchmarkFixture, name: str, source: bytes) -> None:
    geometry = Geometry(BLOCK_NBYTES, NBYTES, codec=CODECS[name], store_incompressible=True)
    extents = extents_module.single(0, NBYTES, extents_module.Kind.DATA)
    placements = np.zeros(NBYTES // BLOCK_NBYTES, extents_module.PLACEMENT_DTYPE)

    def job() -> int:
        placements[:] = 0
        memory = (_core.File.from_memory(source), NBYTES, 0, 0)
        one = _core.Job(sources=[memory], geometry=geometry, target=_core.File.null(), threads=1)
        one.run(0, NBYTES, extents, None, placements)
        return int(placements["length"].sum())

    stored = benchmark(job)
    benchmark.extra_info["nbytes"] = NBYTES
    benchmark.extra_info["stored_nbytes"] = stored
    assert 0 < stored <= NBYTES
