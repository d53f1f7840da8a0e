"""The eager back end held against the reference: what its tests share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from helpers import Geometry, Pair, assert_within_budget
from lcf_fast import eager, reference

F32, F64 = torch.float32, torch.float64
DTYPES = (F32, torch.float16, torch.bfloat16)
#: Small: for tests of what goes where.
SHARER, RECEIVER = Geometry(4, 2, 8), Geometry(4, 3, 10)
#: For tests by hypothesis; the fixtures that apply to all tests do nothing an example could see.
EXAMPLES = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def layer_of(weights: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    return {name: tensor[layer] for name, tensor in weights.items()}


def cloned(pairs: Sequence[Pair]) -> list[Pair]:
    return [(key.clone(), value.clone()) for key, value in pairs]


def flat(pairs: Sequence[Pair]) -> list[Tensor]:
    return [tensor for pair in pairs for tensor in pair]


def as_double(value: Any) -> Any:
    """Every float tensor in float64; whatever else as it is."""
    if isinstance(value, Mapping):
        return {name: as_double(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_double(item) for item in value]
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal down to the sign of zero and the payload of a NaN."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(whole), b.contiguous().view(whole))


def check(run: Callable[..., Sequence[Tensor]], got: Sequence[Tensor], *inputs: Any, k: float = 2.0) -> None:
    """``got`` against ``run(*inputs)``: the error budget; in float64, which has nothing wider, 1e-12 of the largest."""
    plain, wide = run(*inputs), run(*as_double(inputs))
    assert len(got) == len(plain)
    for result, truth, same in zip(got, wide, plain):
        if result.dtype == F64:
            largest = float(truth.abs().max()) if truth.numel() else 1.0
            torch.testing.assert_close(result, truth, rtol=1e-12, atol=1e-12 * max(largest, 1.0))
        else:
            assert_within_budget(result, truth, same, k)


def check_fuse(
    sharer: Sequence[Pair] | None, receiver: Sequence[Pair], weights: Mapping[str, Tensor], **kw: Any
) -> None:
    """`fuse_layers` within the budget; the same bits in place; a closed gate's tensor as it is."""
    live = [(bool(k), bool(v)) for k, v in (weights["gate_logit"] > 0).tolist()]
    before = cloned(receiver)
    got = eager.fuse_layers(sharer, receiver, weights, **kw)
    assert all(same_bits(a, b) for a, b in zip(flat(receiver), flat(before))), "the input was written"
    for new, old, gates in zip(got, receiver, live):
        assert [a is b for a, b in zip(new, old)] == [not is_open for is_open in gates]

    def run(sharer: Any, receiver: Any, weights: Any, message: Any) -> list[Tensor]:
        return flat(reference.fuse_layers(sharer, receiver, weights, **(kw | {"message": message})))

    check(run, flat(got), sharer, receiver, weights, kw.get("message"))
    edited = cloned(receiver)
    kept = flat(edited)
    back = eager.fuse_layers_(sharer, edited, weights, live=live, **kw)
    assert all(a is b for a, b in zip(flat(back), kept))
    assert all(same_bits(a, b) for a, b in zip(kept, flat(got))), "in place differs"


def check_pooling(
    sharer: Sequence[Pair], weights: Mapping[str, Tensor], offsets: Tensor, mask: Tensor | None = None
) -> None:
    """`summarize_layers` and `attention_pool` within the budget."""

    def summarize(sharer: Any, weights: Any) -> Sequence[Tensor]:
        return reference.summarize_layers(sharer, weights, offsets, attention_mask=mask)

    def pool(key: Tensor, value: Tensor, span_query: Tensor, global_query: Tensor) -> Pair:
        return reference.attention_pool(key, value, span_query, global_query, offsets, attention_mask=mask)

    check(summarize, eager.summarize_layers(sharer, weights, offsets, attention_mask=mask), sharer, weights)
    for layer, (key, value) in enumerate(sharer):
        queries = weights["span_query"][layer], weights["global_query"][layer]
        check(pool, eager.attention_pool(key, value, *queries, offsets, attention_mask=mask), key, value, *queries)
