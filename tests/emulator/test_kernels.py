"""Our kernels as compiled for a chip, its PTX and its machine code, against the float64 reference.

All their tests run so by `make emulated`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from fused import check_fuse

from emulator.driver import Emulator
from helpers import Geometry, assert_within_budget, make_cache, make_weights, to_double
from lcf_fast import ops, reference, use_backend

GEOMETRY = Geometry(2, 2, 64)


@pytest.fixture(params=[(80, False), (90, False), (90, True)], ids=["sm_80", "sm_90", "sm_90.sass"])
def chip(request: pytest.FixtureRequest) -> Iterator[Emulator]:
    number, assembled = request.param
    with Emulator(number, assembled=assembled).active() as running:
        yield running
    running.check()


@pytest.mark.parametrize(
    ("dtype", "tokens", "kernels"),
    [
        (torch.bfloat16, 150, {"fuse_kernel"}),
        (torch.bfloat16, 5, {"down_partial_kernel", "finish_kernel"}),
    ],
    ids=["whole", "split"],
)
def test_fuse(dtype: torch.dtype, tokens: int, kernels: set[str], chip: Emulator, generator: torch.Generator) -> None:
    weights = make_weights(GEOMETRY, GEOMETRY, 64, dtype=dtype, generator=generator)
    own = make_cache(GEOMETRY, 1, tokens, dtype=dtype, generator=generator)
    other = make_cache(GEOMETRY, 1, tokens, dtype=dtype, generator=generator)
    check_fuse(other, own, weights)
    assert set(chip.launches) == kernels


def test_pool(chip: Emulator, generator: torch.Generator) -> None:
    key, value = make_cache(GEOMETRY, 1, 300, dtype=torch.float16, generator=generator)[0]
    span, whole = (torch.randn(2, 64, generator=generator).half() for _ in range(2))
    offsets = torch.tensor([[0, 100, 100, 300]], dtype=torch.int32)
    with use_backend("triton"):
        got = ops.attention_pool(key, value, span, whole, offsets)
    ((exact_key, exact_value),) = to_double([(key, value)])
    exact = reference.attention_pool(exact_key, exact_value, span.double(), whole.double(), offsets)
    plain = reference.attention_pool(key, value, span, whole, offsets)
    for one, true, same in zip(got, exact, plain):
        assert_within_budget(one, true, same)
    assert "pool_chunk_kernel" in chip.launches
