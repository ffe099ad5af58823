"""The speed of each variant of each kernel: ``pytest benchmarks/bench_kernels.py``."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from imgcore import _core

SIZES = {"4k": 4 << 10, "64k": 64 << 10, "1M": 1 << 20, "64M": 64 << 20}


def runnable(operation: str) -> list[str]:
    """Return the variants that this machine runs."""
    return [str(row["name"]) for row in _core.variants()[operation] if row["runnable"]]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", runnable("zero"))
def test_is_zero(benchmark: BenchmarkFixture, variant: str, size: str) -> None:
    data = bytes(SIZES[size])
    benchmark.extra_info["nbytes"] = len(data)
    assert benchmark(_core.is_zero, data, variant)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", runnable("crc32c"))
def test_crc32c(benchmark: BenchmarkFixture, variant: str, size: str) -> None:
    data = bytes(SIZES[size])
    benchmark.extra_info["nbytes"] = len(data)
    assert benchmark(_core.crc32c, data, 0, variant) == _core.crc32c(data, 0, "portable")
