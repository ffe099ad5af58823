"""A source that was cut short, at many places in every format.

It is rejected, or reads as before if the part cut off was not needed.  Data never
becomes zeros.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tests.faults.harness import N_CUTS, Place, cuts, params
from tests.helpers import images, qemu
from tests.helpers.qemu import Variant


@pytest.mark.parametrize("variant", params([v for v in qemu.VARIANTS if v is not qemu.RAW]))
def test_cut(variant: Variant, place: Callable[[Variant], Place]) -> None:
    here = place(variant)
    rng = random.Random(images.SEED)
    whole = here.new
    # The file with the data: a flat extent is beside its descriptor.
    name = max(whole, key=lambda name: len(whole[name]))
    out = here.target.with_name("out.raw")
    refused = 0
    for nbytes in cuts(len(whole[name]), rng):
        here.reset({**whole, name: whole[name][:nbytes]})
        answer = here.agent.convert(
            here.target, out, qemu.RAW, more={"format": variant.format, "sync": False}
        )
        if answer["outcome"] == "error":
            refused += 1
            assert not out.exists()
            assert name in answer["text"] or here.target.name in answer["text"], answer
            continue
        assert out.read_bytes() == here.source.read_bytes(), f"cut to {nbytes}"
    assert refused > N_CUTS // 4
